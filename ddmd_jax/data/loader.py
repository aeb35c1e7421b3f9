"""Grain pipelines: this process's part of every batch of a global order."""

import dataclasses
from collections.abc import Callable
from typing import Any

import grain
import numpy as np

from ddmd_jax.data.order import Order, Planned

# Batches read before they are asked for: a step of several critic updates wants all of its own at
# once, as none of them waits for the devices.
AHEAD = 8


def batches(order: Order, read: Callable[[Planned], Any],
            mine: np.ndarray) -> grain.DatasetIterator:
    """Endless iterator over the batches of `order`.

    `read` makes a batch of the rows of a planned one that lie at the places `mine`, those of this
    process (`sharding.rows_here`). The iterator's state is one counter of batches, the same in
    every process.
    """
    part = lambda planned: read(dataclasses.replace(planned, rows=planned.rows[mine]))
    return iter(grain.MapDataset.source(order).map(part).to_iter_dataset(
        grain.ReadOptions(num_threads=1, prefetch_buffer_size=AHEAD)))
