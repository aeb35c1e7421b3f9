"""A family of a user's own, with another process: examples/own_teacher."""

import json

import forked
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from ddmd_jax import families
from ddmd_jax.diffusion import process as flow
from ddmd_jax.weights import flat

EXAMPLES = tiny.ROOT / 'examples'


@pytest.fixture
def own(monkeypatch):
    """The example's modules, importable as a user's are."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import own_teacher.process
    import own_teacher.teacher

    return own_teacher


def test_every_step_of_the_table_is_a_level_of_the_flow(own):
    t = own.process.Table()(jnp.linspace(0, 1, own.process.STEPS + 1))
    np.testing.assert_allclose(t[:-1], own.process.T[::-1], rtol=1e-6)
    assert t[-1] == 1 and (np.diff(t) > 0).all()
    assert (own.process.step_of(t[:-1]) == np.arange(own.process.STEPS)[::-1]).all()


def test_the_flows_samples_are_the_processs_rescaled(own):
    x, noise = jax.random.normal(jax.random.key(0), (2, 5, 8, 8, 3))
    step = jnp.asarray([0, 20, 50, 98, 99])
    x_t = flow.renoise(x, jnp.asarray(own.process.T)[step], noise)
    at = lambda table: table[step][:, None, None, None]
    x_vp = at(own.process.A) * x + at(own.process.S) * noise
    np.testing.assert_allclose(own.process.network_input(x_t, step), x_vp, atol=1e-5)
    # The epsilon that made the sample gives back the clean image; fp32 of a division by a.
    np.testing.assert_allclose(own.process.clean(x_t, step, noise), x, atol=1e-4)


def test_the_first_input_is_what_the_network_takes_for_noise(own):
    noise = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    time = own.process.Table()
    last = own.process.step_of(jnp.full(2, time(0.0)))
    assert (last == own.process.STEPS - 1).all()
    np.testing.assert_allclose(
        own.process.network_input(time.first_input(noise), last), noise, rtol=1e-6)


def test_it_is_loaded_by_its_name_and_path_with_a_text_side_or_without(own, tmp_path):
    denoiser = nnx.to_pure_dict(nnx.state(own.teacher.Denoiser(nnx.Rngs(0)), nnx.Param))
    table = np.zeros((len(own.teacher.WORDS) + 1, own.teacher.WIDTH), np.float32)
    whole, bare = tmp_path / 'whole.safetensors', tmp_path / 'bare.safetensors'
    flat.save(whole, {'denoiser': denoiser, 'text': {'table': table}}, {})
    flat.save(bare, denoiser, {})
    loaded = [families.load_teacher(f'own_teacher:{path}') for path in (whole, bare)]
    assert loaded[0].text and not loaded[1].text
    for teacher in loaded:
        jax.tree.map(np.testing.assert_array_equal, teacher.params, denoiser)
    with pytest.raises(families.UnknownFamily, match='as own_teacher:PATH'):
        families.load_teacher('own_teacher')


def run(*argv):
    done = forked.run(*argv, PYTHONPATH=str(EXAMPLES))
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_it_is_trained_distilled_drawn_with_and_exported(tmp_path, own):
    weights, workdir = tmp_path / 'teacher.safetensors', tmp_path / 'run'
    run('own_teacher.train', weights)
    run('ddmd_jax.main', f'--config={EXAMPLES}/own_teacher/config.py', f'--workdir={workdir}',
        f'--config.teacher.path={weights}')
    manifest = json.loads((workdir / 'config.json').read_text())
    assert manifest['teacher']['name'] == 'own_teacher' == families.get('own_teacher').name
    run('ddmd_jax.sample', f'--checkpoint={workdir}', '--prompt=red left', '--compare_teacher',
        f'--out={tmp_path}/images')
    assert len(list((tmp_path / 'images').glob('*.png'))) == 2
    run('ddmd_jax.export', f'--checkpoint={workdir}', '--format=safetensors',
        f'--out={tmp_path}/student')
    params, about = flat.load(tmp_path / 'student' / 'student.safetensors', '')
    assert about['family'] == 'own_teacher'
    run('ddmd_jax.main', f'--config={EXAMPLES}/own_teacher/config.py',
        f'--workdir={tmp_path}/second', f'--config.teacher.path={weights}',
        f'--config.init_from={tmp_path}/student/student.safetensors', '--config.train.steps=2',
        '--config.eval.prompts=16')
    error = {row['name']: row['error'] for row in
             json.loads((workdir / 'eval.json').read_text())['rows']}
    # Two steps of the teacher itself are blurred; its student's are nearer to the captions.
    assert error['teacher_guided'] < error['student'] < 0.8 * error['teacher_few_step'] < 0.4, error
