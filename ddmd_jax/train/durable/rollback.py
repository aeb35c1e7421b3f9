"""Detects steps that are not finite, records their batches, and leaves these out."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils

from ddmd_jax.data.order import Order
from ddmd_jax.util import jsonl
from ddmd_jax.util.errors import UserError
from ddmd_jax.util.places import Place

NAME = 'bad_batches.jsonl'
ON_NAN = ('abort', 'rollback')
BY_HEALTH = ('alpha_share', 'critic_extra')  # of the state: what `train.on_health` changes
MOST = 3  # rollbacks to one checkpoint: then it is not the batches


class GuardError(UserError):
    """There is no bad batch to replay, or no checkpoint to replay it from, or no reading them."""


class Taken(NamedTuple):
    """A step's number, its metrics, and the state of the data before and after it."""

    step: int
    metrics: Mapping[str, Any]
    data: tuple[Any, Any]


class DivergedError(UserError):
    """NaN or Inf in a loss or gradient; the update was not written.

    `taken` is the step that went wrong, `bad` the metrics that were not finite, `checkpoint` the
    newest one by then.
    """

    def __init__(self, message: str, taken: Taken, bad: list[str], checkpoint: int | None):
        super().__init__(message)
        self.taken, self.bad, self.checkpoint = taken, bad, checkpoint


def check(newest: Taken | None, checkpoints: Any) -> None:
    """Raises `DivergedError` if the newest step was not finite; a save under way ends first."""
    if newest is None or bool(newest.metrics['finite']):
        return
    checkpoints.wait()
    kept = 'no checkpoint had been written yet' if checkpoints.latest is None else (
        f'the last good checkpoint, step {checkpoints.latest}, is kept')
    metrics = jax.device_get(newest.metrics)
    bad = [k for k, v in metrics.items() if v != v or abs(v) == float('inf')]
    raise DivergedError(
        f'step {newest.step}: NaN or Inf in {", ".join(bad) or "a gradient"}; that update was not '
        f'written and {kept}; lower the learning rate or clip harder',
        newest, bad, checkpoints.latest)


def leave_out(failed: DivergedError, config: Any, workdir: Place, order: Order) -> str:
    """Records the batches of a failed step, which the next attempt skips; words for its log.

    Raises:
      DivergedError: that is not to be (`train.on_nan`), or has not helped.
    """
    if config.train.on_nan != 'rollback':
        raise failed
    bad = read(workdir)
    first, last = (state['next_index'] for state in failed.taken.data)
    numbers = [n for n in range(first, last) if n not in skipped(bad)]
    entry = {'step': failed.taken.step, 'checkpoint': failed.checkpoint, 'bad': failed.bad,
             'batches': numbers, 'time': round(time.time()),
             **{name: float(failed.taken.metrics[name]) for name in BY_HEALTH
                if name in failed.taken.metrics},
             'rows': [order[n].rows.tolist() for n in numbers]}
    place = 'the start' if failed.checkpoint is None else f'step {failed.checkpoint}'
    if sum(e['checkpoint'] == failed.checkpoint for e in bad) >= MOST:
        raise DivergedError(f'{failed}; went back to {place} {MOST} times already: it is not the '
                            'batches', failed.taken, failed.bad, failed.checkpoint)
    _together('bad batches read')  # nobody reads what process 0 is about to write
    if jax.process_index() == 0:
        jsonl.append(workdir / NAME, entry)
    _together('bad batches recorded')  # and then everybody does
    return f'{failed}; back at {place}, leaving out batches {", ".join(map(str, numbers))}'


def _together(what: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def read(workdir: Place) -> list[dict[str, Any]]:
    """The steps that went wrong and were left out, oldest first.

    Each has `step`; `batches`, their numbers in the run's order; `rows` of each; `checkpoint`, the
    step gone back to; `bad`, the metrics that were not finite; `time`, the clock; and what the step
    was made with of `BY_HEALTH`.

    Raises:
      GuardError: a line of the file is no entry.
    """
    try:
        return jsonl.read(workdir / NAME)
    except ValueError as e:
        raise GuardError(str(e)) from None


def newest(workdir: Place) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(the entries before the newest one, the newest one).

    Raises:
      GuardError: there is none.
    """
    entries = read(workdir)
    if not entries:
        raise GuardError(f'{workdir / NAME} is not there: no batch has been left out '
                         "(train.on_nan='rollback' leaves out)")
    return entries[:-1], entries[-1]


def skipped(entries: Sequence[Mapping[str, Any]]) -> frozenset[int]:
    """Numbers of the batches that a run leaves out."""
    return frozenset(number for entry in entries for number in entry['batches'])
