"""The latent codec of FLUX and Lumina-Image-2.0 (diffusers: `AutoencoderKL`).

Same function as the published one in ``[B, H, W, C]``, with the same parameter names, so that
importing a checkpoint is renaming: `weight` is `kernel` (`scale` in a norm), `to_out.0` is
`to_out`. Images are in [-1, 1]. *Raw* latents are what the networks give and take; those that
a diffusion model is trained on are shifted and scaled (`to_latents`, `from_latents`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ddmd_jax.models.convolution import Downsample, GroupNorm, ResnetBlock, Upsample, conv
from ddmd_jax.weights import flat

Array = jax.Array
Tree = Any

PADDING = ((0, 1), (0, 1))  # on the way down: zeros at the bottom and right only


@dataclasses.dataclass(frozen=True)
class AutoencoderKLConfig:
    """Fields up to `sample_size` are diffusers' names; defaults are the published FLUX codec's."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 16
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.3611
    shift_factor: float | None = 0.1159  # None is 0
    use_quant_conv: bool = False
    use_post_quant_conv: bool = False
    mid_block_add_attention: bool = True
    sample_size: int = 1024  # edge of a tile in pixels; see decode_tiled
    dtype: str = 'float32'  # of activations; parameters and the statistics of norms stay fp32

    @property
    def factor(self) -> int:
        """Edge in pixels of what one latent stands for."""
        return 2 ** (len(self.block_out_channels) - 1)

    def __post_init__(self):
        if not self.block_out_channels or any(
                c % self.norm_num_groups for c in self.block_out_channels):
            raise ValueError(f'block_out_channels {self.block_out_channels} must be multiples of '
                             f'norm_num_groups = {self.norm_num_groups}')


class Attention(nnx.Module):
    """Self-attention of one head over all pixels, normed before, residual.

    The only part whose memory grows with the square of the area: ``[B, 1, hw, hw]`` in fp32,
    1 GiB an image for 128 x 128 latents (1024 pixels). `decode_tiled` bounds it.
    """

    def __init__(self, cfg: AutoencoderKLConfig, dim: int, rngs: nnx.Rngs):
        linear = lambda: nnx.Linear(dim, dim, dtype=jnp.dtype(cfg.dtype), param_dtype=jnp.float32,
                                    rngs=rngs)
        self.group_norm = GroupNorm(dim, cfg.norm_num_groups)
        self.to_q, self.to_k, self.to_v, self.to_out = linear(), linear(), linear(), linear()

    def __call__(self, x: Array) -> Array:
        y = self.group_norm(x).reshape(x.shape[0], -1, 1, x.shape[-1])
        out = jax.nn.dot_product_attention(self.to_q(y), self.to_k(y), self.to_v(y))
        return x + self.to_out(out).reshape(x.shape)


class MidBlock(nnx.Module):
    """Two residual blocks with (optionally) attention between them; shape as it was."""

    def __init__(self, cfg: AutoencoderKLConfig, dim: int, rngs: nnx.Rngs):
        self.resnets = nnx.List([ResnetBlock(cfg, dim, dim, rngs) for _ in range(2)])
        self.attentions = nnx.List(
            [Attention(cfg, dim, rngs)] if cfg.mid_block_add_attention else [])

    def __call__(self, x: Array) -> Array:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


def _resnets(cfg: AutoencoderKLConfig, num: int, din: int, dout: int, rngs: nnx.Rngs) -> nnx.List:
    return nnx.List([ResnetBlock(cfg, dout if i else din, dout, rngs) for i in range(num)])


class DownBlock(nnx.Module):
    """Residual blocks, then half the size unless `last` (diffusers `DownEncoderBlock2D`)."""

    def __init__(self, cfg: AutoencoderKLConfig, din: int, dout: int, rngs: nnx.Rngs, *,
                 last: bool):
        self.resnets = _resnets(cfg, cfg.layers_per_block, din, dout, rngs)
        self.downsamplers = nnx.List([] if last else [Downsample(cfg, dout, rngs, PADDING)])

    def __call__(self, x: Array) -> Array:
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class UpBlock(nnx.Module):
    """Residual blocks, one more than on the way down, then twice the size unless `last`."""

    def __init__(self, cfg: AutoencoderKLConfig, din: int, dout: int, rngs: nnx.Rngs, *,
                 last: bool):
        self.resnets = _resnets(cfg, cfg.layers_per_block + 1, din, dout, rngs)
        self.upsamplers = nnx.List([] if last else [Upsample(cfg, dout, rngs)])

    def __call__(self, x: Array) -> Array:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


def _blocks(kind: Callable[..., nnx.Module], cfg: AutoencoderKLConfig, dims: tuple[int, ...],
            rngs: nnx.Rngs) -> nnx.List:
    """One block for each of `dims`, the channels that come out of it."""
    ends = enumerate(zip((dims[0], *dims), dims))
    return nnx.List([kind(cfg, din, dout, rngs, last=i == len(dims) - 1)
                     for i, (din, dout) in ends])


class Encoder(nnx.Module):
    """``[B, H, W, in_channels] -> [B, H/f, W/f, 2 latent_channels]``, f the config's `factor`."""

    def __init__(self, cfg: AutoencoderKLConfig, rngs: nnx.Rngs):
        dims = cfg.block_out_channels
        self.conv_in = conv(cfg, cfg.in_channels, dims[0], rngs)
        self.down_blocks = _blocks(DownBlock, cfg, dims, rngs)
        self.mid_block = MidBlock(cfg, dims[-1], rngs)
        self.conv_norm_out = GroupNorm(dims[-1], cfg.norm_num_groups)
        self.conv_out = conv(cfg, dims[-1], 2 * cfg.latent_channels, rngs)

    def __call__(self, x: Array) -> Array:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    """``[B, h, w, latent_channels] -> [B, f h, f w, out_channels]``, f the config's `factor`."""

    def __init__(self, cfg: AutoencoderKLConfig, rngs: nnx.Rngs):
        dims = cfg.block_out_channels[::-1]
        self.conv_in = conv(cfg, cfg.latent_channels, dims[0], rngs)
        self.mid_block = MidBlock(cfg, dims[0], rngs)
        self.up_blocks = _blocks(UpBlock, cfg, dims, rngs)
        self.conv_norm_out = GroupNorm(dims[-1], cfg.norm_num_groups)
        self.conv_out = conv(cfg, dims[-1], cfg.out_channels, rngs)

    def __call__(self, x: Array) -> Array:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class AutoencoderKL(nnx.Module):
    """Encoder and decoder, with the optional 1 x 1 convolutions about the latents."""

    def __init__(self, cfg: AutoencoderKLConfig, rngs: nnx.Rngs):
        pointwise = lambda dim: conv(cfg, dim, dim, rngs, size=1)
        self.cfg = cfg
        self.encoder, self.decoder = Encoder(cfg, rngs), Decoder(cfg, rngs)
        self.quant_conv = pointwise(2 * cfg.latent_channels) if cfg.use_quant_conv else None
        self.post_quant_conv = pointwise(cfg.latent_channels) if cfg.use_post_quant_conv else None

    def encode_moments(self, images: Array) -> tuple[Array, Array]:
        """``[B, H, W, in_channels]`` in [-1, 1] to ``(mean, logvar)`` of the raw latents.

        Returns:
          Two arrays ``[B, H/f, W/f, latent_channels]``, fp32; `logvar` is in [-30, 20].

        Raises:
          ValueError: H or W is not a multiple of the config's `factor` f, or another shape.
        """
        _check_images(images.shape, self.cfg)
        moments = self.encoder(images)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def decode(self, z: Array) -> Array:
        """Raw latents ``[B, h, w, latent_channels]`` to images ``[B, f h, f w, C]``, fp32.

        Nothing is clipped: images leave [-1, 1] a little.

        Raises:
          ValueError: another shape.
        """
        _check_channels('latents', z.shape, self.cfg.latent_channels)
        if self.post_quant_conv is not None:
            z = self.post_quant_conv(z)
        return self.decoder(z).astype(jnp.float32)


def _check_channels(what: str, shape: tuple[int, ...], channels: int) -> None:
    if len(shape) != 4 or shape[-1] != channels:
        raise ValueError(f'{what} of shape {tuple(shape)}: must be [batch, height, width, '
                         f'{channels}], channels last')


def _check_images(shape: tuple[int, ...], cfg: AutoencoderKLConfig) -> None:
    _check_channels('images', shape, cfg.in_channels)
    fits = tuple(max(edge // cfg.factor, 1) * cfg.factor for edge in shape[1:3])
    if fits != tuple(shape[1:3]):
        raise ValueError(f'images of {shape[1]} x {shape[2]} pixels: height and width must be '
                         f'multiples of {cfg.factor}; crop or resize to {fits[0]} x {fits[1]}')


def to_latents(model: AutoencoderKL, images: Array, noise: Array | None = None) -> Array:
    """The latents of ``images [B, H, W, 3]``, as a diffusion model knows them; fp32.

    They are the posterior's means, or with unit `noise` of their shape samples of it.
    """
    mean, logvar = model.encode_moments(images)
    if noise is not None:
        mean = mean + jnp.exp(0.5 * logvar) * noise
    return (mean - (model.cfg.shift_factor or 0.0)) * model.cfg.scaling_factor


def from_latents(model: AutoencoderKL, latents: Array) -> Array:
    """Images, fp32, of a diffusion model's ``latents [B, h, w, C]``: inverts `to_latents`."""
    cfg = model.cfg
    return model.decode(latents.astype(jnp.float32) / cfg.scaling_factor
                        + (cfg.shift_factor or 0.0))


def decode_tiled(decode: Callable[[np.ndarray], Array], z: np.ndarray,
                 cfg: AutoencoderKLConfig) -> np.ndarray:
    """Decodes latents of any size in overlapping, blended tiles, so that memory is bounded.

    As diffusers' `tiled_decode`: tiles of `sample_size` pixels, each over a quarter of the one
    before it. Latents that fit one tile are decoded whole. A tile's norms and attention see
    that tile only, so the result is near to, not the same as, a decoding in one piece.

    Args:
      decode: one tile ``[B, h, w, C]`` to its image; raw latents or scaled ones, as it likes.
        Jit it: there are at most three heights and three widths, so nine shapes to compile.
      z: ``[B, h, w, C]``.
      cfg: gives `sample_size` and `factor`.

    Returns:
      ``[B, f h, f w, out_channels]`` fp32, on the host.

    Raises:
      ValueError: a quarter of a tile is not a whole number of latents.
    """
    tile, rest = divmod(cfg.sample_size, cfg.factor)
    if rest or tile % 4 or not tile:
        raise ValueError(f'sample_size {cfg.sample_size} must be a multiple of {4 * cfg.factor}: '
                         'a quarter of a tile has to be whole latents; take the next that is')
    stride = tile * 3 // 4
    batch, height, width = z.shape[:3]
    if max(height, width) <= tile:
        return np.asarray(decode(z), np.float32)
    images = np.empty((batch, height * cfg.factor, width * cfg.factor, cfg.out_channels),
                      np.float32)
    above: dict[int, np.ndarray] = {}  # by column: the lowest tile so far, whole and blended
    for i in range(0, height, stride):
        for j in range(0, width, stride):
            part = np.array(decode(z[:, i:i + tile, j:j + tile]), np.float32)
            if i:
                _blend(above[j], part, (tile - stride) * cfg.factor, axis=1)
            if j:
                _blend(above[j - stride], part, (tile - stride) * cfg.factor, axis=2)
            above[j] = part
            kept = part[:, :stride * cfg.factor, :stride * cfg.factor]
            y, x = i * cfg.factor, j * cfg.factor
            images[:, y:y + kept.shape[1], x:x + kept.shape[2]] = kept
    return images


def _blend(before: np.ndarray, after: np.ndarray, extent: int, axis: int) -> None:
    """Fades the end of `before` into the beginning of `after`, in place, along `axis`."""
    extent = min(before.shape[axis], after.shape[axis], extent)
    ramp = np.arange(extent, dtype=np.float32) / np.float32(extent)
    old = np.swapaxes(before, axis, -1)[..., -extent:]
    new = np.swapaxes(after, axis, -1)[..., :extent]
    new[...] = old * (1 - ramp) + new * ramp


@functools.cache
def _abstract(cfg: AutoencoderKLConfig) -> tuple[Any, Any]:
    """``(graphdef, state)`` without a number in it; who fills the state copies it."""
    return nnx.split(nnx.eval_shape(lambda: AutoencoderKL(cfg, nnx.Rngs(0))))


def abstract_params(cfg: AutoencoderKLConfig) -> Tree:
    """Nested dict of fp32 `ShapeDtypeStruct`, list positions as strings (see `flat.unflatten`)."""
    return flat.unflatten(flat.flatten(nnx.to_pure_dict(_abstract(cfg)[1])))


def functional(cfg: AutoencoderKLConfig) -> tuple[Callable[..., Array], Callable[..., Array]]:
    """``encode(params, images[, noise]) -> latents`` and ``decode(params, latents) -> images``.

    Pure functions for `jax.jit`; see `to_latents` and `from_latents`. `params` is a nested dict
    whose list positions are ints or strings. The half that a function does not use may be
    absent, so that who only decodes need not hold an encoder.

    Raises:
      ValueError: (from either function) a parameter it needs is missing or misshapen.
    """
    graphdef, abstract = _abstract(cfg)
    shapes = flat.flatten(nnx.to_pure_dict(abstract))

    def bind(params: Tree, *parts: str) -> AutoencoderKL:
        given = flat.flatten(params)
        for name, want in shapes.items():
            found = jnp.shape(given[name]) if name in given else 'nothing'
            if name.split('/')[0] in parts and found != want.shape:
                raise ValueError(f'autoencoder parameter {name}: found {found}, must be '
                                 f'{want.shape}; these are the weights of another architecture')
        state = jax.tree.map(lambda x: x, abstract)
        nnx.replace_by_pure_dict(state, params)  # reads '0' as 0 where that is the name
        return nnx.merge(graphdef, state)

    def encode(params: Tree, images: Array, noise: Array | None = None) -> Array:
        return to_latents(bind(params, 'encoder', 'quant_conv'), images, noise)

    def decode(params: Tree, latents: Array) -> Array:
        return from_latents(bind(params, 'decoder', 'post_quant_conv'), latents)

    return encode, decode
