"""The paper's regularisers beside CA and DM: mean-variance and GAN, in closed form.

Each stands against a slow float64 version of itself in numpy, and its gradient against finite
differences of that. `test_algorithm.py` asks whether the objectives add up the right ones.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, strategies as st
from ml_collections import ConfigDict

from ddmd_jax.data.batch import CondSpec
from ddmd_jax.diffusion.time import Shift
from ddmd_jax.families.base import Latents, Teacher
from ddmd_jax.families.emoji import teacher as emoji
from ddmd_jax.method import regularisers
from ddmd_jax.method.regularisers.gan import critic_gan_loss, r1_penalty, student_gan_loss
from ddmd_jax.method.regularisers.mean_variance import MeanVariance, mean_variance_kl, moments

BATCH = 4
SHAPE = (BATCH, *tiny.SHAPE)
seeds = st.integers(0, 2**16)


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape or (3, 4, 4, 2))


def slopes(f, x, h=1e-5):
    """Central differences of a float64 function of an array."""
    out = np.zeros_like(x)
    for i in np.ndindex(*x.shape):
        up, down = x.copy(), x.copy()
        up[i] += h
        down[i] -= h
        out[i] = (f(up) - f(down)) / (2 * h)
    return out


def close(a, b, rtol=2e-5, atol=2e-6):
    np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=rtol, atol=atol)


# --- Mean and variance ---


def slow_kl(x, mean, variance):
    total = 0.0
    for sample in x.reshape(len(x), -1):
        mu = sum(sample) / len(sample)
        var = sum((v - mu) ** 2 for v in sample) / len(sample)
        total += 0.5 * ((var + (mu - mean) ** 2) / variance - 1 - np.log(var / variance))
    return total / len(x)


@given(seeds, st.floats(-1, 1), st.floats(0.1, 2))
def test_mean_variance_is_the_divergence_of_gaussians(seed, mean, variance):
    x = draw(seed)
    close(mean_variance_kl(jnp.asarray(x, jnp.float32), mean, variance), slow_kl(x, mean, variance),
          rtol=1e-4, atol=1e-5)


def test_mean_variance_gradient_by_finite_differences():
    x = draw(1, 2, 3, 3, 2)
    grad = jax.grad(mean_variance_kl)(jnp.asarray(x, jnp.float32), 0.3, 0.5)
    close(grad, slopes(lambda x: slow_kl(x, 0.3, 0.5), x))


def test_mean_variance_rests_at_its_targets_and_pulls_towards_them():
    """Samples of the right moments are left alone; wider ones narrow, shifted ones come back."""
    x = draw(2, 1, 8, 8, 3)
    right = (x - x.mean()) / x.std() * 0.7 + 0.2
    loss = lambda x: mean_variance_kl(jnp.asarray(x, jnp.float32), 0.2, 0.49)
    assert abs(float(loss(right))) < 1e-6
    assert np.abs(jax.grad(loss)(jnp.asarray(right, jnp.float32))).max() < 1e-6
    for wrong in (right * 1.5, right * 0.5, right + 0.4):
        moved = wrong - 2.0 * np.asarray(jax.grad(loss)(jnp.asarray(wrong, jnp.float32)))
        assert loss(moved) < loss(wrong)


def test_mean_variance_of_a_flat_picture_is_finite():
    flat = jnp.full((2, 4, 4, 3), 0.5)
    value, grad = jax.value_and_grad(mean_variance_kl)(flat, 0.0, 1.0)
    assert np.isfinite(value) and np.isfinite(grad).all()


def test_moments_are_of_each_sample_in_fp32():
    x = draw(3)
    mean, var = moments(jnp.asarray(x, jnp.bfloat16))
    assert mean.dtype == var.dtype == jnp.float32
    close(mean, x.mean((1, 2, 3)), atol=5e-3)
    close(var, x.var((1, 2, 3)), rtol=2e-2)


# --- GAN ---


def softplus(x):
    return np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0)


@given(seeds)
def test_gan_losses_are_dmd2s(seed):
    real, fake = draw(seed, 5) * 3, draw(seed + 1, 5) * 3
    narrow = lambda x: jnp.asarray(x, jnp.float32)
    close(student_gan_loss(narrow(fake)), softplus(-fake).mean())
    close(critic_gan_loss(narrow(real), narrow(fake)),
          softplus(-real).mean() + softplus(fake).mean())
    for one, slow in ((lambda r: critic_gan_loss(r, narrow(fake)), lambda r: softplus(-r).mean()),
                      (lambda f: critic_gan_loss(narrow(real), f), lambda f: softplus(f).mean()),
                      (student_gan_loss, lambda f: softplus(-f).mean())):
        close(jax.grad(one)(narrow(real)), slopes(slow, real))


def test_a_head_that_cannot_tell_pays_two_log_two():
    close(critic_gan_loss(jnp.zeros(3), jnp.zeros(3)), 2 * np.log(2))


def test_the_student_wants_what_the_critic_wants_to_prevent():
    fake = jnp.asarray(draw(4, 6), jnp.float32)
    student = jax.grad(student_gan_loss)(fake)
    critic = jax.grad(lambda f: critic_gan_loss(fake, f))(fake)
    assert (student < 0).all() and (critic > 0).all()


def test_losses_of_huge_logits_are_finite():
    for x in (1e4, -1e4):
        assert np.isfinite(critic_gan_loss(jnp.full(2, x), jnp.full(2, -x)))


def test_r1_is_half_the_squared_slope_of_a_sample():
    x = draw(5)
    close(r1_penalty(jnp.asarray(x, jnp.float32)),
          0.5 * np.mean([np.sum(sample**2) for sample in x]))


def test_features_are_what_the_head_of_the_network_reads(params):
    """Same trunk: the velocity is a function of these tokens, whose number is the image's."""
    x = jnp.asarray(draw(9, *SHAPE), jnp.float32)
    features = jax.eval_shape(emoji.make_features(tiny.MODEL), params[0], x, jnp.full(BATCH, 0.3),
                              tiny.make_cond(BATCH))
    patch = tiny.MODEL['denoiser']['patch_size']
    assert features.shape == (
        BATCH, (SHAPE[1] // patch) ** 2, tiny.MODEL['denoiser']['hidden_size'])


# --- From a config ---


def teacher_of(moments):
    return Teacher('tiny', tiny.small_params()[0], None, Latents(tiny.SHAPE, moments=moments),
                   CondSpec.text(16), Shift(), 'tiny', (), features=tiny.small_tokens)


def section(**fields):
    return ConfigDict({'regularisers': ('mean_variance', 'gan')} | fields)


OFF = {'mean_variance': {'weight': 0.0, 'mean': None, 'variance': None},
       'gan': {'weight': 0.0, 'critic_weight': 0.01, 'r1': 0.0, 'tau': (0.0, 0.98)}}


def test_a_weight_of_zero_leaves_a_regulariser_out():
    build = lambda **on: regularisers.build(
        section(**{k: v | on.get(k, {}) for k, v in OFF.items()}), teacher_of((0.2, 0.5)))
    assert build() == {}
    assert list(build(gan={'weight': 0.1})) == ['gan']
    assert list(build(gan={'weight': 0.1}, mean_variance={'weight': 1.0})) == [
        'mean_variance', 'gan']


def test_moments_that_a_config_leaves_open_are_the_teachers():
    at = lambda **fields: MeanVariance(
        ConfigDict(OFF['mean_variance'] | fields), teacher_of((0.2, 0.5)))
    assert (at().mean, at().variance) == (0.2, 0.5)
    assert (at(mean=0.0).mean, at(variance=0.7).variance) == (0.0, 0.7)


@pytest.mark.parametrize('name, words', [
    ('no_such_module', "regulariser 'no_such_module' cannot be imported"),
    (__name__, 'cannot be imported')])
def test_what_is_no_regulariser_is_refused_in_one_line(name, words):
    with pytest.raises(ValueError, match=words) as e:
        regularisers.get(name)
    assert len(str(e.value).splitlines()) == 1
