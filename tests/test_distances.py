"""Distances between sets of features, and statistics over prompts: closed forms and references."""

import itertools
import json
import tracemalloc

import numpy as np
import pytest
import score_reference as reference
from hypothesis import given, strategies
from scipy import stats

from ddmd_jax.evaluation import distances, measures, statistics
from ddmd_jax.evaluation.moments import Moments, frechet

GOLDEN = json.loads(reference.GOLDEN.read_text())['distances']
REAL, DRAWN = reference.features()
SAME = 1e-6  # relative


def gaussian(mean, covariance):
    return Moments(101, np.asarray(mean, float), 100 * np.asarray(covariance, float))


# --- Moments and the Fréchet distance ---


@given(strategies.lists(strategies.integers(0, 299), max_size=4))
def test_moments_of_parts_are_those_of_the_whole(cuts):
    parts = [Moments.of(x) for x in np.split(REAL, sorted(cuts))]
    found = parts[0]
    for part in parts[1:]:
        found = found.merge(part)
    assert found.count == 300
    np.testing.assert_allclose(found.mean, REAL.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(REAL, rowvar=False), rtol=1e-10)


def test_moments_far_from_zero_keep_their_digits():
    """Sums of squares would lose them: a mean of 1e6 with a deviation of 1."""
    x = 1e6 + np.random.default_rng(0).standard_normal((4000, 3)).astype(np.float64)
    found = Moments.of(x[:1])
    for start in range(1, 4000, 500):
        found = found.merge(Moments.of(x[start:start + 500]))
    np.testing.assert_allclose(found.covariance, np.cov(x - 1e6, rowvar=False), rtol=1e-6,
                               atol=1e-9)


def test_moments_of_many_need_no_copy_of_them():
    x = np.random.default_rng(0).standard_normal((20_000, 256)).astype(np.float32)
    tracemalloc.start()
    found = Moments.of(x)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.6 * x.nbytes  # in fp64 they are twice as large
    np.testing.assert_allclose(found.covariance, np.cov(x.T.astype(np.float64)), rtol=1e-9,
                               atol=1e-12)


def test_moments_that_are_none():
    with pytest.raises(ValueError, match='two features at least, there is 1'):
        _ = Moments.of(REAL[:1]).covariance
    with pytest.raises(ValueError, match='width 8 and 3'):
        Moments.of(REAL).merge(Moments.of(REAL[:, :3]))
    empty = Moments.of(REAL[:0])
    assert empty.merge(empty).count == 0


def test_frechet_is_torch_fidelitys():
    got = measures.frechet_distance(DRAWN, REAL)
    assert got == pytest.approx(GOLDEN['frechet_inception_distance'], rel=SAME)


def test_frechet_of_gaussians_that_share_their_axes():
    """``|mu - mu'|^2 + sum (s - s')^2``, whatever the rotation, and with deviations of 0."""
    random = np.random.default_rng(0)
    axes = np.linalg.qr(random.standard_normal((40, 40)))[0]
    for a, b in ((np.linspace(0.1, 2, 40), np.linspace(3, 0.2, 40)),
                 (np.r_[np.zeros(20), np.ones(20)], np.r_[np.ones(10), np.zeros(30)]),
                 (np.logspace(-9, 1, 40), np.logspace(-9, 1, 40)[::-1])):
        mean = random.standard_normal(40)
        turned = [axes * deviations**2 @ axes.T for deviations in (a, b)]
        got = frechet(gaussian(mean, turned[0]), gaussian(0 * mean, turned[1]))
        assert got == pytest.approx(mean @ mean + ((a - b)**2).sum(), rel=SAME)


@pytest.mark.parametrize('count', [5, 60, 400])
def test_frechet_of_a_set_and_what_it_becomes(count):
    """Of fewer features than dimensions too: moved by d it is |d|^2; grown by s, (s - 1)^2 tr C."""
    x = np.random.default_rng(2).standard_normal((count, 100)) @ np.diag(np.logspace(-4, 1, 100))
    trace, shift = np.trace(np.cov(x, rowvar=False)), np.linspace(0, 0.1, 100)
    assert measures.frechet_distance(x, x) <= 1e-12 * trace
    assert measures.frechet_distance(x, x + shift) == pytest.approx(shift @ shift, rel=SAME)
    assert measures.frechet_distance(x, 1.5 * x) == pytest.approx(
        trace / 4 + ((x.mean(0) / 2)**2).sum(), rel=SAME)


def test_frechet_of_sets_without_a_common_direction():
    """``C_a C_b`` is 0: nothing but traces and means is left, where rounding has most to say."""
    random = np.random.default_rng(3)
    axes = np.linalg.qr(random.standard_normal((200, 200)))[0]
    a, b = (random.standard_normal((300, 100)) @ part for part in np.split(axes, 2))
    want = ((a.mean(0) - b.mean(0))**2).sum()
    want += sum(np.trace(np.cov(x, rowvar=False)) for x in (a, b))
    assert measures.frechet_distance(a, b) == pytest.approx(want, rel=1e-9)


# --- Kernels and neighbours ---


def test_kid_is_torch_fidelitys():
    got = distances.kid(DRAWN, REAL, subsets=10, size=50)
    assert got == pytest.approx((GOLDEN['kernel_inception_distance_mean'],
                                 GOLDEN['kernel_inception_distance_std']), rel=SAME)


def test_kid_of_all_features_is_scikit_learns_kernel():
    count = len(DRAWN)
    mean, std = distances.kid(REAL[:count], DRAWN, subsets=2, size=10**6)
    assert mean == pytest.approx(GOLDEN['kid_all'], rel=SAME) and std <= 1e-9 * mean
    with pytest.raises(ValueError, match='two features'):
        distances.kid(REAL[:1], DRAWN)


def test_cmmd_is_scikit_learns_kernel(monkeypatch):
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
    a, b = unit(REAL), unit(DRAWN)
    whole = distances.cmmd(a, b)
    assert whole == pytest.approx(GOLDEN['cmmd'], rel=SAME)
    monkeypatch.setattr(distances, 'BLOCK', 37)
    assert distances.cmmd(a, b) == pytest.approx(whole, rel=1e-9)
    assert distances.cmmd(a, a) == pytest.approx(0, abs=1e-9)
    point, other = np.eye(2)[:1], np.eye(2)[1:]  # squared distance 2: 2 - 2 exp(-2 / 200)
    assert distances.cmmd(point, other) == pytest.approx(2000 * -np.expm1(-0.01), rel=1e-9)


@pytest.mark.parametrize('block', [1024, 37])
def test_neighbours_are_torch_fidelitys_and_prdcs(monkeypatch, block):
    monkeypatch.setattr(distances, 'BLOCK', block)
    three, five = (distances.neighbours(REAL, DRAWN, k) for k in (3, 5))
    for name in ('precision', 'recall'):
        assert three[name] == pytest.approx(GOLDEN[name], rel=SAME)
    assert five == pytest.approx(GOLDEN['prdc'], rel=SAME)
    assert 0.2 < five['coverage'] < 0.99


def test_neighbours_of_points_on_a_line():
    """Counted by hand; the fourth real point is far from all, one drawn point far from both."""
    real = np.asarray([[0.0], [1], [2], [100]])
    drawn = np.asarray([[0.5], [1.5], [50]])
    found = distances.neighbours(real, drawn, nearest=1)  # radii 1 1 1 98; 1 1 48.5
    assert found == {'precision': 1.0, 'recall': 3 / 4, 'density': (2 + 2 + 1 + 0) / 3,
                     'coverage': 1.0}
    with pytest.raises(ValueError, match='3 neighbours want more'):
        distances.neighbours(real, drawn, nearest=3)
    # On the rim of a ball, as torch-fidelity and prdc have it: of precision's, not of density's.
    real, drawn = np.asarray([[0.0], [1], [2], [3]]), np.asarray([[4.0], [1.5], [9]])
    found = distances.neighbours(real, drawn, nearest=1)
    assert found['precision'] == 2 / 3 and found['density'] == 2 / 3
    assert found['coverage'] == 2 / 4


# --- Statistics ---


def test_scores_of_a_prompt_are_averaged_first():
    assert statistics.by_prompt([1, 2, 6, 3], ['b', 'a', 'b', 'a']) == {'b': 3.5, 'a': 2.5}
    assert list(statistics.by_prompt([1, 2], ['b', 'a'])) == ['b', 'a']


def test_a_bootstrap_interval_is_scipys():
    x = np.random.default_rng(0).exponential(size=80)
    got = statistics.bootstrap(x)
    want = stats.bootstrap((x,), np.mean, method='percentile', n_resamples=10_000,
                           random_state=1).confidence_interval
    assert got.mean == x.mean() and got.count == 80
    width = want.high - want.low
    assert abs(got.low - want.low) < 0.05 * width and abs(got.high - want.high) < 0.05 * width
    assert statistics.bootstrap(x) == got != statistics.bootstrap(x, seed=1)


def test_a_bootstrap_interval_covers_as_often_as_it_says(monkeypatch):
    """Of 300 samples of a known mean; a share of .95 has a deviation of .013."""
    monkeypatch.setattr(statistics, 'SAMPLES', 400)
    random = np.random.default_rng(0)
    hit = [found.low <= 2 <= found.high for found in (
        statistics.bootstrap(2 + random.standard_normal(60), seed) for seed in range(300))]
    assert 0.89 <= np.mean(hit) <= 0.98


def test_samples_in_blocks_are_the_whole_number_of_them(monkeypatch):
    monkeypatch.setattr(statistics, 'CELLS', 1000)
    assert sum(statistics._blocks(7)) == sum(statistics._blocks(10**6)) == statistics.SAMPLES


@pytest.mark.parametrize('count', [1, 4, 9])
def test_few_prompts_are_compared_by_all_signs(count):
    random = np.random.default_rng(count)
    a, b = random.standard_normal((2, count))
    x = a - b
    want = np.mean([abs(np.dot(signs, x)) >= abs(x.sum()) - 1e-12
                    for signs in itertools.product((-1, 1), repeat=count)])
    got = statistics.paired(a, b)
    assert got.p_value == want and got.difference.mean == pytest.approx(x.mean())
    assert got.wins == np.mean(a > b)


@pytest.mark.parametrize('tenths', [
    [-5, -3, 5, 3], [2, -1, 2, -2, -1], [3, -3, 3, -4, 3, 2, 1, -5], [5, -2, 1, -3, -4, -2, -5]])
def test_sums_that_are_equal_but_for_rounding_are_equal(tenths):
    """Differences of figures with few digits, whose sums over signs coincide."""
    sums = [abs(np.dot(signs, tenths)) for signs in itertools.product((-1, 1), repeat=len(tenths))]
    want = np.mean(np.asarray(sums) >= abs(sum(tenths)))
    for x in (np.asarray(tenths) / 10, np.asarray(tenths) / 1e7):
        assert statistics.paired(x, 0 * x).p_value == want
        assert statistics.paired(x + 0.3, 0 * x + 0.3).p_value == want


def test_many_prompts_that_cancel_do_not_differ():
    x = np.asarray([0.1, 0.2, -0.3] * 10)
    assert statistics.paired(x, 0 * x).p_value == 1


def test_many_prompts_are_compared_by_some():
    random = np.random.default_rng(0)
    a = random.standard_normal(60)
    b = a + 0.3 * random.standard_normal(60) + 0.08
    want = stats.permutation_test((a, b), lambda p, q: np.mean(p - q), permutation_type='samples',
                                  n_resamples=10_000, rng=np.random.default_rng(1)).pvalue
    got = statistics.paired(a, b)
    assert got.p_value == pytest.approx(want, abs=0.015) and 0.005 < want < 0.2
    mirrored = statistics.paired(b, a)
    assert mirrored.p_value == pytest.approx(got.p_value, abs=1e-12)
    assert mirrored.difference.mean == -got.difference.mean and mirrored.wins == 1 - got.wins
    assert statistics.paired(a, a) == statistics.Paired(
        statistics.Interval(0, 0, 0, 60), 1.0, 0.5)
    assert statistics.paired(a, a + 5).p_value == pytest.approx(1 / 10_001)


@pytest.mark.parametrize('call, words', [
    (lambda: statistics.bootstrap([]), 'no values'),
    (lambda: statistics.bootstrap([0, np.nan, np.inf]), 'value 1 is not finite'),
    (lambda: statistics.paired([1, 2], [1]), '2 and 1 figures cannot be paired'),
    (lambda: statistics.paired([1, 2], [1, np.inf]), 'value 1 is not finite'),
    (lambda: statistics.by_prompt([1], ['a', 'b']), 'longer|shorter')])
def test_figures_that_cannot_be_used(call, words):
    with pytest.raises(ValueError, match=words):
        call()
