"""A training task that ends when its time does, its learning rate's decay inside that time."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

MEASURED = 30  # steps by whose time the length of a run is chosen
FIRST = 10  # steps before them: programs are compiled, queues are filled
SHARE = 0.95  # of the time that is left, which is planned for


class Timed:
    """Notes when each step of a task is asked for; the loop is never more than one ahead."""

    def __init__(self, task: Any):
        self.asked: list[float] = []
        self._step, task.step = task.step, self

    def __call__(self, *args: Any) -> Any:
        self.asked.append(time.monotonic())
        return self._step(*args)

    def seconds(self, last: int) -> float:
        """Median time of one of the `last` steps."""
        some = self.asked[-last - 1:]
        return statistics.median(b - a for a, b in zip(some, some[1:]))


def fit(task: Any, config: Any, workdir: Path, until: float) -> tuple[Any, dict[str, Any]]:
    """Trains `task` from where `workdir` or `config.init_from` says; (state, figures).

    A few steps are taken and timed first; then `config.train.steps` is set to what fits.

    Args:
      task: of a config of the task `pretrain` or `codec`, whose update takes the run's length as
        an argument: nothing is compiled twice.
      config: its config, changed here.
      workdir: of the run.
      until: `time.monotonic()` at which it should have ended.

    Raises:
      see `ddmd_jax.train.train.fit`.
    """
    from ddmd_jax.train import train

    timed, planned = Timed(task), config.train.steps
    started = time.monotonic()
    config.train.steps = min(planned, FIRST + MEASURED)
    state, _ = train.fit(task, config, workdir)
    ready, first = time.monotonic() - started, int(state.step)
    step_seconds = timed.seconds(MEASURED)
    del state
    left = SHARE * (until - time.monotonic())
    config.train.steps = first + min(planned - first, max(1, int(left / step_seconds)))
    print(f'{step_seconds * 1e3:.1f} ms a step: {config.train.steps} steps in the {left:.0f} s '
          'that are left', flush=True)
    state, seconds = train.fit(task, config, workdir)
    steps = int(state.step) - first
    return state, {
        'steps': int(state.step), 'global_batch': config.data.global_batch,
        'seconds_until_measured': round(ready, 1), 'step_seconds_at_first': step_seconds,
        'step_seconds': timed.seconds(max(1, steps - FIRST)), 'seconds': round(seconds.train, 1),
        'input_wait_seconds': round(seconds.input_wait, 1),
        'images_per_second': round(steps * config.data.global_batch / seconds.train)}
