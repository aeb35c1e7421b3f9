"""A task of `train.fit` without networks: whatever two updates a test gives it."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ddmd_jax.data import loader
from ddmd_jax.data.order import Order
from ddmd_jax.parallel import sharding
from ddmd_jax.train.feed import Feed
from ddmd_jax.train.startup import Startup
from ddmd_jax.train.state import StateSpec


class ToyTask:
    """Critic updates, each on a batch of its own, then one of the generator, as a distillation's.

    Attributes:
      read: ``Planned -> batch`` in the host's memory.
      place: ``(batch, its number) -> batch`` on the devices.
      generator, critic: ``(state, batch) -> (state, metrics)``.
      updates, warmup: of the critic, a step and before the first one.
    """

    name, identities = 'toy', {'teacher_identity': 'toy', 'data_identity': 'toy'}

    def __init__(self, spec: StateSpec, order: Order, global_batch: int,
                 read: Callable[[Any], Any], place: Callable[[Any, int], Any],
                 generator: Callable[..., Any], critic: Callable[..., Any], updates: int = 1,
                 warmup: int = 0):
        self.spec, self.order, self.startup = spec, order, Startup()
        self.global_batch, self.read, self.place = global_batch, read, place
        self.generator, self.critic = generator, critic
        self.updates, self.warmup, self.extra = updates, warmup, 0

    def network(self, trained):
        return trained

    def feed(self, skip):
        mine = sharding.rows_here(self.spec.mesh, self.global_batch)
        data = loader.batches(self.order, self.read, mine)
        # The feed reads batches one by one: the last one read is the one to be placed.
        return Feed(data, lambda x: self.place(x, data.get_state()['next_index'] - 1), skip)

    def step(self, state, next_batch, fresh):
        warmup = 0
        if fresh:
            self.extra = int(state.critic_extra)
            warmup = 0 if int(state.critic_step) else self.warmup
        found = []
        for _ in range(self.updates + self.extra + warmup):
            state, metrics = self.critic(state, next_batch())
            found.append(metrics)
        state, metrics = self.generator(state, next_batch())
        mean = jax.tree.map(lambda *xs: sum(xs) / len(xs), *found)
        return state, mean | metrics | {'finite': metrics['finite'] & (mean['finite'] == 1)}

    def measure(self, state, history, values):
        return values, f'loss {values["loss"]:.3f}'

    def show(self, state, step, log):
        pass

    def read_weights(self, path):
        raise NotImplementedError(path)


def rows_of_a_batch(planned) -> np.ndarray:
    """A `read`: the rows themselves."""
    return planned.rows
