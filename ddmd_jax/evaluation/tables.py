"""Rows of figures as a table: in the terminal, in Markdown, as a page."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from ddmd_jax.util import text

SETTINGS = ('steps', 'evaluations', 'guidance')  # of a row's sampler; its other values are figures
FORMAT = '.3f'  # of a figure, unless a suite says otherwise
GAP = '-'  # what a row does not have

Row = Mapping[str, Any]

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>
<link rel="icon" href="data:,">
<style>
:root {{ color-scheme: light dark; --fg: #1c1e21; --bg: #fff; --line: #dde; --soft: #667; }}
@media (prefers-color-scheme: dark) {{ :root {{ --fg: #e4e6ea; --bg: #16181c; --line: #333940;
  --soft: #9aa; }} }}
body {{ font: 15px/1.5 system-ui, sans-serif; color: var(--fg); background: var(--bg);
  max-width: 76rem; margin: 0 auto; padding: 1rem; }}
h1 {{ font-size: 1.4rem; }} h2 {{ font-size: 1.15rem; margin-top: 2rem; }}
.scroll {{ overflow-x: auto; }} table {{ border-collapse: collapse; font-size: .9rem; }}
th, td {{ padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right;
  font-variant-numeric: tabular-nums; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; }} tr.paper td {{ color: var(--soft); }}
p {{ color: var(--soft); }}
</style></head><body><h1>{title}</h1>
{body}
</body></html>
"""


def terminal(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    """Rows of one run as aligned text; `columns` are the formats of a suite's figures."""
    found = cells(rows, columns)
    return text.aligned(found, numbers=len(found[0]) - 1)


def markdown(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    """The same as a Markdown table."""
    head, *found = cells(rows, columns)
    return text.markdown(head, found)


def page(title: str, parts: Sequence[tuple[str, Sequence[Row], Mapping[str, str], Sequence[str]]],
         ) -> str:
    """A page of tables, each ``(heading, rows, columns, notes)``; it needs nothing beside it."""
    body = []
    for heading, rows, columns, notes in parts:
        head, *found = cells(rows, columns)
        line = lambda tag, values, kind='': f'<tr{kind}>' + ''.join(
            f'<{tag}>{html.escape(value)}</{tag}>' for value in values) + '</tr>'
        lines = [line('td', values, ' class="paper"' * values[0].startswith('paper:'))
                 for values in found]
        body.append(f'<h2>{html.escape(heading)}</h2><div class="scroll" tabindex="0" role="region"'
                    f' aria-label="{html.escape(heading)}"><table><thead>{line("th", head)}'
                    f'</thead><tbody>{"".join(lines)}</tbody></table></div>'
                    + ''.join(f'<p>{html.escape(note)}</p>' for note in notes))
    return PAGE.format(title=html.escape(title), body='\n'.join(body))


def cells(rows: Sequence[Row], columns: Mapping[str, str]) -> list[list[str]]:
    """The head, then a line a row. A row that has intervals shows the half of one's width."""
    heads = ['', *(name.replace('_', ' ') for name in (*SETTINGS, *columns))]
    return [heads, *([str(row['name']), *(show(row.get(name)) for name in SETTINGS),
                      *(_figure(row, name, form) for name, form in columns.items())]
                     for row in rows)]


def _figure(row: Row, name: str, form: str) -> str:
    shown, bounds = show(row.get(name), form), row.get('intervals', {}).get(name)
    if bounds is None or shown == GAP:
        return shown
    return f'{shown} \u00b1{format((bounds[1] - bounds[0]) / 2, form)}'


def show(value: Any, form: str = FORMAT) -> str:
    """One value; '-' where a row has none."""
    return GAP if value is None else format(value, form) if isinstance(value, float) else str(value)
