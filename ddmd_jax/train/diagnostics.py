"""Health: what tells a run that works from one that is dying, in numbers and in a word.

Losses do not: the proxy loss has no fixed scale. These figures are computed on the device,
inside the generator step, from arrays it has anyway; the verdict is host arithmetic over the
logged history.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ddmd_jax.losses.decoupled import Predictions, Update

Array = jax.Array

REFERENCE = 3  # logged intervals that make up the reference the verdict compares with
GAP_UP = 1.3  # growth of dm_rel_gap that counts as up
GAP_LARGE = 0.25  # dm_rel_gap below this is small, however much it grew: it starts at 0
COS_DOWN = 1.3  # growth of 1 - dm_cos that counts as down
STD_UP = 1.1  # x_std above that of real data (or of the start) that counts as up
HEALTHY, OVER_BAKED, CRITIC_LAGS = 'healthy', 'over-baked', 'critic lags'
BROKEN = 'broken'  # a figure is NaN or Inf


def rms(x: Array) -> Array:
    """Root mean square over everything, a scalar."""
    return jnp.sqrt(jnp.mean(jnp.square(x)))


def image_std(x: Array) -> Array:
    """Mean over the batch of each sample's standard deviation (``[B, ...]`` -> scalar)."""
    return jnp.mean(jnp.std(x, axis=tuple(range(1, x.ndim))))


def health(x_hat: Array, p: Predictions, update: Update, limit: float = 1.0) -> dict[str, Array]:
    """Scalars of one generator step.

    Args:
      x_hat: ``[B, ...]`` the student's samples.
      p: the predictions the step compared.
      update: the directions it took.
      limit: magnitude beyond which a value counts as saturated (1 for pixels).

    Returns:
      dm_rel_gap = rms(Delta_DM) / rms(x_hat_real); dm_cos, mean cosine of critic's and
      teacher's predictions; dm_to_ca = rms(Delta_DM) / rms(Delta_CA) (0 without CA); x_std,
      mean per-sample standard deviation; saturation, share of values beyond `limit`; and the
      shares of samples whose normaliser was floored.
    """
    axes = tuple(range(1, x_hat.ndim))
    dot = jnp.sum(p.dm_fake * p.dm_cond, axis=axes)
    norms = jnp.sqrt(jnp.sum(jnp.square(p.dm_fake), axis=axes)
                     * jnp.sum(jnp.square(p.dm_cond), axis=axes))
    ca = rms(update.raw_ca)
    return {
        'dm_rel_gap': rms(update.raw_dm) / jnp.maximum(rms(p.dm_cond), 1e-8),
        'dm_cos': jnp.mean(dot / jnp.maximum(norms, 1e-8)),
        'dm_to_ca': jnp.where(ca > 0, rms(update.raw_dm) / jnp.maximum(ca, 1e-8), 0.0),
        'x_std': image_std(x_hat),
        'saturation': jnp.mean(jnp.abs(x_hat) > limit),
        'floor_hit_ca': update.floor_hit_ca,
        'floor_hit_dm': update.floor_hit_dm,
    }


def verdict(history: Sequence[dict[str, Any]],
            data_std: float | None = None) -> tuple[str, str]:
    """A word and its reason, from logged intervals oldest first.

    Compares the last interval with the mean of the first `REFERENCE`: the critic lags when
    the gap to the teacher grows while the predictions turn apart; the student is over-baked
    when its contrast exceeds that of real data, `data_std`, or if that is not known its start.
    """
    watched = ('dm_rel_gap', 'dm_cos', 'x_std')
    unsound = [k for k in watched if history and not math.isfinite(history[-1][k])]
    if unsound:
        return BROKEN, f'{", ".join(unsound)} not finite'
    if len(history) <= REFERENCE:
        return HEALTHY, 'too early to tell'
    start = lambda key: sum(h[key] for h in history[:REFERENCE]) / REFERENCE
    now = history[-1]
    gap = now['dm_rel_gap'] / max(start('dm_rel_gap'), 1e-8)
    apart = (1 - now['dm_cos']) / max(1 - start('dm_cos'), 1e-8)
    std = now['x_std'] / max(data_std or start('x_std'), 1e-8)
    of = 'that of real data' if data_std else 'that of the start'
    grown = gap > GAP_UP and now['dm_rel_gap'] > GAP_LARGE
    if grown and apart > COS_DOWN and std <= STD_UP:
        return CRITIC_LAGS, (f'dm_rel_gap x{gap:.2f} and 1 - dm_cos x{apart:.2f} since the start: '
                             'more critic updates or a higher critic lr')
    if std > STD_UP:
        return OVER_BAKED, (f'x_std is x{std:.2f} {of}, dm_rel_gap x{gap:.2f} since the start: '
                            'stop here, lower alpha, or give the critic more updates')
    return HEALTHY, f'dm_rel_gap x{gap:.2f} since the start, x_std x{std:.2f} {of}'
