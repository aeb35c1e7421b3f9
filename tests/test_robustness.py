"""The robustness map: when a run has fallen, when it was warned of, and what tuning finds."""

import dataclasses
import json
import re

import numpy as np
import pytest
import tiny
from hypothesis import given, strategies as st

from benchmarks import verdicts
from ddmd_jax.method import health as diagnostics
from ddmd_jax.method.health import SHIPPED
from ddmd_jax.study import map_page, results, robustness as rb, suites

STEPS = tuple(range(5, 205, 5))
WELL = {'dm_rel_gap': 0.1, 'dm_cos': 0.99, 'x_std': 0.45, 'fake_loss': 0.1, 'ema_std': 1.0,
        'ema_start': 1.0, 'ema_cast': 0.0}


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


@pytest.mark.parametrize(('match', 'fell', 'unknown'), [
    ([1.0, 1.0, 1.0], None, False), ([1.0, 0.95, 0.95], 10, False),
    ([1.0, 0.96, 0.951], None, False),
    ([1.0, 0.9, 1.0, 0.9], None, True),  # once may be chance, or the beginning of it
    ([1.0, 0.9, 1.0], None, False), ([0.5, 1.0, 0.9, 0.9], 15, False),
    ([0.5, 0.48, 0.9, 0.9], None, False), ([0.9], None, False), ([], None, False)])
def test_quality_falls_below_its_best_so_far_twice_in_a_row(match, fell, unknown):
    assert rb.fall(STEPS[:len(match)], match) == (fell, unknown)


@given(st.lists(st.floats(0, 1), max_size=40))
def test_what_never_drops_never_falls(match):
    assert rb.fall(STEPS, sorted(match)) == (None, False)


@given(st.lists(st.floats(0, 1), max_size=40))
def test_a_larger_fall_comes_later_or_not_at_all(match):
    (small, _), (large, _) = (rb.fall(STEPS, match, drop) for drop in (0.04, 0.06))
    assert large is None or small is not None and small <= large


def test_a_run_that_diverged_has_fallen_and_one_that_broke_off_is_left_out():
    lines = result([1.0, 1.0])
    lines['failed'] = 'main: step 14: NaN or Inf in loss; ...'
    broken = result([1.0]) | {'failed': 'main: no space left'}
    at_once = {'fields': {'log.every': 5}, 'curves': {}, 'failed': 'main: step 1: NaN or Inf in x'}
    runs = rb.read({'a': {0: lines}, 'b': {0: broken}, 'c': {0: at_once}})
    assert [(r.name, r.fell) for r in runs] == [('a-seed0', 15), ('c-seed0', 5)]
    assert rb.rates(runs, rb.COLLAPSE, SHIPPED).early == 2


def test_runs_without_a_judge_are_refused():
    lines = result([1.0])
    del lines['curves']['ema_match']
    with pytest.raises(ValueError, match=r'a-seed0 has no ema_match .* log.judge'):
        rb.read({'a': {0: lines}})


def test_every_word_but_healthy_is_a_signal():
    told = frozenset.union(*(s.words for s in rb.SIGNALS))
    assert told == set(diagnostics.WORDS) - {diagnostics.HEALTHY}


def planted(rates=(0.06, 0.07)):
    """Runs that degrade 100 updates after `ema_std` passes 1.3, and steady ones that reach 1.2.

    Shipped levels call all of them unwell; those of 1.2 to 1.3 tell them apart. Each half, by the
    student's learning rate, grows at a rate of its own.
    """
    at = lambda i: {rb.SPLIT: 1e-5 * (1 + i % 2)}
    bad = {f'bad{i}': {0: result(dropping(150 + 5 * i), at(i), ema_std=growing(
        5 + i, rates[i % 2]))} for i in range(8)}
    good = {f'good{i}': {0: result([1.0] * len(STEPS), at(i), ema_std=np.minimum(
        growing(3 + i, rates[i % 2] / 3), 1.2))} for i in range(8)}
    return bad | good


def levels(**changes):
    return dataclasses.replace(rb.LEVELS.limits, **changes)


def test_a_result_holds_all_that_its_verdicts_were_made_of():
    """Thresholds are tuned on results: by those it ran with, each line has the word it had.

    The runs of both suites had no `pale` yet; later ones have the thresholds that ship.
    """
    ran_with = (dataclasses.replace(diagnostics.SHIPPED, pale=0.0), diagnostics.SHIPPED)
    files = sorted((tiny.ROOT / 'docs').glob('*/results/*.json'))
    assert len(files) > 20
    for file in files:
        known = json.loads(file.read_text())
        if 'failed' in known:
            continue
        lines = results.watched(known['curves'])
        words = [[diagnostics.verdict(lines[:i + 1], known['data_std'], limits)[0]
                  for i in range(len(lines))] for limits in ran_with]
        assert known['curves']['health'] in words, file.name


def test_rates_count_what_is_warned_of_in_time():
    runs = rb.read(planted())
    of = lambda limits: rb.rates(runs, rb.LEVELS, limits)
    shipped = of(levels())
    assert shipped.standing == 8
    assert (shipped.degrading, shipped.steady, shipped.hits, shipped.false) == (8, 8, 8, 8)
    assert not shipped.reached
    apart = of(levels(ema_std_up=1.25))
    assert (apart.hits, apart.false, apart.reached) == (8, 0, True)
    late = of(levels(ema_std_up=2.2))
    assert (late.hits, late.warned) == (0, 8) and not late.reached
    never = of(levels(ema_std_up=9))
    assert (never.hits, never.warned, never.false) == (0, 0, 0)


def test_a_warning_that_was_taken_back_is_a_hit_that_does_not_stand():
    withdrawn = [1.5 if 5 <= i < 10 else 1.0 for i in range(len(STEPS))]
    runs = rb.read({'a': {0: result(dropping(150), ema_std=withdrawn)}})
    got = rb.rates(runs, rb.LEVELS, levels(ema_std_up=1.25))
    assert (got.hits, got.standing) == (1, 0)


def test_an_outcome_that_is_not_known_counts_on_neither_side():
    runs = rb.read({'a': {0: result([1.0] * 9 + [0.9])}, 'b': {0: result([1.0] * 10)}})
    got = rb.rates(runs, rb.LEVELS, levels())
    assert (got.degrading, got.steady) == (0, 1) and not got.reached
    assert [map_page.outcome(r) for r in runs] == ['unknown', 'steady']


def test_halves_have_other_learning_rates_whatever_runs_are_there():
    runs = rb.read(planted())
    ours, theirs = rb.halves(runs)
    assert {r.name for r in ours} | {r.name for r in theirs} == {r.name for r in runs}
    assert len(ours) == len(theirs) == 8
    assert len({r.fields[rb.SPLIT] for r in ours}) == len({r.fields[rb.SPLIT] for r in theirs}) == 1
    names = lambda half: {r.name for r in half}
    fewer = rb.halves(runs[3:])
    assert names(fewer[0]) <= names(ours) and names(fewer[1]) <= names(theirs)


@pytest.mark.parametrize(('results', 'words'), [
    ({'a': {0: result([1.0], {rb.SPLIT: 1}), 1: result([1.0], {rb.SPLIT: 2})}}, 'several seeds'),
    ({name: {0: result([1.0], {rb.SPLIT: 1})} for name in 'ab'}, 'the same optim.student.lr')])
def test_runs_that_make_no_two_halves_are_refused(results, words):
    with pytest.raises(ValueError, match=words):
        rb.halves(rb.read(results))


@given(st.integers(1, 60), st.data())
def test_the_interval_of_a_share_holds_it_and_widens_with_fewer_runs(whole, data):
    count = data.draw(st.integers(0, whole))
    low, high = rb.share_interval(count, whole)
    wider = rb.share_interval(2 * count, 2 * whole)
    assert 0 <= low <= count / whole <= high <= 1
    assert wider[1] - wider[0] <= high - low


def test_tuning_finds_what_tells_them_apart_on_the_other_half_too():
    ours, theirs = rb.halves(rb.read(planted()))
    tuned = rb.tune(ours, rb.LEVELS, 400)
    of = lambda limits: rb.rates(theirs, rb.LEVELS, limits)
    assert of(tuned.limits).reached and not of(rb.LEVELS.limits).reached
    points = list(tuned.frontier)
    assert points == sorted(points) and points[-1][1] == 1.0
    assert all(a[1] < b[1] for a, b in zip(points, points[1:]))


def test_of_thresholds_that_are_alike_the_inmost_is_taken():
    """Its neighbours tell the runs apart, too: the edge of what does is no place to stand."""
    rng, runs = np.random.default_rng(0), rb.read(planted())
    tuned = rb.tune(runs, rb.COLLAPSE, 300).limits
    for lost, ahead in rng.uniform(0.9, 1.1, (20, 2)):
        near = dataclasses.replace(tuned, lost=1 + (tuned.lost - 1) * lost,
                                   ahead=tuned.ahead * ahead)
        assert rb.rates(runs, rb.COLLAPSE, near).reached


def test_what_is_shipped_has_no_say_in_what_is_tuned():
    """It was chosen by people, who may have looked at the half that is counted on."""
    runs, perfect = rb.read(planted()), dataclasses.replace(SHIPPED, lost=1.6, ahead=20.0)
    assert rb.rates(runs, rb.COLLAPSE, perfect).reached
    tuned = [rb.tune(runs, dataclasses.replace(rb.COLLAPSE, limits=limits), 100).limits
             for limits in (perfect, dataclasses.replace(SHIPPED, lost=9.0))]
    assert tuned[0] == tuned[1] != perfect


@given(st.integers(0, 50), st.sampled_from(rb.SIGNALS))
def test_candidates_stay_within_their_ranges(seed, signal):
    (drawn,) = rb.candidates(signal, 1, seed)
    for name, (rest, near, far) in signal.ranges.items():
        low, high = sorted((rest + near, rest + far))
        assert low - 1e-9 <= getattr(drawn, name) <= high + 1e-9
    others = {f.name for f in dataclasses.fields(drawn)} - set(signal.ranges)
    assert all(getattr(drawn, name) == getattr(signal.limits, name) for name in others)


def test_every_threshold_is_some_signals():
    assert {name for s in rb.SIGNALS for name in s.ranges} == {
        f.name for f in dataclasses.fields(SHIPPED)}


def test_the_grid_is_whole_and_its_page_stands_alone(tmp_path):
    import tiny

    config, suite = tiny.load_config('emoji'), suites.SUITES['robustness']
    fields = {e.name: suites.fields(suite, e, config, False, 0) for e in suite.experiments}
    assert len(fields) == 72 and len({str(sorted(f.items())) for f in fields.values()}) == 72
    slower = (planted((0.06 - 0.002 * i, 0.07 - 0.002 * i)) for i in range(5))
    made = [by[0] for copy in slower for by in copy.values()]
    results = {name: {0: made[i] | {'fields': fields[name]}} for i, name in enumerate(fields)}
    found = map_page.write(tmp_path / 'r.html', 'T', 'H', 'how', results, drawn=200)
    assert set(found) == {s.name for s in rb.SIGNALS}
    other = found[rb.LEVELS.name]
    assert not other.held_out('shipped').reached and other.held_out('tuned').reached
    page = (tmp_path / 'r.html').read_text()
    assert page.count('data:image/png;base64') == 2
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert 'and at most 10 % of the steady ones' in ' '.join(page.split())
    assert map_page.answer(found[rb.COLLAPSE.name].held_out()) in page
    rows = [row['r'].reached for j in found.values() for row in j.rows()]
    assert (page.count('>not reached'), page.count('>reached')) == (rows.count(0), rows.count(1))
    assert page.count('<td>tuned on') == 4 + 36
    assert (page.count('<td>fell'), page.count('<td>steady')) == (40, 32)


def test_other_falls_are_counted_beside_the_one_that_was_asked_for():
    low = [1.0] * 5 + [0.955] * 5
    shown = map_page.sensitivity({'a': {0: result(low)}, 'b': {0: result([1.0] * 10)}})
    assert [(round(s['drop'], 3), s['r'].degrading) for s in shown] == [
        (0.04, 1), (0.05, 0), (0.06, 0)]


@pytest.mark.parametrize(('rates', 'words'), [
    (rb.Rates(5, 4, 3, 4, 1, 20, 2), '50 updates before or earlier: 4 of 5 (28% to 99%); 1 fell '
     'too early for any warning. Of those that stayed, warned of: 2 of 20 (1% to 32%).'),
    (rb.Rates(5, 4, 3, 4, 1, 20, 2), 'Yes. With thresholds tuned on half'),
    (rb.Rates(5, 5, 5, 5, 0, 20, 3), 'No. '), (rb.Rates(5, 3, 3, 5, 0, 20, 0), 'No. '),
    (rb.Rates(0, 0, 0, 0, 0, 3, 0), 'earlier: there were none;'),
    (rb.Rates(3, 3, 3, 3, 0, 0, 0), 'No. ')])  # without steady runs nothing is known of alarms
def test_the_answer_names_both_rates(rates, words):
    assert words in map_page.answer(rates)


def test_a_map_of_too_few_runs_is_refused(tmp_path):
    with pytest.raises(ValueError, match='fewer than two runs'):
        map_page.write(tmp_path / 'r.html', 'T', 'H', 'how', {'a': {0: result([1.0])}})


# --- What the evaluation finds of a run, and its last verdict ---


def test_a_warning_is_counted_against_what_the_evaluation_finds(tmp_path, capsys):
    """Over-baked with colours gone: a hit. With the colours there: a false alarm. Halves differ."""
    row = lambda **figures: {'std': 0.4, 'colour_error': 1.0, 'guidance': 1.0, **figures}
    for folder in ('results', 'teacher'):
        (tmp_path / folder).mkdir()
    for name, seed, last, found in [
            ('good', 1, 1.0, row()), ('good', 2, 1.3, row()), ('pale', 1, 1.0, row(std=0.3)),
            ('red', 1, 1.3, row(colour_error=2.1)), ('red', 2, 1.3, row(std=0.5))]:
        midway = 1.3 if (name, seed) == ('good', 1) else 1.0  # a false alarm, though it passes
        known = result([1.0] * 6, ema_std=[1.0] * 3 + [midway, 1.0, last]) | {
            'student': found, 'real': row(),
            'guided': row(colour_error=2.0, guidance=2.0 if name == 'good' else 1.0)}
        (tmp_path / 'results' / f'{name}-seed{seed}.json').write_text(json.dumps(known))
    verdicts.main([tmp_path / 'results'])
    said = capsys.readouterr().out
    assert ('shipped: 2 of 3 spoilt students warned of, 1 false alarms in 2 runs; at some line, '
            'in 2 of these') in said
    assert 'colours 2.10 > 2.00' in said and 'contrast -25%' in said
    # By a larger alpha its teacher's colours at that guidance count, where they are known.
    known = result([1.0] * 6) | {'student': row(colour_error=2.1), 'real': row(), 'guided': row()}
    known['fields'] = known['fields'] | {'method.alpha': 3.0}
    (tmp_path / 'results' / 'high-seed1.json').write_text(json.dumps(known))
    verdicts.main([tmp_path / 'results'])
    assert '1 runs are left out' in capsys.readouterr().out
    (tmp_path / 'teacher' / 'w3-seed1.json').write_text(json.dumps(
        {'rows': [row(colour_error=2.4, guidance=3.0)]}))
    verdicts.main([tmp_path / 'results'])
    assert '1 false alarms in 3 runs' in capsys.readouterr().out
    # `good` and `pale` are one half: nobody warned of `pale`, and no thresholds could.
    assert re.search('tuned on 2 recipes: 0 of 1 .*; on the other 1: [012] of 2 ', said)
