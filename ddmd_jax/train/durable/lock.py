"""A run's folder belongs to one run at a time."""

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from ddmd_jax.train.durable.checkpoint import anywhere

NAME = 'lock'


class LockError(RuntimeError):
    """Another run has the folder."""


@contextlib.contextmanager
def held(workdir: Path) -> Iterator[None]:
    """Locks ``workdir/lock`` while inside, by process 0 for all of a run's processes.

    The lock is the kernel's (`flock`): it ends with the process that holds it, however that
    dies. The text in the file is for people only.

    Raises:
      LockError: another run has it; names its process and host.
    """
    file, holder = (_take(workdir / NAME) if jax.process_index() == 0 else (None, ''))
    try:
        if anywhere(bool(holder)):
            raise LockError(f'{workdir} is in use by {holder or "another run"}; wait for it, end '
                            'it, or choose another --workdir')
        yield
    finally:
        if file is not None:
            file.close()


def _take(path: Path):
    """(the open file, '') with the lock, or (None, its holder)."""
    file = path.open('a+')
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        holder = ' '.join(file.read().split()) or 'another run'
        file.close()
        return None, holder
    file.truncate(0)
    file.write(f'process {os.getpid()} on {socket.gethostname()}, since '
               f'{time.strftime("%Y-%m-%d %H:%M:%S %z")}\n')
    file.flush()
    return file, ''
