"""Networks and PRNG keys of the objectives, by name."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ddmd_jax.data.batch import Cond
from ddmd_jax.diffusion.sampling import Predict, deinterleave, interleave

Array = jax.Array
Params = Any  # a nested dict of arrays

# How the teacher's two or three predictions of an update are made: in one call, or one after
# another in the memory of one. They are equal but for rounding.
TEACHER_PASSES = ('together', 'apart')


@dataclasses.dataclass(frozen=True)
class Models:
    """One network architecture, and the parameters that no gradient reaches.

    Attributes:
      predict: ``(params, x_t [B, ...], t [B], cond) -> x_hat`` in fp32.
      teacher: s_real's parameters.
      null: the null prompt's conditioning, one row.
      extra: parameters of the regularisers that have some, by name.
      teacher_passes: one of `TEACHER_PASSES`.
    """

    predict: Predict
    teacher: Params
    null: Cond
    extra: Mapping[str, Params] = dataclasses.field(default_factory=dict)
    teacher_passes: str = 'together'

    def teach(self, inputs: Sequence[tuple[Array, Array, Cond]]) -> Sequence[Array]:
        """The teacher's predictions of several ``(x_t [B, ...], t [B], cond)``."""
        if self.teacher_passes == 'apart':
            stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *inputs)
            return list(jax.lax.map(lambda one: self.predict(self.teacher, *one), stacked))
        return deinterleave(self.predict(self.teacher, *interleave(*inputs)), len(inputs))


class GeneratorKeys(NamedTuple):
    """Keys of one generator objective.

    Keys are derived as in every run so far, so that its draws come again. JAX's `fold_in(key, i)`
    equals `split(key)[i]`: alpha's key is the parent of the levels' two. A regulariser's folded
    key would equal a noise's, so it gets that key's two children.
    """

    simulation: Array
    levels: tuple[Array, Array]  # of tau_CA and of tau_DM
    noise_ca: Array
    noise_dm: Array
    alpha: Array
    regularisers: Callable[[int], Array]  # two for each, by their place

    @classmethod
    def of(cls, key: Array) -> GeneratorKeys:
        simulation, levels, noise_ca, noise_dm = jax.random.split(key, 4)
        level_ca, level_dm = jax.random.split(levels)
        return cls(simulation, (level_ca, level_dm), noise_ca, noise_dm,
                   jax.random.fold_in(key, 1), functools.partial(_own_keys, key))


class CriticKeys(NamedTuple):
    """Keys of one critic objective; see `GeneratorKeys`."""

    simulation: Array
    level: Array
    noise: Array
    regularisers: Callable[[int], Array]  # two for each, by their place

    @classmethod
    def of(cls, key: Array) -> CriticKeys:
        simulation, level, noise = jax.random.split(key, 3)
        return cls(simulation, level, noise, functools.partial(_own_keys, key))


def _own_keys(key: Array, place: int) -> Array:
    return jax.random.split(jax.random.fold_in(key, 2 + place))
