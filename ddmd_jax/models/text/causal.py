"""Shared by causal text encoders: masks, half-rotated positions, attention, a gated network.

Gemma-2 and Qwen3 (transformers: `modeling_gemma2.py`, `modeling_qwen3.py`) are decoders, read at
a hidden state rather than at their logits; CLIP's tower uses the mask and the attention. Texts
are short, a few hundred tokens, so the scores are kept in memory and no kernel is needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec as P

from ddmd_jax.models.layers import (
    Linear,
    RMSNorm,
    gather_kernels,
    rotary_angles,
    rows_stay,
    scan_layers,
)

Array = jax.Array

# How a mesh holds a decoder. Tokens are looked up in a table that is split over its width: a
# table split over the vocabulary would have to be gathered, or its rows summed over devices.
RULES = (
    (r'(to_q|to_k|to_v|linear_1|linear_3)/kernel$', ('fsdp', 'tensor')),
    (r'(to_out|linear_2)/kernel$', ('tensor', 'fsdp')),
    (r'token/embedding$', (None, 'fsdp')),
    (r'(bias|weight)$', ()),
)


@dataclasses.dataclass(frozen=True)
class CausalConfig:
    """Fields up to `rope_theta` are transformers' names; a family's own class has its defaults."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    dtype: str = 'float32'  # of activations and matrix products
    # The states before the last layer, which then is neither held nor run; else all layers and
    # the norm behind them.
    penultimate: bool = True

    @property
    def depth(self) -> int:
        """Layers that are held and run."""
        return self.num_hidden_layers - self.penultimate

    def __post_init__(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError('num_attention_heads must be a multiple of num_key_value_heads')
        if self.head_dim % 2:
            raise ValueError(f'head_dim {self.head_dim} must be even')
        if self.depth < 1:
            raise ValueError(f'num_hidden_layers {self.num_hidden_layers} leave none to run')


def causal_mask(mask: Array | None, length: int, window: int | None = None) -> Array:
    """Which keys a query sees, bool ``[B, L, L]`` (B = 1 without `mask`).

    Args:
      mask: bool ``[B, L]``, True for real tokens; None if all of them count.
      length: L.
      window: tokens that a query sees, itself included; None for all before it.
    """
    query, key = jnp.arange(length)[:, None], jnp.arange(length)[None]
    seen = key <= query
    if window is not None:
        seen &= key > query - window
    return seen[None] if mask is None else seen[None] & mask[:, None]


def apply_rotary_halves(x: Array, angles: Array) -> Array:
    """Turns channel i with channel i + D/2 of ``x [B, L, H, D]`` by ``angles [.., L, D/2]``."""
    real, imag = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    turned = jnp.concatenate([real * cos - imag * sin, imag * cos + real * sin], axis=-1)
    return turned.astype(x.dtype)


def attend(q: Array, k: Array, v: Array, mask: Array | None, *, scale: float,
           cap: float | None = None) -> Array:
    """``softmax(cap tanh(scale q k' / cap)) v`` of the keys in sight, softmax in fp32.

    Args:
      q: ``[B, L, H, D]``.
      k: ``[B, L, K, D]``, K a divisor of H: head h uses h // (H/K); v is like k.
      v: see k.
      mask: bool ``[B or 1, L, L]``. A query that sees nothing, which only padding does, gets the
        mean of all values: finite, and nothing may depend on it. None if all keys are seen.
      scale: what scores are multiplied by.
      cap: bound of the scores, approached smoothly; None for no bound.

    Returns:
      ``[B, L, H, D]`` in q's dtype.
    """
    grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
    scores = scale * jnp.einsum(
        'blkgd,bmkd->bkglm', grouped, k, preferred_element_type=jnp.float32)
    if cap is not None:
        scores = cap * jnp.tanh(scores / cap)
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    return jnp.einsum('bkglm,bmkd->blkgd', weights, v).reshape(q.shape)


def linear(cfg: Any, din: int, dout: int, rngs: nnx.Rngs, *, bias: bool = False) -> Linear:
    """A matrix of an encoder whose config has `dtype`."""
    return Linear(din, dout, use_bias=bias, dtype=jnp.dtype(cfg.dtype),
                  param_dtype=jnp.float32, rngs=rngs)


def embedding(cfg: Any, rows: int, rngs: nnx.Rngs) -> nnx.Embed:
    """A table of `rows` vectors of an encoder whose config has `hidden_size` and `dtype`."""
    return nnx.Embed(rows, cfg.hidden_size, dtype=jnp.dtype(cfg.dtype),
                     param_dtype=jnp.float32, rngs=rngs)


class CausalAttention(nnx.Module):
    """Grouped-query self-attention, rotated; with `qk_norm`, of RMS-normed queries and keys."""

    def __init__(self, cfg: CausalConfig, rngs: nnx.Rngs, *, scale: float,
                 cap: float | None = None, qk_norm: bool = False):
        q_dim, kv_dim = (n * cfg.head_dim for n in (
            cfg.num_attention_heads, cfg.num_key_value_heads))
        self.to_q = linear(cfg, cfg.hidden_size, q_dim, rngs)
        self.to_k = linear(cfg, cfg.hidden_size, kv_dim, rngs)
        self.to_v = linear(cfg, cfg.hidden_size, kv_dim, rngs)
        self.to_out = linear(cfg, q_dim, cfg.hidden_size, rngs)
        if qk_norm:
            norm = lambda: RMSNorm(cfg.head_dim, eps=cfg.rms_norm_eps, dtype=jnp.dtype(cfg.dtype))
            self.norm_q, self.norm_k = norm(), norm()
        self.head_dim, self.scale, self.cap, self.qk_norm = cfg.head_dim, scale, cap, qk_norm

    def __call__(self, x: Array, mask: Array, angles: Array) -> Array:
        q, k, v = (y.reshape(*y.shape[:-1], -1, self.head_dim)
                   for y in (self.to_q(x), self.to_k(x), self.to_v(x)))
        if self.qk_norm:
            q, k = self.norm_q(q), self.norm_k(k)
        q, k = apply_rotary_halves(q, angles), apply_rotary_halves(k, angles)
        out = attend(q, k, v, mask, scale=self.scale, cap=self.cap)
        return self.to_out(out.reshape(*x.shape[:-1], -1))


class GatedFeedForward(nnx.Module):
    """``linear_2(activation(linear_1 x) * linear_3 x)``; the activation is taken in fp32."""

    def __init__(self, cfg: CausalConfig, rngs: nnx.Rngs, activation: Callable[[Array], Array]):
        self.linear_1 = linear(cfg, cfg.hidden_size, cfg.intermediate_size, rngs)
        self.linear_2 = linear(cfg, cfg.intermediate_size, cfg.hidden_size, rngs)
        self.linear_3 = linear(cfg, cfg.hidden_size, cfg.intermediate_size, rngs)
        self.activation = activation

    def __call__(self, x: Array) -> Array:
        gate = self.activation(self.linear_1(x).astype(jnp.float32)).astype(x.dtype)
        return self.linear_2(gate * self.linear_3(x))


def positions(cfg: CausalConfig, length: int) -> Array:
    """Rotary angles ``[1, L, head_dim / 2]``: a token's position is its place, padding or not.

    So transformers counts where it is given no position ids. Where padding stands on the left,
    all real tokens move together, and rotated scores know differences only.
    """
    return rotary_angles(jnp.arange(length)[None, :, None], (cfg.head_dim,), cfg.rope_theta)


def run_layers(layers: nnx.Module, carry: Any, *args: Any, rules: Any, mesh: Mesh | None,
               dtype: str) -> Any:
    """Scans a stack of frozen layers, each with its kernels gathered; see `gather_kernels`."""
    use = lambda params: gather_kernels(params, rules, mesh, jnp.dtype(dtype))
    return scan_layers(layers, carry, *args, use=use)


def look_up(table: nnx.Embed, ids: Array, mesh: Mesh | None) -> Array:
    """Token vectors ``[B, L, D]`` of ``ids [B, L]``, the batch split over the mesh.

    The table is split over its width by `fsdp`, which splits the batch too: a device looks up its
    part of each vector for all rows of its `data` group, then they trade parts. Left to itself
    the compiler does so for all rows of the batch.
    """
    return rows_stay(rows_stay(table(ids), mesh, P('data', None, 'fsdp')), mesh)
