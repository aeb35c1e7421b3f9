"""What a run does about figures that go wrong: batches left out, spikes told, verdicts acted on."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddmd_jax.method import health as diagnostics
from ddmd_jax.train import state as st
from ddmd_jax.util import jsonl as lines

NAME = 'bad_batches.jsonl'
ON_NAN = ('abort', 'rollback')
# What a bad verdict does to a run, and what it is told: one that lasts, but for the gravest, which
# has no time to.
ON_HEALTH = {'nothing': '', 'stop': 'stopped here', 'stop_collapsing': 'stopped here',
             'lower_alpha': 'alpha - 1 is halved', 'raise_critic': 'one more critic update a step'}
STOPS = ('stop', 'stop_collapsing')
LEAST_ALPHA, MOST_EXTRA = 0.125, 8  # of alpha - 1, and of critic updates: then nothing more is done
MOST = 3  # rollbacks to one checkpoint: then it is not the batches
SPIKE_OVER, SPIKE_LEAST = 20, 5  # logged losses that a spike is told by, and the fewest of them
UNWELL = 3  # logged intervals in a row that are unwell in one way before it is acted on


class GuardError(RuntimeError):
    """There is no bad batch to replay, or no checkpoint to replay it from, or no reading them."""


def read_bad(workdir: Path) -> list[dict[str, Any]]:
    """The steps that went wrong and were left out, oldest first.

    Each has `step`; `batches`, their numbers in the run's order; `rows` of each; `checkpoint`,
    the step gone back to; `bad`, the metrics that were not finite; `time`, the clock.

    Raises:
      GuardError: a line of the file is no entry.
    """
    try:
        return lines.read(workdir / NAME)
    except ValueError as e:
        raise GuardError(str(e)) from None


def record_bad(workdir: Path, entry: Mapping[str, Any]) -> None:
    """Adds a line to the file that `read_bad` reads."""
    lines.append(workdir / NAME, entry)


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


def remedy(history: Sequence[Mapping[str, Any]], on_health: str) -> str:
    """Words on what has to be done about a verdict, or ''.

    It has to be bad and the same `UNWELL` times in a row, nothing having been done in between: the
    lines say how much of alpha and how many critic updates they were made with. Collapsing counts
    as over-baked, and for 'stop_collapsing' nothing else counts, and at once.
    """
    told = f'{ON_HEALTH[on_health]}, as train.on_health={on_health!r} says'
    reason = history[-1].get('health_reason', '') if history else ''
    if on_health == 'stop_collapsing':
        grave = bool(history) and history[-1].get('health') == diagnostics.COLLAPSING
        return f'{diagnostics.COLLAPSING} ({reason}); {told}' if grave else ''
    kind = lambda word: diagnostics.OVER_BAKED if word == diagnostics.COLLAPSING else word
    last = [(kind(v.get('health')), v.get('alpha_share', 1.0), v.get('critic_extra', 0.0))
            for v in history[-UNWELL:]]
    if on_health == 'nothing' or len(last) < UNWELL or len(set(last)) > 1:
        return ''
    verdict, share, extra = last[0]
    spent = {'lower_alpha': share <= LEAST_ALPHA, 'raise_critic': extra >= MOST_EXTRA}
    if verdict in (None, diagnostics.HEALTHY) or spent.get(on_health):
        return ''
    words = ' and '.join(dict.fromkeys(v['health'] for v in history[-UNWELL:]))
    return f'{words} for {UNWELL} logged intervals ({reason}); {told}'


def act(state: st.TrainState, on_health: str) -> st.TrainState:
    """`state` with less of alpha, or more critic updates, from the next step on."""
    if on_health == 'lower_alpha':
        return dataclasses.replace(state, alpha_share=state.alpha_share / 2)
    return dataclasses.replace(state, critic_extra=state.critic_extra + 1)
