"""CFG augmentation, the engine of DMD ("spear"): paper, eq. for Delta_CA."""

from __future__ import annotations

import jax

Array = jax.Array


def ca_direction(real_cond: Array, real_uncond: Array, alpha: float | Array) -> Array:
    """``(alpha - 1) (x_hat_real_cond - x_hat_real_uncond)``, both at tau_CA.

    The factor is alpha - 1, not alpha: alpha = 1 is no guidance and gives exactly zero. The
    prediction must be the plain one; a sampler's guidance rescaling has no place here.

    Args:
      real_cond, real_uncond: teacher's clean predictions ``[B, ...]`` with prompt and with
        the null prompt, on the same noisy input.
      alpha: guidance scale, scalar or broadcastable to ``[B, ...]``.
    """
    return (alpha - 1.0) * (real_cond - real_uncond)
