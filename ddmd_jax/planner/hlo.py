"""Reads a compiled program's costs from its optimised HLO text, of the TPU or CPU backend.

XLA's own cost analysis counts the body of a loop once, so a model of scanned layers seems to
have one. Here each computation is weighted with how often it runs. All figures are those of
one device: the text of a partitioned program has the shapes of a device's part.

    text --parse--> Module --run_counts--> Runs --> flops, collectives, hbm_bytes --> Summary

Read in the text of libtpu 0.0.42.1 and jaxlib 0.10.2; what the format leaves open, and what an
estimate leaves out, is said at each function.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
MAX_TRIPS = 100_000  # a loop that is still running after so many is reported as unknown


class HloError(ValueError):
    """Text that is not optimised HLO, or not in a spelling that this module knows."""


# --- What the text says ---


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array, as in ``bf16[256,512]{1,0:T(8,128)(2,1)S(1)}``.

    Attributes:
      dtype, dims: `bf16`, (256, 512).
      order: dimensions from minor to major, (1, 0).
      tile: outermost tile, (8, 128): TPU pads the most minor dimensions to multiples of it.
      space: memory, 1 in `S(1)`. 0 is HBM; on TPU 1 is on-chip VMEM and 5 the host's memory.
    """

    dtype: str
    dims: tuple[int, ...]
    order: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    space: int = 0

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Without padding: what a collective sends."""
        return -(-self.elements * _bits(self.dtype) // 8)

    @property
    def hbm(self) -> int:
        """Bytes in HBM, padded to whole tiles; none for an array that lives elsewhere."""
        if self.space:
            return 0
        dims = [self.dims[d] for d in reversed(self.order)] if self.order else list(self.dims)
        dims = [1] * (len(self.tile) - len(dims)) + dims
        for i, tile in enumerate(reversed(self.tile), 1):
            dims[-i] = -(-dims[-i] // tile) * tile
        return -(-math.prod(dims) * _bits(self.dtype) // 8)

    def part(self, elements: int) -> int:
        """HBM bytes of so many of its elements."""
        return self.hbm * min(elements, self.elements) // max(self.elements, 1)


@dataclasses.dataclass(eq=False)
class Instruction:
    """One line of a computation.

    Attributes:
      name, opcode: without `%`.
      shape: of the result; a (nested) tuple of `Shape` for a tuple.
      operands: names of instructions of the same computation.
      shapes: shapes of the operands.
      literal: what stands in the brackets: a constant's value, a parameter's number.
      attributes: text behind each `key=`, as it stands.
    """

    name: str
    opcode: str
    shape: Any
    operands: tuple[str, ...]
    shapes: tuple[Any, ...]
    literal: str
    attributes: Mapping[str, str]

    def names(self, key: str) -> list[str]:
        """Computations that an attribute names: ``%a`` or ``{%a, %b}``."""
        listed = self.attributes.get(key, '').strip('{}')
        return [name.strip().lstrip('%') for name in listed.split(',') if name.strip()]

    def dims(self, key: str) -> list[int]:
        """Numbers of an attribute like ``{0,1}``."""
        return [int(n) for n in re.findall(r'\d+', self.attributes.get(key, ''))]

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """`backend_config`, where it is JSON."""
        try:
            config = json.loads(self.attributes.get('backend_config', '{}'))
        except json.JSONDecodeError:
            return {}
        return config if isinstance(config, dict) else {}


@dataclasses.dataclass(eq=False)
class Computation:
    """Instructions by name, in the order of the text, which for a scheduled module is time."""

    name: str
    instructions: dict[str, Instruction]
    root: Instruction

    @functools.cached_property
    def parameters(self) -> list[Instruction]:
        found = [i for i in self.instructions.values() if i.opcode == 'parameter']
        return sorted(found, key=lambda i: int(i.literal))

    @functools.cached_property
    def users(self) -> dict[str, list[tuple[Instruction, int]]]:
        """Who uses each instruction, and as which operand."""
        users = collections.defaultdict(list)
        for instruction in self.instructions.values():
            for index, operand in enumerate(instruction.operands):
                users[operand].append((instruction, index))
        return users

    @functools.cached_property
    def starts_async(self) -> bool:
        """Whether it is the first of a chain of TPU fusions that carry out one collective."""
        return any(_target(i) == 'AsyncCollectiveStart' for i in self.instructions.values())

    @functools.cached_property
    def flops(self) -> int:
        """Of its own instructions, run once."""
        return sum(_instruction_flops(i) for i in self.instructions.values())


@dataclasses.dataclass(eq=False)
class Module:
    """A parsed program; `devices` is how many it was partitioned and replicated for."""

    name: str
    devices: int
    entry: Computation
    computations: dict[str, Computation]

    def __getitem__(self, name: str) -> Computation:
        if name not in self.computations:
            raise HloError(f'computation {name} is called but not in the text')
        return self.computations[name]

    @functools.cached_property
    def runs(self) -> Runs:
        return run_counts(self)

    @functools.cached_property
    def fused(self) -> set[str]:
        """Computations of fusions: what passes between their instructions touches no memory."""
        return {name for c in self.computations.values() for i in c.instructions.values()
                if i.opcode == 'fusion' for name in i.names('calls')}

    @functools.cached_property
    def started(self) -> set[tuple[str, str | None]]:
        """Kind and channel of each collective that a chain of fusions carries out."""
        return {(i.opcode, i.attributes.get('channel_id')) for c in self.computations.values()
                if c.starts_async for i in c.instructions.values() if _kind(i)}

    def resumes(self, comp: Computation, instruction: Instruction) -> bool:
        """Whether this is a later step of a collective that another fusion has started.

        libtpu spreads a collective over the fusions that run meanwhile. Each of them repeats
        the whole instruction, with the same channel; only the first has `AsyncCollectiveStart`.
        """
        key = (instruction.opcode, instruction.attributes.get('channel_id'))
        return comp.name in self.fused and not comp.starts_async and key in self.started


def leaves(shape: Any) -> list[Shape]:
    """Arrays of a shape that may be a tuple."""
    return [leaf for s in shape for leaf in leaves(s)] if isinstance(shape, tuple) else [shape]


def _bits(dtype: str) -> int:
    """Bits of an element; tokens have none."""
    if dtype in ('token', 'opaque'):
        return 0
    width = re.match(r'[a-z]+(\d+)', dtype)
    return 8 if width is None else int(width[1])  # pred is the one without a number


def _target(instruction: Instruction) -> str:
    return instruction.attributes.get('custom_call_target', '').strip('"')


def _kind(instruction: Instruction) -> str | None:
    """Which collective it is; the `-done` half of a pair is none."""
    base = instruction.opcode.removesuffix('-start')
    return base if base in COLLECTIVES else None


# --- Parsing ---

# Strings are skipped as a whole: a kernel's backend_config may hold any bracket.
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[][(){},]')
_DEPTH = {'(': 1, '{': 1, '[': 1, ')': -1, '}': -1, ']': -1}
_SHAPE = re.compile(r'([a-z]\w*)\[([^]]*)\](?:\{([^{}]*)\})?')
_HEADER = re.compile(r'(ENTRY\s+)?%?([^\s(%]+)\s*(\(.*->.*)?\{\s*$')
_STATEMENT = re.compile(r'\s*(ROOT\s+)?%?([^\s=%]+)\s*=\s*')
_COMMENT = re.compile(r'/\*index=\d+\*/')


def parse(text: str) -> Module:
    """Module of `compiled.as_text()`.

    Raises:
      HloError: no module, no single ENTRY, a line that cannot be read, an unknown operand.
    """
    head = re.search(r'^HloModule\s+([^\s,]+)(.*)$', text, re.MULTILINE)
    if head is None:
        raise HloError('not HLO text: no line starts with HloModule')
    counts = re.findall(r'(?:num_partitions|replica_count)=(\d+)', head[2])
    computations, entries = {}, []
    for header, statements in _blocks(text[head.end():].splitlines()):
        computation = _computation(header[2], statements)
        computations[computation.name] = computation
        entries += [computation] if header[1] else []
    if len(entries) != 1:
        raise HloError(f'module {head[1]} has {len(entries)} ENTRY computations instead of one')
    return Module(head[1], math.prod(map(int, counts)), entries[0], computations)


def _blocks(lines: list[str]) -> Iterator[tuple[re.Match, list[str]]]:
    """``(header, statements)`` of each computation; tables of source lines are passed over."""
    header, statements, pending, depth = None, [], [], 0
    for line in lines:
        if header is None:
            header, statements = _HEADER.match(line), []
            continue
        if not pending and line.strip() == '}':
            yield header, statements
            header = None
            continue
        # A statement ends where its brackets close: metadata of kernels holds line breaks.
        depth += sum(_DEPTH.get(token, 0) for token in _TOKEN.findall(line))
        pending.append(line)
        if depth == 0:
            statements += [' '.join(pending)] if line.strip() else []
            pending = []
    if header is not None:
        raise HloError(f'the text ends within computation {header[2]}')


def _computation(name: str, statements: list[str]) -> Computation:
    parsed = [_statement(s) for s in statements]
    instructions = {i.name: i for _, i in parsed}
    roots = [i for is_root, i in parsed if is_root] or [i for _, i in parsed[-1:]]
    if not roots:
        raise HloError(f'computation {name} is empty')
    for instruction in instructions.values():
        unknown = [o for o in instruction.operands if o not in instructions]
        if unknown:
            raise HloError(f'{instruction.name} in {name}: operand {unknown[0]} is not defined')
        instruction.shapes = tuple(instructions[o].shape for o in instruction.operands)
    return Computation(name, instructions, roots[0])


def _statement(text: str) -> tuple[bool, Instruction]:
    """Whether it is the root, and ``%name = shape opcode(operands), key=value, ...``."""
    text = _COMMENT.sub('', text)
    head = _STATEMENT.match(text)
    if head is None:
        raise HloError(f'not an instruction: {text.strip()[:80]!r}')
    shape, end = _shape(text, head.end())
    opcode = re.compile(r'\s*([\w-]+)\(').match(text, end)
    if opcode is None:
        raise HloError(f'{head[2]}: no opcode behind its shape in {text.strip()[:80]!r}')
    close = _close(text, opcode.end() - 1)
    literal = text[opcode.end():close].strip()
    plain = opcode[1] in ('parameter', 'constant') or not literal
    # The name is the last word; older printers put the operand's shape before it.
    operands = () if plain else tuple(o.split()[-1].lstrip('%') for o in _split(literal))
    pairs = (part.partition('=') for part in _split(text[close + 1:]))
    attributes = {key.strip(): value.strip() for key, _, value in pairs}
    return bool(head[1]), Instruction(head[2], opcode[1], shape, operands, (), literal, attributes)


def _shape(text: str, start: int) -> tuple[Any, int]:
    """Shape that begins at `start`, and where it ends."""
    if text.startswith('(', start):
        close = _close(text, start)
        return tuple(_shape(s, 0)[0] for s in _split(text[start + 1:close])), close + 1
    found = _SHAPE.match(text, start)
    if found is None:
        raise HloError(f'not a shape: {text[start:start + 40]!r}')
    order, _, rest = (found[3] or '').partition(':')
    ints = lambda listed: tuple(int(n) for n in re.findall(r'\d+', listed))
    tile, space = re.search(r'T\(([\d,]+)\)', rest), re.search(r'S\((\d+)\)', rest)
    return Shape(found[1], ints(found[2]), ints(order), ints(tile[1]) if tile else (),
                 int(space[1]) if space else 0), found.end()


def _close(text: str, start: int) -> int:
    """Where the bracket that opens at `start` closes."""
    depth = 0
    for token in _TOKEN.finditer(text, start):
        depth += _DEPTH.get(token[0], 0)
        if depth == 0:
            return token.start()
    raise HloError(f'a bracket does not close in {text.strip()[:80]!r}')


def _split(text: str) -> list[str]:
    """Parts between the commas that stand outside of brackets and strings; none is empty."""
    parts, depth, start = [], 0, 0
    for token in _TOKEN.finditer(text):
        depth += _DEPTH.get(token[0], 0)
        if token[0] == ',' and depth == 0:
            parts.append(text[start:token.start()].strip())
            start = token.end()
    return [part for part in [*parts, text[start:].strip()] if part]


# --- How often each computation runs ---


@dataclasses.dataclass
class Runs:
    """How often computations run in one run of the program.

    Attributes:
      counts: by name; a computation that does not appear does not run, or is the scalar
        function of a reduction, a sort or the like.
      unknown_loops: `while` instructions whose trip count was not found; counted as one trip.
      branches: of each `conditional`, the branch that was counted: the most expensive one.
    """

    counts: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    unknown_loops: list[str] = dataclasses.field(default_factory=list)
    branches: dict[str, str] = dataclasses.field(default_factory=dict)

    def add(self, other: Runs, times: int) -> None:
        for name, count in other.counts.items():
            self.counts[name] += count * times
        self.unknown_loops += [n for n in other.unknown_loops if n not in self.unknown_loops]
        self.branches |= other.branches


def run_counts(module: Module) -> Runs:
    """Runs of every computation, from ENTRY through fusions, calls, loops and conditionals.

    A loop's trip count is its `known_trip_count` if the backend gives one (CPU does, TPU does
    not); otherwise the loop's scalars are stepped from their first values to the condition's
    end, which works for any counter that is a function of constants.
    """
    return _walk(module, module.entry, [])


def _walk(module: Module, comp: Computation, args: list[Any]) -> Runs:
    """Runs of `comp` and what it calls, for one run of it with these parameters."""
    runs = Runs(collections.Counter({comp.name: 1}))
    scope = _Scope(module, comp, args)
    for i in comp.instructions.values():
        if i.opcode == 'while':
            _walk_loop(runs, scope, i)
        elif i.opcode == 'conditional':
            _walk_conditional(runs, scope, i)
        elif i.opcode in ('fusion', 'call', 'async-start', 'custom-call'):
            # Not `to_apply` of a reduction: its scalar function has no cost worth counting.
            names = i.names('calls') + i.names('called_computations')
            names += i.names('to_apply') if i.opcode == 'call' else []
            values = [scope.value(o) for o in i.operands] if names else []
            for name in names:
                runs.add(_walk(module, module[name], values), 1)
    return runs


def _walk_loop(runs: Runs, scope: _Scope, loop: Instruction) -> None:
    """Adds a loop's body and condition."""
    module = scope.module
    (body,), (condition,) = loop.names('body'), loop.names('condition')
    state = scope.value(loop.operands[0])
    trips = _trips(module, loop, state)
    if trips is None:
        runs.unknown_loops.append(loop.name)
        trips = 1
    # Inside, only what the body hands on unchanged is known: the bounds of nested loops.
    kept = [_unchanged(module[body], state)]
    runs.add(_walk(module, module[body], kept), trips)
    runs.add(_walk(module, module[condition], kept), trips + 1)


def _unchanged(body: Computation, state: Any) -> Any:
    """A loop's state with None for what its body may change."""
    if not isinstance(state, tuple) or body.root.opcode != 'tuple':
        return None

    def same(index: int, name: str) -> bool:
        i = body.instructions[name]
        return (i.opcode == 'get-tuple-element' and i.operands[0] == body.parameters[0].name
                and i.dims('index') == [index])

    return tuple(value if same(index, name) else None
                 for index, (value, name) in enumerate(zip(state, body.root.operands)))


def _walk_conditional(runs: Runs, scope: _Scope, i: Instruction) -> None:
    """Adds the branch with the most FLOPs; of equals, the one with the most HBM traffic."""
    module = scope.module
    names = (i.names('branch_computations')
             or i.names('true_computation') + i.names('false_computation'))
    walked = {name: _walk(module, module[name], [scope.value(operand)])
              for name, operand in zip(names, i.operands[1:])}
    if not walked:
        raise HloError(f'conditional {i.name} names no branches')
    cost = lambda name: (_flops(module, walked[name]), _hbm(module, walked[name]))
    worst = max(walked, key=cost)
    runs.add(walked[worst], 1)
    runs.branches[i.name] = worst


def _trips(module: Module, loop: Instruction, state: Any) -> int | None:
    """Trip count of a `while`, or None."""
    known = loop.config.get('known_trip_count')
    if known:
        return int(known['n'])
    (body,), (condition,) = loop.names('body'), loop.names('condition')
    for trip in range(MAX_TRIPS):
        goes_on = _Scope(module, module[condition], [state]).root()
        if goes_on is None:
            return None
        if not goes_on:
            return trip
        state = _Scope(module, module[body], [state]).root()
    return None


_COMPARE = {'LT': int.__lt__, 'LE': int.__le__, 'GT': int.__gt__, 'GE': int.__ge__,
            'EQ': int.__eq__, 'NE': int.__ne__}
_SCALAR = {'add': int.__add__, 'subtract': int.__sub__, 'multiply': int.__mul__,
           'minimum': min, 'maximum': max, 'and': int.__and__, 'or': int.__or__}


class _Scope:
    """Values of one run of a computation, as far as they are integers known beforehand.

    A value is an int, a tuple of values, or None if it is not known.
    """

    def __init__(self, module: Module, comp: Computation, args: list[Any]):
        self.module, self.comp, self.args, self.known = module, comp, args, {}

    def root(self) -> Any:
        return self.value(self.comp.root.name)

    def value(self, name: str) -> Any:
        if name not in self.known:
            i = self.comp.instructions[name]
            self.known[name] = self._value(i)
        return self.known[name]

    def _value(self, i: Instruction) -> Any:
        if isinstance(i.shape, Shape) and not _is_integer(i.shape):
            return None  # neither a counter nor a tuple that may hold one
        if i.opcode == 'constant':
            known = {'true': 1, 'false': 0}
            return known[i.literal] if i.literal in known else int(i.literal)
        if i.opcode == 'parameter':
            return self.args[int(i.literal)] if int(i.literal) < len(self.args) else None
        if i.opcode == 'tuple':
            return tuple(self.value(o) for o in i.operands)
        if i.opcode in ('fusion', 'call'):
            (name,) = i.names('calls') or i.names('to_apply')
            return _Scope(self.module, self.module[name],
                          [self.value(o) for o in i.operands]).root()
        values = [self.value(o) for o in i.operands]
        if not values or values[0] is None:
            return None
        if i.opcode == 'get-tuple-element':
            return values[0][i.dims('index')[0]]
        if i.opcode == 'copy-start':
            return (values[0], values[0], None)
        if i.opcode == 'copy-done':
            return values[0][0]
        if i.opcode in ('copy', 'bitcast', 'reshape', 'convert'):
            return _wrap(values[0], i.shape)
        if None in values:
            return None
        if i.opcode == 'compare':
            return int(_COMPARE[i.attributes['direction']](*values))
        if i.opcode == 'not' and i.shape.dtype == 'pred':
            return 1 - values[0]
        return _wrap(_SCALAR[i.opcode](*values), i.shape) if i.opcode in _SCALAR else None


def _is_integer(shape: Shape) -> bool:
    return not shape.dims and (shape.dtype == 'pred' or shape.dtype[0] in 'su')


def _wrap(value: Any, shape: Any) -> Any:
    """An integer in the range of its type, wrapped around as the machine does."""
    if not isinstance(value, int) or shape.dtype == 'pred':
        return value
    bits = _bits(shape.dtype)
    value &= (1 << bits) - 1
    return value - (1 << bits) if shape.dtype[0] == 's' and value >> (bits - 1) else value


# --- FLOPs ---


@dataclasses.dataclass(frozen=True)
class PallasCall:
    """One call of a Pallas kernel.

    Attributes:
      name: the kernel's, as given to `pallas_call`.
      count: runs of it in one run of the program.
      flops: of one run, from the kernel's `cost_estimate`; None if it has none.
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
    the products). A Pallas kernel counts with its own estimate, and as nothing if it has none:
    see `pallas_calls`. Elementwise arithmetic, reductions, FFT and decompositions do not count,
    nor does a product of matrix and vector where XLA has turned it into a reduction. A product
    counts once whatever its precision, though TPU takes several passes for more than bf16.
    """
    return _flops(module, module.runs)


def pallas_calls(module: Module) -> tuple[PallasCall, ...]:
    """Every call of a Pallas kernel on TPU, those of ENTRY first."""
    found = []
    for name, count in module.runs.counts.items():
        for i in module[name].instructions.values():
            if _target(i) == 'tpu_custom_call':
                kernel = re.sub(r'(\.(\d+|clone))+$', '', i.name)
                found.append(PallasCall(kernel, count, _estimate(i), tuple(leaves(i.shapes)),
                                        tuple(leaves(i.shape))))
    return tuple(found)


def _flops(module: Module, runs: Runs) -> int:
    return sum(count * module[name].flops for name, count in runs.counts.items())


def _instruction_flops(i: Instruction) -> int:
    if i.opcode == 'dot':
        sizes = [i.shapes[0].dims[d] for d in i.dims('lhs_contracting_dims')]
        return 2 * i.shape.elements * math.prod(sizes)
    if i.opcode == 'convolution':
        return 2 * _multiplications(i)
    if _target(i) == 'tpu_custom_call':
        return _estimate(i) or 0
    return 0


def _estimate(i: Instruction) -> int | None:
    """FLOPs of a kernel's `cost_estimate`."""
    estimate = i.config.get('custom_call_config', {}).get('cost_estimate', {})
    return int(estimate['flops']) if 'flops' in estimate else None


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
    """One collective; `sent` is bytes per chip and run, `group` how many chips take part."""

    name: str
    kind: str
    count: int
    group: int
    sent: int


def collectives(module: Module) -> tuple[Collective, ...]:
    """Every collective of a program, those of ENTRY first; see `collective_bytes`."""
    found = []
    for name, count in module.runs.counts.items():
        comp = module[name]
        for i in comp.instructions.values():
            if _kind(i) and not module.resumes(comp, i):
                kind = _true_kind(module, comp, i)
                group = _group_size(module, i)
                size = sum(leaf.bytes for leaf in leaves(i.shapes))
                found.append(Collective(i.name, kind, count, group, _sent(kind, size, group)))
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
    if _kind(i) == 'all-reduce' and comp.name in module.fused and after and sliced:
        return 'reduce-scatter'
    return _kind(i)


def _group_size(module: Module, i: Instruction) -> int:
    """Chips in a replica group, from any of the four spellings.

    ``{{0,1},{2,3}}``; ``[2,8]<=[16]``, two groups of eight; ``mesh['x'=2,'y'=4] {'y'}``, groups
    along y, or along a factor of it in ``{'y':(2)2}``; ``{}``, all.
    """
    text = i.attributes.get('replica_groups', '{}')
    if text.startswith('['):
        return int(re.match(r'\[([\d,]+)\]', text)[1].split(',')[-1])
    if text.startswith('mesh'):
        mesh, axes = text.split(']', 1)
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

    What instructions outside of fusions read and write, tile padding included; a fusion reads
    its operands and writes its outputs. Of an array that is only sliced or gathered from, the
    slice counts; of one that is updated in place, the update. Arrays in VMEM or host memory do
    not count (on CPU, all are in "HBM"). It is above the truth where a fusion needs only a part
    of what it is given in some other way, and below it where an operand does not fit into VMEM
    and is read again for each block (large products, attention kernels).
    """
    return _hbm(module, module.runs)


def _hbm(module: Module, runs: Runs) -> int:
    return sum(count * sum(_traffic(module, i) for i in module[name].instructions.values())
               for name, count in runs.counts.items() if name not in module.fused)


def _traffic(module: Module, i: Instruction) -> int:
    """Bytes that an instruction outside of a fusion reads and writes."""
    if i.opcode in _FREE or i.opcode.endswith('-done') or _target(i) in _FREE_TARGETS:
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
    """What an instruction writes: of a `-start`, not the operands and marks that it hands on."""
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
    if i.opcode == 'tuple' or _target(i) in _FREE_TARGETS:
        return 0  # handed on as it is
    if _kind(i) and module.resumes(comp, i):
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
    """What a chain of bitcasts starts from."""
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
    if i.opcode == 'parameter' or _target(i) == 'AsyncCollectiveStart':
        return 0  # handed on; a chain's result is written where the chain ends
    if _kind(i) and module.resumes(comp, i):
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
        return _summary(module)
    except (KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise HloError(f'HLO text in an unknown spelling: {error!r}') from error


def _summary(module: Module) -> Summary:
    return Summary(flops(module), pallas_calls(module), collective_bytes(module),
                   hbm_bytes(module), tuple(module.runs.unknown_loops), module.runs.branches)
