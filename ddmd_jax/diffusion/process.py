"""Flow matching in the paper's time: t = 0 is pure noise, t = 1 is clean data.

Every function here is a pure map of arrays. Published checkpoints use other
conventions (sigma = 1 - t, a negated output, integer steps); those are converted in
the teacher's own file, and callers need not know them.

Shapes: `x`, `noise` are ``[B, ...]``; `t` is ``[B]`` or a scalar, broadcast over the
trailing axes. All arithmetic is done in fp32: near t = 1 the noise weight `1 - t` is a
few hundredths, which bfloat16 rounds by as much as 20 %.
"""

import jax
import jax.numpy as jnp

Array = jax.Array


def expand_time(t: Array | float, like: Array) -> Array:
    """Reshapes times ``[B]`` (or a scalar) to broadcast against ``like`` ``[B, ...]``."""
    t = jnp.asarray(t, jnp.float32)
    return t.reshape(t.shape + (1,) * (like.ndim - t.ndim)) if t.ndim else t


def renoise(x: Array, t: Array, noise: Array) -> Array:
    """Forward process ``x_t = t x + (1 - t) noise`` (paper, section 2), in fp32."""
    x = x.astype(jnp.float32)
    t = expand_time(t, x)
    return t * x + (1.0 - t) * noise.astype(jnp.float32)


def velocity(x: Array, noise: Array) -> Array:
    """The flow's velocity ``v = x - noise``: what a flow-matching network regresses."""
    return x.astype(jnp.float32) - noise.astype(jnp.float32)


def to_clean(x_t: Array, v: Array, t: Array) -> Array:
    """Clean prediction ``x_hat = x_t + (1 - t) v`` from a velocity, in fp32."""
    x_t = x_t.astype(jnp.float32)
    return x_t + (1.0 - expand_time(t, x_t)) * v.astype(jnp.float32)


def to_velocity(x_t: Array, x_hat: Array, t: Array, min_noise: float = 1e-3) -> Array:
    """Inverse of `to_clean`; `1 - t` is floored at `min_noise` so that t = 1 is finite."""
    x_t = x_t.astype(jnp.float32)
    gap = jnp.maximum(1.0 - expand_time(t, x_t), min_noise)
    return (x_hat.astype(jnp.float32) - x_t) / gap


def preserved(t: Array | float, like: Array) -> Array:
    """``sqrt(t^2 + (1 - t)^2)``, the factor from a variance-preserving sample to the flow's x_t.

    A sample ``x_vp = a x + s noise`` with ``a^2 + s^2 = 1`` is the flow's at ``t = a / (a + s)``
    but for a factor: ``x_t = x_vp / (a + s)``. Broadcasts against ``like [B, ...]`` as
    `expand_time`.
    """
    t = expand_time(t, like)
    return jnp.sqrt(jnp.square(t) + jnp.square(1.0 - t))


def noise_to_clean(x_t: Array, noise: Array, t: Array) -> Array:
    """Clean prediction ``x_hat = (x_t - (1 - t) noise) / t`` from one of the noise, in fp32; t > 0.

    In a variance-preserving sample's terms ``(x_vp - s noise) / a``.
    """
    x_t = x_t.astype(jnp.float32)
    t = expand_time(t, x_t)
    return (x_t - (1.0 - t) * noise.astype(jnp.float32)) / t
