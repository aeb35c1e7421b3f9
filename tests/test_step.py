"""Algorithm 1 as the step takes it: who sees what, who gets gradients, and what is kept.

Half of this file hands the step a spy in place of a network and reads what it was asked; the
other half takes real steps with the tiny NextDiT.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from ddmd_jax.train.step import accumulated_grads, critic_objective, generator_loss

from ddmd_jax.diffusion.time import Shift
from ddmd_jax.method import schedules
from ddmd_jax.parallel import sharding
from ddmd_jax.train import state as st

pytestmark = pytest.mark.usefixtures('quick_compile')
BATCH = 4
SHAPE = (BATCH, *tiny.SHAPE)
# Two steps and shift 3: examples stand at pre-shift 0 and .5, which the shift makes .25.
PRE_SHIFT = np.array([0.0, 0.5, 0.0, 0.5], np.float32)
SHIFTED = np.array([0.0, 0.25, 0.0, 0.25], np.float32)
names = pytest.mark.parametrize('name', sorted(schedules.SCHEDULES))


def same(a, b):
    """Whether two pytrees are equal bit for bit."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


def finite(tree):
    return all(np.isfinite(x).all() for x in jax.tree.leaves(tree))


# --- Who sees what ---

STUDENT, CRITIC, TEACHER = ({'who': jnp.float32(i)} for i in range(3))


class Spy:
    """A predictor that notes its calls; which network it plays, its parameters say."""

    def __init__(self):
        self.calls = []

    def __call__(self, params, x_t, t, cond):
        x_hat = 0.5 * x_t + 0.1 * params['who'] + jnp.mean(cond['embeds'])
        self.calls.append((int(params['who']), np.asarray(x_t), np.asarray(t), cond, x_hat))
        return x_hat

    def of(self, network):
        return [call for call in self.calls if call[0] == int(network['who'])]


def watch_generator(name, cond):
    spy = Spy()
    frozen = {'teacher': TEACHER, 'null': tiny.make_null()}
    generator_loss(spy, STUDENT, CRITIC, frozen, cond, tiny.make_method(schedule=name, shift=3.0),
                   jax.random.key(0), SHAPE)
    return spy


def noise_in(x_tau, tau, x):
    """The noise that `renoise` must have added."""
    tau = np.asarray(tau)[:, None, None, None]
    return (np.asarray(x_tau) - tau * np.asarray(x)) / (1 - tau)


@names
def test_the_student_stands_at_its_own_steps(name, cond):
    """One simulated step for half the rows, then each row's own shifted time."""
    simulated, (_, _, t, seen, _) = watch_generator(name, cond).of(STUDENT)
    assert simulated[1].shape[0] == BATCH // 2 and not simulated[2].any()
    np.testing.assert_allclose(t, SHIFTED, atol=1e-6)
    assert same(seen, cond)


@names
def test_the_teacher_sees_prompt_and_null_on_one_input(name, cond):
    """CA compares two predictions of the *same* noisy sample; the null is the given one."""
    spy = watch_generator(name, cond)
    (_, x_t, t, seen, _), = spy.of(TEACHER)
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
    spy = watch_generator(name, cond)
    (_, x_t, t, seen, _), = spy.of(CRITIC)
    (_, teacher_x, teacher_t, _, _), = spy.of(TEACHER)
    n, dm = (2, 0) if schedules.SCHEDULES[name].shared else (3, 2)
    np.testing.assert_array_equal(x_t, teacher_x[dm::n])
    np.testing.assert_array_equal(t, teacher_t[dm::n])
    assert same(seen, cond)


@names
def test_noise_is_shared_only_in_classic_dmd(name, cond):
    spy = watch_generator(name, cond)
    x = spy.of(STUDENT)[-1][-1]
    (_, x_ca, tau_ca, _, _), (_, x_dm, tau_dm, _, _) = spy.of(TEACHER)[0], spy.of(CRITIC)[0]
    shared = schedules.SCHEDULES[name].shared
    n = 2 if shared else 3
    ca, dm = noise_in(x_ca[0::n], tau_ca[0::n], x).ravel(), noise_in(x_dm, tau_dm, x).ravel()
    for noise in (ca, dm):  # unit noise on the student's own prediction, nothing else
        assert abs(noise.mean()) < 0.15 and abs(noise.std() - 1) < 0.1
    assert np.corrcoef(ca, dm)[0, 1] == pytest.approx(1.0 if shared else 0.0, abs=0.15)


@pytest.mark.parametrize('name', ['decoupled_constrained', 'decoupled_hybrid'])
def test_tau_ca_is_cleaner_than_the_step_in_the_step_itself(name, cond):
    """The schedule's promise, end to end: pre-shift times in, shifted levels out."""
    for seed in range(4):
        spy = Spy()
        frozen = {'teacher': TEACHER, 'null': tiny.make_null()}
        method = tiny.make_method(schedule=name, shift=3.0)
        generator_loss(spy, STUDENT, CRITIC, frozen, cond, method, jax.random.key(seed), SHAPE)
        tau_ca = spy.of(TEACHER)[0][2][0::3]
        assert (tau_ca >= SHIFTED - 1e-6).all()
        # The span's upper end was drawn before the shift as well.
        assert (tau_ca <= float(Shift(3.0)(0.98)) + 1e-6).all()


def test_the_critic_learns_on_fresh_samples_of_the_student(cond):
    spy = Spy()
    method = tiny.make_method(tau_critic=(0.2, 0.6), shift=3.0)
    critic_objective(spy, STUDENT, CRITIC, cond, method, jax.random.key(0), SHAPE)
    (_, x_t, tau, seen, _), = spy.of(CRITIC)
    noise = noise_in(x_t, tau, spy.of(STUDENT)[-1][-1])
    assert abs(noise.mean()) < 0.15 and abs(noise.std() - 1) < 0.1
    before = np.asarray(tiny.unshift(tau, 3.0))
    assert (before >= 0.2 - 1e-5).all() and (before <= 0.6 + 1e-5).all()
    assert same(seen, cond)
    np.testing.assert_allclose(spy.of(STUDENT)[-1][2], SHIFTED, atol=1e-6)


# --- Who gets gradients ---


@pytest.fixture(scope='module')
def gradients(predict, params, cond):
    """Gradients of both objectives in everything they are given, from one program."""
    teacher, student, critic = params
    method, null, key = tiny.make_method(), tiny.make_null(), jax.random.key(0)

    def generator(student, critic, teacher, embeds):
        frozen = {'teacher': teacher, 'null': null | {'embeds': embeds}}
        return generator_loss(predict, student, critic, frozen, cond, method, key, SHAPE)[0]

    def critics(student, critic):
        return critic_objective(predict, student, critic, cond, method, key, SHAPE)[0]

    both = jax.jit(lambda s, c, t, e: (jax.grad(generator, argnums=(0, 1, 2, 3))(s, c, t, e),
                                       jax.grad(critics, argnums=(0, 1))(s, c)))
    return both(student, critic, teacher, null['embeds'])


def reached(tree):
    """Which leaves a gradient reaches."""
    return {bool(np.any(g)) for g in jax.tree.leaves(tree)}


def test_the_generators_gradient_reaches_the_student_only(gradients):
    (student, critic, teacher, null), _ = gradients
    assert finite(student) and reached(student) == {True}
    assert reached((critic, teacher, null)) == {False}


def test_the_critics_gradient_reaches_the_critic_only(gradients):
    _, (student, critic) = gradients
    assert finite(critic) and reached(critic) == {True}
    assert reached(student) == {False}


# --- Accumulation ---


def test_micro_batches_average_to_the_whole_batch():
    """For a loss without randomness, four parts give exactly the batch's mean gradient."""
    def loss_fn(p, c, key, shape):
        del key
        assert shape == (c['x'].shape[0], 7)
        loss = jnp.mean(jnp.square(p * c['x'] - 1.0))
        return loss, {'loss': loss}

    cond = {'x': jax.random.normal(jax.random.key(0), (8, 3))}
    grads, metrics = (accumulated_grads(loss_fn, jnp.float32(0.3), cond, jax.random.key(0), n, (7,))
                      for n in (1, 4))
    np.testing.assert_allclose(grads[0], metrics[0], rtol=1e-5)
    np.testing.assert_allclose(grads[1]['loss'], metrics[1]['loss'], rtol=1e-5)


def test_micro_batches_draw_their_own_noise_and_hold_rows_of_every_device():
    """Every n-th row each; neighbours of one device would leave the others idle."""
    def loss_fn(p, c, key, shape):
        del shape
        draw = jax.random.normal(key)
        return p * draw, {'rows': c['x'], 'square': draw**2, 'draw': draw}

    cond = {'x': jnp.arange(8.0)}
    grad, metrics = accumulated_grads(loss_fn, 1.0, cond, jax.random.key(0), 2, ())
    np.testing.assert_allclose(metrics['rows'], [0.5, 2.5, 4.5, 6.5])
    np.testing.assert_allclose(grad, metrics['draw'], rtol=1e-6)
    assert metrics['square'] - metrics['draw'] ** 2 > 1e-3  # two draws, not one twice


# --- Real steps ---


class Run:
    """Both jitted programs of a toy run, and as many fresh states as a test wants."""

    def __init__(self, predict, params, **changes):
        mesh = sharding.make_mesh({}, jax.devices()[:1])
        make, self.steps, self.frozen = tiny.build_run(
            predict, params, optax.adam(1e-3), mesh, **changes)
        self._start = make()

    def fresh(self):
        """A copy of the state at step 0: the programs donate what they are given."""
        return jax.tree.map(jnp.copy, self._start)

    def generator(self, state, cond):
        return self.steps.generator(state, self.frozen, cond)


@pytest.fixture(scope='module')
def hybrid(predict, params):
    return Run(predict, params)


def kept(state):
    """The state's values on the host, for comparison after it has been donated."""
    return jax.tree.map(np.array, state)


def test_three_rounds_compile_once(hybrid, cond):
    """A step that retraces costs minutes each on a large model, and shows nowhere else."""
    state = hybrid.fresh()
    for seed in range(3):
        state, critic_metrics = hybrid.steps.critic(state, tiny.make_cond(BATCH, seed))
        state, metrics = hybrid.generator(state, tiny.make_cond(BATCH, seed))
        assert bool(metrics['finite']) and bool(critic_metrics['finite'])
    assert (int(state.step), int(state.critic_step)) == (3, 3)
    assert hybrid.steps.generator._cache_size() == 1
    assert hybrid.steps.critic._cache_size() == 1


def test_a_generator_step_moves_student_and_ema_only(hybrid, cond):
    start = kept(hybrid.fresh())
    state, metrics = hybrid.generator(hybrid.fresh(), cond)
    assert int(state.step) == 1 and float(metrics['grad_norm']) > 0
    assert not same(state.student, start.student) and not same(state.ema, start.ema)
    for name in ('critic', 'critic_opt', 'critic_step'):
        assert same(getattr(state, name), getattr(start, name)), name


def test_a_critic_step_moves_the_critic_only(hybrid, cond):
    start = kept(hybrid.fresh())
    state, metrics = hybrid.steps.critic(hybrid.fresh(), cond)
    assert int(state.critic_step) == 1 and float(metrics['critic_grad_norm']) > 0
    assert not same(state.critic, start.critic)
    for name in ('student', 'student_opt', 'ema', 'step'):
        assert same(getattr(state, name), getattr(start, name)), name


def test_randomness_follows_the_counters(hybrid, cond):
    """A resumed run draws what the uninterrupted one would have; no two steps draw the same."""
    loss = lambda state: float(hybrid.generator(state, cond)[1]['loss'])
    fake = lambda state: float(hybrid.steps.critic(state, cond)[1]['fake_loss'])
    later = hybrid.fresh()
    later.step, later.critic_step = later.step + 1, later.critic_step + 1
    again = jax.tree.map(jnp.copy, later)
    assert loss(hybrid.fresh()) == loss(hybrid.fresh()) != loss(later)
    assert fake(hybrid.fresh()) == fake(hybrid.fresh()) != fake(again)


def test_ema_after_one_step(hybrid, cond):
    """At step 0 the ramp's decay is .1, far from the .9 asked for."""
    start = kept(hybrid.fresh())
    state, _ = hybrid.generator(hybrid.fresh(), cond)
    want = jax.tree.map(lambda e, p: 0.1 * e + 0.9 * p, start.ema, kept(state.student))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
                 state.ema, want)


@pytest.mark.parametrize('step, ramp, want', [
    (0, True, 0.1), (8, True, 0.5), (10**6, True, 0.98), (0, False, 0.98)])
def test_ema_ramp(step, ramp, want):
    assert float(st.ema_decay(jnp.int32(step), 0.98, ramp)) == pytest.approx(want)


@pytest.mark.parametrize('poison', [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing(hybrid, cond, poison):
    """One bad row must not cost the run: parameters, moments, EMA and counters all stay."""
    bad = cond | {'embeds': cond['embeds'].at[1, 0].set(poison)}
    start = kept(hybrid.fresh())
    state, metrics = hybrid.generator(hybrid.fresh(), bad)
    assert not bool(metrics['finite']) and same(state, start)
    state, metrics = hybrid.steps.critic(state, bad)
    assert not bool(metrics['finite']) and same(state, start)
    # And the run goes on from there.
    state, metrics = hybrid.generator(state, cond)
    assert bool(metrics['finite']) and int(state.step) == 1


@pytest.mark.parametrize('name', sorted(set(schedules.SCHEDULES) - {'decoupled_hybrid'}))
def test_every_schedule_takes_a_step(predict, params, cond, hybrid, name):
    """The hybrid has taken its own above; all of them start from the same state."""
    run = Run(predict, params, schedule=name)
    start = kept(run.fresh())
    state, metrics = run.generator(run.fresh(), cond)
    assert bool(metrics['finite']) and finite(state) and int(state.step) == 1
    assert not same(state.student, start.student)
    assert float(metrics['loss']) != float(hybrid.generator(hybrid.fresh(), cond)[1]['loss'])


def test_accumulation_keeps_the_scale(predict, params, cond, hybrid):
    """Two halves are averaged, not summed: a sum would double loss and gradient."""
    run = Run(predict, params, accumulate=2)
    state, halves = run.generator(run.fresh(), cond)
    _, whole = hybrid.generator(hybrid.fresh(), cond)
    assert bool(halves['finite']) and finite(state) and int(state.step) == 1
    assert float(halves['x_std']) == pytest.approx(float(whole['x_std']), rel=0.1)
    for name in ('loss', 'grad_norm', 'dm_rel_gap'):
        assert 0.4 < float(halves[name]) / float(whole[name]) < 1.7, name
