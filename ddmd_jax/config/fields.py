"""Every field of a config, a line each: path, rule, default, whether a resumed run may change it.

Validation, defaults, what a checkpoint must agree with, and docs/config.md follow from this table.
A field whose default is `REQUIRED` has to be given; a config may leave out every other. Fields of a
regulariser stand with it (its `fields`, in section ``method.NAME``), and those of a family's own
data set with the family; both are made of the same `Field`. What only several fields together can
get wrong is a named function in `together`.
"""

# ruff: noqa: E501 (a field is a line)
from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from ddmd_jax.config.rules import (
    AXIS,
    CHAIN,
    COUNT,
    DECAY,
    DTYPE,
    FLAG,
    GUIDANCE_RANGE,
    LENGTHS,
    NAMES,
    NATURAL,
    PATH,
    POSITIVE,
    REMAT,
    SIZES,
    TAU_RANGE,
    TEXT,
    UPDATES,
    WEIGHT,
    Rule,
    choice,
    number,
    or_empty,
    or_none,
    several,
    whole,
)

REQUIRED = dataclasses.MISSING
FIXED, FREE = False, True  # whether a resumed run may change it: else it is another experiment


@dataclasses.dataclass(frozen=True)
class Field:
    """One field: a dotted path, its rule, its default, and a line of documentation.

    Where `filled` is False, `check` leaves an absent field absent: whoever reads the section has
    that default.
    """

    path: str
    rule: Rule
    default: Any
    may_change: bool
    doc: str
    filled: bool = True


def under(section: str, fields: Iterable[Field]) -> tuple[Field, ...]:
    """`fields`, whose paths are relative to `section`, with their whole paths."""
    return tuple(dataclasses.replace(f, path=f'{section}.{f.path}') for f in fields)


def of_class(section: str, cls: type) -> tuple[Field, ...]:
    """A field for each of the dataclass `cls`, ruled by its annotation; `cls` has the defaults."""
    even = lambda dim: COUNT.ok(dim) and dim % 2 == 0
    by_name = {'dtype': DTYPE, 'remat': REMAT, 'attention': choice('xla')}
    by_type = {
        'int': COUNT, 'float': POSITIVE, 'bool': FLAG, 'float | None': or_none(POSITIVE),
        'tuple[int, int, int]': several(3, 'three even whole numbers, at least 2',
                                        lambda *dims: all(map(even, dims)))}
    return tuple(Field(f'{section}.{f.name}', by_name.get(f.name) or by_type[f.type], f.default,
                       FIXED, f'see `{cls.__name__}`', filled=False)
                 for f in dataclasses.fields(cls))


OPTIMISER = (
    Field('name', TEXT, 'adamw', FIXED, 'optimiser; not read where there is a `chain`'),
    Field('lr', POSITIVE, REQUIRED, FIXED, 'peak learning rate'),
    Field('b1', DECAY, 0.9, FIXED, "decay of AdamW's first moment"),
    Field('b2', number(above=0, below=1), 0.999, FIXED, "decay of AdamW's second moment"),
    Field('eps', POSITIVE, 1e-8, FIXED, "AdamW's epsilon"),
    Field('weight_decay', number(at_least=0), 0.0, FIXED, 'on kernels only'),
    Field('clip', WEIGHT, 1.0, FIXED, "the gradient's global norm is cut to it"),
    Field('warmup', NATURAL, 0, FIXED, 'updates of linear warm-up'),
    Field('decay', number(at_least=0, at_most=1), 0.0, FIXED, 'share of the run, at its end, in which the rate falls linearly to 0'),
    Field('mu_dtype', DTYPE, 'float32', FIXED, "dtype of AdamW's first moment"),
    Field('chain', CHAIN, (), FIXED, 'if not empty it stands for all of the above'),
)

COMMON = (
    Field('task', choice('distill', 'pretrain'), REQUIRED, FIXED, 'what the run does'),
    Field('seed', NATURAL, 0, FIXED, 'root of all randomness'),
    Field('resume', TEXT, '', FREE, 'another run, or one of its checkpoints, to go on from'),
    Field('init_from', TEXT, '', FREE, 'a run, checkpoint or weights to start the networks from'),
    Field('teacher.name', TEXT, REQUIRED, FIXED, 'family of the teacher; dotted: your own module'),
    Field('student.ema', DECAY, 0.999, FIXED, 'decay of the EMA student'),
    Field('student.ema_ramp', FLAG, True, FIXED, 'whether that decay ramps up'),
    Field('data.name', TEXT, REQUIRED, FIXED, "data set: one of the family's own, `prompts` (encoded online) or `embeddings` (cached)"),
    Field('data.global_batch', COUNT, 64, FIXED, 'examples of one update, over all devices'),
    Field('train.steps', COUNT, REQUIRED, FREE, 'updates of the student in the whole run'),
    Field('train.on_nan', choice('abort', 'rollback'), 'abort', FREE, 'after a step that is not finite: end, or go back and leave its batches out'),
    Field('train.spike', WEIGHT, 0.0, FREE, 'standard deviations above the last 20 logged losses from which a loss is warned of'),
    *under('optim.student', OPTIMISER),
    Field('mesh.data', AXIS, -1, FREE, 'devices among which batches are split'),
    Field('mesh.fsdp', AXIS, 1, FREE, 'devices among which batches and parameters are split'),
    Field('mesh.tensor', AXIS, 1, FREE, 'devices among which matrix products are split'),
    Field('checkpoint.every', COUNT, 100, FREE, 'steps between checkpoints; the end is saved too'),
    Field('checkpoint.keep', COUNT, 2, FREE, 'how many of the newest are kept'),
    Field('checkpoint.keep_every', UPDATES, 0, FREE, 'those at multiples of it are kept too'),
    Field('checkpoint.best', TEXT, '', FREE, 'a figure of metrics.jsonl: the checkpoint with the best one is kept too'),
    Field('checkpoint.best_mode', choice('min', 'max'), 'min', FREE, 'which is best'),
    Field('checkpoint.timeout', POSITIVE, 1800, FREE, 'seconds within which a checkpoint has to be on disk; then the run ends'),
    Field('log.every', COUNT, 10, FREE, 'steps between lines of metrics.jsonl'),
    Field('log.images_every', COUNT, 100, FREE, 'steps between images in TensorBoard'),
    Field('log.tracker', choice('', 'wandb', 'mlflow', 'trackio'), '', FREE, 'where figures and images go beside TensorBoard'),
    Field('log.report', FLAG, True, FREE, 'whether report.html is written'),
)

DISTILL = (
    Field('teacher.path', TEXT, '', FIXED, 'weights: a file, a folder, a URL or a hub id; empty: those that ship'),
    Field('teacher.dtype', DTYPE, 'float32', FIXED, 'dtype of activations and matrix products of all three networks'),
    Field('teacher.param_dtype', DTYPE, 'float32', FIXED, "dtype of the frozen teacher's kernels; student and critic are kept in fp32"),
    Field('teacher.remat', REMAT, 'none', FREE, 'recomputed in the gradient: nothing, everything, all but matrix products'),
    Field('teacher.attention', choice('auto', 'xla', 'splash'), 'auto', FREE, "XLA's attention or the Pallas kernel for TPUs; `auto`: the kernel on a TPU"),
    Field('student.steps', whole(at_least=1, at_most=64), 4, FIXED, 'N, network evaluations of the student'),
    Field('student.sampler', choice('renoise', 'deterministic'), 'renoise', FREE, 'sampler of the evaluation'),
    Field('critic.updates', NATURAL, 5, FIXED, "critic updates for each of the student's"),
    Field('critic.warmup', NATURAL, 0, FIXED, 'further critic updates before the first step'),
    Field('critic.weighting', choice('velocity', 'clean'), 'velocity', FIXED, 'weighting of the denoising loss'),
    Field('critic.tau', TAU_RANGE, (0.0, 0.98), FIXED, "pre-shift range of the critic's levels"),
    Field('critic.merge', number('1 is off', at_least=0, at_most=1), 1.0, FIXED, 'decay of the critic towards the student after each student update'),
    Field('method.schedule', TEXT, 'decoupled_hybrid', FIXED, "one of the paper's four re-noising schedules; dotted: your own"),
    Field('method.alpha', number(), REQUIRED, FIXED, 'guidance scale to bake in; not alpha - 1'),
    Field('method.alpha_range', or_empty(GUIDANCE_RANGE), (), FIXED, 'range that alpha is drawn from, for each example; empty: it is `method.alpha`'),
    Field('method.alpha_ramp', UPDATES, 0, FIXED, 'student updates in which alpha rises from 1'),
    Field('method.weight_ca', number(at_least=0), 1.0, FIXED, 'weight of CA; 0 is DM only'),
    Field('method.weight_dm', number(at_least=0), 1.0, FIXED, 'weight of DM; 0 is CA only'),
    Field('method.tau_ca', TAU_RANGE, (0.0, 0.98), FIXED, 'pre-shift range of tau_CA'),
    Field('method.tau_dm', TAU_RANGE, (0.0, 0.98), FIXED, 'pre-shift range of tau_DM; not read by `coupled_shared`'),
    Field('method.tau_ca_end', or_empty(TAU_RANGE), (), FIXED, 'range of tau_CA after `tau_relax` updates; empty: it stays'),
    Field('method.tau_dm_end', or_empty(TAU_RANGE), (), FIXED, 'the same of tau_DM'),
    Field('method.tau_relax', UPDATES, 0, FIXED, 'student updates in which a range gets there'),
    Field('method.normaliser', choice('per_term', 'dmd2', 'none'), 'per_term', FIXED, 'divisor of the terms'),
    Field('method.floor', number('no floor, and a tiny denominator makes NaNs', above=0), 0.02, FIXED, 'smallest divisor, in units of x'),
    Field('method.shift', or_none(number("None takes the teacher's", above=0)), None, FIXED, 'time shift of steps and levels'),
    Field('method.regularisers', NAMES, ('gan', 'mean_variance'), FIXED, 'terms beside CA and DM, each with a section `method.NAME`; dotted: your own module'),
    Field('train.accumulate', COUNT, 1, FIXED, 'micro-batches of one update'),
    Field('train.teacher_passes', choice('together', 'apart'), 'together', FREE, "the teacher's predictions of a step in one call, or one by one in the memory of one"),
    Field('train.offload', choice('none', 'ema', 'teacher', 'ema+teacher'), 'none', FREE, "kept in the host's pinned memory and fetched when it is needed"),
    Field('train.on_health', choice('nothing', 'stop', 'stop_collapsing', 'lower_alpha', 'raise_critic'), 'nothing', FREE, 'after a bad verdict of 3 lines: end, halve alpha - 1, or add a critic update'),
    *under('optim.critic', OPTIMISER),
    Field('log.probe', UPDATES, 8, FREE, 'prompts on which the EMA student is watched'),
    Field('log.judge', UPDATES, 0, FREE, 'prompts on which the EMA student is judged, where the family has a judge'),
    Field('eval.suite', TEXT, '', FREE, "the metric suite, `my_module.SUITE`; empty: the family's own"),
    Field('eval.prompts', COUNT, 8, FREE, 'prompts seen in training'),
    Field('eval.held_out', COUNT, 1, FREE, 'held-out prompts'),
    Field('eval.batch', COUNT, 4, FREE, 'images of one sampler call'),
    Field('eval.teacher_steps', COUNT, 50, FREE, 'steps of the guided teacher'),
    Field('eval.guidance', number('1 is no guidance', at_least=1), 4.0, FREE, "the teacher's guidance scale"),
    Field('eval.solver', choice('euler', 'heun'), 'euler', FREE, "the teacher's solver"),
)

PRETRAIN = (
    Field('method.dropout', DECAY, 0.1, FIXED, 'share of captions that are dropped'),
    Field('method.time_mean', number(), 0.0, FIXED, 'mean of the logit of the training times'),
    Field('method.time_std', POSITIVE, 1.0, FIXED, 'its standard deviation'),
)

PROMPT_SETS = ('prompts', 'embeddings')  # data sets of one's own, whoever the teacher is
PROMPTS = under('data', (
    Field('path', PATH, 'prompts', FREE, 'the set of prompts, or the folder of embeddings; its content counts'),
    Field('sizes', SIZES, (), FIXED, 'one is drawn for each batch'),
    Field('lengths', LENGTHS, (), FIXED, 'token counts that batches are cut to'),
))
