"""The paper's four re-noising schedules, in every step and under every shift."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from tiny import unshift

from ddmd_jax.diffusion.time import Shift
from ddmd_jax.method.schedules import SCHEDULES, draw_levels, draw_tau

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
    levels = draw_levels(jax.random.key(seed), SCHEDULES[name], t, ca, dm, shift)
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


@given(st.sampled_from(NAMES), st.sampled_from([1, 4, 8]), st.sampled_from([1.0, 3.0, 6.0]),
       st.tuples(st.floats(0.0, 0.4), st.floats(0.9, 1.0)),
       st.tuples(st.floats(0.0, 0.4), st.floats(0.9, 1.0)), st.integers(0, 2**16))
def test_spans_are_respected(name, steps, shift, ca, dm, seed):
    """Each term keeps to its own span, its lower end raised to the step where bounded."""
    t = jnp.repeat(Shift().steps(steps), 64)
    levels = draw_levels(jax.random.key(seed), SCHEDULES[name], t, ca, dm, shift)
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
    tau = draw_tau(jax.random.key(0), jnp.full((DRAWS,), 0.75), True, FULL, 3.0)
    assert float(tau.min()) == pytest.approx(0.5, abs=5e-3)
    assert float(tau.max()) == pytest.approx(1.0, abs=5e-3)
    assert float(tau.min()) >= 0.5 - 1e-6


def test_different_keys_draw_different_levels():
    """Fixed levels would pass every range check of this file."""
    _, (one, _) = draw('decoupled_hybrid', 1.0, seed=0)
    _, (two, _) = draw('decoupled_hybrid', 1.0, seed=1)
    assert np.abs(one - two).mean() > 0.05
