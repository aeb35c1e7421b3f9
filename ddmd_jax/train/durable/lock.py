"""A run's folder belongs to one run at a time."""

import contextlib
import errno
from collections.abc import Iterator

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


@contextlib.contextmanager
def held(workdir: Place) -> Iterator[None]:
    """Locks ``workdir/lock`` while inside, by process 0 for all of a run's processes.

    Raises:
      LockError: another run has it; names its process and host.
      DistributedError: a process sees another folder.
    """
    file, holder = None, ''
    if jax.process_index() == 0:
        try:
            file, holder = files.lock(workdir / NAME)
        except OSError as e:
            if e.errno not in NO_LOCKS:
                raise
            warn(f'the file system of {workdir} has no locks ({e.strerror}): nothing keeps a '
                 'second run out of it')
    try:
        if anywhere(bool(holder)):
            raise LockError(f'{workdir} is in use by {holder or "another run"}; wait for it, end '
                            'it, or choose another --workdir')
        distributed.same_folder(workdir / NAME)
        yield
    finally:
        if file is not None:
            file.close()
