"""Toy runs in processes of their own, and what is left of them."""

from __future__ import annotations

import json
import socket
import subprocess
from pathlib import Path

import forked
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny

DRIVER = Path(__file__).with_name('driver.py')
# Lines and checkpoints do not coincide: an interval has to survive what comes between.
FIELDS = {
    'train.steps': 6, 'data.global_batch': 4, 'student.steps': 2, 'critic.updates': 1,
    'checkpoint.every': 2, 'log.every': 3, 'log.images_every': 1000, 'log.probe': 0,
    'log.report': False, 'optim.student.lr': 1e-3, 'optim.critic.lr': 1e-3,
    'optim.student.decay': 0.0, 'optim.critic.decay': 0.0, 'eval.prompts': 3, 'eval.held_out': 3,
    'eval.batch': 4, 'eval.teacher_steps': 2}
PARTS = ('student', 'critic', 'ema', 'student_opt', 'critic_opt')


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


class Runs:
    """Starts runs that share one teacher; `always` goes into the environment of each."""

    def __init__(self, root, **always):
        self.root, self.weights, self.always = root, tiny.save_toy(root), always

    def arguments(self, workdir, fields=None, flags=()):
        named = FIELDS | {'teacher.path': self.weights} | (fields or {})
        return ['--config=configs/emoji.py', f'--workdir={workdir}',
                *(f'--config.{name}={value}' for name, value in named.items()), *flags]

    def start(self, workdir, fields=None, flags=(), devices=1, **environ):
        """A process, its output as text; names in capitals go into its environment."""
        return forked.start(DRIVER, *self.arguments(workdir, fields, flags),
                            **{'XLA_FLAGS': tiny.xla_flags(devices)} | self.always | environ)

    def start_together(self, count, workdir, fields=None, flags=(), devices=2, **environ):
        """So many processes of one run; each has its own of a list of `fields` or in `environ`."""
        port, mine = free_port(), lambda given, i: given[i] if isinstance(given, list) else given
        return [self.start(workdir, mine(fields, i), [
            *flags, f'--coordinator=127.0.0.1:{port}', f'--num_processes={count}',
            f'--process_id={i}'], devices, **{k: mine(v, i) for k, v in environ.items()})
            for i in range(count)]

    def finish(self, *args, code=0, **kwargs):
        """(stdout, stderr) of a run from its start to its end, which has this code."""
        return ended(self.start(*args, **kwargs), code)


def ended(process, code=0, timeout=300):
    """(stdout, stderr) of a process that ends with this code, and within so many seconds."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f'still there after {timeout} s\n{"".join(process.communicate())}')
    assert process.returncode == code, f'{process.returncode}\n{out}\n{err}'
    return out, err


def said(err, *starts):
    """Lines of stderr that begin with one of `starts`; a bar's own are between carriage returns."""
    lines = [x.strip() for x in err.replace('\r', '\n').splitlines()]
    return [x for x in lines if x.startswith(starts or ('main: ', 'warning: ', 'config: '))]


def lines(workdir):
    return [json.loads(x) for x in (workdir / 'metrics.jsonl').read_text().splitlines()]


def digests(out):
    """``{what: hex}`` of what a driver with DIGEST printed."""
    found = [x.split() for x in out.splitlines() if x.startswith('digest ')]
    return {what: (int(step), hexes) for _, what, step, hexes in found}


def evaluated(workdir):
    """What a run's evaluation says and shows, without how long it took."""
    result = json.loads((workdir / 'eval.json').read_text())
    return {k: v for k, v in result.items() if k != 'seconds'}, (
        workdir / 'samples.png').read_bytes()


def state_of(workdir, step):
    """A saved state as numpy arrays: this process has not the devices that wrote it."""
    reader, folder = ocp.PyTreeCheckpointer(), workdir / 'checkpoints' / str(step) / 'state'
    tree = reader.metadata(folder).item_metadata.tree
    kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    return reader.restore(folder, args=ocp.args.PyTreeRestore(restore_args=kinds))


def assert_same(one, two, step, parts=PARTS):
    """Weights, EMA, optimisers, counters, place in the data and metrics are equal, bit for bit."""
    a, b = state_of(one, step), state_of(two, step)
    assert {*parts, 'step'} <= set(a)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)
    data = lambda w: (w / 'checkpoints' / str(step) / 'data' / 'metadata').read_text()
    assert data(one) == data(two)
    assert lines(one) == lines(two)
