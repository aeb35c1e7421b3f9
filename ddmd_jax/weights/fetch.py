"""Brings a published folder to this machine's disk: from a path, a URL, or the hub."""

import fnmatch
from collections.abc import Sequence
from pathlib import Path

from ddmd_jax.util import buckets, places
from ddmd_jax.util.text import first_line
from ddmd_jax.weights.flat import WeightsError


def local_folder(path: str, patterns: Sequence[str]) -> Path:
    """A folder on disk with the files of `path` that match `patterns`.

    `path` is a folder, a URL that fsspec reads (``gs://...`` needs `gcsfs`), or a hub id
    (``owner/name``). Files come to disk, never to memory; what is there already is kept.

    Raises:
      WeightsError: there is no such folder, or it cannot be fetched.
    """
    path = places.checked(path, places.ANY)
    if places.is_url(path):
        return _from_url(path, patterns)
    folder = places.of(path, places.LOCAL)
    if folder.is_dir():
        return folder
    if path.startswith(('.', '/', '~')) or path.count('/') != 1:
        raise WeightsError(f'no folder {path}; give a diffusers folder, a gs:// URL or a hub id '
                           '(owner/name) as config.teacher.path')
    return _from_hub(path, patterns)


def _from_hub(name: str, patterns: Sequence[str]) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as e:  # network, login or name: the line names all three
        raise WeightsError(f'{name} is no folder here and cannot be fetched from the hub '
                           f'({first_line(e)}); check the name, the network and your login, or '
                           'give a local folder') from e


def _from_url(url: str, patterns: Sequence[str]) -> Path:
    try:
        return buckets.fetched(
            url, lambda name: any(fnmatch.fnmatch(name, pattern) for pattern in patterns))
    except buckets.NothingThere as e:
        raise WeightsError(f'{url} holds none of {", ".join(patterns)}; is it a diffusers '
                           'folder?') from e
    except places.PlaceError as e:
        raise WeightsError(str(e)) from e
