"""Reads the optimised HLO text of a compiled program, of the TPU or CPU backend.

    text --parse--> Module --count_repeats--> Repeats --costs--> flops, collectives, ... Summary

All shapes are those of one device: a partitioned program's text has a device's part. Read in
the text of libtpu 0.0.42.1 and jaxlib 0.10.2; what the format leaves open is said at each
function.
"""

import collections
import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')


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
        return -(-self.elements * bits(self.dtype) // 8)

    @property
    def hbm(self) -> int:
        """Bytes in HBM, padded to whole tiles; none for an array that lives elsewhere."""
        if self.space:
            return 0
        dims = [self.dims[d] for d in reversed(self.order)] if self.order else list(self.dims)
        dims = [1] * (len(self.tile) - len(dims)) + dims
        for i, tile in enumerate(reversed(self.tile), 1):
            dims[-i] = -(-dims[-i] // tile) * tile
        return -(-math.prod(dims) * bits(self.dtype) // 8)

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
        return any(call_target(i) == 'AsyncCollectiveStart' for i in self.instructions.values())


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
    def fused(self) -> set[str]:
        """Computations of fusions: what passes between their instructions touches no memory."""
        return {name for c in self.computations.values() for i in c.instructions.values()
                if i.opcode == 'fusion' for name in i.names('calls')}

    @functools.cached_property
    def asynchronous(self) -> set[str]:
        """Computations that an ``async-start`` carries out while others run."""
        return {name for c in self.computations.values() for i in c.instructions.values()
                if i.opcode == 'async-start' for name in i.names('calls')}

    @functools.cached_property
    def started(self) -> set[tuple[str, str | None]]:
        """Kind and channel of each collective that a chain of fusions carries out."""
        return {(i.opcode, i.attributes.get('channel_id')) for c in self.computations.values()
                if c.starts_async for i in c.instructions.values() if collective_kind(i)}

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


def bits(dtype: str) -> int:
    """Bits of an element; tokens have none."""
    if dtype in ('token', 'opaque'):
        return 0
    width = re.match(r'[a-z]+(\d+)', dtype)
    return 8 if width is None else int(width[1])  # pred is the one without a number


def call_target(instruction: Instruction) -> str:
    return instruction.attributes.get('custom_call_target', '').strip('"')


def collective_kind(instruction: Instruction) -> str | None:
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
    header, depth = None, 0
    statements: list[str] = []
    pending: list[str] = []
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
