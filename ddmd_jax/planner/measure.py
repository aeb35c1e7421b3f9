"""One program compiled, and what that says of a chip: memory, products, traffic, least time."""

import math
import time
from typing import Any

from ddmd_jax.planner import chips, costs
from ddmd_jax.planner.programs import Program
from ddmd_jax.util import text

# The compiler's least effort takes a fifth of the time and comes to other temporaries: good enough
# to compare batches and levers, see search.py.
LEAST_EFFORT = -1.0


def measure(program: Program, chip: chips.Chip, effort: float = 0.0) -> dict[str, Any]:
    """Costs of one run on one chip; the keys are described in docs/scaling.md.

    A program that the compiler refuses for want of memory has `fits` False, its words as `error`.
    """
    start = time.monotonic()
    compiled = compiled_or_error(program, effort)
    seconds = time.monotonic() - start
    if isinstance(compiled, str):
        return {'fits': False, 'error': compiled, 'analytic_flops': program.analytic_flops,
                'compile_seconds': seconds}
    memory = compiled.memory_analysis()
    peak = peak_of(memory, program.beside)
    cost = costs.summary(compiled.as_text())
    least, bound = chips.roofline(
        chip, cost.flops, cost.hbm_bytes, sum(cost.collective_bytes.values()))
    return {'fits': peak <= chip.usable_bytes, 'argument_bytes': memory.argument_size_in_bytes,
            'output_bytes': memory.output_size_in_bytes, 'temp_bytes': memory.temp_size_in_bytes,
            'alias_bytes': memory.alias_size_in_bytes, 'peak_bytes': peak,
            'headroom_bytes': chip.usable_bytes - peak, 'flops': cost.flops,
            'analytic_flops': program.analytic_flops,
            'kernel_calls_without_flops': sum(
                call.count for call in cost.pallas if call.flops is None),
            'hbm_bytes': cost.hbm_bytes, 'collective_bytes': cost.collective_bytes,
            'waited_bytes': cost.waited_bytes,
            'roofline_seconds': least, 'bound_by': bound, 'rows': program.rows,
            'unknown_loops': list(cost.unknown_loops), 'compile_seconds': seconds}


def quick_peak(program: Program) -> float:
    """Peak bytes of a chip with the compiler's least effort; infinite where it refuses."""
    compiled = compiled_or_error(program, LEAST_EFFORT)
    if isinstance(compiled, str):
        return math.inf
    return peak_of(compiled.memory_analysis(), program.beside)


def peak_of(memory: Any, beside: int) -> int:
    """Resident arrays, outputs that replace no argument, and temporaries, in bytes."""
    return (beside + memory.output_size_in_bytes - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes)


def compiled_or_error(program: Program, effort: float = 0.0) -> Any:
    """The compiled program, or why it does not fit in the compiler's words.

    `effort` is the compiler's: 0 is the usual, -1 the least.
    """
    try:
        return program.lower().compile({'exec_time_optimization_effort': effort})
    except Exception as e:  # XLA's own kind is not public; out of memory is what is expected
        if 'RESOURCE_EXHAUSTED' not in str(e):
            raise
        return text.first_line(e)
