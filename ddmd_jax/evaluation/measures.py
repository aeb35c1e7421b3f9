"""The figures of the table, each a function of images or features.

Defined in words in docs/metrics.md. Images are ``[N, H, W, 3]`` fp32, nominally in [-1, 1].
"""

import numpy as np
from skimage import color

BORDER = 2  # pixels at the edge that every render leaves plain


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """``|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))`` of two feature sets ``[N, D]``.

    The trace of the square root is taken from the eigenvalues of ``C_a^(1/2) C_b C_a^(1/2)``,
    which is symmetric: `eigh` stays real where a general matrix square root does not.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    mean = np.sum((a.mean(0) - b.mean(0)) ** 2)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ cov_b @ root), 0, None)).sum()
    return float(mean + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def drawn_background(images: np.ndarray) -> np.ndarray:
    """Median colour of the plain border, ``[N, 3]`` in [0, 1] sRGB, clipped as a screen would."""
    mask = np.ones(images.shape[1:3], bool)
    mask[BORDER:-BORDER, BORDER:-BORDER] = False
    return np.clip(np.median(images[:, mask], axis=1) / 2 + 0.5, 0, 1)


def colour_error(images: np.ndarray, asked: np.ndarray) -> float:
    """Mean CIEDE2000 between the asked background (``[N, 3]``, 0-255) and the drawn one."""
    lab = lambda rgb: color.rgb2lab(rgb[:, None])[:, 0]
    drawn = lab(drawn_background(images).astype(np.float64))
    return float(np.mean(color.deltaE_ciede2000(lab(np.asarray(asked, np.float64) / 255), drawn)))


def image_variance(images: np.ndarray) -> float:
    """Mean over images of the variance of all their pixel values: what over-baking inflates."""
    return float(np.mean(np.var(images, axis=(1, 2, 3))))
