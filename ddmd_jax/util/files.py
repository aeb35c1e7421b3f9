"""Files that are there whole or not at all, on this machine or in a bucket."""

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ddmd_jax.util import buckets, places, processes
from ddmd_jax.util.places import Place

T = TypeVar('T')
WAITS = 0.1, 0.4, 1.5  # seconds before a file that could not be read is tried again


@contextlib.contextmanager
def replacing(path: Place, sync: bool = False, own: bool = False) -> Iterator[Path]:
    """Yields a free path for a file or folder, which then takes the place of `path`.

    A process that is killed, or a disk that fills up, leaves `path` as it was. A folder can only
    take the place of nothing, or of an empty one. What goes to a bucket is made on this machine's
    disk first.

    Args:
      path: where the file or folder shall be; its parent exists.
      sync: bring the bytes to the disk first, so that a machine that loses its power cannot
        leave an empty file under the final name.
      own: several processes may write `path` at once, so each needs a name of its own.
    """
    if places.is_url(path):
        with buckets.landing(path) as scratch:
            yield scratch
        return
    path = Path(path)
    # Of processes that were killed nothing stays.
    if own:
        tag = hashlib.sha256(processes.machine().encode()).hexdigest()[:8]
        scratch = path.with_name(f'{path.name}.{tag}.{os.getpid()}.tmp')
        for other in path.parent.glob(f'{glob.escape(path.name)}.{tag}.*.tmp'):
            process = int(other.name.split('.')[-2])
            if not processes.running(processes.name() | {'process': process}):
                remove(other)
    else:
        scratch = path.with_name(f'{path.name}.tmp')
    remove(scratch)
    try:
        yield scratch
        for file in [scratch, *scratch.rglob('*')] if sync else []:
            if file.is_file():
                with file.open('rb') as opened:
                    os.fsync(opened.fileno())
        os.replace(scratch, path)
    except BaseException:
        remove(scratch)
        raise


def copy_folder(source: Path, target: Path, called: Callable[[str], str]) -> None:
    """The files of a folder, all or none; links become files.

    `called` gives the name of a file's copy, '' for one that is left out.
    """
    with replacing(target) as scratch:
        scratch.mkdir(parents=True)
        for file in sorted(source.iterdir()):
            if (name := called(file.name)) and file.is_file():
                shutil.copyfile(file, scratch / name)


def write(path: Place, content: str | bytes, sync: bool = False, own: bool = False) -> None:
    """Writes text (UTF-8) or bytes; see `replacing`."""
    with replacing(path, sync, own) as scratch:
        scratch.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Place, value: Any, indent: int | None = 1, sync: bool = False,
               own: bool = False) -> None:
    """Writes a value as JSON, non-ASCII characters as themselves; see `replacing`."""
    write(path, json.dumps(value, indent=indent, ensure_ascii=False), sync, own)


class Lock(Protocol):
    """A lock that is held until it is closed."""

    def close(self) -> None: ...


def lock(path: Place) -> tuple[Lock | None, str]:
    """(the open file, '') with the kernel's lock on it, or (None, its holder's own words).

    The lock (`flock`) ends with the process that holds it, however that dies. The text in the
    file is for people only. In a bucket it is a `buckets.Lease`.

    Raises:
      OSError: the file cannot be made; or ENOLCK, ENOTSUP, ...: its file system has no locks.
    """
    if places.is_url(path):
        lease = buckets.Lease(path)
        holder = lease.take()
        return (None, holder) if holder else (lease, '')
    path = Path(path)
    file = path.open('a+', encoding='utf-8')
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            file.close()
            raise
        file.seek(0)
        holder = ' '.join(file.read().split()) or 'another process'
        file.close()
        return None, holder
    file.truncate(0)
    file.write(f'process {os.getpid()} on {socket.gethostname()}, since '
               f'{time.strftime("%Y-%m-%d %H:%M:%S %z")}\n')
    file.flush()
    os.fsync(file.fileno())  # other hosts look for it
    return file, ''


def patiently(read: Callable[[], T]) -> T:
    """What `read` returns; a file that cannot be read just now is tried again after `WAITS`.

    Raises:
      OSError: it is not there, or cannot be read at the last try either.
    """
    for wait in WAITS:
        try:
            return read()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise
        except OSError:
            time.sleep(wait)
    return read()


@contextlib.contextmanager
def filled(folder: Place) -> Iterator[Path]:
    """Yields a folder on this machine to put files into: `folder`, made if need be, or one whose
    files go to `folder` in a bucket at the end."""
    if not places.is_url(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory(prefix='ddmd_') as scratch:
        made = Path(scratch) / folder.name
        made.mkdir()
        yield made
        buckets.put(made, folder)


def sizes(folder: Place) -> dict[str, int]:
    """Bytes of every file below `folder`, by its name there."""
    if places.is_url(folder):
        return {name: info['size'] for name, info in sorted(buckets.listing(folder).items())}
    return {p.relative_to(folder).as_posix(): p.stat().st_size
            for p in sorted(Path(folder).rglob('*')) if p.is_file()}


def written(folder: Place) -> float:
    """When a folder was written, seconds since 1970; in a bucket, its newest file."""
    if places.is_url(folder):
        return max((buckets.written(x) for x in buckets.listing(folder).values()), default=0.0)
    return Path(folder).stat().st_mtime


def move(path: Place, target: Place) -> None:
    """Moves a folder to a free place, which is on the same disk or in the same kind of bucket."""
    if places.is_url(path):
        buckets.move(path, target)
    else:
        Path(path).rename(target)


def remove(path: Place) -> None:
    """Removes a file or folder, as far as that is possible; nothing if it is not there."""
    if places.is_url(path):
        with contextlib.suppress(Exception):
            buckets.remove(path)
        return
    path = Path(path)
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
