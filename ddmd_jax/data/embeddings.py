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

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ddmd_jax.data import DataFileError, records
from ddmd_jax.util import buckets, errors, files, shape
from ddmd_jax.util.places import Place
from ddmd_jax.util.text import first_line

FORMAT = 'ddmd_jax embeddings 1'
CURE = 'write it again with `python -m ddmd_jax.prepare embed`'
FLOAT = ml_dtypes.bfloat16
RECORDS = 'embeddings.array_record'
LIKE = {'files': [str], 'count': shape.count, 'width': shape.count, 'length': shape.count,
        'identity': str}
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
            self.card = shape.load(files.patiently((folder / 'card.json').read_bytes),
                                   {'format': str})
            if self.card['format'] != FORMAT:
                raise ValueError(f'its format is {self.card["format"]!r}')
            if fault := shape.fault(self.card, LIKE):
                raise ValueError(f'card.json: {fault}')
            if any(Path(f).name != f for f in self.card['files']):
                raise ValueError('card.json: it names files that lie elsewhere')
        except (OSError, ValueError) as e:
            errors.raise_environment(e)
            raise DataFileError(f'{folder} is no folder of embeddings ({first_line(e)}); '
                                f'{CURE}') from e
        self._damaged = damaged = f'embeddings damaged: {folder}'
        try:
            self.lengths = _arrays((folder / 'index.safetensors').read_bytes())['lengths']
            self.null = _arrays((folder / 'null.safetensors').read_bytes())
            self._check()
        except Exception as e:  # safetensors' errors have no common ancestor
            errors.raise_environment(e, folder)
            raise DataFileError(f'{damaged} ({first_line(e)}); {CURE}') from e
        self._records = records.Records([folder / f for f in self.card['files']],
                                        len(self.lengths), damaged, CURE)
        if len(self.lengths) != self.card['count']:
            raise DataFileError(f'{damaged} ({len(self.lengths)} prompts, and its card says '
                                f'{self.card["count"]}); {CURE}')

    def _check(self) -> None:
        """Raises `ValueError` where card, lengths and null prompt contradict one another."""
        length = self.card['length']
        if self.lengths.dtype != np.int32 or self.lengths.ndim != 1:
            raise ValueError(f'lengths are {self.lengths.dtype} {self.lengths.shape}, and are to '
                             'be int32 (prompts,)')
        if len(self.lengths) and not 0 < self.lengths.min() <= self.lengths.max() <= length:
            raise ValueError(f'lengths from {self.lengths.min()} to {self.lengths.max()} do not '
                             f'lie in 1..{length}')
        self._check_arrays('null', self.null)

    def _check_arrays(self, name: Any, part: Arrays, length: int | None = None) -> None:
        """Raises `ValueError` unless a prompt's arrays are as card, lengths and null prompt say."""
        of = part['embeds'].shape
        if len(of) != 2 or of[1] != self.card['width'] or not 0 < of[0] <= self.card['length'] or (
                length is not None and of[0] != length):
            raise ValueError(f'embeds of {name} are {of}, and are to be '
                             f'({length or "tokens"}, {self.card["width"]})')
        for key in {*part, *self.null} - {'prompt'}:
            mine, one = part[key], self.null[key]
            width = lambda x: x.shape[max(x.ndim - 1, 0):]
            if (mine.dtype, mine.ndim, width(mine)) != (one.dtype, one.ndim, width(one)):
                raise ValueError(f'{key} of {name} is not like the null prompt\'s')

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitems__(self, rows: Sequence[int]) -> list[Arrays]:
        """Arrays of these prompts, at their true lengths.

        Raises:
          DataFileError: a record cannot be read.
        """
        found = []
        for row, record in zip(rows, self._records.read(rows)):
            try:
                one = _arrays(record)
                self._check_arrays(f'prompt {row}', one, int(self.lengths[row]))
            except Exception as e:  # safetensors' errors have no common ancestor; it is in memory
                raise DataFileError(f'{self._damaged} ({first_line(e)}); {CURE}') from e
            found.append({k: x for k, x in one.items() if k != 'prompt'})
        return found

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
