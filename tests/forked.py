"""``python -m`` without its imports: one process imports JAX, and forks one for each command.

A command is as alone as in a process of its own: before the fork no device is touched, and nothing
of this package is imported. Run as a script this is the server: a line of JSON in, one out.
"""

import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMPORTED = ('jax', 'flax.nnx', 'optax', 'orbax.checkpoint', 'grain')  # what takes seconds


class Commands:
    """``commands(module, *args)`` is what `subprocess.run` of ``python -m module`` returns."""

    def __init__(self):
        self.server = subprocess.Popen(
            [sys.executable, __file__], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env=os.environ | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'})

    def __call__(self, module, *args):
        with tempfile.TemporaryDirectory() as folder:
            out, err = f'{folder}/out', f'{folder}/err'
            request = {'module': module, 'args': list(map(str, args)), 'out': out, 'err': err}
            self.server.stdin.write(json.dumps(request) + '\n')
            self.server.stdin.flush()
            code = json.loads(self.server.stdout.readline())
            return subprocess.CompletedProcess(
                ['python', '-m', module, *args], code, Path(out).read_text(), Path(err).read_text())

    def close(self):
        self.server.stdin.close()
        self.server.wait()


def become(module, args, out, err):
    """Runs a module in this process as ``python -m`` does, or a file, and ends the process."""
    for name, number in ((os.devnull, 0), (out, 1), (err, 2)):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
    sys.argv = [str(module), *args]
    code = 0
    try:
        if isinstance(module, Path):
            runpy.run_path(str(module), run_name='__main__')
        else:
            runpy.run_module(module, run_name='__main__', alter_sys=True)
    except SystemExit as e:
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException as e:
        sys.excepthook(type(e), e, e.__traceback__)
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == '__main__':
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # whatever an import prints is no answer
    for name in IMPORTED:
        importlib.import_module(name)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            become(**json.loads(line))
        answers.write(f'{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n')
        answers.flush()
