"""Encoded prompts on disk, to train from without a text encoder: written once, read at random.

A folder holds

    card.json                 what it is: format, counts, encoder, prompts, files; read first
    index.safetensors         lengths [N] int32, tokens of each prompt
    null.safetensors          the null prompt's arrays, once
    embeddings.array_record   a record a prompt: safetensors of its arrays at their true length
                              and its text as bytes

Arrays that have a row a token (`embeds [L, D]`) are cut to the prompt's own tokens, others
(`pooled [D]`) are as they are; floats are bfloat16, whole numbers int32.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ddmd_jax.data import DataFileError, records
from ddmd_jax.util import buckets, errors, files
from ddmd_jax.util.places import Place
from ddmd_jax.util.text import first_line

FORMAT = 'ddmd_jax embeddings 1'
CURE = 'write it again with `python -m ddmd_jax.prepare embed`'
FLOAT = ml_dtypes.bfloat16
RECORDS = 'embeddings.array_record'
Arrays = dict[str, np.ndarray]


def trimmed(cond: Arrays) -> list[Arrays]:
    """Rows of a `Cond` one by one, each without its padding, in the types that are stored."""
    mask = cond['mask']
    def one(row: int) -> Arrays:
        real = lambda x: x[row][mask[row]] if x.ndim > 2 else x[row]
        kind = lambda x: np.int32 if np.issubdtype(x.dtype, np.integer) else FLOAT
        return {k: np.asarray(real(x), kind(x)) for k, x in cond.items() if k != 'mask'}
    return [one(row) for row in range(len(mask))]


def padded(parts: Sequence[Arrays], length: int) -> Arrays:
    """Inverse of `trimmed`: a `Cond` of so many tokens, padded right with zeros."""
    lengths = np.asarray([len(part['embeds']) for part in parts])
    found: Arrays = {'mask': np.arange(length)[None] < lengths[:, None]}
    for name, first in parts[0].items():
        if first.ndim == 1:
            found[name] = np.stack([part[name] for part in parts])
            continue
        found[name] = np.zeros((len(parts), length, first.shape[1]), first.dtype)
        for row, part in enumerate(parts):
            found[name][row, :len(part[name])] = part[name]
    return found


def write(out: Place, settings: Mapping[str, Any], null: Arrays,
          rows: Iterable[tuple[str, Arrays]]) -> None:
    """Writes the folder `out` of (prompt, its arrays), whole or not at all.

    `settings` hold at least 'width', 'length' and 'identity'.

    Raises:
      DataFileError: an array is not finite.
      OSError: it cannot be written.
    """
    import safetensors.numpy

    lengths: list[int] = []
    _check_finite('the null prompt', null)

    def encoded() -> Iterator[bytes]:
        for text, part in rows:
            _check_finite(f'{text!r}', part)
            lengths.append(len(part['embeds']))
            raw = np.frombuffer(text.encode(), np.uint8)
            yield safetensors.numpy.save(part | {'prompt': raw})

    with files.replacing(out, sync=True) as scratch:
        scratch.mkdir(parents=True)
        records.write(scratch / RECORDS, encoded())
        safetensors.numpy.save_file({'lengths': np.asarray(lengths, np.int32)},
                                    scratch / 'index.safetensors')
        safetensors.numpy.save_file(null, scratch / 'null.safetensors')
        files.write_json(scratch / 'card.json', {
            'format': FORMAT, 'count': len(lengths), **settings, 'files': [RECORDS]})


class Embeddings:
    """A finished folder, read by row; one in a bucket is copied to this machine's disk first.

    Attributes: `card`, `lengths [N]` int32, `null` (arrays of the null prompt at its true
    length).

    Raises:
      DataFileError: missing, damaged, or something else.
      PlaceError: a bucket cannot be read.
    """

    def __init__(self, folder: Place):
        folder = buckets.local(folder)
        if not folder.is_dir():
            raise DataFileError(f'no folder of embeddings at {folder}; set config.data.path, or '
                                f'{CURE}')
        try:
            self.card = json.loads((folder / 'card.json').read_text())
            if self.card['format'] != FORMAT or any(Path(f).name != f for f in self.card['files']):
                raise ValueError(f'its format is {self.card["format"]!r}')
        except (OSError, ValueError, KeyError, TypeError) as e:
            errors.raise_environment(e)
            raise DataFileError(f'{folder} is no folder of embeddings ({first_line(e)}); '
                                f'{CURE}') from e
        damaged = f'embeddings damaged: {folder}'
        try:
            self.lengths = _arrays((folder / 'index.safetensors').read_bytes())['lengths']
            self.null = _arrays((folder / 'null.safetensors').read_bytes())
        except Exception as e:  # safetensors' errors have no common ancestor
            errors.raise_environment(e, folder)
            raise DataFileError(f'{damaged} ({first_line(e)}); {CURE}') from e
        self._records = records.Records([folder / f for f in self.card['files']],
                                        len(self.lengths), damaged, CURE)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitems__(self, rows: Sequence[int]) -> list[Arrays]:
        """Arrays of these prompts, at their true lengths.

        Raises:
          DataFileError: a record cannot be read.
        """
        found = [_arrays(record) for record in self._records.read(rows)]
        return [{k: x for k, x in one.items() if k != 'prompt'} for one in found]

    def prompt(self, row: int) -> str:
        return _arrays(self._records.read([row])[0])['prompt'].tobytes().decode()


def _check_finite(prompt: str, arrays: Arrays) -> None:
    bad = [name for name, x in arrays.items() if not np.isfinite(x.astype(np.float32)).all()]
    if bad:
        raise DataFileError(f'the text encoder makes {bad[0]} that are not finite of {prompt}; its '
                            'weights or their dtype are at fault, and nothing was written')


def _arrays(raw: bytes) -> Arrays:
    """A safetensors blob; the library's own reader for numpy does not know bfloat16."""
    import safetensors

    kinds = {'BF16': FLOAT, 'I32': np.int32, 'U8': np.uint8}
    return {name: np.frombuffer(x['data'], kinds[x['dtype']]).reshape(x['shape'])
            for name, x in safetensors.deserialize(raw)}
