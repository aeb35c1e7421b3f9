"""The robustness map as one HTML file: outcomes, the verdict's hit rate, its trade-off."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddmd_jax.study import page, robustness as rb
from ddmd_jax.train.diagnostics import SHIPPED, Thresholds

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
        alarm = rb.warned(run, SHIPPED)
        ax.text(x, y, f'{"steady" if run.fell is None else f"fell {run.fell}"}\n'
                      f'{"no warning" if alarm is None else f"warned {alarm}"}',
                ha='center', va='center', fontsize=7, color='black')
    ax.imshow(shade, cmap='RdYlGn', vmin=-0.5, vmax=1.5, origin='lower', aspect='auto')
    ax.set_xticks(range(shape[1]), [f'{v:g}' for v in cells[COLUMNS]], fontsize=7)
    ax.set_yticks(range(shape[0]), [f'{v:g}' for v in cells[ROWS]], fontsize=7)
    ax.set_xlabel(SHORT[COLUMNS], fontsize=8)
    ax.set_ylabel(SHORT[ROWS], fontsize=8)
    ax.set_title(', '.join(f'{SHORT[k]} {v:g}' for k, v in where.items()), fontsize=9)


def frontier_figure(points: Sequence[tuple[float, float]],
                    others: Mapping[str, rb.Rates]) -> bytes:
    """A PNG of hits against false alarms."""
    fig, ax = page.subplots(figsize=(5, 3.4))
    ax.step(*zip(*points), where='post', marker='.', label='best found, tuning half')
    for mark, (name, r) in zip('os', others.items()):
        ax.plot([r.false_rate or 0.0], [r.hit_rate or 0.0], mark, label=f'{name}, other half')
    ax.axvline(rb.FALSE_ALARMS, color='grey', lw=0.8, ls=':')
    ax.axhline(rb.HITS, color='grey', lw=0.8, ls=':')
    ax.set(xlabel='share of steady runs with a warning', xlim=(-0.03, 1.03), ylim=(-0.03, 1.03),
           ylabel=f'share warned of {rb.LEAD} updates before')
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    return page.png_of(fig)


def answer(r: rb.Rates) -> str:
    """What the tuned thresholds do on the runs they were not tuned on, in a sentence."""
    share = lambda v: 'none there' if v is None or math.isnan(v) else f'{v:.0%}'
    return (f'With tuned thresholds, on the half of the runs that they were not tuned on: '
            f'{"yes" if r.reached else "no"}. {share(r.hit_rate)} of the runs that degrade are '
            f'warned of in time ({r.early} of {r.degrading} fell too early for any warning), and '
            f'there is a warning in {share(r.false_rate)} of the steady ones.')


def write(path: Path, title: str, head: str, how: str,
          results: Mapping[str, Mapping[int, Mapping[str, Any]]],
          drawn: int = rb.DRAWN) -> tuple[Thresholds, rb.Rates]:
    """Writes the page to `path`; (the tuned thresholds, what they do on the other half).

    Raises:
      ValueError: a run has no judged lines, or none has any.
    """
    runs = rb.read(results)
    if len(runs) < 2:
        raise ValueError('fewer than two runs came to their first lines; nothing can be tuned')
    ours, theirs = rb.halves(runs)
    tuned = rb.tune(ours, drawn)
    whose = {'shipped': SHIPPED, 'tuned': tuned}
    held = {name: rb.rates(theirs, limits) for name, limits in whose.items()}
    rates = [{'whose': name, 'runs': label, 'r': rb.rates(some, limits)}
             for name, limits in whose.items()
             for label, some in (('tuned on', ours), ('the others', theirs), ('all', runs))]
    named = {id(run): 'tuned on' for run in ours}
    table = [{**vars(run), **{name: rb.warned(run, limits) for name, limits in whose.items()},
              'half': named.get(id(run), 'other')} for run in sorted(runs, key=lambda r: r.name)]
    badge = lambda reached: page.badge(*(('holds', 'reached') if reached else
                                         ('fails', 'not reached')))
    path.write_text(page.render(
        'robustness', title=title, head=head, how=how, map=page.data_url(map_figure(runs)),
        frontier=page.data_url(frontier_figure(rb.frontier(ours, drawn), held)),
        answer=answer(held['tuned']), rates=rates, badge=badge, drop=rb.DROP, lead=rb.LEAD,
        hits=rb.HITS, alarms=rb.FALSE_ALARMS, table=table, broken=page.broken(results),
        thresholds=[(f.name, getattr(SHIPPED, f.name), getattr(tuned, f.name))
                    for f in dataclasses.fields(Thresholds)]))
    return tuned, held['tuned']
