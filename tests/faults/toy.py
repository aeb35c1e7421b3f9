"""A run of `ddmd_jax.main` without networks: a matrix that learns, in the same loop and folders.

What costs a real one its time are programs, which every process compiles anew; this one starts
in seconds, on any mesh. It is told to be over-baked in every interval it logs.
"""

from __future__ import annotations

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ddmd_jax.train.step import Steps

from ddmd_jax.data import loader
from ddmd_jax.data.order import Order
from ddmd_jax.parallel import sharding
from ddmd_jax.train import distill, loop, state as st

RULES = (('w', ('fsdp', 'tensor')),)
ROWS, IN, OUT = 64, 8, 256 * 128  # the matrix is a MiB, so that a disk can be too small for it
TEACHER = types.SimpleNamespace(identity='toy', name='emoji', decode=None, encode=None)


def make_task(config, mesh):
    """The matrix is sharded over the mesh, batches over processes: every step needs all of them."""
    rows = np.random.default_rng(0).standard_normal((ROWS, IN)).astype(np.float32)
    order = Order(np.arange(ROWS), config.data.global_batch, config.seed)
    tx = optax.adam(1e-3)

    def fresh():
        w = {'w': jax.random.normal(jax.random.key(config.seed), (IN, OUT))}
        return st.fresh(w, tx, w, tx)

    _, shardings = st.abstract_and_shardings(fresh, RULES, mesh)

    def generator(state, x):
        value = lambda p: jnp.mean(jnp.square(x @ p['w'] - jnp.sum(x, axis=1, keepdims=True)))
        loss, grads = jax.value_and_grad(value)(state.student)
        updates, opt = tx.update(grads, state.student_opt, state.student)
        student = optax.apply_updates(state.student, updates)
        new = dataclasses.replace(state, step=state.step + 1, student=student, student_opt=opt,
                                  ema=st.update_ema(state.ema, student, 0.9))
        finite = jnp.isfinite(loss)
        return st.keep_if(finite, new, state), {'loss': loss, 'finite': finite}

    def critic(state, x):
        loss = jnp.mean(jnp.square(x @ state.critic['w']))
        near = st.update_ema(state.critic, state.student, 0.5)
        new = dataclasses.replace(state, critic_step=state.critic_step + 1, critic=near)
        finite = jnp.isfinite(loss)
        return st.keep_if(finite, new, state), {'fake_loss': loss, 'finite': finite}

    program = lambda step: jax.jit(step, out_shardings=(shardings, None), donate_argnums=0)
    generate, criticise = program(generator), program(critic)
    steps = Steps(generator=lambda state, frozen, x: generate(state, x), critic=criticise)
    return loop.Task(
        name='toy', make_state=fresh, source=(), rules=RULES,
        data=loader.batches(order, lambda index, length: rows[index], config.data.global_batch),
        place=lambda batch: sharding.put_batch(batch.rows, mesh), order=order,
        advance=distill.make_advance(steps, None, config.critic.updates, config.critic.warmup),
        words=lambda values: f'loss {values["loss"]:.3f}', probe=lambda state: {},
        annotate=lambda history, step, values: values | {'health': 'over-baked',
                                                         'health_reason': 'so'},
        pictures=lambda state, step, log: None)
