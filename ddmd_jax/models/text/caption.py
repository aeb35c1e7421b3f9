"""A small bidirectional caption encoder: token ids in, token states out.

The text side of the embedded default, trained together with its teacher and frozen in
distillation. Large teachers bring their own encoders; what they share is the output:
states ``[B, L, D]`` and a mask of which are real.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from ddmd_jax.models.layers import Linear, RMSNorm, scan_layers, stack_layers

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class CaptionEncoderConfig:
    vocab_size: int = 64
    max_length: int = 16
    dim: int = 128
    num_layers: int = 2
    num_heads: int = 4


class CaptionLayer(nnx.Module):
    """Pre-normed attention and a two-layer GELU network."""

    def __init__(self, cfg: CaptionEncoderConfig, rngs: nnx.Rngs):
        linear = lambda din, dout: Linear(din, dout, fold=True, use_bias=False, rngs=rngs)
        self.norm_attn = RMSNorm(cfg.dim, eps=1e-5, dtype=jnp.float32)
        self.norm_ffn = RMSNorm(cfg.dim, eps=1e-5, dtype=jnp.float32)
        self.to_qkv, self.to_out = linear(cfg.dim, 3 * cfg.dim), linear(cfg.dim, cfg.dim)
        self.linear_1, self.linear_2 = linear(cfg.dim, 4 * cfg.dim), linear(4 * cfg.dim, cfg.dim)
        self.num_heads = cfg.num_heads

    def __call__(self, x: Array, mask: Array) -> Array:
        heads = lambda y: y.reshape(*y.shape[:-1], self.num_heads, -1)
        q, k, v = (heads(y) for y in jnp.split(self.to_qkv(self.norm_attn(x)), 3, axis=-1))
        attn = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None, :])
        x = x + self.to_out(attn.reshape(x.shape))
        return x + self.linear_2(jax.nn.gelu(self.linear_1(self.norm_ffn(x))))


class CaptionEncoder(nnx.Module):
    """``(ids [B, L] int32, mask [B, L] bool) -> states [B, L, dim]`` fp32."""

    def __init__(self, cfg: CaptionEncoderConfig, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.5)
        self.token = nnx.Embed(cfg.vocab_size, cfg.dim, embedding_init=init, rngs=rngs)
        self.position = nnx.Param(
            0.1 * jax.random.normal(rngs(), (cfg.max_length, cfg.dim), jnp.float32))
        self.layers = stack_layers(lambda r: CaptionLayer(cfg, r), cfg.num_layers, rngs)
        self.norm = RMSNorm(cfg.dim, eps=1e-5, dtype=jnp.float32)

    def __call__(self, ids: Array, mask: Array) -> Array:
        x = self.token(ids) + self.position[...][None, :ids.shape[1]]
        return self.norm(scan_layers(self.layers, x, mask))
