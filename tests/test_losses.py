"""The objectives: identities against classic DMD, zeros, signs, and the normaliser's floor.

Signs are checked on Gaussians, where teacher and critic are known in closed form: with data
N(m, s^2) and x_t = t x + (1 - t) noise, the best clean prediction is E[x | x_t].
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, strategies as st

from ddmd_jax.diffusion import process
from ddmd_jax.method.losses import (
    NORMALISERS,
    Normaliser,
    Predictions,
    ca_direction,
    critic_loss,
    directions,
    dm_direction,
    mean_distance,
    normalise,
    proxy_loss,
)

SHAPE = (3, 2, 2, 4)
seeds = st.integers(0, 2**16)
alphas = st.floats(0.0, 12.0, width=32)
taus = st.floats(np.float32(0.02), np.float32(0.9), width=32)
means = st.floats(-2.0, 2.0, width=32)
normalisers = pytest.mark.parametrize('normaliser', NORMALISERS)


def draw(seed, count=4, shape=SHAPE):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32) for _ in range(count)]


def tied(cond, uncond, fake):
    """Predictions at one shared tau and noise: what classic DMD compares."""
    return Predictions(ca_cond=cond, ca_uncond=uncond, dm_cond=cond, dm_fake=fake)


def close(a, b, rtol=1e-5, atol=1e-5):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=rtol, atol=atol)


# --- The identity with classic DMD (paper, section 2) ---


@given(seeds, alphas)
def test_tied_levels_give_classic_dmd(seed, alpha):
    """CA + DM is the guided teacher less the unguided critic, before normalisation."""
    x, cond, uncond, fake = draw(seed)
    u = directions(x, tied(cond, uncond, fake), alpha, Normaliser('none', 1.0))
    guided = uncond + alpha * (cond - uncond)
    close(u.raw_ca + u.raw_dm, guided - fake)
    close(u.ca + u.dm, guided - fake)


def dmd2_gradient(x, cond, uncond, fake, alpha):
    """DMD2's `compute_distribution_matching_loss`, its names: the gradient it descends."""
    pred_real = uncond + alpha * (cond - uncond)
    p_real, p_fake = x - pred_real, x - fake
    return (p_real - p_fake) / np.abs(p_real).mean(axis=(1, 2, 3), keepdims=True)


@given(seeds, alphas)
def test_dmd2_normaliser_gives_the_whole_dmd2_update(seed, alpha):
    x, cond, uncond, fake = draw(seed)
    p = tied(cond, uncond, fake)
    u = directions(x, p, alpha, Normaliser('dmd2', 1e-6))
    want = dmd2_gradient(x, cond, uncond, fake, alpha)
    close(u.ca + u.dm, -want)
    # DMD2's loss is .5 * mse(x, (x - grad).detach()): the same value, and the same gradient.
    value, grad = jax.value_and_grad(lambda z: proxy_loss(z, u.ca + u.dm))(jnp.asarray(x))
    close(value, 0.5 * np.mean(np.square(want)), rtol=1e-4)
    close(grad, want / x.size)


@given(seeds, alphas)
def test_per_term_divides_each_term_at_its_own_level(seed, alpha):
    """By the *conditional* prediction's distance, not the guided one's (METHOD, section 3)."""
    x, ca_cond, ca_uncond, dm_cond, dm_fake = draw(seed, 5)
    p = Predictions(ca_cond, ca_uncond, dm_cond, dm_fake)
    u = directions(x, p, alpha, Normaliser('per_term', 1e-6))
    mean_abs = lambda a: np.abs(a).mean(axis=(1, 2, 3), keepdims=True)
    close(u.ca, (alpha - 1) * (ca_cond - ca_uncond) / mean_abs(x - ca_cond), rtol=1e-4)
    close(u.dm, (dm_cond - dm_fake) / mean_abs(x - dm_cond), rtol=1e-4)


# --- Exact zeros ---


@normalisers
def test_no_guidance_means_no_ca(normaliser):
    """alpha = 1 is no guidance: a factor alpha in place of alpha - 1 shows here."""
    x, cond, uncond, fake = draw(0)
    u = directions(x, tied(cond, uncond, fake), 1.0, Normaliser(normaliser, 0.1))
    assert not np.any(u.ca) and not np.any(u.raw_ca) and np.any(u.dm)


@normalisers
def test_critic_equal_to_teacher_means_no_dm(normaliser):
    x, cond, uncond, _ = draw(1)
    u = directions(x, tied(cond, uncond, cond), 4.0, Normaliser(normaliser, 0.1))
    assert not np.any(u.dm) and not np.any(u.raw_dm) and np.any(u.ca)


def test_alpha_may_differ_between_examples():
    """One recipe draws alpha for each example; a broadcast over channels would be wrong."""
    _, cond, uncond, _ = draw(2)
    alpha = np.array([1.0, 2.0, 5.0], np.float32)[:, None, None, None]
    got = np.asarray(ca_direction(cond, uncond, alpha))
    assert not got[0].any()
    close(got[2], 4 * (cond - uncond)[2])


# --- The proxy loss ---


@given(seeds)
def test_proxy_gradient_is_minus_the_direction(seed):
    """Descending moves the sample along the direction; nothing flows into the direction."""
    x, direction = (jnp.asarray(a) for a in draw(seed, 2))
    grad, into_direction = jax.grad(proxy_loss, argnums=(0, 1))(x, direction)
    close(grad, -direction / x.size, atol=1e-7)
    assert not np.any(into_direction)


def test_predictions_get_no_gradient():
    """Teacher and critic see the student's sample: none of that path may be trained."""
    x, *rest = (jnp.asarray(a) for a in draw(3, 5))

    def loss(x, p):
        update = directions(x, p, 4.0, Normaliser('per_term', 0.1))
        return proxy_loss(jax.lax.stop_gradient(x), update.ca + update.dm)

    def total(x, p):
        u = directions(x, p, 4.0, Normaliser('per_term', 0.1))
        return jnp.sum(u.ca + u.dm + u.raw_ca + u.raw_dm)

    for of in (loss, total):  # the loss stops what reaches its target, and so do the directions
        grads = jax.grad(of, argnums=(0, 1))(x, Predictions(*rest))
        assert not any(np.any(g) for g in jax.tree.leaves(grads))


def test_weights_scale_their_own_term():
    x, *rest = draw(4, 5)
    u = directions(x, Predictions(*rest), 4.0, Normaliser('per_term', 0.1))
    loss = lambda z, ca, dm: proxy_loss(z, ca * u.ca + dm * u.dm)
    grad = lambda ca, dm: jax.grad(loss)(jnp.asarray(x), ca, dm) * x.size
    close(grad(2.0, 0.0), -2 * u.ca)
    close(grad(0.0, 3.0), -3 * u.dm)


# --- Signs, on Gaussians ---


def posterior_mean(x_t, t, m, s):
    """E[x | x_t] for data N(m, s^2): the perfect clean prediction."""
    gain = s**2 * t / ((t * s) ** 2 + (1 - t) ** 2)
    return m + gain * (x_t - t * m)


def student_gradient(student, *, cond, uncond, tau=(0.3, 0.5), weights=(1.0, 1.0),
                     normaliser='none', alpha=3.0, seed=0):
    """Gradient of (mu, sigma) of a student ``mu + sigma eps`` whose critic is perfect.

    `cond` and `uncond` are (mean, width) of the teacher's conditional and unconditional data.
    """
    key, numbers = jax.random.key(seed), (cond, uncond, tau, weights, alpha)
    return np.asarray(gaussian_gradient(np.float32(student), numbers, key, normaliser))


@functools.partial(jax.jit, static_argnames='normaliser')  # compiled once for all examples
def gaussian_gradient(student, numbers, key, normaliser):
    (cond, uncond, tau, weights, alpha), keys = numbers, jax.random.split(key, 3)
    eps, noise_ca, noise_dm = (jax.random.normal(k, (64, 2, 2, 4)) for k in keys)

    def loss(student):
        x = student[0] + student[1] * eps
        x_ca, x_dm = (process.renoise(x, t, n)
                      for t, n in zip(tau, (noise_ca, noise_dm), strict=True))
        p = Predictions(
            ca_cond=posterior_mean(x_ca, tau[0], *cond),
            ca_uncond=posterior_mean(x_ca, tau[0], *uncond),
            dm_cond=posterior_mean(x_dm, tau[1], *cond),
            dm_fake=posterior_mean(x_dm, tau[1], *student))
        update = directions(x, p, alpha, Normaliser(normaliser, 1e-3))
        return proxy_loss(x, weights[0] * update.ca + weights[1] * update.dm)

    return jax.grad(loss)(student)


@normalisers
@given(mu=means, m=means, tau=taus)
def test_dm_moves_the_student_to_the_teacher(normaliser, mu, m, tau):
    """One SGD step, any levels: after a flipped sign a run only looks like 'never trains'."""
    assume(abs(m - mu) > 0.05)
    grad = student_gradient((mu, 0.7), cond=(m, 0.7), uncond=(-m, 0.7), tau=(tau, tau),
                            weights=(0.0, 1.0), normaliser=normaliser)
    step = -0.01 * grad[0]
    assert step * (m - mu) > 0
    assert abs(mu + step - m) < abs(mu - m)


@normalisers
@given(mu=means, m_cond=means, m_uncond=means, tau=taus)
def test_ca_moves_from_unconditional_to_conditional(normaliser, mu, m_cond, m_uncond, tau):
    """Wherever the student stands: CA has no fixed point, not even at the teacher."""
    assume(abs(m_cond - m_uncond) > 0.05)
    grad = student_gradient((mu, 0.7), cond=(m_cond, 0.7), uncond=(m_uncond, 0.7),
                            tau=(tau, tau), weights=(1.0, 0.0), normaliser=normaliser)
    assert -grad[0] * (m_cond - m_uncond) > 0


@pytest.mark.parametrize('sigma, sign', [(1.4, -1), (0.3, 1)])
def test_dm_corrects_the_spread(sigma, sign):
    """The shield's work: a student that is too wide narrows, one that is too narrow widens."""
    grad = student_gradient((1.0, sigma), cond=(1.0, 0.7), uncond=(0.0, 0.7), weights=(0.0, 1.0))
    assert -grad[1] * sign > 1e-3


def descend(steps, **kwargs):
    student = np.array([-1.0, 1.2], np.float32)
    for i in range(steps):
        student = student - student_gradient(student, seed=i, **kwargs)  # SGD, lr 1
    return student


def test_dm_alone_ends_at_the_teacher():
    """Not only the first step: mean and spread of the data are the fixed point."""
    close(descend(40, cond=(1.0, 0.7), uncond=(0.0, 0.7), weights=(0.0, 1.0)), [1.0, 0.7],
          atol=0.05)


def test_ca_and_dm_end_where_guidance_points():
    """Equal levels balance at cond + (alpha - 1)(cond - uncond): guidance baked in."""
    mean, _ = descend(40, cond=(1.0, 0.7), uncond=(0.5, 0.7), tau=(0.4, 0.4), alpha=3.0)
    assert mean == pytest.approx(1.0 + 2.0 * 0.5, abs=0.1)


# --- The normaliser ---


def test_normaliser_is_finite_at_the_clean_end_in_bf16():
    """x_hat = x there but for rounding: the plain ratio is 0 / 0, which peers met as NaN."""
    x = jnp.asarray(draw(5, 1)[0], jnp.bfloat16)
    nudged = x + jnp.asarray(0.004, jnp.bfloat16)
    p = Predictions(ca_cond=x, ca_uncond=nudged, dm_cond=x, dm_fake=nudged)
    u = directions(x, p, 4.0, Normaliser('per_term', 0.02))
    assert np.isfinite(u.ca).all() and np.isfinite(u.dm).all()
    assert float(u.floor_hit_ca) == float(u.floor_hit_dm) == 1.0
    wide = lambda a: np.asarray(a.astype(jnp.float32))
    close(u.dm, (wide(x) - wide(nudged)) / 0.02, rtol=1e-2)


def test_bf16_predictions_are_compared_in_fp32():
    """The update of bf16 predictions is that of the same numbers in fp32, bit for bit."""
    half = [jnp.asarray(a, jnp.bfloat16) for a in draw(6, 5)]
    wide = [a.astype(jnp.float32) for a in half]
    for normaliser in NORMALISERS:
        got, want = (directions(a[0], Predictions(*a[1:]), 3.3, Normaliser(normaliser, 0.1))
                     for a in (half, wide))
        for field in ('ca', 'dm', 'raw_ca', 'raw_dm'):
            assert getattr(got, field).dtype == jnp.float32
            np.testing.assert_array_equal(getattr(got, field), getattr(want, field))


def test_distances_are_summed_in_fp32():
    """A bf16 sum of 4096 small gaps stops growing long before its end."""
    x = jnp.zeros((1, 32, 32, 4), jnp.bfloat16)
    got = mean_distance(x, x + jnp.asarray(0.01, jnp.bfloat16))
    assert got.dtype == jnp.float32
    close(got, [float(jnp.asarray(0.01, jnp.bfloat16))], rtol=1e-6)


def test_floor_binds_where_it_should_and_is_counted():
    direction = jnp.ones((4, 2, 2, 1))
    got, rate = normalise(direction, jnp.array([0.0, 0.05, 0.2, 4.0]), floor=0.1)
    close(got[:, 0, 0, 0], [10.0, 10.0, 5.0, 0.25])
    assert float(rate) == 0.5


@given(seeds, st.integers(0, 2))
def test_examples_are_normalised_one_by_one(seed, row):
    """Scaling one example's distance must not change its neighbours' update."""
    x, *rest = draw(seed, 5)
    other = [a.copy() for a in (x, *rest)]
    other[0][row] += 5.0
    per_term = Normaliser('per_term', 0.01)
    one, two = (np.asarray(directions(a[0], Predictions(*a[1:]), 4.0, per_term).dm)
                for a in ((x, *rest), other))
    same = [np.array_equal(a, b) for a, b in zip(one, two, strict=True)]
    assert same == [i != row for i in range(3)]


# --- The critic ---


@given(seeds, taus)
def test_velocity_weighting_is_flow_matching(seed, tau):
    """The loss the teacher was trained with: mean square error of the velocity."""
    x, noise, v = draw(seed, 3)
    t = np.full(3, tau, np.float32)
    x_hat = process.to_clean(process.renoise(x, t, noise), v, t)
    want = np.mean(np.square(v - (x - noise)))
    close(critic_loss(x_hat, x, t, 'velocity'), want, rtol=1e-3)
    close(critic_loss(x_hat, x, t, 'clean'), want * (1 - tau) ** 2, rtol=1e-3)


def test_velocity_weighting_is_per_example():
    x, x_hat = draw(7, 2)
    t = np.array([0.0, 0.5, 0.9], np.float32)
    per_example = np.square(x - x_hat).mean(axis=(1, 2, 3)) / (1 - t) ** 2
    close(critic_loss(x_hat, x, t), per_example.mean(), rtol=1e-4)


def test_noise_weighting_is_the_error_of_the_noise():
    """As a network that predicts noise is trained: x_t = t x + (1 - t) noise, twice."""
    rng = np.random.default_rng(0)
    x, noise, wrong = rng.standard_normal((3, 4, 3, 3, 2)).astype(np.float32)
    t = np.asarray([0.1, 0.4, 0.8, 0.97], np.float32)
    at = t[:, None, None, None]
    x_hat = (at * x + (1 - at) * noise - (1 - at) * wrong) / at
    close(critic_loss(x_hat, x, t, 'noise'), np.mean((wrong - noise)**2), rtol=1e-4)


def test_critic_loss_is_finite_at_the_clean_end():
    x, x_hat = draw(8, 2)
    assert np.isfinite(critic_loss(x_hat, x, np.ones(3, np.float32)))


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float32])
def test_critic_loss_is_fp32(dtype):
    x, x_hat = (jnp.asarray(a, dtype) for a in draw(9, 2))
    assert critic_loss(x_hat, x, jnp.full(3, 0.5)).dtype == jnp.float32


# --- Names ---


def test_unknown_names_are_refused():
    x, *rest = draw(10, 5)
    with pytest.raises(ValueError, match='unknown normaliser .*per_term'):
        directions(x, Predictions(*rest), 4.0, Normaliser('dmd', 0.1))
    with pytest.raises(ValueError, match='unknown weighting .*velocity'):
        critic_loss(x, rest[0], np.full(3, 0.5, np.float32), 'speed')


def test_dm_direction_points_to_the_teacher():
    _, real, fake, _ = draw(11)
    close(dm_direction(real, fake), real - fake)
