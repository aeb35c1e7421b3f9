"""The paper's four re-noising schedules, in every step and under every shift; a user's own; what
changes over a run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from tiny import make_recipe, unshift

from ddmd_jax.diffusion.time import Shift
from ddmd_jax.method import schedules
from ddmd_jax.method.schedules import ANYWHERE, CLEANER, SCHEDULES, Alpha, Bounds, Ranges, Schedule

STEPS, DRAWS = 4, 2000
FULL = (0.0, 1.0)
NAMES = sorted(SCHEDULES)
# The paper's Table 1, written out once more: which terms are bounded by the generator's step.
BOUNDED = {'coupled_shared': (False, False), 'decoupled_full': (False, False),
           'decoupled_constrained': (True, True), 'decoupled_hybrid': (True, False)}
shifts = pytest.mark.parametrize('shift', [1.0, 3.0, 6.0])
names = pytest.mark.parametrize('name', NAMES)


def draw(name, shift, ca=FULL, dm=FULL, seed=0):
    """Pre-shift steps ``[S]`` and shifted levels ``[S, DRAWS]`` of both terms."""
    t = jnp.repeat(Shift().steps(STEPS), DRAWS)
    keys = jax.random.split(jax.random.key(seed))
    levels = SCHEDULES[name].levels(keys, t, Ranges(ca, dm), Shift(shift))
    return np.asarray(Shift().steps(STEPS)), [np.asarray(v).reshape(STEPS, -1) for v in levels]


def distance_from_uniform(u):
    """Kolmogorov and Smirnov's statistic of `u` against U[0, 1]."""
    grid = (np.arange(u.size) + 0.5) / u.size
    return np.abs(np.sort(u.ravel()) - grid).max()


def test_the_four_schedules():
    assert set(SCHEDULES) == set(BOUNDED)


@names
@shifts
def test_bounded_levels_are_cleaner_than_the_step(name, shift):
    """After the shift: one peer read this in a noise-is-1 convention and re-noised noisier."""
    t, levels = draw(name, shift)
    step = np.asarray(Shift(shift)(t))[:, None]
    for tau, bounded in zip(levels, BOUNDED[name], strict=True):
        assert tau.min() >= 0.0 and tau.max() <= 1.0
        if bounded:
            assert (tau >= step - 1e-6).all()


@names
@shifts
def test_unbounded_levels_reach_below_the_step(name, shift):
    """Uniform on [0, 1] before the shift: a share t of the draws is noisier than the step."""
    t, levels = draw(name, shift)
    step = np.asarray(Shift(shift)(t))[:, None]
    for tau, bounded in zip(levels, BOUNDED[name], strict=True):
        if not bounded:
            np.testing.assert_allclose((tau < step).mean(axis=1), t, atol=0.04)


@names
@shifts
def test_levels_are_uniform_before_the_shift(name, shift):
    """Drawn between bound and 1, *then* shifted; shift first and draw, and this fails."""
    t, levels = draw(name, shift)
    for tau, bounded in zip(levels, BOUNDED[name], strict=True):
        low = t[:, None] * bounded
        u = (np.asarray(unshift(tau, shift)) - low) / (1.0 - low)
        worst = max(distance_from_uniform(row) for row in u)
        assert worst < 1.95 / np.sqrt(DRAWS)  # one in a thousand, for fixed draws


def test_uniformity_can_fail():
    """The check above does see a shift of 3: shifted levels are far from uniform."""
    _, (tau, _) = draw('decoupled_full', 3.0)
    assert distance_from_uniform(tau) > 0.2


@names
def test_shared_levels_are_one_and_others_are_independent(name):
    _, (ca, dm) = draw(name, 3.0)
    if name == 'coupled_shared':
        np.testing.assert_array_equal(ca, dm)
        return
    # Within a step: the bound makes levels of different steps differ for everybody.
    within = [np.corrcoef(a, b)[0, 1] for a, b in zip(ca, dm, strict=True)]
    assert np.abs(within).max() < 0.1


@functools.partial(jax.jit, static_argnums=0)
def compiled_levels(name, key, t, ca, dm, shift):
    return SCHEDULES[name].levels(jax.random.split(key), t, Ranges(ca, dm), Shift(shift))


@given(st.sampled_from(NAMES), st.sampled_from([1, 4, 8]), st.sampled_from([1.0, 3.0, 6.0]),
       st.tuples(st.floats(0.0, 0.4), st.floats(0.9, 1.0)),
       st.tuples(st.floats(0.0, 0.4), st.floats(0.9, 1.0)), st.integers(0, 2**16))
def test_spans_are_respected(name, steps, shift, ca, dm, seed):
    """Each term keeps to its own span, its lower end raised to the step where bounded."""
    t = np.repeat(np.float32(np.arange(steps) / steps), 512 // steps)  # always of one shape
    levels = compiled_levels(name, jax.random.key(seed), t, ca, dm, shift)
    spans = (ca, ca) if name == 'coupled_shared' else (ca, dm)
    for tau, (low, high), bounded in zip(levels, spans, BOUNDED[name], strict=True):
        low = np.maximum(low, np.asarray(t)) if bounded else np.full(t.shape, low)
        u = np.asarray(unshift(tau, shift))
        assert (u >= low - 1e-5).all() and (u <= high + 1e-5).all()


def test_spans_are_filled():
    """Both ends are reached: a span that was shrunk would pass the test above."""
    _, (ca, dm) = draw('decoupled_full', 1.0, ca=(0.7, 0.98), dm=(0.1, 0.5))
    np.testing.assert_allclose([ca.min(), ca.max(), dm.min(), dm.max()],
                               [0.7, 0.98, 0.1, 0.5], atol=2e-3)


def test_the_authors_example():
    """METHOD, section 3: the step at .75 under shift 3 draws tau_CA in [.5, 1]."""
    keys, t = jax.random.split(jax.random.key(0)), jnp.full((DRAWS,), 0.75)
    tau = Schedule(CLEANER, ANYWHERE).levels(keys, t, Ranges(FULL, FULL), Shift(3.0)).ca
    assert float(tau.min()) == pytest.approx(0.5, abs=5e-3)
    assert float(tau.max()) == pytest.approx(1.0, abs=5e-3)
    assert float(tau.min()) >= 0.5 - 1e-6


def test_different_keys_draw_different_levels():
    """Fixed levels would pass every range check of this file."""
    _, (one, _) = draw('decoupled_hybrid', 1.0, seed=0)
    _, (two, _) = draw('decoupled_hybrid', 1.0, seed=1)
    assert np.abs(one - two).mean() > 0.05


# --- A schedule of one's own ---

WIDTH = 0.1
# The terms look only just ahead: [t, t + WIDTH] within the configured range.
window = Schedule(ANYWHERE, Bounds(low=lambda t: t, high=lambda t: t + WIDTH))


def test_a_window_after_the_step_is_a_schedule():
    """tau_DM fills [t, t + d] of uniform time and leaves it nowhere; tau_CA is as it was."""
    t, keys = jnp.repeat(Shift().steps(STEPS), DRAWS), jax.random.split(jax.random.key(0))
    ca, dm = window.levels(keys, t, Ranges((0.0, 0.98), (0.0, 0.8)), Shift(3.0))
    u = unshift(dm, 3.0).reshape(STEPS, DRAWS)
    steps = np.asarray(Shift().steps(STEPS))[:, None]
    high = np.minimum(steps + WIDTH, 0.8)  # the last window is cut by the configured range
    assert (u >= steps - 1e-5).all() and (u <= high + 1e-5).all()
    np.testing.assert_allclose(u.min(1), steps[:, 0], atol=1e-3)
    np.testing.assert_allclose(u.max(1), high[:, 0], atol=1e-3)
    full = SCHEDULES['decoupled_full'].levels(keys, t, Ranges((0.0, 0.98), FULL), Shift(3.0))
    np.testing.assert_array_equal(ca, full.ca)


def test_a_schedule_is_found_by_its_name():
    assert schedules.get(f'{__name__}.window') is window
    assert schedules.get('decoupled_hybrid') is SCHEDULES['decoupled_hybrid']


@pytest.mark.parametrize('name, words', [
    ('hybird', "unknown schedule 'hybird'; known: coupled_shared"),
    ('no_module.at_all', 'cannot be imported'),
    (f'{__name__}.none', 'cannot be imported'),
    (f'{__name__}.draw', 'is a function, not a Schedule')])
def test_what_is_no_schedule_is_refused_in_one_line(name, words):
    with pytest.raises(ValueError, match=words) as e:
        schedules.get(name)
    assert len(str(e.value).splitlines()) == 1


# --- What changes over a run ---


def test_a_range_relaxes_at_a_constant_pace_and_stays():
    ranges = Ranges((0.0, 0.1), (0.0, 0.98), (0.4, 0.9), (), 100)
    at = lambda step: [float(v) for v in ranges.at(step).ca]
    assert at(0) == pytest.approx([0.0, 0.1]) and at(50) == pytest.approx([0.2, 0.5])
    assert at(100) == at(10_000) == pytest.approx([0.4, 0.9])
    assert [float(v) for v in ranges.at(50).dm] == pytest.approx([0.0, 0.98])  # it has no end
    still = Ranges((0.0, 0.1), (0.0, 0.98), (0.4, 0.9))
    assert still.at(7) == still


def test_alpha_rises_from_no_guidance():
    at = lambda step: float(Alpha(5.0, ramp=4).at(step).scale)
    assert [at(i) for i in range(6)] == pytest.approx([2.0, 3.0, 4.0, 5.0, 5.0, 5.0])
    assert Alpha(5.0).at(0) == Alpha(5.0)


def test_alpha_is_drawn_for_each_example():
    alpha = np.asarray(Alpha(5.0, (2.0, 8.0)).draw(jax.random.key(0), 4000))
    assert alpha.shape == (4000,) and 2 <= alpha.min() < 2.1 and 7.9 < alpha.max() <= 8
    assert alpha.mean() == pytest.approx(5.0, abs=0.1)
    assert Alpha(5.0).draw(jax.random.key(0), 4000) == 5.0


def test_the_recipe_of_an_update():
    """Alpha is half way up its ramp, and half of that is asked for; ranges are a tenth on."""
    m = make_recipe(alpha=3.0, alpha_range=(2.0, 4.0), alpha_ramp=4, tau_relax=10,
                    tau_ca=(0.0, 0.6), tau_ca_end=(0.5, 0.98))
    now = m.at(jnp.int32(1), jnp.float32(0.5))
    assert float(now.alpha.scale) == pytest.approx(1 + 0.5 * (2.0 - 1.0))
    assert [float(a) for a in now.alpha.drawn] == pytest.approx([1.25, 1.75])
    assert [float(a) for a in now.ranges.ca] == pytest.approx([0.05, 0.638])
    assert [float(a) for a in now.ranges.dm] == pytest.approx(m.ranges.dm)
    assert now.schedule is m.schedule and now.steps is m.steps
    plain = make_recipe(alpha=1.7).at(jnp.int32(9), jnp.float32(1.0))
    assert float(plain.alpha.scale) == np.float32(1.7) and plain.alpha.drawn == ()
