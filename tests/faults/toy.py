"""A run of `ddmd_jax.main` without networks: a matrix that learns, in the same loop and folders.

The programs of a real run cost its time, as every process compiles them anew; this one starts in
seconds, on any mesh. Its verdict is over-baked in every interval it logs.
"""

from __future__ import annotations

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ddmd_jax.data import loader
from ddmd_jax.data.order import Order
from ddmd_jax.parallel import sharding
from ddmd_jax.train import state as st
from ddmd_jax.train.distillation import Distillation
from ddmd_jax.train.feed import Feed
from ddmd_jax.train.startup import Compiling, Startup
from ddmd_jax.train.update import average, keep_if

RULES = (('w', ('fsdp', 'tensor')),)
ROWS, IN, OUT = 64, 8, 256 * 128  # the matrix is a MiB, so that a disk can be too small for it
TX = optax.adam(1e-3)


class Toy(Distillation):
    """The matrix is sharded over the mesh, batches over processes: every step needs all of them."""

    name = 'toy'

    def __init__(self, config):
        mesh = sharding.make_mesh(config.mesh)

        def fresh():
            w = {'w': jax.random.normal(jax.random.key(config.seed), (IN, OUT))}
            return st.fresh(w, TX, w, TX)

        self.config, self.extra_updates = config, 0
        self.teacher = types.SimpleNamespace(encode=None)
        self.rows = np.random.default_rng(0).standard_normal((ROWS, IN)).astype(np.float32)
        self.order = Order(np.arange(ROWS), config.data.global_batch, config.seed)
        self.spec = st.StateSpec(fresh, RULES, mesh)
        self.identities = {'teacher_identity': 'toy', 'data_identity': 'toy'}
        self.startup = Startup()
        self.startup.compiling = Compiling({})
        program = lambda step: jax.jit(
            step, out_shardings=(self.spec.shardings, None), donate_argnums=0)
        self._steps = {'generator': program(generator), 'critic': program(critic)}

    def feed(self, skip):
        read = loader.batches(self.order, lambda planned: self.rows[planned.rows],
                              self.config.data.global_batch)
        return Feed(read, lambda batch: sharding.put_batch(batch, self.spec.mesh), skip)

    def _run(self, kind, state, batch):
        return self._steps[kind](state, batch)

    def measure(self, state, history, values):
        return (values | {'health': 'over-baked', 'health_reason': 'so'},
                f'loss {values["loss"]:.3f}')

    def show(self, state, step, log):
        pass


def generator(state, x):
    value = lambda p: jnp.mean(jnp.square(x @ p['w'] - jnp.sum(x, axis=1, keepdims=True)))
    loss, grads = jax.value_and_grad(value)(state.student)
    updates, opt = TX.update(grads, state.student_opt, state.student)
    student = optax.apply_updates(state.student, updates)
    new = dataclasses.replace(state, step=state.step + 1, student=student, student_opt=opt,
                              ema=average(state.ema, student, 0.9))
    finite = jnp.isfinite(loss)
    return keep_if(finite, new, state), {'loss': loss, 'finite': finite}


def critic(state, x):
    loss = jnp.mean(jnp.square(x @ state.critic['w']))
    near = average(state.critic, state.student, 0.5)
    new = dataclasses.replace(state, critic_step=state.critic_step + 1, critic=near)
    finite = jnp.isfinite(loss)
    return keep_if(finite, new, state), {'fake_loss': loss, 'finite': finite}
