"""How often each computation of a program runs.

XLA's own cost analysis counts the body of a loop once, so a model of scanned layers seems to
have one layer. Here each computation is weighted with the loops around it.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

from ddmd_jax.planner.hlo import Computation, HloError, Instruction, Module, Shape, bits

MAX_TRIPS = 100_000  # a loop that is still running after so many is reported as unknown


@dataclasses.dataclass
class Repeats:
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

    def add(self, other: Repeats, times: int) -> None:
        for name, count in other.counts.items():
            self.counts[name] += count * times
        self.unknown_loops += [n for n in other.unknown_loops if n not in self.unknown_loops]
        self.branches |= other.branches


# What a part of a program costs, given how often its computations run; compared by max().
Cost = Callable[[Module, Repeats], Any]


def count_repeats(module: Module, cost: Cost) -> Repeats:
    """How often each computation runs, from ENTRY through fusions, calls, loops and conditionals.

    Of a conditional's branches the one of the highest `cost` counts.

    A loop's trip count is its `known_trip_count` if the backend gives one (CPU does, TPU does
    not); otherwise the loop's scalars are stepped from their first values to the condition's
    end, which works for any counter that is a function of constants.
    """
    return _walk(module, module.entry, [], cost)


def _walk(module: Module, comp: Computation, args: list[Any], cost: Cost) -> Repeats:
    """The same for `comp` and what it calls, in one run of it with these parameters."""
    repeats = Repeats(collections.Counter({comp.name: 1}))
    scope = _Scope(module, comp, args)
    for i in comp.instructions.values():
        if i.opcode == 'while':
            _walk_loop(repeats, scope, i, cost)
        elif i.opcode == 'conditional':
            _walk_conditional(repeats, scope, i, cost)
        elif i.opcode in ('fusion', 'call', 'async-start', 'custom-call'):
            # Not `to_apply` of a reduction: its scalar function has no cost worth counting.
            names = i.names('calls') + i.names('called_computations')
            names += i.names('to_apply') if i.opcode == 'call' else []
            values = [scope.value(o) for o in i.operands] if names else []
            for name in names:
                repeats.add(_walk(module, module[name], values, cost), 1)
    return repeats


def _walk_loop(repeats: Repeats, scope: _Scope, loop: Instruction, cost: Cost) -> None:
    """Adds a loop's body and condition."""
    module = scope.module
    (body,), (condition,) = loop.names('body'), loop.names('condition')
    state = scope.value(loop.operands[0])
    trips = _trips(module, loop, state)
    if trips is None:
        repeats.unknown_loops.append(loop.name)
        trips = 1
    # Inside, only what the body hands on unchanged is known: the bounds of nested loops.
    kept = [_unchanged(module[body], state)]
    repeats.add(_walk(module, module[body], kept, cost), trips)
    repeats.add(_walk(module, module[condition], kept, cost), trips + 1)


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


def _walk_conditional(repeats: Repeats, scope: _Scope, i: Instruction, cost: Cost) -> None:
    """Adds the branch of the highest cost."""
    module = scope.module
    names = (i.names('branch_computations')
             or i.names('true_computation') + i.names('false_computation'))
    walked = {name: _walk(module, module[name], [scope.value(operand)], cost)
              for name, operand in zip(names, i.operands[1:])}
    if not walked:
        raise HloError(f'conditional {i.name} names no branches')
    worst = max(walked, key=lambda name: cost(module, walked[name]))
    repeats.add(walked[worst], 1)
    repeats.branches[i.name] = worst


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
_SCALAR: dict[str, Any] = {'add': int.__add__, 'subtract': int.__sub__, 'multiply': int.__mul__,
           'minimum': min, 'maximum': max, 'and': int.__and__, 'or': int.__or__}


class _Scope:
    """Values of one run of a computation, as far as they are integers known beforehand.

    A value is an int, a tuple of values, or None if it is not known.
    """

    def __init__(self, module: Module, comp: Computation, args: list[Any]):
        self.module, self.comp, self.args = module, comp, args
        self.known: dict[str, Any] = {}

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
    width = bits(shape.dtype)
    value &= (1 << width) - 1
    return value - (1 << width) if shape.dtype[0] == 's' and value >> (width - 1) else value
