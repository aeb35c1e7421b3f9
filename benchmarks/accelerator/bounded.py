"""Training that ends when its time does, its learning rate's decay inside that time."""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddmd_jax import config as config_lib

MEASURED = 30  # steps by whose time the length of a run is chosen
FIRST = 10  # steps before them: programs are compiled, queues are filled
SHARE = 0.95  # of the time that is left, which is planned for
RESERVE = 25  # seconds at the end for the last checkpoint, weights and pictures
ENDLESS = 10**7  # steps


def prepared(config: Any, changes: Mapping[str, Mapping[str, Any]] | None = None) -> Any:
    """`config` with as many steps as there is time for, few checkpoints, and `changes` by section.

    Raises:
      ConfigError: a field is wrong.
    """
    config.train.steps = ENDLESS
    config.log.update({'report': False, 'images_every': ENDLESS})
    config.checkpoint.update({'every': 1000, 'keep': 1})
    for section, fields in (changes or {}).items():
        config_lib.field(config, section).update(fields)
    config_lib.check(config)
    return config


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


def trained(task: Any, config: Any, until: float, metrics: Path) -> tuple[Any, dict[str, Any]]:
    """(EMA weights on the host, figures) of a run that should end at `until` (`time.monotonic`).

    Args:
      task: of a config of the task `pretrain` or `codec`, whose update takes the run's length as
        an argument: nothing is compiled twice.
      config: its config; `train.steps` is set to what fits, if that is less.
      until: leaves `RESERVE` for what comes after.
      metrics: file that the run's lines are copied to.

    Raises:
      see `ddmd_jax.train.train.fit`; `Stopped` only if nothing was saved yet.
    """
    import jax

    from ddmd_jax.train.durable import checkpoint, checksums, signals

    workdir = Path(tempfile.mkdtemp(prefix='bounded'))
    try:
        try:
            with signals.watched():
                ema, figures = _fitted(task, config, workdir, until)
        except signals.Stopped as e:  # time was short after all: what was saved stands
            if not checksums.steps(workdir / 'checkpoints'):
                raise
            saved = checkpoint.saved(workdir)
            ema = saved.part('ema', task.spec.shapes.ema, task.spec.shardings.ema)
            figures = {'steps': saved.step, 'stopped': str(e)}
        shutil.copy(workdir / 'metrics.jsonl', metrics)
    finally:
        shutil.rmtree(workdir)
    return jax.device_get(ema), figures


def _fitted(task: Any, config: Any, workdir: Path, until: float) -> tuple[Any, dict[str, Any]]:
    """A few steps are taken and timed, then as many as fit; (EMA weights, figures)."""
    from ddmd_jax.train import train

    timed, planned = Timed(task), config.train.steps
    started = time.monotonic()
    config.train.steps = min(planned, FIRST + MEASURED)
    state, _ = train.fit(task, config, workdir)
    ready, first = time.monotonic() - started, int(state.step)
    step_seconds = timed.seconds(MEASURED)
    del state
    left = SHARE * (until - RESERVE - time.monotonic())
    config.train.steps = first + min(planned - first, max(1, int(left / step_seconds)))
    print(f'{step_seconds * 1e3:.1f} ms a step: {config.train.steps} steps in the {left:.0f} s '
          'that are left', flush=True)
    state, seconds = train.fit(task, config, workdir)
    steps = int(state.step) - first
    return state.ema, {
        'steps': int(state.step), 'global_batch': config.data.global_batch,
        'seconds_until_measured': round(ready, 1), 'step_seconds_at_first': step_seconds,
        'step_seconds': timed.seconds(max(1, steps - FIRST)), 'seconds': round(seconds.train, 1),
        'input_wait_seconds': round(seconds.input_wait, 1),
        'images_per_second': round(steps * config.data.global_batch / seconds.train)}
