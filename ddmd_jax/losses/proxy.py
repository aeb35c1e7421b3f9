"""The proxy loss: turns an update direction for samples into a gradient for parameters."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def proxy_loss(x_hat: Array, direction: Array) -> Array:
    """``1/2 mean |x_hat - stop_gradient(x_hat + direction)|^2`` (DMD2's form).

    Its gradient with respect to `x_hat` is ``-direction / size``: descending it moves the
    sample *along* the direction. The value itself says nothing about progress.
    """
    target = jax.lax.stop_gradient(x_hat + direction)
    return 0.5 * jnp.mean(jnp.square(x_hat - target))
