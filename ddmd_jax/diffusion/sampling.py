"""Sampling: backward simulation, the few-step student, the multi-step guided teacher.

A network is a function ``denoise(x_t [B, ...], t [B], cond) -> x_hat``; t is the paper's, latents
are fp32.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ddmd_jax.data.batch import Cond
from ddmd_jax.diffusion import process
from ddmd_jax.diffusion.time import FewSteps

Array = jax.Array
Predict = Callable[[Any, Array, Array, Cond], Array]  # (params, x_t, t, cond) -> x_hat
Denoise = Callable[[Array, Array, Cond], Array]  # a `Predict` with its parameters

STUDENT_MODES = ('renoise', 'deterministic')
SOLVERS = ('euler', 'heun')


def interleave(*trees: Any) -> Any:
    """Trees of ``[B, ...]`` -> one of ``[n B, ...]`` with an example's n rows side by side.

    Unlike concatenation this keeps a batch axis that is sharded over devices where it is.
    """
    n = len(trees)
    return jax.tree.map(
        lambda *xs: jnp.stack(xs, axis=1).reshape(n * xs[0].shape[0], *xs[0].shape[1:]), *trees)


def deinterleave(x: Array, n: int) -> tuple[Array, ...]:
    """Inverse of `interleave` for one array."""
    x = x.reshape(-1, n, *x.shape[1:])
    return tuple(x[:, i] for i in range(n))


def step_assignment(batch: int, num_steps: int) -> Array:
    """Generator step of each example ``[B]`` int32: every step equally often in every batch.

    Example b takes step ``b mod N``. Prompts come shuffled, so this is a draw per example,
    stratified; the fixed places let `student_inputs` run only the rows it needs.

    Raises:
      ValueError: `batch` is not a multiple of `num_steps`.
    """
    if batch % num_steps:
        raise ValueError(f'batch {batch} must be a multiple of the {num_steps} steps')
    return jnp.arange(batch, dtype=jnp.int32) % num_steps


def student_inputs(denoise: Denoise, cond: Cond, steps: FewSteps, key: Array,
                   shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Backward simulation (Algorithm 1): z_t reached by the student's own earlier steps.

    Rows of step k run k earlier steps, no more: a group of N rows costs N (N - 1) / 2 evaluations
    of a row rather than N (N - 1).

    Args:
      denoise: the student; no gradient flows into the result.
      cond: conditioning ``[B, ...]``.
      steps: the student's schedule of N steps.
      key: PRNG key of the noises.
      shape: ``[B, ...]`` of the latents; B a multiple of N.

    Returns:
      ``(z [B, ...], k [B])``: inputs and the step each stands at.
    """
    n, times = steps.n, steps.times
    k = step_assignment(shape[0], n)
    group = lambda x: x.reshape(-1, n, *x.shape[1:])
    merge = lambda x: x.reshape(-1, *x.shape[2:])
    noises = [group(jax.random.normal(one, shape, jnp.float32)) for one in jax.random.split(key, n)]
    grouped = jax.tree.map(group, cond)
    # Column j of a group is to end at step j: it leaves the simulation there, the others go on.
    z, done = steps.time.first_input(noises[0]), []
    for j in range(n - 1):
        done.append(z[:, :1])
        cond_j = jax.tree.map(lambda x, j=j: merge(x[:, j + 1:]), grouped)
        z_j = merge(z[:, 1:])
        x_hat = denoise(z_j, jnp.full(z_j.shape[:1], times[j]), cond_j)
        z_next = process.renoise(x_hat, times[j + 1], merge(noises[j + 1][:, j + 1:]))
        z = z_next.reshape(z[:, 1:].shape)
    z = jnp.concatenate(done + [z], axis=1)
    return jax.lax.stop_gradient(merge(z)), k


def rollout(denoise: Denoise, cond: Cond, steps: FewSteps, key: Array, shape: tuple[int, ...],
            parts: int = 1) -> tuple[Array, list[Array]]:
    """All of the student's steps from noise, for several updates to learn from.

    N evaluations of a row make N samples of it; one by one, each with a simulation of its own,
    they would cost N (N + 1) / 2.

    Args as of `student_inputs`; `parts` are micro-batches, each of every `parts`-th row, so that b
    is the how manieth of its own: B a multiple of N times these.

    Returns:
      ``(z [B, ...], N samples [B, ...])``: z is that of `student_inputs`. In the i-th sample
      example b left at step ``(b + i) mod N``, so that every step is equally often in each, and
      every example at every step in one of them.
    """
    noise, n, unit = step_noise(key, steps.n, shape), steps.n, steps.n * parts
    x_hat = trace_student(denoise, cond, steps, key, shape)[1]
    z = jnp.stack([steps.time.first_input(noise[0]), *(
        process.renoise(x_hat[j - 1], steps.times[j], noise[j]) for j in range(1, n))])

    def left_at(x: Array, turn: int) -> Array:
        columns = [x[(j // parts + turn) % n].reshape(-1, unit, *shape[1:])[:, j]
                   for j in range(unit)]
        return jnp.stack(columns, axis=1).reshape(shape)

    step_assignment(shape[0], unit)  # which refuses another batch
    return jax.lax.stop_gradient((left_at(z, 0), [left_at(x_hat, i) for i in range(n)]))


def step_noise(key: Array, steps: int, shape: tuple[int, ...]) -> Array:
    """Fresh noise of each step, ``[steps, *shape]``; the first is what sampling starts from.

    `key` is one for the whole batch, or a key for each of its rows: then a row's noise does not
    depend on the others, nor on how many there are.
    """
    if key.ndim:
        return jax.vmap(lambda row: step_noise(row, steps, shape[1:]), out_axes=1)(key)
    keys = jax.random.split(key, steps)
    return jax.vmap(lambda one: jax.random.normal(one, shape, jnp.float32))(keys)


def trace_student(denoise: Denoise, cond: Cond, steps: FewSteps, key: Array,
                  shape: tuple[int, ...], mode: str = 'renoise') -> tuple[Array, Array]:
    """Few-step generation without guidance: one network evaluation a step.

    'renoise' draws fresh noise between steps, as in training; 'deterministic' follows the
    predicted velocity from the first noise. `key` is as in `step_noise`.

    Returns:
      ``(latents [B, ...], what each step predicts to be clean [N, B, ...])``; the last is both.

    Raises:
      ValueError: unknown mode.
    """
    if mode not in STUDENT_MODES:
        raise ValueError(f'unknown mode {mode!r}; known: {", ".join(STUDENT_MODES)}')
    noise, times = step_noise(key, steps.n, shape), steps.times
    following = jnp.append(times[1:], 1.0)

    def body(z: Array, inputs: tuple[Array, ...]) -> tuple[Array, Array]:
        t, t_next, fresh = inputs
        x_hat = denoise(z, jnp.full(shape[:1], t), cond)
        if mode == 'deterministic':
            fresh = (z - t * x_hat) / jnp.maximum(1.0 - t, 1e-6)
        return process.renoise(x_hat, t_next, fresh), x_hat

    # The noise of step i + 1 is added after step i; the last renoise (t = 1) adds none.
    first = steps.time.first_input(noise[0])
    return jax.lax.scan(body, first, (times, following, jnp.roll(noise, -1, axis=0)))


def sample_student(denoise: Denoise, cond: Cond, steps: FewSteps, key: Array,
                   shape: tuple[int, ...], mode: str = 'renoise') -> Array:
    """The latents of `trace_student` alone."""
    return trace_student(denoise, cond, steps, key, shape, mode)[0]


@dataclasses.dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance of a teacher's sampler.

    `scale` is w of ``uncond + w (cond - uncond)``, 1 is none; `null` the null prompt's conditioning
    ``[B, ...]``; `rescale(v, v_cond)` a family's own habit with guided velocities.
    """

    scale: float
    null: Cond
    rescale: Callable[[Array, Array], Array] | None = None


def guided(cond: Array, uncond: Array, guidance: float) -> Array:
    """Classifier-free guidance ``uncond + w (cond - uncond)``: w = 1 is no guidance."""
    return uncond + guidance * (cond - uncond)


def trace_teacher(denoise: Denoise, cond: Cond, noise: Array, times: Array,
                  guidance: Guidance | None = None, solver: str = 'euler') -> tuple[Array, Array]:
    """Multi-step sampling of the probability-flow ODE from noise to clean data.

    Args:
      denoise: the teacher.
      cond: conditioning ``[B, ...]``.
      noise: ``[B, ...]`` start.
      times: ``[S + 1]`` of t, rising from 0 to 1 (`TimeMap.grid`).
      guidance: None, or scale 1, evaluates `cond` alone.
      solver: 'euler' (one evaluation a step) or 'heun' (two, but for the last step).

    Returns:
      ``(latents [B, ...], predictions [S, B, ...])``: what is clean by the velocity, guided, with
      which each step begins; the last is both.

    Raises:
      ValueError: unknown solver.
    """
    if solver not in SOLVERS:
        raise ValueError(f'unknown solver {solver!r}; known: {", ".join(SOLVERS)}')
    if guidance is not None and guidance.scale == 1.0:
        guidance = None
    both: Any = None if guidance is None else interleave(cond, guidance.null)

    def slope(x: Array, t: Array) -> Array:
        at = lambda rows: jnp.full((rows,), t)
        if guidance is None:
            return process.to_velocity(x, denoise(x, at(x.shape[0]), cond), t)
        out = denoise(interleave(x, x), at(2 * x.shape[0]), both)
        v_cond, v_uncond = (process.to_velocity(x, o, t) for o in deinterleave(out, 2))
        v = guided(v_cond, v_uncond, guidance.scale)
        return v if guidance.rescale is None else guidance.rescale(v, v_cond)

    def body(x: Array, span: tuple[Array, Array]) -> tuple[Array, Array]:
        t, t_next = span
        v = slope(x, t)
        ahead = x + (t_next - t) * v
        if solver == 'heun':
            # At t = 1 a velocity is 0 / 0: the last step stays Euler's.
            v_ahead = jax.lax.cond(t_next < 1.0, lambda: slope(ahead, t_next), lambda: v)
            ahead = x + (t_next - t) * 0.5 * (v + v_ahead)
        return ahead, process.to_clean(x, v, t)

    return jax.lax.scan(body, noise, (times[:-1], times[1:]))


def sample_teacher(denoise: Denoise, cond: Cond, noise: Array, times: Array,
                   guidance: Guidance | None = None, solver: str = 'euler') -> Array:
    """The latents of `trace_teacher` alone."""
    return trace_teacher(denoise, cond, noise, times, guidance, solver)[0]


def evaluations(steps: int, guidance: float = 1.0, solver: str = 'euler') -> int:
    """Network evaluations of one image by `sample_teacher`."""
    at_once = 1 if guidance == 1 else 2
    return at_once * (2 * steps - 1 if solver == 'heun' else steps)
