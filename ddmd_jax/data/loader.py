"""Grain pipelines: this process's part of every batch of a global order."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import grain
import jax
import numpy as np

from ddmd_jax.data.order import Order, Planned, Shape
from ddmd_jax.parallel.sharding import ShardingError

# Batches read before they are asked for: a step of several critic updates wants all of its own at
# once, as none of them waits for the devices.
AHEAD = 8


@functools.partial(jax.tree_util.register_dataclass, data_fields=['rows'], meta_fields=['shape'])
@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of a global batch, a pytree of arrays, and the shape of its latents."""

    rows: Any
    shape: Shape | None = None


def batches(order: Order, lookup: Callable[[np.ndarray, int | None], Any], global_batch: int,
            num_processes: int | None = None,
            process: int | None = None) -> grain.DatasetIterator:
    """Endless iterator over the `Batch` es of `order`.

    `lookup(rows, length)` gives the arrays of this process's rows, cut to so many tokens (None:
    not cut). Process p of P gets a contiguous P-th of every batch. The iterator's state is one
    counter of batches, the same in every process.

    Raises:
      ShardingError: the batch does not divide by the number of processes.
    """
    num_processes = jax.process_count() if num_processes is None else num_processes
    process = jax.process_index() if process is None else process
    if global_batch % num_processes:
        raise ShardingError(f'data.global_batch {global_batch} does not divide by the '
                            f'{num_processes} processes')
    local = global_batch // num_processes
    mine = slice(process * local, (process + 1) * local)

    def read(planned: Planned) -> Batch:
        return Batch(lookup(planned.rows[mine], planned.length), planned.shape)

    return iter(grain.MapDataset.source(order).map(read).to_iter_dataset(
        grain.ReadOptions(num_threads=1, prefetch_buffer_size=AHEAD)))
