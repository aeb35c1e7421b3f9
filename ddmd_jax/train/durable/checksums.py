"""sha256 and size of every file of a checkpoint, in its ``checksums.json``.

Plain files and hashes: nothing here needs JAX or a device.
"""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from ddmd_jax.util import files as files_lib
from ddmd_jax.util.text import first_line

NAME = 'checksums.json'
ITEMS = ('state', 'data', 'manifest')


def steps(directory: Path) -> list[int]:
    """Steps of the finished checkpoints in `directory`, ascending, damaged or not."""
    if not directory.is_dir():
        return []
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit() and p.is_dir())


def files(folder: Path) -> dict[str, Path]:
    """Every file of a checkpoint by its name relative to `folder`, this module's own left out."""
    found = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob('*')) if p.is_file()}
    return {name: path for name, path in found.items() if not name.startswith(NAME)}


def digest(path: Path) -> str:
    """sha256 of a file in hex digits."""
    with path.open('rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest()


def write(folder: Path) -> None:
    """Writes the checksums of a finished checkpoint.

    Raises:
      FileNotFoundError: the checkpoint is being deleted.
    """
    found = {name: {'sha256': digest(path), 'size': path.stat().st_size}
             for name, path in files(folder).items()}
    files_lib.write_json(folder / NAME, found, sync=True)


def known(folder: Path) -> bool:
    """Whether a checkpoint has checksums."""
    return (folder / NAME).is_file()


def fault(folder: Path, part: int = 0, parts: int = 1) -> str:
    """The first fault in a checkpoint's files, or ''.

    Without checksums only its items are looked for. Process `part` of `parts` reads every
    `parts`-th file, so that together they read them all.

    Raises:
      OSError: a file is there and cannot be read, several times over: nothing is known of it.
    """
    missing = [name for name in ITEMS if not (folder / name).is_dir()]
    if not known(folder):
        return f'{missing[0]} is missing' if missing else _manifest_fault(folder)
    try:
        wanted: dict[str, Any] = json.loads(files_lib.patiently((folder / NAME).read_bytes))
        for name in sorted(wanted)[part::parts]:
            words = _file_fault(folder / name, wanted[name]['size'], wanted[name]['sha256'])
            # A checkpoint may come from elsewhere: a file it names must lie in it.
            if not (folder / name).resolve().is_relative_to(folder.resolve()):
                words = 'leads out of the checkpoint'
            if words:
                return f'{name} {words}'
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        return f'{NAME} is not what was written: {first_line(e)}'
    return ''


def _file_fault(path: Path, size: int, sha256: str) -> str:
    if not path.is_file():
        return 'is missing'
    found = path.stat().st_size
    if found != size:
        return f'has {found} bytes, not {size}'
    found_sha256 = files_lib.patiently(functools.partial(digest, path))
    return '' if found_sha256 == sha256 else 'is not what was written'


def _manifest_fault(folder: Path) -> str:
    """The fault in the manifest of a checkpoint without checksums, or ''."""
    try:
        json.loads(files_lib.patiently((folder / 'manifest' / 'metadata').read_bytes))
    except (FileNotFoundError, ValueError):
        return 'it has no readable manifest'
    return ''
