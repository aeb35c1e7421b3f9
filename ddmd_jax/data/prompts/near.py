"""Near-duplicates among many short texts: MinHash with banding, then the exact similarity.

Texts are alike by the Jaccard index of their shingles, runs of `SHINGLE` characters of their keys
(case and punctuation put aside). MinHash only finds pairs that are worth comparing, and the exact
index decides: nothing is dropped by chance; a few near-duplicates may stay, more of them among
prompts of one template. The same texts in the same order give the same answer on every machine.
"""

import functools
import itertools
import sys
import unicodedata
import zlib
from collections import Counter
from collections.abc import Sequence

import numpy as np

from ddmd_jax.data.prompts.files import bar

SHINGLE = 5  # characters; words would fail where a language does not put spaces between them
PERMUTATIONS = 128
RECALL = 0.99  # share of pairs just at the threshold that banding must find
BUCKET = 256  # kept texts that a bucket lists: prompts made from one template share buckets
COMPARED = 64  # kept texts that a text is compared with, those sharing the most buckets first


@functools.cache
def _punctuation() -> dict[int, str]:
    return {code: ' ' for code in range(sys.maxunicode)
            if unicodedata.category(chr(code)).startswith('P')}


def key(text: str) -> str:
    """The part of `text` that is compared. Symbols stay: prompts may differ only in an emoji."""
    folded = text.casefold()
    return ' '.join(folded.translate(_punctuation()).split()) or folded


def shingles(text: str) -> set[str]:
    """The runs of `SHINGLE` characters of a text's key; a shorter key is its own only one."""
    of = key(text)
    return {of[i:i + SHINGLE] for i in range(max(1, len(of) - SHINGLE + 1))}


def jaccard(a: set[str], b: set[str]) -> float:
    """Shared part of two sets, 0 to 1."""
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared)


def bands(threshold: float) -> tuple[int, int]:
    """(bands, rows of each): the longest bands that find `RECALL` of pairs at `threshold`."""
    fits = lambda rows: 1 - (1 - threshold**rows) ** (PERMUTATIONS // rows) >= RECALL
    rows = max((r for r in range(1, PERMUTATIONS + 1) if fits(r)), default=1)
    return PERMUTATIONS // rows, rows


def _buckets(texts: Sequence[str], threshold: float) -> np.ndarray:
    """``[N, bands]``: each text's buckets; 0 where it has one to itself."""
    count, rows = bands(threshold)
    # RandomState: its stream is the same in every version of numpy.
    factor, shift, mix = np.random.RandomState(0).randint(
        2**32, size=(3, count * rows), dtype=np.uint32) | np.uint32(1)
    table = np.empty((len(texts), count), np.uint64)
    with bar('hashing', len(texts)) as progress:
        for row, text in enumerate(texts):
            hashes = np.array([zlib.crc32(s.encode()) for s in shingles(text)], np.uint32)
            smallest = np.min(hashes[:, None] * factor + shift, axis=0)  # MinHash
            table[row] = (smallest.astype(np.uint64) * mix).reshape(count, rows).sum(1)
            progress.update()
    for band, column in enumerate(table.T):
        _, place, size = np.unique(column, return_inverse=True, return_counts=True)
        table[:, band] = np.where(size[place] > 1, place * count + band + 1, 0)
    return table


def find(texts: Sequence[str], threshold: float) -> dict[int, tuple[int, float]]:
    """The near-duplicates: index of each -> (index of the earlier text it repeats, similarity).

    A text is dropped if its similarity to an earlier one that stays is at least `threshold`;
    1 or more drops none.
    """
    if threshold >= 1 or len(texts) < 2:
        return {}
    table = _buckets(texts, threshold)
    sets = functools.lru_cache(maxsize=8192)(lambda row: shingles(texts[row]))
    members: dict[int, list[int]] = {}
    twins: dict[int, tuple[int, float]] = {}
    crowded = np.flatnonzero(table.any(1)).tolist()
    with bar('comparing', len(crowded)) as progress:
        for row in crowded:
            lists = [members.setdefault(b, []) for b in table[row].tolist() if b]
            for other, _ in Counter(itertools.chain(*lists)).most_common(COMPARED):
                if (alike := jaccard(sets(row), sets(other))) >= threshold:
                    twins[row] = other, alike
                    break
            else:
                for of in lists:
                    if len(of) < BUCKET:
                        of.append(row)
            progress.update()
    return twins
