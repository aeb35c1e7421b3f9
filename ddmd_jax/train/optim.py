"""Optimisers from config: AdamW or Muon with the usual trimmings, or any Optax chain."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from ddmd_jax.parallel.sharding import FACTORS

NAMES = 'adamw', 'muon'
MATRICES = ('kernel', *FACTORS)  # last names of what weight decay and Muon are for
RULES = ((r'ns_coeffs$', ()),)  # Muon keeps its three coefficients in its state


def learning_rate(cfg: Mapping[str, Any], steps: int | jax.Array) -> optax.Schedule:
    """Linear warm-up over `warmup` updates, flat, linear decay to 0 over the last `decay` part.

    Everything before the decay is independent of `steps`, so that a run can be extended. Where
    `steps` is traced, the program of an update is the same however long the run is.
    """
    warmup, share, lr = int(cfg['warmup']), float(cfg['decay']), float(cfg['lr'])
    pieces: list[optax.Schedule] = [optax.constant_schedule(lr)]
    bounds: list[Any] = []
    if warmup:
        pieces, bounds = [optax.linear_schedule(lr / warmup, lr, warmup)] + pieces, [warmup]
    if share:
        decay = jnp.minimum(jnp.round(share * steps).astype(jnp.int32),
                            jnp.maximum(steps - warmup, 0))
        passed = lambda count: jnp.clip(count, 0, decay) / jnp.maximum(decay, 1)
        pieces.append(lambda count: lr * (1 - passed(count)))
        bounds.append(jnp.maximum(steps - decay, warmup))
    return optax.join_schedules(pieces, bounds)


def _matrices(params: Any) -> Any:
    """Mask of kernels and of their adapters' factors: what weight decay is for (biases, norms,
    embeddings are left)."""
    def is_kernel(path, leaf):
        return jax.tree_util.keystr(path, simple=True, separator='/').endswith(MATRICES)
    return jax.tree_util.tree_map_with_path(is_kernel, params)


def _stacked(params: Any) -> Any:
    """Axes of the kernels ``[layers, in, out]`` of stacked layers, each of which Muon turns into
    the nearest orthogonal matrix by itself; None elsewhere, where AdamW goes on."""
    def axes(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator='/')
        stacked = name.endswith(MATRICES) and leaf.ndim == 3
        return optax.contrib.MuonDimensionNumbers(1, 2) if stacked else None
    return jax.tree_util.tree_map_with_path(axes, params)


def make_optimizer(cfg: Mapping[str, Any],
                   steps: int | jax.Array) -> optax.GradientTransformation:
    """An Optax transformation from one `config.optim.*` section.

    `cfg.chain`, if not empty, is a sequence of ``(optax name, kwargs)`` and stands for
    everything; otherwise `cfg.name` with `lr, b1, b2, eps, weight_decay, clip, warmup, decay,
    mu_dtype`. `muon` is Muon with `muon_lr` and `weight_decay` on the matrices of stacked layers,
    and Adam with `lr` on the rest, which does not decay.

    Raises:
      ValueError: unknown optimiser or chain link.
    """
    if cfg['chain']:
        links = []
        for name, kwargs in cfg['chain']:
            if not callable(getattr(optax, name, None)):
                raise ValueError(f'optax has no transformation {name!r}')
            links.append(getattr(optax, name)(**kwargs))
        return optax.chain(*links)
    lr = learning_rate(cfg, steps)
    clip = [optax.clip_by_global_norm(cfg['clip'])] if cfg['clip'] else []
    if cfg['name'] == 'adamw':
        core = optax.adamw(lr, b1=cfg['b1'], b2=cfg['b2'], eps=cfg['eps'],
                           weight_decay=cfg['weight_decay'], mask=_matrices,
                           mu_dtype=cfg['mu_dtype'])
    elif cfg['name'] == 'muon':
        core = optax.contrib.muon(
            learning_rate({**cfg, 'lr': cfg['muon_lr']}, steps), adam_learning_rate=lr,
            adam_b1=cfg['b1'], adam_b2=cfg['b2'], eps=cfg['eps'], weight_decay=cfg['weight_decay'],
            mu_dtype=cfg['mu_dtype'], muon_weight_dimension_numbers=_stacked)
    else:
        raise ValueError(f'unknown optimiser {cfg["name"]!r}; known: {", ".join(NAMES)}')
    return optax.chain(*clip, core)
