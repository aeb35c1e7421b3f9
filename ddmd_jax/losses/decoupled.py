"""The whole update: CA + DM, each normalised, weighted and turned into a proxy loss."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from ddmd_jax.losses.cfg_augmentation import ca_direction
from ddmd_jax.losses.distribution_matching import dm_direction
from ddmd_jax.losses.normalise import distance, normalise
from ddmd_jax.losses.proxy import proxy_loss

Array = jax.Array

NORMALISERS = ('per_term', 'dmd2', 'none')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Predictions:
    """Clean predictions ``[B, ...]`` fp32 on the re-noised student sample.

    `ca_*` at tau_CA, `dm_*` at tau_DM; `*_cond` and `ca_uncond` are the teacher's, `dm_fake`
    the critic's.
    """

    ca_cond: Array
    ca_uncond: Array
    dm_cond: Array
    dm_fake: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Update:
    """Directions before normalisation, after it, and the rates at which floors bound."""

    raw_ca: Array
    raw_dm: Array
    ca: Array
    dm: Array
    floor_hit_ca: Array
    floor_hit_dm: Array


def decoupled_update(x: Array, p: Predictions, *, alpha: float | Array, normaliser: str,
                     floor: float) -> Update:
    """Delta_CA and Delta_DM for samples `x` ``[B, ...]``, in fp32.

    `normaliser`: 'per_term' divides each term by ``mean |x - x_hat_real_cond|`` at its own
    tau (the authors' answer to users); 'dmd2' divides both by
    ``mean |x - (x_hat_real_cond(tau_DM) + Delta_CA)|``, which with shared tau and noise is the
    distance to the guided prediction and makes the update DMD2's; 'none' leaves them raw.

    Raises:
      ValueError: unknown normaliser.
    """
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    # bf16 predictions near one another would lose their difference if subtracted as they are.
    p = jax.tree.map(lambda a: jax.lax.stop_gradient(a).astype(jnp.float32), p)
    raw_ca = ca_direction(p.ca_cond, p.ca_uncond, alpha)
    raw_dm = dm_direction(p.dm_cond, p.dm_fake)
    if normaliser == 'none':
        return Update(raw_ca, raw_dm, raw_ca, raw_dm, jnp.zeros(()), jnp.zeros(()))
    if normaliser == 'per_term':
        d_ca, d_dm = distance(x, p.ca_cond), distance(x, p.dm_cond)
    elif normaliser == 'dmd2':
        d_ca = d_dm = distance(x, p.dm_cond + raw_ca)
    else:
        raise ValueError(f'unknown normaliser {normaliser!r}; known: {", ".join(NORMALISERS)}')
    ca, hit_ca = normalise(raw_ca, d_ca, floor)
    dm, hit_dm = normalise(raw_dm, d_dm, floor)
    return Update(raw_ca, raw_dm, ca, dm, hit_ca, hit_dm)


def decoupled_loss(x_hat: Array, update: Update, weight_ca: float, weight_dm: float) -> Array:
    """Proxy loss of ``weight_ca Delta_CA + weight_dm Delta_DM``; gradient reaches `x_hat` only."""
    return proxy_loss(x_hat, weight_ca * update.ca + weight_dm * update.dm)
