"""Processes of one run, forked from one that has imported what takes seconds (see `forked.py`).

Run as a script this is the server: a line of JSON in (a list of processes), one out (their codes).
"""

import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import forked
import tiny

DRIVER = Path(__file__).with_name('driver.py')
IMPORTED = (*forked.IMPORTED, 'orbax.checkpoint', 'ddmd_jax.main', 'ddmd_jax.train.codec',
            'ddmd_jax.train.pretrain', 'ddmd_jax.report.page')


class Pairs:
    """``pairs([(arguments of driver.py, environment), ...])`` runs them at once, to their ends."""

    def __init__(self):
        path = os.pathsep.join(map(str, [tiny.ROOT, tiny.ROOT / 'tests', DRIVER.parent]))
        self.server = subprocess.Popen(
            [sys.executable, __file__], cwd=tiny.ROOT, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
            env=os.environ | {'PYTHONPATH': os.pathsep.join(
                filter(None, [path, os.environ.get('PYTHONPATH', '')]))})

    def __call__(self, processes):
        """[(exit code, stdout, stderr)]"""
        with tempfile.TemporaryDirectory() as folder:
            asked = [{'args': list(map(str, args)), 'environ': os.environ | environ,
                      'out': f'{folder}/{i}.out', 'err': f'{folder}/{i}.err'}
                     for i, (args, environ) in enumerate(processes)]
            self.server.stdin.write(json.dumps(asked, default=dict) + '\n')
            self.server.stdin.flush()
            codes = json.loads(self.server.stdout.readline())
            return [(code, Path(one['out']).read_text(), Path(one['err']).read_text())
                    for code, one in zip(codes, asked, strict=True)]

    def close(self):
        self.server.stdin.close()
        self.server.wait()


def begin(args, environ, out, err):
    """Becomes ``driver.py`` with these arguments; no device has been touched yet."""
    import fsspec
    import jax

    os.environ.clear()
    os.environ.update(environ)
    jax.config.update('jax_platforms', environ.get('JAX_PLATFORMS') or None)
    fsspec.config.set_conf_env(fsspec.config.conf)
    with contextlib.suppress(AttributeError):  # an empty one is none
        jax.config.update('jax_compilation_cache_dir',
                          environ.get('JAX_COMPILATION_CACHE_DIR') or None)
    forked.become(DRIVER, args, out, err)


if __name__ == '__main__':
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # whatever an import prints is no answer
    for name in IMPORTED:
        importlib.import_module(name)
    for line in sys.stdin:
        children = []
        for one in json.loads(line):
            children.append(os.fork())
            if not children[-1]:
                begin(**one)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        answers.write(json.dumps(codes) + '\n')
        answers.flush()
