"""A run, from top to bottom: `distill` builds one, `fit` trains any task to its end.

Sections: mesh, teacher, prompts, state, programs; then restore, loop, end. A step that goes wrong
raises `DivergedError` out of one attempt, and `fit` begins the next one from the last checkpoint
with that step's batches left out, if `train.on_nan` says so.
"""

import contextlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax

from ddmd_jax.data.order import Order, OrderByShape
from ddmd_jax.evaluation import evaluate as evaluation
from ddmd_jax.families import Teacher
from ddmd_jax.parallel import distributed, sharding
from ddmd_jax.train import prompts as prompt_sources
from ddmd_jax.train.distillation import (
    Distillation,
    load_teacher,
    parts_of_batch,
    plan,
)
from ddmd_jax.train.durable import guards, resume, rollback, signals
from ddmd_jax.train.durable.checkpoint import CheckpointError
from ddmd_jax.train.durable.rollback import DivergedError, Taken
from ddmd_jax.train.durable.saving import Checkpoints
from ddmd_jax.train.feed import Feed
from ddmd_jax.train.startup import Startup
from ddmd_jax.train.state import StateSpec, TrainState
from ddmd_jax.train.watch.logs import RunLog, means, record
from ddmd_jax.train.watch.profiling import Window
from ddmd_jax.train.watch.student import request_of, suite_of
from ddmd_jax.util.places import Place
from ddmd_jax.weights import flat
from ddmd_jax.weights.flat import WeightsError


class Task(Protocol):
    """The part of `fit` that differs with the kind of run.

    Attributes:
      name: text of the progress bar.
      spec: how its state is built and laid out.
      order: which rows a batch holds.
      identities: of what it is trained from and on; a checkpoint must agree with them.
      startup: compiles what `step` calls, and counts the seconds until it can.
    """

    name: str
    spec: StateSpec
    order: Order | OrderByShape
    identities: dict[str, str]
    startup: Startup

    def feed(self, skip: frozenset[int]) -> Feed:
        """Batches on the devices from the first on, but for those whose number is in `skip`."""

    def step(self, state: TrainState, next_batch: Callable[[], Any],
             fresh: bool) -> tuple[TrainState, dict[str, Any]]:
        """One step, with as many batches as it needs; device scalars, `finite` among them.

        `fresh`: the state was made, restored or acted on since the last step.
        """

    def measure(self, state: TrainState, history: list[dict[str, Any]],
                values: dict[str, Any]) -> tuple[dict[str, Any], str]:
        """(all values of a logged line, whose `step` and means are `values`; text for the bar)."""

    def show(self, state: TrainState, step: int, log: RunLog) -> None:
        """Logs images of the state."""

    def read_weights(self, path: str) -> Any:
        """Weights that are no checkpoint, for `init_from`."""


class Options(NamedTuple):
    """A command's additions to a config.

    Attributes:
      profile: first and last step to profile.
      report: writes a report of the folder that it is given.
      about: how the run was called and where, for ``run.json``.
    """

    profile: tuple[int, int] | None = None
    report: Callable[[Place], Any] | None = None
    about: dict[str, Any] | None = None


NOTHING_ELSE = Options()


class Seconds(NamedTuple):
    """Of a run in this process: training, of which waiting for input after its first step."""

    train: float
    input_wait: float


# ------------------------------------------------------------------------------------ distillation


def distill(config: Any, workdir: Place, options: Options = NOTHING_ELSE) -> None:
    """Distils `config`'s teacher, evaluates the EMA student, writes its results to `workdir`.

    Raises:
      CheckpointError, DataFileError, ShardingError, WeightsError: it cannot begin or go on.
      DivergedError: a loss or gradient stopped being finite, for good.
      Stopped: a signal asked for it; everything is saved.
    """
    started = time.monotonic()
    task = prepare(config)
    state, seconds = fit(task, config, workdir, options)

    # -------------------------------------------------------------------------------- evaluation
    ema, step = state.ema, int(state.step)
    del state  # critic and optimisers make room for images
    compared = evaluation.Comparison(config, task.teacher, task.network(ema), step, task.spec.mesh,
                                     flat.corner_identity(ema, task.spec.mesh))
    suite = suite_of(config)
    timings = lambda: {**seconds._asdict(), 'total': time.monotonic() - started}
    if suite:
        encode = prompt_sources.image_encoder(config, task.teacher, task.spec.mesh)
        evaluation.evaluate(compared, suite, encode, workdir, timings)
    elif task.teacher.latents.decode:
        shown = min(evaluation.SHEET_ROWS, config.eval.prompts)
        evaluation.sheet(compared, request_of(task.prompts, shown, config.seed), workdir)


def prepare(config: Any, teacher: Teacher | None = None) -> Distillation:
    """Everything that `fit` needs to distil `config`'s teacher, or the one that is given.

    Raises:
      DataFileError, ShardingError, WeightsError: see `distill`.
    """
    # -------------------------------------------------------------------------------------- mesh
    # The batch lies over `data` and `fsdp`, parameters over `fsdp` and `tensor`. Every part of a
    # batch must have rows on every device: each micro-batch, each step that it is simulated to.
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config.data.global_batch, mesh, parts_of_batch(config))

    # ----------------------------------------------------------------------------------- teacher
    # Frozen. Student and critic start as copies of it; its identity is in every checkpoint.
    startup = Startup()
    with startup.stage('weights'):
        teacher = teacher or load_teacher(config, mesh)
    suite = suite_of(config)
    if suite and not teacher.latents.decode:
        raise WeightsError(f'{config.teacher.path} has no autoencoder, and eval.suite measures '
                           "images: give the pipeline's folder, or a config without a suite")
    if suite and suite.watched:
        suite.watched(1, 1, config.seed)  # reads its judge: one that is no good is told now

    # ----------------------------------------------------------------------------------- prompts
    # One global order of batches, a function of the seed and of a batch's number alone.
    prompts = prompt_sources.load(config, teacher, mesh)
    shapes = tuple(map(teacher.latents.shape_of, config.data.get('sizes', ()))) or (
        teacher.latents.shape,)
    order: Order | OrderByShape
    if prompts.shape_of is None:
        order = Order(prompts.rows, config.data.global_batch, config.seed, prompts.lengths,
                      config.data.get('lengths', ()), shapes)
    else:
        order = OrderByShape(prompts.rows, config.data.global_batch, config.seed, prompts.shapes,
                             prompts.shape_of)

    # ------------------------------------------------------------------------------------- state
    # Shapes and layout of student, critic, EMA and optimisers, and the two updates over them;
    # nothing is allocated yet.
    planned = plan(config, teacher, prompts.null, mesh)

    # ---------------------------------------------------------------------------------- programs
    # Compiled in a thread while the state is read: a program for every shape a batch may have.
    return Distillation(config, teacher, prompts, order, planned, startup)


# ----------------------------------------------------------------------------------- any task, run


def fit(task: Task, config: Any, workdir: Place,
        options: Options = NOTHING_ELSE) -> tuple[TrainState, Seconds]:
    """Trains to `config.train.steps` from where `resume` says; (state, what it took).

    Raises:
      CheckpointError: `workdir` holds another run's checkpoints, or the last one could not be
        written.
      DistributedError: the teacher or the data of this process are not those of process 0.
      DivergedError: a loss or gradient stopped being finite; rollback is off, or has not helped.
      Stopped: a signal asked for it; everything is saved.
    """
    distributed.agree('teacher or data', task.identities)
    opening, started = '', time.monotonic()
    while True:
        try:
            state, waited = _attempt(task, config, workdir, options, opening)
            return state, Seconds(time.monotonic() - started, waited)
        except DivergedError as e:
            failed = e.with_traceback(None)  # its frames hold the state that is given up
        opening = rollback.leave_out(failed, config, workdir, task.order)


def fit_and_write(task: Any, config: Any, file: Place, options: Options = NOTHING_ELSE) -> None:
    """`fit`, in the folder of `file`, to which process 0 then writes the EMA weights.

    Args:
      task: a `Task` that can also `write(file, params, step)`, which returns figures by name.

    Raises:
      CheckpointError, DivergedError, Stopped: see `fit`.
    """
    state, seconds = fit(task, config, file.parent, options)
    whole = jax.jit(lambda tree: tree, out_shardings=sharding.replicated(task.spec.mesh))(state.ema)
    if jax.process_index() == 0:
        figures = task.write(file, jax.device_get(whole), int(state.step))
        print('; '.join([f'{file} written after {seconds.train:.0f} s of training in this run',
                         *(f'{name} {value}' for name, value in figures.items())]))


def _attempt(task: Task, config: Any, workdir: Place, options: Options,
             opening: str) -> tuple[TrainState, float]:
    """One go at the steps: (the state at the end, seconds that input was waited for)."""
    total, c = config.train.steps, config

    # ----------------------------------------------------------------------------------- restore
    bad_steps = rollback.read(workdir)
    manifest = resume.manifest_of(config, task.identities)
    with contextlib.closing(Checkpoints.of(config, workdir, manifest, bad_steps)) as checkpoints, \
            contextlib.ExitStack() as stack:
        if (checkpoints.latest or 0) < total:
            task.startup.compiling.start()
        feed = task.feed(rollback.skipped(bad_steps))
        source = resume.choose(config, checkpoints)
        with task.startup.stage('state'):
            state = jax.block_until_ready(resume.start(source, task, checkpoints, feed))
        step = first = int(state.step)
        if step > total:
            raise CheckpointError(f'config.train.steps is {total}, and this run has done {step} '
                                  'already; raise it, or choose another --workdir')
        record(workdir, config, options.about)  # now that the folder is known to be this run's

        log = stack.enter_context(contextlib.closing(
            RunLog(workdir, step, total, task.name, config)))
        window = stack.enter_context(contextlib.closing(
            Window(options.profile, workdir / 'profile', log.say)))
        report = options.report
        for line in (opening, resume.described(source, workdir, step)):
            if line:
                log.say(line)
        if step == 0:
            task.show(state, 0, log)

        # ---------------------------------------------------------------------------------- loop
        # `interval` holds the metrics since the last logged line, those of steps before a restart
        # too: a line comes out the same wherever a run was interrupted.
        interval, pending, fresh, stop = list(checkpoints.interval), None, True, ''
        while step < total and not stop:
            before = feed.get_state()
            window.before(step + 1)
            # Of a distillation: critic updates, each on a fresh batch, then one of the generator.
            state, metrics = task.step(state, lambda: _first_timed(task, feed), fresh)
            fresh = False
            # Looked at one step late, so that the host never waits for the device.
            rollback.check(pending, checkpoints)
            step += 1
            pending = Taken(step, metrics, (before, feed.get_state()))
            interval.append(metrics)
            window.after(step, state)
            log.tick(step)
            if step == first + 1:
                feed.waited = 0.0  # until here programs were waited for
                # From here on there is something to save: a signal waits for the step's end.
                stack.enter_context(signals.deferred())
                if task.startup.compiling.finished:
                    log.say(task.startup.summary())

            due = lambda every, step=step: step == total or step % every == 0
            signal = signals.asked_to_stop(step)

            # Log: means of the interval, figures of the state, the verdict, and what it asks for.
            if due(c.log.every):
                rollback.check(pending, checkpoints)
                values, text = task.measure(state, log.history, {'step': step, **means(interval)})
                log.scalars(step, values, text)
                interval = []
                checkpoints.judge(values)
                if spike := guards.spike([v['loss'] for v in log.history], c.train.spike):
                    log.say(f'warning: step {step}: {spike}')
                remedy = guards.agreed_remedy(log.history, c.train.get('on_health', 'nothing'))
                if remedy.ends:
                    stop = remedy.text
                elif remedy.text:
                    state, fresh = remedy.act(state), True
                if remedy.text:
                    log.say(f'step {step}: {remedy.text}')

            # Show: images, and the report, for which no run ends.
            if due(c.log.images_every):
                task.show(state, step, log)
                report = log.attempt(report, workdir)

            # Save, beside the next steps; a save that has failed meanwhile is tried once more.
            if due(c.checkpoint.every) or signal or stop or checkpoints.lost(
                    jax.process_count() == 1 or step % c.log.every == 0):
                rollback.check(pending, checkpoints)
                checkpoints.save(step, state, feed, interval)
            if signal:
                checkpoints.settle(step, state, feed, interval)
                raise signals.Stopped(
                    f'{signal}: stopped at step {step} of {total}, saved in '
                    f'{checkpoints.directory}; run the same command to go on')

        # ----------------------------------------------------------------------------------- end
        if step > first:
            checkpoints.settle(step, state, feed, interval)
        return state, feed.waited


def _first_timed(task: Task, feed: Feed) -> Any:
    """The next batch; the time of the first one is the start's."""
    with task.startup.stage('first batch'):
        return next(feed)


def replay(task: Task, config: Any, workdir: Place) -> dict[str, Any]:
    """Runs the newest step of ``bad_batches.jsonl`` again, from where the run went back to.

    Returns its entry with `metrics`, a figure for each; writes nothing.

    Raises:
      GuardError: there is no such step, its checkpoint is gone, or the verdict changed the recipe
        between the two.
    """
    earlier, entry = rollback.newest(workdir)
    source = resume.recorded(config, workdir, entry['checkpoint'])
    feed = task.feed(rollback.skipped(earlier))
    state, _ = resume.begin(source, resume.manifest_of(config, task.identities), task, feed)
    now = {name: float(value) for name in rollback.BY_HEALTH
           if (value := getattr(state, name)) is not None}
    if changed := [name for name, value in now.items() if entry.get(name, value) != value]:
        raise rollback.GuardError(
            f'step {entry["step"]} cannot be replayed: train.on_health changed '
            f'{" and ".join(changed)} after its checkpoint, and the steps between would differ')
    first = int(state.step)
    for step in range(first, entry['step']):
        state, metrics = task.step(state, lambda: next(feed), step == first)
    return entry | {'metrics': {k: float(v) for k, v in jax.device_get(metrics).items()}}
