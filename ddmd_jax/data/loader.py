"""Grain pipelines: this process's part of every batch of a global order."""

import dataclasses
from collections.abc import Callable
from typing import Any

import grain
import jax

from ddmd_jax.data.order import Order, Planned
from ddmd_jax.parallel.sharding import ShardingError

# Batches read before they are asked for: a step of several critic updates wants all of its own at
# once, as none of them waits for the devices.
AHEAD = 8


def batches(order: Order, read: Callable[[Planned], Any], global_batch: int,
            num_processes: int | None = None,
            process: int | None = None) -> grain.DatasetIterator:
    """Endless iterator over the batches of `order`.

    `read` makes a batch of this process's rows of a planned one. Process p of P gets a contiguous
    P-th of every batch. The iterator's state is one counter of batches, the same in every process.

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
    part = lambda planned: read(dataclasses.replace(planned, rows=planned.rows[mine]))
    return iter(grain.MapDataset.source(order).map(part).to_iter_dataset(
        grain.ReadOptions(num_threads=1, prefetch_buffer_size=AHEAD)))
