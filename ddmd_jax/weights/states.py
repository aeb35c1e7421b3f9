"""Published tensors by name, read whole, and what they are as our parameters.

For networks that one host holds easily: scorers of pictures. A teacher is read shard by shard, by
`diffusers.import_tree`.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ddmd_jax.util import buckets, places
from ddmd_jax.weights import diffusers, fetch, flat, torch_files
from ddmd_jax.weights.flat import WeightsError

# Of a folder the first that is there: transformers' file, or open_clip's, then pickles of either.
STEMS = ('model', 'open_clip_model')
PICKLES = ('open_clip_pytorch_model.bin', 'pytorch_model.bin')
WRAPPERS = ('state_dict', 'model')  # entries under which a training run keeps its network

State = dict[str, np.ndarray]


def find(path: str, file: str | None = None) -> Path:
    """The file or folder at a path or a URL; what the hub has under that id, if there is neither.

    Of a folder, and of the hub, it is `file` if that is named and there.

    Raises:
      PlaceError: a URL cannot be read.
      WeightsError: nothing there, and it cannot be fetched.
    """
    named = places.checked(path, places.ANY)
    here = Path(named)
    one = here.suffix in ('.safetensors', *diffusers.PICKLES)
    if places.is_url(named) and one:
        return buckets.fetched(named)
    if places.is_url(named) or not here.exists():
        if not places.is_url(named) and (
                one or named.startswith(('.', '/')) or named.count('/') != 1):
            raise WeightsError(f'no weights at {path}; give a file, a folder, or a hub id '
                               '(owner/name)')
        here = fetch.local_folder(named, [file] if file else [
            *(stem + end for stem in STEMS for end in (
                '.safetensors', '-*.safetensors', '.safetensors.index.json')), *PICKLES])
    return here / file if file and (here / file).is_file() else here


def read(path: Path, sha256: str | None = None) -> State:
    """Every tensor of a file (safetensors, or a pickle of torch's) or a folder, by name.

    Args:
      path: the file; or a folder as transformers or open_clip writes it.
      sha256: what the file's hash begins with, if it was published.

    Raises:
      WeightsError: missing, damaged, without tensors, or of another hash.
    """
    if path.is_dir():
        return _read_folder(path)
    if sha256 is not None:
        check_hash(path, sha256)
    if path.suffix == '.safetensors':
        file = flat.open_file(path, diffusers.REFETCH)
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    found = torch_files.load(path)
    for wrapper in WRAPPERS:
        if isinstance(found, dict) and isinstance(found.get(wrapper), dict):
            found = found[wrapper]
            break
    state = {name: x for name, x in found.items() if isinstance(x, np.ndarray)} if isinstance(
        found, dict) else {}
    if not state:
        raise WeightsError(f'{path} holds no tensors by name; is it the published file?')
    return state


def _read_folder(folder: Path) -> State:
    for stem in STEMS:
        if any((folder / f'{stem}.safetensors{end}').exists() for end in ('', '.index.json')):
            files = {t.file for t in diffusers.headers(folder, stem).values()}
            return {name: x for file in sorted(files) for name, x in read(file).items()}
    for name in PICKLES:
        if (folder / name).exists():
            return read(folder / name)
    raise WeightsError(f'{folder} has none of {STEMS[0]}.safetensors, {STEMS[1]}.safetensors, '
                       f'{", ".join(PICKLES)}; give the folder, or one file, of the weights')


def check_hash(path: Path, sha256: str) -> None:
    """Raises `WeightsError` unless the file's sha256 begins with `sha256` (hex)."""
    try:
        with path.open('rb') as file:
            found = hashlib.file_digest(file, 'sha256').hexdigest()
    except OSError as e:
        raise WeightsError(f'weights missing: {path} ({e.strerror})') from e
    if not found.startswith(sha256):
        raise WeightsError(f'{path} is not the published file: its sha256 begins {found[:12]}, '
                           f'expected {sha256[:12]}; fetch it again')


def check(abstract: Any, state: Mapping[str, Any], entry: diffusers.EntryOf, where: str) -> None:
    """Raises `WeightsError` unless `state` has exactly the tensors of the tree `abstract`.

    Names the first that is missing, misshapen or left over.
    """
    left = dict(state)
    for path, leaf in flat.flatten(abstract).items():
        e = entry(path)
        for name in e.names(leaf.shape):
            shape, found = e.shape(leaf.shape), left.pop(name, None)
            if found is None:
                raise WeightsError(f'{where} lacks the tensor {name} {shape}; is it complete, and '
                                   'of this architecture?')
            if found.shape != shape:
                raise WeightsError(f'{where}: {name} has shape {found.shape}, expected {shape}; is '
                                   'it of this architecture?')
    if left:
        raise WeightsError(f'{where} holds {len(left)} tensors that this architecture does not '
                           f'have, {min(left)} first')


def fill(abstract: Any, state: Mapping[str, np.ndarray], entry: diffusers.EntryOf,
         where: str) -> Any:
    """The tree `abstract` (of shapes and dtypes) filled from published tensors, in numpy.

    Raises:
      WeightsError: as `check`.
    """
    check(abstract, state, entry, where)

    def one(path: str, leaf: Any) -> np.ndarray:
        e = entry(path)
        parts = [e.to_ours(state[name]) for name in e.names(leaf.shape)]
        return np.asarray(np.stack(parts) if e.stacked else parts[0], jnp.dtype(leaf.dtype),
                          order='C')

    return flat.unflatten({path: one(path, leaf)
                           for path, leaf in flat.flatten(abstract).items()})
