"""Health figures against numpy, and the verdict's words for runs of known kinds."""

import numpy as np
import pytest

from ddmd_jax.losses.decoupled import Predictions, Update, decoupled_update
from ddmd_jax.train.diagnostics import (
    BROKEN,
    CRITIC_LAGS,
    HEALTHY,
    OVER_BAKED,
    REFERENCE,
    health,
    verdict,
)


def figures(alpha=4.0, floor=0.1, seed=0):
    """``(x, predictions, update, health)`` of random arrays."""
    rng = np.random.default_rng(seed)
    x, *rest = rng.normal(size=(5, 6, 4, 4, 3)).astype(np.float32)
    p = Predictions(*rest)
    update = decoupled_update(x, p, alpha=alpha, normaliser='per_term', floor=floor)
    return x, p, update, {k: float(v) for k, v in health(x, p, update).items()}


def rms(a):
    return np.sqrt(np.mean(np.square(np.asarray(a, np.float64))))


def test_formulas():
    """METHOD, section 4: gaps are of the raw directions, whatever normalises the update."""
    x, p, _, got = figures(alpha=4.0)
    dm, ca = p.dm_cond - p.dm_fake, 3.0 * (p.ca_cond - p.ca_uncond)
    pairs = zip(p.dm_fake.reshape(6, -1), p.dm_cond.reshape(6, -1), strict=True)
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs]
    want = {
        'dm_rel_gap': rms(dm) / rms(p.dm_cond), 'dm_to_ca': rms(dm) / rms(ca),
        'dm_cos': np.mean(cosines), 'x_std': np.mean([a.std() for a in x]),
        'saturation': np.mean(np.abs(x) > 1)}
    for name, value in want.items():
        assert got[name] == pytest.approx(value, rel=1e-4), name


def test_each_example_has_its_own_mean():
    """x_std is contrast: shifting whole images apart must not look like inflation."""
    x, p, update, before = figures()
    apart = x + np.arange(6, dtype=np.float32)[:, None, None, None]
    assert float(health(apart, p, update)['x_std']) == pytest.approx(before['x_std'], rel=1e-4)


def test_floor_rates_are_passed_on():
    x, p, update, _ = figures()
    marked = Update(*[update.raw_ca, update.raw_dm, update.ca, update.dm], 0.25, 0.75)
    got = health(x, p, marked)
    assert got['floor_hit_ca'] == 0.25 and got['floor_hit_dm'] == 0.75


def test_no_guidance_gives_a_finite_ratio():
    """alpha = 1 (DM only) divides by zero otherwise, and a plot of NaN helps nobody."""
    assert figures(alpha=1.0)[3]['dm_to_ca'] == 0.0


def test_saturation_has_a_limit_of_its_own():
    """Latents are no pixels: their range is said by the caller."""
    x, p, update, _ = figures()
    assert float(health(x, p, update, limit=1e6)['saturation']) == 0.0


# --- The verdict ---

START = {'dm_rel_gap': 0.10, 'dm_cos': 0.99, 'x_std': 0.50}


def history(last, intervals=8):
    """A run that starts at `START` and moves evenly to `last` over the later intervals."""
    later = intervals - REFERENCE
    moved = [{k: v + (last.get(k, v) - v) * (i + 1) / later for k, v in START.items()}
             for i in range(later)]
    return [START] * REFERENCE + moved


@pytest.mark.parametrize('last, word', [
    ({}, HEALTHY),
    ({'dm_rel_gap': 0.05, 'dm_cos': 0.999}, HEALTHY),  # critic and teacher come together
    ({'dm_rel_gap': 0.11, 'dm_cos': 0.988, 'x_std': 0.52}, HEALTHY),  # the usual jitter
    ({'dm_rel_gap': 0.30, 'dm_cos': 0.90}, CRITIC_LAGS),
    ({'dm_rel_gap': 0.30, 'x_std': 0.80}, OVER_BAKED),  # METHOD: gap up, cosine flat, std up
    ({'dm_rel_gap': 0.30, 'dm_cos': 0.90, 'x_std': 0.80}, OVER_BAKED),  # contrast decides
    ({'x_std': 0.80}, OVER_BAKED),  # contrast grows though the critic keeps up
    ({'dm_cos': 0.90}, HEALTHY),  # turned apart without a gap: not enough to cry
])
def test_words(last, word):
    got, reason = verdict(history(last))
    assert got == word and reason


def test_the_advice_fits_the_word():
    assert 'critic updates' in verdict(history({'dm_rel_gap': 0.3, 'dm_cos': 0.9}))[1]
    assert 'alpha' in verdict(history({'x_std': 0.8}))[1]


@pytest.mark.parametrize('intervals', range(REFERENCE + 1))
def test_too_early(intervals):
    """The reference itself cannot be judged, however wild it looks."""
    wild = [START | {'x_std': 0.5 * 4**i, 'dm_rel_gap': 0.1 * 4**i} for i in range(intervals)]
    assert verdict(wild) == (HEALTHY, 'too early to tell')


def test_one_interval_after_the_reference_is_enough():
    assert verdict([START] * REFERENCE + [START | {'x_std': 1.0}])[0] == OVER_BAKED


def test_the_reference_is_the_start():
    """Slow growth counts: against the previous interval it would never show."""
    slow = [START | {'x_std': 0.5 * 1.03**i} for i in range(12)]
    assert verdict(slow)[0] == OVER_BAKED


def test_recovery_is_believed():
    """Only the last interval is judged."""
    assert verdict([*history({'x_std': 0.8}), START])[0] == HEALTHY


@pytest.mark.parametrize('name', sorted(START))
@pytest.mark.parametrize('value', [np.nan, np.inf])
@pytest.mark.parametrize('before', [0, 1, 8])
def test_what_is_not_finite_is_not_healthy(name, value, before):
    """Every comparison with NaN is false: silence must not read as health, however early."""
    word, reason = verdict([START] * before + [START | {name: value}])
    assert word == BROKEN and name in reason


def test_contrast_is_held_against_real_data_where_it_is_known():
    steady = [{'dm_rel_gap': 0.1, 'dm_cos': 0.9, 'x_std': 0.6}] * 5
    assert verdict(steady)[0] == HEALTHY
    assert verdict(steady, data_std=0.5)[0] == OVER_BAKED
    assert verdict(steady, data_std=0.6)[0] == HEALTHY


def test_a_gap_that_grew_from_nothing_but_is_small_is_no_lag():
    """Critic and teacher start equal: the first gaps are near 0 and every healthy run's grow."""
    start = [{'dm_rel_gap': 0.02, 'dm_cos': 0.9999, 'x_std': 0.5}] * REFERENCE
    assert verdict([*start, {'dm_rel_gap': 0.06, 'dm_cos': 0.998, 'x_std': 0.5}])[0] == HEALTHY
    assert verdict([*start, {'dm_rel_gap': 0.4, 'dm_cos': 0.9, 'x_std': 0.5}])[0] == CRITIC_LAGS
