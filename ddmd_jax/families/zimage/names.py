"""Published names of Z-Image's parameters (diffusers), by our paths."""

import re

from ddmd_jax.weights.names import Entry

# 2-1 is the patch's edge and its frames: the one patch that the published network has.
_TOP = {
    'x_embedder': 'all_x_embedder.2-1',
    'time_1': 't_embedder.mlp.0',
    'time_2': 't_embedder.mlp.2',
    'caption_norm': 'cap_embedder.0',
    'caption_proj': 'cap_embedder.1',
    'out_scale': 'all_final_layer.2-1.adaLN_modulation.1',
    'out_proj': 'all_final_layer.2-1.linear',
}
_BLOCK = {
    'attn/to_q': 'attention.to_q',
    'attn/to_k': 'attention.to_k',
    'attn/to_v': 'attention.to_v',
    'attn/to_out': 'attention.to_out.0',
    'attn/norm_q': 'attention.norm_q',
    'attn/norm_k': 'attention.norm_k',
    'feed_forward/linear_1': 'feed_forward.w1',
    'feed_forward/linear_2': 'feed_forward.w2',
    'feed_forward/linear_3': 'feed_forward.w3',
    'norm1': 'attention_norm1',
    'norm2': 'attention_norm2',
    'ffn_norm1': 'ffn_norm1',
    'ffn_norm2': 'ffn_norm2',
    'modulation': 'adaLN_modulation.0',
}
STACKS = ('context_refiner', 'noise_refiner', 'layers')
PADS = ('x_pad_token', 'cap_pad_token')


def of_others(name: str) -> str:
    """The published module, dots as underscores, of one named as in Z-Image's own repository."""
    return re.sub(r'_attention_out$', '_attention_to_out_0', name)


def transformer(path: str) -> Entry:
    """Of `ZImageTransformer2DModel`, e.g. ``layers/attn/to_q/kernel``.

    Raises:
      KeyError: `path` is not a parameter of `ZImage`.
    """
    if path in PADS:
        return Entry(path)
    module, _, leaf = path.rpartition('/')
    layout = 'linear' if leaf == 'kernel' else 'same'
    leaf = 'weight' if leaf == 'kernel' else leaf
    stack, _, inner = module.partition('/')
    if stack not in STACKS:
        return Entry(f'{_TOP[module]}.{leaf}', layout)
    return Entry(f'{stack}.{{}}.{_BLOCK[inner]}.{leaf}', layout)
