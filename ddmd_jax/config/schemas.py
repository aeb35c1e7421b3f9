"""The schemas: dotted field -> rule."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ddmd_jax.config.rules import (
    CHAIN,
    COUNT,
    FLAG,
    GUIDANCE_RANGE,
    TAU_RANGE,
    TEXT,
    Rule,
    choice,
    number,
    optional,
    or_empty,
    or_none,
    several,
    whole,
)
from ddmd_jax.diffusion.sampling import SOLVERS, STUDENT_MODES
from ddmd_jax.losses.critic import WEIGHTINGS
from ddmd_jax.losses.decoupled import NORMALISERS
from ddmd_jax.method.schedules import SCHEDULES
from ddmd_jax.parallel.sharding import AXES

TASKS = ('distill', 'pretrain')
DATASETS = ('emoji', 'prompts', 'embeddings')
DTYPES = ('float32', 'bfloat16')
MAX_STEPS = 64


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
    from ddmd_jax.train.durable.guards import ON_NAN
    from ddmd_jax.train.watch.trackers import NAMES as TRACKERS

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
        'checkpoint.timeout': optional(number(above=0), 1800),
        'checkpoint.best': TEXT,
        'checkpoint.best_mode': choice(('min', 'max')),
        'log.tracker': optional(choice(TRACKERS), ''),
        'log.report': optional(FLAG, True),
        'train.on_nan': choice(ON_NAN),
        'train.spike': number('0 is off', at_least=0),
        **_optimiser('optim.student'),
    }


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
    from ddmd_jax.families import FAMILIES
    from ddmd_jax.method.recipe import TEACHER_PASSES
    from ddmd_jax.models.attention import KINDS as ATTENTION
    from ddmd_jax.models.layers import REMAT_POLICIES
    from ddmd_jax.train.distill import OFFLOAD
    from ddmd_jax.train.durable.guards import ON_HEALTH

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
        'critic.updates': whole(at_least=0),
        'critic.warmup': whole(at_least=0),
        'critic.weighting': choice(WEIGHTINGS),
        'critic.tau': TAU_RANGE,
        'critic.merge': optional(number('1 is off', at_least=0, at_most=1), 1.0),
        'method.schedule': choice(tuple(SCHEDULES)),
        'method.alpha': number(),
        'method.alpha_range': or_empty(GUIDANCE_RANGE),
        'method.alpha_ramp': optional(whole('0 is off', at_least=0), 0),
        'method.weight_ca': number(at_least=0),
        'method.weight_dm': number(at_least=0),
        'method.tau_ca': TAU_RANGE,
        'method.tau_dm': TAU_RANGE,
        'method.tau_ca_end': or_empty(TAU_RANGE),
        'method.tau_dm_end': or_empty(TAU_RANGE),
        'method.tau_relax': optional(whole('0 is off', at_least=0), 0),
        'method.mean_variance.weight': optional(number('0 is off', at_least=0), 0.0),
        'method.mean_variance.mean': optional(
            or_none(number("None takes that of the teacher's data")), None),
        'method.mean_variance.variance': optional(
            or_none(number("None takes that of the teacher's data", above=0)), None),
        'method.gan.weight': optional(number('0 is off', at_least=0), 0.0),
        'method.gan.critic_weight': optional(number(above=0), 1e-2),
        'method.gan.r1': optional(number('0 is off', at_least=0), 0.0),
        'method.gan.tau': optional(TAU_RANGE, (0.0, 0.98)),
        'method.normaliser': choice(NORMALISERS),
        'method.floor': number('no floor, and a tiny denominator makes NaNs', above=0),
        'method.shift': or_none(number("None takes the teacher's", above=0)),
        **dict.fromkeys(('train.accumulate', 'eval.prompts', 'eval.held_out', 'eval.batch',
                         'eval.teacher_steps'), COUNT),
        'train.teacher_passes': choice(TEACHER_PASSES),
        'train.offload': choice(tuple(OFFLOAD)),
        'train.on_health': choice(tuple(ON_HEALTH)),
        'log.probe': whole('0 is off', at_least=0),
        'log.judge': optional(whole('0 is off', at_least=0), 0),
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
