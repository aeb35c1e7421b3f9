"""Bindings: how trained parameters become a network's.

A program trains a tree and runs a network, and the two need not be the same tree: of a fully
fine-tuned student they are, of a LoRA student the tree holds factors A and B for some kernels of
the frozen teacher, and the network has ``W + (alpha / rank) A B`` in their place (Hu et al. 2021,
arXiv 2106.09685; its ``B A``, as kernels here are ``[in, out]``).

A bound kernel is `Adapted`: base and factors side by side. `layers.Linear` multiplies by each; what
else asks for the kernel has the sum made there, layer by layer of a stack, so that no second copy
of the base is held. Hence to bind costs nothing, inside a program or outside.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from ddmd_jax.parallel.sharding import FACTORS
from ddmd_jax.util.errors import UserError
from ddmd_jax.weights import flat
from ddmd_jax.weights.lora import Factors

Array = jax.Array
Params = Any  # a nested dict of arrays
KERNEL = '/kernel'
A, B = FACTORS


class AdapterError(UserError, ValueError):
    """Adapters that do not fit the network they are for."""


class Binding(Protocol):
    """The trained part of a network, given the frozen weights that it starts from."""

    @property
    def leans(self) -> bool:
        """Whether `bind` needs the values of `base`."""

    def init(self, base: Params, key: Array) -> Params:
        """The tree to train, as it is at step 0: the network is the base then."""

    def bind(self, base: Params, trained: Params) -> Params:
        """The network's parameters; gradients reach `trained`."""


@dataclasses.dataclass(frozen=True)
class Full:
    """Full fine-tuning: the tree is the network's, and starts as an fp32 copy of the teacher's."""

    leans = False

    def init(self, base: Params, key: Array) -> Params:
        # A copy, never an alias: the state's buffers are donated.
        return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32) + 0, base)

    def bind(self, base: Params, trained: Params) -> Params:
        return trained


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Low-rank adapters of some kernels; everything else stays the base's.

    Attributes:
      rank: columns of A and rows of B, of every kernel.
      scale: ``alpha / rank``, which the product is multiplied by.
      targets: regular expressions, searched one after another in a module's path
        (``layers/attn/to_q``). The first that is found decides: the module's kernel is adapted, or
        is left out if the expression begins with ``-``. Where none is found it is left out.
    """

    rank: int
    scale: float
    targets: tuple[str, ...]

    leans = True

    def kernels(self, base: Params) -> dict[str, Any]:
        """The adapted leaves of a tree of arrays or shapes, by path.

        Raises:
          AdapterError: a target that no module matches, or a kernel of lower rank than `rank`.
        """
        kernels = {path: leaf for path, leaf in flat.flatten(base).items()
                   if path.endswith(KERNEL)}
        modules = {path: path.removesuffix(KERNEL) for path in kernels}
        for pattern in self.targets:
            if not any(re.search(pattern.removeprefix('-'), name) for name in modules.values()):
                last = sorted({name.rpartition('/')[2] for name in modules.values()})
                raise AdapterError(f'adapter.targets: {pattern!r} matches no module of the '
                                   f"teacher's; its modules end in {', '.join(last)}")

        def taken(name: str) -> bool:
            found = next((p for p in self.targets if re.search(p.removeprefix('-'), name)), '-')
            return not found.startswith('-')

        found = {path: leaf for path, leaf in kernels.items() if taken(modules[path])}
        if not found:
            raise AdapterError(f'adapter.targets {self.targets} leave out every module')
        for path, leaf in found.items():
            (*taps, din), dout = leaf.shape[stacked(leaf):-1], leaf.shape[-1]
            if self.rank > (most := min(math.prod(taps) * din, dout)):
                raise AdapterError(f'adapter.rank {self.rank} is above {most}, the rank of '
                                   f'{modules[path]} {tuple(leaf.shape)}; lower it, or leave that '
                                   f"module out with a first target '-{modules[path]}$'")
        return found

    def init(self, base: Params, key: Array) -> Params:
        """A uniform within ``1 / sqrt(inputs)``, as PEFT's; B zero."""
        tree = {}
        for path, leaf in self.kernels(base).items():
            a, b = factor_shapes(leaf, self.rank)
            bound = 1 / math.sqrt(math.prod(a[stacked(leaf):-1]))
            own = jax.random.fold_in(key, zlib.crc32(path.encode()))
            tree[f'{path}/{A}'] = jax.random.uniform(own, a, jnp.float32, -bound, bound)
            tree[f'{path}/{B}'] = jnp.zeros(b, jnp.float32)
        return flat.unflatten(tree)

    def bind(self, base: Params, trained: Params) -> Params:
        factors = flat.flatten(trained)
        kernels = sorted({name.rpartition('/')[0] for name in factors})
        return over(base, {path: (factors[f'{path}/{A}'], factors[f'{path}/{B}'])
                           for path in kernels}, self.scale)

    def start(self, base: Params, key: Array, given: Factors) -> Params:
        """As `init`, but for kernels whose factors are `given` (`weights.lora.read`).

        Those may be of a lower rank, or lack a layer: what is zero in both factors is begun afresh
        in A, as no gradient would reach it otherwise. The product is what is given.

        Raises:
          AdapterError: kernels that are not adapted here, or factors of a higher rank.
        """
        if other := sorted(set(given) - set(self.kernels(base))):
            raise AdapterError(f'it adapts {other[0].removesuffix(KERNEL)}, which adapter.targets '
                               'leave out')
        tree = flat.flatten(self.init(base, key))
        for path, (down, up) in given.items():
            if (rank := down.shape[-1]) > self.rank:
                raise AdapterError(f'it has rank {rank} at {path.removesuffix(KERNEL)}, '
                                   f'adapter.rank is {self.rank}')
            fresh = tree[f'{path}/{A}']
            a = jnp.zeros_like(fresh).at[..., :rank].set(down)
            b = jnp.zeros_like(tree[f'{path}/{B}']).at[..., :rank, :].set(up / self.scale)
            inputs = tuple(range(stacked(fresh), a.ndim - 1))
            outputs = tuple(axis for axis in range(stacked(fresh), b.ndim) if axis != b.ndim - 2)
            given_here = jnp.any(a != 0, inputs) | jnp.any(b != 0, outputs)  # [(layers,) rank]
            shape = (*given_here.shape[:-1], *(1,) * len(inputs), self.rank)
            tree[f'{path}/{A}'] = jnp.where(given_here.reshape(shape), a, fresh)
            tree[f'{path}/{B}'] = b
        return flat.unflatten(tree)


def over(base: Params, factors: Mapping[str, tuple[Any, Any]], scale: float = 1.0) -> Params:
    """`base` with the kernels at those paths adapted."""
    leaves = flat.flatten(base)
    adapted = {path: Adapted(leaves[path], a, b, scale) for path, (a, b) in factors.items()}
    return flat.unflatten(leaves | adapted)


def stacked(kernel: Any) -> int:
    """1 if a kernel's first axis counts the layers of a stack, else 0.

    Kernels are ``[in, out]``, of convolutions ``[height, width, in, out]``.
    """
    return kernel.ndim % 2


def factor_shapes(kernel: Any, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of A ``[..., in, rank]`` and of B ``[..., rank, out]``, which has taps of 1 x 1."""
    *lead, dout = kernel.shape
    layers, taps = lead[:stacked(kernel)], len(lead) - 1 - stacked(kernel)
    return (*lead, rank), (*layers, *(1,) * taps, rank, dout)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted:
    """The array ``base + scale A B``, made when it is asked for.

    `jax.numpy` takes it for the array, and so does `nnx`.
    """

    base: Array
    lora_A: Array
    lora_B: Array
    scale: float = dataclasses.field(metadata={'static': True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def ndim(self) -> int:
        return len(self.base.shape)

    @property
    def dtype(self) -> Any:
        return jnp.promote_types(self.base.dtype, self.lora_A.dtype)

    def merged(self) -> Array:
        return _merge(self.base, self.lora_A, self.lora_B, self.scale)

    def __jax_array__(self) -> Array:
        return self.merged()

    def __getitem__(self, index: Any) -> Array:
        return self.merged()[index]


# Recomputed for a gradient whatever a layer's own policy keeps: the product of two small factors
# is as large as the kernel, and as cheap as one of a few tokens.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=3,
                       policy=jax.checkpoint_policies.nothing_saveable)
def _merge(base: Array, a: Array, b: Array, scale: float) -> Array:
    return base + scale * (a @ b)


def materialised(params: Params) -> Params:
    """Bound parameters as plain arrays: inside a program."""
    is_adapted = lambda x: isinstance(x, Adapted)
    return jax.tree.map(lambda x: x.merged() if is_adapted(x) else x, params, is_leaf=is_adapted)


def unbound(params: Params) -> Params:
    """What was bound, of bound parameters: the factors, or everything if nothing is adapted."""
    factors = {path: leaf for path, leaf in flat.flatten(params).items()
               if path.rpartition('/')[2] in FACTORS}
    return flat.unflatten(factors) if factors else params


def from_section(section: Mapping[str, Any] | None) -> Binding:
    """What a config's section ``student.adapter`` or ``critic.adapter`` says; None is `Full`."""
    if not section or section['kind'] == 'full':
        return Full()
    alpha = section.get('alpha')
    return LoRA(section['rank'], (alpha or section['rank']) / section['rank'],
                tuple(_in_order(section['targets'])))


def _in_order(values: Sequence[str] | Mapping[str, str]) -> Sequence[str]:
    """A sequence, or one that a manifest has by places."""
    if isinstance(values, Mapping):
        return [values[place] for place in sorted(values, key=int)]
    return values
