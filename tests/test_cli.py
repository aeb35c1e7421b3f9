"""Bad input at the command line: one clear line, the right exit code, nothing written."""

import os
import subprocess
import sys

import pytest
import tiny

CASES = [
    (['--config=nofile.py'], 2, 'nofile.py cannot be read'),
    (['--config=configs/emoji.py', '--config.method.alhpa=3'], 2, 'alpha'),
    (['--config=configs/emoji.py', '--config.train.steps=few'], 2, 'config.train.steps'),
    (['--config=configs/emoji.py:hybird'], 2, 'method.schedule'),
    (['--config=configs/emoji.py', '--workdir='], 1, '--workdir'),
    (['--config=configs/emoji.py', '--workdir=/proc/nowhere'], 1, 'cannot be made'),
    (['--config=configs/emoji.py', '--config.teacher.path=/nowhere.safetensors'], 1,
     'weights missing: /nowhere.safetensors'),
]


@pytest.mark.parametrize('args, code, words', CASES)
def test_bad_input(tmp_path, args, code, words):
    if not any(a.startswith('--workdir') for a in args):
        args = [*args, f'--workdir={tmp_path / "run"}']
    done = subprocess.run([sys.executable, '-m', 'ddmd_jax.main', *args], cwd=tiny.ROOT,
                          capture_output=True, text=True, env=os.environ | {'JAX_PLATFORMS': 'cpu'})
    errors = [x for x in done.stderr.splitlines() if x.startswith(('main:', 'config:', 'method.'))]
    assert done.returncode == code, done.stderr
    assert words in ' '.join(errors) and 'Traceback' not in done.stderr
