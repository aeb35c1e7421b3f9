"""A study's results as one HTML file that needs nothing beside it: a page for each claim."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from ddmd_jax.study import claims, page, statistics as rule
from ddmd_jax.study.suites import Experiment, Suite
from ddmd_jax.util import files, text

COLUMNS = {'all_match': 3, 'all_match_held_out': 3, 'frechet': 1, 'colour_error': 2, 'std': 3,
           'diversity': 3}
AXES = {'x_std': 'contrast of the raw student (x_std)', 'ema_match': 'captions right (ema_match)',
        'dm_rel_gap': 'dm_rel_gap', 'ema_image_std': 'contrast of the EMA student (ema_image_std)'}
PANELS = ('From above: at the start; the EMA student; the raw student; the teacher\'s '
          'prediction of the raw student\'s samples from tau = .5; the critic\'s; their '
          'difference, Delta_DM. Same prompts, same noise.')

def badge(verdict: str) -> Markup:
    kind = {rule.HOLDS: 'holds', rule.FAILS: 'fails'}.get(verdict, 'open')
    return page.badge(kind, verdict)


def by_seed(part: claims.Part) -> str:
    return ', '.join(f'{v:.3g}' for v in part.values.values()) or 'none'


def spread(part: claims.Part) -> str:
    if not part.values:
        return ''
    found = rule.interval(list(part.values.values()))
    if found.count < 2:
        return f'{found.mean:.3g}'
    return f'{found.mean:.3g} [{found.low:.3g}, {found.high:.3g}]'


def curve_figure(results: claims.Results, names: Sequence[str], curve: str) -> bytes | None:
    """A PNG of `curve` over steps for each experiment; None where no run has it."""
    fig, ax = page.subplots(figsize=(7, 3.4))
    for name in names:
        runs = [r['curves'] for r in results.get(name, {}).values()
                if 'failed' not in r and curve in r.get('curves', {})]
        if not runs:
            continue
        length = min(len(c[curve]) for c in runs)
        steps, y = runs[0]['step'][:length], np.array([c[curve][:length] for c in runs], float)
        (line,) = ax.plot(steps, y.mean(0), label=name)
        ax.fill_between(steps, y.min(0), y.max(0), alpha=0.15, color=line.get_color())
    drawn = bool(ax.lines)
    if drawn:
        ax.set(xlabel='student updates', ylabel=AXES.get(curve, curve))
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    return page.png_of(fig) if drawn else None


def table_rows(results: claims.Results, experiments: Sequence[Experiment]) -> list[dict[str, Any]]:
    """What was drawn, a row each: real images, the teacher in as many steps, all students.

    Real images and the teacher are drawn by every run of a seed alike, and count once.
    """
    beside: dict[tuple[int, float], dict[int, Mapping[str, Any]]] = {}
    real: dict[int, Mapping[str, Any]] = {}
    for by in results.values():
        for seed, r in by.items():
            for row in (r[name] for name in ('guided', 'few_step') if name in r):
                if row.get('steps'):
                    beside.setdefault((row['steps'], row.get('guidance') or 1.0), {})[seed] = row
            real |= {seed: r['real']} if 'real' in r else {}
    rows = [_row('real images', real.values(), '')]
    rows += [_row('teacher', by.values(), f'guided, w = {w:g}' if w != 1 else 'without guidance')
             for (_, w), by in sorted(beside.items(), reverse=True)]
    return rows + [_row(e.name, [r['student'] for r in results.get(e.name, {}).values()
                                 if 'student' in r], e.words) for e in experiments]


def _row(name: str, drawn: Iterable[Mapping[str, Any]], words: str) -> dict[str, Any]:
    drawn, cells = list(drawn), []
    for column, digits in COLUMNS.items():
        values = [row[column] for row in drawn if row.get(column) is not None]
        mean = f'{statistics.fmean(values):.{digits}f}' if values else ''
        cells.append(mean + (f' ± {statistics.stdev(values):.{digits}f}'
                             if len(values) > 1 else ''))
    steps = next((row.get('steps') for row in drawn), None)
    return {'name': name, 'steps': steps or '', 'seeds': len(drawn), 'cells': cells,
            'words': words}


def markdown(results: claims.Results, suite: Suite) -> str:
    """The page's table of what was drawn, without what has not been."""
    heads = ['', 'steps', 'seeds', *(column.replace('_', ' ') for column in COLUMNS)]
    name = lambda row: f'{row["name"]}, {row["words"]}' if row['name'] == 'teacher' else row['name']
    return text.markdown(heads, [[name(row), row['steps'], row['seeds'], *row['cells']]
                                 for row in table_rows(results, suite.experiments) if row['seeds']])


def markdown_of_claims(found: Sequence[claims.Claim]) -> str:
    """Every part of every claim: its figure by seed, the interval of its mean, the verdict."""
    return text.markdown(
        ['claim', 'part', 'figure', 'by seed', 'mean, interval', 'has to be', 'verdict'],
        [[f'{c.number}. {c.title}', p.sentence, p.figure, by_seed(p), spread(p), p.bound, p.verdict]
         for c in found for p in c.parts])


def write(path: Path, title: str, head: str, how: str, results: claims.Results,
          suite: Suite, pictures: Mapping[str, Path]) -> list[claims.Claim]:
    """Writes the report to `path`, its tables also beside it; the claims with their verdicts.

    Args:
      title, head, how: of the page; the last is what one would type.
      results: ``{experiment: {seed: result}}``.
      suite: what they are results of.
      pictures: a PNG of each experiment's first seed, where there is one.
    """
    found = claims.judge(results, suite.name)
    figures = {c.number: curve_figure(results, c.shows, c.curve) for c in found}
    files.write(path, page.render(
        'claims', title=title, head=head, how=how, claims=found, rule=rule.RULE, badge=badge,
        by_seed=by_seed, spread=spread, panels=PANELS, broken=page.broken(results),
        columns=COLUMNS, figures={k: page.data_url(v) for k, v in figures.items() if v},
        grids={name: page.data_url(p.read_bytes()) for name, p in pictures.items()},
        first={name: min(results[name]) for name in pictures},
        words={e.name: e.words for e in suite.experiments},
        table=table_rows(results, suite.experiments)))
    files.write(path.with_name('table.md'),
                f'{markdown(results, suite)}\n\n{markdown_of_claims(found)}\n')
    return found
