"""A variance-preserving process with a table of discrete steps, mapped onto the package's flow.

The network's samples are ``x_vp = a x + s n`` with a = sqrt(abar), s = sqrt(1 - abar) of a table of
STEPS steps, 0 the cleanest. The package's are ``x_t = t x + (1 - t) n``. With

    t = a / (a + s)        x_vp = (a + s) x_t

one is the other rescaled, so that every step of the table has its t.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from ddmd_jax.diffusion.time import TimeMap

Array = jax.Array

STEPS = 100
_ABAR = np.cumprod(1 - np.linspace(1e-3, 0.09, STEPS))  # .011 at the last step: not pure noise
A, S = (np.sqrt(x).astype(np.float32) for x in (_ABAR, 1 - _ABAR))
T = A / (A + S)  # falling: .97 at step 0, .09 at the last


@dataclasses.dataclass(frozen=True)
class Table(TimeMap):
    """Uniform time to the t of a step of the table: no other level is ever asked of the network."""

    def __call__(self, u: Array | float) -> Array:
        """t of the steps from the last to 0, a STEPS-th of [0, 1] each; 1, clean, at its end."""
        rising = jnp.asarray(np.append(T[::-1], 1.0), jnp.float32)
        whole = jnp.asarray(u, jnp.float32) * STEPS + 1e-3  # .29 * 100 is 28.999998 in fp32
        return rising[jnp.floor(whole).astype(jnp.int32)]

    def first_input(self, noise: Array) -> Array:
        """Pure noise, as the network takes it at its last step, rescaled to the flow."""
        return noise / (A[-1] + S[-1])


def step_of(t: Array) -> Array:
    """The table's step nearest to times ``[B]``, int32."""
    return jnp.argmin(jnp.abs(t[:, None] - T), axis=1)


def clean(x_t: Array, step: Array, epsilon: Array) -> Array:
    """x_hat of flow samples ``[B, H, W, C]``, from the epsilon predicted at these steps ``[B]``."""
    at = lambda table: jnp.asarray(table)[step][:, None, None, None]
    return (network_input(x_t, step) - at(S) * epsilon) / at(A)


def network_input(x_t: Array, step: Array) -> Array:
    """Flow samples ``[B, H, W, C]`` as the network takes them: variance preserved."""
    return x_t * jnp.asarray(A + S)[step][:, None, None, None]
