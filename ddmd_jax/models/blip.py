"""BLIP as ImageReward has it: a ViT whose tokens a BERT attends to, layer by layer.

(Salesforce BLIP, `vit.py` and `med.py`; transformers: `BlipVisionModel`, `BlipTextModel`.) The
prompt's first state, having looked at the picture in every layer, is what a head then scores.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ddmd_jax.models.layers import scan_layers, stack_layers
from ddmd_jax.models.text import causal
from ddmd_jax.models.text.clip import ACTIVATIONS, ClipImageConfig, ClipLayer
from ddmd_jax.weights.names import Entry

Array = jax.Array

# Of ImageReward's networks: ViT-L/16, and BERT-base with two tokens more.
IMAGE = ClipImageConfig(image_size=224, patch_size=16, hidden_size=1024, intermediate_size=4096,
                        num_hidden_layers=24, num_attention_heads=16, hidden_act='gelu',
                        layer_norm_eps=1e-6, projection_dim=0)


@dataclasses.dataclass(frozen=True)
class BlipConfig:
    """`image` is the ViT; the others are transformers' names of the text network's fields."""

    image: ClipImageConfig = IMAGE
    vocab_size: int = 30524
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 512
    layer_norm_eps: float = 1e-12
    dtype: str = 'float32'  # of activations and matrix products


class Picture(nnx.Module):
    """``pixels [B, S, S, 3] -> tokens [B, 1 + patches, D]``, normed; CLIP's layers."""

    def __init__(self, cfg: ClipImageConfig, rngs: nnx.Rngs):
        self.cfg = cfg
        self.patch = nnx.Conv(3, cfg.hidden_size, (cfg.patch_size,) * 2, cfg.patch_size,
                              padding='VALID', dtype=jnp.dtype(cfg.dtype), rngs=rngs)
        self.class_token = nnx.Param(
            0.02 * jax.random.normal(rngs.params(), (cfg.hidden_size,), jnp.float32))
        self.position = causal.embedding(cfg, cfg.tokens, rngs)
        self.layers = stack_layers(lambda r: ClipLayer(cfg, r), cfg.num_hidden_layers, rngs)
        self.norm = _layer_norm(cfg.hidden_size, cfg, rngs)

    def __call__(self, pixels: Array) -> Array:
        patches = self.patch(pixels).reshape(len(pixels), -1, self.cfg.hidden_size)
        first = jnp.broadcast_to(self.class_token[...].astype(patches.dtype),
                                 (len(pixels), 1, self.cfg.hidden_size))
        x = jnp.concatenate([first, patches], axis=1) + self.position(jnp.arange(self.cfg.tokens))
        last, _ = causal.run_layers(
            self.layers, (x, x), None, rules=(), mesh=None, dtype=self.cfg.dtype)
        return self.norm(last)


class Attention(nnx.Module):
    """Attention whose output is added to its input and then normed."""

    def __init__(self, cfg: BlipConfig, width: int, rngs: nnx.Rngs):
        line = lambda din: causal.linear(cfg, din, cfg.hidden_size, rngs, bias=True)
        self.to_q, self.to_k, self.to_v = line(cfg.hidden_size), line(width), line(width)
        self.to_out = line(cfg.hidden_size)
        self.norm = _layer_norm(cfg.hidden_size, cfg, rngs)
        self.heads = cfg.num_attention_heads

    def __call__(self, x: Array, seen: Array, mask: Array | None) -> Array:
        q, k, v = (y.reshape(*y.shape[:-1], self.heads, -1)
                   for y in (self.to_q(x), self.to_k(seen), self.to_v(seen)))
        found = causal.attend(q, k, v, mask, scale=q.shape[-1]**-0.5)
        return self.norm(x + self.to_out(found.reshape(x.shape)))


class TextLayer(nnx.Module):
    """Looks at the prompt, then at the picture, then a network of two matrices; normed last."""

    def __init__(self, cfg: BlipConfig, rngs: nnx.Rngs):
        self.own = Attention(cfg, cfg.hidden_size, rngs)
        self.cross = Attention(cfg, cfg.image.hidden_size, rngs)
        self.linear_1 = causal.linear(
            cfg, cfg.hidden_size, cfg.intermediate_size, rngs, bias=True)
        self.linear_2 = causal.linear(
            cfg, cfg.intermediate_size, cfg.hidden_size, rngs, bias=True)
        self.norm = _layer_norm(cfg.hidden_size, cfg, rngs)

    def __call__(self, x: Array, picture: Array, mask: Array) -> Array:
        x = self.cross(self.own(x, x, mask), picture, None)
        hidden = ACTIVATIONS['gelu'](self.linear_1(x).astype(jnp.float32)).astype(x.dtype)
        return self.norm(x + self.linear_2(hidden))


class Blip(nnx.Module):
    """``(pixels [B, S, S, 3] fp32, ids [B, L] int32, mask [B, L] bool) -> [B, hidden_size]``.

    The last state of the prompt's first token; `mask` is True for tokens that are no padding.
    """

    def __init__(self, cfg: BlipConfig, rngs: nnx.Rngs):
        self.picture = Picture(cfg.image, rngs)
        self.token = causal.embedding(cfg, cfg.vocab_size, rngs)
        self.position = causal.embedding(cfg, cfg.max_position_embeddings, rngs)
        self.norm_in = _layer_norm(cfg.hidden_size, cfg, rngs)
        self.layers = stack_layers(lambda r: TextLayer(cfg, r), cfg.num_hidden_layers, rngs)

    def __call__(self, pixels: Array, ids: Array, mask: Array) -> Array:
        x = self.norm_in(self.token(ids) + self.position(jnp.arange(ids.shape[1])))
        return scan_layers(self.layers, x, self.picture(pixels), mask[:, None, :])[:, 0]


def _layer_norm(width: int, cfg: BlipConfig | ClipImageConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(width, epsilon=cfg.layer_norm_eps, use_fast_variance=False,
                         dtype=jnp.dtype(cfg.dtype), param_dtype=jnp.float32, rngs=rngs)


# --- Names, as in ImageReward.pt ---

_PICTURE, _TEXT = 'blip.visual_encoder.', 'blip.text_encoder.'
_TOP = {
    'picture/patch': _PICTURE + 'patch_embed.proj', 'picture/position': _PICTURE + 'pos_embed',
    'picture/norm': _PICTURE + 'norm', 'token': _TEXT + 'embeddings.word_embeddings',
    'position': _TEXT + 'embeddings.position_embeddings',
    'norm_in': _TEXT + 'embeddings.LayerNorm',
}
_PICTURE_LAYER = {
    'to_q': 'attn.q', 'to_k': 'attn.k', 'to_v': 'attn.v', 'to_out': 'attn.proj',
    'linear_1': 'mlp.fc1', 'linear_2': 'mlp.fc2', 'norm1': 'norm1', 'norm2': 'norm2',
}
_ATTENTION = {'to_q': 'self.query', 'to_k': 'self.key', 'to_v': 'self.value',
              'to_out': 'output.dense', 'norm': 'output.LayerNorm'}
_TEXT_LAYER = {
    **{f'own/{ours}': f'attention.{theirs}' for ours, theirs in _ATTENTION.items()},
    **{f'cross/{ours}': f'crossattention.{theirs}' for ours, theirs in _ATTENTION.items()},
    'linear_1': 'intermediate.dense', 'linear_2': 'output.dense', 'norm': 'output.LayerNorm',
}


def entry(path: str) -> Entry:
    """Published counterpart of `Blip`'s parameter at `path`, as `separate` names them.

    Raises:
      KeyError: `path` is not a parameter of `Blip`.
    """
    if path == 'picture/class_token':
        return Entry(_PICTURE + 'cls_token')
    if path == 'picture/position/embedding':
        return Entry(_TOP['picture/position'])
    module, leaf = path.rsplit('/', 1)
    layout = 'same' if leaf != 'kernel' else 'conv' if module == 'picture/patch' else 'linear'
    leaf = 'bias' if leaf == 'bias' else 'weight'
    if module in _TOP:
        return Entry(f'{_TOP[module]}.{leaf}', layout)
    if module.startswith('picture/layers/'):
        name = _PICTURE_LAYER[module.removeprefix('picture/layers/')]
        return Entry(f'{_PICTURE}blocks.{{}}.{name}.{leaf}', layout)
    name = _TEXT_LAYER[module.removeprefix('layers/')]
    return Entry(f'{_TEXT}encoder.layer.{{}}.{name}.{leaf}', layout)


def separate(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The networks' own tensors of ImageReward.pt, which holds some of BLIP's other parts too.

    Query, key and value of the ViT are one matrix there, and its class token and places have
    leading axes of 1. Nothing is copied.
    """
    found: dict[str, np.ndarray] = {}
    for name, x in state.items():
        if not name.startswith((_PICTURE, _TEXT)) or name.endswith('position_ids'):
            continue
        match = re.fullmatch(r'(.*\.attn\.)qkv(\.weight|\.bias)', name)
        if match is not None:
            for part, rows in zip('qkv', np.split(x, 3)):
                found[f'{match[1]}{part}{match[2]}'] = rows
        elif name == _PICTURE + 'cls_token':
            found[name] = x.reshape(-1)
        elif name == _PICTURE + 'pos_embed':
            found[name] = x.reshape(x.shape[-2:])
        else:
            found[name] = x
    return found
