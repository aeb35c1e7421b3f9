"""Names of CLIP's text tower (transformers: `CLIPTextModel`, `CLIPTextModelWithProjection`)."""

from __future__ import annotations

from ddmd_jax.weights.names import Entry
from ddmd_jax.weights.transformers import Published

UNUSED = (r'embeddings\.position_ids',)  # a buffer, 0 to 76, that early versions saved
PUBLISHED = Published(('CLIPTextModel',), 'text_model.', UNUSED)
PROJECTED = Published(('CLIPTextModelWithProjection',), 'text_model.', UNUSED)
_TOP = {
    'token': 'embeddings.token_embedding', 'position': 'embeddings.position_embedding',
    'norm': 'final_layer_norm', 'projection': 'text_projection',
}
_LAYER = {
    'to_q': 'self_attn.q_proj', 'to_k': 'self_attn.k_proj', 'to_v': 'self_attn.v_proj',
    'to_out': 'self_attn.out_proj', 'linear_1': 'mlp.fc1', 'linear_2': 'mlp.fc2',
    'norm1': 'layer_norm1', 'norm2': 'layer_norm2',
}


def entry(path: str) -> Entry:
    """Published counterpart of our parameter at `path`, e.g. ``layers/to_q/kernel``.

    Raises:
      KeyError: `path` is not a parameter of `ClipText`.
    """
    module, leaf = path.rsplit('/', 1)
    layout = 'linear' if leaf == 'kernel' else 'same'
    leaf = 'bias' if leaf == 'bias' else 'weight'
    stack, _, inner = module.partition('/')
    if stack != 'layers':
        return Entry(f'{_TOP[module]}.{leaf}', layout)
    return Entry(f'encoder.layers.{{}}.{_LAYER[inner]}.{leaf}', layout)
