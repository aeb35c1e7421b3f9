"""How one parameter of ours is called, and laid out, in a published PyTorch checkpoint.

A family has a function ``path -> Entry`` over our flattened parameter paths for each published
network. It is the only map: import reads by it, export writes by it.
"""

import dataclasses
from typing import Any

import numpy as np

# Our axes, in the order in which PyTorch stores them; 'same' is ours.
LAYOUTS: dict[str, tuple[int, ...]] = {
    'linear': (1, 0),  # [in, out] -> [out, in]
    'conv': (3, 2, 0, 1),  # [H, W, in, out] -> [out, in, H, W]
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A published tensor: `name` (``{}`` stands for the layer of a stack) and `layout`."""

    name: str
    layout: str = 'same'

    @property
    def stacked(self) -> bool:
        return '{}' in self.name

    def names(self, shape: tuple[int, ...]) -> list[str]:
        """Every published tensor that our leaf of this `shape` is made of."""
        return [self.name.format(i) for i in range(shape[0])] if self.stacked else [self.name]

    def _order(self, ndim: int) -> tuple[int, ...]:
        return LAYOUTS.get(self.layout, tuple(range(ndim)))

    def shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of each published tensor, given our leaf's."""
        return self.slices(ours[1:] if self.stacked else ours)

    def slices(self, ours: tuple[Any, ...]) -> tuple[Any, ...]:
        """The part of a published tensor that holds the part `ours` of one layer."""
        return tuple(ours[axis] for axis in self._order(len(ours)))

    def to_theirs(self, x: np.ndarray) -> np.ndarray:
        """One layer of ours in the published layout."""
        return x.transpose(self._order(x.ndim))

    def to_ours(self, x: np.ndarray) -> np.ndarray:
        """Inverse of `to_theirs`."""
        return x.transpose(np.argsort(self._order(x.ndim)))
