"""Where a recipe stays healthy, and whether the verdict warns before quality falls.

A run's outcome is read off the judge's figures, its warning off the health figures of the same
lines, which know nothing of the judge. What counts as a warning is a `Signal`: its thresholds are
tuned on half of the runs and reported on the other.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ddmd_jax.study.runs import DIVERGED
from ddmd_jax.train import diagnostics
from ddmd_jax.train.diagnostics import SHIPPED, Thresholds

DROP = 0.05  # share of its peak by which the caption match has fallen when quality has
TWICE = 2  # lines in a row that have to say so: one may be chance
LEAD = 50  # updates by which a warning has to come before the fall
FALSE_ALARMS = 0.10  # share of the runs that do not degrade in which a warning is tolerated
HITS = 0.80  # share of the runs that degrade in which a warning in time is wanted
WATCHED = ('dm_rel_gap', 'dm_cos', 'x_std', 'fake_loss', 'ema_std', 'ema_cast')
DRAWN = 2000  # sets of thresholds that are tried


@dataclasses.dataclass(frozen=True)
class Signal:
    """What counts as a warning: verdicts with one of `words`, by the thresholds `limits`.

    `ranges` are of those that are tuned: where each would call everything unwell, and the nearest
    and farthest from there that are tried, evenly in the logarithm.
    """

    name: str
    words: frozenset[str]
    limits: Thresholds
    ranges: Mapping[str, tuple[float, float, float]]


COLLAPSING = Signal(
    'collapsing', frozenset({diagnostics.COLLAPSING, diagnostics.BROKEN}), SHIPPED,
    {'lost': (1, 0.1, 3.0), 'ahead': (0, 1.0, 100.0)})
# What the other words can do as an alarm: levels of figures, and not where they are going.
LEVELS = Signal(
    'any other verdict', frozenset({
        diagnostics.BROKEN, diagnostics.OVER_BAKED, diagnostics.WASHED_OUT,
        diagnostics.COLOUR_CAST, diagnostics.CRITIC_LAGS}),
    dataclasses.replace(SHIPPED, lost=math.inf), {
        'gap_up': (1, 0.05, 5.0), 'gap_large': (0, 0.02, 1.5), 'cos_down': (1, 0.05, 9.0),
        'std_up': (1, 0.02, 4.0), 'ema_std_up': (1, 0.02, 3.0), 'ema_std_down': (1, -0.01, -0.4),
        'cast': (0, 0.005, 0.8), 'fake_up': (1, 0.05, 30.0)})
SIGNALS = (COLLAPSING, LEVELS)


@dataclasses.dataclass(frozen=True)
class Run:
    """One run: `fell`, the update at which quality had fallen, or None; lines of health figures.

    `lines` are dicts of WATCHED and `step`; `peak` is the best caption match, `last` the last.
    """

    name: str
    fields: Mapping[str, Any]
    peak: float
    last: float
    fell: int | None
    lines: tuple[Mapping[str, Any], ...]
    data_std: float | None


@dataclasses.dataclass(frozen=True)
class Rates:
    """What a set of thresholds does over some runs.

    `hits` of `degrading` runs are warned of `LEAD` updates before the fall or earlier, `late` at
    all before it; `false` of `steady` ones are warned of though nothing comes of it. `early` could
    not have been warned of in time by anything: they fell within `LEAD` updates of the first line
    that is judged.
    """

    degrading: int
    hits: int
    late: int
    early: int
    steady: int
    false: int

    @property
    def hit_rate(self) -> float | None:
        return self.hits / self.degrading if self.degrading else None

    @property
    def false_rate(self) -> float | None:
        return self.false / self.steady if self.steady else None

    @property
    def reached(self) -> bool:
        """Whether both bars are."""
        return (self.hit_rate is not None and self.hit_rate >= HITS
                and (self.false_rate or 0.0) <= FALSE_ALARMS)


# --- Outcomes and warnings ---


def fall(steps: Sequence[int], match: Sequence[float]) -> int | None:
    """The first update of `TWICE` lines in a row with a match `DROP` below the best before them."""
    low, peak = 0, 0.0
    for i, value in enumerate(match):
        low = low + 1 if peak > 0 and value <= (1 - DROP) * peak else 0
        if low == TWICE:
            return steps[i - TWICE + 1]
        peak = max(peak, value)
    return None


def read(results: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> list[Run]:
    """The runs of a study's results, ``{experiment: {seed: result}}``.

    A run that diverged fell at the line it did not come to. One that broke off for another reason
    is left out.

    Raises:
      ValueError: a run has no judged lines (`log.judge` or `log.probe` was off).
    """
    known = [r['data_std'] for by in results.values() for r in by.values() if 'data_std' in r]
    found = [_read(f'{name}-seed{seed}', r, known[0] if known else None)
             for name, by in results.items() for seed, r in by.items()]
    return [run for run in found if run is not None]


def _read(name: str, result: Mapping[str, Any], data_std: float | None) -> Run | None:
    diverged = DIVERGED in result.get('failed', '')
    if 'failed' in result and not diverged:
        return None
    curves = result['curves']
    absent = [k for k in ('ema_std', 'ema_match') if k not in curves and curves.get('step')]
    if absent:
        raise ValueError(f'{name} has no {absent[0]} in its lines: log.probe and log.judge have to '
                         'be on')
    steps, match = curves.get('step', []), curves.get('ema_match', [])
    lines = tuple({k: curves[k][i] for k in ('step', *WATCHED) if k in curves}
                  for i in range(len(steps)))
    fell = fall(steps, match)
    if fell is None and diverged:
        fell = (steps[-1] if steps else 0) + result['fields']['log.every']
    return Run(name, result['fields'], max(match, default=0.0), match[-1] if match else 0.0, fell,
               lines, data_std)


def warned(run: Run, signal: Signal, limits: Thresholds) -> int | None:
    """The update of the first line whose verdict is the signal."""
    for i, line in enumerate(run.lines):
        word, _ = diagnostics.verdict(run.lines[:i + 1], run.data_std, limits)
        if word in signal.words:
            return line['step']
    return None


def rates(runs: Sequence[Run], signal: Signal, limits: Thresholds) -> Rates:
    """How `signal` would have done with `limits`."""
    return _rates(runs, [warned(run, signal, limits) for run in runs])


def _rates(runs: Sequence[Run], warnings: Sequence[int | None]) -> Rates:
    bad = [(r, w) for r, w in zip(runs, warnings) if r.fell is not None]
    good = [w for r, w in zip(runs, warnings) if r.fell is None]
    in_time = lambda r, w, lead: w is not None and w <= r.fell - lead
    return Rates(len(bad), sum(in_time(r, w, LEAD) for r, w in bad),
                 sum(in_time(r, w, 1) for r, w in bad),
                 sum(not r.lines or r.fell - LEAD < r.lines[0]['step'] for r, _ in bad),
                 len(good), sum(w is not None for w in good))


# --- Tuning ---


def halves(runs: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """Two halves in which outcomes, and among those that fell the time of it, are alike.

    Raises:
      ValueError: a recipe is there with several seeds.
    """
    if len({run.name.rpartition('-seed')[0] for run in runs}) < len(runs):
        raise ValueError('a recipe has several seeds, which would stand in both halves; one is '
                         'enough for this suite')
    ordered = sorted(runs, key=lambda r: (r.fell is None, r.fell, r.name))
    return ordered[::2], ordered[1::2]


def candidates(signal: Signal, count: int, seed: int = 0) -> Iterator[Thresholds]:
    """The signal's own thresholds, then `count` sets drawn from its ranges."""
    rng = np.random.default_rng(seed)
    yield signal.limits
    for _ in range(count):
        yield dataclasses.replace(signal.limits, **{
            name: rest + float(np.sign(near) * np.exp(rng.uniform(*np.log(np.abs((near, far))))))
            for name, (rest, near, far) in signal.ranges.items()})


def better(r: Rates) -> tuple[Any, ...]:
    """Order of preference: few enough false alarms, then hits, then fewer alarms."""
    false = r.false_rate or 0.0
    return (min(0.0, FALSE_ALARMS - false), r.hits, r.late, -false)


@dataclasses.dataclass(frozen=True)
class Tuned:
    """The best thresholds found, and of all that were tried the (false alarms, hits), as shares,
    that none beats in both."""

    limits: Thresholds
    frontier: tuple[tuple[float, float], ...]


def tune(runs: Sequence[Run], signal: Signal, count: int = DRAWN) -> Tuned:
    """The best of `candidates` on `runs`: the signal's own if none is better, else of those that
    are alike the middlemost, which has room on all sides for other runs."""
    tried = [(rates(runs, signal, limits), limits) for limits in candidates(signal, count)]
    best = max(better(r) for r, _ in tried)
    alike = [limits for r, limits in tried if better(r) == best]
    points = _frontier({(r.false_rate or 0.0, r.hit_rate or 0.0) for r, _ in tried})
    return Tuned(alike[0] if alike[0] == signal.limits else _middle(alike, signal), points)


def _middle(alike: Sequence[Thresholds], signal: Signal) -> Thresholds:
    """The one nearest to the median of all, in the logarithms that are drawn evenly."""
    places = np.asarray([[math.log(abs(getattr(limits, name) - rest))
                          for name, (rest, _, _) in signal.ranges.items()] for limits in alike])
    return alike[int(np.argmin(np.sum((places - np.median(places, axis=0)) ** 2, axis=1)))]


def _frontier(points: set[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    most, kept = -1.0, []
    for false, hit in sorted(points, key=lambda p: (p[0], -p[1])):
        if hit > most:
            most = hit
            kept.append((false, hit))
    return tuple(kept)


def axes(runs: Sequence[Run], names: Sequence[str]) -> dict[str, list[Any]]:
    """The different values of each field, in order."""
    return {name: sorted({run.fields[name] for run in runs}) for name in names}


def at(runs: Sequence[Run], where: Mapping[str, Any]) -> Run | None:
    """The run with these fields."""
    return next((r for r in runs if all(r.fields[k] == v for k, v in where.items())), None)


def products(values: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Every choice of one value each."""
    for chosen in itertools.product(*values.values()):
        yield dict(zip(values, chosen))
