"""A set of prompts on disk: a TFDS data set of ArrayRecord files with a card beside them."""

import dataclasses
import errno
import functools
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ddmd_jax.data import DataFileError
from ddmd_jax.data.prompts.stages import Lines
from ddmd_jax.util.text import first_line

FORMAT = 'ddmd_jax prompts 1'
NAME, VERSION = 'prompts', '1.0.0'  # as TFDS has them
SPLITS = ('train', 'validation')
PARTIAL = '.partial'  # how the folder of an unfinished set ends
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CARD = 'card.json'
CURE = 'make it again with `python -m ddmd_jax.prepare prompts`'
SHARD, BATCH = 1_000_000, 4096  # rows


class Written(NamedTuple):
    """`identity` is sha256 over the ids in order; how many prompts have n `chars`, `tokens`."""

    identity: str
    splits: dict[str, int]
    chars: Counter[int]
    tokens: Counter[int]


def write(lines: Lines, folder: Path, advance: Callable[[int], object]) -> Written:
    """Writes the prompts of `lines`, in their order, as the splits of a TFDS data set.

    A split without a row is left out: TFDS cannot read one. Raises OSError, disk full included.
    """
    folder.mkdir()
    writer, hasher, done = _writer(folder), hashlib.sha256(), Written('', {}, Counter(), Counter())
    try:
        for split in SPLITS:
            rows = np.flatnonzero(lines.validation == (split == 'validation'))
            hasher.update(f'{split} {len(rows)}\n'.encode())
            done.splits[split] = len(rows)
            if len(rows):
                writer.initialize_splits([split])
            for start in range(0, len(rows), BATCH):
                examples = list(_examples(lines, rows[start:start + BATCH], hasher, done))
                writer.add_examples({split: examples})
                advance(len(examples))
        writer.close_all()
    except RuntimeError as e:  # array_record's, which has no errno
        for code in DISK_FULL:
            if os.strerror(code) in str(e):
                raise OSError(code, os.strerror(code), str(folder)) from e
        raise
    return done._replace(identity=hasher.hexdigest()[:16])


def _examples(lines: Lines, rows: np.ndarray, hasher, done: Written) -> Iterator[dict[str, str]]:
    for row in rows.tolist():
        tokens, prompt = lines.row(row)
        name = f'{int(lines.ids[row]):016x}'
        hasher.update(name.encode())
        done.chars[len(prompt)] += 1
        done.tokens[tokens] += 1
        yield {'prompt': prompt, 'id': name}


def _writer(folder: Path):
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.dataset_info import DatasetIdentity

    text = tfds.features.Text
    identity = DatasetIdentity(name=NAME, version=VERSION, data_dir=str(folder),
                               module_name=__name__)
    info = tfds.core.DatasetInfo(
        builder=identity, features=tfds.features.FeaturesDict({'prompt': text(), 'id': text()}),
        description='Prompts without repetitions; see card.json beside this file.')
    # Rows stand in the order they are given; a `GeneratorBasedBuilder` would hold them all.
    return tfds.core.SequentialWriter(info, SHARD, file_format='array_record')


def is_partial(path: Path) -> bool:
    """Whether `path` is the folder of an unfinished set, or lies in one."""
    return any(part.endswith(PARTIAL) for part in path.absolute().parts)


def read_card(path: Path) -> dict[str, Any]:
    """The card of the finished set of prompts at `path`.

    Raises:
      DataFileError: there is none, it is unfinished, or its card is damaged.
    """
    if is_partial(path):
        raise DataFileError(f'{path} is an unfinished set of prompts; run the command that began '
                            'it again, it goes on where it stopped')
    if not path.is_dir():
        raise DataFileError(f'no set of prompts at {path}; {CURE}')
    if not (path / CARD).is_file():
        raise DataFileError(f'{path} is not a set of prompts (it has no {CARD}); {CURE}')
    try:
        card = json.loads((path / CARD).read_bytes())
        if card['format'] != FORMAT:
            raise DataFileError(f'{path} is {card["format"]!r}, not {FORMAT!r}; {CURE}')
        card['identity'], card['fingerprint'], card['settings'], card['inputs'], card['splits']
    except (ValueError, KeyError, TypeError) as e:
        raise _damaged(path, e) from e
    return card


def _damaged(path: Path, e: Exception) -> DataFileError:
    return DataFileError(f'set of prompts damaged: {path} ({first_line(e)}); {CURE}')


@dataclasses.dataclass(frozen=True)
class PromptSet(Sequence):
    """One split: `prompts[i]` is read from disk when asked for. It may be pickled.

    `identity` is that of the whole set, both splits: 16 hex digits that change with any prompt,
    their order or their split.
    """

    path: Path
    split: str
    identity: str
    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # no slices
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[str]:
        """Several at once, in any order and as often as asked; faster than one by one."""
        return [row['prompt'].decode() for row in self._rows(indices)]

    def __iter__(self) -> Iterator[str]:
        for start in range(0, self.length, BATCH):
            yield from self.__getitems__(range(start, min(start + BATCH, self.length)))

    def _rows(self, indices: Sequence[int]) -> list[dict[str, bytes]]:
        for i in indices:
            if not -self.length <= i < self.length:
                raise IndexError(f'{self.path} has {self.length} {self.split} prompts, no [{i}]')
        try:
            return self._source.__getitems__([int(i) % self.length for i in indices])
        except Exception as e:  # array_record raises bare RuntimeError/ValueError by cause
            raise _damaged(self.path, e) from e

    @functools.cached_property
    def _source(self) -> Any:
        import tensorflow_datasets as tfds

        return tfds.builder_from_directory(self.path).as_data_source(self.split)

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


def open_set(path: str | Path, split: str = 'train') -> PromptSet:
    """The prompts of one `split` of the set at `path`; nothing but its ends is read.

    Raises:
      DataFileError: missing, unfinished, damaged or not a set of prompts; no such split.
    """
    path = Path(path).expanduser()
    card = read_card(path)
    if split not in card['splits']:
        raise DataFileError(f'{path} has no split {split!r}; there are {", ".join(SPLITS)}')
    prompts = PromptSet(path, split, card['identity'], card['splits'][split])
    if len(prompts):
        try:
            found = len(prompts._source)
        except Exception as e:  # as in PromptSet
            raise _damaged(path, e) from e
        if found != len(prompts):
            raise _damaged(path, ValueError(f'{found} rows, {len(prompts)} in its card'))
        prompts.__getitems__([0, -1])
    return prompts
