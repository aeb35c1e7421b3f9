"""Executes examples/emoji_run.py as docs/emoji_run.ipynb: ``python docs/make_notebook.py``.

Needs nbformat, nbclient and ipykernel, which nothing else here does.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE, NOTEBOOK = ROOT / 'examples' / 'emoji_run.py', ROOT / 'docs' / 'emoji_run.ipynb'


def cells(text: str) -> list[tuple[str, str]]:
    """(kind, source) of each cell of a script with ``# %%`` between them."""
    parts = re.split(r'^# %%(.*)\n', text, flags=re.MULTILINE)[1:]
    found = []
    for head, body in zip(parts[::2], parts[1::2]):
        body = body.strip()
        if 'markdown' in head:
            found.append(('markdown', re.sub(r'^# ?', '', body, flags=re.MULTILINE)))
        else:
            found.append(('code', body))
    return found


def main() -> None:
    """Writes the notebook with its outputs."""
    import nbformat
    from nbclient import NotebookClient

    make = {'markdown': nbformat.v4.new_markdown_cell, 'code': nbformat.v4.new_code_cell}
    notebook = nbformat.v4.new_notebook(
        cells=[make[kind](source) for kind, source in cells(SOURCE.read_text())],
        metadata={'kernelspec': {'name': 'python3', 'display_name': 'Python 3',
                                 'language': 'python'}})
    NotebookClient(notebook, timeout=1800, resources={'metadata': {'path': ROOT}}).execute()
    for i, cell in enumerate(notebook.cells):
        cell['id'] = f'cell{i}'
        if 'outputs' in cell:  # without the thousand states of a progress bar
            cell['outputs'] = [o for o in cell['outputs'] if o.get('name') != 'stderr']
        cell.get('metadata', {}).pop('execution', None)
    nbformat.write(notebook, NOTEBOOK)


if __name__ == '__main__':
    main()
