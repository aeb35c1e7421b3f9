"""How each published scorer makes pixels of a picture: cropping, resampling, rounding.

Every function takes a picture ``[H, W, 3] uint8`` and keeps to its reference to the last bit; `hps`
to 1e-6, as torch's own sums of floats depend on the CPU. They differ in what looks like nothing:
on which side an odd row is cut off, whether what is resampled is bytes or floats, whether the
filter widens with the scale. Scores move with all of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from ddmd_jax.util.errors import UserError

MEAN = np.asarray([0.48145466, 0.4578275, 0.40821073], np.float32)  # CLIP's, of [0, 1]
DEVIATION = np.asarray([0.26862954, 0.26130258, 0.27577711], np.float32)
BICUBIC, LANCZOS = Image.Resampling.BICUBIC, Image.Resampling.LANCZOS
INCEPTION = 299  # side of Inception's pictures


class ImageError(UserError):
    """A picture that cannot be scored; the message says why."""


def check(image: np.ndarray) -> np.ndarray:
    """Raises `ImageError` unless `image` is ``[H, W, 3] uint8`` with H, W > 0; else returns it."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or 0 in image.shape:
        raise ImageError(f'a picture is {image.dtype} {image.shape}, expected uint8 '
                         '(height, width, 3); convert it to RGB first')
    return image


def resize(image: np.ndarray, size: tuple[int, int], how: Image.Resampling) -> np.ndarray:
    """``[H, W, 3] uint8 -> [*size, 3] uint8`` by Pillow; `size` is (height, width)."""
    return np.asarray(Image.fromarray(check(image)).resize(size[::-1], how))


def _even(rest: int) -> int:
    """Where torchvision's crop begins: half the rest, rounded to even (1 -> 0, 3 -> 2)."""
    return round(rest / 2)


def _down(rest: int) -> int:
    """Where other crops begin: half the rest, rounded down (1 -> 0, 3 -> 1)."""
    return rest // 2


def _middle(image: np.ndarray, begin: Callable[[int], int]) -> np.ndarray:
    return _crop(image, min(check(image).shape[:2]), begin)


def _crop(image: np.ndarray, size: int, begin: Callable[[int], int]) -> np.ndarray:
    top, left = (begin(n - size) for n in image.shape[:2])
    return image[top:top + size, left:left + size]


def _short_side(image: np.ndarray, size: int, how: Image.Resampling) -> np.ndarray:
    """The shorter side becomes `size`, the longer is rounded down (torchvision, transformers)."""
    height, width = check(image).shape[:2]
    short = min(height, width)
    to = lambda n: size if n == short else int(size * n / short)
    return resize(image, (to(height), to(width)), how)


def _normal(pixels: np.ndarray) -> np.ndarray:
    """``[.., 3] fp32`` in [0, 1], less CLIP's mean, over its deviation; all in fp32."""
    return (pixels - MEAN) / DEVIATION


# --- CLIP ---


def clip(image: np.ndarray, size: int = 224) -> np.ndarray:
    """OpenAI's and open_clip's (and ImageReward's) pixels, ``[size, size, 3] fp32``.

    Shorter side to `size` by a bicubic filter, centre crop as torchvision's.
    """
    cropped = _crop(_short_side(image, size, BICUBIC), size, _even)
    return _normal(cropped.astype(np.float32) / np.float32(255))


def clip_transformers(image: np.ndarray, size: int = 224) -> np.ndarray:
    """`CLIPImageProcessor`'s pixels as it was when PickScore was published, and with Pillow is.

    As `clip`, but the crop begins elsewhere, and bytes are multiplied by 1/255 in double precision.
    """
    cropped = _crop(_short_side(image, size, BICUBIC), size, _down)
    return _normal((cropped.astype(np.float64) * (1 / 255)).astype(np.float32))


def clip_dmd2(image: np.ndarray, size: int = 224) -> np.ndarray:
    """DMD2's: the middle square to 256 by Lanczos, then `clip`."""
    return clip(resize(_middle(image, _even), (256, 256), LANCZOS), size)


def cmmd(image: np.ndarray, size: int = 336) -> np.ndarray:
    """CMMD's: the middle square to `size` by a bicubic filter."""
    pixels = resize(_middle(image, _down), (size, size), BICUBIC)
    return _normal(pixels.astype(np.float32) / np.float32(255))


def hps(image: np.ndarray, size: int = 224, *, antialias: bool = True) -> np.ndarray:
    """HPS v2's: the longer side to `size`, black around, ``[size, size, 3] fp32``.

    The picture is resampled as *floats*, by torch. Since torchvision 0.17 its filter widens with
    the scale, as Pillow's does; before, and so when HPS v2 was published, it did not
    (`antialias` False), and scores of large pictures differ. Nothing is clipped: values may lie
    outside [0, 1]. A picture whose longer side is `size` already is only padded here, where the
    reference leaves it as it is and fails.
    """
    height, width = check(image).shape[:2]
    pixels = image.astype(np.float32) / np.float32(255)
    scale = size / float(max(height, width))
    if scale != 1:
        new = round(height * scale), round(width * scale)
        if 0 in new:
            raise ImageError(f'a picture of {height} x {width} is too narrow for HPS')
        filters = _antialiased if antialias else _four_taps
        pixels = _filter(pixels, 1, *filters(width, new[1]))
        pixels = _filter(pixels, 0, *filters(height, new[0]))
    rest = [size - n for n in pixels.shape[:2]]
    return _normal(np.pad(pixels, [*((n // 2, n - n // 2) for n in rest), (0, 0)]))


def _filter(x: np.ndarray, axis: int, places: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Resamples an axis: output i is the sum of ``weights[i, k] * x[places[i, k]]`` over k."""
    x = np.moveaxis(x, axis, -1)
    total = sum(x[..., places[:, k]].astype(np.float64) * weights[:, k]
                for k in range(weights.shape[1]))
    return np.moveaxis(total.astype(np.float32), -1, axis)


@functools.lru_cache(64)
def _antialiased(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    """Places and weights ``[new, K]`` of torch's bicubic filter that widens (a = -0.5), in fp32."""
    f = np.float32
    scale = f(old) / f(new)
    support, inverse = (f(2) * scale, f(1) / scale) if scale >= 1 else (f(2), f(1))
    centre = scale * (np.arange(new, dtype=f) + f(0.5))
    first = np.maximum((centre - support + f(0.5)).astype(np.int64), 0)
    count = np.minimum((centre + support + f(0.5)).astype(np.int64), old) - first
    taps = np.arange(count.max())
    x = np.abs(((taps + first[:, None]).astype(f) - centre[:, None] + f(0.5)) * inverse)
    near = _fma(_fma(f(1.5), x, f(-2.5)) * x, x, f(1))
    far = _fma(_fma(_fma(f(-0.5), x, f(2.5)), x, f(-4)), x, f(2))
    weights = np.where((x < 2) & (taps < count[:, None]), np.where(x < 1, near, far), f(0))
    total = functools.reduce(np.add, weights.T)  # in their order
    return np.minimum(first[:, None] + taps, old - 1), weights / total[:, None]


@functools.lru_cache(64)
def _four_taps(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    """Places and weights ``[new, 4]`` of torch's bicubic filter as it was (a = -0.75), in fp32."""
    f = np.float32
    at = _fma(f(old) / f(new), np.arange(new, dtype=f) + f(0.5), f(-0.5))
    whole = np.floor(at).astype(np.int64)
    t = at - whole.astype(f)
    near = lambda x: (f(1.25) * x - f(2.25)) * x * x + f(1)
    far = lambda x: _fma(f(-0.75) * x + f(3.75), x, f(-6)) * x + f(3)
    weights = np.stack([far(t + f(1)), near(t), near(f(1) - t), far(f(1) - t + f(1))], axis=1)
    return np.clip(whole[:, None] + np.arange(-1, 3), 0, old - 1), weights


def _fma(a: Any, b: Any, c: Any) -> np.ndarray:
    """``a b + c`` of fp32, rounded once: so torch is compiled to compute weights."""
    return (np.asarray(a, np.float64) * b + c).astype(np.float32)


# --- Inception ---


def inception_clean(image: np.ndarray) -> np.ndarray:
    """clean-fid's ("clean"): each channel as floats to 299 by Pillow's bicubic filter, clipped.

    ``[299, 299, 3] fp32`` in [0, 255].
    """
    planes = [Image.fromarray(check(image)[..., c].astype(np.float32)).resize(
        (INCEPTION, INCEPTION), BICUBIC) for c in range(3)]
    return np.stack([np.asarray(plane).clip(0, 255) for plane in planes], axis=-1)


def inception_dmd2(image: np.ndarray) -> np.ndarray:
    """DMD2's FID: the middle square to 512 by Lanczos, then `inception_clean`; both sides alike."""
    return inception_clean(resize(_middle(image, _even), (512, 512), LANCZOS))


def inception_patch(image: np.ndarray) -> np.ndarray:
    """DMD2's patch FID: the middle 299 x 299 pixels as they are, ``[299, 299, 3] fp32``.

    A picture with a side below 299, as some of COCO have, goes through `inception_clean` whole.
    """
    if min(check(image).shape[:2]) < INCEPTION:
        return inception_clean(image)
    return _crop(image, INCEPTION, _even).astype(np.float32)


def inception_tensorflow(image: np.ndarray) -> np.ndarray:
    """torch-fidelity's, TensorFlow 1's bilinear filter: four neighbours, corners aligned at 0.

    ``[299, 299, 3] fp32`` in [0, 255].
    """
    x = check(image).astype(np.float32)
    for axis in (1, 0):
        old = x.shape[axis]
        at = np.arange(INCEPTION, dtype=np.float32) * np.float32(old / INCEPTION)
        low = at.astype(np.int64)
        part = (at - low.astype(np.float32)).reshape([-1 if n == axis else 1 for n in range(3)])
        near, far = (np.take(x, i, axis) for i in (low, np.minimum(low + 1, old - 1)))
        x = near + (far - near) * part
    return x
