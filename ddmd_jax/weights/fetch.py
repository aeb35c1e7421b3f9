"""Brings a published folder to this machine's disk: from a path, a URL, or the hub."""

import fnmatch
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from ddmd_jax.util import errors, files
from ddmd_jax.util.text import first_line
from ddmd_jax.weights.flat import WeightsError

CACHE = 'DDMD_CACHE'  # environment variable: where files behind URLs are kept


def local_folder(path: str, patterns: Sequence[str]) -> Path:
    """A folder on disk with the files of `path` that match `patterns`.

    `path` is a folder, a URL that fsspec reads (``gs://...`` needs `gcsfs`), or a hub id
    (``owner/name``). Files come to disk, never to memory; what is there already is kept.

    Raises:
      WeightsError: there is no such folder, or it cannot be fetched.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if '://' in path:
        return _from_url(path, patterns)
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
    import fsspec

    cache = Path(os.environ.get(CACHE, '~/.cache/ddmd_jax')).expanduser()
    target = cache / hashlib.sha256(url.rstrip('/').encode()).hexdigest()[:16]
    try:
        fs, root = fsspec.core.url_to_fs(url)
        root = root.rstrip('/')
        found = [f for f in fs.find(root) if any(
            fnmatch.fnmatch(f[len(root) + 1:], p) for p in patterns)]
        for file in found:
            place = target / file[len(root) + 1:]
            if place.exists() and place.stat().st_size == fs.size(file):
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            with files.replacing(place, own=True) as scratch:  # several processes may start at once
                fs.get_file(file, str(scratch))
    except Exception as e:
        errors.raise_environment(e, url)
        raise WeightsError(f'{url} cannot be read ({first_line(e)}); check the URL and your '
                           'access (gs:// needs `pip install gcsfs`)') from e
    if not found:
        raise WeightsError(f'{url} holds none of {", ".join(patterns)}; is it a diffusers folder?')
    return target
