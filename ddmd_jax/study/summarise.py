"""``python -m ddmd_jax.study.summarise DIR DIR ...``: mean and spread of ``eval.json`` over runs.

Prints a Markdown table, one row a sampler, ``mean ± standard deviation`` over the runs.
"""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from ddmd_jax import config as config_lib
from ddmd_jax.evaluation import tables
from ddmd_jax.util import commands, places, run_files, shape, text
from ddmd_jax.util.errors import UserError

HOW = ('log.', 'checkpoint.', 'mesh.', 'eval.batch', 'resume', 'train.steps')  # not what is judged


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """What a run has judged: rows of figures, and under which conditions."""

    workdir: str
    rows: list[dict[str, Any]]
    conditions: dict[str, Any]  # whatever makes figures of two runs unlike: all but the seed
    weights: str | None = None  # identity of the student


def load(workdir: str) -> Evaluated:
    """One run's; exits with one line if it cannot be read."""
    folder = places.of(workdir)
    path = folder / 'eval.json'
    try:
        found = run_files.read(folder, 'eval.json')
        rows = [{'name': row['name'], **row} for row in found['rows']]
        drawn = {f'{row["name"]}.{name}': row[name] for row in rows for name in tables.SETTINGS}
        conditions = {name: value for name, value in config_lib.dotted(found['config']).items()
                      if name != 'seed' and not name.startswith(HOW)}
        return Evaluated(workdir, rows, conditions | drawn | {'step': found['step']},
                         found.get('weights'))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f'{path} is not the result of a finished run ({type(e).__name__}); run '
                        'main with that --workdir to its end') from e


def check_alike(runs: Sequence[Evaluated]) -> None:
    """Raises `UserError`, naming what differs or does not, unless the runs may be averaged."""
    first = runs[0]
    seen: dict[Any, str] = {}
    for run in runs:
        whose = run.weights or places.of(run.workdir)
        if whose in seen:
            raise UserError(f'{seen[whose]} and {run.workdir} are of one student (weights '
                            f'{run.weights}), and have no spread; name each run once')
        seen[whose] = run.workdir
    for other in runs[1:]:
        names = sorted({*first.conditions, *other.conditions})
        unlike = [f'{n}: {first.conditions.get(n)!r} and {other.conditions.get(n)!r}'
                  for n in names if first.conditions.get(n) != other.conditions.get(n)]
        if unlike:
            raise UserError(f'{first.workdir} and {other.workdir} differ in more than their seed, '
                            f'and a mean over them says nothing: {"; ".join(unlike[:8])}')


def over_runs(runs: Sequence[Sequence[tables.Row]]) -> str:
    """Rows of several runs as Markdown, ``mean ± standard deviation`` over the runs.

    Rows and figures are those of the first run.

    Raises:
      KeyError: another run lacks one of them.
      UserError: one is no number in some of them.
    """
    named = [{row['name']: row for row in rows} for rows in runs]
    figures = [name for name in runs[0][0] if name not in ('name', *tables.SETTINGS)]
    cells = []
    for first in runs[0]:
        counts = [first[name] if first[name] is not None else '' for name in tables.SETTINGS[:2]]
        mine = [run[first['name']] for run in named]
        spreads = [_spread(f'{name} of {first["name"]}', [row[name] for row in mine])
                   for name in figures]
        cells.append([first['name'].replace('_', ' '), *counts, *spreads])
    heads = ['', *tables.SETTINGS[:2], *(name.replace('_', ' ') for name in figures)]
    return text.markdown(heads, cells)


def _spread(what: str, values: Sequence[Any]) -> str:
    """The spread is left out for a single run; '' where no run has that figure."""
    if all(value is None for value in values):
        return ''
    if wrong := [value for value in values if shape.finite(value)]:
        raise UserError(f'{what} is {wrong[0]!r:.40} in one of the runs, no figure to take a mean '
                        'of')
    shown = [statistics.mean(values), *([statistics.stdev(values)] if len(values) > 1 else [])]
    return ' ± '.join(format(value, tables.FORMAT) for value in shown)


def main(workdirs: list[str]) -> None:
    if not workdirs:
        raise UserError('name at least one workdir of a finished run')
    runs = [load(workdir) for workdir in workdirs]
    check_alike(runs)
    try:
        print(over_runs([run.rows for run in runs]))
    except KeyError as e:
        raise UserError(f'one of the runs has no {e}; all must be of one suite') from e


if __name__ == '__main__':
    commands.run('summarise', main, lambda: None)
