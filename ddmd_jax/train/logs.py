"""Where a run's numbers and pictures go: terminal, `metrics.jsonl`, TensorBoard."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorboardX
from tqdm import tqdm


class RunLog:
    """Process 0 writes; on other processes every method is a no-op.

    `history` holds the intervals logged so far, those of the run being resumed included.
    """

    def __init__(self, workdir: Path, start: int, total: int, description: str):
        self.active = jax.process_index() == 0
        self.history: list[dict[str, Any]] = []
        if not self.active:
            return
        self.history = self._trim(workdir / 'metrics.jsonl', start)
        self._jsonl = (workdir / 'metrics.jsonl').open('a')
        self._board = tensorboardX.SummaryWriter(str(workdir / 'tensorboard'), purge_step=start + 1)
        self.bar = tqdm(total=total, initial=start, desc=description, file=sys.stderr,
                        dynamic_ncols=True, mininterval=1.0, smoothing=0.05)

    @staticmethod
    def _trim(path: Path, start: int) -> list[dict[str, Any]]:
        """Drops lines after `start`, which a resumed run writes again; returns the others."""
        if not path.exists():
            return []
        kept = [x for x in path.read_text().splitlines() if _step_of(x) <= start]
        path.write_text(''.join(f'{x}\n' for x in kept))
        return [json.loads(x) for x in kept]

    def tick(self, step: int) -> None:
        if self.active:
            self.bar.update(step - self.bar.n)

    def scalars(self, step: int, values: dict[str, float], words: str = '') -> None:
        """One line of JSON (`step` first), the same keys in TensorBoard, `words` in the bar."""
        self.history.append(values)
        if not self.active:
            return
        self._jsonl.write(json.dumps({'step': step, **values}) + '\n')
        self._jsonl.flush()
        for name, value in values.items():
            if not isinstance(value, str):
                self._board.add_scalar(name, value, step)
        if words:
            self.bar.set_postfix_str(words)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """``[H, W, 3]`` uint8."""
        if self.active:
            self._board.add_image(name, image, step, dataformats='HWC')

    def say(self, text: str) -> None:
        if self.active:
            tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        if self.active:
            self.bar.close()
            self._jsonl.close()
            self._board.close()


def _step_of(line: str) -> int:
    """Step of a metrics line; a line cut short by a kill counts as past the end."""
    try:
        return int(json.loads(line)['step'])
    except (ValueError, KeyError, TypeError):
        return sys.maxsize


def means(metrics: list[dict[str, Any]]) -> dict[str, float]:
    """Means over an interval of per-step device scalars; one transfer for all of them."""
    host = jax.device_get(metrics)
    return {k: float(np.mean([m[k] for m in host])) for k in host[0]}
