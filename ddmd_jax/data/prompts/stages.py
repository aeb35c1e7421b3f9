"""Reads inputs one after the other: normalised, filtered, kept for a rerun of the command.

A finished input is two files of the partial folder: ``KEY.txt`` (tokens, tab, prompt on each line)
and, written last, ``KEY.json`` (counts). KEY is a hash of the input's content and of every setting
that matters here.
"""

import dataclasses
import hashlib
import itertools
import json
import mmap
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddmd_jax.data import DataFileError
from ddmd_jax.data.prompts import files as prompt_files, tokens as prompt_tokens
from ddmd_jax.data.prompts.text import digest, in_validation, normalise
from ddmd_jax.util.files import write_json

VERSION = 1  # of normalisation, filters and stage files; another one reads the inputs again
DROPPED = {'empty': 'empty', 'too_short': 'shorter than --min_chars',
           'too_long': 'longer than --max_chars', 'too_many_tokens': 'over --max_tokens'}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Inputs and filters of a set of prompts; every field is a flag of the command."""

    input: tuple[str, ...]
    field: str = 'prompt'
    min_chars: int = 1
    max_chars: int = 2000
    tokenizer: str = ''
    max_tokens: int | None = None
    near_threshold: float = 0.85
    validation: float = 0.01
    teacher: str = 'lumina'


def _stage_key(source: prompt_files.Source, settings: Settings, tokenizer: str) -> str:
    parts = [VERSION, source.checksum, settings.field, settings.min_chars, settings.max_chars,
             settings.max_tokens, tokenizer]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def stage(source: prompt_files.Source, settings: Settings,
          counter: prompt_tokens.Counter | None, folder: Path, bar) -> tuple[Path, dict[str, Any]]:
    """The file of an input's prompts and what was counted; nothing is read if it is there.

    Raises:
      DataFileError: the input is not what it should be, or holds no prompt at all.
    """
    key = _stage_key(source, settings, counter.identity if counter else '')
    lines, record = folder / f'{key}.txt', folder / f'{key}.json'
    if record.is_file():
        bar.update(source.size)
        return lines, json.loads(record.read_text()) | {'input': source.name}
    try:
        counts = _write(source, settings, counter, lines, bar)
    except BaseException:
        lines.unlink(missing_ok=True)
        raise
    found = {'input': source.name, 'bytes': source.size, 'sha256': source.checksum, **counts}
    write_json(record, found, sync=True)
    return lines, found


def _write(source: prompt_files.Source, settings: Settings,
           counter: prompt_tokens.Counter | None, path: Path, bar) -> dict[str, int]:
    counts = Counter(read=0, kept=0, **dict.fromkeys(DROPPED, 0))
    rows = source.read(settings.field, bar.update)
    with path.open('w', encoding='utf-8', newline='\n') as file:
        done = -1
        while counts['read'] > done:
            done = counts['read']
            prompts = list(_good(itertools.islice(rows, prompt_files.ROWS), settings, counts))
            tokens = counter.count(prompts) if counter and prompts else [0] * len(prompts)
            for prompt, number in zip(prompts, tokens):
                if settings.max_tokens is not None and number > settings.max_tokens:
                    counts['too_many_tokens'] += 1
                    continue
                counts['kept'] += 1
                file.write(f'{number}\t{prompt}\n')
        file.flush()
        os.fsync(file.fileno())  # its record must not outlive it
    if counts['read'] == counts['empty']:
        raise DataFileError(f'{source.name} ' + (f'holds only empty prompts ({counts["read"]})'
                                                 if counts['read'] else 'holds no prompts'))
    return dict(counts)


def _good(texts: Iterator[str], settings: Settings, counts: Counter) -> Iterator[str]:
    """The normalised prompts of those `texts` that are neither empty, too short nor too long."""
    for prompt in map(normalise, texts):
        counts['read'] += 1
        if not prompt:
            counts['empty'] += 1
        elif len(prompt) < settings.min_chars:
            counts['too_short'] += 1
        elif len(prompt) > settings.max_chars:
            counts['too_long'] += 1
        else:
            yield prompt


class Lines(Sequence):
    """Prompts of stage files by row, read from disk when asked for.

    `ids` are the first eight bytes of each digest ``[N]`` uint64, `validation` ``[N]`` bool.
    """

    def __init__(self, paths: Sequence[Path], share: float):
        self._maps = [_mapped(p) for p in dict.fromkeys(paths)]
        found = [_index(m, share) for m in self._maps]
        self._file = np.repeat(np.arange(len(found)), [len(f) for f in found])
        whole = np.concatenate(found)
        self._at, self.ids, self.validation = (whole[name] for name in whole.dtype.names or ())

    def __len__(self) -> int:
        return len(self._at)

    def __getitem__(self, row: int) -> str:  # type: ignore[override]  # no slices
        return self.row(row)[1]

    def row(self, row: int) -> tuple[int, str]:
        """(tokens, prompt)."""
        file, at = self._maps[self._file[row]], int(self._at[row])
        tokens, _, prompt = file[at:file.find(b'\n', at)].partition(b'\t')
        return int(tokens), prompt.decode()

    def take(self, rows: np.ndarray) -> None:
        """Keeps these rows, in this order."""
        self._file, self._at = self._file[rows], self._at[rows]
        self.ids, self.validation = self.ids[rows], self.validation[rows]


def _mapped(path: Path) -> bytes | mmap.mmap:
    with path.open('rb') as file:
        if not path.stat().st_size:  # every prompt was dropped; nothing cannot be mapped
            return b''
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _index(lines: bytes | mmap.mmap, share: float) -> np.ndarray:
    """(at, id, validation) of every line of a stage file."""
    def rows() -> Iterator[tuple[int, int, bool]]:
        at = 0
        while (end := lines.find(b'\n', at)) >= 0:
            found = digest(lines[lines.find(b'\t', at) + 1:end])
            yield at, int.from_bytes(found[:8], 'big'), in_validation(found, share)
            at = end + 1

    return np.fromiter(rows(), [('at', np.int64), ('id', np.uint64), ('validation', bool)])
