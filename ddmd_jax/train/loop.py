"""The loop both tasks share: batches in, state forward, numbers, pictures and checkpoints out."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
from jax.sharding import Mesh

from ddmd_jax.data.order import Order
from ddmd_jax.parallel import sharding
from ddmd_jax.train import state as st
from ddmd_jax.train.durable import checkpoint as ckpt, guards, resume, saving, signals
from ddmd_jax.train.feed import Feed
from ddmd_jax.train.startup import Startup
from ddmd_jax.train.watch import profiling
from ddmd_jax.train.watch.logs import RunLog, means
from ddmd_jax.train.watch.profiling import NOTHING, Beside


class DivergedError(RuntimeError):
    """NaN or Inf in a loss or gradient; the update was not written.

    `step` is the one that went wrong, `taken` the state of the data before and after it, `bad`
    the metrics that were not finite.
    """

    step: int
    taken: tuple[Any, Any]
    bad: list[str]


class Seconds(NamedTuple):
    """Of a run in this process: in all, and after its first step without a batch being ready."""

    train: float
    input_wait: float


@dataclasses.dataclass(frozen=True)
class Task:
    """What a kind of run brings to the loop.

    `make_state(*source)` builds the state at step 0: from nothing, or from frozen weights.
    `place(batch)` brings one of `data` to the devices without waiting for it. `advance` moves
    the state by one step, calling for as many of those as it needs, and returns device scalars;
    `finite` among them says whether the update was written. It is told whether the step is the
    first since the state was made, restored or acted on. `probe(state)` gives further scalars
    of each logged interval; `annotate(those logged before, step, this one)` may add words to it.
    `startup` compiles what `advance` calls, and counts the seconds until it can. `host` names
    fields of the state that stay in the hosts' memory, `data_identity` what is trained on.
    `order` says which rows a batch holds; `read_weights(path)` reads weights that are no
    checkpoint, for `config.init_from`. `draws(step, workdir)` writes down which alpha and tau
    were drawn until that step.
    """

    name: str
    make_state: Callable[..., st.TrainState]
    source: tuple[Any, ...]
    rules: sharding.Rules
    data: grain.DatasetIterator
    place: Callable[[Any], Any]
    advance: Callable[[st.TrainState, Callable[[], Any], bool],
                      tuple[st.TrainState, dict[str, Any]]]
    words: Callable[[dict[str, float]], str]
    probe: Callable[[st.TrainState], dict[str, Any]]
    annotate: Callable[[list[dict[str, Any]], int, dict[str, float]], dict[str, Any]]
    pictures: Callable[[st.TrainState, int, RunLog], None]
    startup: Startup = dataclasses.field(default_factory=Startup)
    host: tuple[str, ...] = ()
    data_identity: str = 'none'
    order: Order | None = None
    read_weights: Callable[[str], Any] | None = None
    draws: Callable[[int, Path], None] = lambda step, workdir: None


def run(task: Task, config: Any, workdir: Path, mesh: Mesh, identity: str,
        beside: Beside = NOTHING) -> tuple[st.TrainState, Seconds]:
    """Trains to `config.train.steps` from where `resume` says; (state, what it took).

    Raises:
      CheckpointError: `workdir` holds another run's checkpoints, or the last one could not be
        written.
      DivergedError: a loss or gradient stopped being finite, and that is not to be, or cannot
        be, gone back on.
      Stopped: a signal asked for it; everything is saved.
    """
    bad = guards.read_bad(workdir)
    checkpoints = open_checkpoints(task, config, workdir, identity, bad)
    try:
        if (checkpoints.latest or 0) < config.train.steps:
            task.startup.compiling.start()
        feed = Feed(task.data, task.place, guards.skipped(bad))
        source, begun = resume.choose(config, checkpoints), feed.get_state()
        with task.startup.stage('state'):
            state = jax.block_until_ready(_start(task, source, checkpoints, feed, mesh))
        words, start = resume.words(source, workdir, int(state.step)), time.monotonic()
        while True:
            failed = None
            try:
                training = _Training(task, config, workdir, feed, checkpoints, state, beside)
                state = training.run(words)
                return state, Seconds(time.monotonic() - start, feed.waited)
            except DivergedError as e:
                failed = e.with_traceback(None)  # its frames hold the state that is given up
            state = training = None
            bad = _left_out(failed, task, config, checkpoints, bad)
            if jax.process_index() == 0:
                guards.record_bad(workdir, bad[-1])
            feed.skip = guards.skipped(bad)
            if checkpoints.latest is None:
                feed.set_state(begun)  # from `source` again, as if the run had not begun
            else:
                checkpoints.pinned.add(checkpoints.latest)
                source = resume.choose(config, checkpoints)
            state = _start(task, source, checkpoints, feed, mesh)
            words = (f'{failed}; back at step {int(state.step)}, leaving out batches '
                     f'{", ".join(map(str, bad[-1]["batches"]))}')
    finally:
        checkpoints.close()


def open_checkpoints(task: Task, config: Any, workdir: Path, identity: str,
                     bad: Sequence[Mapping[str, Any]] = ()) -> saving.Checkpoints:
    """The run's checkpoints; see `Checkpoints`. Those gone back to from `bad` steps stay."""
    c = config.checkpoint
    return saving.Checkpoints(
        workdir, keep=c.keep, keep_every=c.keep_every, best=c.best, best_mode=c.best_mode,
        timeout=c.timeout, manifest=manifest_of(task, config, identity),
        pinned=[entry['checkpoint'] for entry in bad])


def manifest_of(task: Task, config: Any, identity: str) -> dict[str, Any]:
    """What a checkpoint of this run says of itself; see `checkpoint.check_manifest`."""
    return ckpt.comparable(config.to_dict()) | ckpt.versions() | {
        'teacher_identity': identity, 'data_identity': task.data_identity}


def _start(task: Task, source: resume.Source, checkpoints: saving.Checkpoints, feed: Feed,
           mesh: Mesh) -> st.TrainState:
    return resume.start(source, checkpoints, task.make_state, task.rules, mesh, task.source,
                        task.host, feed, task.read_weights)


def _left_out(failed: DivergedError, task: Task, config: Any, checkpoints: saving.Checkpoints,
              bad: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`bad` and what is recorded of the step that failed; raises `failed` if that is no help."""
    if config.train.on_nan != 'rollback':
        raise failed
    first, last = (state['next_index'] for state in failed.taken)
    numbers = [n for n in range(first, last) if n not in guards.skipped(bad)]
    bad = [*bad, {
        'step': failed.step, 'checkpoint': checkpoints.latest, 'bad': failed.bad,
        'batches': numbers, 'time': round(time.time()),
        'rows': [task.order[n].rows.tolist() for n in numbers] if task.order else []}]
    if guards.exhausted(bad):
        place = 'the start' if checkpoints.latest is None else f'step {checkpoints.latest}'
        raise DivergedError(f'{failed}; went back to {place} {guards.MOST} times already: it is '
                            'not the batches')
    return bad


class _Step(NamedTuple):
    """One step's number, its metrics, and the state of the data before and after it."""

    number: int
    metrics: dict[str, Any]
    taken: tuple[Any, Any]


class _Training:
    """One go at the steps: to the end, to a signal, or to a step that goes wrong.

    `interval` holds the metrics since the last logged line, also of steps before a restart, so
    that a line comes out the same wherever a run was interrupted.
    """

    def __init__(self, task: Task, config: Any, workdir: Path, feed: Feed,
                 checkpoints: saving.Checkpoints, state: st.TrainState,
                 beside: Beside):
        self.task, self.config, self.workdir = task, config, workdir
        self.feed, self.checkpoints, self.state = feed, checkpoints, state
        self.step, self.total = int(state.step), config.train.steps
        self.log = RunLog(workdir, self.step, self.total, task.name, config)
        self.interval = list(checkpoints.interval)
        self.newest: _Step | None = None
        self.unsettled = False  # whether it is not known yet how the last save went
        self.changed = True  # whether the state is another than the last step's
        self.profile = profiling.Window(beside.profiled, workdir / 'profile', self.log.say)
        self.report = beside.report

    def run(self, words: str) -> st.TrainState:
        """The state at the end; `words` are said at first.

        Raises:
          CheckpointError: the last state could not be written.
          DivergedError, Stopped: see `run`.
        """
        with contextlib.closing(self.log), contextlib.closing(self.profile):
            if words:
                self.log.say(words)
            if self.step == 0:
                self.task.pictures(self.state, 0, self.log)
            first, ended = self.step + 1, self.step >= self.total
            with contextlib.ExitStack() as held:
                while not ended:
                    self._advance()
                    if self.step == first:
                        self.feed.waited = 0.0  # until here programs were waited for
                        # Programs are waited for before, and there is nothing to save: no
                        # signal need wait for that.
                        held.enter_context(signals.deferred())
                        if self.task.startup.compiling.finished:
                            self.log.say(self.task.startup.words())
                    ended = self._after_step()
                self._must_be_saved()
        return self.state

    def _next_batch(self) -> Any:
        with self.task.startup.stage('first batch'):
            return next(self.feed)

    def _advance(self) -> None:
        before = self.feed.get_state()
        self.profile.before(self.step + 1)
        self.state, metrics = self.task.advance(self.state, self._next_batch, self.changed)
        self.changed = False
        # Looked at one step late, so that the host never waits for the device.
        self._must_be_finite()
        self.step += 1
        self.newest = _Step(self.step, metrics, (before, self.feed.get_state()))
        self.interval.append(metrics)
        self.profile.after(self.step, self.state)
        self.log.tick(self.step)

    def _after_step(self) -> bool:
        """Logs, shows and saves what is due; whether training ends here."""
        c, step, last = self.config, self.step, self.step == self.total
        signal, unwell = signals.asked_to_stop(step), ''
        if last or step % c.log.every == 0:
            unwell = self._log_interval()
        if last or step % c.log.images_every == 0:
            self.task.pictures(self.state, step, self.log)
            self._report()
        if last or signal or unwell or step % c.checkpoint.every == 0:
            self._save()
            self.unsettled = True
        elif self._save_failed():
            self._save()  # once more; should that fail, the next one due is the next
        if signal:
            self._must_be_saved()
            raise signals.Stopped(f'{signal}: stopped at step {step} of {self.total}, saved in '
                                  f'{self.checkpoints.directory}; run the same command to go on')
        if unwell:
            self.log.say(f'step {step}: {unwell}')
        return last or bool(unwell)

    def _report(self) -> None:
        """Has the report written, if there is to be one; no run ends for it."""
        if self.report is None or jax.process_index():
            return
        try:
            self.task.draws(self.step, self.workdir)
            self.report(self.workdir)
        except Exception as e:  # of a template, a plotting library, a disk
            self.report = None
            self.log.say(f'warning: the report cannot be written ({ckpt.first_line(e)}); later: '
                         f'python -m ddmd_jax.report {self.workdir}')

    def _save_failed(self) -> bool:
        """Whether the last save that was due is now known to have failed; said only once.

        Several processes have to agree, and ask one another for as long as they do not know, but
        not after every step: where a line is logged.
        """
        asked = jax.process_count() == 1 or self.step % self.config.log.every == 0
        if not self.unsettled or not asked or ckpt.anywhere(self.checkpoints.under_way):
            return False
        self.unsettled = False
        return bool(self.checkpoints.wait())

    def _log_interval(self) -> str:
        """One line of metrics; why training has to end with it, or ''."""
        self._must_be_finite()
        task, train = self.task, self.config.train
        values = means(self.interval) | means([task.probe(self.state)])
        values = task.annotate(self.log.history, self.step, values)
        self.log.scalars(self.step, values, task.words(values))
        self.interval = []
        self.checkpoints.judge(values)
        spike = guards.spike([v['loss'] for v in self.log.history], train.spike)
        if spike:
            self.log.say(f'warning: step {self.step}: {spike}')
        return self._see_to_health(train.get('on_health', 'nothing'))

    def _see_to_health(self, how: str) -> str:
        """Does what a bad verdict asks for; words if that is to end the run, else ''."""
        words = guards.remedy(self.log.history, how)
        # Only process 0 has the lines of a run that was resumed: what it says goes for all.
        if how == 'nothing' or not ckpt.anywhere(bool(words) and jax.process_index() == 0):
            return ''
        if how in guards.STOPS:
            return words or 'stopped by process 0'
        self.state, self.changed = guards.act(self.state, how), True
        self.log.say(f'step {self.step}: {words}')
        return ''

    def _save(self) -> None:
        self._must_be_finite()
        self.checkpoints.save(self.step, self.state, self.feed, jax.device_get(self.interval))

    def _must_be_saved(self) -> None:
        """Waits for the last save; one that failed is tried once more.

        Raises:
          CheckpointError: in vain.
        """
        if not self.checkpoints.wait():
            return
        self._save()
        reason = self.checkpoints.wait()
        if reason:
            kept = self.checkpoints.latest
            raise ckpt.CheckpointError(
                f'step {self.step} could not be saved, twice ({reason}); '
                + ('nothing was saved before' if kept is None else f'step {kept} is the newest '
                   f'checkpoint in {self.checkpoints.directory}')
                + '; make room, then run the same command to go on from there')

    def _must_be_finite(self) -> None:
        if self.newest is None or bool(self.newest.metrics['finite']):
            return
        self.checkpoints.wait()
        kept = 'no checkpoint had been written yet' if self.checkpoints.latest is None else (
            f'the last good checkpoint, step {self.checkpoints.latest}, is kept')
        metrics = jax.device_get(self.newest.metrics)
        bad = [k for k, v in metrics.items() if v != v or abs(v) == float('inf')]
        error = DivergedError(
            f'step {self.newest.number}: NaN or Inf in {", ".join(bad) or "a gradient"}; that '
            f'update was not written and {kept}; lower the learning rate or clip harder')
        error.step, error.taken, error.bad = self.newest.number, self.newest.taken, bad
        raise error


def replay(task: Task, config: Any, workdir: Path, mesh: Mesh, identity: str) -> dict[str, Any]:
    """Runs the newest step of ``bad_batches.jsonl`` again, from where the run went back to.

    Returns its entry with `metrics`, a figure for each; writes nothing.

    Raises:
      GuardError: there is no such step, or its checkpoint is gone.
    """
    *earlier, entry = guards.read_bad(workdir) or [None]
    if entry is None:
        raise guards.GuardError(f'{workdir / guards.NAME} is not there: no batch has been left out '
                                "(train.on_nan='rollback' leaves out)")
    if entry['checkpoint'] is None:
        source = resume.origin(config)
    else:
        source = resume.Source(resume.RESUME, workdir / 'checkpoints' / str(entry['checkpoint']))
        if not source.path.is_dir():
            raise guards.GuardError(f'{source.path} is gone, from which step {entry["step"]} went '
                                    'wrong; it cannot be replayed')
    feed = Feed(task.data, task.place, guards.skipped(earlier))
    state, _ = resume.begin(source, manifest_of(task, config, identity), task.make_state,
                            task.rules, mesh, task.source, task.host, feed, task.read_weights)
    first = int(state.step)
    for step in range(first, entry['step']):
        state, metrics = task.advance(state, lambda: next(feed), step == first)
    return entry | {'metrics': {k: float(v) for k, v in jax.device_get(metrics).items()}}
