"""A set of prompts on disk: ``SPLIT.array_record``, a prompt a record in UTF-8, and a card."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from ddmd_jax.data import DataFileError
from ddmd_jax.data.records import Records
from ddmd_jax.util import buckets, errors, files, places, shape
from ddmd_jax.util.places import Place
from ddmd_jax.util.text import first_line

FORMAT = 'ddmd_jax prompts 2'
SPLITS = ('train', 'validation')
CARD = 'card.json'
CURE = 'make it again with `python -m ddmd_jax.prepare prompts`'
BATCH = 4096  # prompts that are read at a time
LIKE = {'identity': str, 'splits': dict.fromkeys(SPLITS, shape.count),
        'settings': {str: shape.VALUE}, 'inputs': [{'input': str, 'sha256': str}],
        'counts': {'read': shape.count, str: shape.count}}


def read_card(path: Place) -> dict[str, Any]:
    """The card of the set of prompts at `path`.

    Raises:
      DataFileError: there is none, or it is damaged.
    """
    if not path.is_dir():
        raise DataFileError(f'no set of prompts at {path}; {CURE}')
    if not (path / CARD).is_file():
        raise DataFileError(f'{path} is not a set of prompts (it has no {CARD}); {CURE}')
    try:
        card = shape.load(files.patiently((path / CARD).read_bytes), {'format': str})
        if card['format'] != FORMAT:
            raise DataFileError(f'{path} is {card["format"]!r}, not {FORMAT!r}; {CURE}')
        if fault := shape.fault(card, LIKE):
            raise ValueError(fault)
    except (OSError, ValueError) as e:
        errors.raise_environment(e)
        raise DataFileError(f'set of prompts damaged: {path} ({first_line(e)}); {CURE}') from e
    return card


@dataclasses.dataclass(frozen=True, eq=False)
class PromptSet(Sequence):
    """One split: `prompts[i]` is read from disk when asked for. It may be pickled.

    `identity` is that of the whole set, both splits: 16 hex digits that change with any prompt,
    their order or their split.
    """

    split: str
    identity: str
    records: Records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # no slices
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[str]:
        """Several at once, in any order and as often as asked; faster than one by one."""
        for i in indices:
            if not -len(self) <= i < len(self):
                raise IndexError(f'there are {len(self)} {self.split} prompts, no [{i}]')
        return [raw.decode() for raw in self.records.read([i % len(self) for i in indices])]

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), BATCH):
            yield from self.__getitems__(range(start, min(start + BATCH, len(self))))


def open_set(path: str | Place, split: str = 'train') -> PromptSet:
    """The prompts of one `split` of the set at `path`; nothing but its ends is read.

    One in a bucket is copied to this machine's disk first.

    Raises:
      DataFileError: missing, damaged or not a set of prompts; no such split.
      PlaceError: a bucket cannot be read.
    """
    path = buckets.local(places.of(path))
    card = read_card(path)
    if split not in card['splits']:
        raise DataFileError(f'{path} has no split {split!r}; there are {", ".join(SPLITS)}')
    records = Records([path / f'{split}.array_record'], card['splits'][split],
                      f'set of prompts damaged: {path}', CURE)
    records.read([0, len(records) - 1] if len(records) else [])
    return PromptSet(split, card['identity'], records)
