"""Which prompts every batch of a run holds: one global order, whatever reads it.

The order is a function of the seed and of a batch's number alone, so that any number of
processes sees the same one, and a run that goes on after batch n needs to know n and nothing
else.
"""

import dataclasses
import functools
import sys
from collections.abc import Sequence

import numpy as np
from grain import experimental

Shape = tuple[int, ...]
ROUNDS = 4  # of the shuffle's cipher
WINDOW = 64  # batches that are sorted by length together; more are alike, but order is less free


@dataclasses.dataclass(frozen=True)
class Planned:
    """One global batch: `rows`, the length their tokens are cut to, the shape of its latents."""

    rows: np.ndarray
    length: int | None
    shape: Shape | None


def _seed_of_shuffle(seed: int) -> int:
    """The seed of Grain's ``MapDataset.source(rows).seed(seed).shuffle()``."""
    return int(np.random.SeedSequence([seed, 1]).generate_state(1, np.uint32)[0])


class Order:
    """A random-access sequence of `Planned`, as long as is ever needed; Grain reads it.

    Rows come shuffled, anew each epoch, an epoch's each once, in the order of Grain's shuffled
    `MapDataset`, which itself would take six times as long for a row. With `buckets`, prompts of
    like length go together: the rows of a window of batches are sorted by bucket, cut into
    batches, and these shuffled. A window never reaches over the end of an epoch, and a batch that
    does has its rows as they come.

    Args:
      rows: indices of one epoch.
      global_batch: rows of a batch.
      seed: of both shuffles and of the shapes.
      lengths: tokens of each row of the data set, ``[max(rows) + 1]``; needed by `buckets`.
      buckets: lengths that batches are cut to, ascending; a batch's is the least that holds its
        longest prompt. Empty: batches are not cut.
      shapes: shapes of latents, of which each batch is given one, all equally often on average.

    Raises:
      ValueError: a prompt is longer than the last bucket.
    """

    def __init__(self, rows: np.ndarray, global_batch: int, seed: int,
                 lengths: np.ndarray | None = None, buckets: Sequence[int] = (),
                 shapes: Sequence[Shape] = (), window: int = WINDOW):
        self._all, self._shuffle = np.asarray(rows), _seed_of_shuffle(seed)
        self._epoch, self._batch, self._window_size = len(rows), global_batch, window
        self._buckets, self._shapes, self._seed = np.asarray(buckets, int), tuple(shapes), seed
        self._bucket_of: np.ndarray | None = None
        if len(self._buckets):
            if lengths is None or lengths[rows].max() > self._buckets[-1]:
                raise ValueError(f'a prompt is longer than the last bucket, {buckets[-1]}')
            self._bucket_of = np.searchsorted(self._buckets, lengths)
        # The batches of one window are asked for one after another.
        self._sorted = functools.lru_cache(maxsize=4)(self._sort)

    def __len__(self) -> int:
        return sys.maxsize // self._batch - 1

    def __getitem__(self, index: int) -> Planned:
        shape = self._shapes[self._draw(1, index).integers(len(self._shapes))] if (
            self._shapes) else None
        if self._bucket_of is None:
            return Planned(self._rows(index, index + 1), None, shape)
        first, last = self._window(index)
        rows = self._sorted(first, last)[index - first]
        return Planned(rows, int(self._buckets[self._bucket_of[rows].max()]), shape)

    def kinds(self, count: int) -> list[tuple[int | None, Shape | None]]:
        """Every (length, shape) there may be, in the order in which `count` batches meet them."""
        met = [(p.length, p.shape) for p in (self[i] for i in range(count))]
        every = [(length, shape) for shape in self._shapes or (None,)
                 for length in self._buckets.tolist() or (None,)]
        return list(dict.fromkeys(met + every))

    def _rows(self, first: int, last: int) -> np.ndarray:
        """Rows of the batches from `first` to before `last`, in the stream's order."""
        places = []
        for i in range(first * self._batch, last * self._batch):
            epoch, place = divmod(i, self._epoch)
            places.append(experimental.index_shuffle(
                place, self._epoch - 1, (self._shuffle + epoch) % 2**32, ROUNDS))
        return self._all[places]

    def _window(self, index: int) -> tuple[int, int]:
        """(first, one past the last) batch of the window that batch `index` lies in."""
        epoch = index * self._batch // self._epoch
        start = -(-epoch * self._epoch // self._batch)  # first batch wholly of this epoch
        end = (epoch + 1) * self._epoch // self._batch
        if not start <= index < end:
            return index, index + 1  # of two epochs
        first = start + (index - start) // self._window_size * self._window_size
        return first, min(first + self._window_size, end)

    def _sort(self, first: int, last: int) -> np.ndarray:
        """``[batches, global_batch]`` rows of a window."""
        rows = self._rows(first, last)
        if self._bucket_of is not None and last - first > 1:
            rows = rows[np.argsort(self._bucket_of[rows], kind='stable')]
        batches = rows.reshape(last - first, self._batch)
        return batches[self._draw(0, first).permutation(len(batches))]

    def _draw(self, what: int, index: int) -> np.random.Generator:
        return np.random.default_rng((self._seed, what, index))


class OrderByShape:
    """As `Order`, for examples whose latents have a shape of their own: a batch's all have one.

    Rows of each shape have an `Order`. Of which shape a batch is goes round in cycles of about an
    epoch, in each of which every shape has as many batches as its rows make, at least one, in an
    order drawn anew.

    Args:
      rows: indices of one epoch.
      global_batch: rows of a batch.
      seed: of all shuffles.
      shapes: of latents.
      shape_of: which of `shapes` each row of the data set has, ``[max(rows) + 1]``.
    """

    def __init__(self, rows: np.ndarray, global_batch: int, seed: int, shapes: Sequence[Shape],
                 shape_of: np.ndarray):
        parts = [(rows[shape_of[rows] == i], shape) for i, shape in enumerate(shapes)]
        parts = [(own, shape) for own, shape in parts if len(own)]
        self._orders = [Order(own, global_batch, seed, shapes=(shape,)) for own, shape in parts]
        self._shapes, self._seed, self._batch = [s for _, s in parts], seed, global_batch
        self._counts = np.asarray([max(1, round(len(own) / global_batch)) for own, _ in parts])
        self._cycle = functools.lru_cache(maxsize=4)(self._draw_cycle)

    def __len__(self) -> int:
        return sys.maxsize // self._batch - 1

    def __getitem__(self, index: int) -> Planned:
        cycle, place = divmod(index, int(self._counts.sum()))
        which, nth = self._cycle(cycle)
        part = which[place]
        return self._orders[part][int(cycle * self._counts[part] + nth[place])]

    def kinds(self, count: int) -> list[tuple[int | None, Shape | None]]:
        """See `Order.kinds`."""
        met: list[tuple[int | None, Shape | None]] = [
            (None, self[i].shape) for i in range(min(count, int(self._counts.sum())))]
        return list(dict.fromkeys([*met, *((None, shape) for shape in self._shapes)]))

    def _draw_cycle(self, cycle: int) -> tuple[np.ndarray, np.ndarray]:
        """(of which shape each batch of a cycle is, the how manieth of that shape it is in it)."""
        every = np.repeat(np.arange(len(self._counts)), self._counts)
        which = np.random.default_rng((self._seed, 2, cycle)).permutation(every)
        nth = np.empty_like(which)
        for part in range(len(self._counts)):
            nth[which == part] = np.arange(self._counts[part])
        return which, nth
