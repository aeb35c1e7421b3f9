"""Conditions among several fields, each a function that says why a field is wrong, or None."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

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


@about('optim.student.name', 'optim.student.chain')
@about('optim.critic.name', 'optim.critic.chain')
def optimiser_known(name: str, chain: Sequence[Any]) -> str | None:
    from ddmd_jax.train.optim import NAMES

    known = choice(*NAMES)
    if not chain and not known.ok(name):
        return f'must be {known.allowed} (any other: give a chain){known.hint(name)}'


@about('teacher.name', 'task')
def teacher_known(teacher: str, task: str) -> str | None:
    from ddmd_jax.families import NAMES

    # The embedded one is trained here; the others come trained.
    known = choice(*(NAMES[:2] if task == 'distill' else ('emoji',)))
    if not known.ok(teacher):
        return f'must be {known.allowed}{known.hint(teacher)}'


@about('data.name', 'teacher.name', 'task')
def data_known(dataset: str, teacher: str, task: str) -> str | None:
    known = choice(*(('emoji', 'prompts', 'embeddings') if task == 'distill' else ('emoji',)))
    if not known.ok(dataset):
        return f'must be {known.allowed}{known.hint(dataset)}'


@about('method.schedule')
def schedule_known(schedule: str) -> str | None:
    from ddmd_jax.method.schedules import SCHEDULES

    known = choice(*SCHEDULES)
    if not known.ok(schedule):
        return f'must be {known.allowed}{known.hint(schedule)}'


@about('data.name', 'teacher.name')
def teacher_knows(dataset: str, teacher: str) -> str | None:
    if dataset == 'emoji' and teacher != 'emoji':
        return (f'does not go with teacher.name {teacher!r}: the emoji captions are for the emoji '
                "teacher; give 'prompts' or 'embeddings'")


@about('data.sizes', 'teacher.name')
def sizes_fit(sizes: Sequence[Any], teacher: str) -> str | None:
    if teacher == 'emoji' and sizes:
        return 'must be empty for the emoji teacher, which has one size'


@about('teacher.attention', 'teacher.name')
def attention_fits(attention: str, teacher: str) -> str | None:
    if teacher == 'emoji' and attention == 'splash':
        return "must be 'xla' or 'auto' for the emoji teacher, whose few tokens need no kernel"


@about('teacher.path', 'teacher.name')
def teacher_given(path: str, teacher: str) -> str | None:
    if teacher != 'emoji' and not path:
        return f'must name a diffusers folder, gs:// URL or hub id: {teacher} does not ship'


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


@about('log.judge', 'teacher.name')
def judge_knows(prompts: int, teacher: str) -> str | None:
    if prompts and teacher != 'emoji':
        return f'must be 0 for {teacher}: the judge that ships knows emoji only'


@about('log.tracker')
def tracker_there(name: str) -> str | None:
    from ddmd_jax.train.watch.trackers import installed

    if not installed(name):
        return f'which is not installed here: pip install {name}'


@about('method.gan.weight', 'data.name')
def reals_known(weight: float, dataset: str) -> str | None:
    if weight and dataset != 'emoji':
        return (f'must be 0 while data.name is {dataset!r}: a GAN needs real images, and only '
                "'emoji' comes with them")


@about('method.mean_variance.weight', 'method.mean_variance.mean',
       'method.mean_variance.variance', 'teacher.name')
def moments_known(weight: float, mean: float | None, variance: float | None,
                  teacher: str) -> str | None:
    if weight and teacher != 'emoji' and None in (mean, variance):
        return ('needs method.mean_variance.mean and .variance: those of real latents are not '
                f'known for {teacher} (the paper has .075 and .81 for SDXL)')


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
    """A bounded term draws tau from the generator's time upwards; the last step needs room."""
    from ddmd_jax.method.schedules import SCHEDULES

    last = (steps - 1) / steps
    bounded = schedule in SCHEDULES and getattr(SCHEDULES[schedule], f'{term}_bounded')
    if bounded and span and span[1] <= last:
        return (f'its upper end must be above {last:.4g}, the pre-shift time of the last of '
                f'{steps} steps: {schedule} draws this tau from there upwards')


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
