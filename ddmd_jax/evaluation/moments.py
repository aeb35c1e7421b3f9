"""Mean and covariance of features that come in parts, and the Fréchet distance between two."""

from __future__ import annotations

import dataclasses

import numpy as np

Array = np.ndarray

BLOCK = 1024  # features that are added at a time


@dataclasses.dataclass(frozen=True)
class Moments:
    """Of `count` features of width D, in fp64: fifty thousand of them need never stand in memory.

    Attributes:
      count: how many.
      mean: ``[D]``.
      scatter: ``[D, D]``, the sum of ``(x - mean) (x - mean)'``.
    """

    count: int
    mean: Array
    scatter: Array

    @classmethod
    def of(cls, features: Array) -> Moments:
        """Of ``[N, D]``; N may be 0. No copy in fp64 of more than `BLOCK` of them is made."""
        found = cls(0, np.zeros(features.shape[1]), np.zeros((features.shape[1],) * 2))
        for start in range(0, len(features), BLOCK):
            x = np.asarray(features[start:start + BLOCK], np.float64)
            mean = x.mean(0)
            found = found.merge(cls(len(x), mean, (x - mean).T @ (x - mean)))
        return found

    def merge(self, other: Moments) -> Moments:
        """Of both together, as if they had come at once (Chan, Golub and LeVeque, 1979).

        Raises:
          ValueError: features of another width.
        """
        if self.mean.shape != other.mean.shape:
            raise ValueError(f'features of width {len(self.mean)} and {len(other.mean)}')
        count = self.count + other.count
        if count == 0:
            return self
        apart, share = other.mean - self.mean, other.count / count
        return Moments(count, self.mean + share * apart, self.scatter + other.scatter
                       + self.count * share * np.outer(apart, apart))

    @property
    def covariance(self) -> Array:
        """``[D, D]``, unbiased.

        Raises:
          ValueError: fewer than two features.
        """
        if self.count < 2:
            raise ValueError(f'a covariance wants two features at least, there is {self.count}')
        return self.scatter / (self.count - 1)


def frechet(a: Moments, b: Moments) -> float:
    """``|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))`` of two Gaussians.

    The last trace is the sum of the singular values of ``C_a^(1/2) C_b^(1/2)``, whose factors are
    symmetric eigendecompositions. Eigenvalues that rounding alone could have made are taken for 0:
    of fewer features than D most are, and their roots (1e-8 of 1e-16), a thousand times, would be
    an error that shows. A general square root, or the eigenvalues of ``C_a C_b``, are worse there.
    """
    roots = []
    for moments in (a, b):
        values, vectors = np.linalg.eigh(moments.covariance)
        real = values > values[-1] * len(values) * np.finfo(np.float64).eps
        roots.append(vectors[:, real] * np.sqrt(values[real]))
    cross = np.linalg.svd(roots[0].T @ roots[1], compute_uv=False).sum()
    traces = np.trace(a.covariance) + np.trace(b.covariance)
    return float(max(np.sum((a.mean - b.mean) ** 2) + traces - 2 * cross, 0.0))
