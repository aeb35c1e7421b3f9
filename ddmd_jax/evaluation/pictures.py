"""Grids and captioned sheets as uint8 arrays; files that say what is in them."""

import io
import json
import math
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import ExifTags, Image, ImageDraw, ImageFont, PngImagePlugin

from ddmd_jax.util import files
from ddmd_jax.util.errors import UserError
from ddmd_jax.util.places import Place

ZOOM = 4  # of images no larger than SMALL
SMALL = 64
COLUMN, LINE, LEFT = 26, 24, 250  # of a caption: characters of a line, height of one, pixels wide
TILE = 256  # longest side of a larger image, or of a block of them, in a sheet
RIM = 2  # pixels between the images of a block
SUFFIXES = ('.png', '.webp')  # of the files that `save` writes
ROWS = 60  # and columns of a sheet: a WebP has at most 16,383 pixels a side


def to_uint8(images: np.ndarray) -> np.ndarray:
    """[-1, 1] -> 0..255, clipped; uint8 as it is.

    Raises:
      UserError: a value is not finite, which would be a black spot.
    """
    if images.dtype == np.uint8:
        return images
    if not (finite := np.isfinite(images)).all():
        raise UserError(f'{np.size(finite) - np.sum(finite)} of {np.size(finite)} values of images '
                        'are not finite; the weights that draw them are spoilt, or their dtype is '
                        'too narrow')
    return np.round(np.clip(np.asarray(images) * 127.5 + 127.5, 0, 255)).astype(np.uint8)


def save(image: Image.Image, path: Place, metadata: Mapping[str, str]) -> None:
    """Writes a PNG or a WebP (lossless), by the suffix of `path`, with `metadata` inside.

    In a PNG every entry is a text chunk; in a WebP all of them are the EXIF field
    ImageDescription, as JSON: that field is ASCII, which JSON's escapes make of any text.
    """
    with files.replacing(path) as scratch:
        if path.suffix.lower() == '.webp':
            exif = Image.Exif()
            exif[ExifTags.Base.ImageDescription] = json.dumps(dict(metadata))
            image.save(scratch, 'WEBP', lossless=True, exif=exif)
            return
        image.save(scratch, 'PNG', pnginfo=_chunks(metadata))


def png(image: np.ndarray, metadata: Mapping[str, str]) -> bytes:
    """A PNG of ``[H, W, 3] uint8``, with `metadata` inside as in `save`; made quickly."""
    out = io.BytesIO()
    Image.fromarray(image).save(out, 'PNG', pnginfo=_chunks(metadata), compress_level=1)
    return out.getvalue()


def _chunks(metadata: Mapping[str, str]) -> PngImagePlugin.PngInfo:
    chunks = PngImagePlugin.PngInfo()
    for name, text in metadata.items():
        chunks.add_text(name, text)
    return chunks


def rows_of_images(rows: Sequence[np.ndarray], gap: int = 1) -> np.ndarray:
    """Each ``[N, H, W, 3]`` becomes one row of a grid ``[.., .., 3]`` uint8, enlarged."""
    padded = [np.pad(to_uint8(r), ((0, 0), (0, gap), (0, gap), (0, 0)), constant_values=255)
              for r in rows]
    grid = np.concatenate([np.concatenate(list(r), axis=1) for r in padded], axis=0)
    zoom = ZOOM if max(rows[0].shape[1:3]) <= SMALL else 1
    return grid.repeat(zoom, 0).repeat(zoom, 1)


def _tile_size(shape: Sequence[int], across: int = 1) -> tuple[int, int]:
    """(width, height) in a sheet of an image ``[H, W, 3]``, of which a block has `across` a row."""
    height, width = shape[:2]
    longer = max(height, width)
    scale = max(1, ZOOM // across) if longer <= SMALL else TILE / longer / across
    return round(width * scale), round(height * scale)


def wrapped(caption: str, lines: int) -> str:
    """`caption` in at most `lines` lines that fit beside the pictures; more ends in '...'."""
    return '\n'.join(textwrap.wrap(caption, COLUMN, max_lines=lines, placeholder=' ...'))


def captioned_sheet(captions: Sequence[str], titles: Sequence[str],
                    columns: Sequence[np.ndarray], path: Place,
                    metadata: Mapping[str, str] | None = None) -> None:
    """One prompt a row, one model a column, prompt written beside it; see `save`.

    Args:
      captions: R prompts.
      titles: C column heads; '\\n' breaks a line.
      columns: C arrays ``[R, H, W, 3]``, or ``[R, K, H, W, 3]``: a block of K images each.
      path: file to write.
      metadata: what it says of itself.
    """
    font, head = ImageFont.load_default(17), ImageFont.load_default(15)
    blocks = [to_uint8(x if x.ndim == 5 else x[:, None]) for x in columns]
    each = blocks[0].shape[1]
    across = math.ceil(math.sqrt(each))
    down = -(-each // across)
    width, height = _tile_size(blocks[0].shape[2:], across)
    wide, high = across * (width + RIM) - RIM, down * (height + RIM) - RIM
    gap, left, top = 10, LEFT, 56
    sheet = Image.new('RGB', (left + len(columns) * (wide + gap) + gap,
                              top + len(captions) * (high + gap) + gap), 'white')
    resample = (Image.Resampling.NEAREST if width >= blocks[0].shape[3] else
                Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(sheet)
    for c, (title, rows) in enumerate(zip(titles, blocks, strict=True)):
        x = left + c * (wide + gap)
        draw.multiline_text((x + wide / 2, top - 8), title, 'black', font=head, anchor='md',
                            align='center')
        for r, images in enumerate(rows):
            y = top + r * (high + gap)
            for k, image in enumerate(images):
                corner = x + k % across * (width + RIM), y + k // across * (height + RIM)
                sheet.paste(Image.fromarray(image).resize((width, height), resample), corner)
            draw.rectangle((x - 1, y - 1, x + wide, y + high), outline=(225, 225, 225))
    for r, caption in enumerate(captions):
        draw.multiline_text((left - 16, top + r * (high + gap) + high / 2),
                            wrapped(caption, max(1, high // LINE)), 'black', font=font,
                            anchor='rm', align='right')
    save(sheet, path, metadata or {})
