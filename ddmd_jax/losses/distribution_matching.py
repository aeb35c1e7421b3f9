"""Distribution matching, the regulariser of DMD ("shield"): paper, eq. for Delta_DM."""

from __future__ import annotations

import jax

Array = jax.Array


def dm_direction(real_cond: Array, fake_cond: Array) -> Array:
    """``x_hat_real_cond - x_hat_fake_cond``, both at tau_DM, both with the prompt, unguided.

    Points from where the critic thinks the student's samples come from to where the teacher
    would have them. Zero when critic and teacher agree. Both are ``[B, ...]``.
    """
    return real_cond - fake_cond
