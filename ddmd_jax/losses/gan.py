"""The GAN loss in DMD2's form: non-saturating, on logits of samples that were re-noised.

The classifier is a head on the critic's trunk, so that it starts from what the teacher knows. It
needs real images, which CA and DM do not.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def student_gan_loss(fake: Array) -> Array:
    """``mean softplus(-fake)``: falls as the head takes the student's samples for real ones.

    `fake` are logits ``[B]``, high for real; the result is a scalar in fp32.
    """
    return jnp.mean(jax.nn.softplus(-fake.astype(jnp.float32)))


def critic_gan_loss(real: Array, fake: Array) -> Array:
    """``mean softplus(-real) + mean softplus(fake)`` of logits ``[B]`` each, a scalar in fp32.

    2 log 2 = 1.39 for a head that cannot tell them apart.
    """
    return student_gan_loss(real) + student_gan_loss(-fake)


def r1_penalty(gradient: Array) -> Array:
    """``1/2 mean |d logit / d x|^2`` over real samples (Mescheder et al. 2018), a scalar.

    `gradient` is ``[B, ...]``, of each sample's own logit in that sample.
    """
    squares = jnp.square(gradient.astype(jnp.float32))
    return 0.5 * jnp.mean(jnp.sum(squares, axis=tuple(range(1, squares.ndim))))
