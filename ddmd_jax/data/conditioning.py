"""The prompts of a distillation run, and prompts that were encoded beforehand."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ddmd_jax.data import DataFileError, embeddings
from ddmd_jax.data.batch import Batch, Cond
from ddmd_jax.data.order import Planned, Shape
from ddmd_jax.util import places


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The prompts of a run, as conditioning or as the tokens that an encoder makes it of.

    Attributes:
      rows: indices of one epoch.
      lookup: ``(rows, length) -> arrays [B, length, ...]``, of full length where `length` is None:
        a `Cond`, or tokens that `encode` makes one of.
      cond: ``rows -> Cond`` at full length, in the host's memory.
      null: the null prompt's `Cond`, one row of full length.
      caption: ``row -> prompt``, for images.
      identity: names the data.
      lengths: tokens of every row, where they are known.
      encode: a jitted program, ``tokens -> Cond``; None where `lookup` gives a `Cond`.
      real: ``rows -> real latents [B, H, W, C]`` of these prompts; None where there are none.
      shapes: of latents that rows have of their own, and `shape_of` ``[N]``, which of these each
        has; empty and None where a batch's shape is drawn.
      of_shape: ``(number of rows, shape of a latent) -> arrays`` that go with a batch beside what
        `lookup` gives (`CondSpec.of_shape`), as its latents have some size.
      encoder: identity of the text encoder that encodes them as they are needed; '' where
        `identity` says it.
    """

    rows: np.ndarray
    lookup: Callable[[np.ndarray, int | None], dict[str, Any]]
    cond: Callable[[np.ndarray], Cond]
    null: Cond
    caption: Callable[[int], str]
    identity: str
    lengths: np.ndarray | None = None
    encode: Callable[[Any], Cond] | None = None
    real: Callable[[np.ndarray], np.ndarray] | None = None
    shapes: Sequence[Shape] = ()
    shape_of: np.ndarray | None = None
    of_shape: Callable[[int, Sequence[int]], dict[str, Any]] | None = None
    encoder: str = ''

    def some(self, count: int, shape: Shape | None) -> np.ndarray:
        """So many rows that may be in a batch of latents of `shape`, as often as it takes."""
        rows = self.rows
        if self.shape_of is not None and shape is not None:
            rows = rows[self.shape_of[rows] == list(self.shapes).index(shape)]
        return np.resize(rows, count)

    def read(self, planned: Planned) -> Batch:
        """A planned batch, or a process's rows of one, in the host's memory."""
        real = self.real(planned.rows) if self.real else None
        cond = self.lookup(planned.rows, planned.length)
        if self.of_shape and planned.shape:
            cond = self.of_shape(len(planned.rows), planned.shape) | cond
        return Batch(cond, real, planned.shape or ())


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


def open_embeddings(path: str, width: int, encoder: str | None = None) -> Prompts:
    """Prompts of the folder of embeddings at `path`, whose D must be `width`.

    `encoder` is the identity of the teacher's text encoder; None is not known.

    Raises:
      DataFileError: missing, half written, damaged, of another width or another text encoder.
    """
    stored = embeddings.Embeddings(places.of(path))
    if encoder is not None and (wrote := stored.card.get('encoder_identity')) != encoder:
        raise DataFileError(f"{path} holds embeddings of another text encoder ({wrote}) than the "
                            f"teacher's ({encoder}); {embeddings.CURE} and the teacher's folder")
    if stored.card['width'] != width:
        raise DataFileError(f'{path} holds embeddings {stored.card["width"]} wide, the teacher '
                            f'takes {width}; encode the prompts with its own text encoder')
    full = stored.card['length']
    lookup = lambda rows, length=None: embeddings.padded(
        stored.__getitems__(rows), length or full)
    return Prompts(np.arange(len(stored)), lookup, lookup, embeddings.padded([stored.null], full),
                   stored.prompt, stored.card['identity'], stored.lengths)
