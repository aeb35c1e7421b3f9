"""From an image's bytes to pixels of one of a few sizes."""

import io
import math
import warnings
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps

from ddmd_jax.util import errors
from ddmd_jax.util.text import first_line

Size = tuple[int, int]  # pixels, height first


class BadImage(ValueError):
    """An image that cannot be used; its message says why."""


def decode(raw: bytes) -> Image.Image:
    """The upright picture in RGB, transparent places white.

    Raises:
      BadImage: damaged, cut short, or so large that it is taken for an attack.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('error', Image.DecompressionBombWarning)
            image = ImageOps.exif_transpose(Image.open(io.BytesIO(raw)))
            if 'A' in image.getbands() or 'transparency' in image.info:
                image = image.convert('RGBA')
                white = Image.new('RGBA', image.size, 'white')
                return Image.alpha_composite(white, image).convert('RGB')
            return image.convert('RGB')
    except Exception as e:  # whatever a decoder raises, the bytes are at fault, if not the machine
        errors.raise_environment(e)
        raise BadImage(f'cannot be decoded: {first_line(e)[:120]}') from e


def bucket(size: Size, sizes: Sequence[Size]) -> int:
    """Which of `sizes` has the aspect nearest to that of `size`; the first of two alike."""
    aspect = lambda s: math.log(s[0] / s[1])
    return min(range(len(sizes)), key=lambda i: abs(aspect(sizes[i]) - aspect(size)))


def fitted(image: Image.Image, size: Size) -> np.ndarray:
    """The middle of a picture, ``[*size, 3]`` uint8: scaled down until it just covers `size`.

    Raises:
      BadImage: it is smaller than that.
    """
    height, width = size
    if image.height < height or image.width < width:
        raise BadImage(f'is {image.height} x {image.width} pixels, smaller than the crop of '
                       f'{height} x {width}')
    scale = max(height / image.height, width / image.width)
    scaled = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    if scaled != image.size:
        image = image.resize(scaled, Image.Resampling.LANCZOS)
    left, top = (scaled[0] - width) // 2, (scaled[1] - height) // 2
    return np.asarray(image.crop((left, top, left + width, top + height)))
