"""Where a recipe stays healthy, and whether the verdict warns before quality falls.

A run's outcome is read off the judge's figures, its warning off the health figures of the same
lines, which know nothing of the judge. A `Signal` is a rule for a warning: its thresholds are
tuned on half of the runs and reported on the other, which has other learning rates.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from ddmd_jax.method import health as diagnostics
from ddmd_jax.method.health import SHIPPED, Thresholds
from ddmd_jax.study.results import watched
from ddmd_jax.study.trials import DIVERGED

DROP = 0.05  # share of its peak by which the caption match has fallen when quality has
TWICE = 2  # lines in a row that have to say so: one may be chance
LEAD = 50  # updates by which a warning has to come before the fall
FALSE_ALARMS = 0.10  # share of the runs that do not degrade in which a warning is tolerated
HITS = 0.80  # share of the runs that degrade in which a warning in time is wanted
LEVEL = 0.95  # of the intervals of shares
SPLIT = 'optim.student.lr'  # halves are made by: it sets how fast everything goes
DRAWN = 2000  # sets of thresholds that are tried


@dataclasses.dataclass(frozen=True)
class Signal:
    """A kind of warning: verdicts with one of `words`, by the thresholds `limits`.

    `ranges` are of those that are tuned: the value that distances are taken from, and the nearest
    and farthest from there that are tried, evenly in the logarithm.
    """

    name: str
    words: frozenset[str]
    limits: Thresholds
    ranges: Mapping[str, tuple[float, float, float]]


COLLAPSE = Signal(
    'collapsing or broken', frozenset({diagnostics.COLLAPSING, diagnostics.BROKEN}), SHIPPED,
    {'lost': (1, 0.1, 3.0), 'ahead': (0, 1.0, 100.0)})
# The other verdicts as an alarm, for comparison: levels instead of their trend.
LEVELS = Signal(
    'levels alone', frozenset({
        diagnostics.BROKEN, diagnostics.OVER_BAKED, diagnostics.WASHED_OUT,
        diagnostics.COLOUR_CAST, diagnostics.CRITIC_LAGS}),
    dataclasses.replace(SHIPPED, lost=math.inf), {
        'gap_up': (1, 0.05, 5.0), 'gap_large': (0, 0.02, 1.5), 'cos_down': (1, 0.05, 9.0),
        'std_up': (1, 0.02, 4.0), 'ema_std_up': (1, 0.02, 3.0), 'ema_std_down': (1, -0.01, -0.4),
        'pale': (1, -0.01, -0.4), 'regained': (0, 0.01, 1.0), 'cast': (0, 0.005, 0.8),
        'fake_up': (1, 0.05, 30.0)})
SIGNALS = (COLLAPSE, LEVELS)


@dataclasses.dataclass(frozen=True)
class History:
    """One run: `fell`, the update at which quality had fallen, or None; lines of health figures.

    `lines` are dicts of `diagnostics.WATCHED` and `step`; `peak` is the best caption match, `last`
    the last. The outcome of a run that ends below the bar, but with one line only, is `unknown`.
    """

    name: str
    fields: Mapping[str, Any]
    peak: float
    last: float
    fell: int | None
    unknown: bool
    lines: tuple[Mapping[str, Any], ...]
    data_std: float | None


@dataclasses.dataclass(frozen=True)
class Rates:
    """Hits and false alarms of a set of thresholds over some runs.

    `hits` of `degrading` runs are warned of `LEAD` updates before the fall or earlier, in
    `standing` of them the last line before that still says so; `warned` are warned of at all before
    it; `false` of `steady` ones are, though nothing comes of it. `early` could not have been warned
    of in time by anything: they fell within `LEAD` updates of the first line that is judged.
    """

    degrading: int
    hits: int
    standing: int
    warned: int
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
        """Whether both bars are; without runs of both kinds neither is."""
        return (self.degrading > 0 and self.hit_rate >= HITS
                and self.steady > 0 and self.false_rate <= FALSE_ALARMS)


# --- Outcomes and warnings ---


def share_interval(count: int, whole: int) -> tuple[float, float]:
    """Clopper and Pearson's interval of a share."""
    found = stats.binomtest(count, whole).proportion_ci(LEVEL, 'exact')
    return found.low, found.high


def fall(steps: Sequence[int], match: Sequence[float],
         drop: float = DROP) -> tuple[int | None, bool]:
    """(The first update of `TWICE` lines in a row with a match `drop` below the best before them
    or None, whether that is unknown: the last line is the first of such)."""
    low, peak = 0, 0.0
    for i, value in enumerate(match):
        low = low + 1 if peak > 0 and value <= (1 - drop) * peak else 0
        if low == TWICE:
            return steps[i - TWICE + 1], False
        peak = max(peak, value)
    return None, low > 0


def read(results: Mapping[str, Mapping[int, Mapping[str, Any]]],
         drop: float = DROP) -> list[History]:
    """The runs of a study's results, ``{experiment: {seed: result}}``.

    A run that diverged fell at the line it did not come to. One that broke off for another reason
    is left out.

    Raises:
      ValueError: a run has no judged lines (`log.judge` or `log.probe` was off).
    """
    known = [r['data_std'] for by in results.values() for r in by.values() if 'data_std' in r]
    found = [_read(f'{name}-seed{seed}', r, known[0] if known else None, drop)
             for name, by in results.items() for seed, r in by.items()]
    return [run for run in found if run is not None]


def _read(name: str, result: Mapping[str, Any], data_std: float | None,
          drop: float) -> History | None:
    diverged = DIVERGED in result.get('failed', '')
    if 'failed' in result and not diverged:
        return None
    if 'curves' not in result:
        raise ValueError(f'{name} has no curves')
    curves = result['curves']
    probed = ('ema_std', 'ema_start', 'ema_match')
    absent = [k for k in probed if k not in curves and curves.get('step')]
    if absent:
        raise ValueError(f'{name} has no {absent[0]} in its lines: log.probe and log.judge have to '
                         'be on')
    steps, match = curves.get('step', []), curves.get('ema_match', [])
    if None in match or diverged and 'log.every' not in result['fields']:
        raise ValueError(f'{name} has lines without ema_match, or no log.every among its fields')
    fell, unknown = fall(steps, match, drop)
    if fell is None and diverged:
        fell, unknown = (steps[-1] if steps else 0) + result['fields']['log.every'], False
    return History(name, result['fields'], max(match, default=0.0), match[-1] if match else 0.0,
                   fell, unknown, watched(curves), data_std)


def said(run: History, signal: Signal, limits: Thresholds) -> list[int]:
    """The updates of the lines whose verdict is the signal."""
    verdict = lambda i: diagnostics.verdict(run.lines[:i + 1], run.data_std, limits)[0]
    return [line['step'] for i, line in enumerate(run.lines) if verdict(i) in signal.words]


def rates(runs: Sequence[History], signal: Signal, limits: Thresholds) -> Rates:
    """How `signal` would have done with `limits`; runs with an unknown outcome do not count."""
    bad = [(r, said(r, signal, limits)) for r in runs if r.fell is not None]
    good = [said(r, signal, limits) for r in runs if r.fell is None and not r.unknown]
    before = lambda lead: sum(any(x <= r.fell - lead for x in steps) for r, steps in bad)
    last = lambda r: max((x['step'] for x in r.lines if x['step'] <= r.fell - LEAD), default=None)
    return Rates(len(bad), before(LEAD), sum(last(r) in steps for r, steps in bad), before(1),
                 sum(last(r) is None for r, _ in bad), len(good), sum(map(bool, good)))


# --- Tuning ---


def halves(runs: Sequence[History]) -> tuple[list[History], list[History]]:
    """Two halves: every other learning rate of the student's.

    Runs that differ in alpha or the critic only are too much alike to stand on both sides.

    Raises:
      ValueError: all have the same, or a recipe is there with several seeds.
    """
    if len({run.name.rpartition('-seed')[0] for run in runs}) < len(runs):
        raise ValueError('a recipe has several seeds, but one is what this suite takes')
    known = axes(runs, (SPLIT,))[SPLIT]
    if len(known) < 2:
        raise ValueError(f'all runs that came to their first lines have the same {SPLIT}: what is '
                         'tuned on half of them has nothing else to be tried on')
    ours, theirs = (set(known[i::2]) for i in (0, 1))
    of = lambda some: [run for run in runs if run.fields[SPLIT] in some]
    return of(ours), of(theirs)


def candidates(signal: Signal, count: int, seed: int = 0) -> Iterator[Thresholds]:
    """`count` sets of thresholds drawn from the signal's ranges.

    Its own are none of them: whoever chose those may have looked at any run.
    """
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield dataclasses.replace(signal.limits, **{
            name: rest + float(np.sign(near) * np.exp(rng.uniform(*np.log(np.abs((near, far))))))
            for name, (rest, near, far) in signal.ranges.items()})


def better(r: Rates) -> tuple[float, int]:
    """Order of preference: few enough false alarms, then hits."""
    return min(0.0, FALSE_ALARMS - (r.false_rate or 0.0)), r.hits


@dataclasses.dataclass(frozen=True)
class Tuned:
    """The best thresholds found, and of all that were tried the (false alarms, hits), as shares,
    that none beats in both."""

    limits: Thresholds
    frontier: tuple[tuple[float, float], ...]


def tune(runs: Sequence[Any], signal: Signal, count: int = DRAWN,
         counted: Callable[[Sequence[Any], Signal, Thresholds], Rates] = rates) -> Tuned:
    """The best of `candidates` on `runs`, as `counted`: of those that are alike the one that is
    farthest from all that do worse."""
    tried = list(candidates(signal, count))
    found = [counted(runs, signal, limits) for limits in tried]
    best = max(map(better, found))
    alike = np.asarray([better(r) == best for r in found])
    points = _frontier({(r.false_rate or 0.0, r.hit_rate or 0.0) for r in found})
    return Tuned(tried[_inmost(tried, alike, signal)], points)


def _inmost(tried: Sequence[Thresholds], alike: np.ndarray, signal: Signal) -> int:
    """Which of those `alike` has the most room around it, in the logarithms drawn evenly."""
    place = lambda limits: [math.log(abs(getattr(limits, name) - rest) / abs(near))
                            / math.log(far / near)
                            for name, (rest, near, far) in signal.ranges.items()]
    places = np.asarray([place(limits) for limits in tried])
    inner, outer = np.flatnonzero(alike), places[~alike]
    room = [np.min(np.sum((outer - places[i]) ** 2, axis=1), initial=np.inf) for i in inner]
    return int(inner[np.argmax(room)])


def _frontier(points: set[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    most, kept = -1.0, []
    for false, hit in sorted(points, key=lambda p: (p[0], -p[1])):
        if hit > most:
            most = hit
            kept.append((false, hit))
    return tuple(kept)


def axes(runs: Sequence[History], names: Sequence[str]) -> dict[str, list[Any]]:
    """The different values of each field, in order."""
    return {name: sorted({run.fields[name] for run in runs}) for name in names}


def at(runs: Sequence[History], where: Mapping[str, Any]) -> History | None:
    """The run with these fields."""
    return next((r for r in runs if all(r.fields[k] == v for k, v in where.items())), None)


def products(values: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Every choice of one value each."""
    for chosen in itertools.product(*values.values()):
        yield dict(zip(values, chosen))
