"""Where a run's numbers and pictures go: terminal, `metrics.jsonl`, TensorBoard, a tracker."""

import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tqdm import tqdm

from ddmd_jax.train.watch import trackers
from ddmd_jax.util import buckets, errors, files, jsonl as lines, places
from ddmd_jax.util.places import Place
from ddmd_jax.util.text import first_line

KEPT = 64  # logged intervals at either end of a run that are remembered: who asks needs no more
FLUSHED = 120  # seconds after which TensorBoard's file is brought up to date


def record(workdir: Place, config: Any, about: Mapping[str, Any] | None) -> None:
    """``config.json`` and ``run.json``, by process 0: the config, and how it was called."""
    if jax.process_index() == 0:
        files.write_json(workdir / 'config.json', config.to_dict())
        if about is not None:
            files.write_json(workdir / 'run.json', about)


class RunLog:
    """Process 0 writes; on other processes every method is a no-op.

    `history` holds intervals logged so far, those of the run being resumed included: the first
    and the last `KEPT`, so that it does not grow with the run.

    Raises:
      OSError: `metrics.jsonl` cannot be read or written, here or in `scalars`. It holds whole
        lines all the same.
    """

    def __init__(self, workdir: Place, start: int, total: int, description: str,
                 config: Any = None):
        self.active = jax.process_index() == 0
        self.history: list[dict[str, Any]] = []
        if not self.active:
            return
        self._file = workdir / 'metrics.jsonl'
        # A resumed run writes again what comes after `start`.
        self.history = lines.trim(
            self._file, lambda x: isinstance(x.get('step'), int) and x['step'] <= start)
        self._forget()
        # Apart from the figures, which are the same whenever they were made.
        self._times = workdir / 'times.jsonl'
        lines.trim(self._times, lambda x: isinstance(x.get('step'), int) and x['step'] <= start)
        self._pictures = workdir / 'pictures'
        self._board = Board(workdir / 'tensorboard', start, self.say)
        tracker = config.log.get('tracker', '') if config else ''
        self._tracker = trackers.Tracker(tracker, config, workdir, self.say)
        self.bar = tqdm(total=total, initial=start, desc=description, file=sys.stderr,
                        dynamic_ncols=True, mininterval=1.0, smoothing=0.05)

    def _forget(self) -> None:
        del self.history[KEPT:-KEPT]

    def tick(self, step: int) -> None:
        if not self.active:
            return
        if self.bar.n == self.bar.initial:  # programs were waited for until here: no step's rate
            self.bar.unpause()
        self.bar.update(step - self.bar.n)

    def scalars(self, step: int, values: dict[str, Any], text: str = '') -> None:
        """One line of JSON (`step` first), its figures in TensorBoard and tracker, `text` beside
        the bar."""
        line = {'step': step, **values}
        self.history.append(line)
        self._forget()
        if not self.active:
            return
        lines.append(self._file, line)
        lines.append(self._times, {'step': step, 'time': round(time.time(), 2)})
        figures = {k: v for k, v in values.items() if k != 'step' and not isinstance(v, str)}
        for name, value in figures.items():
            self._board.add(step, summary.scalar(name, value))
        self._tracker.scalars(step, figures)
        if text:
            self.bar.set_postfix_str(text)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """``[H, W, 3]`` uint8."""
        if self.active:
            self._board.add(step, summary.image(name, image, dataformats='HWC'))
            self._keep(step, name, image)
            self._tracker.image(step, name, image)

    def _keep(self, step: int, name: str, image: np.ndarray) -> None:
        """A PNG for reports. Disk errors are left alone: TensorBoard has warned of them."""
        with contextlib.suppress(OSError):
            if not places.is_url(self._pictures):
                self._pictures.mkdir(exist_ok=True)
            file = self._pictures / f'{name.replace("/", "_")}-{step:08d}.png'
            with files.replacing(file) as scratch:
                Image.fromarray(image).save(scratch, 'PNG', optimize=True)

    def say(self, text: str) -> None:
        if self.active:
            tqdm.write(text, file=sys.stderr)

    def attempt(self, write: Callable[[Place], Any] | None,
                workdir: Place) -> Callable[[Place], Any] | None:
        """Has a report written, if there is to be one; the writer, or None once it has failed.

        No run ends for a report.
        """
        if write is None or not self.active:
            return write
        try:
            write(workdir)
        except Exception as e:  # of a template, a plotting library, a disk
            self.say(f'warning: the report cannot be written ({first_line(e)}); later: python -m '
                     f'ddmd_jax.report {workdir}')
            return None
        return write

    def close(self) -> None:
        if self.active:
            self.bar.close()
            self._board.close()
            self._tracker.close()


class Board:
    """A file of TensorBoard's events, written by whoever calls.

    No run ends for it: a write that fails is reported once, by `say`, and nothing is written
    after it, since a reader stops at half a record. In a bucket the file is brought up to date
    every `FLUSHED` seconds. tensorboardX's own `SummaryWriter` has a thread, which a full disk
    ends: nobody hears of it, and once its queue is full the run hangs.
    """

    def __init__(self, folder: Place, start: int, say: Callable[[str], None]):
        self._folder, self._say, self._flushed = folder, say, time.monotonic()
        self._writer: EventsWriter | None = None
        self._scratch = contextlib.ExitStack()
        with self._told():
            if places.is_url(folder):
                made = Path(self._scratch.enter_context(
                    tempfile.TemporaryDirectory(prefix='ddmd_')))
            else:
                made = Path(folder)
                made.mkdir(parents=True, exist_ok=True)
            self._made = made
            # Named by the second: one that goes back within it must not write over its own.
            self._writer = EventsWriter(str(made / 'events'), f'.{start}')
            # What an earlier go wrote from this step on is not to be shown.
            again = {'step': start + 1, 'wall_time': time.time()}
            self._writer.write_event(Event(file_version='brain.Event:2', **again))
            self._writer.write_event(Event(session_log=SessionLog(status=SessionLog.START),
                                           **again))

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except Exception as e:
            if not isinstance(e, OSError) and not errors.environment(e):
                raise
            self._writer = None
            reason = getattr(e, 'strerror', None) or first_line(e)
            self._say(f'warning: {self._folder} cannot be written ({reason}); figures are in '
                      'metrics.jsonl, pictures are lost until the run is started again')

    def add(self, step: int, value: summary.Summary) -> None:
        """Writes `value` at `step`."""
        with self._told():
            if self._writer is None:
                return
            self._writer.write_event(Event(step=step, wall_time=time.time(), summary=value))
            if time.monotonic() - self._flushed > FLUSHED:
                self._flushed = time.monotonic()
                self._writer.flush()
                self._put()

    def close(self) -> None:
        with self._told():
            if self._writer is not None:
                self._writer.close()
                self._put()
        self._scratch.close()

    def _put(self) -> None:
        """To a bucket: its file is written whole, from what this machine's disk has.

        By itself, as what is there of a file stays if that fails, but not of a folder.
        """
        if places.is_url(self._folder):
            for file in self._made.iterdir():
                buckets.put(file, self._folder / file.name)


def means(metrics: list[dict[str, Any]]) -> dict[str, float]:
    """Means over an interval of per-step device scalars; one transfer for all of them."""
    host = jax.device_get(metrics)
    # The critic may rest in some steps: a figure's mean is over those that have it.
    names = dict.fromkeys(k for m in reversed(host) for k in m)
    return {k: float(np.mean([m[k] for m in host if k in m])) for k in names}
