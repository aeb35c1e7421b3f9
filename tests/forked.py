"""Processes of Python without their imports: a server has imported JAX, and forks each of them.

A process is as alone as one that was started: before the fork no device is touched, and its
environment, flags, signals and exit code are its own. Run as a script this is the server: a line
of JSON in asks for a process, one out is its number.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMPORTED = (  # what takes seconds
    'jax', 'flax.nnx', 'optax', 'orbax.checkpoint', 'grain', 'ddmd_jax.train.train',
    'ddmd_jax.train.codec', 'ddmd_jax.train.pretrain', 'ddmd_jax.evaluation.evaluate',
    'ddmd_jax.report.page', 'ddmd_jax.planner.command', 'ddmd_jax.study.claims_page',
    'ddmd_jax.export.write', 'ddmd_jax.evaluation.options', 'ddmd_jax.families.sdxl',
    'ddmd_jax.families.zimage', 'ddmd_jax.families.lumina', 'pyarrow.parquet', 'scipy.stats')


class Process:
    """A forked process, handled as a `subprocess.Popen` whose output is text."""

    def __init__(self, pid, folder):
        self.pid, self.returncode = pid, None
        self.out, self.err, self._code = (
            Path(folder.name, name) for name in ('out', 'err', 'code'))
        self._kept = folder  # goes with this object

    def poll(self):
        if self.returncode is None and self._code.exists():
            self.returncode = int(self._code.read_text())
        return self.returncode

    def wait(self, timeout=None):
        end = time.monotonic() + timeout if timeout else None
        while self.poll() is None:
            if end and time.monotonic() > end:
                raise subprocess.TimeoutExpired(f'process {self.pid}', timeout)
            time.sleep(0.01)
        return self.returncode

    def communicate(self, timeout=None):
        self.wait(timeout)
        return self.out.read_text(), self.err.read_text()

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


@functools.cache
def _server():
    """One for all tests of this process, with which it ends."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH', '')]))
    return subprocess.Popen([sys.executable, __file__], cwd=ROOT, stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, text=True,
                            env=os.environ | {'PYTHONPATH': path})


def start(what, *args, cwd=ROOT, **environ):
    """A process of a module, as ``python -m`` starts it, or of a file, NAME.py.

    Its environment is ours and `environ`.
    """
    folder = tempfile.TemporaryDirectory(prefix='forked_', ignore_cleanup_errors=True)
    asked = {'what': str(what), 'file': str(what).endswith('.py'), 'args': list(map(str, args)),
             'cwd': str(cwd), 'environ': os.environ | environ,
             'folder': folder.name}
    process = Process(0, folder)
    for path in (process.out, process.err):
        path.touch()
    server = _server()
    server.stdin.write(json.dumps(asked, default=dict) + '\n')
    server.stdin.flush()
    process.pid = int(server.stdout.readline())
    return process


def run(what, *args, **kwargs):
    """The finished process, as `subprocess.run` returns it; arguments are those of `start`."""
    process = start(what, *args, **kwargs)
    out, err = process.communicate(timeout=600)
    return subprocess.CompletedProcess([what, *args], process.returncode, out, err)


def become(what, file, args, cwd, environ, folder):
    """Runs the module or file in this process and ends it, as the interpreter does."""
    import jax

    for name, number in ((os.devnull, 0), (f'{folder}/out', 1), (f'{folder}/err', 2)):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environ)
    sys.argv, sys.path[0] = [what, *args], str(Path(what).parent) if file else cwd
    sys.path[1:1] = [x for x in environ.get('PYTHONPATH', '').split(os.pathsep)
                     if x and x not in sys.path]
    # What JAX and fsspec have read from the environment of the server.
    jax.config.update('jax_platforms', environ.get('JAX_PLATFORMS') or None)
    with contextlib.suppress(AttributeError):  # an empty one is none
        jax.config.update('jax_compilation_cache_dir',
                          environ.get('JAX_COMPILATION_CACHE_DIR') or None)
    if 'fsspec' in sys.modules:
        sys.modules['fsspec'].config.set_conf_env(sys.modules['fsspec'].config.conf)
    if file:
        runpy.run_path(what, run_name='__main__')
    else:
        runpy.run_module(what, run_name='__main__', alter_sys=True)
    sys.exit()


def keep(asked, answers):
    """Forks the process, tells its number and waits for its end, in a process of its own."""
    if os.fork():
        return
    child = os.fork()
    if not child:
        become(**asked)
    print(child, file=answers, flush=True)
    code = Path(asked['folder']) / 'code'
    written = code.with_name('written')
    written.write_text(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
    with contextlib.suppress(OSError):  # nobody waits for it any more
        written.rename(code)
    os._exit(0)


if __name__ == '__main__':
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # whatever an import prints is no answer
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # no process walks through, and so copies, what all of them have
    for line in sys.stdin:
        keep(json.loads(line), answers)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
