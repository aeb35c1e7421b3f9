"""LoRA files: low-rank adapters as diffusers, PEFT, kohya's scripts and ComfyUI name them.

Here the factors of a kernel ``[..., in, out]`` are A ``[..., in, rank]``, B ``[..., rank, out]``,
and a file's scale is part of B. A published pair is laid out as its weight is: ``[rank, in]`` and
``[out, rank]``, of convolutions ``[rank, in, height, width]`` and ``[out, rank, 1, 1]``.

Loaders have read the scale in many ways (diffusers #13249 and #14409), so that what is written
leaves nothing to read: one rank, the scale in B, and alpha = rank wherever it is asked for.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ddmd_jax.util import files, shape
from ddmd_jax.weights import diffusers, flat
from ddmd_jax.weights.flat import WeightsError
from ddmd_jax.weights.names import Entry

FILE = 'pytorch_lora_weights.safetensors'  # as diffusers looks for it
CONFIG = 'lora_adapter_metadata'  # in a file's header: PEFT's config, which diffusers obeys
BASE = 'ddmd_jax_base'  # in a file's header: the identity of the weights that it is for
PEFT_FILE, PEFT_CONFIG = 'adapter_model.safetensors', 'adapter_config.json'  # PEFT's own pair
TYPES = ('F64', 'F32', 'F16', 'BF16', 'I64', 'I32')  # whole numbers: an alpha may be one
NAMINGS = ('diffusers', 'comfyui')
KOHYA = 'lora_unet_'  # a network's modules, whatever it is, dots as underscores
OTHER_KOHYA = ('lora_transformer_', 'lycoris_')
CURE = 'give the safetensors file of a LoRA'
PARTS = {'lora_A': 'A', 'lora_down': 'A', 'lora.down': 'A',
         'lora_B': 'B', 'lora_up': 'B', 'lora.up': 'B'}
PART = re.compile(r'(.+)\.(lora_[AB]|lora[_.](?:down|up))\.weight')
OF_PEFT = 'default.'  # PEFT's name of an adapter, wherever it stands in a name
ALPHA = '.alpha'

Factors = dict[str, tuple[np.ndarray, np.ndarray]]  # A and B by the path of our kernel


@dataclasses.dataclass(frozen=True)
class Names:
    """How a family's adapters are called.

    Attributes:
      component: of its pipeline, in front of every name that diffusers reads.
      entry: published names of its parameters.
      comfyui: what ComfyUI wants in front; '' where it has no modules of these names.
      alias: from the underscored name of a module as other scripts have it to its published one.
    """

    component: str
    entry: Callable[[str], Entry]
    comfyui: str = ''
    alias: Callable[[str], str] = lambda name: name


def write(path: Path, factors: Mapping[str, tuple[Any, Any]], names: Names,
          naming: str = 'diffusers', dtype: Any = np.float32, base: str = '') -> None:
    """Writes adapters of one rank, whose B holds the scale, for the weights of identity `base`.

    Raises:
      WeightsError: a value is not finite in `dtype`, or the family has no such `naming`.
    """
    import safetensors.numpy

    if naming == 'comfyui' and not names.comfyui:
        raise WeightsError('ComfyUI keeps query, key and value of this network in one matrix and '
                           'would leave these adapters out; give --naming=diffusers')
    prefix = names.comfyui if naming == 'comfyui' else f'{names.component}.'
    down, up, modules, tensors = 'lora_A', 'lora_B', [], {}
    if kohya := prefix == KOHYA:
        down, up = 'lora_down', 'lora_up'
    rank = 0
    for kernel, (a, b) in sorted(factors.items()):
        a, b, entry = np.asarray(a), np.asarray(b), names.entry(kernel)
        rank = a.shape[-1]
        for layer, module in enumerate(_modules(entry, a.shape)):
            modules.append(module)
            name = prefix + (module.replace('.', '_') if kohya else module)
            place = layer if entry.stacked else ...
            for part, x in ((down, a[place]), (up, b[place])):
                tensors[f'{name}.{part}.weight'] = np.ascontiguousarray(
                    entry.to_theirs(x)).astype(dtype)
            if kohya:
                tensors[name + ALPHA] = np.asarray(rank, dtype)
    for name, tensor in tensors.items():
        flat.check_finite(path, name, tensor)
    about = {'format': 'pt', **({BASE: base} if base else {})}
    if naming == 'diffusers':
        config = {'r': rank, 'lora_alpha': rank, 'target_modules': modules}
        about[CONFIG] = json.dumps({f'{names.component}.{k}': v for k, v in config.items()},
                                   indent=2, sort_keys=True)
    with files.replacing(path) as scratch:
        safetensors.numpy.save_file(tensors, scratch, metadata=about)


def find(path: Path) -> Path | None:
    """The LoRA file that `path` is, or that lies in that folder; None if there is none."""
    file = path
    if path.is_dir():
        file = next((path / name for name in (FILE, PEFT_FILE) if (path / name).is_file()), path)
    if not file.is_file() or file.suffix != '.safetensors':
        return None
    names = flat.open_file(file, CURE).keys()
    return file if any(PART.fullmatch(name.replace(OF_PEFT, '')) for name in names) else None


def read(path: Path, kernels: Mapping[str, tuple[int, ...]], names: Names,
         base: str = '') -> Factors:
    """Factors by our kernels' paths, fp32; where ranks differ, the smaller are filled with zeros.

    Args:
      path: a file with names of diffusers, PEFT, kohya's scripts or ComfyUI.
      kernels: shapes of all of the network's kernels, by path.
      names: the family's.
      base: identity of the network's weights; '' is any. A file of others does not say its own.

    Raises:
      WeightsError: damaged, no LoRA, of another network, or for other weights of this one.
    """
    opened = flat.open_file(path, CURE)
    made_for = (opened.metadata() or {}).get(BASE, '')
    if base and made_for and made_for != base:
        raise WeightsError(f'{path} was trained over other weights (identity {made_for}) than the '
                           f"teacher's ({base}); give the teacher that it was made for, or a LoRA "
                           'of this one')
    tensors = {}
    for name in opened.keys():  # noqa: SIM118  (not a dict)
        if (kind := opened.get_slice(name).get_dtype()) not in TYPES:
            raise WeightsError(f'{path} holds {kind} ({name}); quantised factors are not read: '
                               'give them in float32, float16 or bfloat16')
        tensors[name] = np.asarray(opened.get_tensor(name), np.float32)
    config = _config(path, opened.metadata() or {}, names.component)
    places = {module: (kernel, layer) for kernel, shape in kernels.items()
              for layer, module in enumerate(_modules(names.entry(kernel), shape))}
    pairs = _pairs(path, tensors, places, names)

    found: dict[str, dict[int, tuple[np.ndarray, np.ndarray]]] = {}
    for module, pair in pairs.items():
        kernel, layer = places[module]
        if missing := {'A', 'B'} - set(pair):
            raise WeightsError(f'{path} lacks the factor {min(missing)} of {module}')
        a, b, alpha = pair['A'], pair['B'], pair.get('alpha', np.ones(1))
        if not (a.ndim and a.shape[0] and alpha.size == 1):
            raise WeightsError(f'{path} is damaged: of {module}, A is {a.shape} and alpha '
                               f'{alpha.shape}; {CURE}')
        entry, rank = names.entry(kernel), a.shape[0]
        shape = kernels[kernel][1:] if entry.stacked else kernels[kernel]
        taps = tuple(1 for _ in shape[:-2])
        for x, ours in ((a, (*shape[:-1], rank)), (b, (*taps, rank, shape[-1]))):
            if x.shape != entry.slices(ours):
                raise WeightsError(f'{path} is of another base: a factor of {module} is {x.shape}, '
                                   f'here it would be {entry.slices(ours)}')
        scale = alpha.item() / rank if 'alpha' in pair else config(rank)
        with np.errstate(over='ignore', invalid='ignore'):
            scaled = scale * entry.to_ours(b)
        if not (np.isfinite(a).all() and np.isfinite(scaled).all()):
            raise WeightsError(f'{path} is damaged: factors of {module} are not finite; {CURE}')
        found.setdefault(kernel, {})[layer] = (entry.to_ours(a), scaled)

    factors = {}
    for kernel, layers in found.items():
        shape, rank = kernels[kernel], max(a.shape[-1] for a, _ in layers.values())
        count, stacked = (shape[0], True) if names.entry(kernel).stacked else (1, False)
        some_a, some_b = next(iter(layers.values()))
        a = np.zeros((count, *some_a.shape[:-1], rank), np.float32)
        b = np.zeros((count, *some_b.shape[:-2], rank, shape[-1]), np.float32)
        for layer, (one_a, one_b) in layers.items():
            own = one_a.shape[-1]
            a[layer, ..., :own], b[layer, ..., :own, :] = one_a, one_b
        factors[kernel] = (a, b) if stacked else (a[0], b[0])
    return factors


def _modules(entry: Entry, shape: tuple[int, ...]) -> list[str]:
    """Published modules of a kernel, one for each layer of a stack."""
    return [name.removesuffix('.weight') for name in entry.names(shape)]


def _config(path: Path, metadata: Mapping[str, str], component: str) -> Callable[[int], float]:
    """The scale, by its rank, of a pair that has no alpha of its own: the config's, or else 1.

    The config is in the header, or beside PEFT's own file.

    Raises:
      WeightsError: it asks for what is no plain LoRA.
    """
    beside = path.with_name(PEFT_CONFIG)
    try:
        found = (diffusers.read_json(beside) if path.name == PEFT_FILE and beside.is_file() else
                 shape.load(metadata.get(CONFIG, '{}').encode(), {}))
        config = {name.removeprefix(f'{component}.'): value for name, value in found.items()}
        if fault := shape.fault(config, {'r?': shape.positive, 'lora_alpha?': shape.finite}):
            raise ValueError(fault)
        odd = [name for name in ('use_dora', 'alpha_pattern', 'rank_pattern', 'lora_bias')
               if config.get(name)]
        if odd:
            raise WeightsError(f'{path} is made with {odd[0]}, which is not read here; merge it '
                               'into its base, or save it again with one rank and one alpha')
    except ValueError as e:
        raise WeightsError(f'{path}: its {CONFIG} cannot be read ({e}); {CURE}') from e

    def scale(rank: int) -> float:
        rank = config.get('r', rank)
        return config.get('lora_alpha', rank) / (rank**0.5 if config.get('use_rslora') else rank)

    return scale


def _pairs(path: Path, tensors: Mapping[str, np.ndarray], places: Mapping[str, Any],
           names: Names) -> dict[str, dict[str, np.ndarray]]:
    """``{published module: {'A', 'B', 'alpha'}}`` of a file's tensors.

    Raises:
      WeightsError: a tensor is none of these, is there twice, or of no module of the network.
    """
    underscored = {module.replace('.', '_'): module for module in places}
    front = re.compile('|'.join(re.escape(prefix) for prefix in (
        f'{names.component}.', 'diffusion_model.', 'base_model.model.', KOHYA, *OTHER_KOHYA)))

    def module_of(name: str) -> str | None:
        found = front.match(name)
        bare = name[found.end() if found else 0:]
        if bare in places:
            return bare
        bare = bare.replace('.', '_')
        return underscored.get(bare) or underscored.get(names.alias(bare))

    pairs: dict[str, dict[str, np.ndarray]] = {}
    for key, tensor in tensors.items():
        matched = PART.fullmatch(key := key.replace(OF_PEFT, ''))
        name, part = ((matched[1], PARTS[matched[2]]) if matched else
                      (key.removesuffix(ALPHA), 'alpha' if key.endswith(ALPHA) else ''))
        if not part:
            raise WeightsError(f'{path} holds {key}, which is no factor of a plain LoRA; {CURE}')
        module = module_of(name)
        if module is None:
            raise WeightsError(f"{path} adapts {name}, which is no module of the teacher's network "
                               f'({names.component}); give a LoRA of this base, its network alone')
        if part in pairs.setdefault(module, {}):
            raise WeightsError(f'{path} has factor {part} of {module} twice, by two names; leave '
                               'one in')
        pairs[module][part] = tensor
    return pairs


def on_host(trained: Any, scale: float) -> Factors:
    """Factors of a trained tree of adapters, `scale` in B; on the host."""
    leaves = flat.flatten(jax.device_get(trained))
    kernels = sorted({name.rpartition('/')[0] for name in leaves})
    return {kernel: (leaves[f'{kernel}/lora_A'], scale * leaves[f'{kernel}/lora_B'])
            for kernel in kernels}
