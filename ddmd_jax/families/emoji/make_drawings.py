"""Makes the drawings that ship with the package, from the npm packages of four emoji sets.

    npm pack @iconify-json/noto@1.2.9 @iconify-json/fluent-emoji-flat@1.2.6 \\
        @iconify-json/twemoji@1.2.5 @iconify-json/emojione@1.2.3
    python -m ddmd_jax.prepare emoji --packages=DIR --out=DIR
"""

from __future__ import annotations

import io
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from PIL import Image

from ddmd_jax.families.emoji.drawings import DRAWINGS, EDGE, OBJECTS, SETS, VERSION, IconSet
from ddmd_jax.util import files, shape
from ddmd_jax.util.errors import UserError
from ddmd_jax.util.text import first_line

NOTICE = 'LICENSES.md'  # written by hand, it goes with the drawings
RENDERED = 256  # pixels; cropped to what is drawn, then reduced to `EDGE`
EDGES = {'width?': shape.positive, 'height?': shape.positive}
LIKE = {'icons': {str: {'body': str, **EDGES}}, **EDGES}  # an icons.json


class EmojiDrawings(tfds.core.GeneratorBasedBuilder):
    """Drawings of `OBJECTS` by `SETS`: PNG of RGBA, cropped, longer side 112 pixels."""

    VERSION = tfds.core.Version(VERSION)
    RELEASE_NOTES = {str(VERSION): 'First release.'}

    def __init__(self, *, rows: list[dict[str, Any]], **kwargs: Any):
        self._rows = rows
        super().__init__(file_format='array_record', **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({
            'object': tfds.features.Text(), 'set': tfds.features.Text(),
            'drawing': tfds.features.Image(shape=(None, None, 4), encoding_format='png')})
        return tfds.core.DatasetInfo(
            builder=self, features=features,
            description='Drawings of objects from emoji sets: ' + '; '.join(
                f'{s.vendor} (@iconify-json/{s.package} {s.version}, {s.licence})' for s in SETS),
            license=', '.join(dict.fromkeys(s.licence for s in SETS)))

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, Any]]]:
        return {'train': self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, Any]]:
        yield from enumerate(self._rows)


def make(packages: Path, out: Path) -> int:
    """Writes the data set `out` from the packages' ``.tgz`` files in a folder; count of drawings.

    The data set is built in a scratch folder, and `out` is there once it is whole.

    Raises:
      UserError: a package is absent, of another version, or lacks an object; `resvg-py` is absent;
        `out` is there already.
    """
    if out.exists():
        raise UserError(f'{out} exists already; choose another place or delete it')
    rows = [{'object': name, 'set': icons.package, 'drawing': io.BytesIO(png)}
            for icons in SETS for name, png in _drawn(packages, icons)]
    with tempfile.TemporaryDirectory() as scratch:
        builder = EmojiDrawings(rows=rows, data_dir=scratch)
        tfds.disable_progress_bar()
        # Insertion order is the order of a fixed hash of the keys: the same on every machine.
        builder.download_and_prepare()
        shutil.copyfile(DRAWINGS / NOTICE, Path(builder.data_dir) / NOTICE)
        with files.replacing(out) as whole:
            shutil.copytree(builder.data_dir, whole)
    return len(rows)


def _drawn(packages: Path, icons: IconSet) -> Iterator[tuple[str, bytes]]:
    """``(object, PNG)`` for each object, as an icon set draws it."""
    try:
        import resvg_py
    except ImportError:
        raise UserError('drawings are rendered by resvg-py, which is not installed: '
                        'pip install resvg-py') from None

    found = _read(packages, icons)
    cure = f'remove the package and run `{_command(icons)}`'
    for name, icon in OBJECTS.items():
        # Emoji One 2 is of 2016 and calls four of the faces so.
        entry = found['icons'].get(icon) or found['icons'].get(f'{icon}-face')
        if entry is None:
            raise UserError(f'package @iconify-json/{icons.package} {icons.version} has no icon '
                            f'{icon!r}')
        edge = {k: entry.get(k, found.get(k, 16)) for k in ('width', 'height')}
        svg = (f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
               f' viewBox="0 0 {edge["width"]} {edge["height"]}">{entry["body"]}</svg>')
        try:
            png = resvg_py.svg_to_bytes(svg_string=svg, width=RENDERED, height=RENDERED)
        except ValueError as e:
            raise UserError(f'icon {icon!r} of @iconify-json/{icons.package} cannot be drawn '
                            f'({first_line(e)}): {cure}') from e
        picture = Image.open(io.BytesIO(bytes(png))).convert('RGBA')
        if (box := picture.getbbox()) is None:
            raise UserError(f'icon {icon!r} of @iconify-json/{icons.package} shows nothing: {cure}')
        picture = picture.crop(box)
        scale = EDGE / max(picture.size)
        size = tuple(max(1, round(extent * scale)) for extent in picture.size)
        stream = io.BytesIO()
        picture.resize(size, Image.Resampling.LANCZOS).save(stream, 'PNG', optimize=True)
        yield name, stream.getvalue()


def _command(icons: IconSet) -> str:
    return f'npm pack @iconify-json/{icons.package}@{icons.version}'


def _read(packages: Path, icons: IconSet) -> dict[str, Any]:
    """``icons.json`` of an icon set's package, its version checked."""
    command = _command(icons)
    files = sorted(packages.glob(f'iconify-json-{icons.package}-[0-9]*.tgz'))
    file = packages / f'iconify-json-{icons.package}-{icons.version}.tgz'
    if not file.exists():
        there = f'; there is {files[0].name}' if files else ''
        raise UserError(f'package {file} is missing{there}: run `{command}` in that folder')
    try:
        with tarfile.open(file) as tar:
            version = _json(tar, 'package.json', {'version': str})['version']
            found = _json(tar, 'icons.json', LIKE)
    except (OSError, KeyError, ValueError, tarfile.TarError, EOFError, zlib.error) as e:
        raise UserError(f'package {file} cannot be read ({first_line(e)}): remove it and run '
                        f'`{command}`') from e
    if version != icons.version:
        raise UserError(f'package {file} is of version {version}, not {icons.version}: remove it '
                        f'and run `{command}`')
    return found


def _json(tar: tarfile.TarFile, name: str, like: Any) -> Any:
    """What a file of a package holds; raises `KeyError` or `ValueError` if it is not there."""
    if (file := tar.extractfile(f'package/{name}')) is None:
        raise ValueError(f'{name} is no file')
    try:
        return shape.load(file.read(), like)
    except ValueError as e:
        raise ValueError(f'{name}: {first_line(e)}') from e
