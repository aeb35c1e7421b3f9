"""Whether a run's health says what the evaluation of its student finds: thresholds, by halves.

    python benchmarks/verdicts.py docs/steps/results docs/paper/results

A student is *spoilt* if its backgrounds are further from the real colours than those of its teacher
guided by its own alpha, or its contrast is more than 5 % off real images'. A run warns of it if its
last line's verdict is anything but healthy. Thresholds of `method/health.py`, but for those of
collapse, are drawn at random and chosen on half of the recipes, then counted on the other half: all
seeds of a recipe are on one side, as they are alike. Shipped thresholds are counted on all. Nothing
is trained.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddmd_jax import config as config_lib
from ddmd_jax.method import health
from ddmd_jax.study import results, robustness

STD = 0.05  # share by which a contrast may differ from real images'


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run was, whether its student is spoilt (and by what), and its logged lines."""

    recipe: str
    seed: int
    spoilt: str
    lines: tuple[dict[str, Any], ...]
    data_std: float


def read(folders: list[Path]) -> list[Run]:
    """Runs of all folders; a recipe is an experiment of one folder."""
    found = {(folder.parent.name, *file.stem.rsplit('-seed', 1)): json.loads(file.read_text())
             for folder in folders for file in sorted(folder.glob('*.json'))}
    ended = {which: r for which, r in found.items() if 'student' in r}
    # The guided teacher is the same in all runs of a seed, and is drawn in one of them, or alone:
    # evaluate --model=emoji --suite=emoji --seed=1 --guidance=3 --out=DIR; DIR/eval.json is kept.
    guided = {(r['guided']['guidance'], seed): r['guided']['colour_error']
              for (_, _, seed), r in ended.items() if r['guided']['guidance'] > 1}
    for folder in folders:
        for file in folder.parent.glob('teacher/*-seed*.json'):
            for row in json.loads(file.read_text())['rows']:
                guided[row['guidance'], file.stem.rpartition('-seed')[2]] = row['colour_error']
    alpha = config_lib.load('emoji').method.alpha
    runs = [_run(f'{suite}/{name}', int(seed), r, guided[by])
            for (suite, name, seed), r in ended.items()
            if (by := (r['fields'].get('method.alpha', alpha), seed)) in guided]
    if left := len(found) - len(runs):
        print(f'{left} runs are left out: they have no evaluation, or nothing is known of their '
              'teacher by that alpha')
    if not runs:
        sys.exit('verdicts: no runs; name folders of results, such as docs/steps/results')
    return runs


def _run(recipe: str, seed: int, result: dict[str, Any], guided: float) -> Run:
    student = result['student']
    off = student['std'] / result['real']['std'] - 1
    found = [text for text, so in (
        (f'colours {student["colour_error"]:.2f} > {guided:.2f}', student['colour_error'] > guided),
        (f'contrast {off:+.0%}', abs(off) > STD)) if so]
    return Run(recipe, seed, ', '.join(found), results.watched(result['curves']),
               result['data_std'])


def counted(runs: Sequence[Run], _: robustness.Signal,
            limits: health.Thresholds) -> robustness.Rates:
    """Hits among spoilt students, false alarms among the others; every word is a warning."""
    warns = lambda r: health.verdict(r.lines, r.data_std, limits)[0] != health.HEALTHY
    bad, good = ([r for r in runs if bool(r.spoilt) is is_bad] for is_bad in (True, False))
    hits, false = (sum(map(warns, some)) for some in (bad, good))
    return robustness.Rates(len(bad), hits, hits, hits, 0, len(good), false)


def on_the_way(runs: Sequence[Run]) -> int:
    """Of how many sound students some line warned, be it the last."""
    return sum(any(health.verdict(r.lines[:n + 1], r.data_std)[0] != health.HEALTHY
                   for n in range(len(r.lines))) for r in runs if not r.spoilt)


def halves(runs: list[Run]) -> tuple[list[Run], list[Run]]:
    """Every other recipe with a spoilt student, and every other of those without."""
    recipes = sorted({r.recipe for r in runs})
    spoilt = [name for name in recipes if any(r.spoilt for r in runs if r.recipe == name)]
    sound = [name for name in recipes if name not in spoilt]
    ours = {*spoilt[::2], *sound[::2]}
    return [r for r in runs if r.recipe in ours], [r for r in runs if r.recipe not in ours]


def said(rates: robustness.Rates) -> str:
    return (f'{rates.hits} of {rates.degrading} spoilt students warned of, '
            f'{rates.false} false alarms in {rates.steady} runs')


def main(folders: list[Path]) -> None:
    runs = read(folders)
    for r in runs:
        word = health.verdict(r.lines, r.data_std)[0]
        print(f'{r.recipe:28} {r.seed}  {word:12} {r.spoilt or "sound"}')
    rates = lambda some, limits: said(counted(some, robustness.LEVELS, limits))
    print(f'shipped: {rates(runs, health.SHIPPED)}; at some line, in {on_the_way(runs)} of these')
    one, other = halves(runs)
    for tuned, tried in ((one, other), (other, one)):
        limits = robustness.tune(tuned, robustness.LEVELS, counted=counted).limits
        print(f'tuned on {len({r.recipe for r in tuned})} recipes: {rates(tuned, limits)}; '
              f'on the other {len({r.recipe for r in tried})}: {rates(tried, limits)}; '
              f'shipped there: {rates(tried, health.SHIPPED)}; {limits}')


if __name__ == '__main__':
    main([Path(name) for name in sys.argv[1:]])
