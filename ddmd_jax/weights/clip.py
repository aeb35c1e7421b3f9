"""CLIP's parameters as transformers names them, and open_clip's files brought to those names."""

import re
from collections.abc import Mapping

import numpy as np

from ddmd_jax.weights.flat import WeightsError
from ddmd_jax.weights.names import Entry

_TEXT = {
    'token': 'embeddings.token_embedding', 'position': 'embeddings.position_embedding',
    'norm': 'final_layer_norm', 'projection': 'text_projection',
}
_IMAGE = {
    'patch': 'embeddings.patch_embedding', 'position': 'embeddings.position_embedding',
    'norm_in': 'pre_layrnorm',  # so spelt
    'norm': 'post_layernorm', 'projection': 'visual_projection',
}
_LAYER = {
    'to_q': 'self_attn.q_proj', 'to_k': 'self_attn.k_proj', 'to_v': 'self_attn.v_proj',
    'to_out': 'self_attn.out_proj', 'linear_1': 'mlp.fc1', 'linear_2': 'mlp.fc2',
    'norm1': 'layer_norm1', 'norm2': 'layer_norm2',
}

# Buffers that some versions saved: places 0 to 76, the causal mask, and what OpenAI's archives
# say of themselves.
UNUSED = (r'.*\.position_ids', r'attn_mask', r'input_resolution|context_length|vocab_size')


def text_entry(path: str) -> Entry:
    """Published counterpart of `ClipText`'s parameter at `path`, e.g. ``layers/to_q/kernel``.

    Raises:
      KeyError: `path` is not a parameter of `ClipText`.
    """
    return _entry(path, _TEXT)


def entry(path: str) -> Entry:
    """Published counterpart (transformers: `CLIPModel`) of `Clip`'s parameter at `path`.

    Raises:
      KeyError: `path` is not a parameter of `Clip`.
    """
    if path == 'logit_scale':
        return Entry(path)
    if path == 'image/class_token':
        return Entry('vision_model.embeddings.class_embedding')
    tower, _, rest = path.partition('/')
    found = _entry(rest, {'text': _TEXT, 'image': _IMAGE}[tower])
    if rest.startswith('projection/'):  # of the whole model, not of a tower
        return found
    if rest == 'patch/kernel':
        found = Entry(found.name, 'conv')
    return Entry({'text': 'text_model.', 'image': 'vision_model.'}[tower] + found.name,
                 found.layout)


def _entry(path: str, top: Mapping[str, str]) -> Entry:
    module, leaf = path.rsplit('/', 1)
    layout = 'linear' if leaf == 'kernel' else 'same'
    leaf = 'bias' if leaf == 'bias' else 'weight'
    stack, _, inner = module.partition('/')
    if stack != 'layers':
        return Entry(f'{top[module]}.{leaf}', layout)
    return Entry(f'encoder.layers.{{}}.{_LAYER[inner]}.{leaf}', layout)


# --- open_clip ---

_BLOCK = {
    'ln_1': 'layer_norm1', 'ln_2': 'layer_norm2', 'attn.out_proj': 'self_attn.out_proj',
    'mlp.c_fc': 'mlp.fc1', 'mlp.c_proj': 'mlp.fc2',
}
_SINGLE = {  # name -> (transformers' name, whether it is a matrix that open_clip keeps as we do)
    'token_embedding.weight': ('text_model.embeddings.token_embedding.weight', False),
    'positional_embedding': ('text_model.embeddings.position_embedding.weight', False),
    'ln_final.weight': ('text_model.final_layer_norm.weight', False),
    'ln_final.bias': ('text_model.final_layer_norm.bias', False),
    'text_projection': ('text_projection.weight', True),
    'logit_scale': ('logit_scale', False),
    'visual.conv1.weight': ('vision_model.embeddings.patch_embedding.weight', False),
    'visual.class_embedding': ('vision_model.embeddings.class_embedding', False),
    'visual.positional_embedding': ('vision_model.embeddings.position_embedding.weight', False),
    'visual.ln_pre.weight': ('vision_model.pre_layrnorm.weight', False),
    'visual.ln_pre.bias': ('vision_model.pre_layrnorm.bias', False),
    'visual.ln_post.weight': ('vision_model.post_layernorm.weight', False),
    'visual.ln_post.bias': ('vision_model.post_layernorm.bias', False),
    'visual.proj': ('visual_projection.weight', True),
}


def to_transformers(state: Mapping[str, np.ndarray], where: str) -> dict[str, np.ndarray]:
    """A CLIP's tensors under transformers' names, whichever of the two layouts they come in.

    open_clip (and OpenAI's own files) keep query, key and value as one matrix ``attn.in_proj``,
    and both projections transposed. Nothing is copied.

    Raises:
      WeightsError: neither layout; a tensor that open_clip's CLIP does not have.
    """
    state = {name.removeprefix('module.'): x for name, x in state.items()}
    state = {name: x for name, x in state.items()
             if not any(re.fullmatch(pattern, name) for pattern in UNUSED)}
    if 'visual_projection.weight' in state:
        return state
    if 'visual.proj' not in state:
        raise WeightsError(f'{where} holds no CLIP of open_clip or transformers (no visual.proj, '
                           'no visual_projection.weight); give the file of the whole model')
    found: dict[str, np.ndarray] = {}
    for name, x in state.items():
        if name in _SINGLE:
            theirs, turned = _SINGLE[name]
            found[theirs] = x.T if turned else x
            continue
        match = re.fullmatch(r'(visual\.)?transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)',
                             name)
        if match is None or match[3] not in {*_BLOCK, 'attn.in_proj'}:
            raise WeightsError(f'{where} holds {name}, which no CLIP of this kind has; is it of '
                               'another architecture?')
        tower, layer, module, leaf = match.groups()
        prefix = f'{"vision" if tower else "text"}_model.encoder.layers.{layer}.'
        if module == 'attn.in_proj':
            for part, rows in zip('qkv', np.split(x, 3)):
                found[f'{prefix}self_attn.{part}_proj.{leaf}'] = rows
        else:
            found[f'{prefix}{_BLOCK[module]}.{leaf}'] = x
    return found
