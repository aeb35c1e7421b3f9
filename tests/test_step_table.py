"""The time map of a teacher with discrete steps: whole, in DMD2's places, cleaner where bounded."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

from ddmd_jax.diffusion import process, sampling
from ddmd_jax.diffusion.time import FewSteps, Shift, StepTable, chosen
from ddmd_jax.method.schedules import SCHEDULES, Ranges, draw_between
from ddmd_jax.util.errors import UserError

SDXL = StepTable()
BOUNDED = {'coupled_shared': (False, False), 'decoupled_full': (False, False),
           'decoupled_constrained': (True, True), 'decoupled_hybrid': (True, False)}


def test_four_steps_are_dmd2s():
    few = FewSteps(SDXL, 4)
    np.testing.assert_array_equal(SDXL.step_of(few.times), [999, 749, 499, 249])
    np.testing.assert_allclose(few.uniform, [0, 0.25, 0.5, 0.75])
    one = StepTable(first=399)
    np.testing.assert_array_equal(one.step_of(FewSteps(one, 1).times), [399])


@pytest.mark.parametrize('n', [1, 3, 7, 8, 10, 1000])
def test_steps_are_equally_far_apart(n):
    k = np.asarray(SDXL.step_of(FewSteps(SDXL, n).times))
    want = 999 - np.arange(n) * 1000 / n
    assert k[0] == 999 and np.abs(k - want).max() < 1
    with pytest.raises(ValueError, match='1 to 1000 steps'):
        SDXL.steps(1001)


def test_every_step_has_its_time_and_every_time_its_step():
    k = np.arange(1000)
    np.testing.assert_array_equal(SDXL.step_of(jnp.asarray(SDXL.times)), k)
    np.testing.assert_array_equal(SDXL(jnp.asarray((999 - k) / 1000)), SDXL.times)
    np.testing.assert_array_equal(SDXL(jnp.asarray((999 - k + 0.99) / 1000)), SDXL.times)
    assert (np.diff(SDXL.times) < 0).all() and SDXL(1.0) == 1.0


def test_uniform_draws_are_whole_steps():
    """DMD2's tau is an integer, uniform on {20, ..., 980}: [.019, .98) of uniform time."""
    tau = SDXL(draw_between(jax.random.key(0), 0.019, 0.98, (200_000,)))
    k, counts = np.unique(np.asarray(SDXL.step_of(tau)), return_counts=True)
    assert np.isin(np.unique(tau), SDXL.times).all()
    np.testing.assert_array_equal(k, np.arange(20, 981))
    expected = 200_000 / 961  # chi-squared of 960 degrees: one in a thousand is above 1100
    assert np.sum((counts - expected) ** 2 / expected) < 1100


@functools.partial(jax.jit, static_argnums=(0, 1))
def levels(name, table, key, u, ca, dm):
    return [table.step_of(tau) for tau in SCHEDULES[name].levels(
        jax.random.split(key), u, Ranges(ca, dm), table)]


@given(st.sampled_from(sorted(SCHEDULES)), st.sampled_from([1, 2, 4, 5, 8]),
       st.floats(0.0, 0.5), st.floats(0.9, 0.999), st.integers(0, 2**16))
def test_bounded_levels_are_smaller_steps(name, n, low, high, seed):
    """Under the hybrid schedule tau_CA is a smaller integer than the student's step, always."""
    steps = np.resize(np.asarray(SDXL.steps(n)), 64)
    own = np.asarray(SDXL.step_of(SDXL(steps)))
    for k, bounded in zip(levels(name, SDXL, jax.random.key(seed), steps, (low, high),
                                 (low, high)), BOUNDED[name], strict=True):
        k = np.asarray(k)
        assert (k >= 0).all() and (k <= 999 - np.floor(1000 * low - 1e-3)).all()
        if bounded:
            assert (k < own).all()


def test_the_nearest_smaller_step_is_drawn_and_the_own_is_not():
    """A bound at the student's own step would draw it once in 250 at step 249."""
    u = np.full(20_000, 0.75, np.float32)
    ca, dm = levels('decoupled_hybrid', SDXL, jax.random.key(1), u, (0.0, 0.999), (0.0, 0.999))
    assert np.max(ca) == 248 and np.max(dm) > 990
    assert Shift(3.0).after(0.25) == 0.25


def test_the_first_input_is_unit_noise_for_the_network():
    noise = np.random.default_rng(0).standard_normal((2, 3, 3, 4)).astype(np.float32)
    for table, n in ((SDXL, 4), (StepTable(first=399), 1)):
        few = FewSteps(table, n)
        x_vp = table.first_input(noise) / process.preserved(few.times[0], noise)
        np.testing.assert_allclose(x_vp, noise, rtol=1e-6)
    seen = []
    sampling.student_inputs(lambda z, t, cond: seen.append((z, t)) or 0 * z, {}, FewSteps(SDXL, 2),
                            jax.random.key(0), (2, 3, 3, 4))
    z, t = seen[0]
    assert SDXL.step_of(t[0]) == 999
    np.testing.assert_allclose(z, SDXL.first_input(
        jax.random.normal(jax.random.split(jax.random.key(0))[0], (2, 3, 3, 4)))[1:])


@pytest.mark.parametrize('spacing, steps', [
    ('leading', [801, 601, 401, 201, 1]), ('trailing', [999, 799, 599, 399, 199])])
def test_the_teachers_own_grid(spacing, steps):
    grid = StepTable(spacing=spacing).grid(5)
    np.testing.assert_array_equal(SDXL.step_of(grid[:-1]), steps)
    assert grid[-1] == 1


def test_a_run_may_name_its_first_step():
    assert chosen(SDXL, None) is SDXL and chosen(SDXL, None, 999) == SDXL
    one = FewSteps(chosen(SDXL, None, 399), 1)
    np.testing.assert_array_equal(SDXL.step_of(one.times), [399])
    for time, shift in ((SDXL, 3.0), (Shift(3.0), None)):
        with pytest.raises(UserError, match='first_step=399 is no step of Shift'):
            chosen(time, shift, 399)
    with pytest.raises(UserError, match='first_step=1000 is no step of StepTable'):
        chosen(SDXL, None, 1000)


@pytest.mark.parametrize('fields', [
    {'beta_schedule': 'cosine'}, {'spacing': 'karras'}, {'beta_end': 1.0}, {'first': 1000}])
def test_no_such_table(fields):
    with pytest.raises(ValueError):
        StepTable(**fields)
