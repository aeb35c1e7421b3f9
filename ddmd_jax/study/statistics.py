"""The rule by which a claim holds: an interval of a mean over seeds, and where it lies."""

from collections.abc import Sequence

import numpy as np
from scipy import stats

from ddmd_jax.evaluation.statistics import LEVEL, Interval

LEAST = 3  # seeds: with fewer nothing is decided
HOLDS, FAILS, OPEN = 'holds', 'does not hold', 'not decided at this scale'
RULE = (f'A figure is taken for each seed; where two experiments are compared, it is the '
        f'difference at the same seed. Its mean has a {LEVEL:.0%} interval by Student\'s t over '
        f'the seeds. A claim holds if the whole interval is on its side of the bound, does not '
        f'hold if the whole interval is on the other side, and is not decided otherwise, or with '
        f'fewer than {LEAST} seeds. It cannot hold while one of its runs broke off. Of a claim in '
        f'several parts, all have to hold; one that does not hold refutes it.')


def interval(values: Sequence[float]) -> Interval:
    """Student's t interval of the mean of `values`.

    Raises:
      ValueError: no values.
    """
    x = np.asarray(values, np.float64)
    if not x.size:
        raise ValueError('no values')
    mean = float(x.mean())
    if x.size == 1:
        return Interval(mean, mean, mean, 1)
    half = float(stats.t.ppf((1 + LEVEL) / 2, x.size - 1) * x.std(ddof=1) / np.sqrt(x.size))
    return Interval(mean, mean - half, mean + half, x.size)


def above(values: Sequence[float], bound: float = 0.0) -> str:
    """Whether the mean lies above `bound`: one of HOLDS, FAILS, OPEN."""
    found = interval(values)
    if found.count < LEAST or not np.isfinite([found.low, found.high]).all():
        return OPEN
    return HOLDS if found.low > bound else FAILS if found.high < bound else OPEN


def below(values: Sequence[float], bound: float = 0.0) -> str:
    """Whether the mean lies below `bound`."""
    return above([-v for v in values], -bound)


def within(values: Sequence[float], margin: float) -> str:
    """Whether the mean lies less than `margin` from 0: equivalence, not absence of proof."""
    found = interval(values)
    if found.count < LEAST or not np.isfinite([found.low, found.high]).all():
        return OPEN
    if -margin < found.low and found.high < margin:
        return HOLDS
    return FAILS if found.low > margin or found.high < -margin else OPEN


def together(verdicts: Sequence[str]) -> str:
    """The verdict on a claim of several parts."""
    if FAILS in verdicts:
        return FAILS
    return HOLDS if verdicts and set(verdicts) == {HOLDS} else OPEN
