"""How sure a mean over prompts is, and whether two models differ on the same prompts.

Prompts are what is drawn at random, not pictures: pictures of one prompt are averaged first.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

LEVEL = 0.95  # of two-sided intervals
SAMPLES = 10_000  # of a bootstrap, or of signs
EXACT = 13  # prompts up to which all signs are tried: 2^13 < SAMPLES
CELLS = 1 << 22  # numbers of a block of samples


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean, the bounds of its interval (both ends the mean if count = 1), and of how many."""

    mean: float
    low: float
    high: float
    count: int


@dataclasses.dataclass(frozen=True)
class Paired:
    """Two models on the same prompts.

    Attributes:
      difference: first less second, prompt by prompt.
      p_value: two-sided, of no difference.
      wins: share of prompts on which the first is the larger; a tie is half a win.
    """

    difference: Interval
    p_value: float
    wins: float


def by_prompt(scores: Sequence[float], prompts: Sequence[str]) -> dict[str, float]:
    """The mean score of every prompt's pictures, prompts in the order in which they first come."""
    found: dict[str, list[float]] = {}
    for score, prompt in zip(scores, prompts, strict=True):
        found.setdefault(prompt, []).append(float(score))
    return {prompt: float(np.mean(values)) for prompt, values in found.items()}


def bootstrap(values: Sequence[float], seed: int = 0) -> Interval:
    """Percentile interval of the mean of `values`, one of each prompt, by `SAMPLES` resamples.

    Raises:
      ValueError: no values, or one that is not finite.
    """
    x = _finite(values)
    if len(x) == 1:
        return Interval(float(x[0]), float(x[0]), float(x[0]), 1)
    random = np.random.default_rng(seed)
    means = np.concatenate([x[random.integers(0, len(x), (n, len(x)))].mean(1)
                            for n in _blocks(len(x))])
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(x.mean()), float(low), float(high), len(x))


def paired(first: Sequence[float], second: Sequence[float], seed: int = 0) -> Paired:
    """Compares two models by their figures of the same prompts, in the same order.

    The interval is `bootstrap` of the differences. The p-value is that of the sign-flip test: if
    the models were alike, either sign of a difference would be as likely, and it is the share of
    signs that make the mean as far from 0 as it is; of all signs up to `EXACT` prompts, else of
    `SAMPLES` and the one found.

    Raises:
      ValueError: unequal numbers, none, or a value that is not finite.
    """
    a, b = _finite(first), _finite(second)
    if len(a) != len(b):
        raise ValueError(f'{len(a)} and {len(b)} figures cannot be paired')
    x = a - b
    bound = abs(x.sum()) - 1e-12 * np.abs(x).sum()  # sums of alike numbers differ in last bits
    if len(x) <= EXACT:
        sums = np.asarray(list(itertools.product((-1, 1), repeat=len(x)))) @ x
        p_value = float(np.mean(np.abs(sums) >= bound))
    else:
        random = np.random.default_rng(seed)
        beyond = sum(int(np.sum(np.abs((2 * random.integers(0, 2, (n, len(x))) - 1) @ x) >= bound))
                     for n in _blocks(len(x)))
        p_value = (1 + beyond) / (1 + SAMPLES)
    wins = float(np.mean((x > 0) + 0.5 * (x == 0)))
    return Paired(bootstrap(x, seed), p_value, wins)


def _finite(values: Sequence[float]) -> np.ndarray:
    x = np.asarray(values, np.float64)
    if not x.size:
        raise ValueError('no values')
    if not np.isfinite(x).all():
        raise ValueError(f'value {int(np.argmin(np.isfinite(x)))} is not finite')
    return x


def _blocks(count: int) -> Iterator[int]:
    """`SAMPLES` in parts, each of about `CELLS` numbers where a sample is `count` of them."""
    most = max(1, CELLS // count)
    for start in range(0, SAMPLES, most):
        yield min(most, SAMPLES - start)
