"""CLIP's text tower (transformers: `CLIPTextModel`, `CLIPTextModelWithProjection`), as SDXL has it.

Both of SDXL's encoders are one architecture: CLIP-L (quick GELU, no projection) and OpenCLIP's
bigG (GELU, projected). Neither has a mask of padding: places behind the end token are read by
the U-Net like any other, and the mask is causal alone.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from ddmd_jax.models.layers import stack_layers
from ddmd_jax.models.text import causal

Array = jax.Array

RULES = (
    (r'(to_q|to_k|to_v|linear_1|projection)/kernel$', ('fsdp', 'tensor')),
    (r'(to_out|linear_2)/kernel$', ('tensor', 'fsdp')),
    (r'token/embedding$', (None, 'fsdp')),
    (r'(bias|scale|position/embedding)$', ()),
)
ACTIVATIONS = {
    'quick_gelu': lambda x: x * jax.nn.sigmoid(1.702 * x),
    'gelu': lambda x: jax.nn.gelu(x, approximate=False),
}
LEGACY_EOS = 2


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Fields up to `projection_dim` are transformers' names; defaults are CLIP-L's, as in SDXL."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = 'quick_gelu'
    layer_norm_eps: float = 1e-5
    eos_token_id: int = LEGACY_EOS
    projection_dim: int | None = None  # None: without projection
    dtype: str = 'float32'  # of activations and matrix products
    # Only the states before the last layer, which then is neither held nor run; else all layers,
    # for the pooled output.
    penultimate: bool = True

    @property
    def depth(self) -> int:
        """Layers that are held and run."""
        return self.num_hidden_layers - self.penultimate

    def __post_init__(self):
        if self.hidden_size % self.num_attention_heads:
            raise ValueError('hidden_size must be a multiple of num_attention_heads')
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f'hidden_act {self.hidden_act} is not one of {", ".join(ACTIVATIONS)}')
        if self.depth < 1:
            raise ValueError(f'num_hidden_layers {self.num_hidden_layers} leave none to run')


BIG_G = ClipConfig(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32,
                   num_attention_heads=20, hidden_act='gelu', projection_dim=1280,
                   penultimate=False)


class ClipLayer(nnx.Module):
    """Pre-normed attention and network. The scan carries the layer's own input along."""

    def __init__(self, cfg: ClipConfig, rngs: nnx.Rngs):
        square = lambda: causal.linear(cfg, cfg.hidden_size, cfg.hidden_size, rngs, bias=True)
        self.to_q, self.to_k, self.to_v, self.to_out = square(), square(), square(), square()
        self.linear_1 = causal.linear(
            cfg, cfg.hidden_size, cfg.intermediate_size, rngs, bias=True)
        self.linear_2 = causal.linear(
            cfg, cfg.intermediate_size, cfg.hidden_size, rngs, bias=True)
        self.norm1, self.norm2 = _layer_norm(cfg, rngs), _layer_norm(cfg, rngs)
        self.heads, self.activation = cfg.num_attention_heads, ACTIVATIONS[cfg.hidden_act]

    def __call__(self, carry: tuple[Array, Array], mask: Array) -> tuple[Array, Array]:
        x = carry[0]
        y = self.norm1(x)
        q, k, v = (z.reshape(*z.shape[:-1], self.heads, -1)
                   for z in (self.to_q(y), self.to_k(y), self.to_v(y)))
        out = causal.attend(q, k, v, mask, scale=q.shape[-1]**-0.5)
        y = x + self.to_out(out.reshape(x.shape))
        hidden = self.linear_1(self.norm2(y)).astype(jnp.float32)
        return y + self.linear_2(self.activation(hidden).astype(x.dtype)), x


class ClipText(nnx.Module):
    """``ids [B, L] int32 -> (states [B, L, D], pooled [B, D or projection_dim] or None)``.

    `states` are transformers' ``hidden_states[-2]``. `pooled`, None where `penultimate`, is the
    normed last state at the end token, projected if there is a projection (``text_embeds``, else
    ``pooler_output``). Both are in the config's dtype. `mesh` is what batch and gathered kernels
    are laid out over; None is for one device.
    """

    def __init__(self, cfg: ClipConfig, rngs: nnx.Rngs, mesh: Mesh | None = None):
        self.cfg, self.mesh = cfg, mesh
        self.token = causal.embedding(cfg, cfg.vocab_size, rngs)
        self.position = causal.embedding(cfg, cfg.max_position_embeddings, rngs)
        self.layers = stack_layers(lambda r: ClipLayer(cfg, r), cfg.depth, rngs)
        if not cfg.penultimate:
            self.norm = _layer_norm(cfg, rngs)
            if cfg.projection_dim is not None:
                self.projection = causal.linear(
                    cfg, cfg.hidden_size, cfg.projection_dim, rngs)

    def __call__(self, ids: Array) -> tuple[Array, Array | None]:
        cfg, length = self.cfg, ids.shape[1]
        if length > cfg.max_position_embeddings:
            raise ValueError(f'{length} tokens, but CLIP has {cfg.max_position_embeddings} places')
        x = causal.look_up(self.token, ids, self.mesh) + self.position(jnp.arange(length))
        last, before = causal.run_layers(
            self.layers, (x, x), causal.causal_mask(None, length),
            rules=RULES, mesh=self.mesh, dtype=cfg.dtype)
        return (last, None) if cfg.penultimate else (before, self._pool(last, ids))

    def _pool(self, last: Array, ids: Array) -> Array:
        place = end_of_text(ids, self.cfg.eos_token_id)
        found = self.norm(jnp.take_along_axis(last, place[:, None, None], axis=1)[:, 0])
        return found if self.cfg.projection_dim is None else self.projection(found)


def end_of_text(ids: Array, eos_token_id: int) -> Array:
    """Place of the first end token of each row of ``ids [B, L]``, ``[B]``; 0 if it has none.

    Configs older than transformers' #24773, SDXL's among them, name 2 as the end token, which it
    never was. They mean the largest id of the row, where their vocabularies have it.
    """
    return jnp.argmax(ids if eos_token_id == LEGACY_EOS else ids == eos_token_id, axis=1)


def _layer_norm(cfg: ClipConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    # Mean and variance in fp32 and one after the other: their difference of squares is rounded
    # away where the mean is large, as it is in some channels of CLIP.
    return nnx.LayerNorm(cfg.hidden_size, epsilon=cfg.layer_norm_eps, use_fast_variance=False,
                         dtype=jnp.dtype(cfg.dtype), param_dtype=jnp.float32, rngs=rngs)
