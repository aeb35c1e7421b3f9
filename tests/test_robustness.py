"""The robustness map: when a run has fallen, when it was warned of, and what tuning finds."""

import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given, strategies as st

from ddmd_jax.study import map_report, robustness as rb, suites
from ddmd_jax.train import diagnostics
from ddmd_jax.train.diagnostics import SHIPPED

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
    assert rb.rates(runs, rb.COLLAPSING, SHIPPED).early == 2


def test_runs_without_a_judge_are_refused():
    lines = result([1.0])
    del lines['curves']['ema_match']
    with pytest.raises(ValueError, match=r'a-seed0 has no ema_match .* log.judge'):
        rb.read({'a': {0: lines}})


figure = st.floats(0.01, 3)
line = st.fixed_dictionaries({k: figure for k in rb.WATCHED})


@given(st.lists(line, min_size=1, max_size=9))
def test_a_warning_is_the_first_verdict_with_one_of_the_signals_words(lines):
    lines = [x | {'step': 5 * i} for i, x in enumerate(lines)]
    run = rb.Run('r', {}, 1.0, 1.0, None, tuple(lines), 0.467)
    for signal in rb.SIGNALS:
        said = [diagnostics.verdict(lines[:i + 1], 0.467, signal.limits)[0]
                for i in range(len(lines))]
        first = next((5 * i for i, word in enumerate(said) if word in signal.words), None)
        assert rb.warned(run, signal, signal.limits) == first


def test_every_word_but_healthy_is_a_signal():
    words = {v for k, v in vars(diagnostics).items() if k.isupper() and isinstance(v, str)}
    assert frozenset.union(*(s.words for s in rb.SIGNALS)) == words - {
        diagnostics.HEALTHY, diagnostics.BAKED}


def planted():
    """Runs that degrade 100 updates after `ema_std` passes 1.3, and steady ones that reach 1.2.

    Shipped levels call all of them unwell; those of 1.2 to 1.3 tell them apart.
    """
    bad = {f'bad{i}': {0: result(dropping(150 + 5 * i), ema_std=growing(5 + i, 0.06))}
           for i in range(8)}
    good = {f'good{i}': {0: result([1.0] * len(STEPS), ema_std=np.minimum(
        growing(3 + i, 0.02), 1.2))} for i in range(8)}
    return bad | good


def levels(**changes):
    return dataclasses.replace(rb.LEVELS.limits, **changes)


def test_rates_count_what_is_warned_of_in_time():
    runs = rb.read(planted())
    of = lambda limits: rb.rates(runs, rb.LEVELS, limits)
    shipped = of(levels())
    assert (shipped.degrading, shipped.steady, shipped.hits, shipped.false) == (8, 8, 8, 8)
    assert not shipped.reached
    apart = of(levels(ema_std_up=1.25))
    assert (apart.hits, apart.false, apart.reached) == (8, 0, True)
    late = of(levels(ema_std_up=2.2))
    assert (late.hits, late.late) == (0, 8) and not late.reached
    never = of(levels(ema_std_up=9))
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
    tuned = rb.tune(ours, rb.LEVELS, 400)
    of = lambda limits: rb.rates(theirs, rb.LEVELS, limits)
    assert of(tuned.limits).reached and not of(rb.LEVELS.limits).reached
    points = list(tuned.frontier)
    assert points == sorted(points) and points[-1][1] == 1.0
    assert all(a[1] < b[1] for a, b in zip(points, points[1:]))


def test_of_thresholds_that_are_alike_the_middlemost_is_taken():
    """Its neighbours tell the runs apart, too: the edge of what does is no place to stand."""
    rng, runs = np.random.default_rng(0), rb.read(planted())
    blind = dataclasses.replace(rb.COLLAPSING, limits=dataclasses.replace(SHIPPED, lost=9.0))
    tuned = rb.tune(runs, blind, 300).limits
    for lost, ahead in rng.uniform(0.9, 1.1, (20, 2)):
        near = dataclasses.replace(tuned, lost=1 + (tuned.lost - 1) * lost,
                                   ahead=tuned.ahead * ahead)
        assert rb.rates(runs, rb.COLLAPSING, near).reached


def test_the_shipped_thresholds_stay_where_nothing_is_better():
    steady = rb.read({f'r{i}': {0: result([1.0] * 10)} for i in range(3)})
    for signal in rb.SIGNALS:
        assert rb.tune(steady, signal, 50).limits == signal.limits


@given(st.integers(0, 50), st.sampled_from(rb.SIGNALS))
def test_candidates_stay_within_their_ranges(seed, signal):
    own, drawn = rb.candidates(signal, 1, seed)
    assert own == signal.limits
    for name, (rest, near, far) in signal.ranges.items():
        low, high = sorted((rest + near, rest + far))
        assert low - 1e-9 <= getattr(drawn, name) <= high + 1e-9
    others = {f.name for f in dataclasses.fields(drawn)} - set(signal.ranges)
    assert all(getattr(drawn, name) == getattr(own, name) for name in others)


def test_every_threshold_is_some_signals():
    assert {name for s in rb.SIGNALS for name in s.ranges} == {
        f.name for f in dataclasses.fields(SHIPPED)}


def test_the_grid_is_whole_and_its_page_stands_alone(tmp_path):
    import tiny

    config, suite = tiny.load_config('emoji'), suites.SUITES['robustness']
    fields = {e.name: suites.fields(suite, e, config, False, 0) for e in suite.experiments}
    assert len(fields) == 72 and len({str(sorted(f.items())) for f in fields.values()}) == 72
    made = planted()
    results = {name: {0: made[key][0] | {'fields': fields[name]}}
               for name, key in zip(fields, 5 * [*made])}
    grave, other = map_report.write(tmp_path / 'r.html', 'T', 'H', 'how', results, drawn=200)
    assert grave.signal is rb.COLLAPSING and grave.held_out('tuned').reached
    assert not other.held_out('shipped').reached and other.held_out('tuned').reached
    page = (tmp_path / 'r.html').read_text()
    assert page.count('data:image/png;base64') == 2
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert 'and at most 10 % of the steady ones' in ' '.join(page.split())
    assert map_report.answer(grave.held_out('shipped')).replace("'", '&#39;') in page
    rows = [row['r'].reached for j in (grave, other) for row in j.rows()]
    assert (page.count('>not reached'), page.count('>reached')) == (rows.count(0), rows.count(1))
    assert page.count('<td>tuned on') == 4 + 36


@pytest.mark.parametrize(('rates', 'words'), [
    (rb.Rates(5, 4, 4, 1, 20, 2), 'Yes: as shipped, on the runs that nothing was tuned on, '
     "'collapsing' was said 50 updates before the fall in 4 of 5 that degraded (1 fell too early "
     'for any warning), and in 2 of 20 that stayed.'),
    (rb.Rates(5, 5, 5, 0, 20, 3), 'No: as shipped'), (rb.Rates(5, 3, 5, 0, 20, 0), 'No: as '),
    (rb.Rates(0, 0, 0, 0, 3, 0), 'fall in none of those'), (rb.Rates(3, 3, 3, 0, 0, 0), 'Yes: ')])
def test_the_answer_names_both_rates(rates, words):
    assert words in map_report.answer(rates)


def test_a_map_of_too_few_runs_is_refused(tmp_path):
    with pytest.raises(ValueError, match='fewer than two runs'):
        map_report.write(tmp_path / 'r.html', 'T', 'H', 'how', {'a': {0: result([1.0])}})
