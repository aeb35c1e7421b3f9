"""Conditions among several fields, each a function that says why a field is wrong, or None."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from ddmd_jax.config.fields import PROMPT_SETS
from ddmd_jax.config.rules import choice

# (condition, the field it is about, the others it reads): asked where the config has all of them
# and each alone is right.
CONDITIONS: list[tuple] = []


def about(*paths: str) -> Callable[[Callable], Callable]:
    """Registers a condition on the first of `paths`; it takes their values in order."""
    def register(condition: Callable) -> Callable:
        CONDITIONS.append((condition, *paths))
        return condition
    return register


def _family(name: str) -> Any:
    from ddmd_jax import families

    return families.get(name)


@about('optim.student.name', 'optim.student.chain')
@about('optim.critic.name', 'optim.critic.chain')
def optimiser_known(name: str, chain: Sequence[Any]) -> str | None:
    from ddmd_jax.train.optim import NAMES

    known = choice(*NAMES)
    if not chain and not known.ok(name):
        return f'must be {known.allowed} (any other: give a chain){known.hint(name)}'


@about('teacher.name', 'task')
def teacher_known(teacher: str, task: str) -> str | None:
    from ddmd_jax import families

    try:
        family = families.get(teacher)
    except families.UnknownFamily as e:
        return f'{e}{choice(*families.NAMES).hint(teacher)}'
    if task == 'distill' and family.load is None:
        return 'has a text side here, and no teacher to distil'
    if task == 'pretrain' and not family.architecture:
        return 'must be of a family that is trained here: this one comes trained'


@about('data.name', 'teacher.name', 'task')
def data_known(dataset: str, teacher: str, task: str) -> str | None:
    known = choice(*_family(teacher).data_sets, *(PROMPT_SETS if task == 'distill' else ()))
    if not known.ok(dataset):
        return f'must be {known.allowed} with teacher.name {teacher!r}{known.hint(dataset)}'


@about('data.sizes', 'teacher.name')
def sizes_fit(sizes: Sequence[Any], teacher: str) -> str | None:
    if sizes and _family(teacher).one_size:
        return f'must be empty for {teacher}, which has one size'


@about('teacher.attention', 'teacher.name')
def attention_fits(attention: str, teacher: str) -> str | None:
    known = choice(*_family(teacher).attention)
    if not known.ok(attention):
        return f'must be {known.allowed} for {teacher}, whose network takes no other'


@about('teacher.path', 'teacher.name')
def teacher_given(path: str, teacher: str) -> str | None:
    if not path and not _family(teacher).ships:
        return f'must name a diffusers folder, gs:// URL or hub id: {teacher} does not ship'


@about('log.judge', 'teacher.name', 'eval.suite')
def judge_known(prompts: int, teacher: str, suite: str) -> str | None:
    own = _family(teacher).suite
    if prompts and not suite and not (own and own.watched):
        return f'must be 0 for {teacher}, whose suite judges nothing during a run'


@about('method.gan.weight', 'data.name', 'teacher.name')
def reals_known(weight: float, dataset: str, teacher: str) -> str | None:
    known = [name for name, data in _family(teacher).data_sets.items() if data.has_reals]
    if weight and dataset not in known:
        return (f'must be 0 while data.name is {dataset!r}: a GAN needs real images, and only '
                f'{" or ".join(map(repr, known)) or "data sets of other families"} have them')


@about('method.mean_variance.weight', 'method.mean_variance.mean',
       'method.mean_variance.variance', 'teacher.name')
def moments_known(weight: float, mean: float | None, variance: float | None,
                  teacher: str) -> str | None:
    if weight and None in (mean, variance) and not _family(teacher).knows_moments:
        return ('needs method.mean_variance.mean and .variance: those of real latents are not '
                f'known for {teacher} (the paper has .075 and .81 for SDXL)')


@about('method.schedule')
def schedule_known(schedule: str) -> str | None:
    from ddmd_jax.method import schedules

    try:
        schedules.get(schedule)
    except ValueError as e:
        known = choice(*schedules.SCHEDULES)
        return f'must be {known.allowed}, or a dotted name ({e}){known.hint(schedule)}'


@about('method.regularisers')
def regularisers_known(names: Sequence[str]) -> str | None:
    from ddmd_jax.method import regularisers

    try:
        for name in names:
            regularisers.get(name)
    except ValueError as e:
        return f'must name regularisers: {e}'


@about('init_from', 'resume')
def one_start(init_from: str, resume: str) -> str | None:
    if init_from and resume:
        return (f"must be '' while config.resume is {resume!r}: a run starts from another's whole "
                'state or from its weights alone')


@about('mesh.data', 'mesh.fsdp', 'mesh.tensor')
def one_axis_left(*sizes: int) -> str | None:
    if sizes.count(-1) > 1:
        return f'only one of data, fsdp, tensor may be -1 (whatever is left), not {sizes}'


@about('method.alpha', 'method.weight_ca')
def alpha_guides(alpha: float, weight_ca: float) -> str | None:
    if weight_ca > 0 and alpha <= 1:
        return ('must be above 1 while method.weight_ca is above 0: it is the guidance scale, not '
                'alpha - 1, and alpha = 1 makes CA zero')


@about('method.weight_ca', 'method.weight_dm', 'method.mean_variance.weight',
       'method.gan.weight')
def some_weight(weight_ca: float, *others: float) -> str | None:
    if not any((weight_ca, *others)):
        return ('must be above 0 while method.weight_dm, method.mean_variance.weight and '
                'method.gan.weight are 0: nothing would train the student')


@about('critic.updates', 'method.weight_dm', 'method.gan.weight')
def critic_needed(updates: int, weight_dm: float, gan: float) -> str | None:
    if not updates and (weight_dm or gan):
        return ('must be at least 1 while method.weight_dm or method.gan.weight is above 0: they '
                'ask the critic, which has to follow the student')


@about('log.tracker')
def tracker_there(name: str) -> str | None:
    from ddmd_jax.train.watch.trackers import installed

    if not installed(name):
        return f'which is not installed here: pip install {name}'


@about('method.tau_relax', 'method.tau_ca_end', 'method.tau_dm_end')
def relaxes(updates: int, *ends: Sequence[float]) -> str | None:
    if bool(updates) != any(map(bool, ends)):
        return ('goes with method.tau_ca_end or method.tau_dm_end: the number of updates in which '
                'a range gets to its end')


@about('data.global_batch', 'student.steps', 'train.accumulate')
def batch_divides(batch: int, steps: int, accumulate: int) -> str | None:
    """Every micro-batch holds every generator step equally often."""
    unit = steps * accumulate
    if batch % unit:
        return (f'must be a multiple of student.steps * train.accumulate = {steps} * {accumulate}: '
                f'steps not dividing; the next batch that does: {unit * -(-batch // unit)}')


def tau_reaches(term: str, span: Sequence[float], schedule: str, steps: int) -> str | None:
    """A term that is bounded below needs room above the bound of the student's last step."""
    from ddmd_jax.method import schedules

    low = getattr(schedules.get(schedule), term).low((steps - 1) / steps)
    if span and span[1] <= low:
        return (f'its upper end must be above {low:.4g}, where {schedule} draws this tau from at '
                f'the last of {steps} steps')


for _term in ('ca', 'dm'):
    for _path in (f'method.tau_{_term}', f'method.tau_{_term}_end'):
        about(_path, 'method.schedule', 'student.steps')(functools.partial(tau_reaches, _term))


@about(*(f'teacher.model.denoiser.{name}' for name in (
    'hidden_size', 'num_attention_heads', 'num_kv_heads', 'axes_dim_rope')))
def denoiser_builds(hidden: int, heads: int, kv_heads: int, rope: Sequence[int]) -> str | None:
    from ddmd_jax.models.nextdit import NextDiTConfig

    try:
        NextDiTConfig(hidden_size=hidden, num_attention_heads=heads, num_kv_heads=kv_heads,
                      axes_dim_rope=tuple(rope))
    except ValueError as e:
        return f'{e}; found num_attention_heads {heads}, num_kv_heads {kv_heads}, axes {rope}'


@about('teacher.model.text.dim', 'teacher.model.text.num_heads',
       'teacher.model.denoiser.cap_feat_dim')
def text_fits(dim: int, heads: int, cap_feat_dim: int) -> str | None:
    if dim % heads or dim != cap_feat_dim:
        return (f'must be a multiple of its num_heads = {heads}, and the same as '
                f"the denoiser's cap_feat_dim = {cap_feat_dim}")
