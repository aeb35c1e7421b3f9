"""The page: ``report.html``, which needs nothing beside it."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ddmd_jax.report import figures
from ddmd_jax.report.read import RunFiles, read
from ddmd_jax.util import files
from ddmd_jax.util.text import duration

NAME = 'report.html'
WIDE, STRIPS, ROWS = 1100, 12, 100  # pixels of a picture; pictures of a strip; lines of a table
HEAVY = 1_500_000  # bytes of a strip
_TEMPLATES = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True,
                                loader=jinja2.FileSystemLoader(Path(__file__).parent))


def write(folder: Path) -> Path:
    """Writes the report of the run in `folder` beside its other files; returns it.

    Raises:
      ReportError: see `read`.
      OSError: it cannot be written.
    """
    path = folder / NAME
    save(path, [read(folder)])
    return path


def save(path: Path, runs: Sequence[RunFiles]) -> None:
    """A page of one run, or of several side by side, through a temporary file and a rename."""
    files.write(path, render(runs))


def render(runs: Sequence[RunFiles]) -> str:
    """The page as text."""
    from plotly.offline import get_plotlyjs

    drawn = {'verdicts': figures.verdicts(runs),
             'curves': figures.curves(runs) if any(run.lines for run in runs) else None}
    return _TEMPLATES.get_template('report.html.jinja').render(
        runs=runs, plotly=Markup(get_plotlyjs()), figures={k: v for k, v in drawn.items() if v},
        data=Markup(json.dumps({k: json.loads(v.to_json()) for k, v in drawn.items() if v})
                    .replace('</', '<\\/')),
        strips=[strips(run) for run in runs], tables=[evaluation(run) for run in runs],
        changed=differences(runs), facts=[facts(run) for run in runs],
        lines=thinned(runs[0].lines, ROWS) if len(runs) == 1 else [],
        columns=[c.key for c in figures.present(runs)], show=show)


def show(value: Any) -> str:
    """A cell."""
    if value is None:
        return ''
    return f'{value:.4g}' if isinstance(value, float) else str(value)


def thinned(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of them, evenly spread, first and last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def strips(run: RunFiles) -> dict[str, list[tuple[int, str]]]:
    """``{name: [(step, picture as data)]}``."""
    files = {name: thinned(found, STRIPS) for name, found in run.pictures.items()}
    last = run.folder / 'samples.png'
    if last.is_file():
        files['samples at the end'] = [(run.step, last)]
    found = {name: [(step, data) for step, file in some if (data := data_url(file))]
             for name, some in files.items()}
    return {name: lighter(strip) for name, strip in found.items() if strip}


def lighter(strip: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """Fewer pictures, first and last among them, if all are HEAVY."""
    size = sum(len(data) for _, data in strip)
    return thinned(strip, max(2, len(strip) * HEAVY // size)) if size > HEAVY else strip


def data_url(file: Path) -> str:
    """A picture as WebP, no wider than WIDE; '' if it cannot be read."""
    from PIL import Image

    out = io.BytesIO()
    try:
        with Image.open(file) as image:
            image = image.convert('RGB')
            if image.width > WIDE:
                image = image.resize((WIDE, round(image.height * WIDE / image.width)))
            image.save(out, 'WEBP', quality=88)
    except OSError:
        return ''
    return 'data:image/webp;base64,' + base64.b64encode(out.getvalue()).decode()


def evaluation(run: RunFiles) -> dict[str, Any] | None:
    """Heads and rows of ``eval.json``."""
    if not run.evaluation:
        return None
    heads = [name for name in run.evaluation['rows'][0] if name != 'name']
    return {'heads': heads, 'rows': [[row['name'], *(row[h] for h in heads)]
                                     for row in run.evaluation['rows']]}


def differences(runs: Sequence[RunFiles]) -> dict[str, Any]:
    """Fields of the config: those that one run changed, or in which two of them differ."""
    flats = [flat(run.config) for run in runs]
    names = sorted({name for one in flats for name in one})
    base = {name: was for run in runs for name, (was, _) in run.about.get('changed', {}).items()}
    rows = [(name, base.get(name), [one.get(name) for one in flats]) for name in names]
    changed = [row for row in rows if row[0] in base or len({str(v) for v in row[2]}) > 1]
    return {'changed': changed, 'all': rows}


def flat(config: Mapping[str, Any], above: str = '') -> dict[str, Any]:
    """``{'a.b': value}``; sequences stay whole."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            found |= flat(value, f'{above}{name}.')
        else:
            found[above + name] = value
    return found


def facts(run: RunFiles) -> list[tuple[str, str]]:
    """Environment and cost of the run."""
    about, pace, seconds = run.about, run.seconds_per_step, run.seconds
    devices = about.get('devices', {})
    found = [('command', about.get('command', '')), ('config', about.get('config_file', '')),
             ('devices', f'{devices.get("count", "?")} x {devices.get("kind", "?")}, '
                         f'{devices.get("processes", "?")} processes' if devices else ''),
             ('versions', ', '.join(f'{k} {v}' for k, v in about.get('versions', {}).items())),
             ('seconds a step', show(pace) if pace else ''),
             ('time', duration(seconds) if seconds else '')]
    if seconds and devices:
        found.append(('chip-hours', show(seconds * devices['count'] / 3600)))
    if run.evaluation and 'seconds' in run.evaluation:
        waited = run.evaluation['seconds']['input_wait']
        found.append(('waited for input', f'{show(waited)} s'))
    return [(name, text) for name, text in found if text]

