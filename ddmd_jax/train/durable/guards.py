"""Figures that go wrong though they are finite: spikes told, verdicts acted on."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from ddmd_jax.method import health
from ddmd_jax.train.durable.checkpoint import anywhere
from ddmd_jax.train.state import TrainState

# `train.on_health`: the response to UNWELL equal verdicts in a row; to a collapse, at once.
ON_HEALTH = {'nothing': '', 'stop': 'stopped here', 'stop_collapsing': 'stopped here',
             'lower_alpha': 'alpha - 1 is halved', 'raise_critic': 'one more critic update a step'}
STOPS = ('stop', 'stop_collapsing')
LEAST_ALPHA, MOST_EXTRA = 0.125, 8  # of alpha - 1, and of critic updates: then nothing more is done
SPIKE_OVER, SPIKE_LEAST = 20, 5  # logged losses that a spike is told by, and the fewest of them
UNWELL = 3  # logged intervals in a row with one bad verdict before it is acted on


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


class Remedy(NamedTuple):
    """The response to a verdict: '' is none; it may end the run, or change the state."""

    text: str = ''
    how: str = 'nothing'

    @property
    def ends(self) -> bool:
        return bool(self.text) and self.how in STOPS

    def act(self, state: TrainState) -> TrainState:
        """`state` with less of alpha, or more critic updates, from the next step on."""
        if self.how == 'lower_alpha':
            return dataclasses.replace(state, alpha_share=state.alpha_share / 2)
        return dataclasses.replace(state, critic_extra=state.critic_extra + 1)


def agreed_remedy(history: Sequence[Mapping[str, Any]], how: str) -> Remedy:
    """`remedy` of process 0's history, in every process: only it has a resumed run's lines."""
    text = remedy(history, how)
    if how == 'nothing' or not anywhere(bool(text) and jax.process_index() == 0):
        return Remedy()
    return Remedy(text or f'{ON_HEALTH[how]}, by process 0', how)


def remedy(history: Sequence[Mapping[str, Any]], how: str) -> str:
    """Words on the response to the last verdicts, or ''.

    It has to be bad and the same `UNWELL` times in a row, nothing having been done in between: the
    lines say how much of alpha and how many critic updates they were made with. Collapsing counts
    as over-baked, and for 'stop_collapsing' nothing else counts, and at once; for 'lower_alpha'
    washed out does not.
    """
    response = f'{ON_HEALTH[how]}, as train.on_health={how!r} says'
    reason = history[-1].get('health_reason', '') if history else ''
    if how == 'stop_collapsing':
        grave = bool(history) and history[-1].get('health') == health.COLLAPSING
        return f'{health.COLLAPSING} ({reason}); {response}' if grave else ''
    kind = lambda word: health.OVER_BAKED if word == health.COLLAPSING else word
    last = [(kind(v.get('health')), v.get('alpha_share', 1.0), v.get('critic_extra', 0.0))
            for v in history[-UNWELL:]]
    if how == 'nothing' or len(last) < UNWELL or len(set(last)) > 1:
        return ''
    verdict, share, extra = last[0]
    # Of less guidance what is pale would be paler.
    spent = {'lower_alpha': share <= LEAST_ALPHA or verdict == health.WASHED_OUT,
             'raise_critic': extra >= MOST_EXTRA}
    if verdict in (None, health.HEALTHY) or spent.get(how):
        return ''
    words = ' and '.join(dict.fromkeys(v['health'] for v in history[-UNWELL:]))
    return f'{words} for {UNWELL} logged intervals ({reason}); {response}'
