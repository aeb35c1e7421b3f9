"""Asynchronous checkpoint saving by Orbax: retention, failures told, one retry."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies
from tqdm import tqdm

from ddmd_jax.train.durable import checkpoint as ckpt, checksums
from ddmd_jax.train.durable.checkpoint import CheckpointError
from ddmd_jax.train.durable.quiet_orbax import quiet_orbax
from ddmd_jax.train.feed import Feed
from ddmd_jax.util import files, places
from ddmd_jax.util.places import Place
from ddmd_jax.util.text import first_line

STAYS_AWAY, GIVES_UP = 0.5, 5.0  # seconds; they came back .1 s after they had been deleted


@dataclasses.dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the newest `keep`, multiples of `every`, the best, and `pinned`.

    The best is the one with the least or greatest (`mode`) metric `best`; '' is none.
    """

    keep: int = 1
    every: int = 0
    best: str = ''
    mode: str = 'min'
    pinned: frozenset[int] = frozenset()

    def policy(self) -> policies.PreservationPolicy:
        """As Orbax has it."""
        kept: list[Any] = [policies.LatestN(self.keep), policies.CustomSteps(self.pinned)]
        if self.every:
            kept.append(policies.EveryNSteps(self.every))
        if self.best:
            kept.append(policies.BestN(get_metric_fn=self.figure, reverse=self.mode == 'min', n=1,
                                       keep_checkpoints_without_metrics=False))
        return policies.AnyPreservationPolicy(kept)

    def figure(self, metrics: Mapping[str, float]) -> float:
        """What a checkpoint is judged by; the worst there is if it was judged by another figure,
        which a resumed run may name, or by one that is not finite."""
        value = metrics.get(self.best, math.nan)
        return value if math.isfinite(value) else math.inf if self.mode == 'min' else -math.inf


class HungError(CheckpointError):
    """A save does not come back. Its threads cannot be stopped, and an exit would wait for them:
    only `os._exit` ends the process."""


class _Save(NamedTuple):
    """A save under way, or the last one."""

    step: int
    before: int | None  # newest checkpoint when it began
    deadline: float  # by `time.monotonic`
    written: futures.Future


class Checkpoints:
    """One run's checkpoints under ``workdir/checkpoints``; saving is asynchronous.

    Checkpoints whose files are damaged are moved to ``workdir/damaged`` at first, with a warning
    that names them, so that the newest of the others counts as the latest.

    One thread does all that is Orbax's in a save: whoever asks for it waits for that thread, and
    not for longer than `timeout`.

    Args:
      workdir: the run's folder.
      manifest: whose the checkpoints are, and versions.
      retention: which of them stay.
      timeout: seconds within which a save has to be on disk.

    Raises:
      CheckpointError: there are checkpoints, and every one of them is damaged.

    Attributes:
      stalled: seconds that the last save has held up its caller.
      interval: metrics of steps that had not been logged when the state restored was saved.
    """

    def __init__(self, workdir: Place, manifest: Mapping[str, Any],
                 retention: Retention = Retention(), timeout: float = 1800):
        self.manifest = dict(manifest) | {ckpt.FORMAT_FIELD: ckpt.FORMAT}
        self.directory = workdir / 'checkpoints'
        self.best = retention.best
        self.interval: list[Any] = []
        self.timeout, self.stalled = timeout, 0.0
        self._judged: dict[str, float] | None = None  # since the last save
        self._saved_as: dict[str, float] | None = None  # what the last save was judged by
        self._failed = ''  # why the last save failed
        self._committed: int | None = None  # the last one that Orbax has finished
        self._save: _Save | None = None
        self._unsettled = False  # whether nobody has asked yet how the last save went
        self._retry = False  # whether the next save stands for one that failed
        self._worker = futures.ThreadPoolExecutor(1, 'checkpoints')
        quiet_orbax()
        ckpt.set_aside(self.directory)
        self.manager = ocp.CheckpointManager(self.directory, options=ocp.CheckpointManagerOptions(
            enable_async_checkpointing=True, cleanup_tmp_directories=True,
            # Never before ours: what it gives up on goes on hanging.
            async_options=ocp.AsyncOptions(timeout_secs=2 * int(timeout) + 60),
            # Only that there is such a function makes Orbax write metrics beside a checkpoint.
            best_fn=retention.figure if retention.best else None, best_mode=retention.mode,
            preservation_policy=retention.policy()))

    @classmethod
    def of(cls, config: Any, workdir: Place, manifest: Mapping[str, Any],
           bad: Sequence[Mapping[str, Any]] = ()) -> Checkpoints:
        """A run's, as its config keeps them; those gone back to from `bad` steps stay."""
        c = config.checkpoint
        pinned = frozenset(entry['checkpoint'] for entry in bad)
        return cls(workdir, manifest, Retention(c.keep, c.keep_every, c.best, c.best_mode, pinned),
                   c.timeout)

    @property
    def latest(self) -> int | None:
        return self.manager.latest_step()

    def judge(self, values: Mapping[str, Any]) -> None:
        """By these figures, a logged interval's, the next checkpoint saved may be the best.

        Raises:
          CheckpointError: they do not have the one that is asked for.
        """
        if not self.best:
            return
        if not isinstance(values.get(self.best), float):
            numbers = [name for name, value in values.items() if isinstance(value, float)]
            raise CheckpointError(f'checkpoint.best: {self.best!r} is no figure that is logged; '
                                  f'there are {", ".join(numbers)}')
        self._judged = {self.best: values[self.best]}

    def save(self, step: int, state: Any, data: Feed,
             interval: Sequence[Mapping[str, Any]] = ()) -> None:
        """Starts saving; returns once the arrays are copied to the host.

        Should the one before not be finished, it is waited for. A failure is reported by
        `wait`: it does not end the run, and the checkpoints that stand are left alone.

        Raises:
          HungError: this save, or the one before, has been going on for longer than `timeout`.
        """
        if step == self.latest and not self._failed:
            return
        start = time.monotonic()
        self._settle()
        # A line's figures judge the next checkpoint and no later one; a retry is as what failed.
        again = self._failed and (self._retry or self._save and self._save.step == step)
        self._saved_as, self._judged = self._judged or (self._saved_as if again else None), None
        # A retry is not asked about again: on a full disk every step would save.
        self._failed, self._unsettled, self._retry = '', not self._retry, False
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            # One counter of global batches, the same in every process: Grain's own handler
            # writes a file a process, which another number of processes could not read.
            data=ocp.args.JsonSave(data.get_state() | {ckpt.INTERVAL: [
                {name: float(value) for name, value in x.items()}
                for x in jax.device_get(list(interval))]}),
            manifest=ocp.args.JsonSave(self.manifest))
        before, deadline = self.latest, time.monotonic() + self.timeout
        copied = self._worker.submit(self._copy, step, items, self._saved_as)
        self._save = _Save(step, before, deadline, self._worker.submit(self._finish, step))
        self._await(copied)
        self.stalled = time.monotonic() - start

    def _copy(self, step: int, items: Any, judged: Mapping[str, float] | None) -> None:
        """In the thread: the part of a save that the next step has to wait for."""
        if step == self._committed == self.latest:
            return  # only its checksums are missing
        try:
            self.manager.save(step, metrics=judged, args=items)
        except Exception as e:  # of the file system, by way of Orbax
            self._failed = first_line(e)

    def _finish(self, step: int) -> None:
        """In the thread: waits for a save and sums up its files, or says why it failed."""
        folder = self.directory / str(step)
        try:
            self.manager.wait_until_finished()
            if not self._failed:
                self._committed = step
            if jax.process_index() == 0 and not self._failed:
                checksums.write(folder)
        except Exception as e:  # told as a reason, and nothing is done about it but a retry
            self._failed = self._failed or first_line(e)
        if self._failed:
            tqdm.write(f'warning: checkpoint {folder} could not be written ({self._failed}); those '
                       'before it stand', file=sys.stderr)
            self.manager.reload()  # Orbax's list, to what is there
            self._clear(step)

    def _clear(self, step: int) -> None:
        """Deletes what a save that failed has left: the next one may need that room.

        Orbax's other writers notice late that one has failed, and make its folders again: it is
        deleted until it has stayed away for `STAYS_AWAY` seconds, and no longer than `GIVES_UP`.
        """
        if jax.process_index() != 0:
            return
        start = since = time.monotonic()
        while (now := time.monotonic()) - since < STAYS_AWAY and now - start < GIVES_UP:
            if left := self._half_written(step):
                since = now
            for scratch in left:
                files.remove(scratch)
            time.sleep(0.02)

    def _half_written(self, step: int) -> list[Place]:
        """What a save has left: a folder of another name, or behind gs:// one without its mark."""
        if not places.is_url(self.directory):
            return list(self.directory.glob(f'{step}.orbax-checkpoint-tmp*'))
        folder = self.directory / str(step)
        return [folder] if folder.is_dir() and not (folder / checksums.COMMITTED).exists() else []

    def _await(self, done: futures.Future) -> None:
        """Waits for a part of the save under way, no longer than that may take."""
        futures.wait([done], max(self._save.deadline - time.monotonic(), 0))
        if not done.done():
            raise self._hung()
        done.result()

    def _settle(self) -> None:
        """Waits for a save under way."""
        if self._save is not None:
            self._await(self._save.written)

    def _hung(self) -> HungError:
        kept = self._save.before
        return HungError(
            f'checkpoint {self.directory / str(self._save.step)} was not on disk after '
            f'{self.timeout:g} s (checkpoint.timeout): the write hangs and cannot be stopped; '
            + ('nothing was saved before' if kept is None else
               f'step {kept} is the newest checkpoint in {self.directory}')
            + '; see to the disk, then run the same command to go on from there')

    @property
    def under_way(self) -> bool:
        """Whether a save is being written, in this process.

        Raises:
          HungError: it has been going on for longer than `timeout`.
        """
        if self._save is None or self._save.written.done():
            return False
        if time.monotonic() > self._save.deadline:
            raise self._hung()
        return True

    def wait(self) -> str:
        """Blocks until saves under way are on disk, in every process; why one is not, or ''.

        Raises:
          HungError: one has been going on for longer than `timeout`.
        """
        self._settle()
        if ckpt.anywhere(bool(self._failed)) and not self._failed:
            self._failed = 'by another process'
            self.manager.reload()
        return self._failed

    def lost(self, asked: bool) -> bool:
        """Whether the last save is now known to have failed; answers True once.

        Several processes have to agree, and ask one another for as long as they do not know: a
        loop asks (`asked`) where that costs little.
        """
        if not self._unsettled or not asked or ckpt.anywhere(self.under_way):
            return False
        self._unsettled = False
        self._retry = bool(self.wait())
        return self._retry

    def settle(self, step: int, state: Any, data: Feed,
               interval: Sequence[Mapping[str, Any]] = ()) -> None:
        """Waits for the last save, of this `step`; one that failed is tried once more.

        Raises:
          CheckpointError: in vain.
        """
        if not self.wait():
            return
        self.save(step, state, data, interval)
        reason = self.wait()
        if reason:
            kept = self.latest
            raise CheckpointError(
                f'step {step} could not be saved, twice ({reason}); '
                + ('nothing was saved before' if kept is None else
                   f'step {kept} is the newest checkpoint in {self.directory}')
                + '; make room, then run the same command to go on from there')

    def restore(self, abstract: Any, shardings: Any,
                data: Feed | None = None) -> Any:
        """The newest state, read straight into `shardings`; `data` is moved to its place.

        One that was never summed up, its run having been killed at that moment, and that turns
        out not to be readable, is moved aside like those found damaged at first.

        Raises:
          CheckpointError: it was written by another config or teacher (each difference is
            named), or it cannot be read.
        """
        while True:
            folder = self.directory / str(self.latest)
            try:
                state, self.interval = ckpt.restore(
                    folder, self.manifest, abstract, shardings, data)
                return state
            except ckpt.UnreadableError as e:
                older = [step for step in self.manager.all_steps() if step < self.latest]
                if not older or checksums.known(folder):
                    raise
                ckpt.move_aside(self.directory, {self.latest: e.reason}, older[-1])
                self.manager.reload()

    def close(self) -> None:
        """Waits for a save under way.

        Raises:
          HungError: it has been going on for longer than `timeout`; says as well what error the
            caller is about to end with.
        """
        ending = sys.exc_info()[1]
        try:
            self._settle()
            self._worker.submit(self._close).result()
        except HungError as e:
            if ending is None or isinstance(ending, HungError):
                raise
            raise HungError(f'{first_line(ending)}; {e}') from ending
        finally:
            self._worker.shutdown(wait=False)

    def _close(self) -> None:
        # What a failed save has left behind in Orbax's threads has been told.
        with contextlib.suppress(*[Exception] if self._failed else []):
            self.manager.close()
