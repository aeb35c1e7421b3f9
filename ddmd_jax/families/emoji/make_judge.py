"""Trains the judge that ships with the package, on real and on spoilt scenes.

    python -m ddmd_jax.families.emoji.make_judge [--steps=2400] [--seed=0] [--out=FILE]

It prints its accuracies on scenes that it never saw. 2,400 updates are 8 minutes of CPU time: some
5 minutes on two free cores.
"""

import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from flax import nnx
from PIL import Image, ImageFilter
from tqdm import tqdm

from ddmd_jax.evaluation import measures
from ddmd_jax.families.emoji import judge, scenes
from ddmd_jax.families.emoji.scenes import COLOURS, GRID, SIDE, Scene, World
from ddmd_jax.models.layers import functional
from ddmd_jax.util import commands, places
from ddmd_jax.util.errors import UserError
from ddmd_jax.weights import flat

FLAGS = flags.FLAGS
Array = jax.Array

BATCH = 128
SPOILT = 0.35  # share of a batch
FOREIGN = 0.5  # share of all, spoilt or not, on colours that have no name
APART = 26  # of 255, in one channel at least, from a colour that is held out
PLAIN = 3 / 255  # how far a pixel may be from the background's colour, in [0, 1]
UNSEEN = 1  # added to the training's seed


# --- Examples: images, and the network's answers; -1 where there is none ---


def examples(world: World, seed: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """A batch ``(images [BATCH, 64, 64, 3] uint8, answers [BATCH, 4])`` of training."""
    rng = np.random.default_rng((seed, step))
    bad, foreign = round(BATCH * SPOILT), round(BATCH * FOREIGN * (1 - SPOILT))
    spoilt = np.stack([spoil(world, rng) for _ in range(bad)])
    asked = [world.scene(rng) for _ in range(BATCH - bad)]
    images = np.stack([world.compose(scene, foreign_colour(world, scene.places, rng), rng)
                       if i < foreign else world.image(scene, rng)
                       for i, scene in enumerate(asked)])
    answers = truths(world, asked, images)
    wrong = np.full((bad, len(judge.PARTS)), -1)
    wrong[:, 0] = judge.WRONG
    return np.concatenate([images, spoilt]), np.concatenate([answers, wrong])


def foreign_colour(world: World, objects: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    """RGB, 0-255, of a background without a name, unlike those held out for these objects.

    Without such backgrounds the judge learns that some objects never stand on some colours, and
    takes them for others where they do.
    """
    while True:
        found = rng.uniform(30, 255, 3)
        if all(_may_stand(world, number, found) for number in objects):
            return found


def _may_stand(world: World, number: int, background: np.ndarray) -> bool:
    """Whether a background without a name is unlike those that are held out for an object."""
    return all(np.abs(background - rgb).max() > APART for i, rgb in enumerate(COLOURS.values())
               if world.held_out(Scene(number, None, 0, i)))


def _may_meet(world: World, one: int, other: int) -> bool:
    """Whether two objects stand together on any of the colours."""
    return any(not world.held_out(Scene(one, other, 0, colour, 'left of'))
               for colour in range(len(COLOURS)))


def truths(world: World, asked: list[Scene], images: np.ndarray) -> np.ndarray:
    """``[N, 4]``: what the network should read off real images ``[N, 64, 64, 3]`` uint8."""
    unit = judge.to_unit(images)
    apart = np.abs(unit / 2 + 0.5 - measures.background(unit)[:, None, None]).max(-1) > PLAIN
    # [N, upper or lower half, left or right half]: is there anything?
    quarters = apart.reshape(-1, 2, SIDE // 2, 2, SIDE // 2).any((2, 4))
    falling = ~quarters[:, 0, 1] & ~quarters[:, 1, 0]
    rising = ~quarters[:, 0, 0] & ~quarters[:, 1, 1]
    rows = []
    for scene, falls, rises in zip(asked, falling, rising, strict=True):
        if scene.second is None:
            rows.append((judge.ONE, scene.first, len(world.names), scene.size))
            continue
        layout = judge.BESIDE if scene.layout == scenes.BESIDE else judge.STACKED
        first, second = scene.places
        if rises and layout == judge.STACKED:
            first, second = second, first  # from the left
        layout = judge.FALLING if falls else judge.RISING if rises else layout
        rows.append((layout, first, second, len(scenes.SIZES)))
    return np.asarray(rows)


# --- Spoilt scenes ---


def spoil(world: World, rng: np.random.Generator) -> np.ndarray:
    """A picture ``[64, 64, 3]`` uint8 that is no scene.

    No two objects, and no object and background, meet here that are held out.
    """
    canvas = Canvas(world, rng)
    KINDS[rng.choice(len(KINDS), p=SHARES)](canvas)
    return np.round(canvas.pixels).astype(np.uint8)


class Canvas:
    """A background, and the means to spoil a scene on it; its `colour` is -1 without a name."""

    def __init__(self, world: World, rng: np.random.Generator):
        self.world, self.rng = world, rng
        self.colour, self.background = -1, foreign_colour(world, (), rng)
        if rng.random() >= FOREIGN:
            self.colour = int(rng.integers(len(COLOURS)))
            shade = np.asarray(list(COLOURS.values())[self.colour]) * rng.uniform(*scenes.SHADES)
            self.background = np.minimum(shade, 255)
        self.pixels = np.empty((SIDE, SIDE, 3), np.float32)
        self.pixels[:] = self.background

    def objects(self, n: int) -> list[int]:
        """`n` objects that may all meet one another and the background."""
        world = self.world
        found: list[int] = []
        while len(found) < n:
            new = int(self.rng.integers(len(world.names)))
            stands = (_may_stand(world, new, self.background) if self.colour < 0 else
                      not world.held_out(Scene(new, None, 0, self.colour)))
            if stands and new not in found and all(_may_meet(world, new, old) for old in found):
                found.append(new)
        return found

    def sprite(self, number: int, size: int) -> np.ndarray:
        """Any drawing of an object in a square, ``[n, n, 4]`` fp32, premultiplied, 0-255."""
        return self.sprite_of(number, int(self.rng.choice(scenes.EDGES[size])))

    def sprite_of(self, number: int, edge: int) -> np.ndarray:
        """Likewise, with the longer side of the drawing in pixels."""
        rng = self.rng
        found = self.world.sprite(number, int(rng.integers(len(self.world.drawings[number]))),
                                  edge, bool(rng.integers(2)))
        edge = max(found.shape[:2])
        square = np.zeros((edge, edge, 4), np.float32)
        top, left = ((edge - extent) // 2 for extent in found.shape[:2])
        square[top:top + found.shape[0], left:left + found.shape[1]] = found
        return square

    def paste(self, sprite: np.ndarray, corner: np.ndarray) -> None:
        """Composes a sprite over the pixels; what hangs over the edge is cut off."""
        corner = np.round(corner).astype(int)
        start, stop = np.maximum(corner, 0), np.minimum(corner + sprite.shape[:2], SIDE)
        (top, left), (bottom, right) = start - corner, stop - corner
        seen = sprite[top:bottom, left:right]
        under = self.pixels[start[0]:stop[0], start[1]:stop[1]]
        under *= 1.0 - seen[..., 3:] / 255.0
        under += seen[..., :3]

    def paste_spoilt(self, sprite: np.ndarray, size: int, other: int) -> None:
        """Pastes a spoilt object; a small one has, half of the time, a whole one as in a pair."""
        rng, edge = self.rng, max(scenes.EDGES[size])
        rim = (len(sprite) - edge) // 2  # of what is wider than the object
        if size or rng.random() < 0.5:
            self.paste(sprite, rng.integers(0, SIDE - edge + 1, 2) - rim)
            return
        axis, swapped = rng.integers(2, size=2)
        for place, one in enumerate((sprite, self.sprite(other, size))):
            corner = GRID * rng.integers(0, (SIDE - edge) // GRID + 1, 2)
            corner[axis] = SIDE // 2 * (place ^ swapped)
            self.paste(one, corner - (rim if one is sprite else 0))


def nothing(canvas: Canvas) -> None:
    """No object."""


def many(canvas: Canvas) -> None:
    """Three or four objects, each in a quarter of its own or, now and then, anywhere."""
    rng, loose = canvas.rng, canvas.rng.random() < 0.3
    for number, quarter in zip(canvas.objects(int(rng.integers(3, 5))), rng.permutation(4)):
        half = SIDE // 2
        corner = half * np.array(divmod(quarter, 2))
        canvas.paste(canvas.sprite(number, 0), rng.integers(0, half + 1, 2) if loose else corner)


def third(canvas: Canvas) -> None:
    """A scene of two objects, and one more where they leave most room."""
    rng, (first, second, more) = canvas.rng, canvas.objects(3)
    relation = scenes.RELATIONS[rng.integers(len(scenes.RELATIONS))]
    pair = Scene(first, second, 0, max(canvas.colour, 0), relation)
    canvas.pixels = canvas.world.compose(pair, canvas.background, rng).astype(np.float32)
    taken = np.abs(canvas.pixels - canvas.background).max(-1) > 8
    edge = int(rng.integers(16, max(scenes.PAIR_EDGES) + 1))
    corners = rng.integers(0, SIDE - edge + 1, (16, 2))
    covered = [taken[top:top + edge, left:left + edge].mean() for top, left in corners]
    canvas.paste(canvas.sprite_of(more, edge), corners[np.argmin(covered)])


def overlapping(canvas: Canvas) -> None:
    """A small object over another, which it leaves in sight."""
    rng, (below, above) = canvas.rng, canvas.objects(2)
    size = int(rng.integers(3))
    first, second = canvas.sprite(below, size), canvas.sprite(above, 0)
    corner = rng.integers(0, SIDE - len(first) + 1, 2)
    canvas.paste(first, corner)
    angle, far = rng.uniform(0, 2 * np.pi), rng.uniform(8, 14) + 4 * size
    centred = corner + (len(first) - len(second)) / 2
    moved = centred + far * np.array([np.sin(angle), np.cos(angle)])
    canvas.paste(second, np.clip(moved, 0, SIDE - len(second)))


def blended(canvas: Canvas) -> None:
    """Two objects at one place: both half there, or a half of either."""
    rng, size = canvas.rng, int(canvas.rng.integers(3))
    first, second, other = canvas.objects(3)
    one, two = canvas.sprite(first, size), canvas.sprite(second, size)
    edge = min(len(one), len(two))
    share = np.full((edge, edge, 1), rng.uniform(0.35, 0.65), np.float32)
    if rng.random() < 0.5:
        share[:] = np.arange(edge)[:, None, None] < edge * rng.uniform(0.4, 0.6)
        share = share.swapaxes(0, 1) if rng.random() < 0.5 else share
    both = share * one[:edge, :edge] + (1 - share) * two[:edge, :edge]
    canvas.paste_spoilt(both, size, other)


def faded(canvas: Canvas) -> None:
    """An object that is half there."""
    size, (number, other) = int(canvas.rng.integers(3)), canvas.objects(2)
    share = np.float32(canvas.rng.uniform(0.1, 0.45))
    canvas.paste_spoilt(share * canvas.sprite(number, size), size, other)


def torn(canvas: Canvas) -> None:
    """An object of which blocks are missing, or in the place of others."""
    rng, size, (number, other) = canvas.rng, int(canvas.rng.integers(3)), canvas.objects(2)
    sprite, n = canvas.sprite(number, size), int(rng.integers(2, 5))
    edge = len(sprite) // n
    blocks = sprite[:n * edge, :n * edge].reshape(n, edge, n, edge, 4).swapaxes(1, 2)
    blocks = blocks.reshape(n * n, edge, edge, 4)
    if rng.random() < 0.5:
        blocks = blocks[rng.permutation(n * n)]
    else:
        gone = rng.permutation(n * n) < round(n * n * rng.uniform(0.4, 0.7))
        blocks = np.where(gone[:, None, None, None], 0, blocks)
    sprite = blocks.reshape(n, n, edge, edge, 4).swapaxes(1, 2).reshape(n * edge, n * edge, 4)
    canvas.paste_spoilt(sprite, size, other)


def smeared(canvas: Canvas) -> None:
    """An object of which only a blur is left."""
    size, (number, other) = int(canvas.rng.integers(3)), canvas.objects(2)
    radius = canvas.rng.uniform(3, 5) * (1 + size / 2)
    rim = round(2.5 * radius)
    sprite = np.pad(canvas.sprite(number, size), ((rim, rim), (rim, rim), (0, 0)))
    picture = Image.fromarray(np.round(sprite).astype(np.uint8), 'RGBa')
    blurred = picture.filter(ImageFilter.GaussianBlur(radius))
    canvas.paste_spoilt(np.asarray(blurred, np.float32), size, other)


KINDS = (nothing, many, third, overlapping, blended, faded, torn, smeared)
SHARES = (0.04, 0.10, 0.15, 0.23, 0.20, 0.07, 0.14, 0.07)


# --- Training ---


def rough(key: Array, images: Array) -> Array:
    """uint8 images as they might have been drawn: fp32, nominally in [-1, 1]."""
    n, keys = len(images), iter(jax.random.split(key, 12))

    def some(low: float, high: float, odds: float = 1.0) -> Array:
        """One number an image, 0 in a share of 1 - odds of them."""
        value = jax.random.uniform(next(keys), (n, 1, 1, 1), jnp.float32, minval=low, maxval=high)
        return value * jax.random.bernoulli(next(keys), odds, value.shape)

    x = images.astype(jnp.float32) / 127.5 - 1
    padded = jnp.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)), mode='edge')
    crop = lambda image, at: jax.lax.dynamic_slice(image, (at[0], at[1], 0), (SIDE, SIDE, 3))
    x = jax.vmap(crop)(padded, jax.random.randint(next(keys), (n, 2), 0, 5))
    halves = x.reshape(n, SIDE // 2, 2, SIDE // 2, 2, 3).mean((2, 4))
    x = x + some(0, 1, 0.5) * (jax.image.resize(halves, x.shape, 'linear') - x)  # as by a codec
    x = x * some(0.85, 1.15) + 0.04 * jax.random.normal(next(keys), (n, 1, 1, 3), jnp.float32)
    mottled = some(0, 0.06) * jax.random.normal(
        next(keys), (n, SIDE // 8, SIDE // 8, 3), jnp.float32)
    x = x + jax.image.resize(mottled, x.shape, 'linear')
    # Even noise from single bytes: Gaussian would take longer than the network's own step.
    noise = jax.random.bits(next(keys), x.shape, jnp.uint8).astype(jnp.float32) / 127.5 - 1
    return jnp.clip(x + some(0, 0.2) * noise, -1, 1)


def train(steps: int, seed: int, out: Path) -> None:
    """Trains the judge and writes it to `out`."""
    world = scenes.load()
    make = lambda: judge.Judge(judge.classes(world), nnx.Rngs(seed))
    apply, params = functional(make), nnx.to_pure_dict(nnx.state(make(), nnx.Param))
    rate = optax.warmup_cosine_decay_schedule(0, 3e-3, min(100, steps // 10), steps)
    tx = optax.adamw(rate, weight_decay=1e-2)

    def loss_fn(params: Any, key: Array, images: Array, wanted: Array) -> Array:
        logits, _ = apply(params, rough(key, images))
        cross = optax.softmax_cross_entropy_with_integer_labels
        terms = [jnp.mean(cross(logits[part], jnp.maximum(wanted[:, i], 0)) * (wanted[:, i] >= 0))
                 for i, part in enumerate(judge.PARTS)]
        return jnp.sum(jnp.stack(terms))

    @jax.jit
    def update(params: Any, opt: Any, step: Array, images: Array, wanted: Array):
        key = jax.random.fold_in(jax.random.key(seed), step)
        loss, grads = jax.value_and_grad(loss_fn)(params, key, images, wanted)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt, loss

    opt = tx.init(params)
    bar = tqdm(_prefetched(world, seed, steps), 'judge', steps, unit=' updates', file=sys.stderr,
               dynamic_ncols=True)
    for step, batch in enumerate(bar):
        params, opt, loss = update(params, opt, step, *batch)
        if step % 50 == 0:
            bar.set_postfix(loss=f'{loss:.3f}')
    flat.save(out, params, {'world': world.identity, 'steps': str(steps)},
              dtype=jnp.bfloat16)


def _prefetched(world: World, seed: int, steps: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The batches of training, each composed while the one before it is in use."""
    with ThreadPoolExecutor(1) as thread:
        coming = [thread.submit(examples, world, seed, step) for step in range(min(2, steps))]
        for step in range(steps):
            batch = coming.pop(0).result()
            if step + 2 < steps:
                coming.append(thread.submit(examples, world, seed, step + 2))
            yield batch


def accuracies(path: Path, seed: int, n: int) -> dict[str, float]:
    """Shares of what the judge of a file reads aright, on scenes of another seed.

    Of `n` scenes like those of training, part by part; of `n` held-out ones, `all`; and of `n`
    spoilt ones the share that is called wrong.
    """
    world = scenes.load()
    look = judge.load(world, path)
    asked, images = world.batch(seed, range(n))
    right = judge.matches(judge.read(look, judge.to_unit(images))[0], asked)
    rng = np.random.default_rng(seed)
    held = [world.scene(rng, held_out=True) for _ in range(n)]
    images = np.stack([world.image(scene, rng) for scene in held])
    unseen = judge.matches(judge.read(look, judge.to_unit(images))[0], held)
    spoilt = np.stack([spoil(world, rng) for _ in range(n)])
    layouts = judge.read(look, judge.to_unit(spoilt))[0][:, 0]
    return {**{part: float(values.mean()) for part, values in right.items()},
            'all_held_out': float(unseen['all'].mean()),
            'spoilt': float((layouts == judge.WRONG).mean())}


def define_flags() -> None:
    commands.define_place('out', '', 'The file to write.', places.LOCAL)
    flags.DEFINE_integer('steps', 2400, 'Training steps.', 1)
    flags.DEFINE_integer('seed', 0, 'Seed of weights, scenes and noise.', 0, 2**32 - 2)


def main(arguments: list[str]) -> None:
    commands.only_flags(arguments)
    commands.need(out=f'name a file, such as judge.safetensors; the one in use is {judge.WEIGHTS}')
    out = places.of(FLAGS.out, places.LOCAL)
    if out.is_dir():
        raise UserError(f'--out={out} is a folder; name a file')
    commands.folder('--out', out.parent)
    train(FLAGS.steps, FLAGS.seed, out)
    for part, share in accuracies(out, FLAGS.seed + UNSEEN, 4000).items():
        print(f'{part:12} {share:.4f}')


if __name__ == '__main__':
    commands.run('make_judge', main, define_flags)
