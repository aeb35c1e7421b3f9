"""``python tests/faults/driver.py FLAGS``: `ddmd_jax.main`, told where to be killed.

    KILL=SITE:N:SECONDS   SIGKILL, so many seconds after SITE has been come to N times; a site is
                          step, saving (a save begins), saved (its arrays are on the host),
                          summing (checksums are written) or evaluation
    DIGEST=1              prints ``digest WHAT STEP HEX`` of the state at start and end
    EVALUATE=1            also evaluates; else the run ends with its last checkpoint
    FILL=PATH             all but 200 KiB of the disk that PATH is on go into that file at step 3
    NAN=N                 the batch with this number is NaN
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import signal
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

import jax
import numpy as np
from absl import app

from ddmd_jax import main
from ddmd_jax.metrics import report
from ddmd_jax.train import checkpoint, checksums, distill, loop


def digest(tree):
    """Hex digits that name every bit of a tree, wherever its parts are."""
    leaves = jax.tree.leaves(tree)
    mesh = leaves[0].sharding.mesh
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    host = jax.device_get(jax.jit(lambda x: x, out_shardings=whole)(leaves))
    return hashlib.sha256(b''.join(np.asarray(x).tobytes() for x in host)).hexdigest()[:16]


class Killer:
    """Counts visits to one site and ends the process there."""

    def __init__(self, words):
        self.site, count, seconds = words.split(':') if words else ('', '0', '0')
        self.left, self.seconds = int(count), float(seconds)

    def at(self, site):
        if site != self.site:
            return
        self.left -= 1
        if self.left == 0:
            kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
            threading.Timer(self.seconds, kill).start() if self.seconds else kill()


def patch(owner, name, before=None, after=None):
    """Calls `before(*args)` and `after(result)` around a function."""
    original = getattr(owner, name)

    def wrapped(*args, **kwargs):
        if before:
            before(*args)
        result = original(*args, **kwargs)
        if after:
            after(result)
        return result

    setattr(owner, name, wrapped)


def poisoned(task, number):
    """`task` with NaN in one batch; the feed reads them in order, whatever it skips."""
    told, place = [], task.place

    def poison(batch):
        bad = task.data.get_state()['next_index'] - 1 == number
        told.append(number)
        out = place(batch)
        spoil = lambda x: x * np.nan if x.dtype == np.float32 else x
        return dataclasses.replace(out, rows=jax.tree.map(spoil, out.rows)) if bad else out

    return dataclasses.replace(task, place=poison)


def hook(environ):
    """Puts everything that the environment asks for into place."""
    killer = Killer(environ.get('KILL', ''))
    steps = [0]

    def step(training):
        killer.at('step')
        steps[0] += 1
        if steps[0] == 3 and 'FILL' in environ:
            training.checkpoints.wait()
            disk = os.statvfs(Path(environ['FILL']).parent)
            Path(environ['FILL']).write_bytes(b'x' * (disk.f_bavail * disk.f_frsize - 200 * 1024))

    patch(loop._Training, '_advance', step)
    patch(checkpoint.Checkpoints, 'save', lambda *args: killer.at('saving'),
          lambda _: killer.at('saved'))
    patch(checksums, 'write', lambda folder: killer.at('summing'))
    patch(report, 'final', lambda *args: killer.at('evaluation'))
    if 'EVALUATE' not in environ:
        report.final = lambda *args: None
    if 'DIGEST' in environ:
        tell = lambda what, state: print('digest', what, int(state.step), digest(state), flush=True)
        patch(loop, '_start', after=lambda state: tell('start', state))
        patch(loop._Training, 'run', after=lambda state: tell('end', state))
    if 'NAN' in environ:
        make = distill.make_task
        distill.make_task = lambda *args: poisoned(make(*args), int(environ['NAN']))


if __name__ == '__main__':
    hook(os.environ)
    with contextlib.suppress(BrokenPipeError):
        app.run(main.main, flags_parser=main.parse_flags)
