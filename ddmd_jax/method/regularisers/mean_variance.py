"""Mean-variance regularisation: the simplest thing that holds CA back (paper, section 4, eq. 7).

Each sample's mean and variance are pulled to those of real data. It knows nothing of prompts or
images, which is its point: that it keeps CA from collapsing shows what DM is needed for, and what
it falls short by shows what DM adds.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ddmd_jax.config.fields import FIXED, Field
from ddmd_jax.config.rules import WEIGHT, number, or_none
from ddmd_jax.families.base import Teacher
from ddmd_jax.method.regularisers import Regulariser, Sight, Term

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


class MeanVariance(Regulariser):
    """KL to real moments; those that a config leaves open are of the teacher's data."""

    name: ClassVar[str] = 'mean_variance'
    fields: ClassVar = (
        Field('weight', WEIGHT, 0.0, FIXED, 'weight of mean-variance'),
        Field('mean', or_none(number("None takes that of the teacher's data")), None, FIXED,
              'mean of real latents'),
        Field('variance', or_none(number("None takes that of the teacher's data", above=0)), None,
              FIXED, 'variance of real latents'),
    )
    curves: ClassVar = {'mv_kl': 'KL of the samples\' moments from those of real data'}

    def __init__(self, section: Any, teacher: Teacher):
        known: Sequence[Any] = teacher.latents.moments or (None, None)  # then the config has them
        self.weight = section.weight
        self.mean = known[0] if section.mean is None else section.mean
        self.variance = known[1] if section.variance is None else section.variance

    def student_term(self, x_hat: Array, sight: Sight) -> Term:
        kl = mean_variance_kl(x_hat, self.mean, self.variance)
        return self.weight * kl, {'mv_kl': kl}


REGULARISER = MeanVariance
