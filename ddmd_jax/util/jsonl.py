"""Files of JSON lines. A kill or a full disk leaves no half line behind.

Plain files: nothing here needs JAX or a device.
"""

import contextlib
import io
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ddmd_jax.util import files, places
from ddmd_jax.util.places import Place


def read(path: Place) -> list[dict[str, Any]]:
    """A file's entries, oldest first; none if it is not there.

    A last line without a line feed comes from a killed writer and does not count.

    Raises:
      ValueError: another line is no JSON object; names the file and the line's number.
    """
    entries = []
    for number, line in enumerate(_whole_lines(path), 1):
        if (entry := _parsed(line)) is None:
            raise ValueError(f'{path}, line {number} is no JSON object; mend it, or take it out')
        entries.append(entry)
    return entries


def trim(path: Place, good: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Removes lines that are no entry, or no `good` one, from a file; returns the others.

    A full disk leaves the file as it was.
    """
    kept = [(line, entry) for line in _whole_lines(path)
            if (entry := _parsed(line)) is not None and good(entry)]
    text = b''.join(line + b'\n' for line, _ in kept)
    if path.is_file() and path.read_bytes() != text:
        files.write(path, text)
    return [entry for _, entry in kept]


def append(path: Place, entry: Mapping[str, Any]) -> None:
    """Appends all of an entry, or nothing and raises `OSError`; makes the file if it is missing.

    Objects in a bucket have no end to append to: the whole file is written again. One process
    writes it.
    """
    line = (json.dumps(entry) + '\n').encode()
    if places.is_url(path):
        files.write(path, b''.join(x + b'\n' for x in _whole_lines(path)) + line)
        return
    rest = memoryview(line)
    with Path(path).open('a+b', buffering=0) as f:
        end = _cut_short(f)
        try:
            while rest:
                rest = rest[f.write(rest):]  # a disk that fills up takes a part
        except OSError:
            with contextlib.suppress(OSError):
                f.truncate(end)
            raise


def _cut_short(f: io.FileIO) -> int:
    """Takes off a last line without an end; the file's length."""
    end = f.seek(0, os.SEEK_END)
    if end and os.pread(f.fileno(), 1, end - 1) != b'\n':
        f.seek(0)
        end = f.readall().rfind(b'\n') + 1
        f.truncate(end)
    return end


def _whole_lines(path: Place) -> list[bytes]:
    return path.read_bytes().split(b'\n')[:-1] if path.exists() else []


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None
