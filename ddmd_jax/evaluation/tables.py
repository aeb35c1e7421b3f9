"""The rows of ``eval.json`` as a table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ddmd_jax.util import text

SETTINGS = ('steps', 'evaluations', 'guidance')  # of a row's sampler; its other values are figures
FORMAT = '.3f'  # of a figure, unless a suite says otherwise

Row = Mapping[str, Any]


def terminal(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    """Rows of one run as aligned text; `columns` are the formats of a suite's figures."""
    heads = ['', *(name.replace('_', ' ') for name in (*SETTINGS, *columns))]
    cells = [[row['name'], *(show(row[name]) for name in SETTINGS),
              *(show(row.get(name), form) for name, form in columns.items())] for row in rows]
    return text.aligned([heads, *cells], numbers=len(heads) - 1)


def show(value: Any, form: str = FORMAT) -> str:
    """One value; '-' where a row has none."""
    return '-' if value is None else format(value, form) if isinstance(value, float) else str(value)


def over_runs(runs: Sequence[Sequence[Row]]) -> str:
    """Rows of several runs as Markdown, ``mean ± standard deviation`` over the runs.

    Rows and figures are those of the first run.

    Raises:
      KeyError: another run lacks one of them.
    """
    named = [{row['name']: row for row in rows} for rows in runs]
    figures = [name for name in runs[0][0] if name not in ('name', *SETTINGS)]
    cells = []
    for first in runs[0]:
        counts = [first[name] if first[name] is not None else '' for name in SETTINGS[:2]]
        spreads = [_spread([run[first['name']][name] for run in named]) for name in figures]
        cells.append([first['name'].replace('_', ' '), *counts, *spreads])
    return text.markdown(['', *SETTINGS[:2], *(name.replace('_', ' ') for name in figures)], cells)


def _spread(values: Sequence[float]) -> str:
    """The spread is left out for a single run."""
    mean = format(statistics.mean(values), FORMAT)
    return mean if len(values) == 1 else f'{mean} ± {format(statistics.stdev(values), FORMAT)}'
