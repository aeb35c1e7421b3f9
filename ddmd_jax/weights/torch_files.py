"""Files that ``torch.save`` wrote, read without torch, and without running what they name.

Such a file is a pickle with its tensors beside it, and a pickle may call any function there is.
Here it may call those that put a tensor together, and nothing else: scorers of pictures are
published as pickles only. All layouts are read: the archive (since torch 1.6; storages are its
stored entries), TorchScript's archive (OpenAI's CLIP; modules become dicts, their code is left
alone), and the stream before both (storages follow the pickle; FID's Inception is one).
"""

import collections
import pickle
import struct
import zipfile
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from ddmd_jax.util.text import first_line
from ddmd_jax.weights.flat import WeightsError

MAGIC = 0x1950A86A20F9469CFC6C  # first value of the stream
STORAGES: dict[str, Any] = {
    'FloatStorage': np.float32, 'DoubleStorage': np.float64, 'HalfStorage': np.float16,
    'BFloat16Storage': ml_dtypes.bfloat16, 'LongStorage': np.int64, 'IntStorage': np.int32,
    'ShortStorage': np.int16, 'CharStorage': np.int8, 'ByteStorage': np.uint8,
    'BoolStorage': np.bool_}
CURE = 'fetch it again, or convert it to safetensors'


def load(path: Path) -> Any:
    """What was saved, usually a dict; tensors are numpy arrays that share their storages.

    Raises:
      WeightsError: missing, damaged, or names something that is no tensor.
    """
    try:
        with path.open('rb') as file:
            if zipfile.is_zipfile(file):
                with zipfile.ZipFile(file) as archive:
                    return _from_archive(archive)
            file.seek(0)
            return _from_stream(file)
    except FileNotFoundError as e:
        raise WeightsError(f'weights missing: {path}') from e
    except _Forbidden as e:
        raise WeightsError(f'{path} names {e}, which is no tensor: loading it could run any code; '
                           'convert it to safetensors where it was made') from e
    except (pickle.UnpicklingError, zipfile.BadZipFile, EOFError, KeyError, ValueError, TypeError,
            AttributeError, IndexError, AssertionError, ImportError, OSError, struct.error,
            UnicodeDecodeError) as e:  # whatever damaged bytes can mean to a pickle
        raise WeightsError(f'weights damaged: {path} ({first_line(e)}); {CURE}') from e


class _Forbidden(Exception):
    """A global that a file of tensors has no need of."""


class _Module:
    """A module of TorchScript's: what it has by name, in `attributes`."""

    attributes: dict[str, Any]

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        self.attributes = attributes


def _tensors(module: _Module, prefix: str = '') -> dict[str, np.ndarray]:
    """A module's tensors by torch's names, those of modules within it too."""
    found: dict[str, np.ndarray] = {}
    for name, x in module.attributes.items():
        if isinstance(x, _Module):
            found |= _tensors(x, f'{prefix}{name}.')
        elif isinstance(x, np.ndarray):
            found[prefix + name] = x
    return found


class _Reader(pickle.Unpickler):
    """Knows storages, tensors and ordered dicts; `storage` is ``(dtype, key, count) -> array``."""

    def __init__(self, file: IO[bytes], storage: Any):
        super().__init__(file, encoding='utf-8')
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ('collections', 'OrderedDict'):
            return collections.OrderedDict
        if module == 'torch._utils' and name == '_rebuild_tensor_v2':
            return _tensor
        if module == 'torch._utils' and name == '_rebuild_parameter':
            return lambda data, *_: data
        if module.split('.')[0] == '__torch__':
            return _Module
        if module == 'torch.jit._pickle' and name.startswith('build_'):  # lists of one type
            return list
        if module == 'torch' and name in STORAGES:
            return np.dtype(STORAGES[name])
        raise _Forbidden(f'{module}.{name}')

    def persistent_load(self, pid: Any) -> np.ndarray:
        kind, dtype, key, _, count, *view = pid
        if kind != 'storage' or any(view):
            raise ValueError(f'unknown reference {kind}')
        return self._storage(dtype, key, count)


def _tensor(storage: np.ndarray, offset: int, size: tuple[int, ...], stride: tuple[int, ...],
            *_: Any) -> np.ndarray:
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 not in size and not (0 <= offset <= last < len(storage) and min(stride, default=0) >= 0):
        raise ValueError('a tensor lies outside its storage')
    steps = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, steps, writeable=False)


def _from_archive(archive: zipfile.ZipFile) -> Any:
    names = [n for n in archive.namelist() if n.endswith('/data.pkl')]
    if len(names) != 1:
        raise ValueError('no data.pkl in it')
    root = names[0].removesuffix('data.pkl')
    order = f'{root}byteorder'
    if order in archive.namelist() and archive.read(order) != b'little':
        raise ValueError('its numbers are big-endian')
    storages: dict[str, np.ndarray] = {}

    def storage(dtype: np.dtype, key: str, count: int) -> np.ndarray:
        if key not in storages:
            storages[key] = np.frombuffer(archive.read(f'{root}data/{key}'), dtype)
        if len(storages[key]) != count:
            raise ValueError(f'storage {key} is not {count} long')
        return storages[key]

    with archive.open(names[0]) as file:
        found = _Reader(file, storage).load()
    return _tensors(found) if isinstance(found, _Module) else found


def _from_stream(file: IO[bytes]) -> Any:
    none = lambda *_: None
    if _Reader(file, none).load() != MAGIC:
        raise ValueError('not written by torch.save')
    _Reader(file, none).load()  # version of the layout
    if not _Reader(file, none).load().get('little_endian', True):
        raise ValueError('its numbers are big-endian')
    storages: dict[str, np.ndarray] = {}

    def storage(dtype: np.dtype, key: str, count: int) -> np.ndarray:
        return storages.setdefault(key, np.empty(count, dtype))  # filled below

    found = _Reader(file, storage).load()
    for key in _Reader(file, none).load():
        count, = struct.unpack('<q', file.read(8))
        if count != len(storages[key]):
            raise ValueError(f'storage {key} is not {len(storages[key])} long')
        size = storages[key].nbytes
        if file.readinto(storages[key].view(np.uint8)) != size:  # type: ignore[attr-defined]
            raise EOFError('it ends early')
    return found
