"""Batches and conditioning."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

# Arrays by name with one row an example: 'embeds' [B, L, D] and 'mask' [B, L] bool (True for real
# tokens) of every family, and whatever else conditions its network, such as 'pooled' [B, D].
Cond = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class CondField:
    """One array of a `Cond`: its shape without the batch (and token) axes, and its dtype.

    `of_shape` gives it for latents ``(H, W, C)``, where it says how large an image is and nothing
    of what is on it.
    """

    shape: tuple[int, ...] = ()
    dtype: Any = jnp.float32
    per_token: bool = True
    of_shape: Callable[[Sequence[int]], Sequence[Any]] | None = None


@dataclasses.dataclass(frozen=True)
class CondSpec:
    """Names and shapes of what conditions a network; of most, `CondSpec.text(width)`."""

    fields: Mapping[str, CondField]

    @classmethod
    def text(cls, width: int, **more: CondField) -> CondSpec:
        """Token states ``embeds [B, L, width]`` and their mask, and `more` arrays by name."""
        return cls({'embeds': CondField((width,)), 'mask': CondField(dtype=bool), **more})

    @property
    def width(self) -> int:
        """D of the token states."""
        return self.fields['embeds'].shape[-1]

    def shapes(self, rows: int, tokens: int, dtype: Any = jnp.float32) -> Cond:
        """A `Cond` of `ShapeDtypeStruct`s; `dtype` is that of its floats."""
        def one(field: CondField) -> jax.ShapeDtypeStruct:
            shape = (rows, tokens) if field.per_token else (rows,)
            kind = dtype if jnp.issubdtype(field.dtype, jnp.floating) else field.dtype
            return jax.ShapeDtypeStruct((*shape, *field.shape), kind)

        return {name: one(field) for name, field in self.fields.items()}

    def of_shape(self, rows: int, shape: Sequence[int]) -> Cond:
        """What follows from the size of `rows` latents ``(H, W, C)``, in the host's memory."""
        return {name: np.tile(np.asarray(field.of_shape(shape), field.dtype), (rows, 1))
                for name, field in self.fields.items() if field.of_shape}


@functools.partial(jax.tree_util.register_dataclass, data_fields=['cond', 'real', 'z', 'x'],
                   meta_fields=['shape'])
@dataclasses.dataclass(frozen=True)
class Batch:
    """Prompts of one update, a pytree.

    Attributes:
      cond: their conditioning; before the text encoder ran, their tokens.
      real: real latents ``[B, H, W, C]`` of the same prompts, where a GAN asks for them.
      shape: of one latent, ``(H, W, C)``; static.
      z: what goes into the student's steps ``[B, H, W, C]``, where it is simulated already: the
        generator's update starts there.
      x: a sample of the student ``[B, H, W, C]``, where there is one: the critic's update learns
        from it.
    """

    cond: Cond
    real: Any = None
    shape: tuple[int, ...] = ()
    z: Any = None
    x: Any = None

    @property
    def rows(self) -> int:
        """B, the examples."""
        return jax.tree.leaves(self.cond)[0].shape[0]

    @property
    def latents(self) -> jax.ShapeDtypeStruct:
        """Shape of a latent for every row: of the student's inputs and of its samples."""
        return jax.ShapeDtypeStruct((self.rows, *self.shape), jnp.float32)

    @property
    def signature(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of everything: batches of one signature go through one compiled program."""
        return self.shape, *(x.shape for x in jax.tree.leaves(self))


def zeros(null: Cond) -> Cond:
    """The null prompt as zeros: of every float, as arrays or shapes; the mask is as it was."""
    one = lambda x: np.zeros(x.shape, x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
    return jax.tree.map(one, null)


# Null prompts by name, each made of the encoded empty text: that (the paper's Algorithm 1), or
# zeros of its shape (what DMD2's code gives SDXL).
NULLS: dict[str, Callable[[Cond], Cond]] = {'encoded': lambda null: null, 'zeros': zeros}


def null_like(null: Cond, cond: Cond) -> Cond:
    """The null prompt's one row, repeated for every row of `cond`, with as many tokens.

    Only padding is cut: no batch has fewer tokens than the null prompt (`check_buckets`). Where
    it has more, the null prompt is padded with zeros, which its mask leaves out. What
    the null prompt does not say, as it is no text, stays an example's own (SDXL's sizes).
    """
    def one(n: Array, c: Array) -> Array:
        if n.ndim > 1 and n.shape[1] != c.shape[1]:
            n = n[:, :c.shape[1]]
            short = c.shape[1] - n.shape[1]
            n = jnp.pad(n, [(0, 0), (0, short), *[(0, 0)] * (n.ndim - 2)])
        return jnp.broadcast_to(n, c.shape)

    return {name: one(null[name], c) if name in null else c for name, c in cond.items()}
