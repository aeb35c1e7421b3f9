"""A distillation as a task of `fit`, around a network of one matrix: its batches, its probe."""

import jax
import numpy as np
import pytest
import tiny

from ddmd_jax.data.batch import Batch, CondSpec
from ddmd_jax.data.conditioning import Prompts, encoded
from ddmd_jax.data.order import Order
from ddmd_jax.diffusion.time import Shift
from ddmd_jax.families.base import Latents, Teacher
from ddmd_jax.families.emoji import teacher as emoji
from ddmd_jax.parallel import sharding
from ddmd_jax.train.distillation import Distillation, plan, request_of
from ddmd_jax.train.startup import Startup

LENGTHS = np.asarray([2, 3, 4, 4, 2, 3, 4, 2, 2])  # tokens of nine prompts
SHAPES = ((4, 4, 3), (2, 8, 3))
FIGURES = {'loss': 0.0, 'dm_rel_gap': 0.1, 'dm_cos': 0.99, 'dm_to_ca': 0.1, 'x_std': 0.5}


def lookup(rows, length=None):
    rng = np.random.default_rng(0)
    embeds = rng.normal(size=(len(LENGTHS), 4, 16)).astype(np.float32)[rows]
    mask = np.arange(4)[None] < LENGTHS[rows][:, None]
    return {'embeds': embeds[:, :length], 'mask': mask[:, :length]}


def task_of(predict=tiny.small_network, buckets=(), shapes=(), **fields):
    """The task, and the mesh its batches go to."""
    config = tiny.load_config('emoji')
    config.update_from_flattened_dict({
        'student.steps': 1, 'critic.updates': 1, 'data.global_batch': 2, 'log.probe': 0,
        'train.steps': 2} | fields)
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    teacher = Teacher('small', tiny.small_params()[0], predict, Latents(SHAPES[0]),
                      CondSpec.text(16), Shift(), 'none', emoji.RULES)
    null = {'embeds': np.zeros((1, 4, 16), np.float32), 'mask': np.ones((1, 4), bool)}
    prompts = encoded(np.arange(9), lookup, null=null, caption=str, identity='', lengths=LENGTHS)
    order = Order(prompts.rows, 2, 0, LENGTHS, buckets, shapes or SHAPES[:1])
    return Distillation(config, teacher, prompts, order, plan(config, teacher, null, mesh),
                        Startup())


# --- Batches and programs ---


def test_batches_of_another_signature_go_through_another_program():
    """Buckets of two lengths and latents of two shapes: four programs, and none is mixed up.

    A compiled program takes no other shapes than its own, and none is compiled when it is called.
    """
    task = task_of(buckets=(2, 4), shapes=SHAPES, **{'critic.updates': 0})
    feed, state, seen = task.feed(frozenset()), task.spec.create(), set()

    def taken():
        batch = next(feed)
        seen.add(batch.signature)
        return batch

    for step in range(8):
        state, metrics = task.step(state, taken, step == 0)
        assert bool(metrics['finite'])
    assert len(seen) == 4 and int(state.step) == 8


def test_a_signature_is_of_shapes_and_of_nothing_else():
    cond = lambda *size: {'embeds': np.zeros((*size, 2)), 'mask': np.ones(size, bool)}
    of = lambda rows, length, real, shape: Batch(cond(rows, length), real, shape).signature
    latents = np.zeros((4, 2, 2, 3))
    all_of_them = [of(4, 6, None, (2, 2, 3)), of(4, 5, None, (2, 2, 3)), of(4, 6, None, (1, 4, 3)),
                   of(2, 6, None, (2, 2, 3)), of(4, 6, latents, (2, 2, 3))]
    assert len(set(all_of_them)) == 5
    assert of(4, 6, latents + 1, (2, 2, 3)) == all_of_them[-1]


# --- The probe ---


def brighten(params, x_t, t, cond):
    """A network that multiplies: `gain` says how much."""
    return params['x_embedder']['bias'][0] * jax.numpy.tanh(
        x_t + cond['embeds'][:, 0, 0][:, None, None, None])


def probe_of(count):
    """The probe's figures of a student whose EMA multiplies by so much times the teacher's."""
    task = task_of(brighten, **{'log.probe': count})
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
