"""Distances between two sets of features that are no Gaussians': KID, CMMD, and neighbours.

Features are ``[N, D]``; all is computed in fp64, rows in blocks, so that memory grows with the
number of features and not with its square.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

Array = np.ndarray

BLOCK = 1024  # rows of a block of kernels or distances


def kid(a: Array, b: Array, subsets: int = 100, size: int = 1000,
        seed: int = 2020) -> tuple[float, float]:
    """Kernel inception distance: mean and standard deviation over subsets.

    Unbiased MMD^2 with the kernel ``(x y' / D + 1)^3`` (Bińkowski et al., arXiv 1801.01401), of
    `size` features of each, drawn as torch-fidelity draws them; of as many as there are, if fewer.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    size = min(size, len(a), len(b))
    if size < 2:
        raise ValueError('KID wants two features of each set at least')
    random = np.random.RandomState(seed)
    found = []
    for _ in range(subsets):
        x = a[random.choice(len(a), size, replace=False)]
        y = b[random.choice(len(b), size, replace=False)]
        inner = [k.sum() - np.trace(k) for k in (_cubic(x, x), _cubic(y, y))]
        found.append(sum(inner) / (size * (size - 1)) - 2 * _cubic(x, y).mean())
    return float(np.mean(found)), float(np.std(found))


def _cubic(x: Array, y: Array) -> Array:
    return (x @ y.T / x.shape[1] + 1) ** 3


def cmmd(a: Array, b: Array, sigma: float = 10.0, scale: float = 1000.0) -> float:
    """CMMD (Jayasumana et al., arXiv 2401.09603): MMD^2 of CLIP's normed embeddings, times 1000.

    Biased, as the published code has it; kernel ``exp(-|x - y|^2 / (2 sigma^2))``.
    """
    kernel = lambda d: np.exp(d / (-2 * sigma**2))
    return float(scale * (_mean(a, a, kernel) + _mean(b, b, kernel) - 2 * _mean(a, b, kernel)))


def _mean(a: Array, b: Array, kernel: Callable[[Array], Array]) -> float:
    return sum(kernel(d).sum() for d in _squared(a, b)) / (len(a) * len(b))


def neighbours(real: Array, drawn: Array, nearest: int = 5) -> dict[str, float]:
    """Precision, recall, density and coverage by the balls of the `nearest` neighbours.

    Precision is the share of drawn pictures in the ball of some real one, recall the reverse
    (Kynkäänniemi et al., arXiv 1904.06991, and torch-fidelity, whose `nearest` is 3; a ball has its
    rim). Density counts in how many of the real balls a drawn picture lies, over `nearest`;
    coverage is the share of real pictures with a drawn one in their ball (Naeem et al., arXiv
    2002.09797, and its package prdc: `nearest` 5, and balls without their rim).

    Raises:
      ValueError: no more than `nearest` features in a set.
    """
    if min(len(real), len(drawn)) <= nearest:
        raise ValueError(f'{nearest} neighbours want more features than {nearest} in each set')
    radius = {name: np.concatenate([np.partition(d, nearest, axis=1)[:, nearest]
                                    for d in _squared(x, x)])  # itself is the first
              for name, x in (('real', real), ('drawn', drawn))}
    precision = density = recall = covered = 0
    for d in _squared(drawn, real):
        precision += int(np.sum(np.any(d <= radius['real'], axis=1)))
        density += int(np.sum(d < radius['real']))
    start = 0
    for d in _squared(real, drawn):
        recall += int(np.sum(np.any(d <= radius['drawn'], axis=1)))
        covered += int(np.sum(d.min(1) < radius['real'][start:start + len(d)]))
        start += len(d)
    return {'precision': precision / len(drawn), 'recall': recall / len(real),
            'density': density / (nearest * len(drawn)), 'coverage': covered / len(real)}


def _squared(a: Array, b: Array) -> Iterator[Array]:
    """Squared distances ``[BLOCK, len(b)]`` of the rows of `a`, block by block."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    lengths = np.sum(b**2, axis=1)
    for start in range(0, len(a), BLOCK):
        x = a[start:start + BLOCK]
        found = np.sum(x**2, axis=1)[:, None] + lengths - 2 * (x @ b.T)
        yield np.maximum(found, 0, out=found)
