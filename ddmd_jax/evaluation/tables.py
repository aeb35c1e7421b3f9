"""The rows of ``eval.json`` as a table."""

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
