"""The robustness map as one HTML file: outcomes, the verdict's hit rate, its trade-off."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddmd_jax.study import page, robustness as rb

ROWS, COLUMNS = 'optim.student.lr', 'optim.critic.lr'  # of a panel
PANELS = ('method.alpha', 'critic.updates')  # rows and columns of panels
SHORT = {ROWS: 'student lr', COLUMNS: 'critic lr', PANELS[0]: 'alpha', PANELS[1]: 'critic updates'}


def map_figure(runs: Sequence[rb.Run]) -> bytes:
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


def _panel(ax: Any, runs: Sequence[rb.Run], where: Mapping[str, Any],
           cells: Mapping[str, Sequence[Any]], last: int) -> None:
    shape = (len(cells[ROWS]), len(cells[COLUMNS]))
    shade = np.full(shape, np.nan)
    for y, x in np.ndindex(shape):
        run = rb.at(runs, {**where, ROWS: cells[ROWS][y], COLUMNS: cells[COLUMNS][x]})
        if run is None:
            continue
        shade[y, x] = 1.0 if run.fell is None else 0.6 * run.fell / last
        alarm = rb.warned(run, rb.COLLAPSING, rb.COLLAPSING.limits)
        ax.text(x, y, f'{"steady" if run.fell is None else f"fell {run.fell}"}\n'
                      f'{"no warning" if alarm is None else f"warned {alarm}"}',
                ha='center', va='center', fontsize=7, color='black')
    ax.imshow(shade, cmap='RdYlGn', vmin=-0.5, vmax=1.5, origin='lower', aspect='auto')
    ax.set_xticks(range(shape[1]), [f'{v:g}' for v in cells[COLUMNS]], fontsize=7)
    ax.set_yticks(range(shape[0]), [f'{v:g}' for v in cells[ROWS]], fontsize=7)
    ax.set_xlabel(SHORT[COLUMNS], fontsize=8)
    ax.set_ylabel(SHORT[ROWS], fontsize=8)
    ax.set_title(', '.join(f'{SHORT[k]} {v:g}' for k, v in where.items()), fontsize=9)


@dataclasses.dataclass(frozen=True)
class Judged:
    """A signal's thresholds, as shipped and as tuned on the runs `ours`, on those and on others."""

    signal: rb.Signal
    tuned: rb.Tuned
    ours: Sequence[rb.Run]
    theirs: Sequence[rb.Run]

    @property
    def limits(self) -> dict[str, Any]:
        return {'shipped': self.signal.limits, 'tuned': self.tuned.limits}

    def held_out(self, whose: str) -> rb.Rates:
        """What thresholds do on the runs that nothing was tuned on."""
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
    for colour, j in zip(('#c9473f', '#3b7dd8'), judged):
        ax.step(*zip(*j.tuned.frontier), where='post', marker='.', color=colour,
                label=f'{j.signal.name}: best found, tuning half')
        for mark, whose in zip('os', j.limits):
            r = j.held_out(whose)
            ax.plot([r.false_rate or 0.0], [r.hit_rate or 0.0], mark, color=colour, ls='none',
                    label=f'{whose}, other half')
    ax.axvline(rb.FALSE_ALARMS, color='grey', lw=0.8, ls=':')
    ax.axhline(rb.HITS, color='grey', lw=0.8, ls=':')
    ax.set(xlabel='share of steady runs with a warning', xlim=(-0.03, 1.03), ylim=(-0.03, 1.03),
           ylabel=f'share warned of {rb.LEAD} updates before')
    ax.grid(alpha=0.3)
    ax.legend(fontsize=7)
    return page.png_of(fig)


def answer(r: rb.Rates) -> str:
    """What the grave verdict does on the runs it was not tuned on, in a sentence."""
    of = lambda count, whole, which: (f'{count} of {whole} that {which}' if whole else
                                      f'none of those that {which}, as there were none')
    return (f'{"Yes" if r.reached else "No"}: as shipped, on the runs that nothing was tuned on, '
            f'{rb.COLLAPSING.name!r} was said {rb.LEAD} updates before the fall in '
            f'{of(r.hits, r.degrading, "degraded")} ({r.early} fell too early for any warning), '
            f'and in {of(r.false, r.steady, "stayed")}.')


def write(path: Path, title: str, head: str, how: str,
          results: Mapping[str, Mapping[int, Mapping[str, Any]]],
          drawn: int = rb.DRAWN) -> list[Judged]:
    """Writes the page to `path`; what was found of each of `robustness.SIGNALS`.

    Raises:
      ValueError: a run has no judged lines, or none has any.
    """
    runs = rb.read(results)
    if len(runs) < 2:
        raise ValueError('fewer than two runs came to their first lines; nothing can be tuned')
    ours, theirs = rb.halves(runs)
    judged = [Judged(signal, rb.tune(ours, signal, drawn), ours, theirs) for signal in rb.SIGNALS]
    warnings = lambda run: [rb.warned(run, j.signal, limits)
                            for j in judged for limits in j.limits.values()]
    named = {id(run): 'tuned on' for run in ours}
    table = [{'run': run, 'warnings': warnings(run), 'half': named.get(id(run), 'other')}
             for run in sorted(runs, key=lambda r: r.name)]
    badge = lambda reached: page.badge(*(('holds', 'reached') if reached else
                                         ('fails', 'not reached')))
    path.write_text(page.render(
        'robustness', title=title, head=head, how=how, map=page.data_url(map_figure(runs)),
        frontier=page.data_url(frontier_figure(judged)),
        answer=answer(judged[0].held_out('shipped')), rates=[r for j in judged for r in j.rows()],
        badge=badge, drop=rb.DROP, lead=rb.LEAD, hits=rb.HITS, alarms=rb.FALSE_ALARMS, table=table,
        columns=[f'{j.signal.name}, {whose}' for j in judged for whose in j.limits],
        broken=page.broken(results), thresholds=[t for j in judged for t in j.thresholds()]))
    return judged
