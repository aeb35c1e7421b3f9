"""``python -m ddmd_jax.summarise DIR DIR ...``: mean and spread of several runs' ``eval.json``.

Prints a Markdown table, one row a sampler, ``mean ± standard deviation`` over the runs.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from absl import app

from ddmd_jax.util import arguments, text

COLUMNS = {'glyph_match': 3, 'glyph_match_held_out': 3, 'background_match': 3, 'frechet': 2,
           'colour_error': 2, 'variance': 3}


def load(workdir: str) -> dict[str, dict[str, Any]]:
    """Rows of one run by name; exits with one line if they cannot be read."""
    path = Path(workdir) / 'eval.json'
    try:
        return {row['name']: row for row in json.loads(path.read_text())['rows']}
    except (OSError, ValueError, KeyError, TypeError) as e:
        sys.exit(f'summarise: {path} is not the result of a finished run ({type(e).__name__}); '
                 'run main with that --workdir to its end')


def cell(values: list[float], digits: int) -> str:
    """``mean ± std``; the spread is left out for a single run."""
    mean = f'{statistics.mean(values):.{digits}f}'
    return mean if len(values) == 1 else f'{mean} ± {statistics.stdev(values):.{digits}f}'


def table(runs: list[dict[str, dict[str, Any]]]) -> str:
    """Markdown table over `runs`, in the row order of the first."""
    heads = ['', 'steps', 'evaluations', *(c.replace('_', ' ') for c in COLUMNS)]
    rows = []
    for name, first in runs[0].items():
        cells = [cell([run[name][c] for run in runs], d) for c, d in COLUMNS.items()]
        counts = [str(first[c] if first[c] is not None else '') for c in ('steps', 'evaluations')]
        rows.append([name.replace('_', ' '), *counts, *cells])
    return text.markdown(heads, rows)


def main(argv: list[str]) -> None:
    if len(argv) < 2:
        sys.exit('summarise: name at least one workdir of a finished run')
    print(table([load(workdir) for workdir in argv[1:]]))


if __name__ == '__main__':
    app.run(main, flags_parser=arguments.parser('summarise'))
