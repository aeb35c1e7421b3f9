"""Every field of a config, a line each: path, rule, default, whether a resumed run may change it.

Validation, defaults, what a checkpoint must agree with, and docs/config.md follow from this table.
A field whose default is `REQUIRED` has to be given; a config may leave out every other. Fields of a
regulariser stand with it (its `fields`, in section ``method.NAME``), and those of a family's own
data set with the family; both are made of the same `Field`. A condition on several fields is a named
function in `together`.
"""

# ruff: noqa: E501 (a field is a line)
from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from ddmd_jax.config import rules as r

REQUIRED = dataclasses.MISSING
FIXED, FREE = False, True  # whether a resumed run may change it: else it is another experiment


@dataclasses.dataclass(frozen=True)
class Field:
    """One field: a dotted path, its rule, its default, and a line of documentation.

    Where `filled` is False, `check` leaves an absent field absent: whoever reads the section has
    that default. A `later` field was added when runs had been saved without it: where it has its
    default, nothing is compared as such a run is resumed.
    """

    path: str
    rule: r.Rule
    default: Any
    may_change: bool
    doc: str
    filled: bool = True
    later: bool = False


def under(section: str, fields: Iterable[Field]) -> tuple[Field, ...]:
    """`fields`, whose paths are relative to `section`, with their whole paths."""
    return tuple(dataclasses.replace(f, path=f'{section}.{f.path}') for f in fields)


def of_class(section: str, cls: type) -> tuple[Field, ...]:
    """A field for each of the dataclass `cls`, ruled by its annotation; `cls` has the defaults."""
    even = lambda dim: r.COUNT.ok(dim) and dim % 2 == 0
    by_name = {'dtype': r.DTYPE, 'remat': r.REMAT, 'attention': r.choice('xla')}
    by_type = {
        'int': r.COUNT, 'float': r.POSITIVE, 'bool': r.FLAG, 'float | None': r.or_none(r.POSITIVE),
        'tuple[int, int, int]': r.several(3, 'three even whole numbers, at least 2',
                                        lambda *dims: all(map(even, dims)))}
    return tuple(Field(f'{section}.{f.name}', by_name.get(f.name) or by_type[f.type], f.default,
                       FIXED, f'see `{cls.__name__}`', filled=False)
                 for f in dataclasses.fields(cls))


OPTIMISER = (
    Field('name', r.TEXT, 'adamw', FIXED, '`adamw` or `muon`; not read where there is a `chain`'),
    Field('lr', r.POSITIVE, REQUIRED, FIXED, 'peak learning rate'),
    Field('muon_lr', r.POSITIVE, 0.01, FIXED, 'the same of the matrices of stacked layers, where `name` is `muon`'),
    Field('b1', r.DECAY, 0.9, FIXED, "decay of AdamW's first moment"),
    Field('b2', r.number(above=0, below=1), 0.999, FIXED, "decay of AdamW's second moment"),
    Field('eps', r.POSITIVE, 1e-8, FIXED, "AdamW's epsilon"),
    Field('weight_decay', r.number(at_least=0), 0.0, FIXED, 'on kernels only'),
    Field('clip', r.WEIGHT, 1.0, FIXED, "the gradient's global norm is cut to it"),
    Field('warmup', r.NATURAL, 0, FIXED, 'updates of linear warm-up'),
    Field('decay', r.number(at_least=0, at_most=1), 0.0, FIXED, 'share of the run, at its end, in which the rate falls linearly to 0'),
    Field('mu_dtype', r.DTYPE, 'float32', FIXED, "dtype of AdamW's first moment"),
    Field('chain', r.CHAIN, (), FIXED, 'if not empty it stands for all of the above'),
)

ADAPTER = (
    Field('kind', r.choice('full', 'lora'), 'full', FIXED, 'what is trained: everything, or low-rank adapters over the one copy of the teacher'),
    Field('rank', r.COUNT, 16, FIXED, "adapters' rank; like what follows, not read where everything is trained"),
    Field('alpha', r.or_none(r.POSITIVE), None, FIXED, 'their product is scaled by alpha / rank; None: alpha is the rank'),
    Field('targets', r.PATTERNS, ('(to_q|to_k|to_v|to_out)$', '(feed_forward|ff)/'), FIXED, "regular expressions searched in modules' paths, the first found decides: adapted, or left out if it begins with `-`"),
)

COMMON = (
    Field('task', r.choice('distill', 'pretrain', 'codec'), REQUIRED, FIXED, 'what the run does'),
    Field('seed', r.SEED, 0, FIXED, 'root of all randomness'),
    Field('resume', r.TEXT, '', FREE, 'another run, or one of its checkpoints, to go on from'),
    Field('init_from', r.TEXT, '', FREE, 'a run, checkpoint or weights to start the networks from'),
    Field('teacher.name', r.TEXT, REQUIRED, FIXED, 'family of the teacher; dotted: your own module'),
    Field('student.ema', r.DECAY, 0.999, FIXED, 'decay of the EMA student'),
    Field('student.ema_ramp', r.FLAG, True, FIXED, 'whether that decay ramps up'),
    Field('data.name', r.TEXT, REQUIRED, FIXED, "data set: one of the family's own, `prompts` (encoded online), `embeddings` (cached) or `images` (latents cached, captions encoded online)"),
    Field('data.global_batch', r.COUNT, 64, FIXED, 'examples of one update, over all devices'),
    Field('train.steps', r.COUNT, REQUIRED, FREE, 'updates of the student in the whole run'),
    Field('train.on_nan', r.choice('abort', 'rollback'), 'abort', FREE, 'after a step that is not finite: end, or go back and leave its batches out'),
    Field('train.spike', r.WEIGHT, 0.0, FREE, 'standard deviations above the last 20 logged losses from which a loss is warned of'),
    *under('optim.student', OPTIMISER),
    Field('mesh.data', r.AXIS, -1, FREE, 'devices among which batches are split'),
    Field('mesh.fsdp', r.AXIS, 1, FREE, 'devices among which batches and parameters are split'),
    Field('mesh.tensor', r.AXIS, 1, FREE, 'devices among which matrix products are split'),
    Field('checkpoint.every', r.COUNT, 100, FREE, 'steps between checkpoints; the end is saved too'),
    Field('checkpoint.keep', r.COUNT, 2, FREE, 'how many of the newest are kept'),
    Field('checkpoint.keep_every', r.UPDATES, 0, FREE, 'those at multiples of it are kept too'),
    Field('checkpoint.best', r.TEXT, '', FREE, 'a figure of metrics.jsonl: the checkpoint with the best one is kept too'),
    Field('checkpoint.best_mode', r.choice('min', 'max'), 'min', FREE, 'which is best'),
    Field('checkpoint.timeout', r.number(above=0, at_most=10**7), 1800, FREE, 'seconds within which a checkpoint has to be on disk; then the run ends'),
    Field('log.every', r.COUNT, 10, FREE, 'steps between lines of metrics.jsonl'),
    Field('log.images_every', r.COUNT, 100, FREE, 'steps between images in TensorBoard'),
    Field('log.tracker', r.choice('', 'wandb', 'mlflow', 'trackio'), '', FREE, 'where figures and images go beside TensorBoard'),
    Field('log.report', r.FLAG, True, FREE, 'whether report.html is written'),
)

DISTILL = (
    Field('teacher.path', r.TEXT, '', FREE, 'weights: a file, a folder, a URL or a hub id; empty: those that ship; their content counts'),
    Field('teacher.variant', r.VARIANT, '', FREE, 'of its files, as diffusers has it: `fp16` reads `*.fp16.safetensors`; their content counts'),
    Field('teacher.allow_distilled', r.FLAG, False, FREE, 'whether a teacher is taken that guidance was distilled into, of which CA has nothing to learn'),
    Field('teacher.dtype', r.DTYPE, 'float32', FIXED, 'dtype of activations and matrix products of all three networks'),
    Field('teacher.param_dtype', r.DTYPE, 'float32', FIXED, "dtype of the frozen teacher's kernels; student and critic are kept in fp32"),
    Field('teacher.remat', r.REMAT, 'none', FREE, 'recomputed in the gradient: nothing, everything, all but matrix products'),
    Field('teacher.attention', r.choice('auto', 'xla', 'splash', 'cudnn'), 'auto', FREE, "XLA's, a kernel for TPUs, or cuDNN's in bf16; `auto`: the kernel of the device"),
    Field('student.steps', r.whole(at_least=1, at_most=64), 4, FIXED, 'N, network evaluations of the student'),
    Field('student.first_step', r.or_none(r.NATURAL), None, FIXED, "step of the teacher's table at which the student starts, as DMD2's single step at 399; None: the noisiest", filled=False),
    Field('student.sampler', r.choice('renoise', 'deterministic'), 'renoise', FREE, 'sampler of the evaluation'),
    *under('student.adapter', ADAPTER),
    *under('critic.adapter', ADAPTER),
    Field('critic.updates', r.NATURAL, 5, FIXED, "critic updates for each of the student's"),
    Field('critic.warmup', r.NATURAL, 0, FIXED, 'further critic updates before the first step'),
    Field('critic.order', r.choice('critic_first', 'same_images', 'one_rollout'), 'critic_first', FIXED, "updates of a step: the critic's before the student's, each on prompts of its own; as in DMD2, the student's first and one of them on its images, the others after it; or the critic's first and all on one rollout of the student", later=True),
    Field('critic.weighting', r.choice('velocity', 'clean', 'noise'), 'velocity', FIXED, 'weighting of the denoising loss; `noise` is the error of the noise, as where the teacher predicts that'),
    Field('critic.tau', r.TAU_RANGE, (0.0, 0.98), FIXED, "range, in uniform time, of the critic's levels"),
    Field('critic.merge', r.number('1 is off', at_least=0, at_most=1), 1.0, FIXED, 'decay of the critic towards the student after each student update'),
    Field('method.schedule', r.TEXT, 'decoupled_hybrid', FIXED, "one of the paper's four re-noising schedules; dotted: your own"),
    Field('method.alpha', r.number(), REQUIRED, FIXED, 'guidance scale to bake in; not alpha - 1'),
    Field('method.alpha_range', r.or_empty(r.GUIDANCE_RANGE), (), FIXED, 'range that alpha is drawn from, for each example; empty: it is `method.alpha`'),
    Field('method.alpha_ramp', r.UPDATES, 0, FIXED, 'student updates in which alpha rises from 1'),
    Field('method.weight_ca', r.number(at_least=0), 1.0, FIXED, 'weight of CA; 0 is DM only'),
    Field('method.weight_dm', r.number(at_least=0), 1.0, FIXED, 'weight of DM; 0 is CA only'),
    Field('method.tau_ca', r.TAU_RANGE, (0.0, 0.98), FIXED, 'range, in uniform time, of tau_CA'),
    Field('method.tau_dm', r.TAU_RANGE, (0.0, 0.98), FIXED, 'range, in uniform time, of tau_DM; not read by `coupled_shared`'),
    Field('method.tau_ca_end', r.or_empty(r.TAU_RANGE), (), FIXED, 'range of tau_CA after `tau_relax` updates; empty: it stays'),
    Field('method.tau_dm_end', r.or_empty(r.TAU_RANGE), (), FIXED, 'the same of tau_DM'),
    Field('method.tau_relax', r.UPDATES, 0, FIXED, 'student updates in which a range gets there'),
    Field('method.normaliser', r.choice('per_term', 'dmd2', 'none'), 'per_term', FIXED, 'divisor of the terms'),
    Field('method.floor', r.number('no floor, and a tiny denominator makes NaNs', above=0), 0.02, FIXED, 'smallest divisor, in units of x'),
    Field('method.shift', r.or_none(r.number("None takes the teacher's", above=0)), None, FIXED, 'time shift of steps and levels'),
    Field('method.null', r.choice('encoded', 'zeros'), 'encoded', FIXED, 'null prompt of CA, of those that the family offers', later=True),
    Field('method.regularisers', r.NAMES, ('gan', 'mean_variance'), FIXED, 'terms beside CA and DM, each with a section `method.NAME`; dotted: your own module'),
    Field('train.accumulate', r.COUNT, 1, FIXED, 'micro-batches of one update'),
    Field('train.teacher_passes', r.choice('together', 'apart'), 'together', FREE, "the teacher's predictions of a step in one call, or one by one in the memory of one"),
    Field('train.offload', r.choice('none', 'ema', 'teacher', 'ema+teacher'), 'none', FREE, "kept in the host's pinned memory and fetched when it is needed"),
    Field('train.on_health', r.choice('nothing', 'stop', 'stop_collapsing', 'lower_alpha', 'raise_critic'), 'nothing', FREE, 'after a bad verdict of 3 lines: end, halve alpha - 1, or add a critic update'),
    *under('optim.critic', OPTIMISER),
    Field('log.probe', r.UPDATES, 8, FREE, 'prompts on which the EMA student is watched'),
    Field('log.judge', r.UPDATES, 0, FREE, 'prompts on which the EMA student is judged, where the family has a judge'),
    Field('eval.suite', r.TEXT, '', FREE, "the metric suite, `my_module.SUITE`; empty: the family's own"),
    Field('eval.prompts', r.COUNT, 8, FREE, 'prompts seen in training'),
    Field('eval.held_out', r.COUNT, 1, FREE, 'held-out prompts'),
    Field('eval.batch', r.COUNT, 4, FREE, 'images of one sampler call'),
    Field('eval.teacher_steps', r.COUNT, 50, FREE, 'steps of the guided teacher'),
    Field('eval.guidance', r.number('1 is no guidance', at_least=1), 4.0, FREE, "the teacher's guidance scale"),
    Field('eval.solver', r.choice('euler', 'heun'), 'euler', FREE, "the teacher's solver"),
)

PRETRAIN = (
    Field('method.dropout', r.DECAY, 0.1, FIXED, 'share of captions that are dropped'),
    Field('method.time_mean', r.number(), 0.0, FIXED, 'mean of the logit of the training times'),
    Field('method.time_std', r.POSITIVE, 1.0, FIXED, 'its standard deviation'),
)

CODEC = (
    Field('codec.latent_channels', r.COUNT, 8, FIXED, 'channels of a latent'),
    Field('codec.widths', r.WIDTHS, (16, 48, 96), FIXED, 'channels at each size of image, the whole one first; each further one halves the edge'),
    Field('codec.layers_per_block', r.COUNT, 1, FIXED, 'residual blocks at a size; the decoder has one more'),
    Field('codec.groups', r.COUNT, 8, FIXED, 'groups of the norms; divides every width'),
    Field('codec.dtype', r.DTYPE, 'float32', FIXED, 'dtype of activations and convolutions'),
    Field('codec.sides', r.SIDES, (32, 32, 32, 64), FIXED, 'edges in pixels of the crops that are learned from; one is drawn for each batch'),
    Field('codec.gradient', r.WEIGHT, 1.0, FIXED, 'weight of the L1 error of differences between neighbouring pixels'),
    Field('codec.kl', r.WEIGHT, 1e-4, FIXED, "weight of the latents' divergence from a standard normal, a mean over elements"),
    Field('codec.frozen_encoder', r.FLAG, False, FIXED, 'whether the decoder alone is trained, on the EMA encoder that `init_from` brings'),
    Field('codec.unseen', r.COUNT, 128, FREE, 'images of which the PSNR is logged'),
)

PROMPT_SETS = ('prompts', 'embeddings', 'images')  # data sets of one's own, whoever the teacher is
REAL_SETS = ('images',)  # of these, those with real latents of their captions, which a GAN needs
PROMPTS = (
    Field('path', r.PATH, 'prompts', FREE, 'the set of prompts, or the folder of embeddings; its content counts'),
    Field('sizes', r.SIZES, (), FIXED, 'one is drawn for each batch'),
    Field('lengths', r.LENGTHS, (), FIXED, 'token counts that batches are cut to'),
)
IMAGES = (
    Field('path', r.PATH, 'images', FREE, 'the folder that `prepare images` wrote; its content counts'),
    Field('sizes', r.SIZES, (), FIXED, "the sizes of its images, in the order of pictures' preference: all of a batch have one"),
)
