"""benchmarks/accelerator.sh, at a tiny size, on a CPU."""

import json
import os
import subprocess
import sys

import pytest
import tiny
from PIL import Image

from ddmd_jax.families.emoji import codec
from ddmd_jax.weights import flat


def call(out, *parts, **environ):
    return subprocess.run(
        ['bash', str(tiny.ROOT / 'benchmarks' / 'accelerator.sh'), str(out), *parts], text=True,
        env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHON': sys.executable, **environ},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_a_part_that_is_not_there(tmp_path):
    told = call(tmp_path, 'techer')
    assert told.returncode == 1 and "no part 'techer'; there are: teacher" in told.stdout


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
