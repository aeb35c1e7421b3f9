"""Algorithm 1 as its two objectives have it: who sees what, who gets gradients, what adds up.

The objectives are handed a spy in place of a network, and are asked what they made of it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from ddmd_jax.data.batch import Batch
from ddmd_jax.diffusion import sampling
from ddmd_jax.diffusion.time import Shift
from ddmd_jax.method import schedules
from ddmd_jax.method.algorithm import critic_objective, generator_objective
from ddmd_jax.method.inputs import CriticKeys, GeneratorKeys, Models
from ddmd_jax.method.regularisers import Regulariser
from ddmd_jax.method.schedules import draw_between

BATCH = 4
SHAPE = (BATCH, *tiny.SHAPE)
# Two steps and shift 3: examples stand at uniform times 0 and .5, which the shift makes .25.
SHIFTED = np.array([0.0, 0.25, 0.0, 0.25], np.float32)
names = pytest.mark.parametrize('name', sorted(schedules.SCHEDULES))


def same(a, b):
    """Whether two pytrees are equal bit for bit."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


def close(a, b, rtol=2e-5, atol=2e-6):
    np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=rtol, atol=atol)


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


# --- Who sees what ---

STUDENT, CRITIC, TEACHER = ({'who': jnp.float32(i)} for i in range(3))


class Spy:
    """A network that notes its calls; which one it plays, its parameters say."""

    def __init__(self):
        self.calls = []

    def __call__(self, params, x_t, t, cond):
        x_hat = 0.5 * x_t + 0.1 * params['who'] + jnp.mean(cond['embeds'])
        self.calls.append((int(params['who']), np.asarray(x_t), np.asarray(t), cond, x_hat))
        return x_hat

    def of(self, network):
        return [call for call in self.calls if call[0] == int(network['who'])]


def watched(objective, trained, other, seed=0, **changes):
    """What networks were asked in one objective of two networks, the one that learns first."""
    spy = Spy()
    models = Models(spy, TEACHER, tiny.make_null())
    objective(trained, other, models, tiny.make_batch(BATCH),
              tiny.make_recipe(shift=3.0, **changes), jax.random.key(seed))
    return spy


@functools.cache
def watch_generator(name, seed=0):
    return watched(generator_objective, STUDENT, CRITIC, seed, schedule=name)


def noise_in(x_tau, tau, x):
    """The noise that `renoise` must have added."""
    tau = np.asarray(tau)[:, None, None, None]
    return (np.asarray(x_tau) - tau * np.asarray(x)) / (1 - tau)


@names
def test_the_student_stands_at_its_own_steps(name, cond):
    """One simulated step for half the rows, then each row's own shifted time."""
    simulated, (_, _, t, seen, _) = watch_generator(name).of(STUDENT)
    assert simulated[1].shape[0] == BATCH // 2 and not simulated[2].any()
    np.testing.assert_allclose(t, SHIFTED, atol=1e-6)
    assert same(seen, cond)


@names
def test_the_teacher_sees_prompt_and_null_on_one_input(name, cond):
    """CA compares two predictions of the *same* noisy sample; the null is the given one."""
    (_, x_t, t, seen, _), = watch_generator(name).of(TEACHER)
    n = 2 if schedules.SCHEDULES[name].shared else 3
    assert x_t.shape[0] == n * BATCH
    np.testing.assert_array_equal(x_t[0::n], x_t[1::n])
    np.testing.assert_array_equal(t[0::n], t[1::n])
    rows = lambda i: jax.tree.map(lambda a: a[i::n], seen)
    null = jax.tree.map(lambda a, b: jnp.broadcast_to(a, b.shape), tiny.make_null(), cond)
    assert same(rows(0), cond) and same(rows(1), null) and same(rows(n - 1), (cond, null)[n == 2])


@names
def test_the_critic_sees_what_the_teacher_sees_at_tau_dm(name, cond):
    """Same sample, level, noise and prompt as the teacher's DM prediction; unguided."""
    spy = watch_generator(name)
    (_, x_t, t, seen, _), = spy.of(CRITIC)
    (_, teacher_x, teacher_t, _, _), = spy.of(TEACHER)
    n, dm = (2, 0) if schedules.SCHEDULES[name].shared else (3, 2)
    np.testing.assert_array_equal(x_t, teacher_x[dm::n])
    np.testing.assert_array_equal(t, teacher_t[dm::n])
    assert same(seen, cond)


@names
def test_noise_is_shared_only_in_classic_dmd(name):
    spy = watch_generator(name)
    x = spy.of(STUDENT)[-1][-1]
    (_, x_ca, tau_ca, _, _), (_, x_dm, tau_dm, _, _) = spy.of(TEACHER)[0], spy.of(CRITIC)[0]
    shared = schedules.SCHEDULES[name].shared
    n = 2 if shared else 3
    ca, dm = noise_in(x_ca[0::n], tau_ca[0::n], x).ravel(), noise_in(x_dm, tau_dm, x).ravel()
    for noise in (ca, dm):  # unit noise on the student's own prediction, nothing else
        assert abs(noise.mean()) < 0.15 and abs(noise.std() - 1) < 0.1
    assert np.corrcoef(ca, dm)[0, 1] == pytest.approx(1.0 if shared else 0.0, abs=0.15)


@pytest.mark.parametrize('name', ['decoupled_constrained', 'decoupled_hybrid'])
def test_tau_ca_is_cleaner_than_the_step_in_the_objective_itself(name):
    """The schedule's promise, end to end: uniform times in, shifted levels out."""
    for seed in range(4):
        tau_ca = watch_generator(name, seed).of(TEACHER)[0][2][0::3]
        assert (tau_ca >= SHIFTED - 1e-6).all()
        # The span's upper end was drawn before the shift as well.
        assert (tau_ca <= float(Shift(3.0)(0.98)) + 1e-6).all()


def test_the_critic_learns_on_fresh_samples_of_the_student(cond):
    spy = watched(critic_objective, CRITIC, STUDENT, critic_range=(0.2, 0.6))
    (_, x_t, tau, seen, _), = spy.of(CRITIC)
    noise = noise_in(x_t, tau, spy.of(STUDENT)[-1][-1])
    assert abs(noise.mean()) < 0.15 and abs(noise.std() - 1) < 0.1
    before = np.asarray(tiny.unshift(tau, 3.0))
    assert (before >= 0.2 - 1e-5).all() and (before <= 0.6 + 1e-5).all()
    assert same(seen, cond)
    np.testing.assert_allclose(spy.of(STUDENT)[-1][2], SHIFTED, atol=1e-6)


@pytest.mark.parametrize('name', ['coupled_shared', 'decoupled_hybrid'])
def test_the_critic_can_learn_on_the_generators_own_images(name):
    """DMD2's order: the same images, noised anew; nobody asks the student again."""
    spy, recipe = Spy(), tiny.make_recipe(shift=3.0, schedule=name)
    models, batch = Models(spy, TEACHER, tiny.make_null()), tiny.make_batch(BATCH)
    *_, x = generator_objective(STUDENT, CRITIC, models, batch, recipe, jax.random.key(0))
    np.testing.assert_array_equal(x, spy.of(STUDENT)[-1][-1])
    (_, before, *_), = spy.of(CRITIC)
    spy.calls.clear()
    critic_objective(CRITIC, STUDENT, models, dataclasses.replace(batch, x=x), recipe,
                     jax.random.key(1))
    (_, x_t, tau, *_), = spy.of(CRITIC)
    noise = noise_in(x_t, tau, x)
    assert not spy.of(STUDENT) and not np.array_equal(x_t, before)
    assert abs(noise.mean()) < 0.15 and abs(noise.std() - 1) < 0.1


# --- Who gets gradients ---


def reached(tree):
    """Which leaves a gradient reaches."""
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(tree))
    return {bool(np.any(g)) for g in jax.tree.leaves(tree)}


def test_the_generators_gradient_reaches_the_student_only():
    teacher, student, critic = tiny.small_params()

    def loss(student, others):
        teacher, critic, embeds = others
        models = Models(tiny.small_network, teacher, tiny.make_null() | {'embeds': embeds})
        return generator_objective(student, critic, models, tiny.make_batch(BATCH),
                                   tiny.make_recipe(), jax.random.key(0))[0]

    others = (teacher, critic, tiny.make_null()['embeds'])
    trained, frozen = jax.grad(loss, argnums=(0, 1))(student, others)
    assert reached(trained) == {True} and reached(frozen) == {False}


def test_the_critics_gradient_reaches_the_critic_only():
    teacher, student, critic = tiny.small_params()

    def loss(critic, student, teacher):
        models = Models(tiny.small_network, teacher, tiny.make_null())
        return critic_objective(critic, student, models, tiny.make_batch(BATCH),
                                tiny.make_recipe(), jax.random.key(0))[0]

    trained, *frozen = jax.grad(loss, argnums=(0, 1, 2))(critic, student, teacher)
    assert reached(trained) == {True} and reached(frozen) == {False}


# --- The terms add up ---


def spoken(params, x_t, t, cond):
    """The student is its parameters; teacher and critic say something of their input."""
    if 'x' in params:
        return params['x'][:x_t.shape[0]] + 0.0 * x_t
    return params['a'] * x_t + params['b'] + 5.0 * jnp.mean(cond['embeds'], (1, 2))[
        :, None, None, None]


SPEAKING_TEACHER = {'a': jnp.float32(0.6), 'b': jnp.float32(0.05)}
SPEAKING_CRITIC = {'a': jnp.float32(0.5), 'b': jnp.float32(-0.1)}
HEAD = {'w': jnp.float32(0.3)}


def judged(trunk, head, x_t, t, cond):
    """A classifier of the samples' sines."""
    return jnp.sum(jnp.sin(x_t) * head['w'], (1, 2, 3)) * trunk['a'] + t


def make_gan(classify=judged, **section):
    gan = tiny.make_gan(tiny.small_tokens, tiny.small_params()[0], **{
        'weight': 0.7, 'critic_weight': 0.2, 'tau': (0.1, 0.9)} | section)
    gan.classify = classify
    return {'gan': gan}


def student_of(seed=6):
    return {'x': jnp.asarray(draw(seed, *SHAPE), jnp.float32)}


SPEAKING = Models(spoken, SPEAKING_TEACHER, tiny.make_null(), {'gan': HEAD})


def gradient(critic=SPEAKING_CRITIC, **changes):
    """Gradient of the generator's loss in its samples, times their number."""
    recipe = tiny.make_recipe(steps=1, **changes)
    loss = lambda s: generator_objective(s, critic, SPEAKING, tiny.make_batch(BATCH), recipe,
                                         jax.random.key(0))[0]
    return np.asarray(jax.grad(loss)(student_of())['x'], np.float64) * np.prod(SHAPE)


def softplus(x):
    return np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0)


def test_mean_and_variance_enter_with_their_weight():
    """The gradient grows by this term's own, as numpy has it in float64."""
    x = np.asarray(student_of()['x'], np.float64)
    term = {'mean_variance': tiny.make_mean_variance(0.4, 0.1, 0.6)}
    inner = np.prod(SHAPE[1:])
    mu, var = x.mean((1, 2, 3), keepdims=True), x.var((1, 2, 3), keepdims=True)
    # d KL / d x of one sample: (mu - m*) / (n v*) + (x - mu) (1 / v* - 1 / v) / n; B of them
    want = (0.4 / (BATCH * inner)) * ((mu - 0.1) / 0.6 + (x - mu) * (1 / 0.6 - 1 / var))
    close(gradient(regularisers=term) - gradient(), want * np.prod(SHAPE), rtol=1e-3, atol=1e-4)


def test_the_gan_enters_with_its_weight():
    x, moved = np.asarray(student_of()['x'], np.float64), gradient(regularisers=make_gan())
    k_tau, k_noise = GeneratorKeys.of(jax.random.key(0)).regularisers(0)
    tau = np.asarray(draw_between(k_tau, 0.1, 0.9, (BATCH,)), np.float64)
    noise = np.asarray(jax.random.normal(k_noise, SHAPE), np.float64)

    def slow(x):
        x_t = tau[:, None, None, None] * x + (1 - tau[:, None, None, None]) * noise
        return 0.7 * softplus(-((np.sin(x_t) * 0.3).sum((1, 2, 3)) * 0.5 + tau)).mean()

    found = (moved - gradient()) / np.prod(SHAPE)
    for i in [(0, 1, 2, 0), (1, 7, 7, 2), (3, 0, 0, 1)]:
        one = np.zeros_like(x)
        one[i] = 1e-5
        want = (slow(x + one) - slow(x - one)) / 2e-5
        assert found[i] == pytest.approx(want, rel=1e-2, abs=1e-6)


def test_ca_alone_and_dm_alone_are_the_parts_of_both():
    both = gradient(weight_ca=0.5, weight_dm=2.0)
    ca = gradient(weight_ca=0.5, weight_dm=0.0)
    dm = gradient(weight_ca=0.0, weight_dm=2.0)
    assert np.abs(ca).max() > 0.1 and np.abs(dm).max() > 0.1
    close(ca + dm, both, rtol=1e-4, atol=1e-5)


def test_an_observer_is_watched_and_not_listened_to():
    """CA alone with a critic: whatever that says, the student's gradient is the same."""
    other = {'a': jnp.float32(-3.0), 'b': jnp.float32(9.0)}
    np.testing.assert_array_equal(gradient(weight_dm=0.0), gradient(other, weight_dm=0.0))
    assert np.abs(gradient() - gradient(other)).max()


def test_a_drawn_alpha_scales_each_examples_ca():
    """Without a normaliser CA is linear in alpha - 1."""
    recipe = {'weight_dm': 0.0, 'normaliser': 'none'}
    fixed, drawn = gradient(alpha=2.0, **recipe), gradient(alpha_range=(1.5, 5.0), **recipe)
    ratio = np.median(drawn / fixed, axis=(1, 2, 3))
    np.testing.assert_allclose(drawn, fixed * ratio[:, None, None, None], rtol=1e-3, atol=1e-5)
    assert (ratio >= 0.5).all() and (ratio <= 4.0).all() and np.ptp(ratio) > 0.1


def classic_dmd2(student, recipe, key, cond):
    """DMD2's loss written out with its own names, on the draws that the key gives."""
    keys, few = GeneratorKeys.of(key), recipe.steps
    z, k = sampling.student_inputs(functools.partial(spoken, student), cond, few, keys.simulation,
                                   SHAPE)
    latents = spoken(student, z, few.times[k], cond)
    tau = recipe.schedule.levels(keys.levels, few.uniform[k], recipe.ranges, few.time).dm
    noise = jax.random.normal(keys.noise_ca, SHAPE)
    x = jax.lax.stop_gradient(latents)
    noisy = tau[:, None, None, None] * x + (1 - tau[:, None, None, None]) * noise
    null = jax.tree.map(lambda n, c: jnp.broadcast_to(n, c.shape), tiny.make_null(), cond)
    uncond = spoken(SPEAKING_TEACHER, noisy, tau, null)
    alpha = recipe.alpha.scale
    pred_real = uncond + alpha * (spoken(SPEAKING_TEACHER, noisy, tau, cond) - uncond)
    p_real, p_fake = x - pred_real, x - spoken(SPEAKING_CRITIC, noisy, tau, cond)
    grad = (p_real - p_fake) / jnp.mean(jnp.abs(p_real), axis=(1, 2, 3), keepdims=True)
    return 0.5 * jnp.mean((latents - jax.lax.stop_gradient(latents - grad)) ** 2)


@names
def test_a_rollout_is_what_both_would_have_drawn(name):
    """On its inputs the generator's loss and gradient are those it has by itself with the same
    key, and its gradient alone asks the student; the first sample is what it learnt from."""
    recipe, batch = tiny.make_recipe(shift=3.0, schedule=name), tiny.make_batch(BATCH)
    student, asked = {'a': jnp.float32(0.8), 'b': jnp.float32(0.2)}, []

    def spied(params, x_t, t, cond):
        asked.append(params is student)
        return spoken(params, x_t, t, cond)

    key = jax.random.key(0)
    z, samples = sampling.rollout(functools.partial(spoken, student), batch.cond, recipe.steps,
                                  GeneratorKeys.of(key).simulation, SHAPE)
    models = dataclasses.replace(SPEAKING, predict=spied)
    generator = lambda s, batch: generator_objective(
        s, SPEAKING_CRITIC, models, batch, recipe, key)
    shared = dataclasses.replace(batch, z=z)
    (a, da), (b, db) = (jax.value_and_grad(lambda s, x=x: generator(s, x)[0])(student)
                        for x in (shared, batch))
    close(a, float(b))
    close(da['a'], float(db['a']))
    asked.clear()
    *_, x = generator(student, shared)
    assert sum(asked) == 1
    close(samples[0], np.asarray(x, np.float64))


@pytest.mark.parametrize('alpha', [1.5, 4.0])
def test_coupled_shared_with_dmd2s_normaliser_is_classic_dmd2(alpha):
    """The same key, the same loss, the same gradient, up to fp32's rounding."""
    recipe = tiny.make_recipe('coupled_shared', normaliser='dmd2', alpha=alpha, floor=1e-6)
    batch, key = tiny.make_batch(BATCH), jax.random.key(3)
    ours = lambda s: generator_objective(s, SPEAKING_CRITIC, SPEAKING, batch, recipe, key)[0]
    theirs = lambda s: classic_dmd2(s, recipe, key, batch.cond)
    (a, da), (b, db) = (jax.value_and_grad(f)(student_of()) for f in (ours, theirs))
    close(a, float(b), rtol=1e-5)
    close(da['x'], np.asarray(db['x'], np.float64), rtol=1e-4, atol=1e-7)


# --- Regularisers, in the critic's objective ---


def with_real(seed=0):
    real = jnp.asarray(draw(8, *SHAPE), jnp.float32)
    return Batch(tiny.make_cond(BATCH, seed), real, tiny.SHAPE)


def criticised(**regularisers):
    recipe = tiny.make_recipe(steps=1, regularisers=regularisers)
    return critic_objective(SPEAKING_CRITIC, student_of(), SPEAKING, with_real(), recipe,
                            jax.random.key(1))


def test_the_head_is_shown_real_and_fake_diffused_at_the_same_prompts():
    seen = []

    def classify(trunk, head, x_t, t, cond):
        seen.append((np.asarray(x_t), np.asarray(t), cond))
        return judged(trunk, head, x_t, t, cond)

    loss, metrics = criticised(**make_gan(classify))
    ((x_t, t, cond),), batch = seen, with_real()
    assert (t >= 0.1).all() and (t <= 0.9).all() and len(set(t.tolist())) == 2 * BATCH
    for rows, clean in ((slice(0, None, 2), batch.real), (slice(1, None, 2), student_of()['x'])):
        level = t[rows][:, None, None, None]
        noise = (x_t[rows] - level * np.asarray(clean)) / (1 - level)
        assert abs(noise.mean()) < 0.15 and abs(noise.std() - 1) < 0.1
        assert same(jax.tree.map(lambda a, rows=rows: a[rows], cond), batch.cond)
    close(loss, float(metrics['fake_loss'] + 0.2 * metrics['gan_critic_loss']), rtol=1e-5)


def test_r1_holds_the_slope_on_real_samples():
    (plain, _), (held, metrics) = criticised(**make_gan()), criticised(**make_gan(r1=2.0))
    assert float(metrics['gan_r1']) > 0
    close(held - plain, 2.0 * float(metrics['gan_r1']), rtol=1e-4)


class Noted(Regulariser):
    """Notes what it may look at; adds a term of its own to each loss, and a curve."""

    name = 'noted'

    def __init__(self):
        self.seen = []

    def student_term(self, x_hat, sight):
        self.seen.append((x_hat, sight))
        return 3.0, {'noted': jnp.float32(7.0)}

    def critic_term(self, x, sight):
        self.seen.append((x, sight))
        return 5.0, {'noted': jnp.float32(8.0)}


@pytest.mark.parametrize('objective, added, curve', [
    (generator_objective, 3.0, 7.0), (critic_objective, 5.0, 8.0)])
def test_a_regulariser_of_ones_own_sees_the_samples_and_adds_its_term(objective, added, curve):
    """Its critic and its own parameters are those of this update, its keys of its own."""
    noted, key = Noted(), jax.random.key(2)
    networks, batch = (student_of(), SPEAKING_CRITIC), with_real()
    networks = networks if objective is generator_objective else networks[::-1]
    models = dataclasses.replace(SPEAKING, extra={'noted': HEAD})
    given = lambda **terms: objective(
        *networks, models, batch, tiny.make_recipe(steps=1, regularisers=terms), key)
    (plain, *_), (loss, metrics, *_) = given(), given(noted=noted)
    assert float(loss - plain) == pytest.approx(added, rel=1e-5)
    assert float(metrics['noted']) == curve
    ((x, sight),) = noted.seen
    close(x, np.asarray(student_of()['x']))
    assert sight.critic is SPEAKING_CRITIC and sight.own is HEAD and sight.batch is batch
    keys = GeneratorKeys if objective is generator_objective else CriticKeys
    assert same(*map(jax.random.key_data, (sight.keys, keys.of(key).regularisers(0))))
