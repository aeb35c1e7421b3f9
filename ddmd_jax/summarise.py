"""``python -m ddmd_jax.summarise DIR DIR ...``: mean and spread of several runs' ``eval.json``.

Prints a Markdown table, one row a sampler, ``mean ± standard deviation`` over the runs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from absl import app

from ddmd_jax.evaluation import tables
from ddmd_jax.util import arguments


def load(workdir: str) -> list[dict[str, Any]]:
    """Rows of one run; exits with one line if they cannot be read."""
    path = Path(workdir) / 'eval.json'
    try:
        return [{'name': row['name'], **row} for row in json.loads(path.read_text())['rows']]
    except (OSError, ValueError, KeyError, TypeError) as e:
        sys.exit(f'summarise: {path} is not the result of a finished run ({type(e).__name__}); '
                 'run main with that --workdir to its end')


def main(argv: list[str]) -> None:
    if len(argv) < 2:
        sys.exit('summarise: name at least one workdir of a finished run')
    try:
        print(tables.over_runs([load(workdir) for workdir in argv[1:]]))
    except KeyError as e:
        sys.exit(f'summarise: one of the runs has no {e}; all must be of one suite')


if __name__ == '__main__':
    app.run(main, flags_parser=arguments.parser('summarise'))
