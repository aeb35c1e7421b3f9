"""The figures of the table, each a function of images or features.

Defined in words in docs/metrics.md. Images are ``[N, H, W, 3]`` fp32, nominally in [-1, 1].
"""

from collections.abc import Hashable, Sequence

import numpy as np
from skimage import color

from ddmd_jax.evaluation.moments import Moments, frechet

FRAME = 4  # pixels at the edge where `background` looks
NEAR = 0.12  # of a channel's range: what still counts as the background's colour


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance between two feature sets ``[N, D]`` as Gaussians; see `moments.frechet`."""
    return frechet(Moments.of(a), Moments.of(b))


def per_sample_std(images: np.ndarray) -> float:
    """Mean over images of the standard deviation of all their values: contrast, in units of 1."""
    return float(np.mean(np.std(images, axis=(1, 2, 3))))


def background(images: np.ndarray, steps: int = 8) -> np.ndarray:
    """The colour that most of a picture's frame has, ``[N, 3]`` in [0, 1] sRGB, clipped.

    Objects may touch the edge, so this is no plain average: it begins at the frame's median and
    moves `steps` times to the average of the pixels of the frame within `NEAR` of it (mean shift).
    """
    mask = np.ones(images.shape[1:3], bool)
    mask[FRAME:-FRAME, FRAME:-FRAME] = False
    pixels = np.clip(images[:, mask] / 2 + 0.5, 0, 1)
    centre = np.median(pixels, axis=1)
    for _ in range(steps):
        near = np.max(np.abs(pixels - centre[:, None]), axis=-1, keepdims=True) < NEAR
        near |= np.sum(near, axis=1, keepdims=True) == 0  # none: all of them
        centre = np.where(near, pixels, 0).sum(1) / near.sum(1)
    return centre


def average_colours(colours: np.ndarray, names: Sequence[Hashable]) -> dict[Hashable, np.ndarray]:
    """CIELAB average of the sRGB `colours` ``[N, 3]`` in [0, 1] of every name."""
    lab = color.rgb2lab(np.asarray(colours, np.float64)[:, None])[:, 0]
    of_name: dict[Hashable, list[np.ndarray]] = {}
    for name, value in zip(names, lab, strict=True):
        of_name.setdefault(name, []).append(value)
    return {name: np.mean(values, axis=0) for name, values in of_name.items()}


def average_colour_error(drawn: dict[Hashable, np.ndarray],
                         real: dict[Hashable, np.ndarray]) -> float:
    """Mean CIEDE2000 over the names of `drawn` between two results of `average_colours`."""
    pairs = [(value, real[name]) for name, value in drawn.items()]
    return float(np.mean([color.deltaE_ciede2000(a, b) for a, b in pairs]))


def pairwise_distance(features: np.ndarray, groups: Sequence[Hashable]) -> float | None:
    """How unlike one another the members of a group are.

    Args:
      features: ``[N, D]``.
      groups: N names; a name that comes once does not count.

    Returns:
      Euclidean distance, averaged over the pairs of a group, then over groups; None without pairs.
    """
    members: dict[Hashable, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    averages = []
    for rows in members.values():
        if (n := len(rows)) > 1:
            apart = np.linalg.norm(features[rows][:, None] - features[rows][None], axis=-1)
            averages.append(apart.sum() / (n * (n - 1)))
    return float(np.mean(averages)) if averages else None
