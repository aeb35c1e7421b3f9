"""Compiles a distillation's two steps for a TPU topology, without a TPU and without weights."""

from __future__ import annotations

import math
import os
import time
from typing import Any

import jax
import jax.numpy as jnp

from ddmd_jax import sharding, teachers
from ddmd_jax.planner import chips, costs
from ddmd_jax.train import distill


class PlanError(RuntimeError):
    """A topology that cannot be compiled for."""


def topology(name: str) -> Any:
    """The devices of a TPU topology such as ``v5e:4x4``; needs libtpu, not a TPU.

    Raises:
      PlanError: unknown topology, or no libtpu.
    """
    from jax.experimental import topologies

    # libtpu would look for a TPU's metadata, and for the lock that a program on one holds.
    os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
    os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
    more = {'chip_config_name': 'megacore'} if name.startswith('v4') else {}
    try:
        return topologies.get_topology_desc(platform='tpu', topology_name=name, **more).devices
    except Exception as e:  # a missing library and a misspelt name come as many kinds
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise PlanError(f'no topology {name!r} ({reason}); write it as v5e:4x4, and install the '
                        'TPU compiler with `pip install "jax[tpu]"`') from e


def bytes_per_device(tree: Any, shardings: Any) -> int:
    """What one device holds of a tree of shapes."""
    part = lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize
    return sum(jax.tree.leaves(jax.tree.map(part, tree, shardings)))


def report(config: Any, teacher: teachers.Teacher, mesh: Any, name: str,
           tokens: int) -> dict[str, Any]:
    """Costs per chip of the generator's and the critic's step on the topology `name`.

    Args:
      config: of a distillation.
      teacher: with shapes or arrays as parameters.
      mesh: over the topology's devices.
      name: of the topology, for the chip's figures.
      tokens: length of a caption.

    Returns:
      ``{'topology', 'chips', 'hbm_bytes_per_chip', 'global_batch', 'resident_bytes',
      'programs'}``; `resident_bytes` is all that stays on a chip between the steps (student,
      critic, EMA, both optimisers, teacher). Of a program, `peak_bytes` is that and the batch,
      what its outputs need beyond the arguments they replace, and its temporaries; a program
      that the compiler refuses has `fits` False and its words as `error`.
    """
    chip = chips.chip_for(name)
    cond = lambda rows: {
        'embeds': jax.ShapeDtypeStruct((rows, tokens, teacher.cond_width), jnp.float16),
        'mask': jax.ShapeDtypeStruct((rows, tokens), bool)}
    p = distill.plan(config, teacher, cond(1), mesh)
    frozen = {'teacher': jax.eval_shape(lambda: teacher.params), 'null': cond(1)}
    batch = cond(config.data.global_batch)
    resident = (bytes_per_device(p.state, p.state_shardings)
                + bytes_per_device(frozen, p.frozen_shardings))
    rows = jax.tree.map(lambda _: sharding.batch_sharding(mesh), batch)
    beside = resident + bytes_per_device(batch, rows)
    lowered = {'generator_step': lambda: p.steps.generator.lower(p.state, frozen, batch),
               'critic_step': lambda: p.steps.critic.lower(p.state, batch)}
    return {
        'topology': name, 'chips': mesh.size, 'hbm_bytes_per_chip': chip.hbm_bytes,
        'global_batch': config.data.global_batch, 'resident_bytes': resident,
        'programs': {k: measure(lower, chip, beside) for k, lower in lowered.items()}}


def measure(lower: Any, chip: chips.Chip, beside: int) -> dict[str, Any]:
    """Costs of one program; see `report`."""
    start = time.monotonic()
    try:
        compiled = lower().compile()
    except Exception as e:  # XLA's own kind is not public; out of memory is what is expected
        if 'RESOURCE_EXHAUSTED' not in str(e):
            raise
        return {'fits': False, 'error': str(e).splitlines()[0]}
    seconds = time.monotonic() - start
    memory = compiled.memory_analysis()
    found = {'argument_bytes': memory.argument_size_in_bytes,
             'output_bytes': memory.output_size_in_bytes,
             'temp_bytes': memory.temp_size_in_bytes, 'alias_bytes': memory.alias_size_in_bytes}
    peak = beside + found['output_bytes'] - found['alias_bytes'] + found['temp_bytes']
    cost = costs.summary(compiled.as_text())
    least, bound = chips.roofline(
        chip, cost.flops, cost.hbm_bytes, sum(cost.collective_bytes.values()))
    silent = sum(call.count for call in cost.pallas if call.flops is None)
    return {'fits': peak <= chip.hbm_bytes, **found, 'peak_bytes': peak, 'flops': cost.flops,
            'kernel_calls_without_flops': silent, 'hbm_bytes': cost.hbm_bytes,
            'collective_bytes': cost.collective_bytes, 'roofline_seconds': least,
            'bound_by': bound, 'unknown_loops': list(cost.unknown_loops),
            'compile_seconds': seconds}
