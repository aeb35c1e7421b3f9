"""What a distillation run asks of its prompts, and prompts that were encoded beforehand.

A file of encoded prompts is one safetensors file:

    embeds    [N, L, D]  token states, padded to L (float32, float16 or bfloat16)
    lengths   [N]        int32, true number of tokens of each
    null      [L0, D]    token states of the null prompt, L0 <= L
    metadata  {"prompts": JSON list of the N prompts} (may be absent)

Rows are read when a batch asks for them; the file may be far larger than memory.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ddmd_jax.data import DataFileError

FLOATS = ('F32', 'F16', 'BF16')
CURE = 'see docs/teachers.md for how to write one'
Cond = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Prompts:
    """`rows` are the indices of one epoch, `lookup(rows)` their conditioning ``[B, ...]``.

    `null` is the null prompt's, one row of the same length; `caption(row)` is for pictures.
    """

    rows: np.ndarray
    lookup: Callable[[np.ndarray], Cond]
    null: Cond
    caption: Callable[[int], str]


def from_file(path: str, width: int) -> Prompts:
    """Prompts of the file of embeddings at `path`, whose D must be `width`.

    Raises:
      DataFileError: missing, damaged, or not in the format above.
    """
    import safetensors

    if not Path(path).is_file():
        raise DataFileError(f'no file of embeddings at {path}; set config.data.path, {CURE}')
    try:
        file = safetensors.safe_open(path, framework='numpy')
        count, length = _check(path, file, width)
        lengths, null = file.get_tensor('lengths'), file.get_tensor('null')
        captions = json.loads((file.metadata() or {}).get('prompts', '[]'))
        if not isinstance(captions, list):
            raise ValueError('its prompts are not a list')
    except (safetensors.SafetensorError, ValueError, OSError) as e:
        raise DataFileError(f'embeddings damaged: {path} ({e}); write the file again') from e
    embeds, places = file.get_slice('embeds'), np.arange(length)

    def lookup(rows: np.ndarray) -> Cond:
        return {'embeds': np.concatenate([embeds[int(i):int(i) + 1] for i in rows]),
                'mask': places[None] < lengths[rows][:, None]}

    padded = np.pad(null, ((0, length - len(null)), (0, 0)))[None]
    return Prompts(np.arange(count), lookup,
                   {'embeds': padded, 'mask': places[None] < len(null)},
                   lambda row: captions[row] if row < len(captions) else f'prompt {row}')


def _check(path: str, file: Any, width: int) -> tuple[int, int]:
    """(N, L) of a file that is as it should be."""
    missing = {'embeds', 'lengths', 'null'} - set(file.keys())
    if missing:
        raise DataFileError(f'{path} lacks {", ".join(sorted(missing))}: not a file of embeddings; '
                            f'{CURE}')
    parts = {name: file.get_slice(name) for name in ('embeds', 'lengths', 'null')}
    shapes = {name: tuple(part.get_shape()) for name, part in parts.items()}
    embeds, null = shapes['embeds'], shapes['null']
    kinds = [parts[name].get_dtype() for name in ('embeds', 'null')]
    if len(embeds) != 3 or len(null) != 2 or not set(kinds) <= set(FLOATS):
        raise DataFileError(f'{path}: embeds must be floats [N, L, D] and null [L0, D], found '
                            f'{embeds} {kinds[0]} and {null} {kinds[1]}; {CURE}')
    count, length, found = embeds
    if shapes['lengths'] != (count,) or not 0 < null[0] <= length:
        raise DataFileError(f'{path}: {count} prompts of {length} tokens do not go with lengths '
                            f'{shapes["lengths"]} and null {null}; {CURE}')
    if found != width or null[1] != width:
        raise DataFileError(f'{path} holds embeddings {found} wide (null: {null[1]}), the teacher '
                            f'takes {width}; encode the prompts with its own text encoder')
    lengths = file.get_tensor('lengths')
    if not count or not np.issubdtype(lengths.dtype, np.integer):
        raise DataFileError(f'{path} must hold at least one prompt and whole lengths, found '
                            f'{count} and {lengths.dtype}; {CURE}')
    if lengths.min() < 1 or lengths.max() > length:
        raise DataFileError(f'{path}: lengths must lie in 1..{length}, found {lengths.min()}..'
                            f'{lengths.max()}; write the file again')
    return count, length
