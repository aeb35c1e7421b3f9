"""A report's figures: curves with the bands in which they are healthy, and verdicts."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from ddmd_jax.method import health
from ddmd_jax.method.health import SHIPPED
from ddmd_jax.report.read import RunFiles, thinned
from ddmd_jax.util import shape

MOST, BLOCKS = 2000, 400  # points of a curve, and verdicts, at most
COLOURS = ('#3b7dd8', '#d9713c', '#4a9e5c', '#a05fb5', '#b8912f', '#5aa7a7', '#c75b7a', '#7a7a7a')
VERDICTS = {health.HEALTHY: '#4a9e5c', health.CRITIC_LAGS: '#d9a53c',
            health.WASHED_OUT: '#8ca3b8', health.COLOUR_CAST: '#c06fb5',
            health.OVER_BAKED: '#c9473f', health.COLLAPSING: '#f0308f',
            health.BROKEN: '#8f4bd8'}


@dataclasses.dataclass(frozen=True)
class Curve:
    """A column of ``metrics.jsonl``: its title, and the bounds of a healthy run."""

    key: str
    title: str
    low: float | None = None
    high: float | None = None
    log: bool = False


CURVES = (
    Curve('loss', 'loss'),
    Curve('fake_loss', 'fake_loss: the critic\'s', log=True),
    Curve('dm_rel_gap', 'dm_rel_gap: critic to teacher', high=SHIPPED.gap_large),
    Curve('dm_cos', 'dm_cos'),
    Curve('dm_to_ca', 'dm_to_ca'),
    Curve('x_std', 'x_std: contrast, raw student'),
    Curve('ema_std', 'ema_std: contrast, EMA student', SHIPPED.ema_std_down, SHIPPED.ema_std_up),
    Curve('ema_cast', 'ema_cast: colours moved, EMA student', high=SHIPPED.cast),
    Curve('saturation', 'saturation: share beyond the range'),
    Curve('grad_norm', 'grad_norm', log=True),
    Curve('critic_grad_norm', 'critic_grad_norm', log=True),
    Curve('ema_saturation', 'ema_saturation'), Curve('floor_hit_ca', 'floor_hit_ca: floored'),
    Curve('floor_hit_dm', 'floor_hit_dm: floored'),
    Curve('ema_match', 'ema_match: captions right', low=1 - 0.05),
    Curve('ema_objects', 'ema_objects'),
    Curve('ema_background', 'ema_background'),
    Curve('ema_image_std', 'ema_image_std'),
    Curve('gan_loss', 'gan_loss'), Curve('gan_critic_loss', 'gan_critic_loss'),
    Curve('gan_real', 'gan_real: mean logit'), Curve('gan_fake', 'gan_fake: mean logit'),
    Curve('gan_r1', 'gan_r1'),
    Curve('mv_kl', 'mv_kl'), Curve('alpha_share', 'alpha_share'),
    Curve('critic_extra', 'critic_extra'),
)


def present(runs: Sequence[RunFiles]) -> list[Curve]:
    """Those that a line of one of the runs has; a user's own, by their names, come last."""
    keys = {key for run in runs for line in (run.lines[:1] + run.lines[-1:])
            for key, value in line.items() if isinstance(value, float)} - {'finite'}
    own = sorted(keys - {curve.key for curve in CURVES})
    return [curve for curve in CURVES if curve.key in keys] + [Curve(key, key) for key in own]


def curves(runs: Sequence[RunFiles]) -> Any:
    """Every curve in a panel of its own, all with one axis of steps; bands are green."""
    from plotly.subplots import make_subplots

    shown = present(runs)
    rows = max(1, math.ceil(len(shown) / 2))
    figure = make_subplots(rows=rows, cols=2, shared_xaxes='all', vertical_spacing=0.28 / rows,
                           horizontal_spacing=0.09, subplot_titles=[c.title for c in shown])
    for i, curve in enumerate(shown):
        place, drawn = {'row': i // 2 + 1, 'col': i % 2 + 1}, []
        for number, run in enumerate(runs):
            x, y = series(run, curve.key)
            drawn += [value for value in y if value is not None]
            figure.add_scatter(x=x, y=y, name=run.name, legendgroup=run.name,
                               showlegend=not i and len(runs) > 1,
                               mode='lines' if len(x) > 1 else 'markers',  # a line has two ends
                               line={'color': COLOURS[number % len(COLOURS)], 'width': 1.6},
                               **place)
        if curve.low is not None or curve.high is not None:  # an open band ends with the curve
            low = min([*drawn, curve.high]) if curve.low is None else curve.low
            high = max([*drawn, curve.low]) if curve.high is None else curve.high
            figure.add_hrect(y0=low, y1=high, fillcolor='#4a9e5c', opacity=0.12, line_width=0,
                             layer='below', **place)
        figure.update_yaxes(type='log' if curve.log else 'linear', **place)
    figure.update_xaxes(showticklabels=True)
    _style(figure, 170 * rows + 60)
    return figure


def series(run: RunFiles, key: str) -> tuple[list[int], list[Any]]:
    """(steps, values) of a curve: five digits are enough; a value that is not finite is a gap."""
    lines = thinned([line for line in run.lines if key in line], MOST)
    value = lambda x: float(f'{x:.5g}') if not shape.finite(x) else None
    return [line['step'] for line in lines], [value(line[key]) for line in lines]


def verdicts(runs: Sequence[RunFiles]) -> Any | None:
    """A line of blocks for each run, coloured by the verdict at each logged step."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for run in runs:
        lines = changes(run.lines)
        for word, colour in VERDICTS.items():
            if found := [line for line in lines if line.get('health') == word]:
                figure.add_scatter(
                    x=[line['step'] for line in found], y=[run.name] * len(found), name=word,
                    mode='markers', text=[line.get('health_reason', '') for line in found],
                    legendgroup=word, showlegend=word not in {t.name for t in figure.data},
                    marker={'symbol': 'square', 'size': 11, 'color': colour})
    if not figure.data:
        return None
    _style(figure, 110 + 34 * len(runs))
    figure.update_xaxes(title='student updates')
    return figure


def changes(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of a long run some lines and every change of the verdict; the last ones if too many."""
    spread = {line['step'] for line in thinned(lines, BLOCKS)}
    return [line for line, before in zip(lines, [*lines[:1], *lines]) if line['step'] in spread
            or line.get('health') != before.get('health')][-2 * BLOCKS:]


def _style(figure: Any, height: int) -> None:
    """Colours of text and lines are the page's, which knows whether it is dark."""
    figure.update_layout(height=height, margin={'l': 50, 'r': 16, 't': 36, 'b': 36},
                         paper_bgcolor='rgba(0,0,0,0)', plot_bgcolor='rgba(0,0,0,0)',
                         font={'size': 11}, legend={'orientation': 'h', 'y': 1.06},
                         hovermode='x unified', template='none')
    figure.update_annotations(font_size=12)
    for update in (figure.update_xaxes, figure.update_yaxes):
        update(gridcolor='rgba(128,128,128,.25)', zeroline=False)
