"""Conditions among several fields, each a function that says why a field is wrong, or None."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ddmd_jax.config.fields import PROMPT_SETS, REAL_SETS
from ddmd_jax.config.rules import choice
from ddmd_jax.util import places

if TYPE_CHECKING:
    from ddmd_jax.families import Family
    from ddmd_jax.method.regularisers import Regulariser
    from ddmd_jax.method.schedules import Bounds, Schedule

    Active = Sequence[type[Regulariser]]  # those that have a weight

# (condition, the field it is about, the others it reads): asked where the config has all of them
# and each alone is right.
CONDITIONS: list[tuple] = []


def about(*paths: str) -> Callable[[Callable], Callable]:
    """Registers a condition on the first of `paths`; it takes their values in order."""
    def register(condition: Callable) -> Callable:
        CONDITIONS.append((condition, *paths))
        return condition
    return register


def look_up(sound: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Adds what names stand for to `sound` fields: `family`, `schedule`, active `regularisers`.

    Yields (field, why it is wrong) where nothing goes by a name, and takes that field out.
    """
    from ddmd_jax import families
    from ddmd_jax.method import regularisers, schedules

    def family(name: str) -> Family:
        found = families.get(name)
        if sound.get('task') == 'distill' and found.load is None:
            raise ValueError('has a text side here, and no teacher to distil')
        if sound.get('task') == 'pretrain' and not found.architecture:
            raise ValueError('must be of a family that is trained here: this one comes trained')
        if sound.get('task') == 'codec' and not found.codec:
            raise ValueError('must be of a family whose codec is trained here')
        return found

    def active(names: Sequence[str]) -> Active:
        return [kind for kind in map(regularisers.get, names)
                if sound.get(f'method.{kind.name}.weight')]

    for path, noun, get, known in (
            ('teacher.name', 'family', family, families.NAMES),
            ('method.schedule', 'schedule', schedules.get, schedules.SCHEDULES),
            ('method.regularisers', 'regularisers', active, ())):
        try:
            if path in sound:
                sound[noun] = get(sound[path])
        except ValueError as e:
            yield path, f'{e}{choice(*known).hint(sound[path])}'
            del sound[path]


@about('optim.student.name', 'optim.student.chain')
@about('optim.critic.name', 'optim.critic.chain')
def optimiser_known(name: str, chain: Sequence[Any]) -> str | None:
    known = choice('adamw', 'muon')
    if not chain and not known.ok(name):
        return f'must be {known.allowed} (any other: give a chain){known.hint(name)}'


@about('data.name', 'task', 'family')
def data_known(dataset: str, task: str, family: Family) -> str | None:
    known = choice(*family.data_sets, *(PROMPT_SETS if task == 'distill' else ()))
    if not known.ok(dataset):
        return f'must be {known.allowed} with teacher.name {family.name!r}{known.hint(dataset)}'


@about('codec.widths', 'codec.groups')
def norms_fit(widths: Sequence[int], groups: int) -> str | None:
    if any(width % groups for width in widths):
        return f'must be multiples of codec.groups = {groups}'


@about('codec.sides', 'codec.widths')
def crops_fit(sides: Sequence[int], widths: Sequence[int]) -> str | None:
    factor = 2 ** (len(widths) - 1)
    if any(side % factor for side in sides):
        return f'must be multiples of {factor}, the edge of a latent of {len(widths)} widths'


@about('codec.frozen_encoder', 'init_from')
def encoder_given(frozen: bool, init_from: str) -> str | None:
    if frozen and not init_from:
        return 'needs init_from, a run or a codec whose encoder is kept'


@about('data.sizes', 'family')
def sizes_fit(sizes: Sequence[Any], family: Family) -> str | None:
    if sizes and family.one_size:
        return f'must be empty for {family.name}, which has one size'


@about('teacher.attention', 'family')
def attention_fits(attention: str, family: Family) -> str | None:
    if attention not in family.attention:
        return f'must be {choice(*family.attention).allowed} for {family.name}'


@about('teacher.attention', 'method.gan.r1', 'regularisers')
def attention_twice(attention: str, r1: float, regularisers: Active) -> str | None:
    if r1 and attention != 'xla' and any(kind.name == 'gan' for kind in regularisers):
        return "must be 'xla' while method.gan.r1 is above 0: no kernel is differentiated twice"


@about('teacher.path', 'family')
def teacher_given(path: str, family: Family) -> str | None:
    if not path and not family.ships:
        return f'must name a diffusers folder, gs:// URL or hub id: {family.name} does not ship'


@about('teacher.variant', 'family')
def variant_read(variant: str, family: Family) -> str | None:
    if variant and not family.variants:
        return f"must be '' for {family.name}, whose weights have no variants"


@about('log.judge', 'eval.suite', 'family')
def judge_known(prompts: int, suite: str, family: Family) -> str | None:
    if prompts and not suite and not (family.suite and family.suite.watched):
        return f'must be 0 for {family.name}, whose suite judges nothing during a run'


@about('data.name', 'family', 'regularisers')
def reals_known(dataset: str, family: Family, regularisers: Active) -> str | None:
    data = family.data_sets.get(dataset)
    needing = [kind.name for kind in regularisers if kind.needs_real]
    if needing and not (dataset in REAL_SETS or (data and data.has_reals)):
        return f'has no real images: the weight of method.{needing[0]}, which needs them, must be 0'


@about('method.mean_variance.weight', 'method.mean_variance.mean',
       'method.mean_variance.variance', 'family')
def moments_known(weight: float, mean: float | None, variance: float | None,
                  family: Family) -> str | None:
    if weight and None in (mean, variance) and not family.knows_moments:
        return ('needs method.mean_variance.mean and .variance: those of real latents are not '
                f'known for {family.name} (the paper has .075 and .81 for SDXL)')


@about('method.null', 'family')
def null_offered(null: str, family: Family) -> str | None:
    if null not in family.nulls:
        return (f'must be {" or ".join(map(repr, family.nulls))} with teacher.name '
                f'{family.name!r}, which knows no other null prompt')


@about('resume')
@about('init_from')
@about('data.path')
def place_known(named: str) -> str | None:
    wrong = places.fault(named)
    return f'which {wrong}' if wrong else None


@about('teacher.path')
def place_reached(named: str) -> str | None:
    wrong = places.fault(named, places.ANY)
    return f'which {wrong}' if wrong else None


@about('student.first_step', 'student.steps', 'family')
def first_step_there(first: int | None, steps: int, family: Family) -> str | None:
    if first is not None and not family.table_steps:
        return f'must be None for {family.name}, whose time is no table of steps'
    if first is not None and not steps - 1 <= first < family.table_steps:
        return (f'must lie from student.steps - 1 = {steps - 1} to {family.table_steps - 1}, the '
                f'noisiest step of {family.name}')


@about('critic.order', 'critic.updates')
def order_has_updates(order: str, updates: int) -> str | None:
    if order == 'same_images' and not updates:
        return 'needs critic.updates of at least 1: one of them is with the student\'s'


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


@about('method.weight_ca', 'method.weight_dm', 'regularisers')
def some_weight(weight_ca: float, weight_dm: float, regularisers: Active) -> str | None:
    if not (weight_ca or weight_dm or regularisers):
        return ('must be above 0 while method.weight_dm and the weights of all regularisers are '
                '0: nothing would train the student')


@about('critic.updates', 'method.weight_dm', 'regularisers')
def critic_needed(updates: int, weight_dm: float, regularisers: Active) -> str | None:
    asking = ['method.weight_dm'] if weight_dm else []
    asking += [f'method.{kind.name}.weight' for kind in regularisers if kind.needs_critic]
    if asking and not updates:
        return (f'must be at least 1 while {" or ".join(asking)} is above 0: the critic has to '
                'follow the student')


@about('optim.critic.decay', 'train.on_health', 'optim.critic.chain')
def decay_knows_its_end(share: float, on_health: str, chain: Sequence[Any]) -> str | None:
    if share and on_health == 'raise_critic' and not chain:
        return ("must be 0, or train.on_health another than 'raise_critic': the decay is laid over "
                'the updates that were planned, and the critic would stand still in those that are '
                'added')


@about('critic.merge', *(f'{whose}.adapter.{name}' for whose in ('student', 'critic')
                         for name in ('kind', 'rank', 'alpha', 'targets')))
def merges(decay: float, *adapters: Any) -> str | None:
    student, critic = adapters[:4], adapters[4:]
    full = student[0] == critic[0] == 'full'
    if decay != 1 and not full and list(student) != list(critic):
        return ('must be 1 while student.adapter and critic.adapter differ: there is nothing of '
                'the student that the critic could be moved towards')


@about('log.tracker')
def tracker_there(name: str) -> str | None:
    # A folder of that name that lies here has no loader.
    if name and getattr(importlib.util.find_spec(name), 'loader', None) is None:
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


# What the student's last step is found by.
STEPS = ('method.schedule', 'student.steps', 'student.first_step', 'family')


@about('method.tau_ca', 'schedule', *STEPS)
@about('method.tau_ca_end', 'schedule', *STEPS)
def tau_ca_reaches(span: Sequence[float], schedule: Schedule, *steps: Any) -> str | None:
    return _reaches(span, schedule.ca, *steps)


@about('method.tau_dm', 'schedule', *STEPS)
@about('method.tau_dm_end', 'schedule', *STEPS)
def tau_dm_reaches(span: Sequence[float], schedule: Schedule, *steps: Any) -> str | None:
    return _reaches(span, schedule.dm, *steps)


def _reaches(span: Sequence[float], bounds: Bounds, name: str, steps: int, first: int | None,
             family: Family) -> str | None:
    """A term that is bounded below needs room above the bound of the student's last step."""
    last = (steps - 1) / steps
    if count := family.table_steps:  # `StepTable.steps`, and the next cleaner one
        first = count - 1 if first is None else first
        last = (count - first + (steps - 1) * (first + 1) // steps) / count
    low = bounds.low(last)
    if span and span[1] <= low:
        return (f'its upper end must be above {low:.4g}, where {name} draws this tau from at the '
                f'last of {steps} steps')


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
