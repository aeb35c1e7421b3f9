"""Images of prompts: the ways to draw them, and any number of them, batch by batch.

An image has a name: the seed, its prompt, and which image of that prompt it is. Its noise is a
function of the name alone, so that it is the same image whatever it is drawn with.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import time
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ddmd_jax.data.batch import null_like
from ddmd_jax.diffusion import sampling
from ddmd_jax.diffusion.time import FewSteps, TimeMap
from ddmd_jax.families import Teacher
from ddmd_jax.parallel import sharding

SLUG = 48  # characters of a prompt in a file's name


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A way to draw latents: ``draw(params, cond, null, key) -> [B, H, W, C]``.

    `cond` and `null`, the null prompt's, have B rows; `key` is one for all of them or ``[B]``
    (`sampling.step_noise`). `evaluations` are the network's, for one image.
    """

    steps: int
    evaluations: int
    guidance: float
    draw: Callable[[Any, Any, Any, jax.Array], jax.Array]


def of_student(teacher: Teacher, steps: int, time: TimeMap | None = None,
               mode: str = 'renoise') -> Sampler:
    """Few steps without guidance; `time` None is the teacher's, `mode` of `STUDENT_MODES`."""
    schedule = FewSteps(time or teacher.time, steps)

    def draw(params: Any, cond: Any, null: Any, key: jax.Array) -> jax.Array:
        return sampling.sample_student(
            functools.partial(teacher.predict_clean, params), cond, schedule, key,
            _shape(teacher, cond), mode)

    return Sampler(steps, steps, 1.0, draw)


def of_teacher(teacher: Teacher, steps: int, guidance: float = 1.0, solver: str = 'euler',
               noises: int = 1) -> Sampler:
    """The ODE in `steps`, from the noise at which a student of `noises` steps starts."""
    def draw(params: Any, cond: Any, null: Any, key: jax.Array) -> jax.Array:
        noise = sampling.step_noise(key, noises, _shape(teacher, cond))[0]
        return sampling.sample_teacher(
            functools.partial(teacher.predict_clean, params), cond, noise,
            teacher.time.grid(steps), sampling.Guidance(guidance, null, teacher.rescale), solver)

    return Sampler(steps, sampling.evaluations(steps, guidance, solver), guidance, draw)


def _shape(teacher: Teacher, cond: Any) -> tuple[int, ...]:
    return (jax.tree.leaves(cond)[0].shape[0], *teacher.latents.shape)


# --- Names ---


@dataclasses.dataclass(frozen=True)
class Name:
    """Which image: its seed, its prompt, and a number that tells images of one prompt apart."""

    seed: int
    prompt: str
    number: int


def names(prompts: Sequence[str], count: int, seed: int) -> list[Name]:
    """`count` images of every prompt; one that comes again goes on where it was."""
    seen: Counter[str] = Counter()
    found = []
    for prompt in prompts:
        found += [Name(seed, prompt, seen[prompt] + i) for i in range(count)]
        seen[prompt] += count
    return found


def words(named: Sequence[Name]) -> np.ndarray:
    """Names as ``[n, 3]`` uint32, for `keys`."""
    rows = [(n.seed, zlib.crc32(n.prompt.encode()), n.number) for n in named]
    return np.asarray(rows, np.uint32).reshape(-1, 3)


def keys(rows: jax.Array) -> jax.Array:
    """A PRNG key ``[B]`` for each row ``[B, 3]`` of `words`."""
    fold = jax.random.fold_in
    return jax.vmap(lambda row: fold(fold(jax.random.key(row[0]), row[1]), row[2]))(rows)


def slug(prompt: str) -> str:
    """`prompt` as part of a file's name: a-z, 0-9 and '-' only; '' if nothing is left."""
    plain = unicodedata.normalize('NFKD', prompt).encode('ascii', 'ignore').decode().lower()
    return re.sub('[^a-z0-9]+', '-', plain)[:SLUG].strip('-')


def file_names(named: Sequence[Name], suffix: str) -> list[str]:
    """A file's name for each image: its place in the list, then its prompt."""
    return ['-'.join(filter(None, (f'{i:04d}', slug(n.prompt)))) + suffix
            for i, n in enumerate(named)]


# --- Batches ---


@dataclasses.dataclass
class Times:
    """Seconds of compiling, of drawing latents and of decoding them; of how many images."""

    compiling: float = 0.0
    drawing: float = 0.0
    decoding: float = 0.0
    images: int = 0


def generate(sampler: Sampler, teacher: Teacher, params: Any, cond: Any, null: Any,
             rows: np.ndarray, batch: int, mesh: Mesh, times: Times) -> Iterator[np.ndarray]:
    """Images ``[<= batch, H, W, 3]`` in [-1, 1] of all `rows` in their order, batch by batch.

    Every process of a run draws them together, and every one has them all.

    Args:
      sampler, teacher, params: how, of which family, and whose weights, placed on `mesh`.
      cond: the prompts' conditioning ``[n, ...]`` and `null` the null prompt's ``[1, ...]``, in
        the host's memory.
      rows: ``[n, 3]`` of `words`.
      batch: of one compiled shape, a multiple of what `mesh` splits; the last one is filled up.
      mesh: over which a batch is split.
      times: added to.
    """
    def draw(params: Any, cond: Any, null: Any, rows: jax.Array) -> jax.Array:
        blank = null_like(null, cond)
        return sampler.draw(sharding.on_device(params), cond, blank, keys(rows))

    split, program = sharding.batch_sharding(mesh), None
    put = lambda x: jax.make_array_from_callback(x.shape, split, lambda index: x[index])
    for start in range(0, len(rows), batch):
        at = np.arange(start, min(start + batch, len(rows)))
        filled = np.resize(at, batch)
        part = jax.tree.map(lambda x, at=filled: put(np.asarray(x)[at]), (cond, rows))
        clock = time.monotonic()
        if program is None:
            program = jax.jit(draw, out_shardings=sharding.replicated(mesh)).lower(
                params, part[0], null, part[1]).compile()
            times.compiling += time.monotonic() - clock
            clock = time.monotonic()
        latents = np.asarray(program(params, part[0], null, part[1]))[:len(at)]
        times.drawing += time.monotonic() - clock
        clock = time.monotonic()
        images = np.clip(np.asarray(teacher.latents.decode(latents)), -1, 1)
        times.decoding += time.monotonic() - clock
        times.images += len(at)
        yield images
