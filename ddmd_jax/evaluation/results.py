"""The folder of an evaluation: what is written into it, and what is read back and compared.

``eval.json`` has the rows of the table, ``scores.parquet`` a row an image, ``table.md`` and
``table.html`` the table; ``images/SUITE/ROW`` the images. None of them depends on batch, devices
or time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddmd_jax.diffusion.drawing import ImageName
from ddmd_jax.evaluation import kept, statistics, tables
from ddmd_jax.evaluation.kept import ImagesError, Kept
from ddmd_jax.evaluation.suites import Suite
from ddmd_jax.util import errors, files, places, shape, text
from ddmd_jax.util.errors import UserError

RESULT, SCORES, MARKDOWN, PAGE = 'eval.json', 'scores.parquet', 'table.md', 'table.html'
NAMES = ('suite', 'row', 'group', 'prompt', 'weights', 'number', 'seed')  # no figures


def _word(value: Any) -> str:
    return '' if isinstance(value, str) and value and value.isprintable() else 'no name'


def _figure(value: Any) -> str:
    gap = value is None or isinstance(value, float) and math.isnan(value)
    return '' if gap else shape.finite(value)


LIKE = {  # columns of `SCORES`; what is not named is a figure
    'suite': [_word], 'row': [_word], 'group': [str], 'prompt': [str],
    'weights?': [(str, type(None))], 'number': [int], 'seed': [int], str: [_figure]}


class ResultsError(UserError):
    """A folder without an evaluation, or evaluations that cannot be compared."""


@dataclasses.dataclass
class Part:
    """A suite of an evaluation.

    Attributes:
      suite: which.
      rows: of its table.
      each: figures of each image by row: ``{row: {name: [n]}}``.
      named, groups: the images.
      notes: what is missing, a line each.
      metrics: what a published suite was asked to be measured by, beside its own columns.
    """

    suite: Suite
    rows: list[dict[str, Any]]
    each: Mapping[str, Mapping[str, np.ndarray]]
    named: Sequence[ImageName]
    groups: Sequence[str]
    notes: list[str]
    metrics: Sequence[str] = ()


def write(folder: Path, parts: Sequence[Part], about: Mapping[str, Any]) -> str:
    """Writes all files of an evaluation, each whole or not at all; its table for the terminal."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{**row, 'suite': part.suite.name} for part in parts for row in part.rows]
    lines: dict[str, list[Any]] = {name: [] for name in NAMES}
    figures = list(dict.fromkeys(name for part in parts for found in part.each.values()
                                 for name in found))
    lines |= {name: [] for name in figures}
    weights = {(row['suite'], row['name']): row.get('weights') for row in rows}
    for part in parts:
        for row in part.each:
            found, n = part.each[row], len(part.named)
            lines['suite'] += [part.suite.name] * n
            lines['row'] += [row] * n
            lines['group'] += part.groups
            lines['weights'] += [weights.get((part.suite.name, row))] * n
            for name in ('prompt', 'number', 'seed'):
                lines[name] += [getattr(one, name) for one in part.named]
            for name in figures:
                x = found.get(name)
                lines[name] += [None] * n if x is None else [
                    None if np.isnan(v) else v for v in np.asarray(x, np.float64).tolist()]
    out = io.BytesIO()
    schema = [(name, pa.string()) for name in NAMES[:5]] + [
        (name, pa.int64()) for name in NAMES[5:]] + [(name, pa.float64()) for name in figures]
    pq.write_table(pa.table(lines, schema=pa.schema(schema)), out)
    files.write_json(folder / RESULT, {
        'rows': rows, 'missing': [note for part in parts for note in part.notes], **about,
        'scores': _digest(out.getvalue())})
    files.write(folder / SCORES, out.getvalue())
    shown = [(part.suite.name, [*part.rows, *_paper(part.suite)], _columns(part), part.notes)
             for part in parts]
    files.write(folder / MARKDOWN, '\n\n'.join(
        '\n'.join([f'## {name}', '', tables.markdown(of, columns),
                   *(f'\n{note}' for note in notes)])
        for name, of, columns, notes in shown) + '\n')
    files.write(folder / PAGE, tables.page('Evaluation', shown))
    return '\n\n'.join('\n'.join([tables.terminal(of, columns), *notes])
                       for _, of, columns, notes in shown)


def _paper(suite: Suite) -> list[dict[str, Any]]:
    return [{'name': name, **figures} for name, figures in suite.paper.items()]


def _columns(part: Part) -> dict[str, str]:
    """The suite's columns, and those of metrics that were asked for beside, also where they are
    gaps; and how many images there are, where some are missing."""
    own = part.suite.columns
    if any(row.get('images', len(part.named)) < len(part.named) for row in part.rows):
        own = {'images': 'd', **own}
    more = [*part.metrics, *(name for row in part.rows for name, value in row.items()
                             if '/' not in name and isinstance(value, float)
                             and name not in tables.SETTINGS)] if part.suite.read else []
    return {**own, **dict.fromkeys((name for name in more if name not in own), '.4g')}


# --- Read back ---


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluated:
    """A row of an evaluation that was written before.

    Attributes:
      folder, row: where; `title` names it beside others.
      suite: its suite's name.
      named, groups: its images.
      scores: figures of each ``[n]`` by name; NaN where an image has none.
      weights: the identity of those that drew them; None where that is not known.
    """

    folder: Path
    row: str
    suite: str
    named: Sequence[ImageName]
    groups: Sequence[str]
    scores: Mapping[str, np.ndarray]
    weights: str | None = None

    @property
    def title(self) -> str:
        return f'{self.folder.name}:{self.row}'

    def images(self) -> Kept:
        """Raises `ImagesError`, also if they are of other weights than the figures."""
        found = kept.opened(self.folder / 'images' / self.suite / self.row, self.named)
        of = found.about.get('weights')
        if self.weights is not None and of != self.weights:
            raise ImagesError(f'{found.folder} holds images of weights {of}, {SCORES} has figures '
                              f'of {self.weights}; {kept.AGAIN}')
        return found


def read(place: str, suite: str = '') -> Evaluated:
    """The row of an evaluation that ``DIR`` or ``DIR:ROW`` names.

    Without ROW it is 'student', or the only one; `suite` may be left out likewise.

    Raises:
      ResultsError: no evaluation there, a damaged one, or it is not clear which row is meant.
    """
    folder, colon, row = place.rpartition(':')
    if not colon or places.of(place, places.LOCAL).is_dir():
        folder, row = place, ''
    where = Path(places.of(folder, places.LOCAL))
    table = _scores(where)
    found = sorted(set(zip(table['suite'], table['row'])))
    rows = [one for one in found if suite in ('', one[0]) and row in ('', one[1])
            and (row or one[1] != 'real')]
    if len(rows) > 1 and not row:
        rows = [one for one in rows if one[1] == 'student'] or rows
    if len(rows) != 1:
        known = ', '.join(f'{a}: {b}' for a, b in found)
        raise ResultsError(f'{place} names {len(rows)} rows of an evaluation; say which with '
                           f'DIR:ROW and --suite (there are {known})')
    mine = [i for i, one in enumerate(zip(table['suite'], table['row'])) if one == rows[0]]
    at = lambda name: [table[name][i] for i in mine]
    named = [ImageName(*one) for one in zip(at('seed'), at('prompt'), at('number'))]
    scores = {name: np.asarray(at(name), np.float64) for name in table if name not in NAMES}
    return Evaluated(where, rows[0][1], rows[0][0], named, at('group'), {
        name: x for name, x in scores.items() if not np.isnan(x).all()},
        at('weights')[0] if 'weights' in table else None)


def _scores(folder: Path) -> dict[str, list[Any]]:
    """The columns of the `SCORES` that its `RESULT` speaks of; raises `ResultsError`."""
    import pyarrow.parquet as pq

    about = _checked(folder / RESULT, lambda raw: shape.load(raw, {'scores?': str})) or {}

    def parse(raw: bytes) -> dict[str, list[Any]]:
        if about.get('scores', _digest(raw)) != _digest(raw):
            raise ValueError(f'it is not what {RESULT} speaks of')
        opened = pq.ParquetFile(io.BytesIO(raw))
        names, columns = opened.schema_arrow.names, opened.read().to_pydict()
        if twice := next((name for name in names if names.count(name) > 1), ''):
            raise ValueError(f'two columns are called {twice!r}')
        if fault := shape.fault(columns, LIKE):
            raise ValueError(fault)
        return columns

    table = _checked(folder / SCORES, parse)
    if table is None:
        raise ResultsError(f'{folder} holds no evaluation: there is no {SCORES}')
    return table


def _checked(path: Path, parse: Callable[[bytes], Any]) -> Any:
    """A file as `parse` reads it, None if it is not there; raises `ResultsError`."""
    import pyarrow as pa

    try:
        return parse(files.patiently(path.read_bytes))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, ArithmeticError, pa.ArrowException) as e:
        errors.raise_environment(e, path)
        raise ResultsError(f'{path} is damaged ({text.first_line(e)}); run its `evaluate` '
                           'again') from e


def _digest(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()[:16]


def check_alike(found: Sequence[Evaluated]) -> None:
    """Raises `ResultsError` unless all are of the same prompts, in one order, and seeds."""
    for one in found[1:]:
        if (one.suite, one.named) != (found[0].suite, found[0].named):
            raise ResultsError(
                f'{found[0].title} and {one.title} are not of the same prompts and seeds '
                f'({found[0].suite}, {len(found[0].named)} images; {one.suite}, '
                f'{len(one.named)}); evaluate both with the same --suite and --seed')


def titles(rows: Sequence[Evaluated]) -> list[str]:
    """Names of rows side by side, no two alike: where folders' names are, with what is above them.

    Of one row named twice they are alike.
    """
    names = [one.title for one in rows]
    if len(set(names)) == len(names):
        return names
    folders = [one.folder.resolve() for one in rows]
    above = os.path.commonpath([folder.parent for folder in folders])
    return [f'{folder.relative_to(above)}:{one.row}' for folder, one in zip(folders, rows)]


def compare(first: Evaluated, second: Evaluated) -> list[dict[str, Any]]:
    """Every figure that both have, paired by prompt: difference, interval, p-value, wins.

    An image that has no figure in one of them counts in neither.

    Raises:
      ResultsError: other prompts or seeds, or no figure in common.
    """
    check_alike([first, second])
    rows = []
    for name in first.scores:
        if name not in second.scores:
            continue
        a, b = first.scores[name], second.scores[name]
        both = ~(np.isnan(a) | np.isnan(b))
        if not both.any():
            continue
        prompts = [f'{first.groups[i]}\n{first.named[i].prompt}'
                   for i in np.flatnonzero(both).tolist()]
        of = [list(statistics.by_prompt(x[both].tolist(), prompts).values()) for x in (a, b)]
        paired = statistics.paired(of[0], of[1])
        difference = paired.difference
        rows.append({'figure': name, 'first': float(np.mean(of[0])), 'second': float(
            np.mean(of[1])), 'difference': difference.mean, 'low': difference.low,
            'high': difference.high, 'p_value': paired.p_value, 'wins': paired.wins,
            'prompts': difference.count})
    if not rows:
        raise ResultsError(f'{first.title} and {second.title} have no figure of images in common')
    return rows


def comparison(first: Evaluated, second: Evaluated, rows: Sequence[Mapping[str, Any]],
               ) -> tuple[list[str], list[list[str]]]:
    """(heads, cells) of `compare`'s rows."""
    heads = [' less '.join(titles([first, second])), 'first', 'second', 'difference', '95 %',
             'p', 'wins', 'prompts']
    show = lambda x: f'{x:.4g}'
    return heads, [[row['figure'], show(row['first']), show(row['second']),
                    f'{row["difference"]:+.4g}',
                    f'{row["low"]:+.4g} .. {row["high"]:+.4g}', f'{row["p_value"]:.2g}',
                    f'{row["wins"]:.1%}', str(row['prompts'])] for row in rows]


def terminal_comparison(heads: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    return text.aligned([heads, *cells], numbers=len(heads) - 1)
