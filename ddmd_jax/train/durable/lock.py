"""A run's folder belongs to one run at a time."""

import contextlib
import errno
from collections.abc import Iterator
from typing import Any

import jax

from ddmd_jax.parallel import distributed
from ddmd_jax.train.durable.checkpoint import anywhere, warn
from ddmd_jax.util import files
from ddmd_jax.util.errors import UserError
from ddmd_jax.util.places import Place

NAME = 'lock'
NO_LOCKS = errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL


class LockError(UserError):
    """Another run has the folder."""


def attempt(file: Place) -> tuple[Any, str]:
    """(the lock on `file`, which lasts as long as this object, or None; who has it, or '').

    Where there are no locks, neither, and a warning.
    """
    try:
        return files.lock(file)
    except OSError as e:
        if e.errno not in NO_LOCKS:
            raise
        warn(f'the file system of {file.parent} has no locks ({e.strerror}): nothing keeps a '
             'second run out of it')
        return None, ''


@contextlib.contextmanager
def held(workdir: Place) -> Iterator[None]:
    """Locks ``workdir/lock`` while inside, by process 0 for all of a run's processes.

    Raises:
      LockError: another run has it; names its process and host.
      DistributedError: a process sees another folder.
    """
    file, holder = None, ''
    if jax.process_index() == 0:
        file, holder = attempt(workdir / NAME)
    try:
        if anywhere(bool(holder)):
            raise LockError(f'{workdir} is in use by {holder or "another run"}; wait for it, end '
                            'it, or choose another --workdir')
        distributed.same_folder(workdir / NAME)
        yield
    finally:
        if file is not None:
            file.close()
