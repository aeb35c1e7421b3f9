"""Per-sample normalisation of a direction (DMD2, eq. 8; one denominator a term here).

The denominator is the mean distance from the student's sample to the teacher's conditional
prediction at that term's own tau. Near the clean end it is a few thousandths, below what
bfloat16 resolves: everything is fp32, with a floor, and how often the floor binds is logged.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def distance(x: Array, x_hat_real: Array) -> Array:
    """``mean |x - x_hat_real|`` of each sample: ``[B, ...] -> [B]`` fp32."""
    gap = jnp.abs(x.astype(jnp.float32) - x_hat_real.astype(jnp.float32))
    return jnp.mean(gap, axis=tuple(range(1, gap.ndim)))


def normalise(direction: Array, denominator: Array, floor: float) -> tuple[Array, Array]:
    """Divides each sample by its denominator, no less than `floor`.

    Args:
      direction: ``[B, ...]``.
      denominator: ``[B]`` from `distance`.
      floor: smallest denominator allowed, > 0, in units of x.

    Returns:
      ``(direction / max(denominator, floor) in fp32, hit rate)``: the share of samples in
      which the floor bound, a scalar.
    """
    scale = jnp.maximum(denominator.astype(jnp.float32), floor)
    scale = scale.reshape(scale.shape + (1,) * (direction.ndim - 1))
    return direction.astype(jnp.float32) / scale, jnp.mean(denominator < floor)
