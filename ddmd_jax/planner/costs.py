"""Cost of a program on one device: products, bytes sent, bytes through memory.

Each instruction counts as often as its computation runs (`repeats.py`). Each
function says what its estimate leaves out.
"""

import dataclasses
import functools
import math
import re
from typing import Any

import numpy as np

from ddmd_jax.planner import kernels
from ddmd_jax.planner.hlo import (
    COLLECTIVES,
    Computation,
    HloError,
    Instruction,
    Module,
    Shape,
    call_target,
    collective_kind,
    leaves,
    parse,
)
from ddmd_jax.planner.repeats import Repeats, count_repeats


@functools.lru_cache(maxsize=4)
def repeats_in(module: Module) -> Repeats:
    """Of a conditional the branch with the most FLOPs; of equals, with the most HBM traffic."""
    return count_repeats(module, lambda part, repeats: (_flops(part, repeats), _hbm(part, repeats)))


# --- FLOPs ---


@dataclasses.dataclass(frozen=True)
class PallasCall:
    """One call of a Pallas kernel.

    Attributes:
      name: the kernel's, as given to `pallas_call`.
      count: runs of it in one run of the program.
      flops: of one run, from the kernel's `cost_estimate` or, if it has none, what `kernels.py`
        knows of it; None if that is nothing.
      operands, results: shapes, for a caller that knows the kernel's arithmetic.
    """

    name: str
    count: int
    flops: int | None
    operands: tuple[Shape, ...]
    results: tuple[Shape, ...]


def flops(module: Module) -> int:
    """FLOPs of matrix products and convolutions in one run, on one device.

    Two for each multiplication that is needed: padding of a convolution and the holes of its
    dilation do not count (so that the convolutions in which TPU hides batched products count as
    the products). A Pallas kernel counts with its own estimate or that of `kernels.py`, and as
    nothing if neither has one: see `pallas_calls`. Elementwise arithmetic, reductions, FFT and
    decompositions do not count, nor does a product of matrix and vector where XLA has turned it
    into a reduction. A product counts once whatever its precision, though TPU takes several
    passes for more than bf16.
    """
    return _flops(module, repeats_in(module))


def pallas_calls(module: Module) -> tuple[PallasCall, ...]:
    """Every call of a Pallas kernel on TPU, those of ENTRY first."""
    found = []
    for name, count in repeats_in(module).counts.items():
        for i in module[name].instructions.values():
            if call_target(i) == 'tpu_custom_call':
                found.append(PallasCall(kernels.name(i), count, _kernel_flops(i),
                                        tuple(leaves(i.shapes)), tuple(leaves(i.shape))))
    return tuple(found)


def _flops(module: Module, repeats: Repeats) -> int:
    return sum(count * _own_flops(module[name]) for name, count in repeats.counts.items())


@functools.lru_cache(maxsize=4096)
def _own_flops(comp: Computation) -> int:
    """Of its own instructions, run once."""
    return sum(_instruction_flops(i) for i in comp.instructions.values())


def _instruction_flops(i: Instruction) -> int:
    if i.opcode == 'dot':
        sizes = [i.shapes[0].dims[d] for d in i.dims('lhs_contracting_dims')]
        return 2 * i.shape.elements * math.prod(sizes)
    if i.opcode == 'convolution':
        return 2 * _multiplications(i)
    if call_target(i) == 'tpu_custom_call':
        return _kernel_flops(i) or 0
    return 0


def _kernel_flops(i: Instruction) -> int | None:
    """FLOPs of one run of a Pallas kernel; see `PallasCall.flops`."""
    estimate = i.config.get('custom_call_config', {}).get('cost_estimate', {})
    return int(estimate['flops']) if 'flops' in estimate else kernels.flops(i)


def _multiplications(i: Instruction) -> int:
    """Needed multiplications of a `convolution`."""
    labels = re.fullmatch(r'(\w+)_(\w+)->(\w+)', i.attributes.get('dim_labels', ''))
    if labels is None:
        raise HloError(f'convolution {i.name} has no dim_labels')
    image, kernel, out = (dict(zip(names, shape.dims))
                          for names, shape in zip(labels.groups(), (*i.shapes[:2], i.shape)))
    total = kernel['i'] * out['b'] * out['f']  # `i` is one group's: feature_group_count is in it
    for axis in (label for label in out if label.isdigit()):
        total *= _pairs(image[axis], kernel[axis], out[axis], **_window(i, int(axis)))
    return total


def _window(i: Instruction, axis: int) -> dict[str, int]:
    """A convolution's window along one axis, of ``{size=3x3 stride=2x2 pad=0_1x0_1}``."""
    fields = dict(re.findall(r'(\w+)=([\w-]+)', i.attributes.get('window', '')))
    defaults = {'stride': '1', 'pad': '0_0', 'lhs_dilate': '1', 'rhs_dilate': '1'}
    return {key: int(fields[key].split('x')[axis].split('_')[0] if key in fields else
                     default.split('_')[0]) for key, default in defaults.items()}


@functools.lru_cache(maxsize=4096)
def _pairs(image: int, kernel: int, out: int, stride: int, pad: int, lhs_dilate: int,
           rhs_dilate: int) -> int:
    """Pairs of an output and a kernel position, along one axis, that meet an element.

    That is neither padding nor a hole of the image's dilation. A batch axis of size n that TPU
    writes as an axis with window n, stride n - 1 and dilation n has n pairs, not n x n.
    """
    total = 0
    for first in np.arange(out) * stride - pad:
        at = first + np.arange(kernel) * rhs_dilate
        met = (at >= 0) & (at <= (image - 1) * lhs_dilate) & (at % lhs_dilate == 0)
        total += int(met.sum())
    return total


# --- Collectives ---


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective; `sent` is bytes per chip and run, `group` how many chips take part.

    `beside` says whether the chip can compute meanwhile: it is a start and a done, or spread over
    fusions. What lies between is not asked.
    """

    name: str
    kind: str
    count: int
    group: int
    sent: int
    beside: bool


def collectives(module: Module) -> tuple[Collective, ...]:
    """Every collective of a program, those of ENTRY first; see `collective_bytes`."""
    found = []
    for name, count in repeats_in(module).counts.items():
        comp = module[name]
        for i in comp.instructions.values():
            if collective_kind(i) and not module.resumes(comp, i):
                kind = _true_kind(module, comp, i)
                group = _group_size(module, i)
                size = sum(leaf.bytes for leaf in leaves(i.shapes))
                beside = (i.opcode.endswith('-start') or comp.starts_async
                          or comp.name in module.asynchronous)
                found.append(
                    Collective(i.name, kind, count, group, _sent(kind, size, group), beside))
    return tuple(found)


def collective_bytes(module: Module) -> dict[str, int]:
    """Bytes that a chip sends to its neighbours in one run, by kind of collective.

    Estimated as if each collective ran over a ring of the n chips of its replica group, from
    the bytes (without tile padding) of the arrays that the chip puts in:

    - all-gather: output x (n - 1) / n, which is input x (n - 1);
    - reduce-scatter: input x (n - 1) / n;
    - all-reduce: 2 x input x (n - 1) / n, a reduce-scatter and an all-gather;
    - all-to-all: input x (n - 1) / n, though on a torus pieces travel over several links;
    - collective-permute: input, on a chip that is among the sources.

    An asynchronous pair counts once, as does the chain of fusions into which libtpu splits an
    all-gather. The fusion of an all-reduce and a slice of it, libtpu's reduce-scatter, counts
    as one. Where libtpu computes a product in steps ("collective matmul"), the all-gather or
    reduce-scatter appears as collective-permutes, of the same bytes in all. Kinds that do not
    occur are 0; other ways to communicate (send, broadcast, kernels) are not counted.
    """
    sums = dict.fromkeys(COLLECTIVES, 0)
    for c in collectives(module):
        sums[c.kind] += c.count * c.sent
    return sums


def waited_bytes(module: Module) -> int:
    """Those of `collective_bytes` that are sent in one go, while the chip waits."""
    return sum(c.count * c.sent for c in collectives(module) if not c.beside)


def _sent(kind: str, size: int, n: int) -> int:
    """Bytes of one run, for `size` bytes that the chip puts in; see `collective_bytes`."""
    if kind == 'collective-permute':
        return size
    if kind == 'all-gather':
        return size * (n - 1)
    return size * (n - 1) * (2 if kind == 'all-reduce' else 1) // n


def _true_kind(module: Module, comp: Computation, i: Instruction) -> str:
    """The kind; a reduce-scatter for an all-reduce in a fusion that only slices it."""
    users = lambda name: [user for user, _ in comp.users[name]]
    after = users(i.name)
    if isinstance(i.shape, tuple):
        after = [user for part in after for user in users(part.name)]
    sliced = all(user.opcode == 'dynamic-slice' for user in after)
    if collective_kind(i) == 'all-reduce' and comp.name in module.fused and after and sliced:
        return 'reduce-scatter'
    return collective_kind(i)


def _group_size(module: Module, i: Instruction) -> int:
    """Chips in a replica group, from any of the four spellings.

    ``{{0,1},{2,3}}``; ``[2,8]<=[16]``, two groups of eight; ``mesh['x'=2,'y'=4] {'y'}``, groups
    along y, or along a factor of it in ``{'y':(2)2}``; ``{}``, all. Where the mesh's devices are
    in another order, ``mesh['x'=2,'y'=4], device_ids=(...) {'y'}``, it stands in between.
    """
    text = i.attributes.get('replica_groups', '{}')
    if text.startswith('['):
        return int(text[1:text.index(']')].split(',')[-1])
    if text.startswith('mesh'):
        mesh, _, axes = text.partition(']')
        axes = axes or i.attributes['device_ids']
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh))
        used = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", axes[axes.rfind('{'):])
        return math.prod(int(factor or sizes[axis]) for axis, factor in used)
    first = re.match(r'\{\{([\d,\s]+)\}', text)
    return len(first[1].split(',')) if first else module.devices


# --- HBM traffic ---

_FREE = {'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all',
         'partition-id', 'replica-id', 'while', 'conditional', 'call', 'async-start',
         'async-update', 'opt-barrier', 'domain', 'add-dependency'}
_FREE_TARGETS = {'AllocateBuffer', 'ConcatBitcast', 'AssumeGatherIndicesInBound',
                 'AsyncCollectiveDone'}
_SLICES = {'dynamic-slice', 'slice', 'gather'}
_LAZY = {'bitcast', 'reshape', 'copy', 'transpose', 'convert'}  # in a fusion: element by element


def hbm_bytes(module: Module) -> int:
    """Bytes read from and written to HBM in one run, on one device: an estimate from above.

    All that instructions outside of fusions read and write, tile padding included; a fusion reads
    its operands and writes its outputs. Of an array that is only sliced or gathered from, the
    slice counts; of one that is updated in place, the update. Arrays in VMEM or host memory do
    not count (on CPU, all are in "HBM"). It is above the truth where a fusion needs only a part
    of what it is given in some other way, and below it where an operand does not fit into VMEM
    and is read again for each block (large products, attention kernels).
    """
    return _hbm(module, repeats_in(module))


def _hbm(module: Module, repeats: Repeats) -> int:
    return sum(count * sum(_traffic(module, i) for i in module[name].instructions.values())
               for name, count in repeats.counts.items() if name not in module.fused)


def _traffic(module: Module, i: Instruction) -> int:
    """Bytes that an instruction outside of a fusion reads and writes."""
    if i.opcode in _FREE or i.opcode.endswith('-done') or call_target(i) in _FREE_TARGETS:
        return 0
    if i.opcode == 'fusion':
        (name,) = i.names('calls')
        inner = module[name]
        read = sum(_read(module, inner, p.name, p.shape) for p in inner.parameters
                   if isinstance(p.shape, Shape))
        return read + _stored(module, inner, inner.root.name, i.shape)
    read = sum(_touched(i, index, leaf) for index, shape in enumerate(i.shapes)
               for leaf in leaves(shape))
    return read + _written(i, _result(i))


def _result(i: Instruction) -> Any:
    """Shapes that an instruction writes; not those that a `-start` hands on."""
    if not i.opcode.endswith('-start') or not isinstance(i.shape, tuple):
        return i.shape
    return i.shape[0] if i.opcode == 'copy-start' else (
        i.shape if i.opcode == 'all-reduce-start' else i.shape[1])


def _touched(i: Instruction, index: int, shape: Shape) -> int:
    """Bytes of operand `index`, an array of `shape`, that an instruction reads."""
    opcode = i.opcode.removesuffix('-start')
    if index == 0 and opcode in _SLICES:
        return shape.part(sum(leaf.elements for leaf in leaves(_result(i))))
    if index == 0 and opcode == 'dynamic-update-slice':
        return 0
    if opcode == 'scatter' and index < len(i.operands) // 2:
        return shape.part(i.shapes[-1].elements)
    return shape.hbm


def _written(i: Instruction, shape: Any) -> int:
    """Bytes of its result, of `shape`, that an instruction writes."""
    updates = {'dynamic-update-slice': 1, 'scatter': -1}
    if i.opcode in updates:
        elements = i.shapes[updates[i.opcode]].elements
        return sum(leaf.part(elements) for leaf in leaves(shape))
    return sum(leaf.hbm for leaf in leaves(shape))


def _read(module: Module, comp: Computation, name: str, shape: Shape) -> int:
    """Bytes of the array `name` (in a fusion, a parameter or a view of one) that are read."""
    total = sum(_use(module, comp, i, index, shape) for i, index in comp.users[name])
    return min(total, shape.hbm)


def _use(module: Module, comp: Computation, i: Instruction, index: int, shape: Shape) -> int:
    """Bytes of an array of `shape` that one instruction of a fusion reads as an operand."""
    if i.opcode == 'tuple' or call_target(i) in _FREE_TARGETS:
        return 0  # handed on as it is
    if collective_kind(i) and module.resumes(comp, i):
        return 0
    if i.opcode in _LAZY:
        return shape.hbm if i is comp.root else _read(module, comp, i.name, shape)
    if i.opcode == 'fusion':
        inner = module[i.names('calls')[0]]
        if _source(inner, inner.root.name) == inner.parameters[index].name:
            return _read(module, comp, i.name, shape)
        return _read(module, inner, inner.parameters[index].name, shape)
    in_place = i.opcode in ('dynamic-update-slice', 'scatter') and index == 0
    if in_place and not _only_stored(comp, i):
        return shape.hbm
    return _touched(i, index, shape)


def _source(comp: Computation, name: str) -> str:
    """The instruction that a chain of bitcasts starts from."""
    i = comp.instructions[name]
    return _source(comp, i.operands[0]) if i.opcode == 'bitcast' else name


def _only_stored(comp: Computation, i: Instruction) -> bool:
    """Whether a value goes to the fusion's output and nowhere else."""
    return all(user.opcode in ('tuple', 'bitcast') and _only_stored(comp, user)
               for user, _ in comp.users[i.name])


def _stored(module: Module, comp: Computation, name: str, shape: Any) -> int:
    """Bytes that a fusion writes for its value `name` into an output of `shape`."""
    i = comp.instructions[name]
    if i.opcode == 'tuple':
        return sum(_stored(module, comp, o, s) for o, s in zip(i.operands, shape))
    if i.opcode == 'parameter' or call_target(i) == 'AsyncCollectiveStart':
        return 0  # handed on; a chain's result is written where the chain ends
    if collective_kind(i) and module.resumes(comp, i):
        return 0
    if i.opcode == 'bitcast':
        return _stored(module, comp, i.operands[0], shape)
    if i.opcode == 'fusion' and isinstance(i.shape, Shape):
        inner = module[i.names('calls')[0]]
        return _stored(module, inner, inner.root.name, shape)
    in_place = i.opcode in ('dynamic-update-slice', 'scatter')
    if in_place and not _is_input(comp, i.operands[0]):
        return sum(leaf.hbm for leaf in leaves(shape))
    return _written(i, shape)


def _is_input(comp: Computation, name: str) -> bool:
    """Whether a value of a fusion is one of its operands, or a view of one."""
    return comp.instructions[_source(comp, name)].opcode == 'parameter'


# --- All of it ---


@dataclasses.dataclass(frozen=True)
class Summary:
    """Costs of one run of a program on one device; see the functions of the same names."""

    flops: int
    pallas: tuple[PallasCall, ...]
    collective_bytes: dict[str, int]
    waited_bytes: int
    hbm_bytes: int
    unknown_loops: tuple[str, ...]
    branches: dict[str, str]


def summary(text: str) -> Summary:
    """Costs of `compiled.as_text()`.

    Raises:
      HloError: text that cannot be read.
    """
    try:
        module = parse(text)
        repeats = repeats_in(module)
        return Summary(flops(module), pallas_calls(module), collective_bytes(module),
                       waited_bytes(module), hbm_bytes(module), tuple(repeats.unknown_loops),
                       repeats.branches)
    except (KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise HloError(f'HLO text in an unknown spelling: {error!r}') from error
