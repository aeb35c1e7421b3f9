"""A distillation as a task of `fit`, around a network of one matrix: its batches, its probe."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import SHAPES, config_of, task_of

from ddmd_jax.data.batch import Batch
from ddmd_jax.data.conditioning import Prompts
from ddmd_jax.families.emoji import judge
from ddmd_jax.parallel import sharding
from ddmd_jax.train import train
from ddmd_jax.train.distillation import parts_of_batch, plan
from ddmd_jax.train.watch.student import request_of
from ddmd_jax.weights.flat import WeightsError

FIGURES = {'loss': 0.0, 'dm_rel_gap': 0.1, 'dm_cos': 0.99, 'dm_to_ca': 0.1, 'x_std': 0.5}


# --- Batches and programs ---


def test_batches_of_another_signature_go_through_another_program():
    """Buckets of two lengths and latents of two shapes: four programs, and none is mixed up.

    A compiled program takes no other shapes than its own, and none is compiled when it is called.
    """
    task = task_of(config_of(**{'critic.updates': 0}), buckets=(2, 4), shapes=SHAPES)
    feed, state, seen = task.feed(frozenset()), task.spec.create(), set()

    def taken():
        batch = next(feed)
        seen.add(batch.signature)
        return batch

    for step in range(8):
        state, metrics = task.step(state, taken, step == 0)
        assert bool(metrics['finite'])
    assert len(seen) == 4 and int(state.step) == 8


def test_an_offloaded_teacher_leaves_nothing_on_a_device():
    task = task_of(config_of(**{'train.offload': 'teacher'}))
    for tree in (task.frozen.teacher, task.teacher.params):
        assert {x.sharding.memory_kind for x in jax.tree.leaves(tree)} == {'pinned_host'}


def test_the_null_prompt_is_the_one_that_the_config_names():
    null = {'embeds': np.ones((1, 4, 16), np.float32), 'mask': np.ones((1, 4), bool)}
    mesh, teacher = sharding.make_mesh({}, jax.devices()[:1]), task_of(config_of()).teacher
    of = lambda **fields: plan(config_of(**fields), teacher, null, mesh).frozen.null
    assert of()['embeds'].all() and of(**{'method.null': 'encoded'})['embeds'].all()
    assert not of(**{'method.null': 'zeros'})['embeds'].any()


def test_a_suite_is_refused_before_training_where_there_is_no_autoencoder():
    config = config_of()
    with pytest.raises(WeightsError, match='has no autoencoder, and eval.suite measures images'):
        train.prepare(config, task_of(config).teacher)


def test_a_judge_that_cannot_be_read_is_told_before_training(monkeypatch):
    config = config_of()
    teacher = task_of(config).teacher
    drawing = dataclasses.replace(teacher.latents, decode=lambda z: z)

    def load(world):
        raise WeightsError('weights missing: judge')

    monkeypatch.setattr(judge, 'load', load)
    with pytest.raises(WeightsError, match='weights missing: judge'):
        train.prepare(config, dataclasses.replace(teacher, latents=drawing))


def test_a_signature_is_of_shapes_and_of_nothing_else():
    cond = lambda *size: {'embeds': np.zeros((*size, 2)), 'mask': np.ones(size, bool)}
    of = lambda rows, length, real, shape: Batch(cond(rows, length), real, shape).signature
    latents = np.zeros((4, 2, 2, 3))
    all_of_them = [of(4, 6, None, (2, 2, 3)), of(4, 5, None, (2, 2, 3)), of(4, 6, None, (1, 4, 3)),
                   of(2, 6, None, (2, 2, 3)), of(4, 6, latents, (2, 2, 3))]
    assert len(set(all_of_them)) == 5
    assert of(4, 6, latents + 1, (2, 2, 3)) == all_of_them[-1]


def test_a_step_takes_as_many_batches_as_it_has_updates():
    """`critic.updates` of the critic and one of the generator; a warm-up before the first step;
    what the verdict added, from when the state is looked at anew."""
    task = task_of(config_of(**{'critic.updates': 2, 'critic.warmup': 3}))
    feed, state, taken = task.feed(frozenset()), task.spec.create(), []

    def step(state, fresh):
        before = len(taken)
        state, _ = task.step(state, lambda: taken.append(next(feed)) or taken[-1], fresh)
        return state, len(taken) - before

    counts = []
    for fresh in (True, False, True):  # the third as after a restart: no second warm-up
        state, count = step(state, fresh)
        counts.append(count)
    assert counts == [2 + 3 + 1, 2 + 1, 2 + 1]
    state.critic_extra = state.critic_extra + 1
    state, count = step(state, True)
    assert (count, int(state.step), int(state.critic_step)) == (2 + 1 + 1, 4, 3 + 2 * 4 + 1)


def test_in_dmd2s_order_a_step_has_as_many_updates_of_the_critic(monkeypatch):
    """The first of them on the student's images, of the same batch; a warm-up before."""
    task = task_of(config_of(**{'critic.updates': 2, 'critic.warmup': 1,
                                'critic.order': 'same_images'}))
    feed, state, kinds = task.feed(frozenset()), task.spec.create(), []
    run = task._run
    monkeypatch.setattr(task, '_run', lambda kind, *rest: kinds.append(kind) or run(kind, *rest))
    for fresh in (True, False):
        state, metrics = task.step(state, lambda: next(feed), fresh)
        assert bool(metrics['finite']) and {'loss', 'fake_loss', 'critic_grad_norm'} <= set(metrics)
    assert kinds == ['critic', *['generator', 'critic', 'critic'] * 2]
    assert (int(state.step), int(state.critic_step)) == (2, 5)


def test_updates_that_a_verdict_added_go_on_without_it():
    """A run that is resumed with another `train.on_health` has a program for them."""
    task = task_of(config_of(**{'critic.order': 'same_images'}))
    feed, state = task.feed(frozenset()), task.spec.create()
    state.critic_extra = state.critic_extra + 1
    state, metrics = task.step(state, lambda: next(feed), True)
    assert bool(metrics['finite']) and int(state.critic_step) == 2


def test_updates_on_one_rollout_share_a_batch(monkeypatch):
    """A step has one, whose samples the critic's updates take in turn, and whose inputs are the
    generator's; a warm-up has one for as many updates as the student has steps, each from noise
    of its own."""
    task = task_of(config_of(**{'critic.updates': 3, 'critic.warmup': 3, 'student.steps': 2,
                                'critic.order': 'one_rollout'}))
    feed, state, ran, run = task.feed(frozenset()), task.spec.create(), [], task._run
    inputs = []

    def spy(kind, state, batch):
        ran.append((kind, batch))
        out = run(kind, state, batch)
        if kind == 'rollout':
            inputs.append(np.asarray(out[0]))
        return out

    monkeypatch.setattr(task, '_run', spy)
    taken, metrics = [], {}
    for fresh in (True, False):
        state, metrics = task.step(state, lambda: taken.append(next(feed)) or taken[-1], fresh)
        assert bool(metrics['finite']) and {'loss', 'fake_loss'} <= set(metrics)
    step = ['rollout', *['critic'] * 3, 'generator']
    assert [kind for kind, _ in ran] == [
        'rollout', 'critic', 'critic', 'rollout', 'critic', *step, *step]
    assert (len(taken), int(state.step), int(state.critic_step)) == (4, 2, 9)
    *first, last = ran[-5:]
    assert last[1].x is None and last[1].z.shape == first[1][1].x.shape
    assert all(batch.z is None for _, batch in first)
    x = [np.asarray(batch.x) for kind, batch in first if kind == 'critic']
    assert not np.array_equal(x[0], x[1]) and np.array_equal(x[0], x[2])  # of two steps
    assert not any((one == two).all((1, 2, 3)).any() for one, two in zip(inputs, inputs[1:]))
    same = [np.asarray(batch.cond['embeds']) for _, batch in ran[-5:]]
    assert all(np.array_equal(same[0], one) for one in same)


def test_on_one_rollout_a_device_need_not_have_every_step():
    """Where rows are simulated each to its own step, a device with fewer rows would wait."""
    fields = {'student.steps': 4, 'train.accumulate': 2}
    assert parts_of_batch(config_of(**fields)) == 8
    assert parts_of_batch(
        config_of(**fields, **{'critic.order': 'one_rollout'})) == 2


# --- The probe ---


def brighten(params, x_t, t, cond):
    """A network that multiplies: `gain` says how much."""
    return params['x_embedder']['bias'][0] * jnp.tanh(
        x_t + cond['embeds'][:, 0, 0][:, None, None, None])


def probe_of(count):
    """The probe's figures of a student whose EMA multiplies by so much times the teacher's."""
    task = task_of(config_of(**{'log.probe': count}), brighten)
    state = task.spec.create()

    def probe(gain):
        state.ema = jax.tree.map(lambda x: gain * x, state.student)
        values, _ = task.measure(state, [], dict(FIGURES))
        return {name: values[name] for name in ('ema_std', 'ema_cast', 'ema_saturation')
                if name in values}

    return probe


def test_a_run_is_probed_against_the_teachers_weights():
    probe_at = probe_of(4)
    more = probe_at(1.5)  # first, as in a resumed run: the start is not what is probed first
    start = probe_at(1.0)
    assert (start['ema_std'], start['ema_cast']) == (1.0, 0.0)
    assert more['ema_std'] == pytest.approx(1.5, rel=1e-5)
    assert probe_at(1.5) == more  # the same prompts and noise each time


def test_a_probe_of_no_samples_is_off():
    assert probe_of(0)(1.5) == {}


# --- Prompts that are shown ---


def test_prompts_that_are_shown_are_different_ones_as_long_as_there_are():
    prompts = Prompts(np.asarray([2, 5, 5, 5, 7]), None, lambda rows: {'row': rows}, {}, str, '')
    shown = lambda count: [int(name.prompt) for name in request_of(prompts, count, seed=0).names]
    assert sorted(shown(3)) == [2, 5, 7]
    assert len(shown(7)) == 7 and set(shown(7)) == {2, 5, 7} and shown(7) == shown(7)
    np.testing.assert_array_equal(request_of(prompts, 7, seed=0).cond['row'], shown(7))
