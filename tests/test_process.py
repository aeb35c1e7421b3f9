"""Flow matching's maps and the time shift: properties over all times and shifts."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from tiny import unshift

from ddmd_jax.diffusion import process
from ddmd_jax.diffusion.time import Shift

SHAPE = (3, 2, 2, 4)
seeds = st.integers(0, 2**16)
shifts = st.floats(0.25, 8.0, width=32)
unit = st.floats(0.0, 1.0, width=32)
# Divisions by 1 - t multiply rounding by its inverse; below .02 nobody asks for a velocity.
noisy = st.lists(st.floats(0.0, np.float32(0.98), width=32), min_size=3, max_size=3)


def draw(seed):
    """Clean data and noise: one array each for three examples."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(2, *SHAPE)).astype(np.float32)


def close(a, b, atol=1e-5):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=atol, rtol=1e-5)


@given(seeds, noisy)
def test_true_velocity_recovers_the_data(seed, times):
    """to_clean undoes renoise: wrong signs or swapped weights in either break this."""
    x, noise = draw(seed)
    t = np.float32(times)
    x_t = process.renoise(x, t, noise)
    close(process.to_clean(x_t, process.velocity(x, noise), t), x)


@given(seeds, noisy)
def test_to_velocity_inverts_to_clean(seed, times):
    x_t, v = draw(seed)
    t = np.float32(times)
    close(process.to_velocity(x_t, process.to_clean(x_t, v, t), t), v, atol=2e-4)


@given(seeds, noisy)
def test_each_example_has_its_own_time(seed, times):
    """A time that broadcast over the wrong axis would still have the right shape."""
    x, noise = draw(seed)
    want = [t * a + (1 - t) * b for t, a, b in zip(np.float32(times), x, noise, strict=True)]
    close(process.renoise(x, np.float32(times), noise), want)


def test_ends_of_the_process():
    """The paper's convention: t = 0 is pure noise, t = 1 is clean. Sigma's is the reverse."""
    x, noise = draw(0)
    np.testing.assert_array_equal(process.renoise(x, 0.0, noise), noise)
    np.testing.assert_array_equal(process.renoise(x, 1.0, noise), x)


def test_bf16_inputs_are_mixed_in_fp32():
    """At t = .98 bf16 would round the noise weight itself, and drop most of the noise."""
    x, noise = (jnp.asarray(a, jnp.bfloat16) for a in draw(1))
    t = np.full(3, 0.98, np.float32)
    x_t = process.renoise(x, t, noise)
    assert x_t.dtype == jnp.float32
    wide = lambda a: np.asarray(a.astype(jnp.float32))
    np.testing.assert_allclose(x_t, 0.98 * wide(x) + 0.02 * wide(noise), rtol=1e-5, atol=1e-6)


def test_velocity_is_finite_at_the_clean_end():
    x, _ = draw(2)
    assert np.isfinite(process.to_velocity(x, x + 0.1, 1.0)).all()


@given(unit, shifts)
def test_unshift_inverts_shift(t, shift):
    close(unshift(Shift(shift)(t), shift), t)
    close(Shift(shift)(unshift(t, shift)), t)


def test_the_authors_example():
    """METHOD, section 3: the last of four steps is at .75, which shift 3 turns into .5."""
    assert float(Shift().steps(4)[-1]) == 0.75
    assert float(Shift(3.0)(0.75)) == pytest.approx(0.5, abs=1e-7)


@given(st.lists(unit, min_size=2, max_size=2, unique=True).map(sorted), shifts)
def test_shift_is_monotone(pair, shift):
    """Order must survive, or 'cleaner than t' before the shift would not mean so after it."""
    low, high = np.asarray(Shift(shift)(np.float32(pair)))
    assert high >= low - 1e-7
    if pair[1] - pair[0] > 1e-3:
        assert high > low


@given(st.floats(np.float32(0.01), np.float32(0.99), width=32), st.floats(1.5, 8.0, width=32))
def test_shift_above_one_moves_towards_noise(t, shift):
    assert float(Shift(shift)(t)) < t < float(unshift(t, shift))


@given(shifts)
def test_ends_stay_where_they_are(shift):
    """The shift's exactly: samplers compare times with 1.0, and end on it."""
    ends = jnp.array([0.0, 1.0])
    np.testing.assert_array_equal(Shift(shift)(ends), ends)
    close(unshift(ends, shift), ends)


@given(st.sampled_from([1, 2, 4, 7, 50]))
def test_step_times(steps):
    """Noise first, evenly spaced, the clean end left out."""
    np.testing.assert_allclose(
        Shift().steps(steps), np.linspace(0, 1, steps, endpoint=False), atol=1e-7)


@pytest.mark.parametrize('steps', [0, -1])
def test_step_times_refuses(steps):
    with pytest.raises(ValueError, match='at least 1 step'):
        Shift().steps(steps)
