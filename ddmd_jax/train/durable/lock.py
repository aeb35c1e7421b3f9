"""A run's folder belongs to one run at a time."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax

from ddmd_jax.train.durable.checkpoint import anywhere
from ddmd_jax.util import files
from ddmd_jax.util.errors import UserError

NAME = 'lock'


class LockError(UserError):
    """Another run has the folder."""


@contextlib.contextmanager
def held(workdir: Path) -> Iterator[None]:
    """Locks ``workdir/lock`` while inside, by process 0 for all of a run's processes.

    Raises:
      LockError: another run has it; names its process and host.
    """
    file, holder = (files.lock(workdir / NAME) if jax.process_index() == 0 else (None, ''))
    try:
        if anywhere(bool(holder)):
            raise LockError(f'{workdir} is in use by {holder or "another run"}; wait for it, end '
                            'it, or choose another --workdir')
        yield
    finally:
        if file is not None:
            file.close()
