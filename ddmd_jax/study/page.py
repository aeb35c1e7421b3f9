"""The common parts of a study's pages: a template, figures as data, badges."""

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

_TEMPLATES = jinja2.Environment(autoescape=True,
                                loader=jinja2.FileSystemLoader(Path(__file__).parent))


def render(name: str, **values: Any) -> str:
    """The page of the template ``NAME.html.jinja``; `title`, `head` and `how` are every page's."""
    return _TEMPLATES.get_template(f'{name}.html.jinja').render(**values)


def badge(kind: str, text: str) -> Markup:
    """`kind` is one of holds, fails, open."""
    return Markup('<span class="v {}">{}</span>').format(kind, text)


def data_url(png: bytes) -> str:
    return 'data:image/png;base64,' + base64.b64encode(png).decode()


def subplots(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """matplotlib's, without a screen."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    return plt.subplots(*args, layout='constrained', **kwargs)


def png_of(figure: Any) -> bytes:
    """A figure as PNG; it is closed."""
    from matplotlib import pyplot as plt

    out = io.BytesIO()
    figure.savefig(out, dpi=110)
    plt.close(figure)
    return out.getvalue()


def broken(results: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> list[str]:
    """A line for each run that did not come to its end."""
    return [f'{name}, seed {seed}: {r["failed"]}' for name, by in results.items()
            for seed, r in by.items() if 'failed' in r]
