"""How one parameter of ours is called, and laid out, in a published PyTorch checkpoint.

A family has a function ``path -> Entry`` over our flattened parameter paths for each published
network. It is the only map: import reads by it, export writes by it.
"""

import dataclasses

import numpy as np

# Our axes, in the order in which PyTorch stores them.
LAYOUTS: dict[str, tuple[int, ...] | None] = {
    'same': None,
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

    def shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of each published tensor, given our leaf's."""
        inner = ours[1:] if self.stacked else ours
        order = LAYOUTS[self.layout]
        return tuple(inner) if order is None else tuple(inner[axis] for axis in order)

    def to_theirs(self, x: np.ndarray) -> np.ndarray:
        """One layer of ours in the published layout."""
        order = LAYOUTS[self.layout]
        return x if order is None else x.transpose(order)

    def to_ours(self, x: np.ndarray) -> np.ndarray:
        """Inverse of `to_theirs`."""
        order = LAYOUTS[self.layout]
        return x if order is None else x.transpose(np.argsort(order))

    def slices(self, ours: tuple[slice, ...]) -> tuple[slice, ...]:
        """The part of a published tensor that holds the part `ours` of one layer."""
        order = LAYOUTS[self.layout]
        return ours if order is None else tuple(ours[axis] for axis in order)
