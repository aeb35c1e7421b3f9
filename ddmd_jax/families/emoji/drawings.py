"""The drawings that scenes are composed of: objects, each drawn by four vendors' emoji sets.

They ship with the package as ArrayRecord behind a TFDS builder;
`python -m ddmd_jax.prepare emoji` makes them (`make_drawings`).
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ddmd_jax.data import DataFileError
from ddmd_jax.util import errors
from ddmd_jax.util.text import first_line

FILES = Path(__file__).parent / 'files'
DRAWINGS = FILES / 'drawings'
VERSION = '1.0.0'
EDGE = 112  # pixels of a drawing's longer side
RESTORE_HINT = 'reinstall the package'


class IconSet(NamedTuple):
    """A vendor's emoji set, and the npm package that holds it as SVG."""

    package: str
    version: str
    vendor: str
    licence: str


SETS = (
    IconSet('noto', '1.2.9', 'Google, Noto Emoji', 'Apache-2.0'),
    IconSet('fluent-emoji-flat', '1.2.6', 'Microsoft, Fluent Emoji', 'MIT'),
    IconSet('twemoji', '1.2.5', 'Twitter, Twemoji', 'CC-BY-4.0'),
    IconSet('emojione', '1.2.3', 'Emoji One 2', 'CC-BY-4.0'),
)
# Objects that look unlike one another at 28 pixels, and their icon's name.
OBJECTS = {
    'dog': 'dog-face', 'cat': 'cat-face', 'lion': 'lion', 'pig': 'pig-face',
    'elephant': 'elephant', 'rabbit': 'rabbit-face', 'panda': 'panda', 'fox': 'fox',
    'penguin': 'penguin', 'owl': 'owl', 'frog': 'frog', 'turtle': 'turtle',
    'whale': 'spouting-whale', 'octopus': 'octopus', 'butterfly': 'butterfly',
    'red apple': 'red-apple', 'banana': 'banana', 'bunch of grapes': 'grapes',
    'watermelon': 'watermelon', 'pineapple': 'pineapple', 'strawberry': 'strawberry',
    'carrot': 'carrot', 'hamburger': 'hamburger', 'mushroom': 'mushroom',
    'car': 'automobile', 'rocket': 'rocket', 'sailboat': 'sailboat', 'house': 'house',
    'balloon': 'balloon', 'gift': 'wrapped-gift', 'cactus': 'cactus', 'sunflower': 'sunflower',
}


def load(path: Path = DRAWINGS) -> tuple[tuple[str, ...], list[list[np.ndarray]]]:
    """(names of objects, drawings of each: ``[h, w, 4]`` uint8 RGBA), in the order of `OBJECTS`.

    Raises:
      DataFileError: the data set is missing, damaged or of another version.
    """
    import tensorflow_datasets as tfds

    if not (path / 'dataset_info.json').exists():
        raise DataFileError(f'data set missing: {path}; {RESTORE_HINT}')
    try:
        builder = tfds.builder_from_directory(path)
        version = str(builder.version)
        source = builder.as_data_source('train', decoders={'drawing': tfds.decode.SkipDecoding()})
        rows = [source[i] for i in range(len(source))] if version == VERSION else []
        found: dict[str, dict[str, np.ndarray]] = {name: {} for name in OBJECTS}
        for row in rows:
            picture = Image.open(io.BytesIO(row['drawing'])).convert('RGBA')
            name, by = row['object'].decode(), row['set'].decode()
            if max(picture.size) != EDGE or picture.getbbox() is None or by in found[name]:
                raise ValueError(f'the {name} of {by} is not one drawing of {EDGE} pixels')
            found[name][by] = np.asarray(picture)
    except Exception as e:  # array_record raises bare RuntimeError, whatever the cause
        errors.raise_environment(e, path)
        raise DataFileError(f'data set damaged: {path} ({first_line(e)}); {RESTORE_HINT}') from e
    if version != VERSION:
        raise DataFileError(f'data set {path} is of version {version}, this package reads '
                            f'{VERSION}; {RESTORE_HINT}')
    wanted = {icons.package for icons in SETS}
    if missing := [name for name, by_set in found.items() if set(by_set) != wanted]:
        raise DataFileError(f'data set damaged: {path} (drawings of {missing[0]} are not those of '
                            f'{", ".join(sorted(wanted))}); {RESTORE_HINT}')
    return tuple(found), [[by_set[icons.package] for icons in SETS] for by_set in found.values()]
