"""Errors, tables, sizes and durations as text."""

from collections.abc import Sequence
from typing import Any

UNITS = (('d', 86400), ('h', 3600), ('min', 60), ('s', 1))


def first_line(error: BaseException) -> str:
    """The first line of an error's message that has words, or its type's name if none has."""
    return next((x.strip() for x in str(error).splitlines() if x.strip(' *')), type(error).__name__)


def aligned(rows: Sequence[Sequence[str]], numbers: int) -> str:
    """A table for the terminal: columns two spaces apart, the last `numbers` aligned right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    left = len(widths) - numbers
    pad = lambda i, cell: cell.ljust(widths[i]) if i < left else cell.rjust(widths[i])
    return '\n'.join('  '.join(pad(i, c) for i, c in enumerate(row)).rstrip() for row in rows)


def markdown(heads: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; a `|` in a cell is escaped."""
    line = lambda cells: '| ' + ' | '.join(str(c).replace('|', '\\|') for c in cells) + ' |'
    return '\n'.join([line(heads), '|---' * len(heads) + '|', *map(line, rows)])


def in_units(size: int) -> str:
    """Bytes as B, KiB, MiB or GiB."""
    power = min(max(size.bit_length() - 1, 0) // 10, 3)
    return f'{size} B' if power == 0 else f'{size / 1024**power:.2f} {"KMG"[power - 1]}iB'


def duration(seconds: float) -> str:
    """Seconds in their two largest units: ``3 d 4 h``, ``5 min 6 s``, ``7 s``."""
    rest = round(max(seconds, 0))
    first = next((i for i, (_, length) in enumerate(UNITS) if rest >= length), len(UNITS) - 1)
    parts = []
    for unit, length in UNITS[first:first + 2]:
        count, rest = divmod(rest, length)
        parts.append(f'{count} {unit}')
    return ' '.join(parts)
