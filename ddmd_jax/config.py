"""Validation of a run's config: every wrong field at once, in words, before anything is built.

A schema is a flat table, dotted field -> `Rule`; what only several fields together can get
wrong is a named function below the tables. The two tasks have a schema each, that of
`configs/emoji.py` (distill) and that of `configs/emoji_teacher.py` (pretrain).
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import numbers
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from ddmd_jax.losses.critic import WEIGHTINGS
from ddmd_jax.losses.decoupled import NORMALISERS
from ddmd_jax.sampling import SOLVERS, STUDENT_MODES
from ddmd_jax.schedules import SCHEDULES
from ddmd_jax.sharding import AXES

TASKS = ('distill', 'pretrain')
DATASETS = ('emoji', 'prompts', 'embeddings')
DTYPES = ('float32', 'bfloat16')
MAX_STEPS = 64
MAX_TAU = 0.999


class ConfigError(ValueError):
    """A config with wrong fields; the message has a line for each of them."""


def check(config: ConfigDict) -> None:
    """Does nothing if `config` describes a run of its task.

    Raises:
      ConfigError: naming every field that is wrong, the value found and what is allowed.
    """
    lines = validate(config)
    if lines:
        count = '1 field is' if len(lines) == 1 else f'{len(lines)} fields are'
        raise ConfigError('\n'.join([f'config: {count} wrong', *lines]))


def validate(config: ConfigDict) -> list[str]:
    """One line for each wrong field of `config`: field, value found, what is allowed."""
    values = config.to_dict()
    # Told by its sections, so that a misspelt task still has all its fields checked.
    distill = values.get('task') == 'distill' or (
        values.get('task') not in TASKS and 'critic' in values)
    schema = distill_schema(_dataset(config)) if distill else pretrain_schema()
    sound: dict[str, Any] = {}
    lines = list(_section_errors(schema, values, '', sound))
    for rule, field, *others in DISTILL_TOGETHER if distill else PRETRAIN_TOGETHER:
        if {field, *others} <= sound.keys():
            words = rule(sound[field], *(sound[other] for other in others))
            lines += [f'{field}: {_show(sound[field])}, {words}'] if words else []
    return lines


# ---- Rules: what one field may hold


@dataclasses.dataclass(frozen=True)
class Rule:
    """A test of one value, and the words that follow 'must be' when it fails.

    `hint` adds what can only be said knowing the value; a field with a `default` may be absent.
    """

    allowed: str
    ok: Callable[[Any], bool]
    hint: Callable[[Any], str] = lambda value: ''
    default: Any = dataclasses.field(default_factory=lambda: dataclasses.MISSING)


def _is_number(value: Any, kind: type = numbers.Real) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)


_BOUNDS = {'at_least': (operator.ge, 'at least'), 'above': (operator.gt, 'above'),
           'at_most': (operator.le, 'at most'), 'below': (operator.lt, 'below')}


def number(why: str = '', noun: str = 'a number', kind: type = numbers.Real,
           **bounds: float) -> Rule:
    """A finite number (an integer will do, a bool not) within `at_least`, `above`, ..."""
    words = ' and '.join(f'{_BOUNDS[name][1]} {bound}' for name, bound in bounds.items())
    ok = lambda value: _is_number(value, kind) and all(
        _BOUNDS[name][0](value, bound) for name, bound in bounds.items())
    return Rule(f'{noun} {words}'.strip() + (why and f': {why}'), ok)


whole = functools.partial(number, noun='a whole number', kind=numbers.Integral)


def choice(names: Sequence[str]) -> Rule:
    """One of `names`; a near miss is told which it resembles."""
    near = lambda value: difflib.get_close_matches(str(value), names, 1)
    words = ' or '.join(map(repr, names)) if len(names) < 3 else f'one of {", ".join(names)}'
    return Rule(words, lambda value: isinstance(value, str) and value in names,
                lambda value: f'; did you mean {near(value)[0]!r}?' if near(value) else '')


def or_none(rule: Rule) -> Rule:
    return Rule(f'None or {rule.allowed}', lambda value: value is None or rule.ok(value))


def several(count: int, noun: str, ok: Callable[..., bool]) -> Rule:
    """A tuple or list of `count` numbers that `ok` accepts together."""
    return Rule(noun, lambda value: isinstance(value, (tuple, list)) and len(value) == count
                and all(map(_is_number, value)) and ok(*value))


def _chain_fault(chain: Any) -> str:
    """Why the links do not build, '' if they do; building a transformation allocates nothing."""
    import optax

    try:
        for name, kwargs in chain:
            if not isinstance(getattr(optax, name)(**kwargs), optax.GradientTransformation):
                return f'; optax.{name} is not a gradient transformation'
    except Exception as e:  # whatever a transformation raises, its arguments are at fault
        return f'; {e}'
    return ''


COUNT = whole(at_least=1)
FLAG = Rule('True or False', lambda value: isinstance(value, bool))
TEXT = Rule('a string', lambda value: isinstance(value, str))
TAU_RANGE = several(
    2, f'two numbers with 0 <= low < high <= {MAX_TAU}: the clean end (1) has no noise left to '
    'normalise by', lambda low, high: 0 <= low < high <= MAX_TAU)
CHAIN = Rule('a sequence of (name in optax, its keyword arguments)',
             lambda value: isinstance(value, (tuple, list)) and not _chain_fault(value),
             _chain_fault)


# ---- Schemas: dotted field -> rule


def _optimiser(section: str) -> dict[str, Rule]:
    """`name` is judged with `chain`, which stands for it: see `optimiser_known`."""
    rules = {
        'name': TEXT, 'lr': number(above=0), 'b1': number(at_least=0, below=1),
        'b2': number(above=0, below=1), 'eps': number(above=0),
        'weight_decay': number(at_least=0), 'clip': number('0 is off', at_least=0),
        'warmup': whole(at_least=0), 'decay': number(at_least=0, at_most=1),
        'mu_dtype': choice(DTYPES), 'chain': CHAIN,
    }
    return {f'{section}.{name}': rule for name, rule in rules.items()}


def _common() -> dict[str, Rule]:
    """What the schemas of both tasks hold."""
    from ddmd_jax.train.guards import ON_NAN

    axis = Rule('a whole number at least 1, or -1 for whatever is left',
                lambda value: whole(at_least=-1).ok(value) and value != 0)
    return {
        'task': choice(TASKS),
        'seed': whole(at_least=0),
        'resume': TEXT, 'init_from': TEXT,
        'student.ema': number(at_least=0, below=1),
        'student.ema_ramp': FLAG,
        'data.name': choice(DATASETS),
        **{f'mesh.{name}': axis for name in AXES},
        **dict.fromkeys(('data.global_batch', 'train.steps',
                         'checkpoint.every', 'checkpoint.keep', 'log.every',
                         'log.images_every'), COUNT),
        'checkpoint.keep_every': whole('0 is off', at_least=0),
        'checkpoint.best': TEXT,
        'checkpoint.best_mode': choice(('min', 'max')),
        'train.on_nan': choice(ON_NAN),
        'train.spike': number('0 is off', at_least=0),
        **_optimiser('optim.student'),
    }


def _dataset(config: Any) -> str:
    """The data set whose fields `config` should have; told by them where its name is wrong."""
    data = config.to_dict().get('data')
    data = data if isinstance(data, Mapping) else {}
    if data.get('name') in DATASETS:
        return data['name']
    return 'prompts' if {'path', 'sizes', 'lengths'} & set(data) else 'emoji'


def _emoji_data() -> dict[str, Rule]:
    return {'data.white_repeat': COUNT}


def _prompts_data() -> dict[str, Rule]:
    """Of prompts in a file or folder of their own, encoded or not."""
    return {'data.path': Rule('the name of a set of prompts, or of embeddings',
                              lambda value: isinstance(value, str) and value != ''),
            'data.sizes': Rule('a sequence of (height, width) in pixels; empty: the teacher\'s own',
                               lambda value: _is_sequence(value) and all(map(_is_size, value))),
            'data.lengths': Rule('an ascending sequence of token counts; empty: batches are not '
                                 'cut', lambda value: _is_sequence(value) and _ascends(value))}


def _is_sequence(value: Any) -> bool:
    return isinstance(value, (tuple, list))


def _is_size(value: Any) -> bool:
    return _is_sequence(value) and len(value) == 2 and all(map(COUNT.ok, value))


def _ascends(values: Sequence[Any]) -> bool:
    return all(map(COUNT.ok, values)) and all(a < b for a, b in zip(values, values[1:]))


def distill_schema(dataset: str = 'emoji') -> dict[str, Rule]:
    """Every field of a distillation's config on `dataset`."""
    from ddmd_jax.models.attention import KINDS as ATTENTION
    from ddmd_jax.models.layers import REMAT_POLICIES
    from ddmd_jax.teachers import FAMILIES
    from ddmd_jax.train.distill import OFFLOAD
    from ddmd_jax.train.guards import ON_HEALTH
    from ddmd_jax.train.step import TEACHER_PASSES

    each = 'the critic must be updated at least once per generator update'
    data = _emoji_data() if dataset == 'emoji' else _prompts_data()
    return _common() | data | {
        'teacher.name': choice(FAMILIES),
        'teacher.path': TEXT,
        'teacher.dtype': choice(DTYPES),
        'teacher.param_dtype': choice(DTYPES),
        'teacher.remat': choice(('none', *REMAT_POLICIES)),
        'teacher.attention': choice(ATTENTION),
        'student.steps': whole(at_least=1, at_most=MAX_STEPS),
        'student.sampler': choice(STUDENT_MODES),
        'critic.updates': whole(each, at_least=1),
        'critic.warmup': whole(at_least=0),
        'critic.weighting': choice(WEIGHTINGS),
        'critic.tau': TAU_RANGE,
        'method.schedule': choice(tuple(SCHEDULES)),
        'method.alpha': number(),
        'method.weight_ca': number(at_least=0),
        'method.weight_dm': number(at_least=0),
        'method.tau_ca': TAU_RANGE,
        'method.tau_dm': TAU_RANGE,
        'method.normaliser': choice(NORMALISERS),
        'method.floor': number('no floor, and a tiny denominator makes NaNs', above=0),
        'method.shift': or_none(number("None takes the teacher's", above=0)),
        **dict.fromkeys(('train.accumulate', 'eval.prompts', 'eval.held_out', 'eval.batch',
                         'eval.teacher_steps'), COUNT),
        'train.teacher_passes': choice(TEACHER_PASSES),
        'train.offload': choice(tuple(OFFLOAD)),
        'train.on_health': choice(ON_HEALTH),
        'log.probe': whole('0 is off', at_least=0),
        'eval.guidance': number('1 is no guidance', at_least=1),
        'eval.solver': choice(SOLVERS),
        **_optimiser('optim.critic'),
    }


def pretrain_schema() -> dict[str, Rule]:
    """Every field of a teacher's training; the architecture's are those of its dataclasses."""
    from ddmd_jax.models.nextdit import NextDiTConfig
    from ddmd_jax.models.text.caption import CaptionEncoderConfig

    return _common() | _emoji_data() | {
        # The embedded one: the others come trained.
        'teacher.name': choice(('emoji',)), 'data.name': choice(('emoji',)),
        'method.dropout': number(at_least=0, below=1),
        'method.time_mean': number(),
        'method.time_std': number(above=0),
        **_architecture('teacher.model.denoiser', NextDiTConfig),
        **_architecture('teacher.model.text', CaptionEncoderConfig),
    }


def _architecture(section: str, cls: type) -> dict[str, Rule]:
    """Rules of a config dataclass's fields by their annotations; defaults may be left out."""
    from ddmd_jax.models.layers import REMAT_POLICIES

    even = lambda dim: whole(at_least=2).ok(dim) and dim % 2 == 0
    by_name = {'dtype': choice(DTYPES), 'remat': choice(('none', *REMAT_POLICIES)),
               'attention': choice(('xla',))}
    by_type = {
        'int': COUNT, 'float': number(above=0), 'bool': FLAG, 'str': TEXT,
        'float | None': or_none(number(above=0)),
        'tuple[int, int, int]': several(3, 'three even whole numbers, at least 2',
                                        lambda *dims: all(even(dim) for dim in dims)),
    }
    return {f'{section}.{f.name}': dataclasses.replace(
        by_name.get(f.name, by_type[f.type]), default=f.default) for f in dataclasses.fields(cls)}


# ---- A config against its schema


def _show(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + '...'


def _section_errors(schema: dict[str, Rule], values: Mapping, prefix: str,
                    sound: dict[str, Any]) -> Iterator[str]:
    """Lines on the section at `prefix` ('' or 'a.b.'); fields that are right go to `sound`."""
    known, guessed = _names(schema, prefix), set()
    section = lambda path: f'a section with {", ".join(_names(schema, path + "."))}'
    for key, value in values.items():
        path = f'{prefix}{key}'
        rule = schema.get(path)
        if key not in known:
            near = _nearest(str(key), known, prefix, schema)
            guessed.add(near)
            yield (f'{path}: {_show(value)}, but there is no such field; '
                   + (f'did you mean {near}?' if near else f'known here: {", ".join(known)}'))
        elif rule is None and isinstance(value, Mapping):
            yield from _section_errors(schema, value, f'{path}.', sound)
        elif rule is None:
            yield f'{path}: {_show(value)}, must be {section(path)}'
        elif rule.ok(value):
            sound[path] = value
        else:
            yield f'{path}: {_show(value)}, must be {rule.allowed}{rule.hint(value)}'
    for path in (prefix + key for key in known if key not in values):
        rule = schema.get(path)
        if rule and rule.default is not dataclasses.MISSING:
            sound[path] = rule.default
        # A misspelt field is one mistake, and the line on its unknown name has named it.
        elif path not in guessed:
            yield f'{path}: missing, must be {rule.allowed if rule else section(path)}'


def _names(schema: dict[str, Rule], prefix: str) -> list[str]:
    """Names of the fields and sections directly under `prefix`."""
    inside = [path[len(prefix):] for path in schema if path.startswith(prefix)]
    return list(dict.fromkeys(path.split('.')[0] for path in inside))


def _nearest(key: str, known: list[str], prefix: str, schema: dict[str, Rule]) -> str:
    """The field that `key` was likely meant to be: spelt alike here, or the same elsewhere."""
    near = [prefix + name for name in difflib.get_close_matches(key, known, 1)]
    near += [path for path in schema if path.rpartition('.')[2] == key]
    return near[0] if near else ''


# ---- Rules over several fields: what is wrong with the first one, given the others


def optimiser_known(name: str, chain: Sequence[Any]) -> str | None:
    from ddmd_jax.train.optim import NAMES

    known = choice(NAMES)
    if not chain and not known.ok(name):
        return f'must be {known.allowed} (any other: give a chain){known.hint(name)}'


def teacher_knows(dataset: str, teacher: str) -> str | None:
    if dataset == 'emoji' and teacher != 'emoji':
        return (f'does not go with teacher.name {teacher!r}: the emoji captions are for the emoji '
                "teacher; give 'prompts' or 'embeddings'")


def sizes_fit(sizes: Sequence[Any], teacher: str) -> str | None:
    if teacher == 'emoji' and sizes:
        return 'must be empty for the emoji teacher, which has one size'


def attention_fits(attention: str, teacher: str) -> str | None:
    if teacher == 'emoji' and attention == 'splash':
        return "must be 'xla' or 'auto' for the emoji teacher, whose few tokens need no kernel"


def teacher_given(path: str, teacher: str) -> str | None:
    if teacher != 'emoji' and not path:
        return f'must name a diffusers folder, gs:// URL or hub id: {teacher} does not ship'


def one_start(init_from: str, resume: str) -> str | None:
    if init_from and resume:
        return (f"must be '' while config.resume is {resume!r}: a run starts from another's whole "
                'state or from its weights alone')


def one_axis_left(*sizes: int) -> str | None:
    if sizes.count(-1) > 1:
        return f'only one of {", ".join(AXES)} may be -1 (whatever is left), not {sizes}'


def alpha_guides(alpha: float, weight_ca: float) -> str | None:
    if weight_ca > 0 and alpha <= 1:
        return ('must be above 1 while method.weight_ca is above 0: it is the guidance scale, not '
                'alpha - 1, and alpha = 1 makes CA zero')


def some_weight(weight_ca: float, weight_dm: float) -> str | None:
    if weight_ca == weight_dm == 0:
        return 'must be above 0 while method.weight_dm is 0: nothing would train the student'


def batch_divides(batch: int, steps: int, accumulate: int) -> str | None:
    """Every micro-batch holds every generator step equally often."""
    unit = steps * accumulate
    if batch % unit:
        return (f'must be a multiple of student.steps * train.accumulate = {steps} * {accumulate}: '
                f'steps not dividing; the next batch that does: {unit * -(-batch // unit)}')


def tau_reaches(bounded: str, span: Sequence[float], schedule: str, steps: int) -> str | None:
    """A bounded term draws tau from the generator's time upwards; the last step needs room."""
    last = (steps - 1) / steps
    if getattr(SCHEDULES[schedule], bounded) and span[1] <= last:
        return (f'its upper end must be above {last:.4g}, the pre-shift time of the last of '
                f'{steps} steps: {schedule} draws this tau from there upwards')


def denoiser_builds(hidden: int, heads: int, kv_heads: int, rope: Sequence[int]) -> str | None:
    from ddmd_jax.models.nextdit import NextDiTConfig

    try:
        NextDiTConfig(hidden_size=hidden, num_attention_heads=heads, num_kv_heads=kv_heads,
                      axes_dim_rope=tuple(rope))
    except ValueError as e:
        return f'{e}; found num_attention_heads {heads}, num_kv_heads {kv_heads}, axes {rope}'


def text_fits(dim: int, heads: int, cap_feat_dim: int) -> str | None:
    if dim % heads or dim != cap_feat_dim:
        return (f'must be a multiple of its num_heads = {heads}, and the same as '
                f"the denoiser's cap_feat_dim = {cap_feat_dim}")


# (rule, the field it is about, the others it reads); asked where each alone is right.
COMMON_TOGETHER = (
    (optimiser_known, 'optim.student.name', 'optim.student.chain'),
    (one_start, 'init_from', 'resume'),
    (one_axis_left, *(f'mesh.{axis}' for axis in AXES)),
)
DISTILL_TOGETHER = COMMON_TOGETHER + (
    (optimiser_known, 'optim.critic.name', 'optim.critic.chain'),
    (teacher_knows, 'data.name', 'teacher.name'),
    (sizes_fit, 'data.sizes', 'teacher.name'),
    (teacher_given, 'teacher.path', 'teacher.name'),
    (attention_fits, 'teacher.attention', 'teacher.name'),
    (alpha_guides, 'method.alpha', 'method.weight_ca'),
    (some_weight, 'method.weight_ca', 'method.weight_dm'),
    (batch_divides, 'data.global_batch', 'student.steps', 'train.accumulate'),
    (functools.partial(tau_reaches, 'ca_bounded'),
     'method.tau_ca', 'method.schedule', 'student.steps'),
    (functools.partial(tau_reaches, 'dm_bounded'),
     'method.tau_dm', 'method.schedule', 'student.steps'),
)
PRETRAIN_TOGETHER = COMMON_TOGETHER + (
    (denoiser_builds, *(f'teacher.model.denoiser.{name}' for name in (
        'hidden_size', 'num_attention_heads', 'num_kv_heads', 'axes_dim_rope'))),
    (text_fits, 'teacher.model.text.dim', 'teacher.model.text.num_heads',
     'teacher.model.denoiser.cap_feat_dim'),
)
