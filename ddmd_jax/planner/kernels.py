"""FLOPs of the Pallas kernels we know, from the shapes that a call of one has in HLO text.

A kernel's body is opaque there, and splash attention gives no estimate of what it does.
"""

import functools
import math
import re
from collections.abc import Callable

from ddmd_jax.planner.hlo import Instruction, Shape, leaves


def name(call: Instruction) -> str:
    """The kernel's, as given to `pallas_call`: of the instruction ``flash.clone.3``, `flash`."""
    return re.sub(r'(\.(\d+|clone))+$', '', call.name)


def flops(call: Instruction) -> int | None:
    """FLOPs of one run, two for each multiply-add of its matrix products.

    Returns:
      None for a kernel that is not in the table, or has operands that it should not have.
    """
    kernel = name(call)
    count = next((fn for prefix, fn in _KERNELS.items() if kernel.startswith(prefix)), None)
    return count and count(tuple(leaves(call.shapes)), tuple(leaves(call.shape)))


# --- Splash attention (jax.experimental.pallas.ops.tpu.splash_attention) ---

Shapes = tuple[Shape, ...]


def _splash(operands: Shapes, results: Shapes, *, qk: int, v: int) -> int | None:
    """FLOPs of `qk` products over the channels of queries and keys, `v` over those of values.

    Of every query with every key that the call is given, those that fill up a block among them.
    That is what the kernel does where nothing but ids of segments hides keys, as in
    models/attention.py; under a mask that lets it leave out blocks it would be too much.
    Channels are counted as they are, not as they lie in registers.
    """
    # q ``[..., H, S, D]``, k and v stand behind tables of integers, two or three of them. `...`
    # is the batch of a vmap, if above one; k and v have no H where all heads share one (mqa).
    floats = [shape.dims for shape in operands if re.match(r'b?f\d', shape.dtype)]
    if len(floats) < 3 or min(map(len, floats[:3])) < 2:
        return None
    queries, keys, values = floats[:3]
    if queries[-1] != keys[-1] or keys[:-1] != values[:-1]:
        return None  # channels before tokens, the kernel's other layout
    # A fused backward kernel has one more product, gradients of the queries: a set of them for
    # each block of keys, so that this result has an axis more than they.
    qk += any(len(shape.dims) > len(queries) for shape in results)
    return 2 * math.prod(queries[:-1]) * keys[-2] * (qk * keys[-1] + v * values[-1])


_PHASES = {
    'fwd': functools.partial(_splash, qk=1, v=1),  # scores; output
    'dq': functools.partial(_splash, qk=2, v=1),  # scores, dq; dp
    'dkv': functools.partial(_splash, qk=2, v=2),  # scores, dk; dp, dv
}
_KERNELS: dict[str, Callable[[Shapes, Shapes], int | None]] = {
    f'splash_{heads}_{phase}_': fn for heads in ('mha', 'mqa') for phase, fn in _PHASES.items()}
