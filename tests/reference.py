"""Figures of one generator and one critic update at fixed keys, for every objective and schedule.

``tests/golden/objectives.json`` holds those of commit a515424, before the objectives were written
anew; `test_reference.py` holds later code to them. Do not write them again to make a test pass.

Everything is computed in fp64 (`in_double`), as that commit's figures were: rounding in fp32 is
another on every kind of CPU, by as much as a small mistake would be.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tiny

from ddmd_jax.families.emoji import teacher as emoji
from ddmd_jax.parallel import sharding

GOLDEN = Path(__file__).parent / 'golden' / 'objectives.json'
BATCH = 4
SCHEDULES = ('coupled_shared', 'decoupled_full', 'decoupled_constrained', 'decoupled_hybrid')
# Name of a case -> what differs from `tiny.make_recipe`'s recipe.
CASES: dict[str, dict[str, Any]] = {
    **{name: {'schedule': name} for name in SCHEDULES},
    'decoupled_hybrid, shift 3': {'schedule': 'decoupled_hybrid', 'shift': 3.0},
    'coupled_shared, dmd2': {'schedule': 'coupled_shared', 'normaliser': 'dmd2'},
    'no normaliser': {'normaliser': 'none'},
    'alpha rises': {'alpha_ramp': 10},
    'ranges move': {'tau_ca_end': (0.5, 0.98), 'tau_dm_end': (0.0, 0.7), 'tau_relax': 5},
    'clean critic': {'critic_weighting': 'clean', 'tau_critic': (0.1, 0.9)},
    'merged critic': {'merge': 0.9},
    'teacher apart': {'teacher_passes': 'apart'},
    'all of them': {'schedule': 'coupled_shared', 'gan': (0.3, 0.2, 0.5), 'shift': 2.0,
                    'mean_variance': (0.5, 0.1, 0.3), 'accumulate': 2, 'alpha_range': (2.0, 8.0)},
}


def figures(tree: Any) -> list[float]:
    """Norm of a tree's leaves, then four projections of them on fixed random signs, in fp64."""
    leaves = [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)]
    flat = np.concatenate([x for x in leaves if x.size])
    signs = np.random.default_rng(0).choice((-1.0, 1.0), (4, len(flat)))
    return [float(np.linalg.norm(flat)), *(float(x) for x in signs @ flat)]


@contextlib.contextmanager
def in_double() -> Iterator[None]:
    """The code's ``jnp.float32`` are fp64, but for the softmax within JAX's own attention."""
    double = tiny.MODEL | {'denoiser': tiny.MODEL['denoiser'] | {'dtype': 'float64'}}
    with (jax.enable_x64(True), mock.patch.object(jnp, 'float32', jnp.float64),
          mock.patch.object(tiny, 'MODEL', double)):
        yield


def case_figures(changes: dict[str, Any]) -> dict[str, Any]:
    """Losses and metrics, the figures of both updates' gradients and of the state after them."""
    changes, extra, regularisers = dict(changes), None, {}
    mechanics = {name: changes.pop(name) for name in ('merge', 'teacher_passes', 'accumulate')
                 if name in changes}
    if 'gan' in changes:
        weights = dict(zip(('weight', 'critic_weight', 'r1'), changes.pop('gan'), strict=True))
        regularisers['gan'] = gan = tiny.make_gan(**weights)
        extra = {'gan': gan.init(jax.random.key(5))}
    if 'mean_variance' in changes:
        regularisers['mean_variance'] = tiny.make_mean_variance(*changes.pop('mean_variance'))
    changes['critic_range'] = changes.pop('tau_critic', (0.0, 0.98))
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    # Plain descent hands on the gradient as it is; momentum makes two updates differ.
    tx = optax.chain(optax.clip_by_global_norm(1e6), optax.sgd(0.1, momentum=0.9))
    spec, program, frozen = tiny.build_run(
        emoji.make_denoiser(tiny.MODEL), tiny.make_params(), tx, mesh,
        recipe=tiny.make_recipe(regularisers=regularisers, **changes), extra=extra, **mechanics)
    state, found = spec.create(), {}
    for i in range(2):
        real = np.random.default_rng(i).normal(size=(BATCH, *tiny.SHAPE)).astype(np.float32)
        batch = tiny.make_batch(BATCH, i, real if extra else None)
        state, metrics = program.critic(frozen, state, batch)
        found[f'critic {i}'] = {k: float(v) for k, v in sorted(metrics.items())}
        state, metrics, *_ = program.generator(frozen, state, batch)
        found[f'generator {i}'] = {k: float(v) for k, v in sorted(metrics.items())}
    for name in ('student', 'critic', 'ema', 'student_opt', 'critic_opt'):
        found[name] = figures(getattr(state, name))
    if extra:
        found['head'], found['head_opt'] = figures(state.extra), figures(state.extra_opt)
    return found

