"""Real images through a teacher's codec, into a folder of latents to train a GAN with.

The folder's format is `data/images/cache.py`'s. Work goes part by part of `PART` images of the
source's list, which several processes may share; the result is the same for any number of them, up
to how XLA rounds a batch of another size.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from ddmd_jax.data import DataFileError
from ddmd_jax.data.images import cache, pixels
from ddmd_jax.data.images.pixels import BadImage, Size
from ddmd_jax.data.images.sources import Entry, Source, printable
from ddmd_jax.families.base import ImageEncoder
from ddmd_jax.parallel import sharding
from ddmd_jax.util import errors
from ddmd_jax.util.text import first_line

PART = 1024  # images of the source that a part is of
READERS = 8  # threads that read and scale
AHEAD = 64  # images that they may be ahead of the codec, 3 MB each at 1024 x 1024


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What latents are made: all of it but `max_bad`, `rows` and `part` is in their identity.

    Attributes:
      sizes: of images in pixels; each image goes to that whose aspect is nearest, scaled down to
        cover it and cut at its middle.
      mean: whether latents are the posterior's means, not samples of it.
      seed: of the samples.
      max_bad: share of the source's images that may be left out.
      rows: images a device encodes at a time.
      part: see `PART`.
    """

    sizes: tuple[Size, ...]
    mean: bool = False
    seed: int = 0
    max_bad: float = 0.01
    rows: int = 1
    part: int = PART


@dataclasses.dataclass(frozen=True)
class _Read:
    """An image that was read: its pixels, or why it is left out."""

    name: str
    caption: str = ''
    bucket: int = 0
    image: np.ndarray | None = None
    digest: str = ''
    reason: str = ''


def encode(source: Source, encoder: ImageEncoder, wanted: Wanted, mesh: Mesh, out: Path,
           share: tuple[int, int] = (0, 1)) -> tuple[dict[str, Any] | None, bool]:
    """The card of the finished folder `out`, None if other processes have parts to write; and
    whether it was there already.

    Args:
      share: (which, of how many) processes this one is; it writes every so many-th part.

    Raises:
      DataFileError: more than `max_bad` of the images cannot be used, sizes do not divide by the
        codec's factor, `out` is something else or of another request, the disk is full.
    """
    odd = [size for size in wanted.sizes if any(side % encoder.factor for side in size)]
    if odd:
        raise DataFileError(f'--sizes {odd[0][0]}x{odd[0][1]}: both must be multiples of '
                            f'{encoder.factor}, the pixels of a latent')
    settings = {
        'family': encoder.family, 'codec': encoder.identity, 'factor': encoder.factor,
        'channels': encoder.channels, 'sizes': wanted.sizes, 'mean': wanted.mean,
        'seed': wanted.seed, 'part': wanted.part, 'images': len(source),
        'listing': source.listing}
    states = [source.states(first, min(first + wanted.part, len(source)))
              for first in range(0, len(source), wanted.part)]
    parts = cache.Parts(out, settings, source.asked, states)
    if parts.finished:
        first, count = (parts.finished['left_out'][name] for name in ('first', 'count'))
        if count > wanted.max_bad * len(source):
            words = cache.summary(first, count)
            raise DataFileError(f'{out} is done, and of {len(source)} images {words}: more than '
                                f'--max_bad={wanted.max_bad:g} of them; raise it, or mend them and '
                                'choose another --out')
        return parts.finished, True
    run = _Encoding(encoder, wanted, mesh)
    bad: list[Any] = []
    with tqdm(total=len(source), desc='images', unit=' images', file=sys.stderr,
              dynamic_ncols=True) as bar, ThreadPoolExecutor(READERS) as pool:
        for number in range(share[0], parts.count, share[1]):
            first, last = number * wanted.part, min((number + 1) * wanted.part, len(source))
            done = parts.done(number)
            if done is None:
                entries = ((i, source[i]) for i in range(first, last))
                done = _write(parts, number, _in_order(pool, run.read, entries), run)
            bar.update(last - first)
            bad += done['left_out']
            _check_bad(bad, len(source), wanted.max_bad)
    cards = [parts.done(number) for number in range(parts.count)]
    every = [card for card in cards if card]
    if len(every) < len(cards):
        return None, False
    _check_bad([one for card in every for one in card['left_out']], len(source), wanted.max_bad)
    return parts.finish(every), False


def _in_order(pool: ThreadPoolExecutor, read: Callable[[Any], _Read],
              entries: Iterator[Any]) -> Iterator[_Read]:
    """What `read` makes of `entries`, at most `AHEAD` of them before it is asked for."""
    waiting = collections.deque(pool.submit(read, one) for one in itertools.islice(entries, AHEAD))
    while waiting:
        yield waiting.popleft().result()
        waiting.extend(pool.submit(read, one) for one in itertools.islice(entries, 1))


def _write(parts: cache.Parts, number: int, found: Iterator[_Read],
           run: _Encoding) -> dict[str, Any]:
    """Writes a part of what was read; its card."""
    digest, left_out = hashlib.sha256(), []

    def kept() -> Iterator[tuple[int, _Read]]:
        for place, one in enumerate(found):
            if one.reason:
                left_out.append((printable(one.name), one.reason))
            else:
                digest.update(f'{one.name}\0{one.caption}\0{one.digest}\0'.encode(
                    'utf-8', 'surrogateescape'))
                yield place + number * run.wanted.part, one

    try:
        rows = sorted(run.latents(kept()), key=lambda row: row[0])
        parts.write(number, [row[1:] for row in rows], digest.hexdigest(), left_out)
    except OSError as e:
        errors.raise_environment(e, parts.folder)
        raise DataFileError(f'{parts.folder} cannot be written ({e.strerror or e}); see to it and '
                            'run the same command again: finished parts are kept') from e
    done = parts.done(number)
    assert done is not None
    return done


def _check_bad(bad: Sequence[Any], count: int, share: float) -> None:
    if len(bad) > share * count:
        raise DataFileError(f'of {count} images {cache.summary(bad)}: more than --max_bad='
                            f'{share:g} of them; mend them or raise it, then run the same command '
                            'again: finished parts are kept')


class _Encoding:
    """Images through the codec on a mesh, as many at a time as it has devices."""

    def __init__(self, encoder: ImageEncoder, wanted: Wanted, mesh: Mesh):
        self.encoder, self.wanted, self.mesh = encoder, wanted, mesh
        self._at_once = wanted.rows * sharding.batch_ways(mesh)
        self._root = jax.random.key(wanted.seed)

    def read(self, entry: tuple[int, Entry]) -> _Read:
        """An image's pixels and caption; a thread's work. Only the machine's faults are raised."""
        name = entry[1].name
        try:
            raw = entry[1].read()
        except OSError as e:
            errors.raise_environment(e, name)
            return _Read(name, reason=f'cannot be read: {first_line(e)[:120]}')
        try:
            caption = entry[1].caption()
        except (ValueError, DataFileError, OSError) as e:
            errors.raise_environment(e, name)
            return _Read(name, reason=f'has a caption that cannot be read: {first_line(e)[:200]}')
        if not caption:
            return _Read(name, reason='has no caption')
        try:
            image = pixels.decode(raw, name)
            bucket = pixels.bucket((image.height, image.width), self.wanted.sizes)
            fitted = pixels.fitted(image, self.wanted.sizes[bucket])
        except BadImage as e:
            return _Read(name, reason=str(e))
        return _Read(name, caption, bucket, fitted, hashlib.sha256(raw).hexdigest())

    def latents(self, images: Iterator[tuple[int, _Read]],
                ) -> Iterator[tuple[int, str, str, int, np.ndarray]]:
        """(place, name, caption, bucket, latent), size by size as batches are full."""
        waiting: dict[int, list[tuple[int, _Read]]] = {}
        for place, one in images:
            batch = waiting.setdefault(one.bucket, [])
            batch.append((place, one))
            if len(batch) == self._at_once:
                yield from self._encoded(waiting.pop(one.bucket))
        for batch in waiting.values():
            yield from self._encoded(batch)

    def _encoded(self, batch: list[tuple[int, _Read]],
                 ) -> Iterator[tuple[int, str, str, int, np.ndarray]]:
        filled = [batch[i % len(batch)] for i in range(self._at_once)]  # always of one shape
        images = np.stack([one.image for _, one in filled])  # type: ignore[misc]
        places = np.asarray([place for place, _ in filled], np.uint32)
        split = sharding.batch_sharding(self.mesh)
        found = np.asarray(self.encoder.run(
            self.encoder.params, *jax.device_put((images, places), split), self._root,
            self.wanted.mean))
        for (place, one), latent in zip(batch, found):
            yield place, one.name, one.caption, one.bucket, latent
