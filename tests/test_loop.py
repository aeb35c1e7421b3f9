"""The real loop end to end, at toy size: train, resume, refuse, diverge, evaluate."""

import json

import jax
import numpy as np
import pytest
import tiny

from ddmd_jax import families as teachers, main
from ddmd_jax.config import check
from ddmd_jax.families.emoji import teacher as emoji, tokenizer
from ddmd_jax.parallel import sharding
from ddmd_jax.train import distill, loop
from ddmd_jax.train.durable import checkpoint
from ddmd_jax.train.watch.profiling import Beside

# The teacher's text encoder must know every word of the shipped tokenizer.
TOY = {'denoiser': tiny.MODEL['denoiser'],
       'text': tiny.MODEL['text'] | {'vocab_size': tokenizer.load().get_vocab_size(),
                                     'max_length': 10}}
ROW = ['name', 'steps', 'evaluations', 'guidance', 'glyph_match', 'glyph_match_held_out',
       'background_match', 'frechet', 'colour_error', 'variance']
HEALTH = {'dm_rel_gap', 'dm_cos', 'dm_to_ca', 'x_std', 'saturation', 'floor_hit_ca',
          'floor_hit_dm', 'fake_loss', 'grad_norm', 'critic_grad_norm', 'health',
          'ema_std', 'ema_cast', 'ema_saturation'}


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp('teacher') / 'toy.safetensors'
    emoji.save(path, TOY, tiny.random_params(TOY, 0), steps=0)
    return path


def toy_config(weights, steps, schedule='decoupled_hybrid'):
    config = tiny.load_config('emoji', schedule)
    config.teacher.path = str(weights)
    config.train.steps, config.data.global_batch = steps, 4
    # A schedule that decays depends on how long the run is, and these are cut short.
    config.optim.student.decay = config.optim.critic.decay = 0.0
    config.checkpoint.every, config.log.every, config.log.images_every = 2, 1, 100
    config.log.probe = 0  # a program more to compile; `finished` has it
    config.eval.update({'prompts': 3, 'held_out': 3, 'batch': 4, 'teacher_steps': 2})
    check(config)
    return config


def trained(config, workdir):
    """The state `config` leaves in `workdir`, without the evaluation."""
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    teacher = teachers.load_teacher('emoji')
    task = distill.make_task(config, teacher, mesh)
    return loop.run(task, config, workdir, mesh, teacher.identity)[0]


def lines(workdir):
    return [json.loads(x) for x in (workdir / 'metrics.jsonl').read_text().splitlines()]


@pytest.fixture(scope='module')
def finished(weights, tmp_path_factory):
    """A run of two steps through `main`, with everything it writes."""
    workdir = tmp_path_factory.mktemp('run')
    config = toy_config(weights, 2)
    config.log.probe = 3
    main.run(config, workdir, window=(2, 2))
    return workdir


def test_a_run_writes_what_the_contract_says(finished):
    result = json.loads((finished / 'eval.json').read_text())
    assert [r['name'] for r in result['rows']] == [
        'real', 'teacher_guided', 'teacher_few_step', 'student']
    assert all(list(r) == ROW for r in result['rows'])
    assert [r['evaluations'] for r in result['rows'][1:]] == [4, 4, 4]
    assert set(result['seconds']) == {'train', 'input_wait', 'total'}
    assert result['seed'] == 0 and result['config']['method']['schedule'] == 'decoupled_hybrid'
    logged = lines(finished)
    assert [x['step'] for x in logged] == [1, 2] and next(iter(logged[0])) == 'step'
    assert set(logged[0]) >= HEALTH
    assert (finished / 'samples.png').stat().st_size > 1000
    assert any((finished / 'tensorboard').iterdir())


def test_a_run_leaves_a_page_a_profile_and_what_they_are_made_of(finished):
    page = (finished / 'report.html').read_text()
    assert 'step 2 of 2' in page and 'teacher_few_step' in page  # with the evaluation
    assert [x['step'] for x in map(json.loads, (finished / 'times.jsonl').open())] == [1, 2]
    assert json.loads((finished / 'draws.json').read_text())['updates'] == 2
    about = json.loads((finished / 'run.json').read_text())
    assert set(about) >= {'command', 'devices', 'versions'}
    assert page.count('<img src="data:image/webp') == 1 + len(
        list((finished / 'pictures').glob('panels_*.png'))) > 1
    assert len(list((finished / 'profile').rglob('*.xplane.pb'))) == 1


def test_a_report_that_fails_ends_no_run(weights, tmp_path, capfd):
    def broken(workdir):
        raise RuntimeError('no such template\nand much more')

    config = toy_config(weights, 2)
    config.log.images_every = 1
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    teacher = teachers.load_teacher('emoji')
    task = distill.make_task(config, teacher, mesh)
    state, _ = loop.run(task, config, tmp_path, mesh, teacher.identity, Beside(report=broken))
    assert int(state.step) == 2
    err = capfd.readouterr().err
    assert err.count('warning: the report cannot be written (no such template); later: ') == 1


def test_resuming_is_bitwise_the_uninterrupted_run(weights, tmp_path):
    whole = trained(toy_config(weights, 4), tmp_path / 'whole')
    trained(toy_config(weights, 2), tmp_path / 'parts')
    parts = trained(toy_config(weights, 4), tmp_path / 'parts')
    assert int(parts.step) == 4 and int(parts.critic_step) == 8
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert lines(tmp_path / 'whole') == lines(tmp_path / 'parts')


@pytest.mark.slow
def test_what_is_offloaded_stays_away_in_the_loop_and_comes_back_on_resuming(weights, tmp_path):
    config = toy_config(weights, 1)
    config.train.offload = 'ema+teacher'
    kinds = lambda state: {x.sharding.memory_kind for x in jax.tree.leaves(state.ema)}
    assert kinds(trained(config, tmp_path)) == {'pinned_host'}
    config.train.steps = 2
    away = trained(config, tmp_path)
    assert int(away.step) == 2 and kinds(away) == {'pinned_host'}
    config.train.offload, config.train.steps = 'none', 3  # where it lies is no other experiment
    assert kinds(trained(config, tmp_path)) == {'device'}


def test_a_checkpoint_of_another_config_is_refused_by_field(weights, finished):
    config = toy_config(weights, 4)
    config.method.alpha = 9.0
    config.log.every = 7  # may differ
    with pytest.raises(checkpoint.CheckpointError, match=r'method\.alpha: 1\.5 -> 9\.0') as e:
        trained(config, finished)
    assert 'log.every' not in str(e.value)
    assert len(str(e.value).splitlines()) == 1


def test_a_truncated_checkpoint_is_named(weights, tmp_path):
    trained(toy_config(weights, 2), tmp_path)
    manifest = next((tmp_path / 'checkpoints' / '2' / 'manifest').rglob('metadata'))
    manifest.write_text('{')
    with pytest.raises(checkpoint.CheckpointError, match='checkpoints/2'):
        trained(toy_config(weights, 4), tmp_path)


def test_divergence_stops_and_keeps_the_last_good_checkpoint(weights, tmp_path):
    trained(toy_config(weights, 2), tmp_path)
    config = toy_config(weights, 8)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    teacher = teachers.load_teacher('emoji')
    task = distill.make_task(config, teacher, mesh)

    def poisoned(state, next_batch, first):
        factor = np.nan if int(state.step) == 3 else 1.0
        return task.advance(state, lambda: jax.tree.map(
            lambda x: x * factor if x.dtype == np.float32 else x, next_batch()), first)

    bad = loop.dataclasses.replace(task, advance=poisoned)
    with pytest.raises(loop.DivergedError, match='step 4.*last good checkpoint, step 2'):
        loop.run(bad, config, tmp_path, mesh, teacher.identity)
    state = trained(toy_config(weights, 4), tmp_path)  # nothing was lost: it goes on from 2
    assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(state))


@pytest.mark.parametrize('schedule', ['coupled_shared', 'decoupled_full', 'decoupled_constrained'])
def test_every_schedule_of_the_config_takes_a_step(weights, tmp_path, schedule):
    state = trained(toy_config(weights, 1, schedule), tmp_path)
    assert int(state.step) == 1 and int(state.critic_step) == 2


def test_critic_warm_up_happens_once(weights, tmp_path):
    config = toy_config(weights, 1)
    config.critic.warmup = 3
    assert int(trained(config, tmp_path).critic_step) == 5
    config.train.steps = 2
    assert int(trained(config, tmp_path).critic_step) == 7


def test_pretraining_writes_a_teacher_that_loads(tmp_path):
    config = tiny.load_config('emoji_teacher')
    config.teacher.model.denoiser.update(TOY['denoiser'])
    config.teacher.model.text.update(TOY['text'])
    config.train.steps, config.data.global_batch = 2, 4
    check(config)
    main.run(config, tmp_path)
    teacher = teachers.load_teacher(str(tmp_path / 'teacher.safetensors'))
    cond = teacher.encode(['red apple', ''])
    x_hat = teacher.predict_clean(teacher.params, np.zeros((2, *teacher.latents.shape)), 0.5, cond)
    assert x_hat.shape == (2, 24, 24, 3) and np.isfinite(np.asarray(x_hat)).all()
    assert lines(tmp_path)[-1]['step'] == 2
