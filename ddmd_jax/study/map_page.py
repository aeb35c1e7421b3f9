"""The robustness map as one HTML file: outcomes, the verdict's hit rate, its trade-off."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddmd_jax.study import page, robustness as rb
from ddmd_jax.util import files

ROWS, COLUMNS = 'optim.student.lr', 'optim.critic.lr'  # of a panel
PANELS = ('method.alpha', 'critic.updates')  # rows and columns of panels
SHORT = {ROWS: 'student lr', COLUMNS: 'critic lr', PANELS[0]: 'alpha', PANELS[1]: 'critic updates'}


def map_figure(runs: Sequence[rb.History]) -> bytes:
    """A PNG: panels by alpha and critic updates, cells by learning rates."""
    panels = rb.axes(runs, PANELS)
    cells = rb.axes(runs, (ROWS, COLUMNS))
    down, across = (panels[name] for name in PANELS)
    width, height = len(cells[COLUMNS]) * len(across), len(cells[ROWS]) * len(down)
    fig, grid = page.subplots(len(down), len(across), squeeze=False,
                              figsize=(1.5 + 1.2 * width, 0.8 + 0.75 * height))
    last = max((line['step'] for run in runs for line in run.lines), default=1)
    for ax, where in zip(grid.ravel(), rb.products(panels)):
        _panel(ax, runs, where, cells, last)
    return page.png_of(fig)


def _panel(ax: Any, runs: Sequence[rb.History], where: Mapping[str, Any],
           cells: Mapping[str, Sequence[Any]], last: int) -> None:
    shape = (len(cells[ROWS]), len(cells[COLUMNS]))
    shade = np.full(shape, np.nan)
    for y, x in np.ndindex(shape):
        run = rb.at(runs, {**where, ROWS: cells[ROWS][y], COLUMNS: cells[COLUMNS][x]})
        if run is None:
            continue
        shade[y, x] = 0.7 if run.unknown else 1.0 if run.fell is None else 0.6 * run.fell / last
        ax.text(x, y, f'{outcome(run)}\n{_warned(run)}', ha='center', va='center', fontsize=7,
                color='black')
    ax.imshow(shade, cmap='RdYlGn', vmin=-0.5, vmax=1.5, origin='lower', aspect='auto')
    ax.set_xticks(range(shape[1]), [f'{v:g}' for v in cells[COLUMNS]], fontsize=7)
    ax.set_yticks(range(shape[0]), [f'{v:g}' for v in cells[ROWS]], fontsize=7)
    ax.set_xlabel(SHORT[COLUMNS], fontsize=8)
    ax.set_ylabel(SHORT[ROWS], fontsize=8)
    ax.set_title(', '.join(f'{SHORT[k]} {v:g}' for k, v in where.items()), fontsize=9)


def outcome(run: rb.History) -> str:
    """In a word or two."""
    return 'unknown' if run.unknown else 'steady' if run.fell is None else f'fell {run.fell}'


def _warned(run: rb.History) -> str:
    steps = rb.said(run, rb.COLLAPSE, rb.COLLAPSE.limits)
    return f'warned {steps[0]}' if steps else 'no warning'


@dataclasses.dataclass(frozen=True)
class Judged:
    """A signal, its thresholds as tuned on the runs `ours`, and the runs `theirs` that were not
    looked at for that."""

    signal: rb.Signal
    tuned: rb.Tuned
    ours: Sequence[rb.History]
    theirs: Sequence[rb.History]

    @property
    def limits(self) -> dict[str, Any]:
        return {'shipped': self.signal.limits, 'tuned': self.tuned.limits}

    def held_out(self, whose: str = 'tuned') -> rb.Rates:
        """Rates of the thresholds on the runs held out of tuning."""
        return rb.rates(self.theirs, self.signal, self.limits[whose])

    def rows(self) -> list[dict[str, Any]]:
        """Of the table of rates."""
        halves = (('tuned on', self.ours), ('the others', self.theirs),
                  ('all', [*self.ours, *self.theirs]))
        return [{'signal': self.signal.name, 'whose': whose, 'runs': label,
                 'r': rb.rates(some, self.signal, limits)}
                for whose, limits in self.limits.items() for label, some in halves]

    def thresholds(self) -> list[tuple[str, str, float, float]]:
        return [(self.signal.name, name, *(getattr(x, name) for x in self.limits.values()))
                for name in self.signal.ranges]


def frontier_figure(judged: Sequence[Judged]) -> bytes:
    """A PNG of hits against false alarms."""
    fig, ax = page.subplots(figsize=(5.4, 3.6))
    for i, j in enumerate(judged):
        ax.step(*zip(*j.tuned.frontier), where='post', marker='.', color=f'C{i}',
                label=f'{j.signal.name}: best found, tuning half')
        for mark, whose in zip('os', j.limits):
            r = j.held_out(whose)
            ax.plot([r.false_rate or 0.0], [r.hit_rate or 0.0], mark, color=f'C{i}', ls='none',
                    label=f'{j.signal.name}: {whose}, other half')
    ax.axvline(rb.FALSE_ALARMS, color='grey', lw=0.8, ls=':')
    ax.axhline(rb.HITS, color='grey', lw=0.8, ls=':')
    ax.set(xlabel='share of steady runs with a warning', xlim=(-0.03, 1.03), ylim=(-0.03, 1.03),
           ylabel=f'share warned of {rb.LEAD} updates before')
    ax.grid(alpha=0.3)
    ax.legend(fontsize=7)
    return page.png_of(fig)


def of(count: int, whole: int) -> str:
    """A count with its share and that one's interval."""
    if not whole:
        return 'there were none'
    low, high = rb.share_interval(count, whole)
    return f'{count} of {whole} ({low:.0%} to {high:.0%})'


def answer(r: rb.Rates) -> str:
    """The verdict's rates on the runs held out of tuning, in a few sentences."""
    return (f'{"Yes" if r.reached else "No"}. With thresholds tuned on half of the runs, and '
            f'counted on the other, which has other learning rates: of those that degraded, '
            f'warned of {rb.LEAD} updates before or earlier: {of(r.hits, r.degrading)}; {r.early} '
            f'fell too early for any warning. Of those that stayed, warned of: '
            f'{of(r.false, r.steady)}.')


def sensitivity(results: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Rates of the shipped thresholds over all runs, for a smaller and a larger fall."""
    return [{'drop': drop, 'r': rb.rates(rb.read(results, drop), rb.COLLAPSE, rb.COLLAPSE.limits)}
            for drop in (0.8 * rb.DROP, rb.DROP, 1.2 * rb.DROP)]


def write(path: Path, title: str, head: str, how: str,
          results: Mapping[str, Mapping[int, Mapping[str, Any]]],
          drawn: int = rb.DRAWN) -> dict[str, Judged]:
    """Writes the page to `path`; what was found of each of `robustness.SIGNALS`, by its name.

    Raises:
      ValueError: a run has no judged lines, none has any, or there are no two halves.
    """
    runs = rb.read(results)
    if len(runs) < 2:
        raise ValueError('fewer than two runs came to their first lines; nothing can be tuned')
    ours, theirs = rb.halves(runs)
    judged = [Judged(signal, rb.tune(ours, signal, drawn), ours, theirs) for signal in rb.SIGNALS]
    found = {j.signal.name: j for j in judged}
    first = lambda *args: next(iter(rb.said(*args)), None)
    warnings = lambda run: [first(run, j.signal, limits)
                            for j in judged for limits in j.limits.values()]
    named = {id(run): 'tuned on' for run in ours}
    table = [{'run': run, 'outcome': outcome(run), 'warnings': warnings(run),
              'half': named.get(id(run), 'other')} for run in sorted(runs, key=lambda r: r.name)]
    badge = lambda reached: page.badge(*(('holds', 'reached') if reached else
                                         ('fails', 'not reached')))
    files.write(path, page.render(
        'robustness', title=title, head=head, how=how, map=page.data_url(map_figure(runs)),
        frontier=page.data_url(frontier_figure(judged)), of=of, sensitivity=sensitivity(results),
        answer=answer(found[rb.COLLAPSE.name].held_out()),
        rates=[row for j in judged for row in j.rows()], badge=badge, drop=rb.DROP, lead=rb.LEAD,
        hits=rb.HITS, alarms=rb.FALSE_ALARMS, level=rb.LEVEL, table=table,
        columns=[f'{j.signal.name}, {whose}' for j in judged for whose in j.limits],
        broken=page.broken(results), thresholds=[t for j in judged for t in j.thresholds()]))
    return found
