"""Health figures against numpy, and the verdict's words for runs of known kinds."""

import dataclasses

import numpy as np
import pytest

from ddmd_jax.method.health import (
    BROKEN,
    COLLAPSING,
    COLOUR_CAST,
    CRITIC_LAGS,
    HEALTHY,
    OVER_BAKED,
    REFERENCE,
    WASHED_OUT,
    Thresholds,
    before,
    measure,
    probe,
    verdict as verdict_of,
)
from ddmd_jax.method.losses import Normaliser, Predictions, directions


def figures(alpha=4.0, floor=0.1, seed=0):
    """``(x, predictions, directions, health)`` of random arrays."""
    rng = np.random.default_rng(seed)
    x, *rest = rng.normal(size=(5, 6, 4, 4, 3)).astype(np.float32)
    p = Predictions(*rest)
    delta = directions(x, p, alpha, Normaliser('per_term', floor))
    return x, p, delta, {k: float(v) for k, v in measure(x, p, delta).items()}


def rms(a):
    return np.sqrt(np.mean(np.square(np.asarray(a, np.float64))))


def test_formulas():
    """METHOD, section 4: gaps are of the raw directions, whatever divides them afterwards."""
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
    x, p, delta, before = figures()
    apart = x + np.arange(6, dtype=np.float32)[:, None, None, None]
    assert float(measure(apart, p, delta)['x_std']) == pytest.approx(before['x_std'], rel=1e-4)


def test_floor_rates_are_passed_on():
    x, p, delta, _ = figures()
    got = measure(x, p, dataclasses.replace(delta, floor_hit_ca=0.25, floor_hit_dm=0.75))
    assert got['floor_hit_ca'] == 0.25 and got['floor_hit_dm'] == 0.75


def test_no_guidance_gives_a_finite_ratio():
    """alpha = 1 (DM only) divides by zero otherwise, and a plot of NaN helps nobody."""
    assert figures(alpha=1.0)[3]['dm_to_ca'] == 0.0


def test_saturation_has_a_limit_of_its_own():
    """Latents are no pixels: their range is said by the caller."""
    x, p, delta, _ = figures()
    assert float(measure(x, p, delta, limit=1e6)['saturation']) == 0.0


# --- The probe of the averaged student ---


def samples(seed=0):
    """Images that differ in mean and contrast, from one to the next and between channels."""
    rng = np.random.default_rng(seed)
    shape = (5, 1, 1, 3)
    x = rng.normal(size=(5, 4, 6, 3)) * rng.uniform(0.2, 0.8, shape) + rng.normal(size=shape)
    return x.astype(np.float32)


def probed(x, start, **kwargs):
    return {name: float(value) for name, value in probe(x, start, **kwargs).items()}


def test_probe_formulas():
    x, start = samples(1), samples(2)
    unit = np.mean([a.std() for a in start])
    moved = [(a[..., c].mean() - b[..., c].mean()) / unit
             for a, b in zip(x, start, strict=True) for c in range(3)]
    want = {'ema_std': np.mean([a.std() for a in x]) / unit, 'ema_cast': rms(moved),
            'ema_saturation': np.mean(np.abs(x) > 1)}
    assert probed(x, start) == pytest.approx(want | {'ema_start': 1.0}, rel=1e-4)
    real = probed(x, start, data_std=2.0)  # contrast in units of real data's; colours as before
    assert real == pytest.approx(want | {
        'ema_std': want['ema_std'] * unit / 2, 'ema_start': unit / 2}, rel=1e-4)
    assert probed(x, start, limit=1e6)['ema_saturation'] == 0.0


def test_a_student_that_has_not_moved_is_at_its_start():
    got = probed(samples(), samples())
    assert got['ema_std'] == 1.0 and got['ema_cast'] == 0.0


def test_a_lift_of_every_image_is_a_cast_and_no_contrast():
    x = samples()
    unit = np.mean([a.std() for a in x])
    got = probed(x + 0.3, x)
    assert got['ema_std'] == pytest.approx(1.0, rel=1e-5)
    assert got['ema_cast'] == pytest.approx(0.3 / unit, rel=1e-4)
    # One channel of three: a colour cast. Its square is averaged over the channels.
    green = probed(x + np.float32([0, 0.3, 0]), x)
    assert green['ema_cast'] == pytest.approx(0.3 / unit / np.sqrt(3), rel=1e-4)


def test_casts_of_opposite_colours_do_not_cancel():
    """One image red and another cyan is no less wrong than both red."""
    x = samples()
    sign = np.asarray([1, -1, 1, -1, 1], np.float32)[:, None, None, None]
    assert probed(x + 0.3 * sign, x)['ema_cast'] == pytest.approx(probed(x + 0.3, x)['ema_cast'])


def test_contrast_is_std_and_no_cast():
    x = samples()
    mean = x.mean(axis=(1, 2), keepdims=True)
    flat = x - mean  # grey in the mean, so that the channels' own means do not count
    got = probed(1.5 * flat, flat)
    assert got['ema_std'] == pytest.approx(1.5, rel=1e-4)
    assert got['ema_cast'] == pytest.approx(0.0, abs=1e-5)
    # About the mean of each channel, as clipping and fading do: still no cast.
    assert probed(mean + 0.5 * flat, x)['ema_cast'] == pytest.approx(0.0, abs=1e-5)


def test_a_blank_start_gives_no_nan():
    assert np.isfinite(list(probed(samples(), np.zeros((5, 4, 6, 3), np.float32)).values())).all()


# --- The verdict ---

START = {'dm_rel_gap': 0.10, 'dm_cos': 0.99, 'x_std': 0.50}
LIMITS = Thresholds(lost=2.05, ahead=24.0)  # others than those that are shipped


def verdict(history, data_std=START['x_std'], **limits):
    """Of a run whose first samples have the contrast of real data."""
    return verdict_of(history, data_std, **limits)


def lines(values, every=5):
    """They with their `step`."""
    return [v | {'step': every * (i + 1)} for i, v in enumerate(values)]


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


def test_contrast_is_held_against_real_data():
    steady = [{'dm_rel_gap': 0.1, 'dm_cos': 0.9, 'x_std': 0.6}] * 5
    assert verdict(steady, data_std=0.5)[0] == OVER_BAKED
    assert verdict(steady, data_std=0.6)[0] == HEALTHY


def test_a_student_that_leaves_pale_images_is_not_ill_where_real_contrast_is_unknown():
    """As the shipped recipe's figures are, in units of the undistilled student's."""
    good = {'x_std': 0.58, 'ema_std': 1.17, 'ema_start': 1.0, 'ema_cast': 0.03}
    seen = lines([START | {'ema_std': 1.0, 'ema_start': 1.0, 'ema_cast': 0.0}] * 3 + [
        START | good] * 3)
    assert verdict_of(seen)[0] == HEALTHY
    grown = lines([START | {'ema_std': std} for std in (1.0, 1.5, 2.2)])
    assert verdict_of(grown)[0] == COLLAPSING
    assert verdict_of(history({'dm_rel_gap': 0.3, 'dm_cos': 0.9}))[0] == CRITIC_LAGS
    assert verdict_of([START] * 3 + [START | {'x_std': np.nan}])[0] == BROKEN


APART = {'dm_rel_gap': 0.8, 'dm_cos': 0.9}


@pytest.mark.parametrize('name, start, below, above, beside, word', [
    ('dm_rel_gap', 0.4, 0.51, 0.53, APART, CRITIC_LAGS),  # x1.3 is up
    ('dm_rel_gap', 0.1, 0.24, 0.26, APART, CRITIC_LAGS),  # 0.25 is large
    ('dm_cos', 0.99, 0.9875, 0.9865, APART, CRITIC_LAGS),  # 1 - cos x1.3 is apart
    ('fake_loss', 0.2, 0.255, 0.265, {}, CRITIC_LAGS),  # x1.3
    ('x_std', 0.5, 0.545, 0.555, {}, OVER_BAKED),  # x1.1
    ('ema_std', 1.0, 1.075, 1.085, {}, OVER_BAKED),
    ('ema_std', 1.0, 0.975, 0.965, {}, WASHED_OUT),
    ('ema_cast', 0.0, 0.019, 0.021, {}, COLOUR_CAST),
])
def test_the_shipped_thresholds_are_those_of_the_docs(name, start, below, above, beside, word):
    begun = START | {name: start}
    for value, wanted in ((below, HEALTHY), (above, word)):
        seen = lines([begun] * REFERENCE + [begun | beside | {name: value}])
        assert verdict(seen)[0] == wanted


@pytest.mark.parametrize('stds, word', [
    ((2.05,), OVER_BAKED), ((2.15,), COLLAPSING),  # 2.1 is lost
    ((1.0, 1.155, 1.31), OVER_BAKED), ((1.0, 1.16, 1.32), COLLAPSING)])  # 2.085, 2.12 in 25
def test_contrast_is_lost_and_looked_ahead_for_as_the_docs_say(stds, word):
    assert verdict(lines(contrasts(*stds)))[0] == word


def test_a_gap_that_grew_from_nothing_but_is_small_is_no_lag():
    """Critic and teacher start equal: the first gaps are near 0 and every healthy run's grow."""
    start = [{'dm_rel_gap': 0.02, 'dm_cos': 0.9999, 'x_std': 0.5}] * REFERENCE
    assert verdict([*start, {'dm_rel_gap': 0.06, 'dm_cos': 0.998, 'x_std': 0.5}])[0] == HEALTHY
    assert verdict([*start, {'dm_rel_gap': 0.4, 'dm_cos': 0.9, 'x_std': 0.5}])[0] == CRITIC_LAGS


# --- What the probe of the average adds to the verdict ---


@pytest.mark.parametrize('last, word', [
    ({'ema_std': 1.02, 'ema_cast': 0.015}, HEALTHY),  # as the shipped recipe ends
    ({'ema_std': 1.10}, OVER_BAKED),
    ({'ema_std': 0.95, 'ema_cast': 0.05}, WASHED_OUT),  # though the raw student looks well
    ({'ema_std': 1.00, 'ema_cast': 0.03}, COLOUR_CAST),
    ({'ema_std': 1.10, 'ema_cast': 0.05}, OVER_BAKED),
])
@pytest.mark.parametrize('before', [0, 1, 8])
def test_the_average_is_judged_at_once_and_first(last, word, before):
    got, reason = verdict(lines([START] * before + [START | last]))
    assert got == word
    assert word == HEALTHY or "the EMA student's contrast" in reason


@pytest.mark.parametrize('std, begun, cast, word', [
    (1.04, 0.78, 0.22, HEALTHY),  # pale in few steps, as it began; distilled to real contrast
    (0.77, 0.78, 0.01, HEALTHY), (0.74, 0.78, 0.01, WASHED_OUT),  # paler still
    (1.10, 0.78, 0.22, OVER_BAKED), (1.10, 1.06, 0.0, HEALTHY), (1.16, 1.06, 0.0, OVER_BAKED),
    (1.00, 0.96, 0.03, COLOUR_CAST), (1.00, 0.94, 0.03, HEALTHY)])
def test_few_steps_that_fail_are_no_reference(std, begun, cast, word):
    probed = START | {'ema_std': std, 'ema_start': begun, 'ema_cast': cast}
    seen = lines([START | {'ema_std': begun, 'ema_start': begun}] * 4 + [probed])
    assert verdict(seen)[0] == word


@pytest.mark.parametrize('stds, word', [
    ((0.75, 0.80, 0.85, 0.89, 0.92, 0.94), HEALTHY),  # pale, and on its way
    ((0.80, 0.85, 0.90, 0.90, 0.90, 0.90), WASHED_OUT),  # on its way no longer
    ((0.80, 0.85, 0.90, 0.90, 0.90, 0.907), WASHED_OUT),  # .9 to .907 is less than .1 of .093,
    ((0.80, 0.85, 0.90, 0.90, 0.90, 0.911), HEALTHY),  # .911 is more
    ((0.94, 0.95, 0.949, 0.95, 0.951, 0.951), HEALTHY),  # .95 is pale
    ((0.93, 0.94, 0.949, 0.949, 0.949, 0.949), WASHED_OUT),
    ((0.90, 0.95, 0.92, 0.90, 0.88, 0.86), WASHED_OUT),  # falls
    ((0.80, 0.80, 0.80), HEALTHY),  # too early
    ((0.70, 0.71, 0.70, 0.72, 0.71, 0.72), HEALTHY),  # not left its start, .7, yet: warming up
    ((0.70, 0.75, 0.79, 0.79, 0.79, 0.79), HEALTHY),
    ((0.70, 0.75, 0.81, 0.81, 0.81, 0.81), WASHED_OUT)])
def test_a_student_that_stays_pale_is_washed_out(stds, word):
    """Against real contrast, though it has left the undistilled weights' .7 far behind."""
    seen = [line | {'ema_start': 0.7} for line in lines(contrasts(*stds))]
    assert verdict(seen)[0] == word
    assert word == HEALTHY or 'hardly rises' in verdict(seen)[1]


def contrasts(*stds):
    return [START | {'ema_std': std} for std in stds]


@pytest.mark.parametrize('stds, word', [
    ((1.0, 1.1, 1.2, 1.3, 1.4), OVER_BAKED),  # .02 an update: 1.9 in 25
    ((1.0, 1.2, 1.4, 1.6, 1.8), COLLAPSING),  # .04
    ((2.0, 2.0, 2.0), OVER_BAKED), ((2.2, 2.2, 2.2), COLLAPSING),  # far is enough
    ((2.2, 1.9, 1.6), OVER_BAKED),  # on its way back
    ((2.6, 2.4, 2.2), COLLAPSING),  # on its way back, but not there
    ((1.0, 1.0, 1.0, 1.3, 1.6), COLLAPSING), ((1.0, 1.5, 1.9, 1.9, 1.9), OVER_BAKED),  # of late
    ((1.0, 3.0), COLLAPSING), ((1.9,), OVER_BAKED),  # a line says nothing of growth
    ((1.0, 0.5), WASHED_OUT),  # the other way is another illness
])
def test_growth_of_contrast_that_goes_on_is_a_collapse(stds, word):
    got, reason = verdict(lines(contrasts(*stds)), limits=LIMITS)
    assert got == word
    assert word != COLLAPSING or f'x{stds[-1]:.2f}' in reason and 'earlier checkpoint' in reason


def test_growth_is_measured_over_updates_and_not_over_lines():
    """An even growth is the same, logged at each update or with lines left out."""
    std = lambda step: 1 + 0.03 * step
    for steps in (range(1, 31), range(2, 31, 2), (10, 20, 30), (5, 30)):
        seen = [START | {'ema_std': std(step), 'step': step} for step in steps]
        close, far = (Thresholds(lost=std(30 + 25) + off, ahead=25) for off in (-0.01, 0.01))
        assert verdict(seen, limits=close)[0] == COLLAPSING
        assert verdict(seen, limits=far)[0] == OVER_BAKED


def test_noise_of_a_dense_log_is_no_growth():
    """Growth is over ten updates at least: from one to the next contrast may jump."""
    stds = [1.0 + 0.1 * (i % 2) for i in range(30)]
    assert verdict(lines(contrasts(*stds), every=1), limits=LIMITS)[0] == OVER_BAKED


def test_a_run_whose_first_lines_were_not_probed_is_judged_by_what_is_there():
    assert verdict(lines([START] * 4 + contrasts(1.9)), limits=LIMITS)[0] == OVER_BAKED
    assert verdict(lines([START] * 4 + contrasts(1.9, 1.9, 2.2)), limits=LIMITS)[0] == COLLAPSING


def test_a_collapse_that_is_over_is_not_forgotten():
    told = lambda *words: before([{'step': 5 * i, 'health': w} for i, w in enumerate(words)])
    assert told(HEALTHY, COLLAPSING, OVER_BAKED, COLLAPSING, OVER_BAKED) == (
        'collapsing before, from update 5 to 15')
    assert told(HEALTHY, COLLAPSING) == told(HEALTHY, OVER_BAKED) == before([]) == ''
    assert before([{'step': 5, 'loss': 1.0}]) == ''  # a pre-training has no health


@pytest.mark.parametrize('name', ['fake_loss', 'ema_std', 'ema_cast'])
def test_a_broken_probe_or_critic_is_not_healthy(name):
    assert verdict([START] * 5 + [START | {name: np.nan}])[0] == BROKEN


def test_a_critic_whose_error_grows_lags_though_it_agrees_with_the_teacher():
    """A critic that never learns stays the teacher: dm_rel_gap is 0 and tells nothing."""
    still = {'dm_rel_gap': 0.0, 'dm_cos': 1.0, 'x_std': 0.5, 'fake_loss': 0.12}
    assert verdict([still] * 5)[0] == HEALTHY
    word, reason = verdict([still] * 5 + [still | {'fake_loss': 0.18}])
    assert word == CRITIC_LAGS and 'fake_loss' in reason
    # The loss is in units of the samples' variance: more contrast alone is no lag.
    assert verdict([still] * 5 + [still | {'fake_loss': 0.12 * 1.17, 'x_std': 0.54}])[0] == HEALTHY


def test_over_baking_names_the_critic_that_let_it():
    start = {'dm_rel_gap': 0.0, 'dm_cos': 1.0, 'x_std': 0.48, 'fake_loss': 0.13}
    word, reason = verdict([start] * 3 + [start | {'x_std': 0.58, 'fake_loss': 0.44}], 0.467)
    assert word == OVER_BAKED and 'fake_loss' in reason
