"""Files in buckets: brought to this machine's disk, put there, locked there.

A bucket has whole objects: one that is written is there at once, or not at all; there is no end to
append to, no folder, no rename, and no lock of the kernel. What needs one of these is made on this
machine's disk first. All of it goes by fsspec, with the credentials that gcsfs and s3fs find.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import hashlib
import json
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from ddmd_jax.util import errors, places, processes, shape
from ddmd_jax.util.places import Place, PlaceError
from ddmd_jax.util.text import first_line

CACHE = 'DDMD_CACHE'  # environment variable: where files of buckets are kept
BEAT = 15.0  # seconds between two signs of life of a lock's holder
LEASE = 4 * BEAT  # without one for so long, a holder is dead
SETTLED = 1.0  # seconds after which a lock that was just taken over is looked at again


class NothingThere(PlaceError):
    """No file that was asked for is at a URL."""


def filesystem(url: str | os.PathLike) -> tuple[Any, str]:
    """(fsspec's file system of a URL, the path in it)."""
    import fsspec

    fs, path = fsspec.core.url_to_fs(os.fspath(url))
    fs.invalidate_cache()
    return fs, path.rstrip('/')


def listing(url: str | os.PathLike) -> dict[str, dict[str, Any]]:
    """What fsspec knows of every file below a URL, by its name there; of a file, by its own name.

    'size' is its bytes. Empty if there is nothing.
    """
    fs, root = filesystem(url)
    found = fs.find(root, detail=True)
    name = lambda path: path[len(root) + 1:] or path.rpartition('/')[2]
    return {name(path): info for path, info in found.items()
            if info.get('type', 'file') == 'file' and not path.endswith('/')}


def version(info: dict[str, Any]) -> str:
    """Names the content of a file, by its store's own checksum; the time where there is none."""
    names = ('ETag', 'etag', 'crc32c', 'md5Hash', 'generation', 'mtime', 'LastModified', 'created')
    return next((f'{name} {info[name]}' for name in names if info.get(name)), '')


def written(info: dict[str, Any]) -> float:
    """When a file was written, seconds since 1970, or 0."""
    when = info.get('mtime') or info.get('LastModified')
    return when.timestamp() if isinstance(when, datetime.datetime) else 0.0


def fetched(url: str | os.PathLike, wanted: Callable[[str], bool] = lambda name: True) -> Path:
    """A copy on disk of the file or folder at `url`, in `$DDMD_CACHE`; what has not changed stays.

    Of a folder the files are brought whose names are `wanted`. Several processes may do so at once.

    Raises:
      NothingThere: there is no such file.
      EnvironmentFault: this machine's disk, the network or the bucket is at fault.
      PlaceError: it cannot be read.
    """
    cache = places.of(os.environ.get(CACHE) or '~/.cache/ddmd_jax', places.LOCAL)
    target = Path(cache / hashlib.sha256(os.fspath(url).rstrip('/').encode()).hexdigest()[:16])
    try:
        (fs, root), asked = filesystem(url), time.time()
        found = {name: info for name, info in listing(url).items() if wanted(name)}
        for name, info in found.items():
            # Names of a bucket may hold anything: none leads out of the folder.
            if '..' in PurePosixPath(name).parts or name.startswith('/'):
                raise PlaceError(f'{url} holds a file called {name!r}, which leads out of it')
            place, seen = target / name, target.with_suffix('.seen') / name
            if (place.is_file() and place.stat().st_size == info['size'] and seen.is_file()
                    and seen.read_text('utf-8') == version(info)):
                continue
            for folder in (place.parent, seen.parent):
                folder.mkdir(parents=True, exist_ok=True)
            scratch = place.with_name(f'{place.name}.{os.getpid()}.tmp')
            try:
                fs.get_file(info['name'], str(scratch))
                os.replace(scratch, place)
            finally:
                scratch.unlink(missing_ok=True)
            scratch = seen.with_name(f'{seen.name}.{os.getpid()}.tmp')
            scratch.write_text(version(info), 'utf-8')
            os.replace(scratch, seen)
        for old in target.rglob('*') if found else ():  # what has gone goes here too
            name = old.relative_to(target).as_posix()
            if not wanted(name) or name in found or name.endswith('.tmp'):
                continue
            with contextlib.suppress(FileNotFoundError):  # another process is quicker
                if old.is_file() and old.stat().st_mtime < asked:  # else it has fetched it since
                    old.unlink()
    except Exception as e:
        if isinstance(e, PlaceError):
            raise
        errors.raise_environment(e, url)
        raise PlaceError(f'{url} cannot be read ({first_line(e)}); check the URL, the network and '
                         'your access') from e
    if not found:
        raise NothingThere(f'{url} is not there, or holds nothing that is needed; check the URL')
    one = target / PurePosixPath(os.fspath(url)).name  # if `url` is a file
    return one if set(found) == {one.name} and root == found[one.name]['name'] else target


def local(place: Place, wanted: Callable[[str], bool] = lambda name: True) -> Path:
    """`place` if it is on this machine, or a copy of it; see `fetched`."""
    return fetched(place, wanted) if places.is_url(place) else Path(place)


def put(source: Path, place: Place) -> None:
    """Copies a file or folder to a bucket; what was put there is taken away if one file fails.

    JSON goes last: who finds a folder's card, config or index finds what it speaks of. Raises
    OSError, as a disk does.
    """
    fs, root = filesystem(place)
    files = {path: f'{root}/{path.relative_to(source).as_posix()}'
             for path in source.rglob('*') if path.is_file()} if source.is_dir() else {source: root}
    done = []
    try:
        for path in sorted(files, key=lambda p: (p.suffix == '.json', p)):
            done.append(files[path])
            fs.put_file(str(path), files[path])
    except BaseException as e:
        if source.is_dir():  # a file that was there before stays as it was
            for name in done:
                with contextlib.suppress(Exception):
                    fs.rm_file(name)
        if not isinstance(e, OSError) and errors.environment(e):
            reason = f'{type(e).__name__}: {first_line(e)}'
            raise OSError(errno.EIO, reason, os.fspath(place)) from e
        raise


@contextlib.contextmanager
def landing(place: Place) -> Iterator[Path]:
    """Yields a free path on this machine, for a file or folder that is then put at `place`."""
    with tempfile.TemporaryDirectory(prefix='ddmd_') as folder:
        scratch = Path(folder) / place.name
        yield scratch
        if scratch.is_dir() and listing(place):
            raise FileExistsError(errno.EEXIST, 'there is something already', os.fspath(place))
        put(scratch, place)


def remove(place: Place) -> None:
    """Removes a file or folder; nothing if it is not there."""
    fs, root = filesystem(place)
    with contextlib.suppress(FileNotFoundError):
        fs.rm(root, recursive=True)


def move(place: Place, target: Place) -> None:
    """Moves a folder, file by file: copies it, then deletes it."""
    (fs, root), (_, to) = filesystem(place), filesystem(target)
    for name in listing(place):
        fs.copy(f'{root}/{name}', f'{to}/{name}')
    remove(place)


def check_writable(place: Place) -> None:
    """Writes an object in a folder and takes it away again.

    Raises:
      PlaceError: it cannot be written.
    """
    try:
        fs, root = filesystem(place)
        probe = f'{root}/.ddmd_jax_{secrets.token_hex(4)}'
        fs.pipe_file(probe, b'may be deleted')
        fs.rm_file(probe)
    except Exception as e:  # bucket, network or access: the line names all three
        reason = 'there is no such bucket' if isinstance(e, FileNotFoundError) else first_line(e)
        raise PlaceError(f'{place} cannot be written ({reason}); check the bucket, the '
                         'network and your access, or choose another place') from e


class Lease:
    """A lock in a bucket: an object that only one process can create, and that its holder renews.

    Whoever finds one waits `LEASE` seconds for it to change, and takes it over if it does not: no
    clock of another machine is asked. One of a process of this machine that has died is taken over
    at once. A holder that finds another's in its place ends this process, as SIGTERM does.
    """

    def __init__(self, place: Place):
        self._fs, self._path = filesystem(place)
        self._place, self._token, self._count = place, secrets.token_hex(8), 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew, name='lock', daemon=True)

    def take(self) -> str:
        """'' if this process has the lock from now on, or else its holder's own words."""
        deadline, seen = time.monotonic() + LEASE, None
        while not self._create():
            found = self._read()
            if seen is None and found and processes.running(found) is not False:
                print(f'{self._place} is there ({self._words(found)}): looking for {LEASE:g} s '
                      'whether its holder is alive', file=sys.stderr)
            if seen is not None and found and found != seen:
                return self._words(found)  # it has moved: somebody is alive
            seen = seen if found is None else found
            if processes.running(found or {}) is False or time.monotonic() > deadline:
                with contextlib.suppress(FileNotFoundError):
                    self._fs.rm_file(self._path)
                if self._create():
                    time.sleep(SETTLED)  # of two that take over at once, the later one has it
                    break
            elif seen is not None:
                time.sleep(min(1.0, BEAT / 4))
        if (found := self._read()) is None or found.get('token') != self._token:
            return self._words(found or {})
        self._thread.start()
        return ''

    def close(self) -> None:
        """Gives the lock back."""
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join()
        with contextlib.suppress(Exception):
            if (self._read() or {}).get('token') == self._token:
                self._fs.rm_file(self._path)

    def _content(self) -> bytes:
        self._count += 1
        return json.dumps({
            'token': self._token, 'count': self._count, 'host': socket.gethostname(),
            **processes.name(),
            'time': time.strftime('%Y-%m-%d %H:%M:%S %z')}).encode()

    def _create(self) -> bool:
        try:
            self._fs.pipe_file(self._path, self._content(), mode='create')
        except FileExistsError:
            return False
        return True

    def _read(self) -> dict[str, Any] | None:
        try:
            return shape.load(self._fs.cat_file(self._path), {})
        except FileNotFoundError:
            return None
        except ValueError:
            return {}

    def _words(self, found: dict[str, Any]) -> str:
        return (f'process {found.get("process", "?")} on {found.get("host", "?")}, last seen '
                f'{found.get("time", "just now")}')

    def _renew(self) -> None:
        # A beat may write over whoever took over a moment ago: then that one ends at its own beat.
        while not self._over.wait(BEAT):
            # The network may be away for a while: the next beat tries again.
            with contextlib.suppress(Exception):
                if (found := self._read()) is not None and found.get('token') != self._token:
                    print(f'warning: {self._place} was taken over by {self._words(found)}; this '
                          'process ends', file=sys.stderr)
                    os.kill(os.getpid(), signal.SIGTERM)
                    return
                self._fs.pipe_file(self._path, self._content())
