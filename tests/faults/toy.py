"""A run of `ddmd_jax.main` without networks: a matrix that learns, in the same loop and folders.

What costs a real one its time are programs, which every process compiles anew; this one starts
in seconds, on any mesh. It is told to be over-baked in every interval it logs.
"""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
from toy_task import ToyTask

from ddmd_jax.data.order import Order
from ddmd_jax.parallel import sharding
from ddmd_jax.train import state as st
from ddmd_jax.train.update import average, keep_if

RULES = (('w', ('fsdp', 'tensor')),)
ROWS, IN, OUT = 64, 8, 256 * 128  # the matrix is a MiB, so that a disk can be too small for it


def make_task(config):
    """The matrix is sharded over the mesh, batches over processes: every step needs all of them."""
    mesh = sharding.make_mesh(config.mesh)
    rows = np.random.default_rng(0).standard_normal((ROWS, IN)).astype(np.float32)
    tx = optax.adam(1e-3)

    def fresh():
        w = {'w': jax.random.normal(jax.random.key(config.seed), (IN, OUT))}
        return st.fresh(w, tx, w, tx)

    def generator(state, x):
        value = lambda p: jnp.mean(jnp.square(x @ p['w'] - jnp.sum(x, axis=1, keepdims=True)))
        loss, grads = jax.value_and_grad(value)(state.student)
        updates, opt = tx.update(grads, state.student_opt, state.student)
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

    spec = st.StateSpec(fresh, RULES, mesh)
    program = lambda step: jax.jit(step, out_shardings=(spec.shardings, None), donate_argnums=0)
    order = Order(np.arange(ROWS), config.data.global_batch, config.seed)
    task = ToyTask(
        spec, order, config.data.global_batch, lambda planned: rows[planned.rows],
        lambda batch, number: sharding.put_batch(batch, mesh, config.data.global_batch),
        program(generator), program(critic), config.critic.updates, config.critic.warmup)
    task.measure = lambda state, history, values: (
        values | {'health': 'over-baked', 'health_reason': 'so'}, f'loss {values["loss"]:.3f}')
    task.teacher = types.SimpleNamespace()  # the evaluation after training is left out
    return task
