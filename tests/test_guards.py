"""Steps that go wrong, in the real loop around a model of one number: left out, replayed, given up.

A batch's loss is its rows' mean, so that every batch leaves its mark on the number.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from toy_task import ToyTask

from ddmd_jax.data.order import Order
from ddmd_jax.parallel import sharding
from ddmd_jax.train import state as st, train as trains
from ddmd_jax.train.durable import guards, rollback
from ddmd_jax.train.durable.checkpoint import CheckpointError
from ddmd_jax.train.durable.rollback import DivergedError, GuardError
from ddmd_jax.train.update import keep_if
from ddmd_jax.util import jsonl as lines

BATCH, STEPS = 4, 6
MESH = sharding.make_mesh({}, jax.devices()[:1])


@jax.jit
def generator(state, rows):
    loss = jnp.mean(rows)
    new = dataclasses.replace(
        state, step=state.step + 1, ema=jax.tree.map(lambda x: 0.9 * x + loss, state.ema))
    finite = jnp.isfinite(loss)
    return keep_if(finite, new, state), {
        'loss': loss, 'finite': finite, 'alpha_share': state.alpha_share,
        'critic_extra': state.critic_extra}


@jax.jit
def critic(state, rows):
    return dataclasses.replace(state, critic_step=state.critic_step + 1), {
        'fake_loss': jnp.mean(rows), 'finite': jnp.isfinite(jnp.mean(rows))}


def make_task(bad=(), warmup=0):
    """A task whose batches `bad`, by number, are NaN."""
    spec = st.StateSpec(lambda: st.fresh(*[{'w': jnp.ones(1)}, optax.sgd(0.1)] * 2),
                        ((r'.', ()),), MESH)
    return ToyTask(
        spec, Order(np.arange(32), BATCH, seed=0), BATCH,
        lambda planned: planned.rows.astype(np.float32) / 32,
        lambda rows, number: jnp.asarray(rows) * (np.nan if number in bad else 1),
        generator, critic, warmup=warmup)


def train(workdir, bad=(), warmup=0, **changes):
    """The state at the end of a run."""
    return trains.fit(make_task(bad, warmup), config_of(**changes), workdir)[0]


def config_of(every=2, steps=STEPS, resume=''):
    config = tiny.load_config('emoji')
    config.train.steps, config.train.on_nan, config.resume = steps, 'rollback', str(resume)
    config.checkpoint.every, config.log.every, config.log.images_every = every, 2, 1000
    return config


def told(workdir):
    """Of each entry in `bad_batches.jsonl`: (step, checkpoint gone back to, batches)."""
    return [(e['step'], e['checkpoint'], e['batches']) for e in rollback.read(workdir)]


def left_out(batches, steps=STEPS):
    """The number that a run is left with that never saw some batches; two are taken a step."""
    order, ema = Order(np.arange(32), BATCH, seed=0), np.float32(1)
    seen = [n for n in range(2 * steps + len(batches)) if n not in batches]
    for n in seen[1::2]:
        ema = np.float32(0.9) * ema + np.mean(order[n].rows.astype(np.float32) / 32)
    return ema


def test_a_bad_batch_is_left_out_and_the_rest_is_as_if_it_had_not_been_there(tmp_path):
    state = train(tmp_path, bad={7})  # step 4's second
    assert told(tmp_path) == [(4, 2, [6, 7])]
    assert int(state.step) == STEPS
    np.testing.assert_allclose(state.ema['w'][0], left_out({6, 7}), rtol=1e-6)


@pytest.mark.parametrize('bad, place', [({6, 7}, 'step 2'), ({1}, 'the start'),
                                        ({0, 1}, 'the start')])
def test_a_run_goes_back_to_where_it_can(tmp_path, capfd, bad, place):
    train(tmp_path, bad)
    ((step, checkpoint, _),) = told(tmp_path)
    assert checkpoint == (2 if place == 'step 2' else None) and step == min(bad) // 2 + 1
    assert f'back at {place}, leaving out batches ' in capfd.readouterr().err


def test_before_the_first_checkpoint_a_run_begins_again(tmp_path):
    state = train(tmp_path, bad={5}, every=100)
    assert told(tmp_path) == [(3, None, [4, 5])]
    np.testing.assert_allclose(state.ema['w'][0], left_out({4, 5}), rtol=1e-6)
    # The batches that came before are not new ones, and nothing is logged twice.
    assert [x['step'] for x in lines.read(tmp_path / 'metrics.jsonl')] == [2, 4, 6]
    assert int(state.critic_step) == STEPS


def test_fewer_steps_than_are_done_are_refused(tmp_path):
    train(tmp_path)
    before = (tmp_path / 'config.json').read_bytes()
    with pytest.raises(CheckpointError, match='train.steps is 2, and this run has done 6 already'):
        train(tmp_path, steps=2)
    assert (tmp_path / 'config.json').read_bytes() == before
    assert int(train(tmp_path).step) == STEPS


def test_the_warm_up_of_a_run_that_begins_again_is_done_again(tmp_path):
    state = train(tmp_path, bad={5}, every=100, warmup=3)  # step 1 takes five batches
    assert told(tmp_path) == [(2, None, [5, 6])]
    assert int(state.critic_step) == STEPS + 3


def test_a_run_that_goes_on_from_another_goes_back_there(tmp_path):
    train(tmp_path / 'other', steps=2)
    state = train(tmp_path / 'run', bad={7}, every=100, resume=tmp_path / 'other')
    assert told(tmp_path / 'run') == [(4, None, [6, 7])]
    np.testing.assert_allclose(state.ema['w'][0], left_out({6, 7}), rtol=1e-6)
    entry = replay(tmp_path / 'run', {7}, resume=tmp_path / 'other')
    assert entry['step'] == 4 and np.isnan(entry['metrics']['loss'])


def replay(workdir, bad, **changes):
    return trains.replay(make_task(bad), config_of(**changes), workdir)


@pytest.mark.parametrize('bad, every', [({5}, 100), ({5}, 2), ({4}, 2)])
def test_a_step_is_replayed_from_where_the_run_went_back_to(tmp_path, bad, every):
    train(tmp_path, bad, every=every)
    before = sorted(tmp_path.rglob('*'))
    entry = replay(tmp_path, bad, every=every)
    assert (entry['step'], entry['metrics']['finite']) == (3, 0)
    name = 'loss' if bad == {5} else 'fake_loss'
    assert np.isnan(entry['metrics'][name])
    assert entry['bad'] == [name]
    assert sorted(tmp_path.rglob('*')) == before


@pytest.mark.parametrize('every, place', [(2, 'step 2'), (100, 'the start')])
def test_after_three_times_to_one_place_a_run_ends(tmp_path, every, place):
    bad = set(range(5, 100))
    with pytest.raises(DivergedError, match=f'step 3: NaN or Inf in .*; went back to {place} '
                       '3 times already: it is not the batches'):
        train(tmp_path, bad, every=every)
    assert [x[:2] for x in told(tmp_path)] == [(3, 2 if every == 2 else None)] * 3
    assert [x[2] for x in told(tmp_path)] == [[4, 5], [6, 7], [8, 9]]
    # Nor does it try for ever when it is started again.
    with pytest.raises(DivergedError, match='3 times already'):
        train(tmp_path, bad, every=every)
    assert len(told(tmp_path)) == 3
    # Three at another place are three more.
    train(tmp_path, {5, 7, 9}, every=every)


def test_two_places_are_counted_apart(tmp_path):
    bad = {3, 5, 7, 13, 15, 17}  # three at the start, then three after the first checkpoint
    state = train(tmp_path, bad)
    assert [x[1] for x in told(tmp_path)] == [None] * 3 + [2] * 3
    assert int(state.step) == STEPS
    np.testing.assert_allclose(
        state.ema['w'][0], left_out({n for x in told(tmp_path) for n in x[2]}), rtol=1e-6)


def test_what_is_tried_again_is_the_whole_attempt(tmp_path):
    """Feed, state, log and checkpoints of the failed one are closed before the next is begun."""
    task, told_of = make_task(bad={3}), []
    feed, show = task.feed, task.show
    task.feed = lambda skip: (told_of.append(('feed', sorted(skip))), feed(skip))[1]
    logs = []
    task.show = lambda state, step, log: (logs.append(log), told_of.append(('show', step)),
                                          show(state, step, log))
    trains.fit(task, config_of(every=100), tmp_path)
    assert told_of == [('feed', []), ('show', 0), ('feed', [2, 3]), ('show', 0), ('show', STEPS)]
    assert logs[0] is not logs[1] is logs[2]


@pytest.mark.parametrize('bad', [{10}, {11}])
def test_the_last_step_is_looked_at_too(tmp_path, bad):
    """A failure is noticed a step late; there is none after the last."""
    state = train(tmp_path, bad)
    assert told(tmp_path) == [(STEPS, 4, [10, 11])] and int(state.step) == STEPS
    np.testing.assert_allclose(state.ema['w'][0], left_out({10, 11}), rtol=1e-6)


def test_a_run_that_is_not_to_go_back_ends(tmp_path):
    config = config_of()
    config.train.on_nan = 'abort'
    with pytest.raises(DivergedError, match='step 4: .*last good checkpoint, step 2, is kept'):
        trains.fit(make_task(bad={7}), config, tmp_path)
    assert told(tmp_path) == []
    assert int(train(tmp_path).step) == STEPS  # nothing was lost


# --- Health that acts ---


def unwell(workdir, how, steps, collapses=99, bad=(), **changes):
    """(state, metrics lines) of a run that is over-baked at every line, one each step.

    From step `collapses` on it is worse.
    """
    config = config_of(steps=steps, **changes)
    config.train.on_health, config.log.every = how, 1
    task = make_task(bad)
    task.measure = lambda state, history, values: (values | {
        'health': 'over-baked' if values['step'] < collapses else 'collapsing',
        'health_reason': 'so'}, '')
    state, _ = trains.fit(task, config, workdir)
    lines = [json.loads(x) for x in (workdir / 'metrics.jsonl').read_text().splitlines()]
    return state, lines


def test_alpha_is_halved_until_it_is_low_enough(tmp_path):
    state, lines = unwell(tmp_path, 'lower_alpha', 14)
    shares = [1.0] * 3 + [0.5] * 3 + [0.25] * 3 + [guards.LEAST_ALPHA] * 5
    assert [x['alpha_share'] for x in lines] == shares
    assert float(state.alpha_share) == guards.LEAST_ALPHA and int(state.critic_step) == 14


def test_the_critic_gets_more_updates_also_when_the_run_is_resumed(tmp_path):
    """3 steps of one critic update, 3 of two, then killed in effect: the rest has three."""
    state, lines = unwell(tmp_path, 'raise_critic', 6, every=6)
    assert int(state.critic_step) == 3 * 1 + 3 * 2 and int(state.critic_extra) == 2
    state, lines = unwell(tmp_path, 'raise_critic', 8, every=6)
    assert [x['critic_extra'] for x in lines] == [0.0] * 3 + [1.0] * 3 + [2.0] * 2
    assert int(state.critic_step) == 9 + 2 * 3


def test_a_step_is_not_replayed_with_another_recipe(tmp_path):
    """Alpha was lowered at step 6, after the checkpoint of step 4: 5 and 6 would be others."""
    unwell(tmp_path, 'lower_alpha', 8, every=4, bad={12})
    with pytest.raises(GuardError, match='step 7 cannot be replayed: train.on_health changed alp'):
        replay(tmp_path, {12}, every=4)


@pytest.mark.parametrize('how, last', [('stop', 3), ('stop_collapsing', 5), ('nothing', 7)])
def test_a_run_can_be_stopped_where_it_collapses_and_not_before(tmp_path, how, last):
    state, lines = unwell(tmp_path, how, 7, collapses=5)
    assert int(state.step) == last == lines[-1]['step']
    assert [x['health'] for x in lines][4:5] == (['collapsing'] if last >= 5 else [])


def test_who_judges_a_line_is_told_the_step_of_each(tmp_path):
    """Rates of growth are read off them, and a resumed run's first lines come from a file."""
    seen = []

    def measure(state, history, values):
        seen.append([*(h['step'] for h in history), values['step']])
        return values, ''

    for steps in (4, 6):
        task = make_task()
        task.measure = measure
        trains.fit(task, config_of(steps=steps), tmp_path)
    assert seen == [[2], [2, 4], [2, 4, 6]]


def test_nothing_is_done_unless_it_is_asked_for(tmp_path):
    state, _ = unwell(tmp_path, 'nothing', 8)
    assert float(state.alpha_share) == 1.0 and int(state.critic_extra) == 0
