"""The embedded world: scenes of emoji, 64 x 64 pixels, composed from drawings on the fly.

A scene has one object ("a small cat on a teal background") or two ("a red apple left of a dog
on a pink background"). What its caption leaves open is drawn at random: whose drawing of an
object, mirrored or not, its exact size, its place, the shade of the background. So a caption has
thousands of right images. One (object, background) in ten, and one pair of objects in ten, is
held out of all training; which ones is a hash of their words.

Objects lie in square boxes on a grid of 8 pixels, the edge of one image token of the teacher.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import multiprocessing
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from ddmd_jax.families.emoji import drawings

SIDE, GRID = 64, 8  # pixels
# Mid tones on purpose: a background that drifts towards a fuller colour is seen, where pure red or
# black would clip and hide it.
COLOURS: dict[str, tuple[int, int, int]] = {
    'cream': (228, 214, 188), 'yellow': (232, 204, 96), 'orange': (232, 152, 80),
    'green': (112, 176, 96), 'teal': (64, 160, 156), 'blue': (88, 124, 204),
    'purple': (140, 100, 180), 'pink': (236, 164, 192),
}
COLOUR_NAMES = tuple(COLOURS)
SHADES = 0.9, 1.1  # of the background: factors of its colour
SIZES = ('small', 'plain', 'large')  # `plain` is what a caption without a word for it means
EDGES = ((28, 30, 32), (40, 44, 48), (56,))  # of an object's longer side, in pixels, by size
PAIR_EDGES = EDGES[0]
RELATIONS = ('left of', 'right of', 'above', 'below')
SHARE_OF_PAIRS = 0.55
ONE, BESIDE, STACKED = range(3)  # layouts


@dataclasses.dataclass(frozen=True)
class Scene:
    """The content of a caption.

    Attributes:
      first, second: objects in the caption's order, by number; `second` is None if there is one.
      size: index in `SIZES`; of two objects it is small, and goes without saying.
      colour: of the background, index in `COLOUR_NAMES`.
      relation: of `first` to `second`, in `RELATIONS`; empty if there is one object.
    """

    first: int
    second: int | None
    size: int
    colour: int
    relation: str = ''

    @property
    def layout(self) -> int:
        if self.second is None:
            return ONE
        return BESIDE if self.relation in ('left of', 'right of') else STACKED

    @property
    def places(self) -> tuple[int, ...]:
        """Objects from left to right, or from the top down."""
        if self.second is None:
            return (self.first,)
        swapped = self.relation in ('right of', 'below')
        return (self.second, self.first) if swapped else (self.first, self.second)


class World:
    """Scenes over a set of drawings.

    Attributes:
      names: of the objects.
      drawings: of each object, ``[h, w, 4]`` uint8 RGBA, not premultiplied, longer side `EDGE`.
      identity: names the objects, their drawings and sizes, and the colours.
    """

    def __init__(self, names: Sequence[str], pictures: Sequence[Sequence[np.ndarray]]):
        self.names, self.drawings = tuple(names), pictures
        digest = hashlib.sha256(repr((self.names, COLOURS, EDGES)).encode())
        for picture in (picture for several in pictures for picture in several):
            digest.update(picture.tobytes())
        self.identity = digest.hexdigest()[:16]
        self._sprites: dict[tuple[int, int, int, bool], np.ndarray] = {}

    # ------------------------------------------------------------------------------ captions

    def caption(self, scene: Scene) -> str:
        size = SIZES[scene.size] if scene.second is None and SIZES[scene.size] != 'plain' else ''
        text = _with_article(f'{size} {self.names[scene.first]}'.strip())
        if scene.second is not None:
            text += f' {scene.relation} {_with_article(self.names[scene.second])}'
        return f'{text} on {_with_article(COLOUR_NAMES[scene.colour])} background'

    def held_out(self, scene: Scene) -> bool:
        """Whether its objects, or one of them and the background, never meet in training."""
        names = [self.names[i] for i in scene.places]
        together = [(name, COLOUR_NAMES[scene.colour]) for name in names]
        if scene.second is not None:
            together.append((min(names), max(names)))
        return any(_one_in_ten(*words) for words in together)

    # -------------------------------------------------------------------------------- scenes

    def draw_scene(self, rng: np.random.Generator) -> Scene:
        """Any scene, held out or not: one or two objects, their size or relation, a colour."""
        colour = int(rng.integers(len(COLOURS)))
        first = int(rng.integers(len(self.names)))
        if rng.random() >= SHARE_OF_PAIRS:
            return Scene(first, None, int(rng.integers(len(SIZES))), colour)
        second = int((first + 1 + rng.integers(len(self.names) - 1)) % len(self.names))
        return Scene(first, second, 0, colour, RELATIONS[rng.integers(len(RELATIONS))])

    def scene(self, rng: np.random.Generator, held_out: bool = False) -> Scene:
        """A scene of training, or one that is held out of it."""
        while True:
            scene = self.draw_scene(rng)
            if self.held_out(scene) == held_out:
                return scene

    def batch(self, seed: int, numbers: Iterable[int]) -> tuple[list[Scene], np.ndarray]:
        """Training scenes by number, and an image of each: ``[n, 64, 64, 3]`` uint8.

        A scene and its image depend on `seed` and their number alone.
        """
        scenes, images = [], []
        for number in numbers:
            rng = rng_of(seed, number)
            scenes.append(self.scene(rng))
            images.append(self.image(scenes[-1], rng))
        return scenes, np.stack(images)

    def batches(self, seed: int, parts: Iterable[Sequence[int]],
                processes: int) -> Iterator[tuple[list[Scene], np.ndarray]]:
        """What `batch` gives for each of `parts`, in their order, made by other processes."""
        # Spawned, not forked: a process that runs JAX has threads.
        with ProcessPoolExecutor(processes, multiprocessing.get_context('spawn'), _receive,
                                 (self,)) as pool:
            yield from pool.map(_compose, itertools.repeat(seed), parts)

    # -------------------------------------------------------------------------------- images

    def image(self, scene: Scene, rng: np.random.Generator) -> np.ndarray:
        """One of the right images of a scene, ``[64, 64, 3]`` uint8."""
        shade = np.asarray(COLOURS[COLOUR_NAMES[scene.colour]], np.float32) * rng.uniform(*SHADES)
        return self.compose(scene, np.minimum(shade, 255.0), rng)

    def compose(self, scene: Scene, background: np.ndarray,
                rng: np.random.Generator) -> np.ndarray:
        """The objects of a scene on any `background` (RGB, 0-255), ``[64, 64, 3]`` uint8."""
        canvas = np.empty((SIDE, SIDE, 3), np.float32)
        canvas[:] = background
        edges = EDGES[scene.size] if scene.second is None else PAIR_EDGES
        for place, number in enumerate(scene.places):
            edge = int(edges[rng.integers(len(edges))])
            box = -(-edge // GRID) * GRID
            # Any place along the free axes; two objects have a half of the other axis each.
            top, left = (GRID * rng.integers(0, (SIDE - box) // GRID + 1, 2)).tolist()
            if scene.layout == BESIDE:
                left = place * SIDE // 2
            if scene.layout == STACKED:
                top = place * SIDE // 2
            drawing = int(rng.integers(len(self.drawings[number])))
            sprite = self.sprite(number, drawing, edge, bool(rng.integers(2)))
            top, left = (corner + (box - extent) // 2
                         for corner, extent in zip((top, left), sprite.shape[:2]))
            under = canvas[top:top + sprite.shape[0], left:left + sprite.shape[1]]
            under *= 1.0 - sprite[..., 3:] / 255.0
            under += sprite[..., :3]
        return np.round(canvas).astype(np.uint8)

    def sprite(self, number: int, drawing: int, edge: int, mirrored: bool) -> np.ndarray:
        """A drawing at its size, premultiplied, ``[h, w, 4]`` fp32 in 0-255; kept for next time."""
        key = (number, drawing, edge, mirrored)
        if key not in self._sprites:
            picture = Image.fromarray(self.drawings[number][drawing])
            if mirrored:
                picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            scale = edge / max(picture.size)
            size = tuple(max(1, round(extent * scale)) for extent in picture.size)
            # Straight alpha would bleed the colour of transparent pixels into the rim.
            small = picture.convert('RGBa').resize(size, Image.Resampling.HAMMING)
            self._sprites[key] = np.asarray(small, np.float32)
        return self._sprites[key]


_received: World  # of a process that composes for another


def _receive(world: World) -> None:
    global _received
    _received = world


def _compose(seed: int, numbers: Sequence[int]) -> tuple[list[Scene], np.ndarray]:
    return _received.batch(seed, numbers)


@functools.cache
def load(path: Path = drawings.DRAWINGS) -> World:
    """The shipped world; raises `DataFileError` if its drawings cannot be read."""
    return World(*drawings.load(path))


def rng_of(seed: int, number: int) -> np.random.Generator:
    """What scene `number` of a seed is drawn by: the scene first, then its image."""
    return np.random.default_rng((seed, int(number)))


def words() -> list[str]:
    """All words that captions are made of, sorted."""
    texts = [*drawings.OBJECTS, *RELATIONS, *COLOUR_NAMES, 'small large a an on background']
    return sorted({word for text in texts for word in text.split()})


def _with_article(words: str) -> str:
    return f'{"an" if words[0] in "aeiou" else "a"} {words}'


def _one_in_ten(*words: str) -> bool:
    digest = hashlib.sha256('|'.join(words).encode()).digest()
    return int.from_bytes(digest[:4], 'big') % 10 == 0
