"""Renders the emoji glyphs that ship with the package, once, from the font file.

Used by ``python -m ddmd_jax.prepare emoji``. Needs Pillow and NotoColorEmoji.ttf (SIL OFL
1.1; Debian: fonts-noto-color-emoji). Training only reads what this wrote.
"""

import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ddmd_jax.families.emoji.data import SIZE

MARGIN = 2  # pixels of plain background on every side of the glyph
STRIKE = 109  # the one bitmap size the font carries

# Symbols that stand on a coloured tile of their own or differ by a hand's breadth: at 24
# pixels a viewer cannot tell one from its neighbour, and neither could a metric.
EXCLUDED_WORDS = (
    'CLOCK FACE', 'SQUARED', 'CIRCLED', 'NEGATIVE', 'KEYCAP', 'FITZPATRICK', 'REGIONAL',
    'SYMBOL FOR', 'INPUT', 'BUTTON', 'MAHJONG', 'PLAYING CARD', 'IDEOGRAPH', 'JAPANESE', 'TAG ',
    'LATIN', 'WITH RIGHTWARDS', 'WITH LEFTWARDS', 'ARROW', 'COUPLE', 'FAMILY', 'PERSON WITH',
    'MOON', 'TRIANGLE', 'TRIANGULAR', 'LARGE', 'MEDIUM', 'SMALL', 'SYMBOL', 'SIGN', 'BAGGAGE',
    'CUSTOMS', 'PASSPORT', 'LEFT LUGGAGE', 'RESTROOM', 'CLOSET', 'WORSHIP', 'STAR OF DAVID',
    'ARIES', 'TAURUS', 'GEMINI', 'CANCER', 'LEO', 'VIRGO', 'LIBRA', 'SCORPIUS', 'SAGITTARIUS',
    'CAPRICORN', 'AQUARIUS', 'PISCES', 'OPHIUCHUS', 'WHEELCHAIR', 'ELEVATOR', 'PREGNANT',
    'FOR STOPS', 'COMPONENT', 'ATM', 'DASH', 'LOOP', 'CURRENCY', 'BANKNOTE', 'DICES', 'CROSS',
)
MAX_NAME_WORDS = 3
MIN_DISTANCE = 0.112  # see select_distinct; at this value 583 glyphs remain
FIRST = ('red apple',)  # kept before its look-alikes (the tomato): it is everybody's first prompt


def glyph_names() -> Iterator[tuple[str, str]]:
    """Yields ``(character, lower-case Unicode name)`` of candidate single-codepoint emoji."""
    ranges = [(0x2190, 0x2BFF), (0x3030, 0x303D), (0x1F000, 0x1FAFF)]
    for first, last in ranges:
        for code in range(first, last + 1):
            name = unicodedata.name(chr(code), '')
            if not name or any(word in name for word in EXCLUDED_WORDS):
                continue
            if len(name.replace('-', ' ').split()) <= MAX_NAME_WORDS:
                yield chr(code), name.lower().replace('-', ' ')


def render_glyph(char: str, font) -> np.ndarray | None:
    """``[24, 24, 4]`` uint8 RGBA, centred, straight alpha; None if the font has no glyph."""
    from PIL import Image, ImageDraw

    canvas = Image.new('RGBA', (STRIKE * 2, STRIKE * 2), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((20, 20), char, font=font, embedded_color=True)
    box = canvas.getbbox()
    if box is None:
        return None
    glyph = canvas.crop(box)
    inner = SIZE - 2 * MARGIN
    scale = inner / max(glyph.size)
    size = tuple(max(1, round(s * scale)) for s in glyph.size)
    # Resizing straight alpha bleeds the black of transparent pixels into the edge.
    pre = np.asarray(glyph, np.float32) / 255.0
    pre[..., :3] *= pre[..., 3:]
    planes = [Image.fromarray(pre[..., c]).resize(size, Image.Resampling.BOX) for c in range(4)]
    small = np.stack([np.asarray(p) for p in planes], axis=-1)
    small[..., :3] /= np.maximum(small[..., 3:], 1e-4)
    out = np.zeros((SIZE, SIZE, 4), np.float32)
    top, left = (SIZE - size[1]) // 2, (SIZE - size[0]) // 2
    out[top:top + size[1], left:left + size[0]] = small
    return np.round(np.clip(out, 0, 1) * 255).astype(np.uint8)


def render_all(font_path: str | Path) -> tuple[list[str], np.ndarray]:
    """Names and ``[N, 24, 24, 4]`` glyphs of every candidate that the font can draw."""
    from PIL import ImageFont

    font = ImageFont.truetype(str(font_path), STRIKE)
    missing = render_glyph('\U0010ffff', font)
    names, glyphs = [], []
    for char, name in glyph_names():
        glyph = render_glyph(char, font)
        if glyph is None or (missing is not None and np.array_equal(glyph, missing)):
            continue
        if (glyph[..., 3] > 0).mean() < 0.08:  # a speck, not a picture
            continue
        names.append(name)
        glyphs.append(glyph)
    return names, np.stack(glyphs)


def select_distinct(glyphs: np.ndarray, min_distance: float) -> list[int]:
    """Indices of glyphs that differ from every earlier kept one by at least `min_distance`.

    The distance is the root mean square over RGB in [0, 1] on mid-grey, of images averaged
    over 2 x 2 pixels: what is left of a difference at arm's length.
    """
    alpha = glyphs[..., 3:].astype(np.float32) / 255.0
    rgb = glyphs[..., :3].astype(np.float32) / 255.0 * alpha + 0.5 * (1 - alpha)
    flat = rgb.reshape(len(glyphs), SIZE // 2, 2, SIZE // 2, 2, 3).mean((2, 4))
    flat = flat.reshape(len(glyphs), -1)
    kept: list[int] = []
    for i, image in enumerate(flat):
        distances = np.sqrt(((flat[kept] - image) ** 2).mean(-1))
        if distances.min(initial=np.inf) >= min_distance:
            kept.append(i)
    return kept
