"""Flow transformers of diffusers' folders as teachers: what Lumina-Image-2.0 and Z-Image share.

  * Time. The scheduler counts sigma = 1 (noise) to 0 (clean) and hands the network ``1 - sigma``:
    that is the paper's t, which the network therefore takes as it is.
  * Sign. The network predicts ``x - noise``, the paper's velocity; the pipeline negates it only
    because its scheduler steps along sigma. Nothing is negated here.
  * Shift. Static, ``t' = t / (t + s (1 - t))``, s from ``scheduler_config.json``. It is the teacher
    sampler's; a config may distil with another (`method.shift`).
  * Latents. FLUX's autoencoder, 8 x 8 pixels a latent, 2 x 2 latents a token.

How a pipeline guides is its family's own: `families/*/teacher.py`.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from ddmd_jax.data.batch import CondSpec
from ddmd_jax.diffusion import process
from ddmd_jax.diffusion.sampling import Predict
from ddmd_jax.diffusion.time import Shift
from ddmd_jax.families import published_card, published_config, published_vae
from ddmd_jax.families.base import (
    Array,
    Cond,
    ImageEncoder,
    Latents,
    LoadOptions,
    Teacher,
    TextEncoder,
    kernels_in,
)
from ddmd_jax.models.attention import resolve
from ddmd_jax.models.autoencoder_kl import AutoencoderKLConfig
from ddmd_jax.models.layers import abstract_params, functional, maker
from ddmd_jax.parallel import sharding
from ddmd_jax.util import shape
from ddmd_jax.weights import diffusers, fetch, scheduler
from ddmd_jax.weights.flat import WeightsError

FILES = ('model_index.json', 'scheduler/*.json', 'transformer/*.json', 'transformer/*.safetensors',
         'vae/*.json', 'vae/*.safetensors',
         # Of a bare transformer.
         'config.json', f'{diffusers.STEM}*.safetensors', f'{diffusers.STEM}*.json')
SIZE = (1024, 1024)  # pixels, height first
FACTOR = 8  # pixels a latent, likewise
LIMIT = 4.0  # standard deviations: latents are scaled to about one


@dataclasses.dataclass(frozen=True)
class Flow:
    """How the folders of a family are read.

    `fields` gives those of `config` (but `dtype`, `remat` and `attention`) from a published
    ``transformer/config.json``; it raises KeyError, TypeError or ValueError if they are not to be
    had. `module` takes (config, rngs, mesh) and is called with (x_t, t, embeds, mask).
    """

    family: str
    title: str  # for errors
    class_names: tuple[str, ...]  # of pipelines
    transformer: str  # class
    config: Callable[..., Any]  # ours; its defaults are the published network's
    fields: Callable[[dict[str, Any]], dict[str, Any]]
    module: Callable[..., nnx.Module]
    entry: diffusers.EntryOf
    rules: sharding.Rules
    shift: float  # the published scheduler's, for a bare transformer, which comes without one
    flops: Callable[[Any, tuple[int, int], int], int]  # (config, latent's size, tokens)
    feature_flops: Callable[[Any, tuple[int, int], int], int]  # likewise; see `Teacher`
    rescale: Callable[[Array, Array], Array] | None = None  # see `Teacher`


# --- Networks ---


def model_config(flow: Flow, published: dict[str, Any], dtype: str = 'float32',
                 remat: str = 'none', attention: str = 'xla') -> Any:
    """Our architecture from a published ``transformer/config.json``.

    Raises:
      WeightsError: a field is missing or not to be had here.
    """
    try:
        values = published_config.checked(flow.config, flow.fields(published))
        return flow.config(**values, dtype=dtype, remat=remat, attention=attention)
    except (KeyError, TypeError, ValueError) as e:
        raise WeightsError(f'transformer/config.json is not one of {flow.transformer} ({e}); fetch '
                           'the folder again') from e


def make_denoiser(module: Callable[..., nnx.Module], cfg: Any, mesh: Mesh | None = None,
                  time_scale: float = 1.0) -> Predict:
    """`predict_clean(params, x_t, t, cond)` of a velocity network; see `Teacher`.

    The network is given ``time_scale * t``; the published ones take t as it is.
    """
    velocity = make_features(module, cfg, mesh, time_scale, '__call__')

    def predict_clean(params: Any, x_t: Array, t: Array, cond: Cond) -> Array:
        t = jnp.broadcast_to(jnp.asarray(t, jnp.float32), x_t.shape[:1])
        return process.to_clean(x_t, velocity(params, x_t, t, cond), t)

    return predict_clean


def make_features(module: Callable[..., nnx.Module], cfg: Any, mesh: Mesh | None = None,
                  time_scale: float = 1.0, method: str = 'features') -> Predict:
    """``(params, x_t, t [B], cond)`` by a method of the transformer; `features` of a `Teacher`."""
    apply = functional(maker(module, cfg, mesh), method)
    return lambda params, x_t, t, cond: apply(
        params, x_t, time_scale * t, cond['embeds'], cond['mask'])


def abstract_network(flow: Flow, cfg: Any, dtype: str = 'float32') -> Any:
    """Shapes of the transformer's parameters, kernels stored in `dtype`."""
    params = abstract_params(maker(flow.module, cfg))
    return jax.eval_shape(functools.partial(kernels_in, dtype=dtype), params)


# --- Folders ---


def transformer_folder(folder: Path) -> Path:
    """Where the transformer lies in a pipeline's folder, or in its own."""
    return folder / 'transformer' if (folder / 'model_index.json').exists() else folder


def _scheduler_shift(flow: Flow, folder: Path) -> float:
    config = diffusers.read_json(folder / 'scheduler_config.json', {
        'shift?': shape.positive, 'flow_shift?': shape.positive})
    if config.get('use_dynamic_shifting'):
        raise WeightsError(f'{folder} shifts time by resolution (use_dynamic_shifting), which '
                           f'{flow.title} does not; give its own scheduler_config.json')
    own, name = str(config.get('_class_name', scheduler.CLASS)), 'shift'
    if not own.startswith('FlowMatch'):
        if not config.get('use_flow_sigmas'):
            raise WeightsError(f'{folder} has a {own}, whose times are not those of {flow.title}; '
                               f'give its own scheduler_config.json, of {scheduler.CLASS}')
        name = 'flow_shift'
    if other := [option for option in scheduler.RESPACED if config.get(option)]:
        print(f"warning: {folder}: the teacher's own sampler takes even steps here, without "
              f'{", ".join(other)}; no training depends on it', file=sys.stderr)
    return float(config.get(name, 1.0))


def shift_of(flow: Flow, folder: Path) -> float:
    """Of time: what the scheduler of the pipeline says that `folder` is, or is the transformer of;
    the family's where there is none.

    Raises:
      WeightsError: its scheduler shifts by resolution, or is none of a flow.
    """
    beside = published_card.pipeline(folder) / 'scheduler'
    return _scheduler_shift(flow, beside) if beside.is_dir() else flow.shift


def _open(flow: Flow, folder: Path, variant: str = ''
          ) -> tuple[diffusers.Checkpoint, diffusers.Checkpoint | None, float]:
    """(transformer, autoencoder, shift) of a pipeline's folder, or of a bare transformer's."""
    if not (folder / 'model_index.json').exists():
        return (diffusers.open_folder(folder, flow.transformer, variant), None,
                shift_of(flow, folder))
    found = diffusers.read_json(folder / 'model_index.json').get('_class_name')
    if found not in flow.class_names:
        raise WeightsError(f'{folder} is a {found}, not {flow.class_names[0]}; give a folder of '
                           f'{flow.title}')
    return (diffusers.open_folder(folder / 'transformer', flow.transformer, variant),
            published_vae.open_folder(folder / 'vae', variant),
            _scheduler_shift(flow, folder / 'scheduler'))


def _latent_shape(size: Sequence[int], cfg: Any, factor: int) -> tuple[int, int, int]:
    unit = factor * cfg.patch_size
    if any(side % unit or side <= 0 for side in size):
        raise WeightsError(f'size {tuple(size)} must be positive multiples of {unit} pixels '
                           '(config.data.sizes, height first)')
    return (size[0] // factor, size[1] // factor, cfg.in_channels)


def load(flow: Flow, options: LoadOptions) -> Teacher:
    """The teacher of a diffusers folder, its weights read straight into the mesh's layout.

    ``options.path`` is a folder, a ``gs://`` URL or a hub id, of the pipeline or of the transformer
    alone (then nothing can be decoded). Kernels are kept in `param_dtype`, the few other parameters
    in fp32.

    Raises:
      WeightsError: not of this family, or missing, damaged, misshapen or quantised.
      ShardingError: a parameter does not divide over the mesh.
    """
    mesh = options.devices
    transformer, vae, shift = _open(flow, fetch.local_folder(options.path, FILES),
                                    options.variant)
    cfg = model_config(flow, transformer.config, options.dtype, options.remat)
    cfg = dataclasses.replace(cfg, attention=resolve(
        options.attention, mesh.devices.flat[0], cfg.dtype, [cfg.head_dim]))
    abstract = abstract_network(flow, cfg, options.param_dtype)
    layout = sharding.shard_tree(abstract, flow.rules, mesh)
    diffusers.check(transformer, abstract, flow.entry)
    # Everything is checked before the first byte of weights goes to a device.
    factor, decode = (FACTOR, None) if vae is None else published_vae.decoder(vae, mesh)
    latents = Latents(_latent_shape(options.size or SIZE, cfg, factor), decode, LIMIT,
                      functools.partial(_latent_shape, cfg=cfg, factor=factor),
                      encoder=None if vae is None else published_vae.encoder_identity(vae),
                      codec=None if vae is None else diffusers.identity(vae))
    return Teacher(
        flow.family, diffusers.import_tree(transformer, abstract, layout, flow.entry),
        make_denoiser(flow.module, cfg, mesh), latents, CondSpec.text(cfg.cap_feat_dim),
        Shift(shift), diffusers.identity(transformer), flow.rules, rescale=flow.rescale,
        features=make_features(flow.module, cfg, mesh))


def images(flow: Flow, options: LoadOptions) -> ImageEncoder:
    """The encoder of a pipeline's codec; raises `WeightsError`: of another family, or none."""
    folder = fetch.local_folder(options.path, ('model_index.json', 'vae/*'))
    found = diffusers.read_json(folder / 'model_index.json').get('_class_name')
    if found not in flow.class_names:
        raise WeightsError(f'{folder} is a {found}, not {flow.class_names[0]}; give a folder of '
                           f'{flow.title}')
    return published_vae.image_encoder(flow.family, folder, options)


def abstract(flow: Flow, text: TextEncoder, options: LoadOptions, **network: Any) -> Teacher:
    """The published teacher with shapes in place of weights: to compile for, not to run.

    `text` is its text side, likewise; `network` are fields of its transformer's config that are
    not to be as published.
    """
    mesh, size = options.devices, options.size or SIZE
    cfg = flow.config(dtype=options.dtype, remat=options.remat, **network)
    cfg = dataclasses.replace(cfg, attention=resolve(
        options.attention, mesh.devices.flat[0], cfg.dtype, [cfg.head_dim]))
    shape = _latent_shape(size, cfg, FACTOR)
    latents = Latents(
        shape, limit=LIMIT, shape_of=functools.partial(_latent_shape, cfg=cfg, factor=FACTOR),
        decoder=published_vae.decoder_program(AutoencoderKLConfig(), mesh, size))
    return Teacher(
        flow.family, abstract_network(flow, cfg, options.param_dtype),
        make_denoiser(flow.module, cfg, mesh), latents, CondSpec.text(cfg.cap_feat_dim),
        Shift(flow.shift), 'abstract', flow.rules, text, rescale=flow.rescale,
        features=make_features(flow.module, cfg, mesh),
        flops=functools.partial(flow.flops, cfg, shape[:2]),
        feature_flops=functools.partial(flow.feature_flops, cfg, shape[:2]))


def export(flow: Flow, params: Any, published: dict[str, Any], folder: Path, dtype: Any) -> None:
    """Writes `params` as a diffusers transformer's `folder`; see `diffusers.export_tree`.

    `published` is the teacher's own ``transformer/config.json``: a student has its shape.
    """
    diffusers.export_tree(params, flow.entry, folder, published, dtype)
