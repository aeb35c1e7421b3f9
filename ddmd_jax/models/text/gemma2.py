"""Gemma-2 (transformers: `Gemma2Model`), the text encoder of Lumina-Image-2.0.

Of its own are norms that multiply by one plus their weight, before *and* behind
attention and network; scores that are capped; every second layer sees a window of tokens only;
token vectors multiplied by the square root of their width.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from ddmd_jax.models.layers import stack_layers
from ddmd_jax.models.text import causal
from ddmd_jax.models.text.causal import CausalAttention, CausalConfig, GatedFeedForward

Array = jax.Array

RULES = causal.RULES
SLIDING, FULL = 'sliding_attention', 'full_attention'


@dataclasses.dataclass(frozen=True)
class Gemma2Config(CausalConfig):
    """Defaults are Gemma-2-2B's, as Lumina-Image-2.0 has it."""

    vocab_size: int = 256000
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    query_pre_attn_scalar: float = 256.0
    attn_logit_softcapping: float | None = 50.0
    sliding_window: int = 4096
    layer_types: tuple[str, ...] | None = None  # None: the first slides, the second not, and so on

    @property
    def slides(self) -> tuple[bool, ...]:
        """Of each layer that is run, whether it sees a window only."""
        kinds = self.layer_types or (SLIDING, FULL) * self.num_hidden_layers
        return tuple(kind == SLIDING for kind in kinds[:self.depth])

    def __post_init__(self):
        super().__post_init__()
        kinds = self.layer_types
        if kinds is not None and (len(kinds) != self.num_hidden_layers
                                  or set(kinds) - {SLIDING, FULL}):
            raise ValueError(f'layer_types must be {self.num_hidden_layers} of {SLIDING} and '
                             f'{FULL}')


class OffsetRMSNorm(nnx.Module):
    """RMS norm in fp32 whose scale is ``1 + weight``."""

    def __init__(self, cfg: Gemma2Config):
        self.weight = nnx.Param(jnp.zeros((cfg.hidden_size,), jnp.float32))
        self.eps, self.dtype = cfg.rms_norm_eps, jnp.dtype(cfg.dtype)

    def __call__(self, x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return (x32 * (1 + self.weight[...])).astype(self.dtype)


class Gemma2Layer(nnx.Module):
    """Sandwich-normed layer. The scan carries its number along, which says what it may see."""

    def __init__(self, cfg: Gemma2Config, rngs: nnx.Rngs):
        self.attn = CausalAttention(cfg, rngs, scale=cfg.query_pre_attn_scalar**-0.5,
                                    cap=cfg.attn_logit_softcapping)
        self.feed_forward = GatedFeedForward(cfg, rngs, jax.nn.gelu)  # by tanh, as published
        self.norm1, self.norm2 = OffsetRMSNorm(cfg), OffsetRMSNorm(cfg)
        self.ffn_norm1, self.ffn_norm2 = OffsetRMSNorm(cfg), OffsetRMSNorm(cfg)
        self.slides = cfg.slides

    def __call__(self, carry: tuple[Array, Array], everything: Array, window: Array,
                 angles: Array) -> tuple[Array, Array]:
        x, number = carry
        mask = jnp.where(jnp.asarray(self.slides)[number], window, everything)
        x = x + self.norm2(self.attn(self.norm1(x), mask, angles))
        return x + self.ffn_norm2(self.feed_forward(self.ffn_norm1(x))), number + 1


class Gemma2(nnx.Module):
    """``(ids [B, L] int32, mask [B, L] bool) -> states [B, L, D]`` in the config's dtype.

    The states are transformers' ``hidden_states[-2]``, or, if not `penultimate`, its
    ``last_hidden_state``. Those of padding are finite and mean nothing. `mesh` is what batch
    and gathered kernels are laid out over; None is for one device.
    """

    def __init__(self, cfg: Gemma2Config, rngs: nnx.Rngs, mesh: Mesh | None = None):
        self.cfg, self.mesh = cfg, mesh
        self.token = causal.embedding(cfg, cfg.vocab_size, rngs)
        self.layers = stack_layers(lambda r: Gemma2Layer(cfg, r), cfg.depth, rngs)
        if not cfg.penultimate:
            self.norm = OffsetRMSNorm(cfg)

    def __call__(self, ids: Array, mask: Array) -> Array:
        cfg, length = self.cfg, ids.shape[1]
        x = causal.look_up(self.token, ids, self.mesh)
        # Rounded to the type of the products, as transformers rounds it: 55.4 is 55.5 in bf16.
        x = x * jnp.asarray(cfg.hidden_size**0.5, x.dtype)
        x, _ = causal.run_layers(
            self.layers, (x, jnp.int32(0)), causal.causal_mask(mask, length),
            causal.causal_mask(mask, length, cfg.sliding_window), causal.positions(cfg, length),
            rules=RULES, mesh=self.mesh, dtype=cfg.dtype)
        return x if cfg.penultimate else self.norm(x)
