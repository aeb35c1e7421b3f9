"""From an image's bytes to pixels of one of a few sizes."""

import io
import math
import warnings
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ddmd_jax.util import errors
from ddmd_jax.util.text import first_line

# `decode` refuses what Pillow warns of; filters of warnings are not for threads to change.
warnings.filterwarnings('ignore', category=Image.DecompressionBombWarning)
Size = tuple[int, int]  # pixels, height first
SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.tif', '.tiff')  # of what is taken for one


class BadImage(ValueError):
    """An image that cannot be used; its message says why."""


def decode(raw: bytes, where: str = '', as_scorers: bool = False) -> Image.Image:
    """The upright picture in RGB, transparent places white; the one reader of others' images.

    Grey of 16 bits becomes the same grey of 8. `where` is what an error of the machine names. With
    `as_scorers` it is neither turned nor laid on white: published scorers `convert('RGB')`.

    Raises:
      BadImage: damaged, cut short, so large that it is taken for an attack, or of levels that do
        not say which of them is white (float, 32 bits, signed).
    """
    try:
        opened = Image.open(io.BytesIO(raw))
        if opened.width * opened.height > (most := Image.MAX_IMAGE_PIXELS or math.inf):
            raise BadImage(f'cannot be decoded (it has {opened.width * opened.height} pixels, more '
                           f'than {most})')
        wide = _is_wide(opened)
        image = opened if as_scorers else ImageOps.exif_transpose(opened)
        if wide:
            return _narrowed(image, white=not as_scorers).convert('RGB')
        if not as_scorers and ('A' in image.getbands() or 'transparency' in image.info):
            image = image.convert('RGBA')
            white = Image.new('RGBA', image.size, 'white')
            return Image.alpha_composite(white, image).convert('RGB')
        return image.convert('RGB')
    except BadImage:
        raise
    except Exception as e:  # whatever a decoder raises, the bytes are at fault, if not the machine
        errors.raise_environment(e, where)
        unknown = isinstance(e, UnidentifiedImageError)  # whose words name an address in memory
        words = 'it is of no known format' if unknown else first_line(e)[:120]
        raise BadImage(f'cannot be decoded ({words})') from e


def _is_wide(image: Image.Image) -> bool:
    """Whether an image that was opened is grey of 16 bits, 0 to 65535; raises `BadImage`."""
    cure = 'save it with 8 bits a channel'
    if image.mode not in ('I', 'F') and not image.mode.startswith('I;'):
        clear = image.info.get('transparency')
        if isinstance(clear, tuple) and max(clear) > 255:  # Pillow has cut the colours to 8
            raise BadImage(f'has a transparent colour of 16 bits, which is not read; {cure}')
        return False
    # Pillow below 10.3 opens a PNG of 16 bits as `I`; a PGM it brings to 16 bits.
    if image.mode == 'F' or image.mode == 'I' and image.format not in ('PNG', 'PPM'):
        raise BadImage(f'is grey of {"floats" if image.mode == "F" else "signed or 32-bit numbers"}'
                       f', which do not say what is white; {cure}')
    if image.format == 'TIFF':  # whose levels Pillow leaves as they are
        tags = image.tag_v2  # type: ignore[attr-defined]
        bits, meaning = tags.get(258, (1,)), tags.get(262)
        if tuple(bits) != (16,) or meaning != 1:
            white = '' if meaning == 1 else ' whose 0 is white'
            raise BadImage(f'is grey of {bits[0]} bits{white}, which is not read; {cure}')
    return True


def _narrowed(image: Image.Image, white: bool) -> Image.Image:
    """Grey of 16 bits in 8; with `white`, a level that the file calls transparent is."""
    levels = np.asarray(image).astype(np.int32)
    grey = ((levels * 255 + 32767) // 65535).astype(np.uint8)
    if white and isinstance(clear := image.info.get('transparency'), int):
        grey[levels == clear] = 255
    return Image.fromarray(grey)


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
