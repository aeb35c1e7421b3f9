"""The updates around Algorithm 1: accumulation, counters, optimisers, EMA, and what is kept.

Real programs, of a network of one matrix: `test_reference.py` has a NextDiT's figures.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from ddmd_jax.data.batch import Batch
from ddmd_jax.method import schedules
from ddmd_jax.method.regularisers import Regulariser
from ddmd_jax.parallel import sharding
from ddmd_jax.train import state as st
from ddmd_jax.train.update import accumulated_grads, ema_decay

BATCH = 4
MESH = sharding.make_mesh({}, jax.devices()[:1])
TX = optax.adam(1e-3)


def same(a, b):
    """Whether two pytrees are equal bit for bit."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


def finite(tree):
    return all(np.isfinite(x).all() for x in jax.tree.leaves(tree))


def close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b)


def kept(state):
    """The state's values on the host, for comparison after it has been donated."""
    return jax.tree.map(np.array, state)


# --- Accumulation ---


def test_micro_batches_average_to_the_whole_batch():
    """For a loss without randomness, four parts give exactly the batch's mean gradient."""
    def loss_fn(p, batch, key):
        del key
        assert batch.shape == (7,)
        loss = jnp.mean(jnp.square(p * batch.cond['x'] - 1.0))
        return loss, ({'loss': loss}, None)

    batch = Batch({'x': jax.random.normal(jax.random.key(0), (8, 3))}, shape=(7,))
    grads, metrics, _ = zip(*(accumulated_grads(
        loss_fn, jnp.float32(0.3), batch, jax.random.key(0), n) for n in (1, 4)), strict=True)
    np.testing.assert_allclose(*grads, rtol=1e-5)
    np.testing.assert_allclose(metrics[0]['loss'], metrics[1]['loss'], rtol=1e-5)


def test_micro_batches_draw_their_own_noise_and_hold_rows_of_every_device():
    """Every n-th row each; neighbours of one device would leave the others idle."""
    def loss_fn(p, batch, key):
        draw = jax.random.normal(key)
        x = batch.cond['x']
        return p * draw, ({'rows': x, 'square': draw**2, 'draw': draw}, 10 * x)

    batch = Batch({'x': jnp.arange(8.0)})
    grad, metrics, rows = accumulated_grads(loss_fn, 1.0, batch, jax.random.key(0), 2)
    np.testing.assert_array_equal(rows, 10 * batch.cond['x'])  # each at its place again
    np.testing.assert_allclose(metrics['rows'], [0.5, 2.5, 4.5, 6.5])
    np.testing.assert_allclose(grad, metrics['draw'], rtol=1e-6)
    assert metrics['square'] - metrics['draw'] ** 2 > 1e-3  # two draws, not one twice


# --- Real updates ---


class Run:
    """Both jitted programs of a toy run, and as many fresh states as a test wants."""

    def __init__(self, extra=None, **recipe_and_mechanics):
        changes = dict(recipe_and_mechanics)
        mechanics = {name: changes.pop(name) for name in ('accumulate', 'merge') if name in changes}
        spec, self.program, self.frozen = tiny.build_run(
            tiny.small_network, tiny.small_params(), TX, MESH, extra=extra,
            recipe=tiny.make_recipe(**changes), **mechanics)
        self._start = spec.create()

    def fresh(self):
        """A copy of the state at step 0: the programs donate what they are given."""
        return jax.tree.map(jnp.copy, self._start)

    def generator(self, state, batch):
        return self.program.generator(self.frozen, state, batch)[:2]

    def on_the_same_images(self, state, batch):
        """DMD2's order: an update of the student, then of the critic on what that learnt from."""
        state, metrics, x = self.program.generator(self.frozen, state, batch)
        state, judged = self.critic(state, dataclasses.replace(batch, x=x))
        return state, metrics, judged

    def critic(self, state, batch):
        return self.program.critic(self.frozen, state, batch)


@pytest.fixture(scope='module')
def hybrid():
    return Run()


@pytest.fixture(scope='module')
def batch():
    return tiny.make_batch(BATCH)


def test_three_rounds_compile_once(hybrid):
    """An update that retraces costs minutes each on a large model, and shows nowhere else."""
    state = hybrid.fresh()
    for seed in range(3):
        state, critic_metrics = hybrid.critic(state, tiny.make_batch(BATCH, seed))
        state, metrics = hybrid.generator(state, tiny.make_batch(BATCH, seed))
        assert bool(metrics['finite']) and bool(critic_metrics['finite'])
    assert (int(state.step), int(state.critic_step)) == (3, 3)
    assert hybrid.program.generator._cache_size() == 1
    assert hybrid.program.critic._cache_size() == 1


def test_a_generator_update_moves_student_and_ema_only(hybrid, batch):
    start = kept(hybrid.fresh())
    state, metrics = hybrid.generator(hybrid.fresh(), batch)
    assert int(state.step) == 1 and float(metrics['grad_norm']) > 0
    assert not same(state.student, start.student) and not same(state.ema, start.ema)
    for name in ('critic', 'critic_opt', 'critic_step'):
        assert same(getattr(state, name), getattr(start, name)), name


def test_a_critic_update_moves_the_critic_only(hybrid, batch):
    start = kept(hybrid.fresh())
    state, metrics = hybrid.critic(hybrid.fresh(), batch)
    assert int(state.critic_step) == 1 and float(metrics['critic_grad_norm']) > 0
    assert not same(state.critic, start.critic)
    for name in ('student', 'student_opt', 'ema', 'step'):
        assert same(getattr(state, name), getattr(start, name)), name


def test_randomness_follows_the_counters(hybrid, batch):
    """A resumed run draws what the uninterrupted one would have; no two updates draw the same."""
    loss = lambda state: float(hybrid.generator(state, batch)[1]['loss'])
    fake = lambda state: float(hybrid.critic(state, batch)[1]['fake_loss'])
    later = hybrid.fresh()
    later.step, later.critic_step = later.step + 1, later.critic_step + 1
    again = jax.tree.map(jnp.copy, later)
    assert loss(hybrid.fresh()) == loss(hybrid.fresh()) != loss(later)
    assert fake(hybrid.fresh()) == fake(hybrid.fresh()) != fake(again)


def test_the_generators_images_are_the_students_as_it_was(hybrid, batch):
    """DMD2's order: the critic is trained on the images that the student's update was made of, not
    on others, nor on the new student's."""
    state, metrics, judged = hybrid.on_the_same_images(hybrid.fresh(), batch)
    assert (int(state.step), int(state.critic_step)) == (1, 1)
    assert bool(metrics['finite']) and bool(judged['finite'])
    fresh = hybrid.fresh()
    _, other = hybrid.critic(hybrid.fresh(), batch)
    _, (x, *_) = hybrid.program.rollout(hybrid.frozen, fresh, batch)  # the generator's own samples
    want, beside = hybrid.critic(fresh, dataclasses.replace(batch, x=x))
    close(kept(state.critic), kept(want.critic))
    np.testing.assert_allclose(judged['fake_loss'], beside['fake_loss'], rtol=1e-5)
    assert float(judged['fake_loss']) != float(other['fake_loss'])


class Seen(Regulariser):
    """Logs how large the samples are that each objective is given."""

    def __init__(self):
        pass

    def student_term(self, x_hat, sight):
        return 0.0, {'made': jnp.mean(jnp.square(x_hat))}

    def critic_term(self, x, sight):
        return 0.0, {'judged': jnp.mean(jnp.square(x))}


def test_the_images_are_the_same_in_every_micro_batch(batch):
    run = Run(accumulate=2, regularisers={'seen': Seen()})
    _, metrics, judged = run.on_the_same_images(run.fresh(), batch)
    np.testing.assert_allclose(judged['judged'], metrics['made'], rtol=1e-5)
    _, other = run.critic(run.fresh(), batch)
    assert abs(float(other['judged']) - float(metrics['made'])) > 1e-3


def test_the_same_images_change_nothing_where_a_row_is_not_finite(hybrid, batch):
    bad = Batch(batch.cond | {'embeds': batch.cond['embeds'].at[1, 0].set(np.nan)},
                shape=batch.shape)
    start = kept(hybrid.fresh())
    state, metrics, judged = hybrid.on_the_same_images(hybrid.fresh(), bad)
    assert not bool(metrics['finite']) and not bool(judged['finite']) and same(state, start)


@pytest.mark.parametrize('accumulate', [1, 2])
def test_a_merged_critic_is_merged_into_by_the_students_update(batch, accumulate):
    run = Run(merge=0.9, accumulate=accumulate)
    plain = Run(accumulate=accumulate)
    state, _ = run.generator(run.fresh(), batch)
    want, _ = plain.generator(plain.fresh(), batch)
    close(kept(state.critic), jax.tree.map(lambda c, s: 0.9 * c + 0.1 * s, kept(want.critic),
                                           kept(want.student)))


def test_a_rollout_is_of_the_student_as_it_is_and_of_its_next_updates_noise(hybrid, batch):
    """The generator's update on its inputs is the one that simulates them itself."""
    z, samples = hybrid.program.rollout(hybrid.frozen, hybrid.fresh(), batch)
    assert len(samples) == 2 and samples[0].shape == z.shape == (BATCH, *batch.shape)
    state, metrics = hybrid.generator(hybrid.fresh(), dataclasses.replace(batch, z=z))
    want, alone = hybrid.generator(hybrid.fresh(), batch)
    close(kept(state.student), kept(want.student))
    np.testing.assert_allclose(metrics['loss'], alone['loss'], rtol=1e-5)
    moved = hybrid.fresh()
    moved.student = jax.tree.map(lambda x: x + 0.1, moved.student)
    _, others = hybrid.program.rollout(hybrid.frozen, moved, batch)
    assert np.abs(others[0] - samples[0]).max() > 1e-3


def test_ema_after_one_update(hybrid, batch):
    """At step 0 the ramp's decay is .1, far from the .9 asked for."""
    start = kept(hybrid.fresh())
    state, _ = hybrid.generator(hybrid.fresh(), batch)
    close(state.ema, jax.tree.map(lambda e, p: 0.1 * e + 0.9 * p, start.ema, kept(state.student)))


@pytest.mark.parametrize('step, ramp, want', [
    (0, True, 0.1), (8, True, 0.5), (10**6, True, 0.98), (0, False, 0.98)])
def test_ema_ramp(step, ramp, want):
    assert float(ema_decay(jnp.int32(step), 0.98, ramp)) == pytest.approx(want)


@pytest.mark.parametrize('poison', [np.nan, np.inf])
def test_an_update_that_is_not_finite_changes_nothing(hybrid, batch, poison):
    """One bad row must not cost the run: parameters, moments, EMA and counters all stay."""
    bad = Batch(batch.cond | {'embeds': batch.cond['embeds'].at[1, 0].set(poison)},
                shape=batch.shape)
    start = kept(hybrid.fresh())
    state, metrics = hybrid.generator(hybrid.fresh(), bad)
    assert not bool(metrics['finite']) and same(state, start)
    state, metrics = hybrid.critic(state, bad)
    assert not bool(metrics['finite']) and same(state, start)
    # And the run goes on from there.
    state, metrics = hybrid.generator(state, batch)
    assert bool(metrics['finite']) and int(state.step) == 1


@pytest.mark.parametrize('name', sorted(set(schedules.SCHEDULES) - {'decoupled_hybrid'}))
def test_every_schedule_takes_an_update(batch, hybrid, name):
    """The hybrid has taken its own above; all of them start from the same state."""
    run = Run(schedule=name)
    start = kept(run.fresh())
    state, metrics = run.generator(run.fresh(), batch)
    assert bool(metrics['finite']) and finite(state) and int(state.step) == 1
    assert not same(state.student, start.student)
    assert float(metrics['loss']) != float(hybrid.generator(hybrid.fresh(), batch)[1]['loss'])


def test_accumulation_keeps_the_scale(batch, hybrid):
    """Two halves are averaged, not summed: a sum would double loss and gradient."""
    run = Run(accumulate=2)
    state, halves = run.generator(run.fresh(), batch)
    _, whole = hybrid.generator(hybrid.fresh(), batch)
    assert bool(halves['finite']) and finite(state) and int(state.step) == 1
    assert float(halves['x_std']) == pytest.approx(float(whole['x_std']), rel=0.1)
    for name in ('loss', 'grad_norm', 'dm_rel_gap'):
        assert 0.4 < float(halves[name]) / float(whole[name]) < 1.7, name


# --- With a GAN ---


@pytest.fixture(scope='module')
def gan_run():
    """A run with a GAN and a critic that is merged towards the student."""
    gan = tiny.make_gan(tiny.small_tokens, tiny.small_params()[0], weight=0.5, critic_weight=0.5,
                        r1=0.1)
    return Run({'gan': gan.init(jax.random.key(5))}, merge=0.9, regularisers={'gan': gan})


def with_real(seed=0):
    real = np.random.default_rng(8).normal(size=(BATCH, *tiny.SHAPE)).astype(np.float32)
    return tiny.make_batch(BATCH, seed, jnp.asarray(real))


def test_an_update_with_a_gan_moves_who_it_should(gan_run):
    """Critic and head in the critic's update; the student, and the merged critic, in the other."""
    start = kept(gan_run.fresh())
    state, metrics = gan_run.critic(gan_run.fresh(), with_real())
    assert bool(metrics['finite']) and np.isfinite(float(metrics['gan_r1']))
    assert not same(start.extra, state.extra) and not same(start.critic, state.critic)
    assert same(start.student, state.student)
    after = kept(state)
    state, metrics = gan_run.generator(state, with_real(1))
    assert bool(metrics['finite']) and float(metrics['gan_loss']) > 0
    assert same(after.extra, state.extra) and not same(after.student, state.student)
    close(state.critic, jax.tree.map(lambda c, s: 0.9 * c + 0.1 * s, after.critic,
                                     kept(state.student)))


def test_the_head_learns_to_tell(gan_run):
    """Twenty updates on the same real images: its loss falls below that of a coin."""
    state, losses = gan_run.fresh(), []
    for _ in range(20):
        state, metrics = gan_run.critic(state, with_real())
        losses.append(float(metrics['gan_critic_loss']))
    assert losses[-1] < losses[0] and float(metrics['gan_real']) > float(metrics['gan_fake'])


# --- The state ---


def test_acts_of_health_are_in_the_state():
    state = jax.eval_shape(lambda p: st.fresh(p, TX, p, TX), {'kernel': jnp.zeros(3)})
    assert state.alpha_share.dtype == jnp.float32 and state.critic_extra.dtype == jnp.int32


def spec_of(host=()):
    make = lambda w: st.fresh({'kernel': w}, TX, {'kernel': w}, TX)
    return st.StateSpec(make, (('kernel', ()),), MESH, (jnp.arange(3.0),), host)


def test_a_states_targets_say_what_create_makes_and_where():
    """Programs are compiled, and checkpoints read, for what is not there yet."""
    spec = spec_of(('ema',))
    targets, state = spec.targets, spec.create()
    assert jax.tree.structure(targets) == jax.tree.structure(state)
    for shape, array in zip(jax.tree.leaves(targets), jax.tree.leaves(state), strict=True):
        assert isinstance(shape, jax.ShapeDtypeStruct)
        assert (shape.shape, shape.dtype, shape.sharding) == (
            array.shape, array.dtype, array.sharding)
    memory = lambda tree: {x.sharding.memory_kind for x in jax.tree.leaves(tree)}
    assert memory(targets.ema) == {'pinned_host'} and memory(targets.student) == {'device'}


def test_a_state_is_made_of_its_source_and_shares_nothing_with_it():
    """Its buffers are donated: an alias of the teacher's would go with them."""
    spec = spec_of()
    state = spec.create()
    np.testing.assert_array_equal(state.student['kernel'], spec.source[0])
    jax.tree.map(lambda x: x.delete(), state)
    np.testing.assert_array_equal(spec.source[0], [0, 1, 2])


def test_a_state_of_shapes_alone_can_be_laid_out():
    shapes = st.StateSpec(spec_of().make, (('kernel', ()),), MESH,
                          (jax.ShapeDtypeStruct((3,), jnp.float32),))
    assert jax.tree.map(lambda x: x.shape, shapes.targets) == jax.tree.map(
        lambda x: x.shape, spec_of().targets)
