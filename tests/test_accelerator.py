"""benchmarks/accelerator.sh, at a tiny size, on a CPU."""

import ast
import copy
import dataclasses
import functools
import json
import os
import re
import shlex
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

sys.path.insert(0, str(tiny.ROOT))  # for benchmarks

from benchmarks.accelerator import first_light, record, selftest, synthetic
from ddmd_jax import config as config_lib
from ddmd_jax.families.emoji import codec
from ddmd_jax.util.errors import UserError
from ddmd_jax.weights import flat

compiled = first_light.compiled  # as it is, whatever `light` puts in its place


def call(out, *parts, **environ):
    return subprocess.run(
        ['bash', str(tiny.ROOT / 'benchmarks' / 'accelerator.sh'), str(out), *parts], text=True,
        env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHON': sys.executable, **environ},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_a_part_that_is_not_there(tmp_path):
    told = call(tmp_path, 'techer')
    assert told.returncode == 1
    assert "no part 'techer'; there are: selftest first_light largest study" in told.stdout


@pytest.mark.parametrize('mib, critic, size', [(81559, 'lora', 'half'), (143771, 'full', 'full')])
def test_every_part_is_called_as_it_takes_it(tmp_path, mib, critic, size):
    """By a `python` that says how it was called: modules are there, configs are sound."""
    told = call(tmp_path, PYTHON='echo', GPU_MIB=str(mib), VS_TORCH_FLAGS='--seconds=9')
    assert told.returncode == 0, told.stdout
    named, *calls = re.split(r'^== (?=\w+, \d+ s$)', told.stdout, flags=re.MULTILINE)
    assert not named and [one.split(',')[0] for one in calls] == [
        'selftest', 'first_light', 'largest', 'study', 'vs_torch', 'sdxl', 'zimage_lora',
        'vs_torch_compiled', 'teacher', 'codec']
    parts = {one.split(',')[0]: shlex.split(one.split('\n', 1)[1]) for one in calls}
    for part, (_, module, _, *flags) in parts.items():
        assert (tiny.ROOT / f'{module.replace(".", "/")}.py').is_file()
        if config := next((x.split('=', 1)[1] for x in flags if x.startswith('--config=')), ''):
            config = tiny.load_config(*config.split(':'))
            given = dict(x.removeprefix('--config.').split('=', 1) for x in flags
                         if x.startswith('--config.'))
            known = {f.path for f in config_lib.fields_of(config)}
            assert set(given) <= known, part
            config.update_from_flattened_dict({k: literal(x) for k, x in given.items()})
            config_lib.check(config)
            if part in ('first_light', 'largest', 'sdxl'):
                assert config.critic.adapter.kind == critic
    assert f'--size={size}' in parts['vs_torch'] and 'vs_torch, 9 s' in told.stdout


def literal(text):
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def test_study_takes_results_that_are_there(tmp_path):
    """Those of one experiment, its three seeds: nothing is left to train."""
    committed = tiny.ROOT / 'docs' / 'steps' / 'results'
    told = call(tmp_path, 'study', STUDY_FLAGS=f'--suite=steps --only=dmd2_4 --results={committed}')
    assert told.returncode == 0 and '0 of 3 runs to do' in told.stdout, told.stdout
    figures = json.loads((tmp_path / 'study.json').read_text())['figures']
    assert figures['wanted'] == 3 and figures['new'] == 0
    assert (tmp_path / 'study' / 'report.html').stat().st_size > 10_000
    assert not (tmp_path / 'study' / 'runs').exists()
    told = call(tmp_path, 'study', STUDY_FLAGS='--suite=stairs')
    assert told.returncode == 1
    assert "study: no suite 'stairs'; known: paper, steps, robustness" in told.stdout


@pytest.mark.slow
def test_teacher_goes_on_from_its_own_weights(tmp_path):
    told = call(tmp_path / '1', 'teacher', TEACHER_FLAGS='--tiny --seconds=900')
    assert told.returncode == 0, told.stdout
    written = tmp_path / '1' / 'teacher.safetensors'
    told = call(tmp_path / '2', 'teacher', TEACHER_FLAGS=(
        f'--tiny --seconds=900 --config.init_from={written}'))
    assert told.returncode == 0, told.stdout
    figures = json.loads((tmp_path / '2' / 'teacher.json').read_text())
    assert figures['device']['platform'] == 'cpu' and figures['figures']['steps'] == 60
    for out in (tmp_path / '1', tmp_path / '2'):
        lines = (out / 'teacher.metrics.jsonl').read_text().splitlines()
        # The end of the first steps, by whose time the rest is planned; every 50; the end.
        assert [json.loads(line)['step'] for line in lines] == [40, 50, 60]
        assert Image.open(out / 'teacher.png').width > 64
        assert flat.load(out / 'teacher.safetensors', '')[1]['steps'] == '60'


@pytest.mark.slow
def test_codec_keeps_the_latents(tmp_path):
    told = call(tmp_path, 'codec', CODEC_FLAGS='--tiny --seconds=900')
    assert told.returncode == 0, told.stdout
    figures = json.loads((tmp_path / 'codec.json').read_text())['figures']
    assert figures['steps'] == 60 and figures['psnr'] > 25
    assert Image.open(tmp_path / 'codec.png').width > 64
    (cfg, old, _), (refined, new, _) = codec.read(), codec.read(tmp_path / 'codec.safetensors')
    assert refined == cfg and flat.identity(new['encoder']) == flat.identity(old['encoder'])


# --- First light, and the test of a device: one tiny Lumina, compiled once ---


@pytest.fixture(scope='module')
def patched():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope='module')
def light(patched, tmp_path_factory):
    """(folder of the results, figures) of a whole first light; what it has built serves others."""
    built, subject = {}, synthetic.subject

    def once(make, key, *args):
        if key not in built:
            built[key] = make(*args)
        return built[key]

    patched.setattr(synthetic, 'subject', lambda config, *args: once(
        subject, config.to_json_best_effort(sort_keys=True), config, *args))
    # Whatever the precision: a CPU has one.
    patched.setattr(first_light, 'compiled', lambda made, precision='': once(
        compiled, id(made), made, precision))
    out = tmp_path_factory.mktemp('light')
    return out, first_light.lit(fp32_config(), out, updates=2, tiny=True)


def fp32_config():
    config = tiny.load_config('lumina')
    config.update_from_flattened_dict(synthetic.FP32)
    return config


@pytest.mark.slow
def test_first_light_is_the_same_twice(light):
    out, figures = light
    written = json.loads((out / 'first_light.json').read_text())
    assert written['part'] == 'first_light' and written['device']['platform'] == 'cpu'
    assert written['figures']['stage'] == 'done' and figures['largest_difference'] == 0
    assert [x['program'] for x in figures['updates']] == ['critic', 'generator'] * 2
    assert [x['metrics'] for x in figures['updates']] == [x['metrics'] for x in figures['again']]
    losses = [x['metrics']['loss'] for x in figures['updates'] if x['program'] == 'generator']
    assert losses[0] != losses[1] and figures['flops_utilisation'] is None
    step = figures['programs']['generator']
    assert step['analytic_flops'] > figures['programs']['critic']['analytic_flops'] > 1e6
    # Nine fp32 copies of the weights at least: state, teacher and gradients.
    assert step['planned_peak_bytes'] > 9 * 4 * figures['parameters']
    assert figures['step_seconds'] > step['seconds'] == np.median(step['seconds_of_each'][1:])


@pytest.mark.slow
def test_first_light_tells_of_nan(light, patched, tmp_path):
    subject = synthetic.subject(fp32_of(light), None, synthetic.TINY_NETWORKS['lumina'])
    programs = first_light.compiled(subject)
    cond = subject.batch.cond | {'embeds': jnp.full_like(subject.batch.cond['embeds'], jnp.inf)}
    bad = dataclasses.replace(subject, batch=dataclasses.replace(subject.batch, cond=cond))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, 'subject', lambda *_: bad)
        patch.setattr(first_light, 'compiled', lambda _: programs)
        with pytest.raises(first_light.NotLit, match='not finite: .*fake_loss = nan'):
            first_light.lit(fp32_config(), tmp_path, tiny=True)
    figures = json.loads((tmp_path / 'first_light.json').read_text())['figures']
    assert figures['stage'] == 'first run' and len(figures['updates']) == 1
    assert figures['updates'][0]['metrics']['fake_loss'] == 'nan'


def fp32_of(light):
    """The config that the figures name, as `lit` has left it."""
    config = fp32_config()
    synthetic.shrunk(config)
    first_light.mesh_of(config)
    return config


def test_first_light_tells_of_another_second_run():
    line = {'program': 'critic', 'metrics': {'fake_loss': 1.5, 'finite': 1.0}}
    other = copy.deepcopy(line)
    other['metrics']['fake_loss'] = 1.5 + 1e-6
    assert first_light.apart([line, line], [line, line]) == (0.0, '')
    difference, where = first_light.apart([line, line], [line, other])
    assert difference == pytest.approx(1e-6 / 1.5, rel=1e-3) and 'update 1 (critic)' in where
    assert first_light.apart([line], [line, line])[0] == np.inf
    assert 'gradient' in first_light.not_finite(
        {'metrics': {'fake_loss': 1.5, 'finite': 0.0}})


@pytest.mark.slow
@pytest.mark.parametrize('part, counts', [
    ('sdxl', {'generator': 1, 'critic_on_images': 1, 'critic': 4}),
    ('zimage_lora', {'critic': 5, 'generator': 1})])
def test_first_light_of_the_others(tmp_path, part, counts):
    """By the command that a GPU is given, at toy size."""
    told = call(tmp_path, part, **{f'{part.upper()}_FLAGS': '--tiny --updates=1 --seconds=900'})
    assert told.returncode == 0, told.stdout
    figures = json.loads((tmp_path / f'{part}.json').read_text())['figures']
    assert figures['of_a_step'] == counts and figures['stage'] == 'done'
    assert [x['program'] for x in figures['updates']] == list(counts)
    assert all(x['metrics']['finite'] == 1 for x in figures['updates'])


def test_the_largest_batch_is_the_last_that_fits(tmp_path):
    peak, asked = 2**20, []

    def counted(config, *args):
        asked.append(config.data.global_batch)
        return types.SimpleNamespace(rows=config.data.global_batch)

    known = lambda made: (None, {'generator': {'planned_peak_bytes': peak * made.rows}})
    find = functools.partial(first_light.largest, out=tmp_path, name='largest', tiny=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, 'subject', counted)
        patch.setattr(first_light, 'compiled', known)
        found = find(fp32_config(), memory=5 * 2 * peak)
        assert found['largest_rows'] == 8 and asked == [2, 4, 8, 16] and found['ended']
        found = find(fp32_config(), memory=1e6 * peak, until=0.0)
        assert found['largest_rows'] == 2 and not found['ended']
        with pytest.raises(first_light.NotLit, match='not even 2 rows fit'):
            find(fp32_config(), memory=peak)
        with pytest.raises(UserError, match='give --memory_gib'):
            find(fp32_config())


def test_precision_reaches_the_threads_that_compile():
    """JAX's setting is a thread's own: fp32 products of a GPU would be TF32 without a word."""
    seen = []

    class Lowered:
        counts = {'critic': 1}

        def lower(self, kind):
            seen.append(jax.jit(jnp.dot).lower(jnp.ones((2, 2)), jnp.ones((2, 2))).as_text())
            raise LookupError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('ddmd_jax.planner.programs.programs', lambda *_: ({}, {}))
        for given in ('highest', ''):
            made = Lowered()
            made.config = made.teacher = made.tokens = None
            made.planned = types.SimpleNamespace(spec=types.SimpleNamespace(mesh=None))
            with pytest.raises(LookupError):
                compiled(made, given)
    assert 'HIGHEST' in seen[0] and 'HIGHEST' not in seen[1]


@pytest.mark.slow
def test_first_light_of_one_rollout(tmp_path):
    config = fp32_config()
    config.critic.order = 'one_rollout'
    figures = first_light.lit(config, tmp_path, updates=2, tiny=True)
    assert figures['of_a_step'] == {'rollout': 1, 'critic': 5, 'generator': 1}
    assert figures['largest_difference'] == 0 and len(figures['updates']) == 6
    losses = [x['metrics']['fake_loss'] for x in figures['updates'] if x['program'] == 'critic']
    assert losses[0] != losses[1]
    cost = {kind: x['analytic_flops'] for kind, x in figures['programs'].items()}
    assert 0 < cost['critic'] < cost['generator'] and cost['rollout'] > 1e6


def test_utilisation_is_of_a_known_peak():
    assert record.peak_flops('NVIDIA H100 80GB HBM3', 'bfloat16') == 989.4e12
    assert record.peak_flops('NVIDIA H100 80GB HBM3', 'float32') is None
    assert record.peak_flops('cpu', 'bfloat16') is None


@pytest.mark.slow
def test_selftest_of_this_device(light, tmp_path):
    found = selftest.tested(tmp_path, jax.devices()[0])
    assert {name: x['passed'] for name, x in found.items()} == dict.fromkeys(found, True)
    assert found['attention']['not_run'] and len(found['attention']['cases']) == 4
    written = json.loads((tmp_path / 'selftest.json').read_text())
    assert list(written['figures']) == list(selftest.CHECKS)


def test_selftest_pads_as_networks_do():
    """cuDNN's kernel is told of a length a row: what is real comes first."""
    mask = selftest.padding()
    assert (mask[:, :-1] >= mask[:, 1:]).all() and not mask.all(axis=1).any()
    assert mask[:, :selftest.IMAGE].all()


def test_selftest_sees_what_is_off():
    got, want = ({'metrics': {'loss': 1.0}, 'gradients': {'student': {'a': np.ones(3)}}}
                 for _ in range(2))
    assert selftest.compared(got, want)['passed']
    got['metrics']['loss'] = 1.01
    assert not selftest.compared(got, want)['passed']
    got['metrics']['loss'], got['gradients']['student']['a'] = 1.0, np.array([1, 1, 1.01])
    assert not selftest.compared(got, want)['passed']
    got['gradients']['student']['a'] = np.array([1, 1, np.nan])
    assert not selftest.compared(got, want)['passed']
    assert selftest.off(np.nan, 1.0) == (np.inf, np.inf)


@pytest.mark.parity
def test_an_update_is_the_one_in_pytorch(tmp_path):
    """Losses, norms of gradients, and where AdamW and EMA have led to, after two updates each."""
    pytest.importorskip('diffusers')
    from benchmarks.accelerator import vs_torch

    found = vs_torch.compared(vs_torch.SIZES['tiny'], 'float32', ('ours', 'torch'), 2, 1)
    assert found['equal'], (found['differences'], found['moved_apart'])
    assert set(found['differences']['torch']) == {
        'loss', 'grad_norm', 'fake_loss', 'critic_grad_norm'}
    assert max(found['differences']['torch'].values()) <= 1e-3
    assert set(found['moved_apart']['torch']) == {'student', 'critic', 'ema'}
    # Captions are padded, and its flash attention for CUDA takes no mask: which kernel ran is told.
    assert [name for name in found['sides']['torch']['attention']
            if name.endswith(('_attention_for_cpu', '_attention_math'))]
    for turns in (found['sides'][side]['turns'] for side in ('ours', 'torch')):
        assert all(turn[kind] > 0 for turn in turns for kind in ('generator', 'critic'))
    # Another learning rate would be seen by where the weights are, and a loss by itself.
    lines = found['updates']['ours']
    other = copy.deepcopy(lines)
    other[-1]['metrics']['loss'] *= 1.01
    assert vs_torch.differences(other, lines)['loss'] == pytest.approx(0.01)
    a, b, start = ({'x': np.full(3, x)} for x in (1.2, 1.1, 1.0))
    assert vs_torch.moved_apart(a, b, start) == pytest.approx(1.0)
