"""``evaluate --compare``, ``--blind`` and ``--grid``: rows of evaluations, side by side."""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from ddmd_jax.evaluation import blind, pictures, results, sheets
from ddmd_jax.evaluation.results import Evaluated
from ddmd_jax.util import commands, files, places
from ddmd_jax.util.errors import UserError

FLAGS = flags.FLAGS


def show(mode: str, named: Sequence[str]) -> None:
    """Shows the rows that are `named`, as DIR or DIR:ROW, as `mode` says; raises `UserError`."""
    act, least, most = {'compare': (_compare, 2, 2), 'blind': (_blind, 2, 3),
                        'grid': (_grid, 1, 8)}[mode]
    if not least <= len(named) <= most:
        count = f'{least}' if least == most else f'{least} to {most}'
        raise UserError(f'--{mode} takes {count} folders of evaluations (DIR or DIR:ROW), '
                        f'{len(named)} are given')
    act([results.read(place, FLAGS.suite[0] if FLAGS.suite else '') for place in named])


def _compare(rows: Sequence[Evaluated]) -> None:
    """Prints the paired comparison of two rows; with --out, also writes it as JSON."""
    first, second = rows
    found = results.compare(first, second)
    print(results.terminal_comparison(*results.comparison(first, second, found)))
    if FLAGS.out:
        files.write_json(_out(), {
            **dict(zip(('first', 'second'), results.titles(rows))), 'rows': found})


def _blind(rows: Sequence[Evaluated]) -> None:
    """Writes the page on which two or three rows are ranked."""
    commands.need(out='name the page, as --out=blind.html')
    print(blind.write(_out(), rows, FLAGS.prompts_shown, FLAGS.seed))


def _grid(rows: Sequence[Evaluated]) -> None:
    """Writes a sheet of rows."""
    commands.need(out='name the sheet, as --out=sheet.png')
    if FLAGS.best and FLAGS.worst:
        raise UserError('--best and --worst are two sheets; give one')
    if Path(FLAGS.out).suffix.lower() not in pictures.SUFFIXES:
        raise UserError(f'--out {FLAGS.out}: a sheet ends in .png or .webp')
    out = _out()
    shown = sheets.chosen(rows[0], FLAGS.prompts_shown or sheets.PROMPTS, FLAGS.best, FLAGS.worst)
    if len(shown) > pictures.ROWS:
        raise UserError(f'a sheet has at most {pictures.ROWS} rows, not {len(shown)}; give '
                        f'--prompts_shown={pictures.ROWS}')
    sheets.write(out, rows, shown, FLAGS.best or FLAGS.worst, FLAGS.seeds)
    print(out)


def _out() -> Path:
    """The file of --out, its folder made."""
    out = Path(places.of(FLAGS.out, places.LOCAL))
    commands.folder('--out', out.parent)
    return out
