"""A regulariser with weights of its own: holds the samples' mean colour to a slow estimate of it.

Its one parameter, a colour, follows the student by the critic's updates; the student is pulled to
where the colour stands. Sudden casts cost, slow changes do not.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ddmd_jax.config.fields import FIXED, Field
from ddmd_jax.config.rules import WEIGHT
from ddmd_jax.method.regularisers import Regulariser, Sight, Term


class Drift(Regulariser):
    """See the module."""

    name: ClassVar[str] = 'drift'
    fields: ClassVar = (Field('weight', WEIGHT, 0.0, FIXED, 'weight of the pull to the colour'),)
    curves: ClassVar = {'drift': "distance of the samples' mean colour from the slow one"}
    rules: ClassVar = ((r'colour$', ()),)  # whole on every device

    def __init__(self, section: Any, teacher: Any):
        self.weight, self.channels = section.weight, teacher.latents.shape[-1]

    def init(self, key: jax.Array) -> dict[str, jax.Array]:
        return {'colour': jnp.zeros((self.channels,))}

    def student_term(self, x_hat: jax.Array, sight: Sight) -> Term:
        loss = _distance(x_hat, sight.own['colour'])
        return self.weight * loss, {'drift': loss}

    def critic_term(self, x: jax.Array, sight: Sight) -> Term:
        return _distance(x, sight.own['colour']), {}


def _distance(x: jax.Array, colour: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(jnp.mean(x, axis=(0, 1, 2)) - colour))


REGULARISER = Drift
