"""A run's folder with one checkpoint in it, without the run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ddmd_jax.data import loader
from ddmd_jax.data.order import Order
from ddmd_jax.train import state as st
from ddmd_jax.train.durable.saving import Checkpoints
from ddmd_jax.train.feed import Feed


def save(workdir, manifest, ema, step=3):
    """Leaves the checkpoint of a run in `workdir` whose student is ahead of its average."""
    ahead, tx = jax.tree.map(lambda x: x + 1, ema), optax.adamw(1e-3)
    state = dataclasses.replace(st.fresh(ahead, tx, ahead, tx), ema=jax.tree.map(jnp.asarray, ema))
    checkpoints = Checkpoints(workdir, manifest)
    read = loader.batches(Order(np.arange(4), 2, 0), lambda planned: planned.rows, np.arange(2))
    checkpoints.save(step, state, Feed(read, lambda batch: batch))
    checkpoints.wait()
    checkpoints.close()
    return workdir
