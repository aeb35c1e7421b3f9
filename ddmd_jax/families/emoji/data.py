"""The embedded default: text to emoji, 24 x 24, alone on white or on a named colour.

Every image is one of some 600 Noto Color Emoji glyphs over one of seven backgrounds; its
caption is the glyph's Unicode name, with the background named unless it is white. One pair
in ten is held out of all training: objects and colours are known there, their combination
is not. Glyphs ship with the package as ArrayRecord behind a TFDS builder (SIL OFL 1.1).
"""

import dataclasses
import functools
import hashlib
from pathlib import Path

import numpy as np

from ddmd_jax.data import DataFileError
from ddmd_jax.util.text import first_line

SIZE = 24
FILES = Path(__file__).parent / 'files'
GLYPHS = FILES / 'glyphs'
TOKENIZER = FILES / 'tokenizer.json'
RESTORE_HINT = 'reinstall the package'

# Mid tones on purpose: a background that drifts towards a fuller colour is seen, where pure
# red or black would clip and hide it.
COLOURS: dict[str, tuple[int, int, int]] = {
    'white': (255, 255, 255), 'teal': (48, 148, 148), 'orange': (232, 148, 72),
    'green': (104, 172, 92), 'blue': (84, 120, 204), 'purple': (136, 92, 176),
    'pink': (236, 160, 188),
}
COLOUR_NAMES = tuple(COLOURS)


@dataclasses.dataclass(frozen=True)
class Pairs:
    """All (glyph, colour) pairs: parallel arrays of length N = glyphs x colours."""

    names: tuple[str, ...]  # of glyphs
    glyphs: np.ndarray  # [G, 24, 24, 4] uint8 RGBA, straight alpha
    glyph: np.ndarray  # [N] int32
    colour: np.ndarray  # [N] int32
    held_out: np.ndarray  # [N] bool

    def caption(self, index: int) -> str:
        return caption(self.names[self.glyph[index]], COLOUR_NAMES[self.colour[index]])

    def images(self, index: np.ndarray) -> np.ndarray:
        """``[n, 24, 24, 3]`` fp32 in [-1, 1]."""
        rgb = np.asarray([COLOURS[c] for c in COLOUR_NAMES], np.float32)[self.colour[index]]
        return compose(self.glyphs[self.glyph[index]], rgb)


def caption(name: str, colour: str) -> str:
    """The caption of a glyph `name` on a background `colour`."""
    if colour == 'white':
        return name
    article = 'an' if colour[0] in 'aeiou' else 'a'
    return f'{name} on {article} {colour} background'


def compose(glyphs: np.ndarray, rgb: np.ndarray) -> np.ndarray:
    """RGBA glyphs ``[n, H, W, 4]`` uint8 over colours ``[n, 3]`` (0-255), fp32 in [-1, 1]."""
    alpha = glyphs[..., 3:].astype(np.float32) / 255.0
    over = glyphs[..., :3].astype(np.float32) * alpha + rgb[:, None, None] * (1.0 - alpha)
    return over / 127.5 - 1.0


def is_held_out(name: str, colour: str) -> bool:
    """One pair in ten, by a hash of its words: stable when glyphs or colours are added."""
    digest = hashlib.sha256(f'{name}|{colour}'.encode()).digest()
    return int.from_bytes(digest[:4], 'big') % 10 == 0


@functools.cache
def load_pairs(path: Path = GLYPHS) -> Pairs:
    """Reads the shipped glyphs.

    Raises:
      DataFileError: the data set is missing or cannot be read.
    """
    import tensorflow_datasets as tfds

    if not (path / 'dataset_info.json').exists():
        raise DataFileError(f'data set missing: {path}; {RESTORE_HINT}')
    try:
        source = tfds.builder_from_directory(path).as_data_source('train')
        rows = [source[i] for i in range(len(source))]
    except Exception as e:  # array_record raises bare RuntimeError/ValueError by cause
        reason = first_line(e)
        raise DataFileError(f'data set damaged: {path} ({reason}); {RESTORE_HINT}') from e
    names = tuple(r['name'].decode() if isinstance(r['name'], bytes) else r['name'] for r in rows)
    glyph, colour = np.divmod(np.arange(len(rows) * len(COLOURS)), len(COLOURS))
    held = [is_held_out(names[g], COLOUR_NAMES[c]) for g, c in zip(glyph, colour)]
    return Pairs(names, np.stack([r['glyph'] for r in rows]), glyph.astype(np.int32),
                 colour.astype(np.int32), np.asarray(held))


def training_mixture(pairs: Pairs, white_repeat: int) -> np.ndarray:
    """Indices of one epoch of training pairs; white ones stand in it `white_repeat` times."""
    seen = np.flatnonzero(~pairs.held_out)
    white = seen[pairs.colour[seen] == COLOUR_NAMES.index('white')]
    return np.concatenate([seen] + [white] * (white_repeat - 1))
