"""What a distillation run asks of its prompts, and prompts that were encoded beforehand.

Encoded by `prepare embed` they are a folder (`embeddings.py`). Encoded elsewhere they are one
safetensors file:

    embeds    [N, L, D]  token states, padded to L (float32, float16 or bfloat16)
    lengths   [N]        int32, true number of tokens of each
    null      [L0, D]    token states of the null prompt, L0 <= L
    metadata  {"prompts": JSON list of the N prompts} (may be absent)

Rows are read when a batch asks for them; the file may be far larger than memory.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ddmd_jax.data import DataFileError, embeddings

FLOATS = ('F32', 'F16', 'BF16')
CURE = 'see docs/teachers.md for how to write one'
Cond = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The prompts of a run, as conditioning or as the tokens that an encoder makes it of.

    `rows` are the indices of one epoch. `lookup(rows, length)` gives what a batch is made of,
    arrays ``[B, length, ...]``, or of full length where `length` is None: a `Cond`, or tokens
    that `encode`, a jitted program, makes one of. `cond(rows)` is that of any rows, at full
    length and in the host's memory. `null` is the null prompt's `Cond`, one row of
    full length. `lengths` are the tokens of every row, where they are known. `caption(row)` is
    for pictures, `identity` names the data.
    """

    rows: np.ndarray
    lookup: Callable[[np.ndarray, int | None], dict[str, Any]]
    cond: Callable[[np.ndarray], Cond]
    null: Cond
    caption: Callable[[int], str]
    identity: str
    lengths: np.ndarray | None = None
    encode: Callable[[Any], Cond] | None = None


def encoded(rows: np.ndarray, lookup: Callable[[np.ndarray, int | None], Cond],
            **fields: Any) -> Prompts:
    """`Prompts` whose `lookup` gives a `Cond` as it is."""
    return Prompts(rows, lookup, lambda rows: lookup(rows, None), **fields)


def null_like(null: Any, cond: Any) -> Any:
    """The null prompt's row at every row of `cond`, cut to its number of tokens.

    What is cut is padding: no batch has fewer tokens than the null prompt (`check_buckets`).
    """
    rows = next(iter(cond.values())).shape[0]
    one = lambda n, c: jnp.broadcast_to(
        n if n.ndim < 2 or n.shape[1] == c.shape[1] else n[:, :c.shape[1]], (rows, *c.shape[1:]))
    return {name: one(null[name], c) for name, c in cond.items()}


def check_buckets(buckets: Sequence[int], prompts: Prompts) -> None:
    """Raises `DataFileError` unless every prompt, and the null prompt, fits its bucket."""
    if not buckets:
        return
    longest, null = int(prompts.lengths.max()), int(np.asarray(prompts.null['mask']).sum())
    if longest > buckets[-1]:
        raise DataFileError(f'data.lengths {tuple(buckets)} end below the longest prompt, of '
                            f'{longest} tokens; raise the last to at least that')
    if null > buckets[0]:
        raise DataFileError(f'data.lengths {tuple(buckets)} begin below the null prompt, of {null} '
                            'tokens, which stands beside every batch; raise the first')


def open_embeddings(path: str, width: int) -> Prompts:
    """Prompts encoded beforehand: a folder of `prepare embed`, or a file of the format above.

    Raises:
      DataFileError: missing, damaged, or of another width.
    """
    if not Path(path).is_file() and Path(path).suffix != '.safetensors':
        return from_folder(path, width)
    return from_file(path, width)


def from_folder(path: str, width: int) -> Prompts:
    """Prompts of the folder of embeddings at `path`, whose D must be `width`.

    Raises:
      DataFileError: missing, half written, damaged, or of another width.
    """
    stored = embeddings.Embeddings(Path(path))
    if stored.card['width'] != width:
        raise DataFileError(f'{path} holds embeddings {stored.card["width"]} wide, the teacher '
                            f'takes {width}; encode the prompts with its own text encoder')
    full = stored.card['length']
    lookup = lambda rows, length=None: embeddings.padded(
        stored.__getitems__(rows), length or full)
    return encoded(np.arange(len(stored)), lookup, null=embeddings.padded([stored.null], full),
                   caption=stored.prompt, identity=stored.card['identity'],
                   lengths=stored.lengths)


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

    def lookup(rows: np.ndarray, cut: int | None = None) -> Cond:
        return {'embeds': np.concatenate([embeds[int(i):int(i) + 1, :cut] for i in rows]),
                'mask': places[None, :cut] < lengths[rows][:, None]}

    padded = np.pad(null, ((0, length - len(null)), (0, 0)))[None]
    return encoded(
        np.arange(count), lookup, null={'embeds': padded, 'mask': places[None] < len(null)},
        caption=lambda row: captions[row] if row < len(captions) else f'prompt {row}',
        identity=_identity(file, lengths), lengths=lengths)


def _identity(file: Any, lengths: np.ndarray) -> str:
    """Of the lengths and a few rows: the whole of a large file is not read for a name."""
    digest = hashlib.sha256(lengths.tobytes() + file.get_tensor('null').tobytes())
    embeds = file.get_slice('embeds')
    for row in np.linspace(0, len(lengths) - 1, 8, dtype=int):
        digest.update(embeds[int(row):int(row) + 1].tobytes())
    return digest.hexdigest()[:16]


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
