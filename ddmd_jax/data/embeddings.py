"""Encoded prompts on disk, to train from without a text encoder: written once, read at random.

A folder holds

    card.json                 what it is: format, counts, encoder, prompts, files; read first
    index.safetensors         lengths [N] int32, tokens of each prompt
    null.safetensors          the null prompt's arrays, once
    embeddings-*.array_record a record a prompt: safetensors of its arrays at their true length
                              and its text as bytes

Arrays that have a row a token (`embeds [L, D]`) are cut to the prompt's own tokens, others
(`pooled [D]`) are as they are; floats are bfloat16. A folder that is being written is called
``NAME.partial`` and gets its own name when all of it is there.
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ddmd_jax.data import DataFileError, records
from ddmd_jax.util import files
from ddmd_jax.util.text import first_line

FORMAT = 'ddmd_jax embeddings 1'
CURE = 'write it again with `python -m ddmd_jax.prepare embed`'
FLOAT = ml_dtypes.bfloat16
SHARD_BYTES = 256 * 1024**2  # of a file, and of what a host holds while it writes one
Arrays = dict[str, np.ndarray]


def trimmed(cond: Arrays) -> list[Arrays]:
    """Rows of a `Cond` one by one, each without its padding, floats in bfloat16."""
    mask = cond['mask']
    def one(row: int) -> Arrays:
        real = lambda x: x[row][mask[row]] if x.ndim > 2 else x[row]
        return {k: np.asarray(real(x), FLOAT) for k, x in cond.items() if k != 'mask'}
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


@dataclasses.dataclass(frozen=True)
class Job:
    """A folder to be written: `settings` describe it, `lengths` are the tokens of each prompt."""

    out: Path
    settings: Mapping[str, Any]
    lengths: np.ndarray
    row_bytes: int  # of one token

    @property
    def partial(self) -> Path:
        return self.out.with_name(self.out.name + '.partial')

    @property
    def predicted_bytes(self) -> int:
        """Size of the files, without headers and texts."""
        return int(self.lengths.sum()) * self.row_bytes

    def shards(self) -> list[tuple[str, int, int]]:
        """(file, first prompt, one past the last) of each."""
        rows = max(1, SHARD_BYTES * len(self.lengths) // max(1, self.predicted_bytes))
        starts = range(0, len(self.lengths), rows)
        return [(f'embeddings-{i:05d}-of-{len(starts):05d}.array_record', start,
                 min(start + rows, len(self.lengths))) for i, start in enumerate(starts)]

    def begin(self) -> list[tuple[str, int, int]]:
        """The shards still to be written; makes the partial folder, or goes on with this job's.

        Raises:
          DataFileError: `out` exists, or the partial folder is another job's.
        """
        if self.out.exists():
            raise DataFileError(f'{self.out} exists already; choose another --out or delete it')
        begun, mine = self.partial / 'settings.json', json.dumps(dict(self.settings), indent=1)
        if begun.exists() and begun.read_text() != mine:
            raise DataFileError(f'{self.partial} was begun with other prompts or another encoder; '
                                'delete it, or choose another --out')
        self.partial.mkdir(parents=True, exist_ok=True)
        files.write(begun, mine, sync=True)
        return [s for s in self.shards() if not (self.partial / s[0]).exists()]

    def write_shard(self, name: str, texts: Sequence[str], parts: Sequence[Arrays]) -> None:
        """One file, whole or not at all."""
        import safetensors.numpy

        with files.replacing(self.partial / name, sync=True) as scratch:
            records.write(scratch, (
                safetensors.numpy.save(part | {'prompt': np.frombuffer(text.encode(), np.uint8)})
                for text, part in zip(texts, parts, strict=True)))

    def finish(self, null: Arrays) -> None:
        """Index, null prompt and card; then the folder gets its name."""
        import safetensors.numpy

        parts = {'index': {'lengths': self.lengths.astype(np.int32)}, 'null': null}
        for name, arrays in parts.items():
            raw = safetensors.numpy.save(arrays)
            files.write(self.partial / f'{name}.safetensors', raw, sync=True)
        files.write_json(self.partial / 'card.json', {
            'format': FORMAT, 'count': len(self.lengths), **self.settings,
            'files': [name for name, _, _ in self.shards()]}, sync=True)
        (self.partial / 'settings.json').unlink()
        os.replace(self.partial, self.out)


class Embeddings:
    """A finished folder, read by row.

    Attributes: `card`, `lengths [N]` int32, `null` (arrays of the null prompt at its true
    length).

    Raises:
      DataFileError: missing, half written, damaged, or something else.
    """

    def __init__(self, folder: Path):
        if folder.name.endswith('.partial'):
            raise DataFileError(f'{folder} was not finished; run the same `prepare embed` again')
        if not folder.is_dir():
            raise DataFileError(f'no folder of embeddings at {folder}; set config.data.path, or '
                                f'{CURE}')
        try:
            self.card = json.loads((folder / 'card.json').read_text())
            if self.card['format'] != FORMAT or any(Path(f).name != f for f in self.card['files']):
                raise ValueError(f'its format is {self.card["format"]!r}')
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise DataFileError(f'{folder} is no folder of embeddings ({first_line(e)}); '
                                f'{CURE}') from e
        damaged = f'embeddings damaged: {folder}'
        try:
            self.lengths = _arrays((folder / 'index.safetensors').read_bytes())['lengths']
            self.null = _arrays((folder / 'null.safetensors').read_bytes())
        except Exception as e:  # safetensors' errors have no common ancestor
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


def _arrays(raw: bytes) -> Arrays:
    """A safetensors blob; the library's own reader for numpy does not know bfloat16."""
    import safetensors

    kinds = {'BF16': FLOAT, 'I32': np.int32, 'U8': np.uint8}
    return {name: np.frombuffer(x['data'], kinds[x['dtype']]).reshape(x['shape'])
            for name, x in safetensors.deserialize(raw)}
