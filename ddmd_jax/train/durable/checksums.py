"""sha256 and size of every file of a checkpoint, in its ``checksums.json``.

In a bucket it is the store's own checksum: to read a checkpoint again costs as much as to write it,
and the store keeps what it was given. Plain files and hashes: nothing here needs JAX or a device.
"""

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddmd_jax.util import buckets, files as stored, places
from ddmd_jax.util.places import Place
from ddmd_jax.util.text import first_line

NAME = 'checksums.json'
ITEMS = ('state', 'data', 'manifest')
COMMITTED = 'commit_success.txt'  # Orbax's mark of a checkpoint behind gs:// that is complete


def steps(directory: Place) -> list[int]:
    """Steps of the finished checkpoints in `directory`, ascending, damaged or not."""
    if not directory.is_dir():
        return []
    is_step = lambda name: name.isdecimal() and name == str(int(name))  # not 007, nor '\u0663'
    done = lambda p: (p / COMMITTED).exists() if places.scheme(p) == 'gs' else p.is_dir()
    return sorted(int(p.name) for p in directory.iterdir() if is_step(p.name) and done(p))


def sizes(folder: Place) -> dict[str, int]:
    """Bytes of a checkpoint's files by their names in `folder`, this module's own left out."""
    return {name: size for name, size in stored.sizes(folder).items() if not name.startswith(NAME)}


def files(folder: Place) -> dict[str, Place]:
    """Every file of a checkpoint by its name in `folder`; see `sizes`."""
    return {name: folder / name for name in sizes(folder)}


def digest(path: Place) -> str:
    """sha256 of a file in hex digits."""
    with path.open('rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest()


def write(folder: Place) -> None:
    """Writes the checksums of a finished checkpoint.

    Raises:
      FileNotFoundError: the checkpoint is being deleted.
    """
    if places.is_url(folder):
        found = {name: {'version': buckets.version(info), 'size': info['size']}
                 for name, info in buckets.listing(folder).items() if not name.startswith(NAME)}
    else:
        found = {name: {'sha256': digest(folder / name), 'size': size}
                 for name, size in sizes(folder).items()}
    stored.write_json(folder / NAME, found, sync=True)


def known(folder: Place) -> bool:
    """Whether a checkpoint has checksums."""
    return (folder / NAME).is_file()


def fault(folder: Place, part: int = 0, parts: int = 1) -> str:
    """The first fault in a checkpoint's files, or ''.

    Without checksums only its items are looked for. Process `part` of `parts` reads every
    `parts`-th file, so that together they read them all.

    Raises:
      OSError: a file is there and cannot be read, several times over: nothing is known of it.
    """
    missing = [name for name in ITEMS if not (folder / name).is_dir()]
    if not known(folder):
        return f'{missing[0]} is missing' if missing else _manifest_fault(folder)
    content = stored.patiently((folder / NAME).read_bytes)
    there = buckets.listing(folder) if places.is_url(folder) else {}
    try:
        wanted: dict[str, Any] = json.loads(content)
        for name in sorted(wanted)[part::parts]:
            # A checkpoint may come from elsewhere: a file it names must lie in it.
            if places.is_url(folder):
                words = _object_fault(folder / name, there.get(name), wanted[name])
            elif not (folder / name).resolve().is_relative_to(folder.resolve()):
                words = 'leads out of the checkpoint'
            else:
                words = _file_fault(folder / name, wanted[name])
            if words:
                return f'{name} {words}'
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        return f'{NAME} is not what was written: {first_line(e)}'
    return ''


def fault_of(folder: Place, name: str, raw: bytes) -> str:
    """The fault in the bytes of a checkpoint's file, or '': all is well where nobody summed up."""
    if not known(folder):
        return ''
    content = stored.patiently((folder / NAME).read_bytes)
    try:
        wanted = json.loads(content)[name]
        # Of what was written to a bucket only the size is known, and the store's own checksum.
        same = (len(raw) == wanted['size'] if 'version' in wanted else
                hashlib.sha256(raw).hexdigest() == wanted['sha256'])
        return '' if same else 'it is not what was written'
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        return f'{NAME} is not what was written: {first_line(e)}'


def _file_fault(path: Path, wanted: Mapping[str, Any]) -> str:
    if not path.is_file():
        return 'is missing'
    found = path.stat().st_size
    if found != wanted['size']:
        return f'has {found} bytes, not {wanted["size"]}'
    if 'version' in wanted:  # written to a bucket and copied here: only the size is known
        return ''
    found_sha256 = stored.patiently(functools.partial(digest, path))
    return '' if found_sha256 == wanted['sha256'] else 'is not what was written'


def _object_fault(path: Place, found: Mapping[str, Any] | None, wanted: Mapping[str, Any]) -> str:
    """As `_file_fault`, of an object in a bucket; `found` is what the store says of it."""
    if found is None:
        return 'is missing'
    if found['size'] != wanted['size']:
        return f'has {found["size"]} bytes, not {wanted["size"]}'
    same = (buckets.version(dict(found)) == wanted['version'] if 'version' in wanted else
            digest(path) == wanted['sha256'])  # written on a disk, and copied there
    return '' if same else 'is not what was written'


def _manifest_fault(folder: Place) -> str:
    """The fault in the manifest of a checkpoint without checksums, or ''."""
    try:
        json.loads(stored.patiently((folder / 'manifest' / 'metadata').read_bytes))
    except (FileNotFoundError, IsADirectoryError, ValueError, RecursionError):
        return 'it has no readable manifest'
    return ''
