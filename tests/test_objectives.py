"""Everything beside CA and DM: mean-variance, GAN, alpha and ranges that move, the merged critic.

Each objective stands against a slow float64 version of itself in numpy, and where nothing is
stopped its gradient against finite differences of that. The step is then asked, with a spy for a
network, whether it adds up the right ones.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from ddmd_jax.losses.gan import critic_gan_loss, r1_penalty, student_gan_loss
from ddmd_jax.losses.mean_variance import mean_variance_kl, moments
from ddmd_jax.train.step import critic_objective, generator_loss
from hypothesis import given, strategies as st

from ddmd_jax.data.conditioning import REAL
from ddmd_jax.diffusion import sampling
from ddmd_jax.diffusion.time import FewSteps, Shift
from ddmd_jax.families.emoji import teacher as emoji
from ddmd_jax.method import schedules
from ddmd_jax.method.recipe import Gan, MeanVariance
from ddmd_jax.models import discriminator
from ddmd_jax.parallel import sharding
from ddmd_jax.train import state as state_lib, step

pytestmark = pytest.mark.usefixtures('quick_compile')
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


# --- What changes over a run ---


def test_a_range_relaxes_at_a_constant_pace_and_stays():
    at = lambda step: [float(v) for v in schedules.relaxed((0.0, 0.1), (0.4, 0.9), 100, step)]
    assert at(0) == pytest.approx([0.0, 0.1]) and at(50) == pytest.approx([0.2, 0.5])
    assert at(100) == at(10_000) == pytest.approx([0.4, 0.9])
    assert schedules.relaxed((0.0, 0.1), (0.4, 0.9), 0, 7) == (0.0, 0.1)


def test_alpha_rises_from_no_guidance():
    at = lambda step: float(schedules.ramped(5.0, 4, step))
    assert [at(i) for i in range(6)] == pytest.approx([2.0, 3.0, 4.0, 5.0, 5.0, 5.0])
    assert schedules.ramped(5.0, 0, 0) == 5.0


def test_alpha_is_drawn_for_each_example():
    alpha = np.asarray(schedules.draw_alpha(jax.random.key(0), (2.0, 8.0), 4000))
    assert 2 <= alpha.min() < 2.1 and 7.9 < alpha.max() <= 8
    assert alpha.mean() == pytest.approx(5.0, abs=0.1)


def test_the_recipe_of_an_update():
    m = tiny.make_method(alpha=3.0, alpha_range=(2.0, 4.0), alpha_ramp=4, tau_relax=10,
                         tau_ca=(0.0, 0.6), tau_ca_end=(0.5, 0.98))
    now = m.at(jnp.int32(1), jnp.float32(0.5))
    assert float(now.alpha) == pytest.approx(1 + 0.5 * (2.0 - 1.0))  # half way up, half of it asked
    assert [float(a) for a in now.alpha_range] == pytest.approx([1.25, 1.75])
    assert [float(a) for a in now.tau_ca] == pytest.approx([0.05, 0.638])
    assert now.tau_dm == m.tau_dm
    plain = tiny.make_method(alpha=1.7).at(jnp.int32(9), jnp.float32(1.0))
    assert float(plain.alpha) == np.float32(1.7) and plain.alpha_range == ()


# --- The step adds them up ---


def spy_predict(params, x_t, t, cond):
    """The student is its parameters; teacher and critic say something of their input."""
    if 'x' in params:
        return params['x'][:x_t.shape[0]] + 0.0 * x_t
    return params['a'] * x_t + params['b'] + 5.0 * jnp.mean(cond['embeds'], (1, 2))[
        :, None, None, None]


def spy_classify(trunk, head, x_t, t, cond):
    return jnp.sum(jnp.sin(x_t) * head['w'], (1, 2, 3)) * trunk['a'] + t


TEACHER = {'a': jnp.float32(0.6), 'b': jnp.float32(0.05)}
CRITIC = {'a': jnp.float32(0.5), 'b': jnp.float32(-0.1)}
HEAD = {'w': jnp.float32(0.3)}
GAN = Gan(0.7, 0.2, 0.0, (0.1, 0.9), spy_classify)


def student_of(seed=6):
    return {'x': jnp.asarray(draw(seed, *SHAPE), jnp.float32)}


def gradient(m, critic=CRITIC, seed=0, student=None, num_steps=1):
    """Gradient of the generator's loss in its samples, times their number."""
    m = dataclasses.replace(m, num_steps=num_steps)
    frozen = {'teacher': TEACHER, 'null': tiny.make_null()}
    loss = lambda s: generator_loss(spy_predict, s, critic, frozen, tiny.make_cond(BATCH), m,
                                    jax.random.key(seed), SHAPE, HEAD)[0]
    return np.asarray(jax.grad(loss)(student or student_of())['x'], np.float64) * np.prod(SHAPE)


def test_every_term_enters_with_its_weight():
    """Two recipes with one more term each differ by that term, as numpy has it in float64."""
    base = gradient(tiny.make_method())
    x = np.asarray(student_of()['x'], np.float64)
    mv = gradient(tiny.make_method(mean_variance=MeanVariance(0.4, 0.1, 0.6)))
    inner = np.prod(SHAPE[1:])
    mu, var = x.mean((1, 2, 3), keepdims=True), x.var((1, 2, 3), keepdims=True)
    # d KL / d x of one sample: (mu - m*) / (n v*) + (x - mu) (1 / v* - 1 / v) / n; B of them
    want = (0.4 / (BATCH * inner)) * ((mu - 0.1) / 0.6 + (x - mu) * (1 / 0.6 - 1 / var))
    close(mv - base, want * np.prod(SHAPE), rtol=1e-3, atol=1e-4)

    gan = gradient(tiny.make_method(gan=GAN))
    k_tau, k_noise = jax.random.split(jax.random.fold_in(jax.random.key(0), step.DRAW_GAN))
    tau = np.asarray(schedules.draw_tau(k_tau, jnp.zeros(BATCH), False, GAN.tau, 1.0), np.float64)
    noise = np.asarray(jax.random.normal(k_noise, SHAPE), np.float64)

    def slow(x):
        x_t = tau[:, None, None, None] * x + (1 - tau[:, None, None, None]) * noise
        return 0.7 * softplus(-((np.sin(x_t) * 0.3).sum((1, 2, 3)) * 0.5 + tau)).mean()

    some = [(0, 1, 2, 0), (1, 7, 7, 2), (3, 0, 0, 1)]
    for i in some:
        one = np.zeros_like(x)
        one[i] = 1e-5
        got = ((gan - base) / np.prod(SHAPE))[i]
        assert got == pytest.approx((slow(x + one) - slow(x - one)) / 2e-5, rel=1e-2, abs=1e-6)


def test_ca_alone_and_dm_alone_are_the_parts_of_both():
    both = gradient(tiny.make_method(weight_ca=0.5, weight_dm=2.0))
    ca = gradient(tiny.make_method(weight_ca=0.5, weight_dm=0.0))
    dm = gradient(tiny.make_method(weight_ca=0.0, weight_dm=2.0))
    assert np.abs(ca).max() > 0.1 and np.abs(dm).max() > 0.1
    close(ca + dm, both, rtol=1e-4, atol=1e-5)


def test_an_observer_is_watched_and_not_listened_to():
    """CA alone with a critic: whatever that says, the student's gradient is the same."""
    m = tiny.make_method(weight_dm=0.0)
    other = {'a': jnp.float32(-3.0), 'b': jnp.float32(9.0)}
    np.testing.assert_array_equal(gradient(m), gradient(m, critic=other))
    assert np.abs(gradient(tiny.make_method()) - gradient(tiny.make_method(), critic=other)).max()


def test_a_drawn_alpha_scales_each_examples_ca():
    """Without a normaliser CA is linear in alpha - 1."""
    recipe = {'weight_dm': 0.0, 'normaliser': 'none'}
    fixed = gradient(tiny.make_method(alpha=2.0, **recipe))
    drawn = gradient(tiny.make_method(alpha_range=(1.5, 5.0), **recipe))
    ratio = np.median(drawn / fixed, axis=(1, 2, 3))
    np.testing.assert_allclose(drawn, fixed * ratio[:, None, None, None], rtol=1e-3, atol=1e-5)
    assert (ratio >= 0.5).all() and (ratio <= 4.0).all() and np.ptp(ratio) > 0.1


def classic_dmd2(m, student, key, cond):
    """DMD2's loss written out with its own names, on the draws that the key gives."""
    k_sim, k_tau, k_noise, _ = jax.random.split(key, 4)
    z, k = sampling.student_inputs(
        functools.partial(spy_predict, student), cond, FewSteps(Shift(m.shift), m.num_steps), k_sim,
        SHAPE)
    latents = spy_predict(student, z, m.times[k], cond)
    t = Shift().steps(m.num_steps)[k]
    tau, _ = schedules.draw_levels(k_tau, schedules.SCHEDULES['coupled_shared'], t, m.tau_ca,
                                   m.tau_dm, m.shift)
    noise = jax.random.normal(k_noise, SHAPE)
    x = jax.lax.stop_gradient(latents)
    noisy = tau[:, None, None, None] * x + (1 - tau[:, None, None, None]) * noise
    null = jax.tree.map(lambda n, c: jnp.broadcast_to(n, c.shape), tiny.make_null(), cond)
    uncond = spy_predict(TEACHER, noisy, tau, null)
    pred_real = uncond + m.alpha * (spy_predict(TEACHER, noisy, tau, cond) - uncond)
    p_real, p_fake = x - pred_real, x - spy_predict(CRITIC, noisy, tau, cond)
    grad = (p_real - p_fake) / jnp.mean(jnp.abs(p_real), axis=(1, 2, 3), keepdims=True)
    return 0.5 * jnp.mean((latents - jax.lax.stop_gradient(latents - grad)) ** 2)


@pytest.mark.parametrize('alpha', [1.5, 4.0])
def test_coupled_shared_with_dmd2s_normaliser_is_classic_dmd2(alpha):
    """The same key, the same loss, the same gradient, up to fp32's rounding."""
    m = tiny.make_method(schedule='coupled_shared', normaliser='dmd2', alpha=alpha, floor=1e-6)
    cond, key, student = tiny.make_cond(BATCH), jax.random.key(3), student_of()
    frozen = {'teacher': TEACHER, 'null': tiny.make_null()}
    ours = lambda s: generator_loss(spy_predict, s, CRITIC, frozen, cond, m, key, SHAPE)[0]
    (a, da), (b, db) = (jax.value_and_grad(f)(student) for f in (
        ours, lambda s: classic_dmd2(m, s, key, cond)))
    close(a, float(b), rtol=1e-5)
    close(da['x'], np.asarray(db['x'], np.float64), rtol=1e-4, atol=1e-7)


# --- The critic's side of the GAN ---


def with_real(seed=0):
    return tiny.make_cond(BATCH, seed) | {REAL: jnp.asarray(draw(8, *SHAPE), jnp.float32)}


def test_the_head_is_shown_real_and_fake_diffused_at_the_same_prompts():
    seen = []

    def classify(trunk, head, x_t, t, cond):
        seen.append((np.asarray(x_t), np.asarray(t), cond))
        return spy_classify(trunk, head, x_t, t, cond)

    m = tiny.make_method(gan=dataclasses.replace(GAN, classify=classify), num_steps=1)
    batch, student = with_real(), student_of()
    loss, metrics = critic_objective(spy_predict, student, CRITIC, batch, m, jax.random.key(1),
                                     SHAPE, HEAD)
    ((x_t, t, cond),) = seen
    assert (t >= 0.1).all() and (t <= 0.9).all() and len(set(t.tolist())) == 2 * BATCH
    for rows, clean in ((slice(0, None, 2), batch[REAL]), (slice(1, None, 2), student['x'])):
        level = t[rows][:, None, None, None]
        noise = (x_t[rows] - level * np.asarray(clean)) / (1 - level)
        assert abs(noise.mean()) < 0.15 and abs(noise.std() - 1) < 0.1
        for name in ('embeds', 'mask'):
            np.testing.assert_array_equal(cond[name][rows], batch[name])
    assert REAL not in cond
    close(loss, float(metrics['fake_loss'] + 0.2 * metrics['gan_critic_loss']), rtol=1e-5)


def test_r1_holds_the_slope_on_real_samples():
    slope = lambda gan: critic_objective(
        spy_predict, student_of(), CRITIC, with_real(), tiny.make_method(gan=gan, num_steps=1),
        jax.random.key(1), SHAPE, HEAD)
    with_r1 = dataclasses.replace(GAN, r1=2.0)
    (plain, _), (held, metrics) = slope(GAN), slope(with_r1)
    assert float(metrics['gan_r1']) > 0
    close(held - plain, 2.0 * float(metrics['gan_r1']), rtol=1e-4)


@pytest.fixture(scope='module')
def gan_run(predict, params):
    """A run of the tiny network with a GAN: ``(state maker, steps, frozen)``."""
    features = emoji.make_features(tiny.MODEL)
    width = tiny.MODEL['denoiser']['hidden_size']
    gan = Gan(0.5, 0.5, 0.1, (0.0, 0.98), discriminator.make_classify(features, width))
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    head = discriminator.init(width, jax.random.key(5))
    make, steps, frozen = tiny.build_run(predict, params, optax.adam(1e-3), mesh, head=head,
                                         gan=gan, merge=0.9)
    return make, steps, frozen


def moved(before, after):
    return not all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(before),
                                                        jax.tree.leaves(after), strict=True))


def test_a_step_with_a_gan_moves_who_it_should(gan_run):
    """Critic and head in the critic's step; the student, and the merged critic, in the other."""
    make, steps, frozen = gan_run
    start = jax.tree.map(np.array, make())
    state, metrics = steps.critic(make(), with_real())
    assert bool(metrics['finite']) and np.isfinite(float(metrics['gan_r1']))
    assert moved(start.head, state.head) and moved(start.critic, state.critic)
    assert not moved(start.student, state.student)
    after = jax.tree.map(np.array, state)
    state, metrics = steps.generator(state, frozen, with_real(1))
    assert bool(metrics['finite']) and float(metrics['gan_loss']) > 0
    assert not moved(after.head, state.head) and moved(after.student, state.student)
    want = jax.tree.map(lambda c, s: 0.9 * c + 0.1 * s, after.critic,
                        jax.tree.map(np.array, state.student))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
                 state.critic, want)


def test_the_head_learns_to_tell(gan_run):
    """Twenty updates on the same real images: its loss falls below that of a coin."""
    make, steps, _ = gan_run
    state, losses = make(), []
    for _ in range(20):
        state, metrics = steps.critic(state, with_real())
        losses.append(float(metrics['gan_critic_loss']))
    assert losses[-1] < losses[0] and float(metrics['gan_real']) > float(metrics['gan_fake'])


def test_features_are_what_the_head_of_the_network_reads(predict, params):
    """Same trunk: the velocity is a function of these tokens, whose number is the image's."""
    x = jnp.asarray(draw(9, *SHAPE), jnp.float32)
    tokens = emoji.make_features(tiny.MODEL)(params[0], x, jnp.full(BATCH, 0.3),
                                             tiny.make_cond(BATCH))
    patch = tiny.MODEL['denoiser']['patch_size']
    assert tokens.shape == (BATCH, (SHAPE[1] // patch) ** 2, tiny.MODEL['denoiser']['hidden_size'])
    assert np.asarray(tokens).std() > 1e-3


def test_acts_of_health_are_in_the_state():
    state = jax.eval_shape(lambda p: state_lib.fresh(p, optax.sgd(1.0), p, optax.sgd(1.0)),
                           {'kernel': jnp.zeros(3)})
    assert state.alpha_share.dtype == jnp.float32 and state.critic_extra.dtype == jnp.int32
