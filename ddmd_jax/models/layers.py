"""What the transformer families truly share: norms, rotary positions, layer stacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

Array = jax.Array

REMAT_POLICIES: dict[str, Any] = {
    'full': jax.checkpoint_policies.nothing_saveable,
    'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Linear(nnx.Linear):
    """`nnx.Linear` that can fold all leading axes into one before the product.

    XLA's CPU backend runs the gradient of a ``[B, S, D]`` product slower than that of
    the same product as ``[B * S, D]``; on a mesh that shards S, folding would force a reshard.
    """

    def __init__(self, din: int, dout: int, *, fold: bool = False, **kwargs: Any):
        super().__init__(din, dout, **kwargs)
        self.fold = fold

    def __call__(self, x: Array) -> Array:
        if not self.fold or x.ndim <= 2:
            return super().__call__(x)
        return super().__call__(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis, statistics in fp32, with a learnt scale."""

    def __init__(self, dim: int, *, eps: float, dtype: jnp.dtype):
        self.weight = nnx.Param(jnp.ones((dim,), jnp.float32))
        self.eps, self.dtype = eps, dtype

    def __call__(self, x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return (x32 * self.weight[...]).astype(self.dtype)


def rotary_angles(positions: Array, dims: tuple[int, ...], theta: float = 10000.0) -> Array:
    """Angles ``[..., sum(dims) / 2]`` of multi-axis rotary embeddings.

    Args:
      positions: ``[..., A]`` integer positions, one column an axis.
      dims: even number of head channels that each of the A axes turns.
      theta: base of the frequencies (diffusers: ``get_1d_rotary_pos_embed``).
    """
    parts = []
    for axis, dim in enumerate(dims):
        freqs = theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
        parts.append(positions[..., axis, None].astype(jnp.float32) * freqs)
    return jnp.concatenate(parts, axis=-1)


def apply_rotary(x: Array, angles: Array) -> Array:
    """Turns neighbouring channel pairs of ``x [B, S, H, D]`` by ``angles [B, S, D/2]``."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    real, imag = pairs[..., 0], pairs[..., 1]
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    turned = jnp.stack([real * cos - imag * sin, real * sin + imag * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def sinusoidal_embedding(t: Array, dim: int, max_period: float = 10000.0) -> Array:
    """``[B] -> [B, dim]`` cosines then sines (diffusers ``Timesteps``, flip_sin_to_cos)."""
    half = dim // 2
    freqs = jnp.exp(-jnp.log(max_period) * jnp.arange(half, dtype=jnp.float32) / half)
    args = t.astype(jnp.float32)[:, None] * freqs
    return jnp.concatenate([jnp.cos(args), jnp.sin(args)], axis=-1)


def stack_layers(make: Callable[[nnx.Rngs], nnx.Module], num: int, rngs: nnx.Rngs) -> nnx.Module:
    """`num` independently initialised copies of one layer, parameters stacked on axis 0."""

    @nnx.split_rngs(splits=num)
    @nnx.vmap(in_axes=0, out_axes=0)
    def build(rngs: nnx.Rngs) -> nnx.Module:
        return make(rngs)

    return build(rngs)


def scan_layers(layers: nnx.Module, x: Array, *args: Any, remat: str = 'none',
                unroll: bool = False) -> Array:
    """Runs a `stack_layers` stack over ``x``: one layer is traced and compiled, not N.

    `unroll` compiles all of them after all; `remat` is a key of `REMAT_POLICIES`, or 'none' to
    keep every activation.
    """
    graphdef, params = nnx.split(layers)

    def body(carry: Array, layer_params: Any) -> tuple[Array, None]:
        return nnx.merge(graphdef, layer_params)(carry, *args), None

    if remat != 'none':
        body = jax.checkpoint(body, policy=REMAT_POLICIES[remat], prevent_cse=False)
    return jax.lax.scan(body, x, params, unroll=unroll)[0]


def functional(make: Callable[[], nnx.Module], method: str = '__call__') -> Callable:
    """``apply(params, *inputs)`` of the module that `make` builds; nothing is allocated.

    `params` is the nested dict of `abstract_params(make)`, filled.
    """
    graphdef, abstract = nnx.split(nnx.eval_shape(make))

    def apply(params: Any, *inputs: Any) -> Any:
        state = jax.tree.map(lambda x: x, abstract)
        nnx.replace_by_pure_dict(state, params)
        return getattr(nnx.merge(graphdef, state), method)(*inputs)

    return apply


def abstract_params(make: Callable[[], nnx.Module]) -> dict[str, Any]:
    """Nested dict of `ShapeDtypeStruct` of the module that `make` builds."""
    return nnx.to_pure_dict(nnx.state(nnx.eval_shape(make), nnx.Param))
