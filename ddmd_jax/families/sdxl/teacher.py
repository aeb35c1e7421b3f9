"""SDXL from a diffusers folder: the published conventions, written once.

  * Process. Variance preserving, 1000 discrete steps. A sample of step k is the flow's at
    ``t = a / (a + s)`` but for a factor, a^2 = abar_k and s^2 = 1 - abar_k: `StepTable` has the
    steps' times, `make_denoiser` rescales, finds the step and runs the network. Its table is read
    from ``scheduler_config.json``.
  * Prediction. The network predicts the noise; x_hat = (x_vp - s noise) / a, in fp32.
  * Start. Pure unit noise at step 999, of which .5 % of the variance is signal in training: for
    the student (`StepTable.first_input`) as for the teacher's own sampler (`grid_input`).
  * Guidance. Plain, in noise as in x_hat; the pipeline's own sampler guides away from zeros where
    ``model_index.json`` says so, which `Teacher.null` records. What CA is made of is a choice of
    the config (`method.null`).
  * Conditioning. All 77 states of the text, a pooled one, and `time_ids`: of original, crop and
    target. What a `Cond` does not say of these is that its latents are the whole of an image.
  * Latents. 8 x 8 pixels each, scaled by .13025, not shifted; decoded in fp32 (`force_upcast`).
"""

import dataclasses
import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ddmd_jax.data.batch import CondField, CondSpec
from ddmd_jax.diffusion import process
from ddmd_jax.diffusion.sampling import Predict
from ddmd_jax.diffusion.time import SPACINGS, StepTable
from ddmd_jax.families import published_card, published_config, published_text, published_vae
from ddmd_jax.families.base import (
    Array,
    Cond,
    ImageEncoder,
    Latents,
    LoadOptions,
    Teacher,
    kernels_in,
)
from ddmd_jax.families.sdxl import names, text
from ddmd_jax.models import flops, unet
from ddmd_jax.models.attention import resolve
from ddmd_jax.models.autoencoder_kl import AutoencoderKLConfig
from ddmd_jax.models.layers import abstract_params, functional, maker
from ddmd_jax.models.text.clip import BIG_G, ClipConfig
from ddmd_jax.models.unet import TIME_IDS, UNet, UNetConfig
from ddmd_jax.parallel import sharding
from ddmd_jax.util import shape
from ddmd_jax.weights import diffusers, fetch
from ddmd_jax.weights.flat import WeightsError

UNET = 'UNet2DConditionModel'
FILES = ('model_index.json', 'scheduler/*.json', 'unet/*.json', 'unet/*.safetensors',
         'vae/*.json', 'vae/*.safetensors', 'text_encoder_2/config.json', 'config.json',
         f'{diffusers.STEM}*.safetensors', f'{diffusers.STEM}*.json')
SIZE = (1024, 1024)  # pixels, height first
FACTOR = 8  # pixels a latent, likewise
LIMIT = 4.0  # standard deviations: latents are scaled to about one
MOMENTS = (0.075, 0.81)  # of real latents: their means and variances (the paper, section 4)
CODEC = AutoencoderKLConfig(latent_channels=4, scaling_factor=0.13025, shift_factor=None,
                            use_quant_conv=True, use_post_quant_conv=True)
RULES = unet.RULES
TABLE = StepTable()  # the published scheduler's, for a bare UNet, which comes without one
GIVE = 'give a folder of SDXL-base, or of a model that was trained from it'
# Fields of ``unet/config.json`` that must have these values, or be absent: our network knows no
# other. What decides nothing (dropout of 0, names of classes) is not read.
FIXED = {
    'act_fn': 'silu', 'addition_embed_type': 'text_time', 'attention_type': 'default',
    'center_input_sample': False, 'class_embed_type': None, 'conv_in_kernel': 3,
    'conv_out_kernel': 3, 'cross_attention_norm': None, 'downsample_padding': 1,
    'dual_cross_attention': False, 'encoder_hid_dim': None, 'encoder_hid_dim_type': None,
    'flip_sin_to_cos': True, 'freq_shift': 0, 'mid_block_only_cross_attention': None,
    'mid_block_scale_factor': 1, 'mid_block_type': 'UNetMidBlock2DCrossAttn',
    'num_class_embeds': None, 'only_cross_attention': False, 'resnet_out_scale_factor': 1.0,
    'resnet_skip_time_act': False, 'resnet_time_scale_shift': 'default',
    'reverse_transformer_layers_per_block': None, 'time_cond_proj_dim': None,
    'time_embedding_act_fn': None, 'time_embedding_dim': None, 'time_embedding_type': 'positional',
    'timestep_post_act': None, 'use_linear_projection': True}
SCHEDULER = {
    'num_train_timesteps?': lambda x: '' if not shape.count(x) and 0 < x <= 10**5 else (
        'not a number of steps'),
    'steps_offset?': lambda x: '' if not shape.count(x) and x < 10**5 else 'not a number of steps',
    'timestep_spacing?': lambda x: '' if x is None else shape.one_of(*SPACINGS, 'linspace')(x),
    'beta_start?': shape.positive, 'beta_end?': shape.positive, 'beta_schedule?': str}
# Samplers that are `leading` where a config says nothing; diffusers' others are `linspace`.
LEADING = ('DDIMScheduler', 'DDPMScheduler', 'PNDMScheduler', 'LCMScheduler', 'TCDScheduler')
# Parts of the names of what SDXL has been distilled into.
STUDENTS = ('turbo', 'lightning', 'hyper-sd', 'lcm', 'dmd2')
OPTIONAL = ('in_channels', 'out_channels', 'layers_per_block', 'norm_num_groups', 'norm_eps')
PER_LEVEL = ('transformer_layers_per_block', 'attention_head_dim')  # one number stands for all


# --- Folders ---


def model_config(published: Mapping[str, Any], dtype: str = 'float32', remat: str = 'none',
                 attention: str = 'xla') -> UNetConfig:
    """Our architecture from a published ``unet/config.json``.

    Raises:
      WeightsError: it is another model's, a field is missing or not to be had here.
    """
    own = {'dtype', 'remat', 'attention'}
    fields = [f.name for f in dataclasses.fields(UNetConfig) if f.name not in own]
    try:
        for name, value in FIXED.items():
            if published.get(name) not in (None, value):
                raise ValueError(f'{name} is {published[name]}, supported is {value}')
        values = {name: published[name] for name in fields
                  if name in published or name not in OPTIONAL}  # whose defaults are diffusers'
        # diffusers: an early mistake in its naming, kept for the sake of published configs.
        values['attention_head_dim'] = (published.get('num_attention_heads')
                                        or published['attention_head_dim'])
        levels = len(values['block_out_channels'])
        for name in PER_LEVEL:
            if isinstance(values[name], int):
                values[name] = [values[name]] * levels
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        for name in ('layers_per_block', 'cross_attention_dim', *PER_LEVEL):
            if not all(isinstance(x, int) for x in _several(values.get(name, 0))):
                raise ValueError(f'{name} is {published[name]}, supported are whole numbers')
        return UNetConfig(**published_config.checked(UNetConfig, values), dtype=dtype,
                          remat=remat, attention=attention)
    except (KeyError, TypeError, ValueError) as e:
        raise WeightsError(f"unet/config.json is not one of SDXL's {UNET} ({e}); {GIVE}") from e


def _several(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def refuse_others(folder: Path, published: Mapping[str, Any], index: Mapping[str, Any],
                  pooled: int) -> None:
    """Raises `WeightsError`, which says what it is, of a UNet that is another model's than SDXL's.

    Args:
      folder: of the UNet.
      published: its config.
      index: ``model_index.json`` of its pipeline, {} if it comes alone.
      pooled: width of the pipeline's pooled text.
    """
    channels, width = published.get('in_channels'), published.get('cross_attention_dim')
    if channels == 9:
        raise WeightsError(f'{folder} is an inpainting UNet (9 channels: latents, a mask and the '
                           f'masked latents), which draws no image from noise; {GIVE}')
    if published.get('addition_embed_type') != 'text_time':
        raise WeightsError(f'{folder} is the UNet of Stable Diffusion 1 or 2 (texts {width} wide, '
                           f'no pooled text and no sizes), not of SDXL; {GIVE}')
    numbers, rest = divmod(
        (published.get('projection_class_embeddings_input_dim') or 0) - pooled,
        published.get('addition_time_embed_dim') or 1)
    if index.get('requires_aesthetics_score') or (numbers, rest) == (TIME_IDS - 1, 0):
        raise WeightsError(f"{folder} is the UNet of SDXL's refiner (an aesthetic score among its "
                           f'conditioning), which only goes on from latents of the base; {GIVE}')
    if channels != published.get('out_channels'):
        raise WeightsError(f'{folder} takes {channels} channels and gives '
                           f'{published.get("out_channels")}, so that it draws no image from noise '
                           f'alone; {GIVE}')


@dataclasses.dataclass(frozen=True)
class Opened:
    """A folder whose headers were read: of a pipeline, or of a bare UNet (then without a codec)."""

    unet: Path
    published: dict[str, Any]  # the UNet's config
    time: StepTable
    index: dict[str, Any]
    vae: Path | None


def open_folder(folder: Path) -> Opened:
    """Raises `WeightsError`: it is of another model, which it names."""
    index_file = folder / 'model_index.json'
    flag = (bool, type(None))
    index = diffusers.read_json(index_file, {
        'force_zeros_for_empty_prompt?': flag, 'requires_aesthetics_score?': flag,
    }) if index_file.exists() else {}
    found = str(index.get('_class_name'))
    if index and found not in text.PIPELINE.class_names:
        early = found in ('StableDiffusionPipeline', 'StableDiffusionImg2ImgPipeline',
                          'StableDiffusionInpaintPipeline')
        what = f'Stable Diffusion 1 or 2 (a {found})' if early else f'a {found}'
        raise WeightsError(f'{folder} is {what}, not {text.PIPELINE.class_names[0]}; {GIVE}')
    component = folder / 'unet' if index else folder
    published = diffusers.read_json(component / 'config.json')
    if published.get('_class_name') != UNET:
        raise WeightsError(f'{component} is {published.get("_class_name")}, not {UNET}; {GIVE}')
    encoder = folder / 'text_encoder_2' / 'config.json'
    pooled = diffusers.read_json(encoder).get('projection_dim') if encoder.exists() else None
    refuse_others(component, published, index, pooled or 1280)
    # A UNet that lies in its pipeline's folder is of that pipeline's process.
    scheduler = published_card.pipeline(folder) / 'scheduler' / 'scheduler_config.json'
    table = table_of(scheduler) if scheduler.exists() else TABLE
    return Opened(component, published, table, index, folder / 'vae' if index else None)


def table_of(file: Path) -> StepTable:
    """The steps of a ``scheduler_config.json``, whatever sampler it is of.

    A student's may begin within the table, as `export` writes one that starts at step 399: with
    the betas of that many steps.

    Raises:
      WeightsError: of another process, or of a prediction other than the noise.
    """
    config = diffusers.read_json(file)
    betas = config.get('trained_betas')
    if isinstance(betas, list) and betas == TABLE.betas[:len(betas)].tolist():
        return dataclasses.replace(TABLE, first=len(betas) - 1)
    for name, value in (('prediction_type', 'epsilon'), ('rescale_betas_zero_snr', False),
                        ('trained_betas', None)):
        if config.get(name) not in (None, value):
            raise WeightsError(f'{file}: {name} is {str(config[name])[:40]}, supported is {value}; '
                               'a teacher of another process needs a family of its own')
    count, spacing = config.get('num_train_timesteps', 1000), config.get('timestep_spacing')
    if spacing is None and config.get('_class_name', LEADING[0]) not in LEADING:
        spacing = 'linspace'
    if spacing == 'linspace':  # between two steps of the table, where no level is asked of it
        print(f"warning: {file}: the teacher's own sampler takes the steps of 'leading' here, not "
              "of 'linspace'; no training depends on it", file=sys.stderr)
    if config.get('use_karras_sigmas'):
        print(f"warning: {file}: the teacher's own sampler takes the table's steps here, not "
              "Karras's; no training depends on it", file=sys.stderr)
    try:
        if words := shape.fault(config, SCHEDULER):
            raise ValueError(words)
        return StepTable(
            config['beta_start'], config['beta_end'], config['beta_schedule'], count, count - 1,
            spacing if spacing in SPACINGS else SPACINGS[0], config.get('steps_offset', 0))
    except (KeyError, TypeError, ValueError) as e:
        raise WeightsError(f'{file} has no table of steps that is known here ({e}); fetch the '
                           'folder again') from e


# --- The network in the one convention ---


def whole_image(shape: Sequence[int], factor: int = FACTOR) -> tuple[int, ...]:
    """`time_ids` of latents ``(H, W, C)`` that are all of an image: as DMD2 conditions on."""
    height, width = factor * shape[0], factor * shape[1]
    return height, width, 0, 0, height, width


def make_denoiser(cfg: UNetConfig, table: StepTable = TABLE, factor: int = FACTOR,
                  mesh: Mesh | None = None) -> Predict:
    """`predict_clean(params, x_t, t, cond)` of a UNet; see `Teacher`.

    A `t` between two steps is given to the network as the nearest, and rescaled as it is; one that
    is noisier than the table is the table's noisiest.
    """
    noise = make_features(cfg, table, factor, mesh, '__call__')

    def predict_clean(params: Any, x_t: Array, t: Array, cond: Cond) -> Array:
        t = jnp.broadcast_to(jnp.asarray(t, jnp.float32), x_t.shape[:1])
        return process.noise_to_clean(
            x_t, noise(params, x_t, t, cond), jnp.maximum(t, table.times[-1]))

    return predict_clean


def make_features(cfg: UNetConfig, table: StepTable = TABLE, factor: int = FACTOR,
                  mesh: Mesh | None = None, method: str = 'features') -> Predict:
    """``(params, x_t, t [B], cond)`` by a method of the UNet.

    Of `features` ``[B, h, w, D]`` are the mid block's, what a GAN's head judges.
    """
    apply = functional(maker(UNet, cfg, mesh), method)

    def run(params: Any, x_t: Array, t: Array, cond: Cond) -> Array:
        t = jnp.maximum(t, table.times[-1])
        x_t = x_t.astype(jnp.float32)
        mask, ids = cond.get('mask'), cond.get('time_ids')
        if ids is None:
            ids = jnp.broadcast_to(jnp.asarray(whole_image(x_t.shape[1:], factor)),
                                   (x_t.shape[0], TIME_IDS))
        # True everywhere of what the text side gives: the pipeline's network reads all 77 places.
        mask = None if mask is None else mask.astype(bool)
        return apply(params, x_t / process.preserved(t, x_t), table.step_of(t), cond['embeds'],
                     mask, cond['pooled'], ids)

    return run


def cond_spec(cfg: UNetConfig, factor: int = FACTOR) -> CondSpec:
    """Text, pooled text and `time_ids`; these are whole numbers, which no bf16 rounds."""
    return CondSpec.text(
        cfg.cross_attention_dim, pooled=CondField((cfg.pooled_dim,), per_token=False),
        time_ids=CondField((TIME_IDS,), jnp.int32, per_token=False,
                           of_shape=functools.partial(whole_image, factor=factor)))


def _latent_shape(size: Sequence[int], cfg: UNetConfig, factor: int) -> tuple[int, int, int]:
    if any(side % factor or side <= 0 for side in size):
        raise WeightsError(f'size {tuple(size)} must be positive multiples of {factor} pixels '
                           '(config.data.sizes, height first)')
    return (size[0] // factor, size[1] // factor, cfg.in_channels)


def _abstract_params(cfg: UNetConfig, dtype: str) -> Any:
    params = abstract_params(maker(UNet, cfg))
    return jax.eval_shape(functools.partial(kernels_in, dtype=dtype), params)


def _teacher(cfg: UNetConfig, table: StepTable, factor: int, mesh: Mesh, **known: Any) -> Teacher:
    """The teacher of a UNet; `known` are the other fields of a `Teacher`."""
    return Teacher(
        family='sdxl', predict_clean=make_denoiser(cfg, table, factor, mesh),
        cond=cond_spec(cfg, factor), time=table, rules=RULES,
        features=make_features(cfg, table, factor, mesh), **known)


def load(options: LoadOptions) -> Teacher:
    """The teacher of a diffusers folder, its weights read straight into the mesh's layout.

    ``options.path`` is a folder, a ``gs://`` URL or a hub id, of the pipeline or of the UNet alone
    (then nothing can be decoded). Kernels are kept in `param_dtype`, the few other parameters in
    fp32.

    Raises:
      WeightsError: not SDXL, or missing, damaged, misshapen or quantised.
      ShardingError: a parameter does not divide over the mesh.
    """
    mesh = options.devices
    opened = open_folder(fetch.local_folder(options.path, FILES))
    cfg = model_config(opened.published, options.dtype, options.remat)
    cfg = dataclasses.replace(cfg, attention=resolve(
        options.attention, mesh.devices.flat[0], cfg.dtype, cfg.head_dims))
    checkpoint = diffusers.open_folder(opened.unet, UNET, options.variant)
    shapes = _abstract_params(cfg, options.param_dtype)
    layout = sharding.shard_tree(shapes, RULES, mesh)
    diffusers.check(checkpoint, shapes, names.unet)
    # Everything is checked before the first byte of weights goes to a device.
    factor, decode, encoder, codec = FACTOR, None, None, None
    if opened.vae:
        vae = published_vae.open_folder(opened.vae, options.variant)
        factor, decode = published_vae.decoder(vae, mesh)
        encoder, codec = published_vae.encoder_identity(vae), diffusers.identity(vae)
    latents = Latents(_latent_shape(options.size or SIZE, cfg, factor), decode, LIMIT,
                      functools.partial(_latent_shape, cfg=cfg, factor=factor), moments=MOMENTS,
                      encoder=encoder, codec=codec)
    zeros = text.null_is_zeros(opened.index)
    return _teacher(
        cfg, opened.time, factor, mesh,
        params=diffusers.import_tree(checkpoint, shapes, layout, names.unet), latents=latents,
        identity=diffusers.identity(checkpoint), null='zeros' if zeros else 'encoded')


def images(options: LoadOptions) -> ImageEncoder:
    """The encoder of a pipeline's codec; raises `WeightsError`: not SDXL's, or there is none."""
    patterns = [name for name in FILES if name != 'unet/*.safetensors']
    folder = fetch.local_folder(options.path, patterns)
    open_folder(folder)
    return published_vae.image_encoder('sdxl', folder, options)


distilled = functools.partial(published_card.few_step, called=STUDENTS)


def abstract(options: LoadOptions, **network: Any) -> Teacher:
    """The published teacher with shapes in place of weights; see `published_flow.abstract`."""
    mesh, size = options.devices, options.size or SIZE
    cfg = UNetConfig(dtype=options.dtype, remat=options.remat, **network)
    cfg = dataclasses.replace(cfg, attention=resolve(
        options.attention, mesh.devices.flat[0], cfg.dtype, cfg.head_dims))
    shape = _latent_shape(size, cfg, FACTOR)
    latents = Latents(shape, limit=LIMIT,
                      shape_of=functools.partial(_latent_shape, cfg=cfg, factor=FACTOR),
                      moments=MOMENTS, decoder=published_vae.decoder_program(CODEC, mesh, size))
    return _teacher(
        cfg, TABLE, FACTOR, mesh, params=_abstract_params(cfg, options.param_dtype),
        latents=latents, identity='abstract', null='zeros',
        text=published_text.abstract(text.PIPELINE, (ClipConfig(), BIG_G), options),
        flops=functools.partial(flops.unet_forward, cfg, shape[:2]),
        feature_flops=functools.partial(flops.unet_features, cfg, shape[:2]))


def export(params: Any, published: dict[str, Any], folder: Path, dtype: Any) -> None:
    """Writes `params` as a diffusers UNet's `folder`; see `diffusers.export_tree`.

    `published` is the teacher's own ``unet/config.json``: a student has its shape.
    """
    diffusers.export_tree(params, names.unet, folder, published, dtype)
