"""The real loop end to end, at toy size: train, resume, refuse, diverge, evaluate."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
import small
import tiny

from ddmd_jax import families, main
from ddmd_jax.config import check
from ddmd_jax.families.base import LoadOptions
from ddmd_jax.families.emoji.pretraining import pretraining
from ddmd_jax.method import schedules
from ddmd_jax.train import train
from ddmd_jax.train.durable.checkpoint import CheckpointError
from ddmd_jax.train.durable.rollback import DivergedError
from ddmd_jax.util.errors import UserError

ROW = ['name', 'steps', 'evaluations', 'guidance', 'all_match', 'all_match_held_out', 'frechet',
       'colour_error', 'std', 'diversity']
HEALTH = {'dm_rel_gap', 'dm_cos', 'dm_to_ca', 'x_std', 'saturation', 'floor_hit_ca',
          'floor_hit_dm', 'fake_loss', 'grad_norm', 'critic_grad_norm', 'health',
          'ema_std', 'ema_cast', 'ema_saturation'}


@pytest.fixture(scope='module')
def finished(weights, tmp_path_factory):
    """A run of two steps of a NextDiT through `main`, with everything it writes."""
    workdir, config = tmp_path_factory.mktemp('run'), tiny.load_config('emoji')
    config.teacher.path, config.train.steps, config.data.global_batch = str(weights), 2, 4
    config.checkpoint.every, config.log.every, config.log.images_every = 2, 1, 100
    config.log.probe, config.student.steps = 3, 2
    config.eval.update({'prompts': 3, 'held_out': 3, 'batch': 4, 'teacher_steps': 2})
    check(config)
    main.run(config, workdir, window=(2, 2))
    return workdir


def lines(workdir):
    return [json.loads(x) for x in (workdir / 'metrics.jsonl').read_text().splitlines()]


def test_a_run_writes_what_the_contract_says(finished):
    result = json.loads((finished / 'eval.json').read_text())
    assert [r['name'] for r in result['rows']] == [
        'real', 'teacher_guided', 'teacher_few_step', 'teacher_in_student_sampler', 'student']
    assert all(list(r)[:len(ROW)] == ROW for r in result['rows'])
    assert [r['evaluations'] for r in result['rows'][1:]] == [4, 2, 2, 2]
    assert set(result['seconds']) == {'train', 'input_wait', 'total'}
    assert (result['seed'], result['step']) == (0, 2)
    assert result['config']['method']['schedule'] == 'decoupled_hybrid'
    logged = lines(finished)
    assert [x['step'] for x in logged] == [1, 2] and next(iter(logged[0])) == 'step'
    assert set(logged[0]) >= HEALTH
    assert (finished / 'samples.png').stat().st_size > 1000
    assert any((finished / 'tensorboard').iterdir())


def test_a_run_leaves_a_page_a_profile_and_what_they_are_made_of(finished):
    page = (finished / 'report.html').read_text()
    assert 'step 2 of 2' in page and 'teacher_few_step' in page  # with the evaluation
    assert [x['step'] for x in map(json.loads, (finished / 'times.jsonl').open())] == [1, 2]
    about = json.loads((finished / 'run.json').read_text())
    assert set(about) >= {'command', 'devices', 'versions'}
    assert page.count('<img src="data:image/webp') == 1 + len(
        list((finished / 'pictures').glob('panels_*.png'))) > 1
    assert len(list((finished / 'profile').rglob('*.xplane.pb'))) == 1


# --- Around a network of one matrix ---


def trained(workdir, steps=2, **fields):
    """The state that a run leaves."""
    config = small.config_of(**{'train.steps': steps} | fields)
    return train.fit(small.task_of(config), config, workdir)[0]


@pytest.fixture(scope='module')
def half(tmp_path_factory):
    """A run's folder after two steps; copied by who goes on from it."""
    trained(tmp_path_factory.getbasetemp() / 'half')
    return tmp_path_factory.getbasetemp() / 'half'


@pytest.fixture
def stopped(half, tmp_path):
    return shutil.copytree(half, tmp_path / 'run')


def test_a_report_that_fails_ends_no_run(tmp_path, capfd):
    def broken(workdir):
        raise RuntimeError('no such template\nand much more')

    config = small.config_of(**{'log.images_every': 1})
    state, _ = train.fit(small.task_of(config), config, tmp_path, train.Options(report=broken))
    assert int(state.step) == 2
    err = capfd.readouterr().err
    assert err.count('warning: the report cannot be written (no such template); later: ') == 1


def test_resuming_is_bitwise_the_uninterrupted_run(stopped, tmp_path):
    whole, parts = trained(tmp_path / 'whole', 4), trained(stopped, 4)
    assert int(parts.step) == int(parts.critic_step) == 4
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert lines(tmp_path / 'whole') == lines(stopped)


def test_what_is_offloaded_stays_away_in_the_loop_and_comes_back_on_resuming(tmp_path):
    kinds = lambda state: {x.sharding.memory_kind for x in jax.tree.leaves(state.ema)}
    run = lambda steps, offload: trained(tmp_path, steps, **{'train.offload': offload})
    assert kinds(run(1, 'ema+teacher')) == {'pinned_host'}
    away = run(2, 'ema+teacher')
    assert int(away.step) == 2 and kinds(away) == {'pinned_host'}
    assert kinds(run(3, 'none')) == {'device'}  # where it lies is no other experiment


def test_a_checkpoint_of_another_config_is_refused_by_field(stopped):
    changed = re.escape(f'method.alpha: {small.config_of().method.alpha} -> 9.0')
    with pytest.raises(CheckpointError, match=changed) as e:
        trained(stopped, 4, **{'method.alpha': 9.0, 'log.every': 7})  # the latter may differ
    assert 'log.every' not in str(e.value)
    assert len(str(e.value).splitlines()) == 1


def test_a_truncated_checkpoint_is_named(stopped):
    manifest = next((stopped / 'checkpoints' / '2' / 'manifest').rglob('metadata'))
    manifest.write_text('{')
    with pytest.raises(CheckpointError, match='checkpoints/2'):
        trained(stopped, 4)


def test_divergence_stops_and_keeps_the_last_good_checkpoint(stopped):
    config = small.config_of(**{'train.steps': 8})
    task = small.task_of(config)
    step = task.step

    def poisoned(state, next_batch, fresh):
        factor = np.nan if int(state.step) == 3 else 1.0
        return step(state, lambda: jax.tree.map(
            lambda x: x * factor if x.dtype == np.float32 else x, next_batch()), fresh)

    task.step = poisoned
    with pytest.raises(DivergedError, match='step 4.*last good checkpoint, step 2'):
        train.fit(task, config, stopped)
    state = trained(stopped, 4)  # nothing was lost: it goes on from 2
    assert int(state.step) == 4
    assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(state))


@pytest.mark.parametrize('name', sorted(schedules.SCHEDULES))
def test_every_schedule_of_the_config_is_the_tasks(name):
    """`test_update.py` has an update of each."""
    config = tiny.load_config('emoji', name)
    config.student.steps = 1
    assert small.task_of(config).recipe.schedule is schedules.SCHEDULES[name]


def test_critic_warm_up_happens_once(tmp_path):
    run = lambda steps: trained(tmp_path, steps, **{'critic.warmup': 3, 'critic.updates': 2})
    assert int(run(1).critic_step) == 5
    assert int(run(2).critic_step) == 7


# --- Pre-training ---


def test_pretraining_writes_a_teacher_that_loads(tmp_path):
    config = tiny.load_config('emoji_teacher')
    config.teacher.model.denoiser.update(tiny.TOY['denoiser'])
    config.teacher.model.text.update(tiny.TOY['text'])
    config.train.steps, config.data.global_batch, config.data.scenes = 2, 4, 100
    check(config)
    main.run(config, tmp_path)
    teacher = families.get('emoji').load(LoadOptions(str(tmp_path / 'teacher.safetensors')))
    cond = teacher.encode(['a red apple', ''])
    x_hat = teacher.predict_clean(teacher.params, np.zeros((2, *teacher.latents.shape)), 0.5, cond)
    assert x_hat.shape == (2, 16, 16, 8) and np.isfinite(np.asarray(x_hat)).all()
    assert lines(tmp_path)[-1]['step'] == 2


def test_pretraining_of_a_teacher_of_other_words_or_latents_is_refused():
    config = tiny.load_config('emoji_teacher')
    config.teacher.model.text.vocab_size = 32
    with pytest.raises(UserError, match=r'teacher\.model: it knows 32 words of 56'):
        pretraining(config)
