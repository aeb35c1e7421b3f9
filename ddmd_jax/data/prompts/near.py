"""Near-duplicates among many short texts: MinHash with banding, then the exact similarity.

Two texts are compared by their shingles, the runs of `SHINGLE` characters of their keys (case
and punctuation put aside). MinHash only finds the pairs that are worth comparing; whether they
are near-duplicates is decided by the true Jaccard similarity, so none is dropped by chance;
a few may stay, more of them among prompts that one template made.
Nothing is random: the same texts in the same order give the same answer on every machine.
"""

import functools
import itertools
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np

SHINGLE = 5  # characters; words would fail where a language does not put spaces between them
PERMUTATIONS = 128
RECALL = 0.99  # share of pairs just at the threshold that banding must find
BUCKET = 256  # kept texts that a bucket lists: prompts made from one template share buckets
COMPARED = 64  # kept texts that a text is compared with, those sharing the most buckets first
BATCH = 2048
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class _Punctuation(dict):
    """For ``str.translate``: punctuation becomes a space, filled in as characters turn up."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        self[code] = ' ' if unicodedata.category(char).startswith('P') else char
        return self[code]


_PUNCTUATION = _Punctuation()


def key(text: str) -> str:
    """The part of `text` that is compared. Symbols stay: prompts may differ only in an emoji."""
    folded = text.casefold()
    return ' '.join(folded.translate(_PUNCTUATION).split()) or folded


def shingles(of: str) -> set[str]:
    """The runs of `SHINGLE` characters of the key `of`; a shorter key is its own only one."""
    return {of[i:i + SHINGLE] for i in range(max(1, len(of) - SHINGLE + 1))}


def jaccard(a: set[str], b: set[str]) -> float:
    """Shared part of two sets of shingles, 0 to 1."""
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared)


def bands(threshold: float) -> tuple[int, int]:
    """(bands, rows of each): the longest bands that find `RECALL` of pairs at `threshold`."""
    fits = lambda rows: 1 - (1 - threshold**rows) ** (PERMUTATIONS // rows) >= RECALL
    rows = max((r for r in range(1, PERMUTATIONS + 1) if fits(r)), default=1)
    return PERMUTATIONS // rows, rows


def _mixed(x: np.ndarray) -> np.ndarray:
    """Bits of uint64 `x` stirred into its upper half, as uint32 (half of splitmix64)."""
    x = (x ^ (x >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    return (x >> np.uint64(32)).astype(np.uint32)


def _hashes(keys: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """A uint32 for every shingle ``[T]`` of all `keys`, and where each key's begin ``[n]``."""
    padded = [k.ljust(SHINGLE) for k in keys]
    lengths = np.fromiter(map(len, padded), np.int64, len(padded))
    codes = np.frombuffer(''.join(padded).encode('utf-32-le'), np.uint32).astype(np.uint64)
    runs = np.zeros(len(codes) - SHINGLE + 1, np.uint64)
    for i in range(SHINGLE):  # wraps around, as it should
        runs = runs * GOLDEN + codes[i:i + len(runs)]
    ends = np.cumsum(lengths)
    across = (ends[:-1, None] - np.arange(1, SHINGLE)).ravel()  # begin in one key, end in the next
    starts = np.concatenate([[0], np.cumsum(lengths - SHINGLE + 1)[:-1]])
    return np.delete(_mixed(runs), across), starts


def signatures(keys: Sequence[str], rows: int) -> np.ndarray:
    """``[n, PERMUTATIONS // rows]`` uint32: texts that agree in one of them are candidates."""
    hashes, starts = _hashes(keys)
    # numpy's own generator may change its stream from one version to another.
    numbers = np.arange(1, 3 * PERMUTATIONS + 1, dtype=np.uint64)
    odd, shift, mix = _mixed(numbers * GOLDEN).reshape(3, -1)
    out = np.zeros((len(keys), PERMUTATIONS // rows), np.uint32)
    for i in range(out.shape[1] * rows):
        smallest = np.minimum.reduceat(hashes * (odd[i] | np.uint32(1)) + shift[i], starts)
        out[:, i // rows] = out[:, i // rows] * np.uint32(0x01000193) ^ (smallest * (mix[i] | 1))
    return out


def _buckets(table: np.ndarray) -> Iterator[tuple[int, list[int]]]:
    """(text, its buckets) of every text that shares one, in order; the others have no twin."""
    shared = np.zeros(table.shape, bool)
    for band in range(table.shape[1]):
        _, which, count = np.unique(table[:, band], return_inverse=True, return_counts=True)
        shared[:, band] = count[which] > 1
    for row in np.flatnonzero(shared.any(1)).tolist():
        mine = np.flatnonzero(shared[row])
        yield row, (table[row, mine].astype(np.int64) + (mine << 32)).tolist()


def find(texts: Sequence[str], threshold: float,
         advance: Callable[[float], object] = lambda n: None) -> dict[int, tuple[int, float]]:
    """The near-duplicates: index of each -> (index of the earlier text it repeats, similarity).

    A text is dropped if its similarity to an earlier one that stays is at least `threshold`;
    1 or more drops none. `texts` is read through once, and again where candidates are compared.
    `advance` gets the number of texts done since the last call; hashing one counts half.
    """
    if threshold >= 1 or len(texts) < 2:
        advance(len(texts))
        return {}
    table = np.concatenate(list(_tables(texts, bands(threshold)[1], advance)))
    sets = functools.lru_cache(maxsize=8192)(lambda row: shingles(key(texts[row])))
    members: dict[int, list[int]] = {}
    twins: dict[int, tuple[int, float]] = {}
    done = 0
    for row, buckets in _buckets(table):
        advance((row - done) / 2)
        done = row
        if twin := _twin(row, [members.get(b, ()) for b in buckets], sets, threshold):
            twins[row] = twin
            continue
        for b in buckets:
            if len(of := members.setdefault(b, [])) < BUCKET:
                of.append(row)
    advance((len(texts) - done) / 2)
    return twins


def _twin(row: int, candidates: Sequence[Sequence[int]], sets: Callable[[int], set[str]],
          threshold: float) -> tuple[int, float] | None:
    """The first candidate that is near enough, and how near."""
    shared = Counter(itertools.chain.from_iterable(candidates))
    for other, _ in shared.most_common(COMPARED):
        if (alike := jaccard(sets(row), sets(other))) >= threshold:
            return other, alike
    return None


def _tables(texts: Sequence[str], rows: int, advance: Callable) -> Iterator[np.ndarray]:
    for start in range(0, len(texts), BATCH):
        keys = [key(texts[i]) for i in range(start, min(start + BATCH, len(texts)))]
        yield signatures(keys, rows)
        advance(len(keys) / 2)
