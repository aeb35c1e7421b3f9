"""Images of one row of a table: in memory, on the disk as they are drawn, or in a user's folder.

On the disk a batch is there whole or not at all, and an image is drawn once: what a killed
process has written is not drawn again. An image is a PNG that says which it is, alone in a file
or in an ArrayRecord.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ddmd_jax.data import DataFileError, records
from ddmd_jax.data.images import pixels, sources
from ddmd_jax.diffusion import drawing
from ddmd_jax.diffusion.drawing import ImageName
from ddmd_jax.evaluation import pictures
from ddmd_jax.evaluation.benchmarks import Prompt
from ddmd_jax.evaluation.suites import Suite
from ddmd_jax.util import errors, files, shape
from ddmd_jax.util.errors import UserError
from ddmd_jax.util.text import first_line

FORMS = ('arrayrecord', 'png')
MANIFEST, WHOLE = 'manifest.json', 'images.arrayrecord'
PART = re.compile(r'(\d+)-(\d+)\.arrayrecord')  # first and last image of a batch
AGAIN = 'run its `evaluate` again'
_or_none = lambda like: lambda value: '' if value is None else like(value)
LIKE: dict[Any, Any] = {  # what a manifest is
    'form': shape.one_of(*FORMS), 'images': shape.count, 'names': str,
    'weights?': (str, type(None)), 'guidance?': _or_none(shape.finite), 'latents?': [int],
    **{f'{name}?': _or_none(shape.count) for name in ('steps', 'evaluations', 'step')},
    str: shape.VALUE}


class ImagesError(UserError):
    """Images that are not there, or not those that are asked for."""


def decode(data: bytes, where: str, cure: str = 'make it again') -> np.ndarray:
    """``[H, W, 3] uint8`` of an image file; raises `ImagesError`."""
    try:
        return np.asarray(pixels.decode(data, where, as_scorers=True))
    except pixels.BadImage as e:
        raise ImagesError(f'{where} {e}; {cure}') from e


class Real:
    """Images ``[n, H, W, 3]`` in [-1, 1] as bytes, which are made when they are asked for."""

    def __init__(self, images: np.ndarray):
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        return pictures.to_uint8(self._images[rows])


class Held:
    """Images of one size in memory."""

    def __init__(self, named: Sequence[ImageName]):
        self.named = named
        self._images: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.named)

    def missing(self) -> list[int]:
        """Numbers of images that are still to be drawn."""
        return [i for i in range(len(self)) if i not in self._images]

    def add(self, rows: Sequence[int], images: np.ndarray) -> None:
        """Takes ``[k, H, W, 3] uint8``, the images of these numbers."""
        self._images |= zip(rows, images, strict=True)

    def finish(self) -> None:
        """Called when no image is missing."""

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        return np.stack([self._images[int(row)] for row in rows])


class Kept:
    """Images of one size in a folder.

    Args:
      folder: their own; made if it is not there.
      named: which images.
      form: one of `FORMS`.
    """

    def __init__(self, folder: Path, named: Sequence[ImageName], form: str):
        self.folder, self.named, self._form = folder, named, form
        self.about: dict[str, Any] = {}
        self._files = drawing.file_names(named, '.png') if form == 'png' else []
        self._records: records.Records | None = None
        self._size: tuple[int, ...] = ()

    def claim(self, about: Mapping[str, Any]) -> None:
        """Says how the images are drawn (JSON), before the first of them.

        Raises:
          ImagesError: the folder holds images of other prompts, weights or settings, or of
            nobody knows which.
        """
        self.about, found = dict(about), manifest(self.folder)
        here = {**self.about, 'form': self._form, 'images': len(self),
                'names': drawing.digest(self.named)}
        if found is None:
            if any(self.folder.glob('*.arrayrecord')) or any(self.folder.glob('*.png')):
                raise ImagesError(f'{self.folder} holds images without the {MANIFEST} that says of '
                                  'what they are; choose another --out, or move it away')
            self.folder.mkdir(parents=True, exist_ok=True)
            return files.write_json(self.folder / MANIFEST, here, sync=True)
        for name in {**found, **here}:
            if found.get(name) != here.get(name):
                was, asked = (' '.join(str(x.get(name)).split())[:200] for x in (found, here))
                same = 'give the --seed, --count and --limit that they were drawn with, ' if (
                    name in ('images', 'names')) else ''
                raise ImagesError(f'{self.folder} holds images of {name} {was}, asked for is '
                                  f'{asked}; {same}choose another --out, or delete it')

    def __len__(self) -> int:
        return len(self.named)

    def missing(self) -> list[int]:
        if self._files:
            return [i for i, name in enumerate(self._files) if not (self.folder / name).is_file()]
        if (self.folder / WHOLE).is_file():
            return []
        there = {i for first, last in self._parts() for i in range(first, last + 1)}
        return [i for i in range(len(self)) if i not in there]

    def _parts(self) -> list[tuple[int, int]]:
        there = self.folder.iterdir() if self.folder.is_dir() else ()
        parts = sorted((int(found[1]), int(found[2])) for file in there
                       if (found := PART.fullmatch(file.name)))
        return [(first, last) for first, last in parts if first <= last < len(self)]

    def add(self, rows: Sequence[int], images: np.ndarray) -> None:
        with ThreadPoolExecutor() as pool:  # zlib lets other threads run; devices wait for this
            found = dict(zip(rows, pool.map(self._encoded, rows, images), strict=True))
        if self._files:
            for row, data in found.items():
                files.write(self.folder / self._files[row], data)
            return
        for run in _runs(rows):
            with files.replacing(self.folder / f'{run[0]:06d}-{run[-1]:06d}.arrayrecord') as path:
                records.write(path, [found[row] for row in run])

    def _encoded(self, row: int, image: np.ndarray) -> bytes:
        name = self.named[row]
        return pictures.png(image, {
            'prompt': name.prompt, 'image': str(name.number), 'seed': str(name.seed),
            **{key: str(value) for key, value in self.about.items()}})

    def finish(self) -> None:
        if self._files:
            return
        parts = self._parts()
        if not (self.folder / WHOLE).is_file():
            if [i for first, last in parts for i in range(first, last + 1)] != [*range(len(self))]:
                raise ImagesError(f'{self.folder} holds some images twice; move it away, then '
                                  f'{AGAIN}')
            with files.replacing(self.folder / WHOLE, sync=True) as path:
                records.write(path, (data for first, last in parts
                                     for data in self._part(first, last)))
        for first, last in parts:  # also those that a killed process had merged already
            files.remove(self.folder / f'{first:06d}-{last:06d}.arrayrecord')

    def _part(self, first: int, last: int) -> list[bytes]:
        file = self.folder / f'{first:06d}-{last:06d}.arrayrecord'
        count = last + 1 - first
        return records.Records([file], count, f'{file} is damaged', 'delete it').read(range(count))

    def _opened(self) -> records.Records:
        """All images, also if the process that drew the last was killed before they were merged."""
        if (whole := self.folder / WHOLE).is_file():
            return records.Records([whole], len(self), f'{whole} is damaged',
                                   f'delete it, then {AGAIN}')
        parts = [self.folder / f'{first:06d}-{last:06d}.arrayrecord'
                 for first, last in self._parts()]
        if not parts:
            raise ImagesError(f'{whole} is missing; {AGAIN}')
        return records.Records(parts, len(self), f'{parts[0]} or one after it is damaged', AGAIN)

    def read(self, row: int) -> np.ndarray:
        """``[H, W, 3] uint8`` of an image that is there; raises `ImagesError`, `DataFileError`."""
        if self._files:
            where = str(self.folder / self._files[row])
            image = read_file(Path(where), f'delete it, then {AGAIN}')
        else:
            self._records = self._records or self._opened()
            where = f'{self.folder / WHOLE}, image {row},'
            image = decode(self._records.read([row])[0], where,
                           f'delete that file, then {AGAIN}')
        self._size = self._size or image.shape
        if image.shape != self._size:
            (h, w, _), (height, width, _) = image.shape, self._size
            raise ImagesError(f'{where} is {h} x {w} pixels, another of its row {height} x '
                              f'{width}; move {self.folder} away, then {AGAIN}')
        return image

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        return np.stack([self.read(int(row)) for row in rows])

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self.read(row) for row in range(len(self)))


def opened(folder: Path, named: Sequence[ImageName]) -> Kept:
    """The images in a folder of `Kept` that another command has made; raises `ImagesError`."""
    if (found := manifest(folder)) is None:
        raise ImagesError(f'{folder} holds no images of an evaluation: there is no {MANIFEST}')
    mine = {name: value for name, value in found.items()
            if name not in ('form', 'images', 'names')}
    kept = Kept(folder, named, found['form'])
    kept.claim(mine)
    if missing := kept.missing():
        raise ImagesError(f'{folder} lacks {len(missing)} of {len(kept)} images; {AGAIN}')
    return kept


def manifest(folder: Path) -> dict[str, Any] | None:
    """What a folder of `Kept` says of its images; None if it says nothing.

    Raises:
      ImagesError: it is no JSON, or not what `Kept.claim` writes.
      EnvironmentFault: it cannot be read.
    """
    path = folder / MANIFEST
    try:
        return shape.load(files.patiently(path.read_bytes), LIKE)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as e:
        errors.raise_environment(e, path)
        raise ImagesError(f'{path} is damaged ({first_line(e)}), and says of what the images '
                          f'beside it are; move {folder} away, then {AGAIN}') from e


def _runs(rows: Sequence[int]) -> list[list[int]]:
    """Numbers that follow one another, together."""
    runs: list[list[int]] = []
    for row in map(int, rows):
        if runs and runs[-1][-1] + 1 == row:
            runs[-1].append(row)
        else:
            runs.append([row])
    return runs


def read_file(file: Path, cure: str = 'make it again') -> np.ndarray:
    """``[H, W, 3] uint8``; raises `ImagesError`."""
    try:
        data = file.read_bytes()
    except OSError as e:
        errors.raise_environment(e, file)
        raise ImagesError(f'{file} is missing ({e.strerror})') from e
    return decode(data, str(file), cure)


# --- Folders of others ---


def places(suite: Suite, prompts: Sequence[Prompt], number: int) -> list[list[str]]:
    """Where the suite's scorer looks for the `number` images of each prompt."""
    return [[suite.place(prompt, i, k) for k in range(number)] for i, prompt in enumerate(prompts)]


class Folder:
    """The images of a folder in the layout of a suite, or of all its images in a plain one.

    Attributes:
      rows: numbers of the images that are there and can be decoded, of all that were asked for.
      faults: what is wrong with the others, a line each.
    """

    def __init__(self, folder: Path, suite: Suite, prompts: Sequence[Prompt]):
        self._where: list[tuple[Path, int | None]] = []
        for found in places(suite, prompts, suite.images):
            self._where += [(folder / place, k if suite.tiled else None)
                            for k, place in enumerate(found)]
        self.rows: list[int] = []
        self.faults: list[str] = []
        if not folder.is_dir():
            raise ImagesError(f'{folder} is no folder of images')
        told = set()
        for row, (file, _) in enumerate(self._where):
            try:
                self._read(row)
                self.rows.append(row)
            except ImagesError as e:
                if file not in told:
                    self.faults.append(str(e))
                told.add(file)
        if not self.rows:
            raise ImagesError(f'{folder} holds none of the {len(self._where)} images of '
                              f'{suite.name}; the first would be {self._where[0][0]}')

    def _read(self, row: int) -> np.ndarray:
        file, tile = self._where[row]
        image = read_file(file)
        if tile is not None and (image.shape[0] % 2 or image.shape[1] % 2):
            raise ImagesError(f'{file} is {image.shape[0]} x {image.shape[1]} pixels, not four '
                              'images in rows of two; make it again')
        return image if tile is None else untiled(image, tile)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self._read(row) for row in self.rows)


class Plain:
    """All images in a folder and below it, by name, as `prepare images` finds them: a set to
    compare with."""

    def __init__(self, folder: Path):
        names = sources.files_below(folder) if folder.is_dir() else ()
        self.files = sorted(folder / name for name in names
                            if Path(name).suffix.lower() in pixels.SUFFIXES)
        if not self.files:
            raise ImagesError(f'{folder} holds no images ({", ".join(pixels.SUFFIXES)})')

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[np.ndarray]:
        return map(read_file, self.files)


def tiled(images: Sequence[np.ndarray]) -> np.ndarray:
    """Images of one size in rows of two."""
    return np.concatenate([np.concatenate(list(images[i:i + 2]), axis=1)
                           for i in range(0, len(images), 2)], axis=0)


def untiled(image: np.ndarray, tile: int) -> np.ndarray:
    """One of the four images of `tiled`."""
    height, width = image.shape[0] // 2, image.shape[1] // 2
    row, column = divmod(tile, 2)
    return image[row * height:(row + 1) * height, column * width:(column + 1) * width]


def write_official(folder: Path, suite: Suite, prompts: Sequence[Prompt], images: Kept) -> None:
    """The images as the suite's own scorer expects them, in place of files that are there."""
    for i, (prompt, found) in enumerate(zip(prompts, places(suite, prompts, suite.images))):
        rows = range(i * suite.images, (i + 1) * suite.images)
        each = {found[0]: rows} if suite.tiled else {place: [row] for place, row
                                                     in zip(found, rows)}
        for place, of in each.items():
            file = folder / place
            file.parent.mkdir(parents=True, exist_ok=True)
            image, out = tiled([images.read(row) for row in of]), io.BytesIO()
            if file.suffix == '.jpg':
                Image.fromarray(image).save(out, 'JPEG', quality=95)
            else:
                Image.fromarray(image).save(out, 'PNG')
            try:
                files.write(file, out.getvalue())
            except OSError as e:
                errors.raise_environment(e, file)
                raise DataFileError(f'{file} cannot be written ({e.strerror})') from e
        if suite.beside:
            place, content = suite.beside(prompt)
            files.write(folder / place, content)
