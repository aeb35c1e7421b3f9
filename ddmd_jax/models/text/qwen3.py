"""Qwen3 (transformers: `Qwen3Model`), the text encoder of Z-Image.

A plain pre-normed decoder; of its own it has normed queries and keys.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from ddmd_jax.models.layers import RMSNorm, stack_layers
from ddmd_jax.models.text import causal
from ddmd_jax.models.text.causal import CausalAttention, CausalConfig, GatedFeedForward

Array = jax.Array

RULES = causal.RULES


@dataclasses.dataclass(frozen=True)
class Qwen3Config(CausalConfig):
    """Defaults are Qwen3-4B's, as Z-Image has it."""

    vocab_size: int = 151936
    hidden_size: int = 2560
    intermediate_size: int = 9728
    num_hidden_layers: int = 36
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    rope_theta: float = 1e6


class Qwen3Layer(nnx.Module):
    """Pre-normed attention and SwiGLU."""

    def __init__(self, cfg: Qwen3Config, rngs: nnx.Rngs):
        norm = lambda: RMSNorm(cfg.hidden_size, eps=cfg.rms_norm_eps, dtype=jnp.dtype(cfg.dtype))
        self.attn = CausalAttention(cfg, rngs, scale=cfg.head_dim**-0.5, qk_norm=True)
        self.feed_forward = GatedFeedForward(cfg, rngs, jax.nn.silu)
        self.norm_attn, self.norm_ffn = norm(), norm()

    def __call__(self, x: Array, mask: Array, angles: Array) -> Array:
        x = x + self.attn(self.norm_attn(x), mask, angles)
        return x + self.feed_forward(self.norm_ffn(x))


class Qwen3(nnx.Module):
    """``(ids [B, L] int32, mask [B, L] bool) -> states [B, L, D]``, as `Gemma2`'s."""

    def __init__(self, cfg: Qwen3Config, rngs: nnx.Rngs, mesh: Mesh | None = None):
        self.cfg, self.mesh = cfg, mesh
        self.token = causal.embedding(cfg, cfg.vocab_size, rngs)
        self.layers = stack_layers(lambda r: Qwen3Layer(cfg, r), cfg.depth, rngs)
        if not cfg.penultimate:
            self.norm = RMSNorm(
                cfg.hidden_size, eps=cfg.rms_norm_eps, dtype=jnp.dtype(cfg.dtype))

    def __call__(self, ids: Array, mask: Array) -> Array:
        cfg, length = self.cfg, ids.shape[1]
        x = causal.run_layers(
            self.layers, causal.look_up(self.token, ids, self.mesh),
            causal.causal_mask(mask, length), causal.positions(cfg, length),
            rules=RULES, mesh=self.mesh, dtype=cfg.dtype)
        return x if cfg.penultimate else self.norm(x)
