"""Places: what a flag or a field names, on this machine or in a bucket.

Every flag and field that names a file or a folder is read here, before any work is done: `~` and
`$VAR` are filled in, and a URL is one that can be used there, or it is refused in one line. What is
local is a `pathlib.Path`, what is in a bucket an `epath.Path` of etils, which Orbax speaks too and
which has the same methods; `files` and `jsonl` write to either.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from ddmd_jax.util.errors import UserError

if TYPE_CHECKING:  # it takes as long to import as everything else that parses flags
    from etils import epath

    Place: TypeAlias = Path | epath.Path
else:
    Place = Path

# Schemes of buckets, and the package by which fsspec reads each (our extras `gcs` and `s3`).
READERS = {'gs': 'gcsfs', 's3': 's3fs'}
LOCAL: tuple[str, ...] = ()  # schemes of a place that has to be on this machine
GS = ('gs',)
BUCKETS = tuple(READERS)
ANY = None  # whatever fsspec reads: of weights that are only fetched
_URL = re.compile(r'([A-Za-z][A-Za-z0-9+.-]*)://?(.*)', re.DOTALL)
_FAMILY = re.compile(r'([\w.]+:)((?:~|\$|\w+://).*)', re.DOTALL)  # NAME:PATH of `families.find`
_KNOWN = {*READERS, 'file', 'az', 'abfs', 'hf', 'http', 'https', 'gcs', 's3a', 'memory', 'ftp'}


class PlaceError(UserError, ValueError):
    """What a flag or a field names cannot be used there."""


def of(named: str | os.PathLike, schemes: Sequence[str] | None = BUCKETS) -> Place:
    """The place that a flag or a field names: absolute, `~` and `$VAR` filled in.

    Args:
      named: a path, relative to the current folder, or a URL.
      schemes: of the URLs that will do: `LOCAL` none, `GS`, `BUCKETS`; `ANY` asks nothing.

    Raises:
      PlaceError: it is a URL that will not do, or holds a `$VAR` that is not set.
    """
    text = checked(os.fspath(named), schemes)
    return _in_bucket(text) if is_url(text) else Path(text).absolute()


def checked(named: str, schemes: Sequence[str] | None = BUCKETS) -> str:
    """`filled`, of what has no `fault`; raises as `of`."""
    if wrong := fault(named, schemes):
        raise PlaceError(f'{_text(named)} {wrong}')
    return filled(named)


def _in_bucket(url: str) -> epath.Path:
    import fsspec
    from etils import epath

    # etils would have TensorFlow read buckets wherever that is installed; and fsspec lists a folder
    # once, though other processes, and Orbax's own writer, go on writing to it.
    os.environ.setdefault('EPATH_USE_TF', 'false')
    for scheme in ('gcs', *READERS):
        fsspec.config.conf.setdefault(scheme, {}).setdefault('use_listings_cache', False)
    return epath.Path(url)


def filled(named: str) -> str:
    """`named` with `~` and `$VAR` filled in, ``file://`` taken off and a scheme in small letters.

    A file or folder that is there by that very name stays as it is, and so does what is no place:
    a hub id, a family's name.
    """
    if _there(named):
        return named
    if family := _FAMILY.fullmatch(named):
        return f'{family[1]}{filled(family[2])}'
    text = os.path.expanduser(os.path.expandvars(named))
    if found := _url(text):
        scheme, rest = found[1].lower(), found[2]
        return rest if scheme == 'file' else f'{scheme}://{rest}'
    return text


def fault(named: str, schemes: Sequence[str] | None = BUCKETS) -> str:
    """Why `named` is no place that can be used, in words that follow it, or ''; see `of`."""
    if '\0' in named:
        return 'holds a NUL, which no path can; take it out'
    if named != _text(named):  # libraries below Python want text
        return 'is a name that the locale does not know; set PYTHONUTF8=1'
    if not named or _there(named):
        return ''
    if family := _FAMILY.fullmatch(named):
        return fault(family[2], schemes)
    text = os.path.expandvars(named)
    if unset := re.search(r'\$(\w+|\{[^}]*\})', text):
        return f'holds {unset[0]}, which is not set; export it, or write out the path'
    text = os.path.expanduser(text)
    if text.startswith('~'):
        return f'begins with {text.split("/")[0]}, and there is no such user; write out the path'
    found = _url(text)
    if not found or found[1].lower() == 'file':
        return ''
    scheme, rest = found[1].lower(), found[2]
    if not text[len(scheme):].startswith('://'):
        return f'has one slash too few for a URL: {scheme}://{rest}'
    if schemes is ANY:
        schemes = (*BUCKETS, scheme)
    if scheme not in schemes:
        fitting = ' or '.join(['a local path', *(f'{known}://' for known in schemes)])
        return f'must be {fitting}, not a {scheme}:// URL'
    if scheme in READERS:
        if not rest.strip('/') or rest.startswith('/'):
            return f'names no bucket; write {scheme}://BUCKET/PATH'
        if '..' in rest.split('/'):
            return 'holds .., which no bucket knows; write out the path'
        if importlib.util.find_spec(READERS[scheme]) is None:
            return f'needs {READERS[scheme]} to be read: pip install {READERS[scheme]}'
    return ''


def _text(named: str) -> str:
    """`named`; bytes of it that are no text in this locale are written as their numbers."""
    return named.encode('utf-8', 'backslashreplace').decode()


def _there(named: str) -> bool:
    """Whether that very name is a file or folder here; a URL is none, be there a folder `gs:`."""
    return not _url(named) and os.path.exists(named)


def _url(text: str) -> re.Match | None:
    """A match of (scheme, rest) if `text` is a URL, or one whose second slash was left out."""
    found = _URL.fullmatch(text)
    whole = found and text[len(found[1]):].startswith('://')
    return found if found and (whole or found[1].lower() in _KNOWN) else None


def scheme(place: str | os.PathLike) -> str:
    """'gs' or 's3' of a place in a bucket, '' of one on this machine."""
    return os.fspath(place).partition('://')[0] if is_url(place) else ''


def is_url(place: str | os.PathLike) -> bool:
    """Whether a place is in a bucket, and not on this machine."""
    return '://' in os.fspath(place)
