"""Shared by the convolutional networks: convolutions, group norms, residual blocks, resampling.

Arrays are ``[B, H, W, C]``. Names of parameters are diffusers', so that importing a checkpoint is
renaming: `weight` is `kernel` (`scale` in a norm).
"""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from ddmd_jax.models.layers import Linear

Array = jax.Array
Padding = int | tuple[tuple[int, int], tuple[int, int]]


class Config(Protocol):
    """What the layers here ask of a network's config."""

    @property
    def norm_num_groups(self) -> int:
        """Groups of every norm."""

    @property
    def dtype(self) -> str:
        """Of activations; parameters and the statistics of norms are fp32."""


def conv(cfg: Config, din: int, dout: int, rngs: nnx.Rngs, *, size: int = 3,
         **kwargs: Any) -> nnx.Conv:
    """A convolution of `size` taps along each edge that keeps the size of what it is given."""
    kwargs = {'padding': size // 2} | kwargs
    return nnx.Conv(din, dout, (size, size), dtype=jnp.dtype(cfg.dtype), param_dtype=jnp.float32,
                    rngs=rngs, **kwargs)


class GroupNorm(nnx.Module):
    """``[B, H, W, C]`` to the same in fp32: what follows casts.

    Sums go over pixels first, channel by channel, and only then over a group's channels: on a CPU
    half the time of flax's, which sums over both at once. The fast variance, E[x^2] - E[x]^2,
    cancels where a group's mean is large, and the published one does not take it.
    """

    def __init__(self, dim: int, groups: int, eps: float = 1e-6):
        self.groups, self.eps = groups, eps
        self.scale, self.bias = nnx.Param(jnp.ones(dim)), nnx.Param(jnp.zeros(dim))

    def __call__(self, x: Array) -> Array:
        batch, height, width, dim = x.shape
        pixels = x.astype(jnp.float32).reshape(batch, height * width, dim)

        def mean(values: Array) -> Array:  # over a group: [batch, 1, dim]
            groups = values.mean(1).reshape(batch, self.groups, -1).mean(-1)
            return jnp.repeat(groups, dim // self.groups, axis=1)[:, None]

        centred = pixels - mean(pixels)
        scale = jax.lax.rsqrt(mean(jnp.square(centred)) + self.eps) * self.scale[...]
        return (centred * scale + self.bias[...]).reshape(x.shape)


class ResnetBlock(nnx.Module):
    """``[B, H, W, din] -> [B, H, W, dout]`` (diffusers `ResnetBlock2D`).

    With `time_dim`, an embedding of time ``[B, time_dim]`` is added between the convolutions.
    """

    def __init__(self, cfg: Config, din: int, dout: int, rngs: nnx.Rngs, *, eps: float = 1e-6,
                 time_dim: int | None = None):
        norm = lambda dim: GroupNorm(dim, cfg.norm_num_groups, eps)
        self.norm1, self.conv1 = norm(din), conv(cfg, din, dout, rngs)
        self.norm2, self.conv2 = norm(dout), conv(cfg, dout, dout, rngs)
        self.conv_shortcut = None if din == dout else conv(cfg, din, dout, rngs, size=1)
        self.time_emb_proj = None if time_dim is None else Linear(
            time_dim, dout, dtype=jnp.dtype(cfg.dtype), param_dtype=jnp.float32, rngs=rngs)

    def __call__(self, x: Array, temb: Array | None = None) -> Array:
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        if self.time_emb_proj is not None:
            assert temb is not None
            y = y + self.time_emb_proj(jax.nn.silu(temb))[:, None, None]
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return y + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nnx.Module):
    """``[B, H, W, C] -> [B, H/2, W/2, C]``, odd edges rounded up by a padding of 1."""

    def __init__(self, cfg: Config, dim: int, rngs: nnx.Rngs, padding: Padding = 1):
        self.conv = conv(cfg, dim, dim, rngs, strides=2, padding=padding)

    def __call__(self, x: Array) -> Array:
        return self.conv(x)


class Upsample(nnx.Module):
    """``[B, H, W, C] -> [B, 2 H, 2 W, C]``: each pixel four times, then a convolution."""

    def __init__(self, cfg: Config, dim: int, rngs: nnx.Rngs):
        self.conv = conv(cfg, dim, dim, rngs)

    def __call__(self, x: Array, size: tuple[int, int] | None = None) -> Array:
        """`size` is (height, width) where an odd edge was rounded up on the way down."""
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        return self.conv(x if size is None else x[:, :size[0], :size[1]])
