"""Images of prompts: who draws them, which noise they have, and any number of them, batch by batch.

The noise of an image is a function of its name alone: the seed, its prompt, and which image of that
prompt it is. The batch, the devices and the processes do not enter, so that the table at a run's
end, the sheet, `sample` and the pictures logged in training show one image under one name.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
import sys
import time
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from ddmd_jax.data.batch import NULLS, Cond, null_like
from ddmd_jax.diffusion import sampling
from ddmd_jax.diffusion.time import FewSteps, TimeMap
from ddmd_jax.parallel import sharding

if TYPE_CHECKING:
    from ddmd_jax.families import Teacher

Array = jax.Array
SLUG = 48  # characters of a prompt in a file's name
BAR = '{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}]'


# --- Samplers ---


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A way to draw latents, and to decode them.

    Attributes:
      model: whose parameters it takes, 'student' or 'teacher'.
      steps: of the schedule.
      evaluations: of the network, for one image.
      guidance: scale; 1 is none.
      method: a student's mode (`sampling.STUDENT_MODES`), or the solver of the teacher's ODE.
      times: the paper's t at which each step begins, ``[steps]``.
      trace: ``(params, cond, null, key) -> (latents [B, H, W, C], what each step predicts
        [steps, B, H, W, C])``; `cond` and `null`, the null prompt's, have B rows; `key` is one for
        all of them or ``[B]`` (`sampling.step_noise`).
      decode: ``latents -> images [B, H', W', 3]``; None without a decoder.
    """

    model: str
    steps: int
    evaluations: int
    guidance: float
    method: str
    times: Callable[[], Array]
    trace: Callable[[Any, Any, Any, Array], tuple[Array, Any]]
    decode: Callable[[Any], Any] | None

    def draw(self, params: Any, cond: Any, null: Any, key: Array) -> Array:
        """The latents of `trace` alone."""
        return self.trace(params, cond, null, key)[0]

    @property
    def title(self) -> str:
        """For the head of a column: the model in one line, steps and guidance in the next."""
        guided = f', w={self.guidance:g}' if self.guidance != 1 else ''
        lent = self.model == 'teacher' and self.method in sampling.STUDENT_MODES
        steps = f'{self.steps} step{"s" * (self.steps != 1)}'
        return f'{self.model}{" as student" * lent}\n{steps}{guided}'


def of_student(teacher: Teacher, steps: int, time: TimeMap | None = None,
               mode: str = 'renoise') -> Sampler:
    """Few steps without guidance; `time` None is the teacher's, `mode` of `STUDENT_MODES`."""
    schedule = FewSteps(time or teacher.time, steps)

    def trace(params: Any, cond: Any, null: Any, key: Array) -> tuple[Array, Array]:
        return sampling.trace_student(
            functools.partial(teacher.predict_clean, params), cond, schedule, key,
            _shape(teacher, cond), mode)

    return Sampler('student', steps, steps, 1.0, mode, lambda: schedule.times, trace,
                   teacher.latents.decode)


def of_teacher(teacher: Teacher, steps: int, guidance: float = 1.0,
               solver: str = 'euler') -> Sampler:
    """The teacher's ODE in `steps`, from the noise at which a student of the same name starts."""
    def trace(params: Any, cond: Any, null: Any, key: Array) -> tuple[Array, Array]:
        # The first noise is the same for any number of steps: JAX's keys split independently.
        noise = sampling.step_noise(key, 1, _shape(teacher, cond))[0]
        return sampling.trace_teacher(
            functools.partial(teacher.predict_clean, params), cond,
            teacher.time.grid_input(noise, steps), teacher.time.grid(steps),
            sampling.Guidance(guidance, NULLS[teacher.null](null), teacher.rescale), solver)

    return Sampler('teacher', steps, sampling.evaluations(steps, guidance, solver), guidance,
                   solver, lambda: teacher.time.grid(steps)[:-1], trace, teacher.latents.decode)


def along(sampler: Sampler, steps: Sequence[int]) -> Sampler:
    """`sampler`, but that an image is K of them: what it predicts to be clean at each of `steps`.

    Latents are ``[B, K, H, W, C]`` and images ``[B, K, H', W', 3]``; each is decoded alone.
    """
    trace, decode = sampler.trace, sampler.decode
    assert decode is not None
    each = lambda latents: np.stack([np.concatenate([
        np.asarray(decode(one[None])) for one in row]) for row in latents])
    return dataclasses.replace(
        sampler, decode=each,
        trace=lambda *given: (jnp.moveaxis(trace(*given)[1][np.asarray(steps)], 0, 1), ()))


def _shape(teacher: Teacher, cond: Any) -> tuple[int, ...]:
    return (jax.tree.leaves(cond)[0].shape[0], *teacher.latents.shape)


# --- Names ---


@dataclasses.dataclass(frozen=True)
class ImageName:
    """Which image: its seed, its prompt, and a number that tells images of one prompt apart."""

    seed: int
    prompt: str
    number: int


def names(prompts: Sequence[str], count: int, seed: int) -> list[ImageName]:
    """`count` images of every prompt; a prompt that comes again goes on counting."""
    seen: Counter[str] = Counter()
    found = []
    for prompt in prompts:
        found += [ImageName(seed, prompt, seen[prompt] + i) for i in range(count)]
        seen[prompt] += count
    return found


def digest(named: Sequence[ImageName]) -> str:
    """Sixteen hex digits that name these images, in their order."""
    rows = [(name.seed, name.prompt, name.number) for name in named]
    return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()[:16]


def name_words(named: Sequence[ImageName]) -> np.ndarray:
    """Names as ``[n, 3]`` uint32, for `keys`."""
    rows = [(n.seed, zlib.crc32(n.prompt.encode()), n.number) for n in named]
    return np.asarray(rows, np.uint32).reshape(-1, 3)


def keys(words: Array) -> Array:
    """The PRNG key ``[B]`` of each image, from `name_words` ``[B, 3]``."""
    fold = jax.random.fold_in
    return jax.vmap(lambda name: fold(fold(jax.random.key(name[0]), name[1]), name[2]))(words)


def slug(prompt: str) -> str:
    """`prompt` as part of a file's name: a-z, 0-9 and '-' only; '' if nothing is left."""
    plain = unicodedata.normalize('NFKD', prompt).encode('ascii', 'ignore').decode().lower()
    return re.sub('[^a-z0-9]+', '-', plain)[:SLUG].strip('-')


def file_names(named: Sequence[ImageName], suffix: str) -> list[str]:
    """A file's name for each image: its place in the list, then its prompt."""
    return ['-'.join(filter(None, (f'{i:04d}', slug(n.prompt)))) + suffix
            for i, n in enumerate(named)]


# --- Drawing ---


@dataclasses.dataclass(frozen=True)
class Request:
    """Images to draw.

    Floats of the conditioning are rounded to bfloat16, in which it is stored and handed on: an
    image is then the same whether its prompt was encoded at once, beforehand, or with others.

    Attributes:
      names: of n images.
      cond: the conditioning of m prompts, ``[m, ...]``, in the host's memory, which it can fill:
        12,000 of Lumina's are 14 GB.
      null: the null prompt's, ``[1, ...]``.
      rows: of `cond`, which each image has; None is each its own, in their order.
    """

    names: Sequence[ImageName]
    cond: Cond
    null: Cond
    rows: np.ndarray | None = None

    def __post_init__(self) -> None:
        for field in ('cond', 'null'):
            object.__setattr__(self, field, jax.tree.map(_rounded, getattr(self, field)))

    @classmethod
    def encoded(cls, names: Sequence[ImageName],
                encode: Callable[[Sequence[str]], Cond]) -> Request:
        """A request whose prompts, and the null prompt, are still to be encoded, each once."""
        texts = list(dict.fromkeys(name.prompt for name in names))
        cond = encode([*texts, ''])
        place = {text: row for row, text in enumerate(texts)}
        return cls(names, jax.tree.map(lambda x: x[:-1], cond),
                   jax.tree.map(lambda x: x[-1:], cond),
                   np.asarray([place[name.prompt] for name in names], int))

    def first(self, count: int) -> Request:
        """The first `count` of its images."""
        return self.pick(range(min(count, len(self.names))))

    def pick(self, rows: Sequence[int]) -> Request:
        """Those of its images; itself, if it is all of them."""
        if list(rows) == list(range(len(self.names))):
            return self
        at = np.asarray(rows, int)
        return Request([self.names[row] for row in at], self.cond, self.null, self.rows_of(at))

    def rows_of(self, at: np.ndarray) -> np.ndarray:
        """Rows of `cond` of the images `at`."""
        return at if self.rows is None else self.rows[at]


def _rounded(x: Any) -> np.ndarray:
    x = np.asarray(x)
    return x.astype(jnp.bfloat16, copy=False) if jnp.issubdtype(x.dtype, jnp.floating) else x


@dataclasses.dataclass
class Times:
    """Seconds of compiling, of drawing latents and of decoding them; of how many images."""

    compiling: float = 0.0
    drawing: float = 0.0
    decoding: float = 0.0
    images: int = 0


def drawer(sampler: Sampler, request: Request, mesh: Mesh) -> Callable[[Any], Array]:
    """``params -> latents [n, H, W, C]`` of one request, by one program, whole on every device.

    For what is drawn again and again as parameters change: pictures and figures of training.
    """
    count = len(request.names)
    cond, words = _split(request, np.resize(np.arange(count), filled(count, mesh)), mesh)
    run = program(sampler, mesh, count)
    return lambda params: run(params, cond, request.null, words)


def generate(sampler: Sampler, params: Any, request: Request, batch: int, mesh: Mesh,
             times: Times | None = None) -> Iterator[np.ndarray]:
    """Images ``[<= batch, H', W', 3]`` in [-1, 1] of `request`, in its order, batch by batch.

    Every process of a run draws them together, and every one has them all; process 0 shows a
    progress bar on stderr. A device draws one image at a time, and each is decoded alone: sums are
    then made in one order, and an image has the same bits whatever the batch, and on any number of
    devices that hold all of the parameters.

    Args:
      sampler, params: how, and with whose parameters, placed on `mesh`.
      request: what.
      batch: images at a time, raised to a multiple of what `mesh` splits.
      mesh: over which a batch is split.
      times: added to.
    """
    assert sampler.decode is not None
    count, times, run = len(request.names), times or Times(), None
    ways, batch = sharding.batch_ways(mesh), filled(batch, mesh)
    with tqdm(desc=sampler.title.replace('\n', ', '), total=count, unit=' images', bar_format=BAR,
              file=sys.stderr, disable=jax.process_index() != 0, dynamic_ncols=True) as bar:
        for start in range(0, count, batch):
            at = np.arange(start, min(start + batch, count))
            drawn, clock = [], time.monotonic()
            for first in range(0, len(at), ways):
                rows = at[first:first + ways]
                cond, words = _split(request, np.resize(rows, ways), mesh)
                if run is None:
                    clock = time.monotonic()
                    run = program(sampler, mesh, ways).lower(
                        params, cond, request.null, words).compile()
                    times.compiling += time.monotonic() - clock
                    clock = time.monotonic()
                drawn.append((run(params, cond, request.null, words), len(rows)))
            latents = np.concatenate([np.asarray(x)[:n] for x, n in drawn])
            times.drawing += time.monotonic() - clock
            clock = time.monotonic()
            # What is judged and saved is what a screen would show.
            images = np.clip(np.concatenate(
                [np.asarray(sampler.decode(one[None])) for one in latents]), -1, 1)
            times.decoding += time.monotonic() - clock
            times.images += len(at)
            bar.update(len(at))
            yield images


def program(sampler: Sampler, mesh: Mesh, count: int) -> Any:
    """The jitted drawing of a batch, of which the first `count` are wanted."""
    def draw(params: Any, cond: Any, null: Any, words: Array) -> Array:
        null = null_like(null, cond)
        return sampler.draw(sharding.on_device(params), cond, null, keys(words))[:count]

    return jax.jit(draw, out_shardings=sharding.replicated(mesh))


def _split(request: Request, at: np.ndarray, mesh: Mesh) -> tuple[Any, Any]:
    """(conditioning, name words) of the images `at`, split over the devices of `mesh`."""
    split = sharding.batch_sharding(mesh)
    put = lambda x: jax.make_array_from_callback(x.shape, split, lambda index: x[index])
    words = name_words([request.names[i] for i in at])
    return jax.tree.map(lambda x: put(x[request.rows_of(at)]), request.cond), put(words)


def filled(count: int, mesh: Mesh) -> int:
    """`count`, raised to a multiple of what splits over `mesh`."""
    ways = sharding.batch_ways(mesh)
    return -(-count // ways) * ways
