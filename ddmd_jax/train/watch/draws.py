"""Which alpha and tau a run has drawn, as counts: drawn again, from the run's own keys.

A remedy of the health verdict (`train.on_health`), which lowers alpha, is not in them.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddmd_jax.diffusion import sampling
from ddmd_jax.diffusion.time import Shift
from ddmd_jax.method.recipe import Method
from ddmd_jax.train.step import draw_levels, generator_keys

UPDATES, BINS = 200, 40  # at most so many updates are looked at
NAME = 'draws.json'


def of_update(m: Method, seed: int, batch: int, step: jax.Array) -> dict[str, jax.Array]:
    """``[batch]`` each: tau_ca and tau_dm, shifted; alpha if it changes. `step` counts from 0."""
    now = m.at(step, jnp.ones(()))
    part = batch // m.accumulate
    t = Shift().steps(m.num_steps)[sampling.step_assignment(part, m.num_steps)]
    found = []
    for key in generator_keys(jax.random.key(seed), step, m.accumulate):
        (tau_ca, tau_dm), alpha = draw_levels(key, now, t, t)
        found.append({'tau_ca': tau_ca, 'tau_dm': tau_dm,
                      **({'alpha': alpha + jnp.zeros_like(t)} if changes(m) else {})})
    return jax.tree.map(lambda *xs: jnp.concatenate(xs), *found)


def changes(m: Method) -> bool:
    """Whether alpha is not the same in all updates."""
    return bool(m.alpha_range or m.alpha_ramp)


def counts(m: Method, seed: int, batch: int, steps: Sequence[int]) -> dict[str, Any]:
    """``{name: {'edges', 'counts'}}`` over the updates `steps`, and how many they are."""
    draw = jax.jit(jax.vmap(functools.partial(of_update, m, seed, batch)))
    drawn = jax.device_get(draw(jnp.asarray(steps, jnp.int32)))
    found: dict[str, Any] = {'updates': len(steps), 'fixed_alpha': float(m.alpha)}
    for name, values in drawn.items():
        span = (0.0, 1.0) if name != 'alpha' else None
        n, edges = np.histogram(values, BINS, span)
        found[name] = {'edges': [round(float(e), 4) for e in edges], 'counts': n.tolist()}
    return found


def write(m: Method, seed: int, batch: int, data_std: float | None, done: int,
          workdir: Path) -> None:
    """``draws.json``, of at most UPDATES of the `done` updates of a run, with `data_std` in it."""
    steps = np.unique(np.linspace(0, done - 1, min(done, UPDATES)).round().astype(int))
    scratch = workdir / f'{NAME}.tmp'
    found = counts(m, seed, batch, steps.tolist()) | {'data_std': data_std}
    scratch.write_text(json.dumps(found))
    os.replace(scratch, workdir / NAME)
