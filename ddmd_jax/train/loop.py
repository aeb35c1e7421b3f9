"""The loop both tasks share: batches in, state forward, numbers, pictures and checkpoints out."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
from jax.sharding import Mesh

from ddmd_jax import sharding
from ddmd_jax.train import checkpoint as ckpt, state as st
from ddmd_jax.train.feed import Feed
from ddmd_jax.train.logs import RunLog, means
from ddmd_jax.train.startup import Startup


class DivergedError(RuntimeError):
    """NaN or Inf in a loss or gradient; the update was not written."""


class Seconds(NamedTuple):
    """Of a run in this process: in all, and of those in which no batch was ready."""

    train: float
    input_wait: float


@dataclasses.dataclass(frozen=True)
class Task:
    """What a kind of run brings to the loop.

    `make_state(*source)` builds the state at step 0: from nothing, or from frozen weights.
    `place(batch)` brings one of `data` to the devices without waiting for it. `advance` moves
    the state by one step, calling for as many of those as it needs, and returns device scalars;
    `finite` among them says whether the update was written. `probe(state)` gives further scalars
    of each logged interval; `annotate(intervals logged before, this one)` may add words to it.
    `startup` compiles what `advance` calls, and counts the seconds until it can. `host` names
    fields of the state that stay in the hosts' memory, `data_identity` what is trained on.
    """

    name: str
    make_state: Callable[..., st.TrainState]
    source: tuple[Any, ...]
    rules: sharding.Rules
    data: grain.DatasetIterator
    place: Callable[[Any], Any]
    advance: Callable[[st.TrainState, Callable[[], Any]], tuple[st.TrainState, dict[str, Any]]]
    words: Callable[[dict[str, float]], str]
    probe: Callable[[st.TrainState], dict[str, Any]]
    annotate: Callable[[list[dict[str, Any]], dict[str, float]], dict[str, Any]]
    pictures: Callable[[st.TrainState, int, RunLog], None]
    startup: Startup = dataclasses.field(default_factory=Startup)
    host: tuple[str, ...] = ()
    data_identity: str = 'none'


def run(task: Task, config: Any, workdir: Path, mesh: Mesh,
        identity: str) -> tuple[st.TrainState, Seconds]:
    """Trains to `config.train.steps`, resuming what `workdir` holds; (state, what it took).

    Raises:
      CheckpointError: `workdir` holds another run's checkpoints.
      DivergedError: a loss or gradient stopped being finite.
    """
    manifest = ckpt.comparable(config.to_dict()) | {
        'teacher_identity': identity, 'data_identity': task.data_identity}
    checkpoints = ckpt.Checkpoints(workdir, keep=config.checkpoint.keep, manifest=manifest)
    try:
        if (checkpoints.latest or 0) < config.train.steps:
            task.startup.compiling.start()
        feed = Feed(task.data, task.place)
        with task.startup.stage('state'):
            state = jax.block_until_ready(_start(task, checkpoints, feed, mesh))
        start = time.monotonic()
        state = _train(task, config, workdir, feed, checkpoints, state)
        return state, Seconds(time.monotonic() - start, feed.waited)
    finally:
        checkpoints.close()


def _start(task: Task, checkpoints: ckpt.Checkpoints, feed: Feed, mesh: Mesh) -> st.TrainState:
    if checkpoints.latest is None:
        feed.start_prefetch()
        return st.create(task.make_state, task.rules, mesh, *task.source, host=task.host)
    abstract, shardings = st.abstract_and_shardings(
        task.make_state, task.rules, mesh, *task.source, host=task.host)
    return checkpoints.restore(abstract, shardings, feed)


def _train(task: Task, config: Any, workdir: Path, feed: Feed, checkpoints: ckpt.Checkpoints,
           state: st.TrainState) -> st.TrainState:
    first = step = int(state.step)
    total = config.train.steps
    log = RunLog(workdir, step, total, task.name)
    if step:
        log.say(f'resumed {workdir} at step {step}')

    def next_batch() -> Any:
        with task.startup.stage('first batch'):
            return next(feed)

    pending: list[dict[str, Any]] = []
    try:
        if step == 0:
            task.pictures(state, 0, log)
        while step < total:
            state, metrics = task.advance(state, next_batch)
            if step == first and task.startup.compiling.finished:
                log.say(task.startup.words())
            # Looked at one step late, so that the host never waits for the device.
            if pending:
                _must_be_finite(pending[-1], step, checkpoints)
            pending.append(metrics)
            step += 1
            log.tick(step)
            last = step == total
            if last or step % config.log.every == 0:
                _must_be_finite(metrics, step, checkpoints)
                values = means(pending) | means([task.probe(state)])
                values = task.annotate(log.history, values)
                log.scalars(step, values, task.words(values))
                pending = []
            if last or step % config.log.images_every == 0:
                task.pictures(state, step, log)
            if last or step % config.checkpoint.every == 0:
                _must_be_finite(metrics, step, checkpoints)
                checkpoints.save(step, state, feed)
        checkpoints.wait()
        return state
    finally:
        log.close()


def _must_be_finite(metrics: dict[str, Any], step: int, checkpoints: ckpt.Checkpoints) -> None:
    if bool(metrics['finite']):
        return
    checkpoints.wait()
    kept = 'no checkpoint had been written yet' if checkpoints.latest is None else (
        f'the last good checkpoint, step {checkpoints.latest}, is kept')
    bad = [k for k, v in jax.device_get(metrics).items() if v != v or abs(v) == float('inf')]
    raise DivergedError(f'step {step}: NaN or Inf in {", ".join(bad) or "a gradient"}; that update '
                        f'was not written and {kept}; lower the learning rate or clip harder')
