"""Folders as transformers writes them: how they differ from those of diffusers.

``config.json`` names classes as ``architectures``, files are called ``model*.safetensors``, and a
name may carry the prefix of the base model, which depends on the class it was saved from (and,
for CLIP, on the version). Our name maps have no prefix: it is taken off as the headers are read.
Checkpoints are read as ever: `diffusers.check` against the *whole* published architecture, then
`diffusers.import_tree` of the part of it that is run.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

from ddmd_jax.util import shape
from ddmd_jax.weights import diffusers
from ddmd_jax.weights.diffusers import Checkpoint, Tensor
from ddmd_jax.weights.flat import WeightsError
from ddmd_jax.weights.names import Entry

STEM = 'model'

# Of decoders: logits' matrix; frequencies that early versions saved.
DECODER_UNUSED = (r'lm_head\.weight', r'(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq')
_TOP = {'token/embedding': 'embed_tokens.weight', 'norm/weight': 'norm.weight'}
_LAYER = {
    'attn/to_q': 'self_attn.q_proj', 'attn/to_k': 'self_attn.k_proj',
    'attn/to_v': 'self_attn.v_proj', 'attn/to_out': 'self_attn.o_proj',
    'feed_forward/linear_1': 'mlp.gate_proj', 'feed_forward/linear_2': 'mlp.down_proj',
    'feed_forward/linear_3': 'mlp.up_proj',
}


@dataclasses.dataclass(frozen=True)
class Published:
    """How an architecture appears: `classes` it may be saved as, and the `prefix` of names.

    `unused` are regexes of whole names, without prefix, of tensors that the architecture may come
    with and an encoder has no use for. They are passed over; any other unknown one is an error.
    """

    classes: tuple[str, ...]
    prefix: str
    unused: tuple[str, ...]


def decoder_entry(path: str, norms: Mapping[str, str]) -> Entry:
    """Published counterpart of a decoder's parameter; `norms` are a family's own, by our names.

    Raises:
      KeyError: `path` is not a parameter of the decoder.
    """
    if path in _TOP:
        return Entry(_TOP[path])
    module, leaf = path.removeprefix('layers/').rsplit('/', 1)
    theirs = _LAYER[module] if leaf == 'kernel' else norms[module]
    return Entry(f'layers.{{}}.{theirs}.weight', 'linear' if leaf == 'kernel' else 'same')


def _names(value: object) -> str:
    """Of `shape`: names, or nothing."""
    return '' if value is None else shape.fault(value, [str])


def open_folder(folder: Path, published: Published, variant: str = '') -> Checkpoint:
    """Opens a component whose ``config.json`` names one of the classes; reads headers only.

    Raises:
      WeightsError: another class, a missing or truncated file, pickles only, tensors that share a
        name but for the prefix, or are of a type that is not trained on (fp8, int8).
    """
    config = diffusers.read_json(folder / 'config.json', {'architectures?': _names})
    found = ', '.join(config.get('architectures') or ['something without a class name'])
    if found not in published.classes:
        raise WeightsError(f'{folder} is {found}, not {published.classes[0]}; give the folder of a '
                           'teacher of this family')
    kept: dict[str, Tensor] = {}  # by name without prefix, without those that are unused
    for tensor in diffusers.headers(folder, STEM, variant).values():
        name = tensor.name.removeprefix(published.prefix)
        if any(re.fullmatch(pattern, name) for pattern in published.unused):
            continue
        if name in kept:
            raise WeightsError(f'{folder} holds both {tensor.name} and {kept[name].name}; fetch '
                               'the folder again')
        kept[name] = tensor
    diffusers.check_types(folder, kept)
    return Checkpoint(folder, config, kept)
