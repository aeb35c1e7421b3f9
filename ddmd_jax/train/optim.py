"""Optimisers from config: AdamW with the usual trimmings, or any Optax chain."""

from collections.abc import Mapping
from typing import Any

import jax
import optax


def learning_rate(cfg: Mapping[str, Any], steps: int) -> optax.Schedule:
    """Linear warm-up over `warmup` updates, flat, linear decay to 0 over the last `decay` part.

    Everything before the decay is independent of `steps`, so that a run can be extended.
    """
    warmup, decay = int(cfg['warmup']), round(float(cfg['decay']) * steps)
    lr = float(cfg['lr'])
    pieces, bounds = [optax.constant_schedule(lr)], []
    if warmup:
        pieces, bounds = [optax.linear_schedule(lr / warmup, lr, warmup)] + pieces, [warmup]
    if decay:
        pieces.append(optax.linear_schedule(lr, 0.0, decay))
        bounds.append(max(steps - decay, warmup))
    return optax.join_schedules(pieces, bounds)


def _matrices(params: Any) -> Any:
    """Mask of the kernels: what weight decay is for (biases, norms, embeddings are left)."""
    def is_kernel(path, leaf):
        return jax.tree_util.keystr(path, simple=True, separator='/').endswith('kernel')
    return jax.tree_util.tree_map_with_path(is_kernel, params)


def make_optimizer(cfg: Mapping[str, Any], steps: int) -> optax.GradientTransformation:
    """An Optax transformation from one `config.optim.*` section.

    `cfg.chain`, if not empty, is a sequence of ``(optax name, kwargs)`` and stands for
    everything; otherwise `cfg.name` with `lr, b1, b2, eps, weight_decay, clip, warmup, decay,
    mu_dtype`.

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
    else:
        raise ValueError(f'unknown optimiser {cfg["name"]!r}; known: adamw')
    return optax.chain(*clip, core)
