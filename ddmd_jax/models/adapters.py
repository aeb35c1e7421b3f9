"""Bindings: how trained parameters become a network's.

A program trains a tree and runs a network, and the two need not be the same tree: of a fully
fine-tuned student they are, of a LoRA student the tree holds adapters over the teacher's weights.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp

Params = Any  # a nested dict of arrays


class Binding(Protocol):
    """The trained part of a network, given the frozen weights that it starts from."""

    def init(self, base: Params) -> Params:
        """The tree to train, as it is at step 0."""

    def bind(self, base: Params, trained: Params) -> Params:
        """The network's parameters; runs inside a jitted program, gradients reach `trained`."""


class Full:
    """Full fine-tuning: the tree is the network's, and starts as an fp32 copy of the teacher's."""

    def init(self, base: Params) -> Params:
        # A copy, never an alias: the state's buffers are donated.
        return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32) + 0, base)

    def bind(self, base: Params, trained: Params) -> Params:
        return trained
