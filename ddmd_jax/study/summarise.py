"""``python -m ddmd_jax.study.summarise DIR DIR ...``: mean and spread of ``eval.json`` over runs.

Prints a Markdown table, one row a sampler, ``mean ± standard deviation`` over the runs.
"""

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app

from ddmd_jax.evaluation import tables
from ddmd_jax.util import commands, text


def load(workdir: str) -> list[dict[str, Any]]:
    """Rows of one run; exits with one line if they cannot be read."""
    path = Path(workdir) / 'eval.json'
    try:
        return [{'name': row['name'], **row} for row in json.loads(path.read_text())['rows']]
    except (OSError, ValueError, KeyError, TypeError) as e:
        sys.exit(f'summarise: {path} is not the result of a finished run ({type(e).__name__}); '
                 'run main with that --workdir to its end')


def over_runs(runs: Sequence[Sequence[tables.Row]]) -> str:
    """Rows of several runs as Markdown, ``mean ± standard deviation`` over the runs.

    Rows and figures are those of the first run.

    Raises:
      KeyError: another run lacks one of them.
    """
    named = [{row['name']: row for row in rows} for rows in runs]
    figures = [name for name in runs[0][0] if name not in ('name', *tables.SETTINGS)]
    cells = []
    for first in runs[0]:
        counts = [first[name] if first[name] is not None else '' for name in tables.SETTINGS[:2]]
        spreads = [_spread([run[first['name']][name] for run in named]) for name in figures]
        cells.append([first['name'].replace('_', ' '), *counts, *spreads])
    heads = ['', *tables.SETTINGS[:2], *(name.replace('_', ' ') for name in figures)]
    return text.markdown(heads, cells)


def _spread(values: Sequence[float]) -> str:
    """The spread is left out for a single run."""
    shown = [statistics.mean(values), *([statistics.stdev(values)] if len(values) > 1 else [])]
    return ' ± '.join(format(value, tables.FORMAT) for value in shown)


def main(argv: list[str]) -> None:
    if len(argv) < 2:
        sys.exit('summarise: name at least one workdir of a finished run')
    try:
        print(over_runs([load(workdir) for workdir in argv[1:]]))
    except KeyError as e:
        sys.exit(f'summarise: one of the runs has no {e}; all must be of one suite')


if __name__ == '__main__':
    app.run(main, flags_parser=commands.parser('summarise'))
