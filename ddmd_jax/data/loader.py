"""Grain pipelines: a deterministic global order of rows, this process's part of each batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grain
import jax
import numpy as np

from ddmd_jax.sharding import ShardingError


def batches(rows: np.ndarray, lookup: Callable[[np.ndarray], Any], global_batch: int, seed: int,
            num_processes: int | None = None, process: int | None = None) -> grain.DatasetIterator:
    """Endless iterator over ``lookup(row indices of one batch)``.

    Rows are shuffled anew each epoch. The order of the global batches depends on `seed`
    alone; process p of P gets a contiguous P-th of every batch. The iterator's state is one
    counter, the same in every process.

    Raises:
      ShardingError: the batch does not divide by the number of processes.
    """
    num_processes = jax.process_count() if num_processes is None else num_processes
    process = jax.process_index() if process is None else process
    if global_batch % num_processes:
        raise ShardingError(f'data.global_batch {global_batch} does not divide by the '
                            f'{num_processes} processes')
    local = global_batch // num_processes

    def mine(batch: np.ndarray) -> Any:
        return lookup(np.asarray(batch)[process * local:(process + 1) * local])

    dataset = grain.MapDataset.source(rows).seed(seed).shuffle().repeat().batch(global_batch)
    return iter(dataset.map(mine).to_iter_dataset(
        grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))
