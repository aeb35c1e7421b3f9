"""The page: ``report.html``, which needs nothing beside it."""

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ddmd_jax.report import figures
from ddmd_jax.report.read import RunFiles, read, thinned
from ddmd_jax.util import files
from ddmd_jax.util.places import Place
from ddmd_jax.util.text import duration

NAME = 'report.html'
WIDE, STRIPS, ROWS = 1100, 8, 100  # pixels of a picture; pictures of a strip; lines of a table
_TEMPLATES = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True,
                                loader=jinja2.FileSystemLoader(Path(__file__).parent))


def write(folder: Place) -> Place:
    """Writes the report of the run in `folder` beside its other files; returns it."""
    save(folder / NAME, [read(folder)])
    return folder / NAME


def save(path: Place, runs: Sequence[RunFiles]) -> None:
    """A page of one run, or of several side by side, through a temporary file and a rename."""
    files.write(path, render(runs))


def render(runs: Sequence[RunFiles]) -> str:
    """The page as text."""
    from plotly.offline import get_plotlyjs

    drawn = {'verdicts': figures.verdicts(runs),
             'curves': figures.curves(runs) if any(run.lines for run in runs) else None}
    drawn = {name: json.loads(figure.to_json()) for name, figure in drawn.items() if figure}
    return _TEMPLATES.get_template('report.html.jinja').render(
        runs=runs, plotly=Markup(get_plotlyjs()), figures=drawn,
        data=Markup(json.dumps(drawn).replace('<', '\\u003c')),
        strips=[strips(run) for run in runs], changed=differences(runs),
        facts=[facts(run) for run in runs],
        lines=thinned(runs[0].lines, ROWS) if len(runs) == 1 else [],
        columns=[c.key for c in figures.present(runs)], show=show, table=table)


def show(value: Any, spec: str = '.4g') -> str:
    """A cell; `spec` is how figures are formatted."""
    return '' if value is None else format(value, spec) if isinstance(value, float) else str(value)


def table(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """``{column: a cell for each row}``; a column's largest figure has four digits, all its others
    as many decimals."""
    found = {}
    for head in rows[0]:
        values = [row[head] for row in rows]
        figure = [v for v in values if isinstance(v, float) and math.isfinite(v)]
        spec = '.4g'
        if not all(v.is_integer() for v in figure):
            spec = f'.{max(0, 3 - math.floor(math.log10(max(map(abs, figure)))))}f'
        found[head] = [show(v, spec) for v in values]
    return found


def strips(run: RunFiles) -> dict[str, list[tuple[int, str]]]:
    """``{name: [(step, picture as data)]}``."""
    named = {name: thinned(found, STRIPS) for name, found in run.pictures.items()}
    if (last := run.folder / 'samples.png').is_file():
        named['samples at the end'] = [(run.step, last)]
    found = {name: [(step, data) for step, file in some if (data := data_url(file))]
             for name, some in named.items()}
    return {name: strip for name, strip in found.items() if strip}


def data_url(file: Place) -> str:
    """A picture as WebP, no wider than WIDE; '' if it cannot be read."""
    from PIL import Image

    out = io.BytesIO()
    try:
        with Image.open(io.BytesIO(file.read_bytes())) as image:
            image = image.convert('RGB')
            image.thumbnail((WIDE, image.height))
            image.save(out, 'WEBP', quality=88)
    except OSError:
        return ''
    return 'data:image/webp;base64,' + base64.b64encode(out.getvalue()).decode()


def differences(runs: Sequence[RunFiles]) -> dict[str, Any]:
    """Fields of the config: those that one run changed, or in which two of them differ."""
    flats = [flat(run.config) for run in runs]
    base = {name: was for run in runs for name, (was, _) in run.about.get('changed', {}).items()}
    rows = [(name, base.get(name), [one.get(name) for one in flats])
            for name in sorted({name for one in flats for name in one})]
    changed = [row for row in rows if row[0] in base or len({str(v) for v in row[2]}) > 1]
    return {'changed': changed, 'all': rows}


def flat(config: Mapping[str, Any], above: str = '') -> dict[str, Any]:
    """``{'a.b': value}``; sequences stay whole."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        found |= (flat(value, f'{above}{name}.') if isinstance(value, Mapping) else
                  {above + name: value})
    return found


def facts(run: RunFiles) -> list[tuple[str, str]]:
    """Environment and cost of the run."""
    about, pace, seconds = run.about, run.seconds_per_step, run.seconds
    found = [('command', about.get('command', '')), ('config', about.get('config_file', '')),
             ('versions', ', '.join(f'{k} {v}' for k, v in about.get('versions', {}).items())),
             ('seconds a step', show(pace)), ('time', duration(seconds) if seconds else '')]
    if devices := about.get('devices'):
        found.append(('devices', f'{devices["count"]} x {devices["kind"]}, '
                      f'{devices["processes"]} process{"es" * (devices["processes"] != 1)}'))
        found.append(('chip-hours', show(seconds and seconds * devices['count'] / 3600)))
    if run.evaluation and 'seconds' in run.evaluation:
        found.append(('waited for input', f'{show(run.evaluation["seconds"].get("input_wait"))} s'))
    return [(name, text) for name, text in found if text]
