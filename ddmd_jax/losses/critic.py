"""The critic's denoising loss on the student's samples (paper, Algorithm 1)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ddmd_jax.diffusion.process import expand_time

Array = jax.Array

WEIGHTINGS = ('velocity', 'clean')
MIN_NOISE = 0.02  # noise weight below which velocity weighting grows no further


def critic_loss(x_hat_fake: Array, x: Array, tau: Array, weighting: str = 'velocity') -> Array:
    """Mean squared error of the critic's clean prediction, a scalar in fp32.

    Args:
      x_hat_fake: ``[B, ...]`` critic's clean prediction from ``renoise(x, tau)``.
      x: ``[B, ...]`` student's sample, without gradient.
      tau: ``[B]`` shifted re-noising level.
      weighting: 'velocity' weighs by ``1 / (1 - tau)^2``, which is the flow-matching loss the
        teacher was trained with; 'clean' does not weigh.
    """
    error = jnp.square(x_hat_fake.astype(jnp.float32) - x.astype(jnp.float32))
    if weighting == 'velocity':
        error = error / jnp.square(jnp.maximum(1.0 - expand_time(tau, error), MIN_NOISE))
    elif weighting != 'clean':
        raise ValueError(f'unknown weighting {weighting!r}; known: {", ".join(WEIGHTINGS)}')
    return jnp.mean(error)
