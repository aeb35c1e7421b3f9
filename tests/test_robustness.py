"""The robustness map: when a run has fallen, when it was warned of, and what tuning finds."""

import re

import numpy as np
import pytest
from hypothesis import given, strategies as st

from ddmd_jax.study import map_report, robustness as rb, suites
from ddmd_jax.train import diagnostics
from ddmd_jax.train.diagnostics import SHIPPED, Thresholds

STEPS = tuple(range(5, 205, 5))
WELL = {'dm_rel_gap': 0.1, 'dm_cos': 0.99, 'x_std': 0.45, 'fake_loss': 0.1, 'ema_std': 1.0,
        'ema_cast': 0.0}


def result(match, fields=(), **curves):
    """A study's result with these curves; what is not given stays well."""
    n = len(match)
    columns = {k: list(curves.get(k, [v] * n)) for k, v in WELL.items()}
    return {'fields': {'log.every': 5, **dict(fields)}, 'data_std': 0.467,
            'curves': {'step': list(STEPS[:n]), 'ema_match': list(match), **columns}}


def growing(start, rate):
    """`ema_std` that leaves 1 at line `start`."""
    return [1.0 + max(0, i - start) * rate for i in range(len(STEPS))]


def dropping(at):
    return [1.0 if step < at else 0.8 for step in STEPS]


@pytest.mark.parametrize(('match', 'fell'), [
    ([1.0, 1.0, 1.0], None), ([1.0, 0.95, 0.95], 10), ([1.0, 0.96, 0.951], None),
    ([1.0, 0.9, 1.0, 0.9], None),  # once may be chance
    ([0.5, 1.0, 0.9, 0.9], 15), ([0.5, 0.48, 0.9, 0.9], None), ([0.9], None), ([], None)])
def test_quality_falls_below_its_best_so_far_twice_in_a_row(match, fell):
    assert rb.fall(STEPS[:len(match)], match) == fell


@given(st.lists(st.floats(0, 1), max_size=40))
def test_what_never_drops_never_falls(match):
    assert rb.fall(STEPS, sorted(match)) is None


def test_a_run_that_diverged_has_fallen_and_one_that_broke_off_is_left_out():
    lines = result([1.0, 1.0])
    lines['failed'] = 'main: step 14: NaN or Inf in loss; ...'
    broken = result([1.0]) | {'failed': 'main: no space left'}
    at_once = {'fields': {'log.every': 5}, 'curves': {}, 'failed': 'main: step 1: NaN or Inf in x'}
    runs = rb.read({'a': {0: lines}, 'b': {0: broken}, 'c': {0: at_once}})
    assert [(r.name, r.fell) for r in runs] == [('a-seed0', 15), ('c-seed0', 5)]
    assert rb.rates(runs, SHIPPED).early == 2


def test_runs_without_a_judge_are_refused():
    lines = result([1.0])
    del lines['curves']['ema_match']
    with pytest.raises(ValueError, match=r'a-seed0 has no ema_match .* log.judge'):
        rb.read({'a': {0: lines}})


figure = st.floats(0.01, 3)
line = st.fixed_dictionaries({k: figure for k in rb.WATCHED})


@given(st.lists(line, min_size=1, max_size=9))
def test_the_warning_is_the_verdicts_on_the_whole_history(lines):
    """`warned` hands the verdict the few lines it looks at: that must not change its mind."""
    lines = [x | {'step': 5 * i} for i, x in enumerate(lines)]
    run = rb.Run('r', {}, 1.0, 1.0, None, tuple(lines), 0.467)
    said = [diagnostics.verdict(lines[:i + 1], 0.467)[0] for i in range(len(lines))]
    first = next((5 * i for i, word in enumerate(said) if word != diagnostics.HEALTHY), None)
    assert rb.warned(run, SHIPPED) == first


def planted():
    """Runs that degrade 100 updates after `ema_std` passes 1.3, and steady ones that reach 1.2.

    The shipped thresholds call all of them unwell; those of 1.2 to 1.3 tell them apart.
    """
    bad = {f'bad{i}': {0: result(dropping(150 + 5 * i), ema_std=growing(5 + i, 0.06))}
           for i in range(8)}
    good = {f'good{i}': {0: result([1.0] * len(STEPS), ema_std=np.minimum(
        growing(3 + i, 0.02), 1.2))} for i in range(8)}
    return bad | good


def test_rates_count_what_is_warned_of_in_time():
    runs = rb.read(planted())
    shipped = rb.rates(runs, SHIPPED)
    assert (shipped.degrading, shipped.steady, shipped.hits, shipped.false) == (8, 8, 8, 8)
    assert not shipped.reached
    apart = rb.rates(runs, Thresholds(ema_std_up=1.25))
    assert (apart.hits, apart.false, apart.reached) == (8, 0, True)
    late = rb.rates(runs, Thresholds(ema_std_up=2.2))
    assert (late.hits, late.late) == (0, 8) and not late.reached
    never = rb.rates(runs, Thresholds(ema_std_up=9))
    assert (never.hits, never.late, never.false) == (0, 0, 0)


def test_halves_are_disjoint_whole_and_alike():
    runs = rb.read(planted())
    ours, theirs = rb.halves(runs)
    assert {r.name for r in ours} | {r.name for r in theirs} == {r.name for r in runs}
    assert len(ours) == len(theirs) == 8
    assert sum(r.fell is None for r in ours) == sum(r.fell is None for r in theirs) == 4


def test_a_recipe_with_two_seeds_would_stand_in_both_halves():
    runs = rb.read({'a': {0: result([1.0]), 1: result([1.0])}, 'b': {0: result([1.0])}})
    with pytest.raises(ValueError, match='several seeds'):
        rb.halves(runs)


def test_tuning_finds_what_tells_them_apart_on_the_other_half_too():
    ours, theirs = rb.halves(rb.read(planted()))
    tuned = rb.tune(ours, 400)
    assert rb.rates(theirs, tuned).reached and not rb.rates(theirs, SHIPPED).reached
    points = rb.frontier(ours, 400)
    assert points == sorted(points) and points[-1][1] == 1.0
    assert all(a[1] < b[1] for a, b in zip(points, points[1:]))


def test_the_shipped_thresholds_stay_where_nothing_is_better():
    steady = rb.read({f'r{i}': {0: result([1.0] * 10)} for i in range(3)})
    assert rb.tune(steady, 50) == SHIPPED


@given(st.integers(0, 50))
def test_candidates_stay_within_their_ranges(seed):
    shipped, drawn = rb.candidates(1, seed)
    assert shipped == SHIPPED
    for name, (rest, near, far) in rb.RANGES.items():
        low, high = sorted((rest + near, rest + far))
        assert low - 1e-9 <= getattr(drawn, name) <= high + 1e-9


def test_the_grid_is_whole_and_its_page_stands_alone(tmp_path):
    import tiny

    config, suite = tiny.load_config('emoji'), suites.SUITES['robustness']
    fields = {e.name: suites.fields(suite, e, config, False, 0) for e in suite.experiments}
    assert len(fields) == 36 and len({str(sorted(f.items())) for f in fields.values()}) == 36
    made = planted()
    results = {name: {0: made[key][0] | {'fields': fields[name]}}
               for name, key in zip(fields, [*made, *made, *made])}
    tuned, held = map_report.write(tmp_path / 'r.html', 'T', 'H', 'how', results, drawn=400)
    assert held.reached and tuned != SHIPPED
    page = (tmp_path / 'r.html').read_text()
    assert page.count('data:image/png;base64') == 2
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert 'and at most 10 % of the steady ones' in ' '.join(page.split())
    assert 'tuned on: yes. 100%' in page and page.count('not reached') == 3
    assert page.count('<td>tuned on') >= 18


def test_a_map_of_too_few_runs_is_refused(tmp_path):
    with pytest.raises(ValueError, match='fewer than two runs'):
        map_report.write(tmp_path / 'r.html', 'T', 'H', 'how', {'a': {0: result([1.0])}})
