"""Latents of real images on disk, with their captions: written part by part, read at random.

A finished folder holds

    card.json                     what it is: format, counts, codec, sizes, files, what was left
                                  out, and of what it was made: flags, states of inputs by part
    index.safetensors             buckets [N] int32: which of the sizes each image has
    images-00000.array_record     a record an image: safetensors of its latent [h, w, C] fp16, and
                                  of its caption and name as bytes

Until it is finished it lies beside its place, as ``NAME.parts``: each part is there whole, with a
card of its own, or not at all, so that work that was stopped goes on after the last part. A part
whose images or captions have changed since is written again.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddmd_jax.data import DataFileError, records
from ddmd_jax.util import buckets, errors, files, shape
from ddmd_jax.util.places import Place
from ddmd_jax.util.text import first_line

FORMAT = 'ddmd_jax images 1'
CURE = 'write it again with `python -m ddmd_jax.prepare images`'
FLOAT = np.float16  # latents are about one: 11 bits of them
SHOWN = 20  # images that were left out which a card names
Shape = tuple[int, ...]
SETTINGS = {'factor': shape.positive, 'channels': shape.positive, 'codec': str,
            'sizes': [[shape.positive]]}
PART_CARD = {'buckets': [shape.count], 'digest': str, 'left_out': [[str]], 'made_of': {str: str}}
LIKE = {'identity': str, 'count': shape.count, 'files': [str], 'of_each_size': [shape.count],
        'left_out': {'count': shape.count, 'first': [[str]]}, 'settings': SETTINGS,
        'digests?': [str], 'asked?': {}, 'parts?': [{str: str}]}


class Parts:
    """A folder of latents that is being written, by one process or several.

    Args:
      out: where it shall be.
      settings: all that the latents depend on but the images and captions themselves.
      asked: flags that say which these are; see `sources.Source`.
      states: of the images and captions of each part, by `Source.states`.

    Raises:
      DataFileError: `out` is something else, was made otherwise or from files that have changed
        since, or parts that were made otherwise lie beside it.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any], asked: Mapping[str, Any],
                 states: Sequence[Mapping[str, str]]):
        self.out, self.folder = out, out.with_name(f'{out.name}.parts')
        self.settings, self.asked, self.states = json.loads(json.dumps([settings, asked, states]))
        self.count = len(states)
        whole = hashlib.sha256(json.dumps([self.settings, self.asked]).encode()).hexdigest()[:16]
        self._made_of = [state | {'request': whole} for state in self.states]
        self.finished: dict[str, Any] | None = None
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            card = ImageCache(out).card
            self._check(card, out)
            parts = [*card.get('parts', []), *[{}] * self.count]
            changed = [f'{what} of {state["first"]} to {state["last"]}'
                       for state, found in zip(self.states, parts)
                       for what in ('images', 'captions') if state[what] != found.get(what)]
            if changed:
                raise DataFileError(f'{out} holds latents of files that have changed since '
                                    f'({", ".join(changed)[:400]}); choose another --out or delete '
                                    'it')
            self.finished = card
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / 'settings.json'
        if not file.is_file():
            files.write_json(file, {'settings': self.settings, 'asked': self.asked}, own=True)
        try:
            found = shape.load(files.patiently(file.read_bytes), {'settings': {}, 'asked': {}})
        except ValueError as e:
            raise DataFileError(f'{file} does not say what this half written folder is of '
                                f'({first_line(e)}); choose another --out or delete {self.folder}'
                                ) from e
        self._check(found, self.folder)

    def _check(self, found: Mapping[str, Any], where: Path) -> None:
        there = {**found['settings'], **found.get('asked', {})}
        other = [f'{name}: {there.get(name, "unknown")} -> {value}'
                 for name, value in {**self.asked, **self.settings}.items()
                 if there.get(name) != value]
        if other:
            raise DataFileError(f'{where} holds latents that were made otherwise '
                                f'({", ".join(other)[:400]}); choose another --out or delete it')

    def _names(self, number: int) -> tuple[Path, Path]:
        stem = f'images-{number:05d}'
        return self.folder / f'{stem}.array_record', self.folder / f'{stem}.json'

    def done(self, number: int) -> dict[str, Any] | None:
        """The card of a part, None if it is still to be written, or was of what has changed."""
        file = self._names(number)[1]
        if not file.is_file():
            return None
        try:
            card = shape.load(files.patiently(file.read_bytes), PART_CARD)
            if card['buckets']:
                records.Records([self._names(number)[0]], len(card['buckets']), 'damaged', '')
        except (ValueError, DataFileError):  # whatever it was, it is made again
            return None
        return card if card['made_of'] == self._made_of[number] else None

    def write(self, number: int, images: Iterable[tuple[str, str, int, np.ndarray]],
              digest: str, left_out: Sequence[tuple[str, str]]) -> None:
        """Writes a part: (name, caption, bucket, latent) of its images; `digest` names these.

        Raises:
          DataFileError: a latent is not finite.
          OSError: it cannot be written.
        """
        import safetensors.numpy

        file, card = self._names(number)
        for old in (card, file):  # a card is never beside images that are not its own
            files.remove(old)
        buckets: list[int] = []

        def encoded() -> Iterable[bytes]:
            for name, caption, bucket, latent in images:
                half = latent.astype(FLOAT)
                if not np.isfinite(half).all():
                    raise DataFileError(f'the latent of {name} is not finite; the codec or its '
                                        'dtype is at fault, and this part was not written')
                buckets.append(bucket)
                text = {'caption': caption, 'name': name}
                yield safetensors.numpy.save({'latent': half} | {
                    k: np.frombuffer(x.encode('utf-8', 'surrogateescape'), np.uint8)
                    for k, x in text.items()})

        images = list(images)
        if images:
            with files.replacing(file, sync=True) as scratch:
                records.write(scratch, encoded())
        files.write_json(card, {'buckets': buckets, 'digest': digest, 'left_out': left_out,
                                'made_of': self._made_of[number]}, sync=True)

    def finish(self, cards: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The card of the finished folder, of the `cards` of all parts.

        Raises:
          DataFileError: there is no image in any of them.
        """
        import safetensors.numpy

        buckets = np.asarray([b for card in cards for b in card['buckets']], np.int32)
        left_out = [tuple(x) for card in cards for x in card['left_out']]
        if not len(buckets):
            raise DataFileError(f'no image is left: {summary(left_out)}')
        digests = [one['digest'] for one in cards]
        counts = np.bincount(buckets, minlength=len(self.settings['sizes'])).tolist()
        card = {'format': FORMAT, 'identity': _identity(self.settings, digests),
                'count': len(buckets), 'settings': self.settings, 'digests': digests,
                'asked': self.asked, 'parts': self.states,
                'of_each_size': counts,
                'left_out': {'count': len(left_out), 'first': left_out[:SHOWN]},
                'files': [self._names(number)[0].name for number, part in enumerate(cards)
                          if part['buckets']]}
        with contextlib.suppress(FileNotFoundError):  # another process was as fast
            files.write(self.folder / 'index.safetensors',
                        safetensors.numpy.save({'buckets': buckets}), own=True)
            files.write_json(self.folder / 'card.json', card, sync=True, own=True)
            os.replace(self.folder, self.out)
        return card


def _identity(settings: Mapping[str, Any], digests: Iterable[str]) -> str:
    """Of a folder, by its settings and the digests of its parts."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for one in digests:
        digest.update(one.encode())
    return digest.hexdigest()[:16]


def summary(left_out: Sequence[Sequence[str]], count: int | None = None) -> str:
    """How many images were left out, `count` or all of them; the first three, and why."""
    count = len(left_out) if count is None else count
    first = '; '.join(f'{name} {reason}' for name, reason in left_out[:3])
    return f'{count} left out ({first}{"; ..." if count > 3 else ""})'


class ImageCache(Sequence):
    """A finished folder: a sequence of captions, with latents by row.

    One in a bucket is copied to this machine's disk first.

    Attributes:
      card, identity: what it is; a hash of settings, images and captions.
      shapes: of its latents, ``(h, w, C)``, in the order of its sizes.
      buckets: ``[N]`` int32, which of them each row has.

    Raises:
      DataFileError: missing, half written, damaged, or something else.
      PlaceError: a bucket cannot be read.
    """

    def __init__(self, folder: Place):
        folder = buckets.local(folder)
        if not folder.is_dir():
            half = folder.with_name(f'{folder.name}.parts').is_dir()
            raise DataFileError(f'no folder of latents at {folder}; ' + (
                'it is half written: run the same `python -m ddmd_jax.prepare images` to the end'
                if half else f'set config.data.path, or {CURE}'))
        try:
            self.card = shape.load(files.patiently((folder / 'card.json').read_bytes),
                                   {'format': str})
            if self.card['format'] != FORMAT:
                raise ValueError(f'its format is {self.card["format"]!r}')
            if fault := shape.fault(self.card, LIKE):
                raise ValueError(fault)
            if any(Path(f).name != f for f in self.card['files']):
                raise ValueError('its files are not all in it')
            settings = self.card['settings']
            factor, channels = settings['factor'], settings['channels']
            self.shapes: list[Shape] = [(h // factor, w // factor, channels)
                                        for h, w in settings['sizes']]
            self.identity, self.codec = self.card['identity'], settings['codec']
            if 'digests' in self.card and (  # older folders have none
                    self.identity != _identity(settings, self.card['digests'])):
                raise ValueError('its identity is not that of its settings and parts')
        except (OSError, ValueError, TypeError) as e:
            errors.raise_environment(e)
            raise DataFileError(
                f'{folder} is no folder of latents ({first_line(e)}); {CURE}') from e
        self._damaged = damaged = f'latents damaged: {folder}'
        try:
            self.buckets = _arrays((folder / 'index.safetensors').read_bytes())['buckets']
            self._check()
        except Exception as e:  # safetensors' errors have no common ancestor
            errors.raise_environment(e, folder)
            raise DataFileError(f'{damaged} ({first_line(e)}); {CURE}') from e
        self._records = records.Records([folder / f for f in self.card['files']],
                                        len(self.buckets), damaged, CURE)

    def _check(self) -> None:
        """Raises `ValueError` where index and card contradict one another."""
        found = self.buckets
        if found.dtype != np.int32 or found.ndim != 1:
            raise ValueError(f'buckets are {found.dtype} {found.shape}, and are to be int32 '
                             '(images,)')
        if len(found) and not 0 <= found.min() <= found.max() < len(self.shapes):
            raise ValueError(f'buckets from {found.min()} to {found.max()} are not of '
                             f'{len(self.shapes)} sizes')
        if np.bincount(found, minlength=len(self.shapes)).tolist() != self.card['of_each_size']:
            raise ValueError('its index and its card have other counts of each size')

    def __len__(self) -> int:
        return len(self.buckets)

    def __getitem__(self, row: int) -> str:  # type: ignore[override]  # no slices
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[str]:
        """Captions of these rows."""
        return [_text(_arrays(raw)['caption']) for raw in self._records.read(rows)]

    def name(self, row: int) -> str:
        """Of an image, in what it was made from."""
        return _text(_arrays(self._records.read([row])[0])['name'])

    def latents(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """``[n, h, w, C]`` fp32 of rows that have one shape."""
        found = []
        for row, raw in zip(rows, self._records.read([int(row) for row in rows]), strict=True):
            latent, wanted = _arrays(raw)['latent'], self.shapes[self.buckets[row]]
            if latent.shape != wanted:
                raise DataFileError(f'{self._damaged} (the latent {row} is {latent.shape}, by its '
                                    f'size {wanted}); {CURE}')
            found.append(latent.astype(np.float32))
        return np.stack(found)


def _arrays(raw: bytes) -> dict[str, np.ndarray]:
    import safetensors.numpy

    return safetensors.numpy.load(raw)


def _text(raw: np.ndarray) -> str:
    return raw.tobytes().decode('utf-8', 'surrogateescape')
