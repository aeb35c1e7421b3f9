"""What a run does about figures that go wrong: batches left out, spikes told, verdicts acted on."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddmd_jax.train import diagnostics

NAME = 'bad_batches.jsonl'
ON_NAN, ON_HEALTH = ('abort', 'rollback'), ('nothing', 'stop')
MOST = 3  # rollbacks to one checkpoint: then it is not the batches
SPIKE_OVER, SPIKE_LEAST = 20, 5  # logged losses that a spike is told by, and the fewest of them
UNWELL = 3  # logged intervals in a row with one bad verdict before it is acted on


class GuardError(RuntimeError):
    """There is no bad batch to replay, or no checkpoint to replay it from."""


def read_bad(workdir: Path) -> list[dict[str, Any]]:
    """The steps that went wrong and were left out, oldest first.

    Each has `step`; `batches`, their numbers in the run's order; `rows` of each; `checkpoint`,
    the step gone back to; `bad`, the metrics that were not finite; `seconds`, the clock.
    """
    path = workdir / NAME
    return [json.loads(x) for x in path.read_text().splitlines()] if path.is_file() else []


def record_bad(workdir: Path, entry: Mapping[str, Any]) -> None:
    """Adds a line to the file that `read_bad` reads."""
    with (workdir / NAME).open('a') as f:
        f.write(json.dumps(entry) + '\n')


def skipped(entries: Sequence[Mapping[str, Any]]) -> frozenset[int]:
    """Numbers of the batches that a run leaves out."""
    return frozenset(number for entry in entries for number in entry['batches'])


def exhausted(entries: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the newest entry's checkpoint has been gone back to as often as makes sense."""
    return sum(e['checkpoint'] == entries[-1]['checkpoint'] for e in entries) > MOST


def spike(losses: Sequence[float], limit: float) -> str:
    """Words on the last of `losses` if it stands `limit` deviations above those before it.

    0 is off. Falling losses are no spikes; of a few, nothing can be told.
    """
    *before, now = losses[-SPIKE_OVER - 1:]
    if not limit or len(before) < SPIKE_LEAST:
        return ''
    mean, deviation = statistics.fmean(before), statistics.pstdev(before)
    z = (now - mean) / deviation if deviation else math.inf if now > mean else 0.0
    return (f'loss {now:.4g} is {z:.1f} standard deviations above the {len(before)} before it '
            f'({mean:.4g})') if z > limit else ''


def must_stop(history: Sequence[Mapping[str, Any]], on_health: str) -> str:
    """Words on a verdict that ends the run, or '': the same bad one `UNWELL` times in a row."""
    last = [values.get('health') for values in history[-UNWELL:]]
    if on_health != 'stop' or len(last) < UNWELL or len(set(last)) > 1:
        return ''
    if last[0] in (None, diagnostics.HEALTHY):
        return ''
    return (f'{last[0]} for {UNWELL} logged intervals ({history[-1].get("health_reason", "")}); '
            "stopped here, as train.on_health='stop' says")
