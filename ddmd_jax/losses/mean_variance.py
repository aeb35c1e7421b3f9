"""Mean-variance regularisation: the simplest thing that holds CA back (paper, section 4).

Each sample's mean and variance are pulled to those of real data, by the divergence between two
Gaussians. It knows nothing of prompts or pictures, which is its point: that it keeps CA from
collapsing shows what DM is needed for, and what it falls short by shows what DM adds.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array

LEAST = 1e-6  # variance below which a sample counts as constant


def moments(x: Array) -> tuple[Array, Array]:
    """Mean and variance ``[B]`` fp32 of each sample of ``[B, ...]``, over all its values."""
    x, axes = x.astype(jnp.float32), tuple(range(1, x.ndim))
    return jnp.mean(x, axis=axes), jnp.var(x, axis=axes)


def mean_variance_kl(x_hat: Array, mean: float | Array, variance: float | Array) -> Array:
    """``KL(N(mu_i, s_i^2) || N(mean, variance))``, averaged over the samples: a scalar in fp32.

    Args:
      x_hat: ``[B, ...]`` the student's samples, whose mu_i and s_i^2 are `moments`.
      mean, variance: of real data; the paper's for SDXL's latents are .075 and .81.
    """
    mu, var = moments(x_hat)
    var = jnp.maximum(var, LEAST)
    distance = (var + jnp.square(mu - mean)) / variance
    return jnp.mean(0.5 * (distance - 1.0 - jnp.log(var / variance)))
