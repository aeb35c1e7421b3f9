"""Shared by the transformer families: norms, rotary positions, layer stacks."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from ddmd_jax.models.adapters import Adapted
from ddmd_jax.parallel import sharding
from ddmd_jax.weights import flat

Array = jax.Array

REMAT_POLICIES: dict[str, Any] = {
    'full': jax.checkpoint_policies.nothing_saveable,
    'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Linear(nnx.Linear):
    """`nnx.Linear` that can fold all leading axes into one before the product, and be adapted.

    XLA's CPU backend runs the gradient of a ``[B, S, D]`` product slower than that of
    the same product as ``[B * S, D]``; on a mesh that shards S, folding would force a reshard.

    The factors of an adapted kernel have a product of their own, ``x W + scale (x A) B``. The
    gradient of the sum ``W + scale A B`` would be as large as W's: one product of the whole layer
    more, and as much to send.
    """

    def __init__(self, din: int, dout: int, *, fold: bool = False, **kwargs: Any):
        super().__init__(din, dout, **kwargs)
        self.fold = fold

    def __call__(self, x: Array) -> Array:  # type: ignore[override]  # as it is called here
        product = self._adapted if isinstance(
            self.kernel.get_raw_value(), Adapted) else super().__call__
        if not self.fold or x.ndim <= 2:
            return product(x)
        return product(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)

    def _adapted(self, x: Array) -> Array:
        kernel = self.kernel.get_raw_value()
        bias = None if self.bias is None else self.bias[...]
        x, base, a, b, bias = self.promote_dtype(
            (x, kernel.base, kernel.lora_A, kernel.lora_B, bias), dtype=self.dtype)
        y = x @ base + kernel.scale * _low_rank(x, a, b)
        return y if bias is None else y + bias


# Recomputed for a gradient whatever a layer's own policy keeps: it is as large as the output.
@functools.partial(jax.checkpoint, prevent_cse=False,
                   policy=jax.checkpoint_policies.nothing_saveable)
def _low_rank(x: Array, a: Array, b: Array) -> Array:
    return (x @ a) @ b


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis, statistics in fp32, with a learnt scale."""

    def __init__(self, dim: int, *, eps: float, dtype: jnp.dtype):
        self.weight = nnx.Param(jnp.ones((dim,), jnp.float32))
        self.eps, self.dtype = eps, dtype

    def __call__(self, x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return (x32 * self.weight[...]).astype(self.dtype)


def layer_norm(x: Array, eps: float = 1e-6) -> Array:
    """LayerNorm over the last axis without parameters, in fp32."""
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


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


def timestep_embedding(t: Array, dim: int, max_period: float = 10000.0) -> Array:
    """`sinusoidal_embedding` of a time that counts to 1000, as PyTorch's bits have it.

    A frequency's last bit turns such an angle by 6e-5, and XLA's exp is off by more. So they are
    made on the host: exponents rounded to fp32, then what exp gives exactly.
    """
    half = dim // 2
    exponents = np.float32(-math.log(max_period)) * np.arange(half, dtype=np.float32) / half
    args = t.astype(jnp.float32)[:, None] * np.exp(exponents.astype(np.float64)).astype(np.float32)
    return jnp.concatenate([jnp.cos(args), jnp.sin(args)], axis=-1)


def stack_layers(make: Callable[[nnx.Rngs], nnx.Module], num: int, rngs: nnx.Rngs) -> nnx.Module:
    """`num` independently initialised copies of one layer, parameters stacked on axis 0."""

    @nnx.split_rngs(splits=num)
    @nnx.vmap(in_axes=0, out_axes=0)
    def build(rngs: nnx.Rngs) -> nnx.Module:
        return make(rngs)

    return build(rngs)


def scan_layers(layers: nnx.Module, x: Array, *args: Any, remat: str = 'none',
                unroll: bool = False, use: Callable[[Any], Any] = lambda params: params) -> Array:
    """Runs a `stack_layers` stack over ``x``: one layer is traced and compiled, not N.

    `unroll` compiles all of them after all; `remat` is a key of `REMAT_POLICIES`, or 'none' to
    keep every activation. `use` is done to each layer's parameters before they are needed; see
    `gather_kernels`.
    """
    graphdef, params = nnx.split(layers)

    def body(carry: Array, layer_params: Any) -> tuple[Array, None]:
        return nnx.merge(graphdef, use(layer_params))(carry, *args), None

    if remat != 'none':
        body = jax.checkpoint(body, policy=REMAT_POLICIES[remat], prevent_cse=False)
    return jax.lax.scan(body, x, params, unroll=unroll)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(kernel: Array, dtype: jnp.dtype, whole: NamedSharding, split: NamedSharding) -> Array:
    return jax.lax.with_sharding_constraint(kernel.astype(dtype), whole)


def _gather_fwd(kernel: Array, dtype: jnp.dtype, whole: NamedSharding,
                split: NamedSharding) -> tuple[Array, Array]:
    return _gather(kernel, dtype, whole, split), jnp.zeros((), kernel.dtype)


def _gather_bwd(dtype: jnp.dtype, whole: NamedSharding, split: NamedSharding, like: Array,
                grad: Array) -> tuple[Array]:
    return (jax.lax.with_sharding_constraint(grad, split).astype(like.dtype),)


_gather.defvjp(_gather_fwd, _gather_bwd)


def rows_stay(x: Array, mesh: Mesh | None, spec: P | None = None) -> Array:
    """Keeps the batch of ``x [B, ...]`` split over the mesh, if it divides; or `x` as in `spec`.

    Batch and kernels are both split over `fsdp`. Left to itself the compiler for TPUs may keep
    the kernels where they are and reduce activations of the whole batch instead.
    """
    if mesh is None or x.shape[0] % sharding.batch_ways(mesh):
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec or P(*sharding.BATCH)))


def gather_kernels(params: Any, rules: sharding.Rules, mesh: Mesh | None, dtype: jnp.dtype) -> Any:
    """A layer's parameters with its kernels whole over `fsdp`, in `dtype`; other axes stay.

    `fsdp` is spelled out, not left to the compiler: the kernels of one layer are
    gathered when it runs, in the type of its products (half the bytes of fp32), and their
    gradients are scattered as they are summed. The TPU's compiler, left to itself, split the
    products into steps that pass kernels around, and summed whole gradients on every chip.
    """
    if mesh is None or mesh.shape['fsdp'] == 1:
        return params

    def gathered(name: str, leaf: Array, axes: tuple[Any, ...] | None = None) -> Array:
        spec = sharding.spec_for(name, leaf.shape, rules, mesh)
        whole = P(*(None if axis == 'fsdp' else axis for axis in axes or spec))
        return _gather(leaf, dtype, NamedSharding(mesh, whole), NamedSharding(mesh, spec))

    def one(path: Any, leaf: Array | Adapted) -> Array | Adapted:
        name = jax.tree_util.keystr(path, simple=True, separator='/').removesuffix('/value')
        if not name.endswith('kernel'):
            return leaf
        if not isinstance(leaf, Adapted):
            return gathered(name, leaf)
        spec = sharding.spec_for(name, leaf.shape, rules, mesh)
        if leaf.ndim > 2:  # a convolution wants the sum: each device adds its own part
            split = NamedSharding(mesh, spec)
            return gathered(name, jax.lax.with_sharding_constraint(leaf.merged(), split))
        # In products a factor lies as the kernel does; at rest it is split over more.
        (din, dout), (a, b) = (*spec, None, None)[:2], sharding.FACTORS
        return Adapted(gathered(name, leaf.base),
                       gathered(f'{name}/{a}', leaf.lora_A, (din, None)),
                       gathered(f'{name}/{b}', leaf.lora_B, (None, dout)), leaf.scale)

    return jax.tree_util.tree_map_with_path(
        one, params, is_leaf=lambda leaf: isinstance(leaf, Adapted))


@functools.cache
def maker(module: Callable[..., nnx.Module], cfg: Any, *rest: Any) -> Callable[[], nnx.Module]:
    """Builds ``module(cfg, rngs, *rest)``; one object for one architecture, whose shapes are then
    found once."""
    return lambda: module(cfg, nnx.Rngs(0), *rest)


@functools.lru_cache(maxsize=64)
def _abstract(make: Callable[[], nnx.Module]) -> tuple[Any, Any]:
    """``(graphdef, state)`` without a number in it; who fills the state copies it."""
    return nnx.split(nnx.eval_shape(make))


def functional(make: Callable[[], nnx.Module], method: str = '__call__') -> Callable:
    """``apply(params, *inputs)`` of the module that `make` builds; nothing is allocated.

    `params` is the nested dict of `abstract_params(make)`, filled.
    """
    graphdef, abstract = _abstract(make)

    def apply(params: Any, *inputs: Any) -> Any:
        state = jax.tree.map(lambda x: x, abstract)
        nnx.replace_by_pure_dict(state, params)
        return getattr(nnx.merge(graphdef, state), method)(*inputs)

    return apply


def abstract_params(make: Callable[[], nnx.Module]) -> dict[str, Any]:
    """Nested dict of `ShapeDtypeStruct` of the module that `make` builds.

    Places in a list are strings, as `flat.unflatten` has them.
    """
    params = nnx.to_pure_dict(nnx.filter_state(_abstract(make)[1], nnx.Param))
    return flat.unflatten(flat.flatten(params))
