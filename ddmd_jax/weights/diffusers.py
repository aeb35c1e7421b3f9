"""Folders as diffusers writes them: safetensors in, straight to the mesh; safetensors out.

Reading goes shard by shard: of each tensor only the part that a device holds is read, cast
and handed over before the next is looked at, so that no host ever has a copy of the model.
"""

import dataclasses
import hashlib
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddmd_jax.util import errors, files, shape
from ddmd_jax.weights import flat
from ddmd_jax.weights.flat import WeightsError
from ddmd_jax.weights.names import Entry

STEM = 'diffusion_pytorch_model'
PICKLES = ('.bin', '.pt', '.pth', '.ckpt', '.pkl')
READABLE = {'F32': np.float32, 'F16': np.float16, 'BF16': jnp.bfloat16}
REFETCH = 'fetch it again'
INDEX = {'weight_map?': {str: str}}
SAMPLE = 1024  # elements of each tensor that go into the identity
FILE_BYTES = 2 * 1024**3  # largest file that export writes

EntryOf = Callable[[str], Entry]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a published tensor lies, and under which name; nothing of it has been read."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One component's folder (``transformer/``, ``vae/``): its config and its tensors."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]


def read_json(file: Path, like: Any = MappingProxyType({})) -> dict[str, Any]:
    """Raises `WeightsError` if `file` is missing, or no JSON object that is `like` (`shape`)."""
    try:
        return shape.load(files.patiently(file.read_bytes), like)
    except FileNotFoundError as e:
        raise WeightsError(f'{file} is missing; is {file.parent} a diffusers folder?') from e
    except (ValueError, OSError) as e:
        errors.raise_environment(e)
        raise WeightsError(f'{file} cannot be read ({e}); fetch it again') from e


def open_folder(folder: Path, expected: str, variant: str = '') -> Checkpoint:
    """Opens a component whose ``config.json`` names the class `expected`; reads headers only.

    `variant` is as diffusers has it: 'fp16' stands for ``*.fp16.safetensors``.

    Raises:
      WeightsError: another class, a missing or truncated file, no such variant, pickles only, or
        tensors of a type that is not trained on (fp8, int8).
    """
    config = read_json(folder / 'config.json')
    found = config.get('_class_name', 'something without a class name')
    if found != expected:
        raise WeightsError(f'{folder} is {found}, not {expected}; give the folder of a teacher '
                           'of this family')
    tensors = headers(folder, STEM, variant)
    check_types(folder, tensors)
    return Checkpoint(folder, config, tensors)


def headers(folder: Path, stem: str, variant: str = '') -> dict[str, Tensor]:
    """Every tensor of the safetensors files of a component, by name; `stem` begins theirs.

    Raises:
      WeightsError: a missing or truncated file, no such variant, or pickles only.
    """
    tensors: dict[str, Tensor] = {}
    for file in _files(folder, stem, variant):
        opened = flat.open_file(file, REFETCH)
        for name in opened.keys():  # noqa: SIM118  (not a dict)
            part = opened.get_slice(name)
            tensors[name] = Tensor(file, name, part.get_dtype(), tuple(part.get_shape()))
    return tensors


def check_types(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Raises `WeightsError` if a tensor is of a type that is not trained on."""
    bad = sorted({f'{t.dtype} ({t.name})' for t in tensors.values()
                  if t.dtype not in READABLE})[:1]
    if bad:
        raise WeightsError(f'{folder} holds {bad[0]}; quantised weights cannot be distilled: give '
                           'a folder in float32, float16 or bfloat16')


def patterns(stem: str, variant: str = '') -> tuple[str, ...]:
    """Of the files that hold a component's weights in a variant; its indices are JSON."""
    called = f'{stem}.{variant}' if variant else stem
    # The last is how diffusers called the parts of a variant before it did as transformers does.
    return (f'{called}.safetensors', f'{called}-*.safetensors',
            *([f'{stem}-*.{variant}.safetensors'] if variant else []))


def variants(folder: Path, stem: str) -> list[str]:
    """The variants of its weights that a component comes in, '' for those without a name."""
    found = (_variant_of(file.name, stem) for file in folder.glob('*.safetensors'))
    return sorted({variant for variant in found if variant is not None})


def _variant_of(name: str, stem: str) -> str | None:
    """Of a file of weights, '' if it has none; None of any other file."""
    found = re.fullmatch(re.escape(stem) + r'(?:\.([\w-]+?))?(?:-\d+-of-\d+)?(?:\.([\w-]+))?'
                         r'\.safetensors', name)
    return found and (found[1] or found[2] or '')


def plain_name(name: str, stem: str, variant: str) -> str:
    """How a file of weights in a variant is called in a folder that has them without one.

    '' if it is of another variant. Parts keep their names, which their index has.
    """
    single, indices = _names(stem, variant)
    if name == single:
        return f'{stem}.safetensors'
    if name in indices:
        return f'{stem}.safetensors.index.json'
    return name if _variant_of(name, stem) == variant else ''


def _names(stem: str, variant: str) -> tuple[str, tuple[str, ...]]:
    """The names of a component's file in a variant, and of its index; the last is an old one."""
    dot = f'.{variant}' if variant else ''
    return f'{stem}{dot}.safetensors', (f'{stem}.safetensors.index{dot}.json',
                                        f'{stem}.safetensors{dot}.index.json')


def variant_in(folder: Path, stem: str, variant: str) -> str:
    """`variant`, or '' with a warning where a component does not come in it, as diffusers does."""
    found = variants(folder, stem)
    if variant in found or '' not in found:
        return variant
    print(f'warning: {folder} has no variant {variant}; what is read is {stem}.safetensors',
          file=sys.stderr)
    return ''


def _files(folder: Path, stem: str, variant: str = '') -> list[Path]:
    """The safetensors files of a component: one, or those that its index names."""
    name, indices = _names(stem, variant)
    single = folder / name
    index = next((folder / x for x in indices if (folder / x).exists()), None)
    if index:
        names = sorted({str(n) for n in read_json(index, INDEX).get('weight_map', {}).values()})
        # A name with a folder in it could reach for any file.
        bad = [n for n in names if Path(n).name != n or not (folder / n).is_file()]
        if bad or not names:
            raise WeightsError(f'{index} names {", ".join(bad) or "nothing"}, not in that folder; '
                               'fetch the folder again')
        return [folder / n for n in names]
    if single.is_file():
        return [single]
    pickles = sorted(f.name for f in folder.iterdir() if f.suffix in PICKLES)
    if pickles:
        raise WeightsError(f'{folder} holds only {pickles[0]}, a pickle: loading one runs whatever '
                           'code it contains; convert it (diffusers: save_pretrained writes '
                           'safetensors)')
    others = variants(folder, stem)
    if variant and others:
        raise WeightsError(f'{folder} has no variant {variant}: it comes in '
                           f'{" and ".join(x or "one without a name" for x in others)}; name that, '
                           "or '' for none (config.teacher.variant, --variant)")
    if others and others != ['']:
        raise WeightsError(f'{folder} has no {single.name}, but {stem}.{others[0]}.safetensors: '
                           f'name the variant (config.teacher.variant={others[0]}, or '
                           f'--variant={others[0]}), or give a copy where files are called so')
    raise WeightsError(f'{folder} has no {single.name}; fetch the folder again, or name the '
                       'variant if it comes in one only (config.teacher.variant, --variant)')


def _slices(checkpoint: Checkpoint) -> dict[str, Any]:
    """Every tensor by its key in the checkpoint; what is indexed is read."""
    opened = {file: flat.open_file(file, REFETCH)
              for file in {t.file for t in checkpoint.tensors.values()}}
    return {key: opened[t.file].get_slice(t.name) for key, t in checkpoint.tensors.items()}


def check(checkpoint: Checkpoint, abstract: Any, entry: EntryOf) -> None:
    """Raises `WeightsError` unless the checkpoint holds exactly the tensors of `abstract`.

    Names the first tensor that is missing, misshapen or left over; costs no memory.
    """
    left = dict(checkpoint.tensors)
    for path, leaf in flat.flatten(abstract).items():
        e = entry(path)
        for name in e.names(leaf.shape):
            found, shape = left.pop(name, None), e.shape(leaf.shape)
            if found is None:
                raise WeightsError(f'{checkpoint.folder} lacks the tensor {name} {shape}; is it '
                                   'complete, and of this architecture?')
            if found.shape != shape:
                raise WeightsError(f'{checkpoint.folder}: {name} has shape {found.shape}, expected '
                                   f'{shape} from its config.json')
    if left:
        raise WeightsError(f'{checkpoint.folder} holds {len(left)} tensors that this architecture '
                           f'does not have, {left[min(left)].name} first')


def import_tree(checkpoint: Checkpoint, abstract: Any, shardings: Any, entry: EntryOf) -> Any:
    """The parameters on the mesh, nested as `abstract`, in its dtypes and in `shardings`.

    `check` the checkpoint first; `abstract` may be a part of what it holds. Peak host memory,
    beyond what devices hold: one shard of one leaf and one layer of it.
    """
    layout, slices = flat.flatten(shardings), _slices(checkpoint)
    return flat.unflatten({
        path: _place(leaf, layout[path], _reader(slices, entry(path), leaf))
        for path, leaf in flat.flatten(abstract).items()})


def _reader(slices: dict[str, Any], entry: Entry, leaf: Any) -> Callable:
    """``index -> numpy``: the part of our leaf at `index`, read from the published tensors."""
    names = entry.names(leaf.shape)
    one = lambda name, index: entry.to_ours(slices[name][entry.slices(index)])

    def read(index: tuple[slice, ...]) -> np.ndarray:
        if not entry.stacked:
            return np.ascontiguousarray(one(names[0], index), leaf.dtype)
        out = np.empty([len(range(*s.indices(n))) for s, n in zip(index, leaf.shape)], leaf.dtype)
        for row, name in enumerate(names[index[0]]):
            out[row] = one(name, index[1:])
        return out

    return read


def _place(leaf: Any, sharding: Any, read: Callable) -> jax.Array:
    """An array in `sharding`, filled one shard at a time; replicas share one reading."""
    owners: dict[tuple, list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        # A scalar's index is (); slices cannot be keys before Python 3.12.
        key = tuple((s.start, s.stop) for s in index)
        owners.setdefault(key, []).append(device)
    arrays = []
    for key, devices in owners.items():
        part = read(tuple(slice(*span) for span in key))
        arrays += [jax.block_until_ready(jax.device_put(part, d)) for d in devices]
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, arrays)


def identity(checkpoint: Checkpoint) -> str:
    """Sixteen hex digits that name these weights without reading them all.

    sha256 over every tensor's name, type and shape and its first `SAMPLE` elements or so.
    """
    digest, slices = hashlib.sha256(), _slices(checkpoint)
    for name, t in sorted(checkpoint.tensors.items()):
        digest.update(f'{name}{t.dtype}{t.shape}'.encode())
        if size := math.prod(t.shape):
            rows = min(t.shape[0], -(-SAMPLE * t.shape[0] // size))
            digest.update(slices[name][:rows].tobytes())
    return digest.hexdigest()[:16]


def export_tree(tree: Any, entry: EntryOf, folder: Path, config: dict[str, Any], dtype: Any,
                file_bytes: int = FILE_BYTES, stem: str = STEM) -> None:
    """Writes a component's folder, through a scratch folder beside it and a rename.

    Layer by layer and file by file: the host holds one file's tensors at a time. `stem` begins
    the files' names.

    Raises:
      WeightsError: `folder` exists already, or a value is not finite in `dtype`.
    """
    import huggingface_hub
    import safetensors.numpy

    if folder.exists():
        raise WeightsError(f'{folder} exists already; choose another place or delete it')
    leaves, parts = flat.flatten(tree), {}
    for path, leaf in leaves.items():
        e = entry(path)
        for layer, name in enumerate(e.names(leaf.shape)):
            parts[name] = path, layer if e.stacked else ...

    def size(part: tuple[str, Any]) -> int:
        path, _ = part
        return math.prod(entry(path).shape(leaves[path].shape)) * np.dtype(dtype).itemsize

    def fetch(path: str, layer: Any) -> np.ndarray:
        whole = np.asarray(jax.device_get(leaves[path][layer]))
        return np.ascontiguousarray(entry(path).to_theirs(whole)).astype(dtype)

    plan = huggingface_hub.split_state_dict_into_shards_factory(
        parts, get_storage_size=size, filename_pattern=f'{stem}{{suffix}}.safetensors',
        max_shard_size=file_bytes)
    with files.replacing(folder) as scratch:
        scratch.mkdir(parents=True)
        files.write(scratch / 'config.json', json.dumps(config, indent=2, sort_keys=True) + '\n')
        for file, names in plan.filename_to_tensors.items():
            tensors = {name: fetch(*parts[name]) for name in names}
            for name, tensor in tensors.items():
                flat.check_finite(folder, name, tensor)
            safetensors.numpy.save_file(tensors, scratch / file, metadata={'format': 'pt'})
        if plan.is_sharded:
            index = {'metadata': plan.metadata, 'weight_map': plan.tensor_to_filename}
            files.write(scratch / f'{stem}.safetensors.index.json', json.dumps(index, indent=2))
