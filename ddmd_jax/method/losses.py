"""The losses of Decoupled DMD as pure functions of clean predictions, never of networks.

Shapes: samples and predictions are ``[B, ...]``. All arithmetic is fp32: near the clean end two
predictions differ by a few thousandths, below what bfloat16 resolves.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ddmd_jax.diffusion.process import expand_time

Array = jax.Array

NORMALISERS = ('per_term', 'dmd2', 'none')
WEIGHTINGS = ('velocity', 'clean', 'noise')
MIN_NOISE = 0.02  # noise weight 1 - tau below which velocity weighting grows no further


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Predictions:
    """Clean predictions ``[B, ...]`` fp32 on the re-noised sample of the student.

    `ca_*` at tau_CA, `dm_*` at tau_DM; `*_cond` and `ca_uncond` are the teacher's (s_real),
    `dm_fake` is the critic's (s_fake).
    """

    ca_cond: Array
    ca_uncond: Array
    dm_cond: Array
    dm_fake: Array


@dataclasses.dataclass(frozen=True)
class Normaliser:
    """How the two directions are divided, one sample at a time.

    'per_term' divides each by ``mean |x - x_hat_real_cond|`` at its own tau (the authors' answer
    to users). 'dmd2' divides both by ``mean |x - (x_hat_real_cond(tau_DM) + Delta_CA)|``: with a
    shared tau and noise that is the distance to the guided prediction, and the update DMD2's.
    'none' leaves them raw. No denominator is below `floor`, in units of x.
    """

    kind: str = 'per_term'
    floor: float = 0.02


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Directions:
    """Delta_CA and Delta_DM ``[B, ...]``, raw and normalised; how often the floor bound."""

    raw_ca: Array
    raw_dm: Array
    ca: Array
    dm: Array
    floor_hit_ca: Array
    floor_hit_dm: Array


def ca_direction(real_cond: Array, real_uncond: Array, alpha: float | Array) -> Array:
    """``Delta_CA = (alpha - 1) (s_real_cond - s_real_uncond)``, both at tau_CA: the "spear".

    The factor is alpha - 1, not alpha: alpha = 1 is no guidance and gives exactly zero. The
    predictions must be the plain ones; a sampler's rescaling of guidance has no place here.
    """
    return (alpha - 1.0) * (real_cond - real_uncond)


def dm_direction(real_cond: Array, fake_cond: Array) -> Array:
    """``Delta_DM = s_real_cond - s_fake_cond``, both at tau_DM, unguided: the "shield".

    Points from where the critic thinks the student's samples come from to where the teacher
    would have them; zero where the two agree.
    """
    return real_cond - fake_cond


def mean_distance(x: Array, x_hat_real: Array) -> Array:
    """``mean |x - x_hat_real|`` of each sample, ``[B]``."""
    gap = jnp.abs(x.astype(jnp.float32) - x_hat_real.astype(jnp.float32))
    return jnp.mean(gap, axis=tuple(range(1, gap.ndim)))


def normalise(direction: Array, denominator: Array, floor: float) -> tuple[Array, Array]:
    """(each sample divided by ``max(denominator [B], floor)``, share of samples it bound in)."""
    scale = jnp.maximum(denominator.astype(jnp.float32), floor)
    scale = scale.reshape(scale.shape + (1,) * (direction.ndim - 1))
    return direction.astype(jnp.float32) / scale, jnp.mean(denominator < floor)


def directions(x: Array, p: Predictions, alpha: float | Array,
               normaliser: Normaliser) -> Directions:
    """Delta_CA and Delta_DM at samples `x` ``[B, ...]``; no gradient flows into them.

    Raises:
      ValueError: unknown normaliser.
    """
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    # Cast before subtracting: bf16 predictions near one another would lose their difference.
    p = jax.tree.map(lambda a: jax.lax.stop_gradient(a).astype(jnp.float32), p)
    raw_ca = ca_direction(p.ca_cond, p.ca_uncond, alpha)
    raw_dm = dm_direction(p.dm_cond, p.dm_fake)
    if normaliser.kind == 'none':
        return Directions(raw_ca, raw_dm, raw_ca, raw_dm, jnp.zeros(()), jnp.zeros(()))
    if normaliser.kind == 'per_term':
        d_ca, d_dm = mean_distance(x, p.ca_cond), mean_distance(x, p.dm_cond)
    elif normaliser.kind == 'dmd2':
        d_ca = d_dm = mean_distance(x, p.dm_cond + raw_ca)
    else:
        raise ValueError(f'unknown normaliser {normaliser.kind!r}; known: {", ".join(NORMALISERS)}')
    ca, hit_ca = normalise(raw_ca, d_ca, normaliser.floor)
    dm, hit_dm = normalise(raw_dm, d_dm, normaliser.floor)
    return Directions(raw_ca, raw_dm, ca, dm, hit_ca, hit_dm)


def proxy_loss(x_hat: Array, direction: Array) -> Array:
    """``1/2 mean |x_hat - stop_gradient(x_hat + direction)|^2`` (DMD2's form), a scalar.

    Its gradient in `x_hat` is ``-direction / size``: descending it moves the sample *along* the
    direction. The value itself says nothing about progress.
    """
    target = jax.lax.stop_gradient(x_hat + direction)
    return 0.5 * jnp.mean(jnp.square(x_hat - target))


def critic_loss(x_hat_fake: Array, x: Array, tau: Array, weighting: str = 'velocity') -> Array:
    """The critic's denoising loss (Algorithm 1): mean squared error, a scalar.

    Args:
      x_hat_fake: the critic's clean prediction from ``renoise(x, tau)``.
      x: the student's sample, without gradient.
      tau: ``[B]`` noise levels, the paper's t.
      weighting: 'velocity' divides by ``(1 - tau)^2``, floored at MIN_NOISE: a flow-matching
        teacher's own loss. 'noise' is ``tau^2`` times that: the error of the noise that
        x_hat_fake stands for, which a variance-preserving teacher's own loss is of. 'clean' does
        not weigh.

    Raises:
      ValueError: unknown weighting.
    """
    error = jnp.square(x_hat_fake.astype(jnp.float32) - x.astype(jnp.float32))
    if weighting in ('velocity', 'noise'):
        tau = expand_time(tau, error)
        scale = tau if weighting == 'noise' else 1.0
        error = jnp.square(scale) * error / jnp.square(jnp.maximum(1.0 - tau, MIN_NOISE))
    elif weighting != 'clean':
        raise ValueError(f'unknown weighting {weighting!r}; known: {", ".join(WEIGHTINGS)}')
    return jnp.mean(error)
