"""Images with captions, by number: of a folder, of WebDataset's tars, or of a TFDS data set.

A source is listed once, by names alone, and read at random, so that any process can take any part
of it. Its order is that of names in a folder, and as they lie in tars and data sets. What was asked
for, and files' sizes and times of change, tell it from another one without reading any image.
"""

import bisect
import hashlib
import itertools
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

from ddmd_jax.data import DataFileError
from ddmd_jax.data.images.pixels import SUFFIXES
from ddmd_jax.data.prompts import files
from ddmd_jax.data.prompts.text import normalise
from ddmd_jax.util import errors, places, shape
from ddmd_jax.util.text import first_line

TFDS = 'tfds:'


class Fields(NamedTuple):
    """Names of what is read: of captions and files in tables, of captions and images in TFDS."""

    caption: str = 'caption'
    file: str = 'file_name'
    image: str = 'image'
    split: str = 'train'


USUAL = Fields()


class State(NamedTuple):
    """What tells an image, and its caption, from changed ones, without reading the image."""

    image: str
    caption: str


class Entry(NamedTuple):
    """One image: its name, its encoded bytes, its caption, '' if it has none, and its state.

    `caption` raises `ValueError`, `DataFileError` or `OSError` where it cannot be read.
    """

    name: str
    read: Callable[[], bytes]
    caption: Callable[[], str]
    state: Callable[[], State]


class Source(Sequence):
    """Entries of several inputs, one after another.

    Attributes:
      listing: names all of them, in one hash.
      asked: flags that count for these inputs, with their values; paths without their folders.
    """

    def __init__(self, parts: Sequence[Sequence[Entry]], names: Iterator[str],
                 asked: Mapping[str, Any]):
        self._parts, self.asked = parts, asked
        self._ends = list(itertools.accumulate(map(len, parts)))
        digest = hashlib.sha256()
        for name in names:
            digest.update(name.encode('utf-8', 'surrogateescape') + b'\0')
        self.listing = digest.hexdigest()[:16]

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Entry:  # type: ignore[override]  # no slices
        part = bisect.bisect_right(self._ends, index)
        return self._parts[part][index - (self._ends[part - 1] if part else 0)]

    def states(self, first: int, last: int) -> dict[str, str]:
        """Of the entries from `first` to before `last`: names of both ends, a hash of the images'
        states and one of the captions'."""
        images, captions = hashlib.sha256(), hashlib.sha256()
        for index in range(first, last):
            state = self[index].state()
            for digest, one in ((images, state.image), (captions, state.caption)):
                digest.update(one.encode('utf-8', 'surrogatepass') + b'\0')
        return {'first': printable(self[first].name), 'last': printable(self[last - 1].name),
                'images': images.hexdigest()[:16], 'captions': captions.hexdigest()[:16]}


def printable(name: str) -> str:
    """A file's name; bytes of it that are no text are written as their numbers."""
    return name.encode('utf-8', 'backslashreplace').decode()


def _state(path: Path) -> str:
    """Size and time of change of a file, '' if it is not there."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return ''
    return f'{found.st_size} {found.st_mtime_ns}'


def open_source(inputs: Sequence[str], captions: str = '', fields: Fields = USUAL) -> Source:
    """The images of `inputs`: folders, ``.tar`` files, or ``tfds:`` and a name or a folder.

    Captions of a folder's images are in `captions`, a .jsonl, .csv, .tsv or .parquet with a column
    of files beside that of captions, or else in ``NAME.txt`` beside ``NAME.jpg``; those of a tar in
    ``KEY.txt`` or in a field of ``KEY.json``.

    Raises:
      DataFileError: an input is missing, of no known kind, holds no images, or none has a caption;
        there are captions for no folder, or two captions of one image.
      PlaceError: an input, or `captions`, is not on this machine.
    """
    parts: list[Any] = []
    names: list[Iterator[str]] = []
    called: list[str] = []
    table = _table(Path(places.of(captions, places.LOCAL)), fields) if captions else None
    for given in inputs:
        tfds = given.startswith(TFDS)
        path = Path(places.of(given.removeprefix(TFDS) if tfds else given, places.LOCAL))
        if tfds:
            part: Any = Tfds(given.removeprefix(TFDS), path, fields)
        elif path.is_dir():
            part = Folder(path, table)
        elif path.is_file() and path.suffix.lower() == '.tar':
            part = Tar(path, fields.caption)
        else:
            what = 'is not there' if not path.exists() else f'is of unknown kind {path.suffix!r}'
            raise DataFileError(f'--input {given} {what}; known are a folder of images, .tar files '
                                f'of WebDataset, and {TFDS}NAME')
        parts.append(part)
        called.append(printable(path.name))
        names.append(part.names())
    folders = [part for part in parts if isinstance(part, Folder)]
    if table is not None:
        _check_meant(captions, table, folders)
    used = set().union(*(part.FLAGS for part in parts))
    if folders and table is not None:
        used |= {'field', 'file_field'}
    values = {'captions': os.path.basename(captions) or 'NAME.txt', 'field': fields.caption,
              'file_field': fields.file, 'image_field': fields.image, 'split': fields.split}
    asked = {'input': called,
             **{flag: printable(value) for flag, value in values.items() if flag in used}}
    return Source(parts, itertools.chain(*names), asked)


def _check_meant(captions: str, table: Mapping[str, str], folders: Sequence[Any]) -> None:
    """Raises unless each name in the table can only mean one image."""
    if not folders:
        raise DataFileError(f'--captions {captions} is for the images of a folder, and --input '
                            'names none; leave it out: tars and data sets have their own')
    seen: set[str] = set()
    for folder in folders:
        mine = table.keys() & set(folder.names())
        if both := seen & mine:
            raise DataFileError(f'--captions {captions} names {printable(min(both))}, which is in '
                                'two folders of --input; give one folder at a time, or that '
                                'which holds both')
        seen |= mine


def _table(path: Path, fields: Fields) -> dict[str, str]:
    """Captions by file of a table that has both, a file once."""
    if path.suffix.lower() == '.txt':
        raise DataFileError(f'--captions {path} is no table; give a .jsonl, .csv, .tsv or .parquet '
                            f'with the fields {fields.file} and {fields.caption}')
    rows = zip(files.read(path, fields.file), files.read(path, fields.caption), strict=True)
    found: dict[str, str] = {}
    for name, caption in rows:
        if not name:  # of no image
            continue
        there = found.setdefault(os.path.normpath(name), caption)
        if normalise(there) != normalise(caption):
            raise DataFileError(
                f'--captions {path} names {name} twice, with {normalise(there)[:60]!r} and with '
                f'{normalise(caption)[:60]!r}; leave it one row')
    return found


def files_below(path: Path) -> Iterator[str]:
    """Files in a folder and in folders in it, relative to it; hidden ones are left out, links
    followed.

    Raises:
      DataFileError: a folder cannot be listed.
    """
    real = lambda *at: os.path.join(os.path.realpath(os.path.join(*at)), '')

    def unlisted(error: OSError) -> None:
        errors.raise_environment(error)
        raise DataFileError(f'{error.filename} cannot be listed ({error.strerror}); see to it, '
                            'or move it elsewhere') from error

    for folder, inside, names in os.walk(path, onerror=unlisted, followlinks=True):
        inside[:] = sorted(  # a link that leads back would be followed forty times
            name for name in inside if not name.startswith('.')
            and not real(folder).startswith(real(folder, name)))
        yield from (os.path.normpath(os.path.join(os.path.relpath(folder, path), name))
                    for name in names if not name.startswith('.'))


class Folder(Sequence):
    """Images in a folder and in folders in it, by name; hidden ones are left out.

    Raises:
      DataFileError: there are none, or none that has a caption.
    """

    FLAGS: Set[str] = {'captions'}

    def __init__(self, path: Path, table: Mapping[str, str] | None):
        self.path, self._table = path, table
        self._files, texts = [], set()
        for relative in files_below(path):
            stem, suffix = os.path.splitext(relative)
            if suffix.lower() in SUFFIXES:
                self._files.append(relative)
            elif suffix == '.txt':
                texts.add(stem)
        self._files.sort()
        if not self._files:
            raise DataFileError(f'{path} holds no images; known are {", ".join(SUFFIXES)}')
        has = table.__contains__ if table is not None else (
            lambda name: os.path.splitext(name)[0] in texts)
        if not any(map(has, self._files)):
            where = ('put the caption of NAME.jpg into NAME.txt beside it, or give a table of them '
                     'with --captions') if table is None else (
                f'the table of --captions names none of them, such as {printable(self._files[0])}')
            raise DataFileError(f'{path} holds {len(self._files)} images without captions; {where}')

    def __len__(self) -> int:
        return len(self._files)

    def names(self) -> Iterator[str]:
        return iter(self._files)

    def __getitem__(self, index: int) -> Entry:  # type: ignore[override]
        name = self._files[index]
        return Entry(name, (self.path / name).read_bytes, lambda: self._caption(name),
                     lambda: self._state(name))

    def _state(self, name: str) -> State:
        file = self.path / name
        return State(_state(file), _state(file.with_suffix('.txt')) if self._table is None
                     else f'text {self._caption(name)}')

    def _caption(self, name: str) -> str:
        if self._table is not None:
            return normalise(self._table.get(name, ''))
        file = (self.path / name).with_suffix('.txt')
        return normalise(files.text(file.read_bytes(), file.name)) if file.is_file() else ''


class Tar(Sequence):
    """A WebDataset shard: members that are called alike up to the first dot are one example.

    Headers are read when it is opened, members when they are asked for.

    Raises:
      DataFileError: it is no tar, cut short, holds a member twice, or no image with a caption.
    """

    FLAGS: Set[str] = {'field'}

    def __init__(self, path: Path, field: str):
        self.path, self._field, self._state = path, field, _state(path)
        examples: dict[str, dict[str, tuple[int, int]]] = {}
        try:
            with tarfile.open(path, 'r:') as tar:
                for member in tar:
                    folder, name = os.path.split(member.name)
                    key, _, kind = name.partition('.')
                    if member.isfile() and key:
                        parts = examples.setdefault(os.path.join(folder, key), {})
                        if f'.{kind.lower()}' in parts:  # WebDataset refuses it too
                            raise DataFileError(f'{path} holds {printable(member.name)} twice; pack'
                                                ' it anew with names that differ')
                        parts[f'.{kind.lower()}'] = member.offset_data, member.size
                end = tar.offset
            with path.open('rb') as file:  # a damaged header, or none, ends the loop as quietly
                file.seek(end)
                if any(file.read(tarfile.BLOCKSIZE) or b'no'):
                    raise tarfile.ReadError(f'its members end at byte {end} without a mark')
        except (tarfile.TarError, OSError, EOFError) as e:
            errors.raise_environment(e, path)
            raise DataFileError(f'{path} is no whole tar ({first_line(e)}); fetch it again, and '
                                'unpack it if it is compressed') from e
        self._examples = []
        for key, parts in examples.items():
            image = next((kind for kind in SUFFIXES if kind in parts), None)
            if image:
                text = next((kind for kind in ('.txt', '.json') if kind in parts), '')
                self._examples.append((key, parts[image], text, parts.get(text, (0, 0))))
        if not self._examples:
            raise DataFileError(f'{path} holds no images; known are {", ".join(SUFFIXES)}')
        if not any(text for _, _, text, _ in self._examples):
            raise DataFileError(f'{path} holds {len(self._examples)} images without captions; pack '
                                'KEY.txt or KEY.json beside each KEY.jpg')

    def __len__(self) -> int:
        return len(self._examples)

    def names(self) -> Iterator[str]:
        return (f'{self.path.name}/{key}' for key, *_ in self._examples)

    def __getitem__(self, index: int) -> Entry:  # type: ignore[override]
        key, image, text, caption = self._examples[index]
        return Entry(f'{self.path.name}/{key}', lambda: self._read(*image),
                     lambda: self._caption(key + text, caption),
                     lambda: State(f'{self._state} {image}', f'{self._state} {caption}'))

    def _read(self, offset: int, size: int) -> bytes:
        with self.path.open('rb') as file:
            file.seek(offset)
            return file.read(size)

    def _caption(self, name: str, place: tuple[int, int]) -> str:
        if not name.endswith(('.txt', '.json')):
            return ''
        text = files.text(self._read(*place), os.path.basename(name))
        if name.endswith('.txt'):
            return normalise(text)
        found = shape.load(text.encode(), {}).get(self._field)
        return normalise(_as_text(found, self._field))


def _as_text(found: Any, field: str) -> str:
    """A caption that was read; raises `ValueError` unless it is text, or nothing."""
    if isinstance(found, bytes):
        found = found.decode()
    if not isinstance(found, str | None):
        raise ValueError(f'{field!r} is {found!r:.40}, not a text')
    return found or ''


class Tfds(Sequence):
    """A split of a TensorFlow Datasets builder, of that name or in `folder`; nothing is downloaded.

    Raises:
      DataFileError: there is no such data set, split or field.
    """

    FLAGS: Set[str] = {'field', 'image_field', 'split'}

    def __init__(self, name: str, folder: Path, fields: Fields):
        import tensorflow_datasets as tfds

        self._name, self._fields = name, fields
        try:
            there = (folder / 'dataset_info.json').is_file()
            builder = tfds.builder_from_directory(folder) if there else tfds.builder(name)
            missing = {fields.image, fields.caption} - set(builder.info.features)
            if missing:
                raise DataFileError(f'{TFDS}{name} has no field {min(missing)!r}; there are '
                                    f'{", ".join(sorted(builder.info.features))}; name one with '
                                    '--image_field or --field')
            self._rows = builder.as_data_source(
                fields.split, decoders={fields.image: tfds.decode.SkipDecoding()})
            self._state = ', '.join(f'{file.name} {_state(file)}' for file in sorted(
                Path(builder.data_dir).iterdir()))
        except DataFileError:
            raise
        except Exception as e:  # of a registry, a split, a file: they have no common ancestor
            errors.raise_environment(e)
            raise DataFileError(f'{TFDS}{name} cannot be read ({first_line(e)}); give the name or '
                                "the folder of a builder whose data are there, and its --split"
                                ) from e

    def __len__(self) -> int:
        return len(self._rows)

    def names(self) -> Iterator[str]:
        return (f'{self._name}/{self._fields.split}/{i}' for i in range(len(self)))

    def __getitem__(self, index: int) -> Entry:  # type: ignore[override]
        def caption() -> str:
            field = self._fields.caption
            return normalise(_as_text(self._rows[index][field], field))

        return Entry(f'{self._name}/{self._fields.split}/{index}',
                     lambda: bytes(self._rows[index][self._fields.image]), caption,
                     lambda: State(self._state, self._state))
