"""CLIP: the text tower as SDXL has it, and both towers as scorers of pictures have them.

Text (transformers: `CLIPTextModel`, `CLIPTextModelWithProjection`): both of SDXL's encoders are
one architecture, CLIP-L (quick GELU, no projection) and OpenCLIP's bigG (GELU, projected). Neither
has a mask of padding: places behind the end token are read by the U-Net like any other, and the
mask is causal alone. Pictures (transformers: `CLIPVisionModelWithProjection`; open_clip:
`VisionTransformer`): a class token and patches through the same layers, without a mask.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from ddmd_jax.models.layers import rows_stay, stack_layers
from ddmd_jax.models.text import causal

Array = jax.Array

RULES = (
    (r'(to_q|to_k|to_v|linear_1|projection)/kernel$', ('fsdp', 'tensor')),
    (r'(to_out|linear_2)/kernel$', ('tensor', 'fsdp')),
    (r'token/embedding$', (None, 'fsdp')),
    (r'(bias|scale|position/embedding|patch/kernel|class_token)$', ()),
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


@dataclasses.dataclass(frozen=True)
class ClipImageConfig:
    """The tower of pictures; fields are transformers' names, and defaults are L/14's at 224."""

    image_size: int = 224
    patch_size: int = 14
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    hidden_act: str = 'quick_gelu'
    layer_norm_eps: float = 1e-5
    projection_dim: int = 768
    dtype: str = 'float32'  # of activations and matrix products

    @property
    def tokens(self) -> int:
        """Places of a picture: its class token and its patches."""
        return 1 + (self.image_size // self.patch_size)**2

    def __post_init__(self):
        if self.hidden_size % self.num_attention_heads:
            raise ValueError('hidden_size must be a multiple of num_attention_heads')
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f'hidden_act {self.hidden_act} is not one of {", ".join(ACTIVATIONS)}')
        if self.image_size % self.patch_size:
            raise ValueError('image_size must be a multiple of patch_size')


@dataclasses.dataclass(frozen=True)
class TwoTowers:
    """An architecture: a text tower with a projection, and a tower of pictures beside it."""

    text: ClipConfig
    image: ClipImageConfig


def _two_towers(width: int, layers: int, heads: int, text: ClipConfig, *, mlp: int | None = None,
                size: int = 224) -> TwoTowers:
    return TwoTowers(text, ClipImageConfig(
        size, 14, width, mlp or 4 * width, layers, heads, text.hidden_act,
        projection_dim=text.projection_dim or 0))


_L = ClipConfig(projection_dim=768, penultimate=False)
_WIDE = ClipConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
                   num_attention_heads=16, hidden_act='gelu', projection_dim=1024,
                   penultimate=False)
# By the names of open_clip's model_configs, whose head widths and mlp ratios are written out here
# (4.3637 * 1408 and 4.9231 * 1664, rounded down). OpenAI's weights want quick GELU, LAION's GELU.
ARCHITECTURES = {
    'ViT-L-14-quickgelu': _two_towers(1024, 24, 16, _L),
    'ViT-L-14-336-quickgelu': _two_towers(1024, 24, 16, _L, size=336),
    'ViT-L-14': _two_towers(1024, 24, 16, dataclasses.replace(_L, hidden_act='gelu')),
    'ViT-H-14': _two_towers(1280, 32, 16, _WIDE),
    'ViT-g-14': _two_towers(1408, 40, 16, _WIDE, mlp=6144),
    'ViT-bigG-14': _two_towers(1664, 48, 16, BIG_G, mlp=8192),
}


class ClipLayer(nnx.Module):
    """Pre-normed attention and network. The scan carries the layer's own input along."""

    def __init__(self, cfg: ClipConfig | ClipImageConfig, rngs: nnx.Rngs):
        square = lambda: causal.linear(cfg, cfg.hidden_size, cfg.hidden_size, rngs, bias=True)
        self.to_q, self.to_k, self.to_v, self.to_out = square(), square(), square(), square()
        self.linear_1 = causal.linear(
            cfg, cfg.hidden_size, cfg.intermediate_size, rngs, bias=True)
        self.linear_2 = causal.linear(
            cfg, cfg.intermediate_size, cfg.hidden_size, rngs, bias=True)
        self.norm1, self.norm2 = _layer_norm(cfg, rngs), _layer_norm(cfg, rngs)
        self.heads, self.activation = cfg.num_attention_heads, ACTIVATIONS[cfg.hidden_act]

    def __call__(self, carry: tuple[Array, Array], mask: Array | None) -> tuple[Array, Array]:
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


class ClipImage(nnx.Module):
    """``pixels [B, S, S, 3] fp32 -> [B, projection_dim]`` in the config's dtype.

    Pixels are those of the published preprocessing: of [0, 1], less CLIP's mean, over its
    deviation. The class token's last state is normed and projected (``image_embeds``).
    """

    def __init__(self, cfg: ClipImageConfig, rngs: nnx.Rngs, mesh: Mesh | None = None):
        self.cfg, self.mesh = cfg, mesh
        self.patch = nnx.Conv(
            3, cfg.hidden_size, (cfg.patch_size,) * 2, cfg.patch_size, padding='VALID',
            use_bias=False, dtype=jnp.dtype(cfg.dtype), param_dtype=jnp.float32, rngs=rngs)
        self.class_token = nnx.Param(
            jax.random.normal(rngs.params(), (cfg.hidden_size,), jnp.float32)
            * cfg.hidden_size**-0.5)
        self.position = causal.embedding(cfg, cfg.tokens, rngs)
        self.norm_in, self.norm = _layer_norm(cfg, rngs), _layer_norm(cfg, rngs)
        self.layers = stack_layers(lambda r: ClipLayer(cfg, r), cfg.num_hidden_layers, rngs)
        self.projection = causal.linear(cfg, cfg.hidden_size, cfg.projection_dim, rngs)

    def __call__(self, pixels: Array) -> Array:
        cfg = self.cfg
        if pixels.shape[1:] != (cfg.image_size, cfg.image_size, 3):
            raise ValueError(f'pictures are {pixels.shape[1:]}, but this tower takes '
                             f'{(cfg.image_size, cfg.image_size, 3)}')
        patches = self.patch(pixels).reshape(len(pixels), -1, cfg.hidden_size)
        first = jnp.broadcast_to(self.class_token[...].astype(patches.dtype),
                                 (len(pixels), 1, cfg.hidden_size))
        x = jnp.concatenate([first, patches], axis=1) + self.position(jnp.arange(cfg.tokens))
        x = rows_stay(self.norm_in(x), self.mesh)
        last, _ = causal.run_layers(
            self.layers, (x, x), None, rules=RULES, mesh=self.mesh, dtype=cfg.dtype)
        return self.projection(self.norm(last[:, 0]))


class Clip(nnx.Module):
    """Both towers, and the logarithm of the factor of their cosines' softmax."""

    def __init__(self, cfg: TwoTowers, rngs: nnx.Rngs, mesh: Mesh | None = None):
        self.text, self.image = ClipText(cfg.text, rngs, mesh), ClipImage(cfg.image, rngs, mesh)
        self.logit_scale = nnx.Param(jnp.log(jnp.float32(1 / 0.07)))

    def embed_text(self, ids: Array) -> Array:
        """``ids [B, L] int32 -> [B, D]`` fp32, of length 1."""
        pooled = self.text(ids)[1]
        assert pooled is not None  # `penultimate` is for SDXL
        return unit(pooled)

    def embed_image(self, pixels: Array) -> Array:
        """``pixels [B, S, S, 3] fp32 -> [B, D]`` fp32, of length 1; see `ClipImage`."""
        return unit(self.image(pixels))


def unit(x: Array) -> Array:
    """``x [.., D]`` in fp32, divided by its length."""
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def end_of_text(ids: Array, eos_token_id: int) -> Array:
    """Place of the first end token of each row of ``ids [B, L]``, ``[B]``; 0 if it has none.

    Configs older than transformers' #24773, SDXL's among them, name 2 as the end token, which it
    never was. They mean the largest id of the row, where their vocabularies have it.
    """
    return jnp.argmax(ids if eos_token_id == LEGACY_EOS else ids == eos_token_id, axis=1)


def _layer_norm(cfg: ClipConfig | ClipImageConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    # Mean and variance in fp32 and one after the other: their difference of squares is rounded
    # away where the mean is large, as it is in some channels of CLIP.
    return nnx.LayerNorm(cfg.hidden_size, epsilon=cfg.layer_norm_eps, use_fast_variance=False,
                         dtype=jnp.dtype(cfg.dtype), param_dtype=jnp.float32, rngs=rngs)
