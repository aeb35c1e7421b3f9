"""``python tests/faults/driver.py FLAGS``: `ddmd_jax.main`, told where to be hurt.

    KILL=SITE:N:SECONDS   SIGKILL, so many seconds after SITE has been come to N times; a site is
                          step, saving (a save begins), saved (its arrays are on the host), place
                          or manifest (half of that item is written), summing (checksums are
                          written) or evaluation
    SIGNAL=SITE:N:SECONDS SIGTERM and SIGINT in place of it
    DIGEST=1              prints ``digest WHAT STEP HEX`` of the state at start and end
    EVALUATE=1            also evaluates; else the run ends with its last checkpoint
    FILL=PATH             all but 200 KiB (LEFT) of the disk that PATH is on go into that file at
                          step 3 (AT), by process 0, and FREE=N gives them back at step N
    HANG=SITE:N:0         the N-th time, the file of place or manifest is a pipe that nobody reads:
                          whoever opens it waits for ever
    LIMIT=N               from step N on no file may grow beyond 64 KiB
    TOY=1                 trains a matrix in place of networks, see `toy`
    NAN=N                 the batch with this number is NaN, in this process
    BREAK=N               a device fails in step N
    CLOCK=N               from step N on the clock shows a day less
    IDENTITY=X            the data are called X
    UNREADABLE=1          no file of a checkpoint can be read just now, in this process
"""

import contextlib
import errno
import hashlib
import itertools
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

import jax
import numpy as np
import toy
from absl import app
from orbax.checkpoint._src.handlers.json_checkpoint_handler import JsonCheckpointHandler

from ddmd_jax import main
from ddmd_jax.evaluation import evaluate
from ddmd_jax.train import train
from ddmd_jax.train.durable import checksums, resume, saving
from ddmd_jax.train.feed import Feed


def digest(tree):
    """Hex digits that name every bit of a tree, wherever its parts are."""
    leaves = jax.tree.leaves(tree)
    mesh = leaves[0].sharding.mesh
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    host = jax.device_get(jax.jit(lambda x: x, out_shardings=whole)(leaves))
    return hashlib.sha256(b''.join(np.asarray(x).tobytes() for x in host)).hexdigest()[:16]


class Trap:
    """Counts visits to one site and sends this process signals there."""

    def __init__(self, words, *signals):
        self.site, count, seconds = words.split(':') if words else ('', '0', '0')
        self.left, self.seconds, self.signals = int(count), float(seconds), signals

    def at(self, site, first=lambda: None):
        """`first` is what is done in between if this is it."""
        if site != self.site:
            return
        self.left -= 1
        if self.left == 0:
            first()
            threading.Timer(self.seconds, self._hurt).start() if self.seconds else self._hurt()

    def _hurt(self):
        for number in self.signals:
            os.kill(os.getpid(), number)


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


def poison(number):
    """Puts NaN into one batch; a feed reads them in order, whatever it skips."""
    spoil = lambda x: x * np.nan if np.asarray(x).dtype == np.float32 else x
    original = Feed.__init__

    def init(feed, data, place, skip=frozenset()):
        def placed(batch):
            bad = data.get_state()['next_index'] - 1 == number
            return place(jax.tree.map(spoil, batch) if bad else batch)

        original(feed, data, placed, skip)

    Feed.__init__ = init


def trap_items(traps, pipe):
    """Sites in the middle of the writing of a checkpoint's two JSON items, and one that hangs."""
    write, sites = JsonCheckpointHandler._save_fn, {'data': 'place', 'manifest': 'manifest'}

    async def half(handler, item, directory):
        file = directory / handler._filename
        site = sites[directory.name.partition('.')[0]]
        for trap in traps:
            trap.at(site, first=lambda: file.write_text('{"next_index": '))
        pipe.at(site, first=lambda: os.mkfifo(file))
        await write(handler, item, directory)

    JsonCheckpointHandler._save_fn = half


def unreadable(path):
    raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))


def each_step(environ):
    """A function to be called before each step."""
    number, clock, filler = itertools.count(1), time.time, Path(environ.get('FILL', ''))
    full, left = environ.get('AT', '3'), int(environ.get('LEFT', '200')) * 1024
    opened = []  # the run's checkpoints, the newest attempt's last
    patch(saving.Checkpoints, '__init__', lambda checkpoints, *args: opened.append(checkpoints))

    def step():
        n = str(next(number))
        if 'FILL' in environ and n in (full, environ.get('FREE')):
            opened[-1].wait()
            if jax.process_index():
                pass
            elif n == full:
                disk = os.statvfs(filler.parent)
                filler.write_bytes(b'x' * (disk.f_bavail * disk.f_frsize - left))
            else:
                filler.unlink()
        if n == environ.get('LIMIT'):
            opened[-1].wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, resource.RLIM_INFINITY))
        if n == environ.get('CLOCK'):
            time.time = lambda: clock() - 86400
        if n == environ.get('BREAK'):
            raise jax.errors.JaxRuntimeError('INTERNAL: the device halted')

    return step


def hook(environ):
    """Puts everything that the environment asks for into place."""
    traps = [Trap(environ.get('KILL', ''), signal.SIGKILL),
             Trap(environ.get('SIGNAL', ''), signal.SIGTERM, signal.SIGINT)]
    at = lambda site: [trap.at(site) for trap in traps]
    step = each_step(environ)
    prepare = (lambda config: toy.make_task(config)) if 'TOY' in environ else train.prepare

    def prepared(config):
        task = prepare(config)
        for name, what in (('IDENTITY', 'data_identity'), ('TEACHER', 'teacher_identity')):
            if environ.get(name):
                task.identities = task.identities | {what: environ[name]}
        patch(task, 'step', lambda *args: (at('step'), step()))
        return task

    train.prepare = prepared
    patch(saving.Checkpoints, 'save', lambda *args: at('saving'), lambda _: at('saved'))
    patch(checksums, 'write', lambda folder: at('summing'))
    patch(evaluate, 'evaluate', lambda *args: at('evaluation'))
    trap_items(traps, Trap(environ.get('HANG', '')))
    if 'EVALUATE' not in environ:
        evaluate.Comparison = evaluate.evaluate = evaluate.sheet = lambda *args: None
    if 'DIGEST' in environ:
        tell = lambda what, state: print('digest', what, int(state.step), digest(state), flush=True)
        patch(resume, 'start', after=lambda state: tell('start', state))
        patch(train, 'fit', after=lambda result: tell('end', result[0]))
    if environ.get('UNREADABLE'):
        checksums.digest = unreadable
    if 'NAN' in environ:
        poison(int(environ['NAN']))


if __name__ == '__main__':
    hook(os.environ)
    with contextlib.suppress(BrokenPipeError):
        app.run(main.main, flags_parser=main.parse_flags)
