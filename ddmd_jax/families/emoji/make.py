"""Makes the data files that ship with the package: glyphs, tokenizer, and the metrics' classifier.

    python -m ddmd_jax.families.emoji.make glyphs [--font=NotoColorEmoji.ttf] [--out=DIR]
    python -m ddmd_jax.families.emoji.make classifier [--steps=2500] [--seed=0] [--out=DIR]

The font is SIL OFL 1.1 (Debian: fonts-noto-color-emoji). Training only reads what this wrote.
"""

import shutil
import sys
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tensorflow_datasets as tfds
import tokenizers as tk
from absl import flags
from flax import nnx
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from ddmd_jax.families.emoji import data, judge, tokenizer
from ddmd_jax.families.emoji.data import SIZE
from ddmd_jax.util import commands
from ddmd_jax.util.errors import UserError
from ddmd_jax.weights import flat

FLAGS = flags.FLAGS
BATCH = 128  # of the classifier's training
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


class EmojiGlyphs(tfds.core.GeneratorBasedBuilder):
    """Noto Color Emoji glyphs, ``[24, 24, 4]`` uint8 RGBA, with their Unicode names."""

    VERSION = tfds.core.Version('1.0.0')
    RELEASE_NOTES = {'1.0.0': 'First release.'}

    def __init__(self, *, names: list[str], glyphs: np.ndarray, **kwargs):
        self._rows = list(zip(names, glyphs, strict=True))
        super().__init__(file_format='array_record', **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({
            'name': tfds.features.Text(),
            'glyph': tfds.features.Tensor(
                shape=(SIZE, SIZE, 4), dtype=np.uint8, encoding=tfds.features.Encoding.ZLIB),
        })
        return tfds.core.DatasetInfo(
            builder=self, features=features, license='SIL Open Font License 1.1',
            homepage='https://github.com/googlefonts/noto-emoji',
            description='Glyphs of Noto Color Emoji at 24 x 24 pixels with their names.')

    def _split_generators(self, dl_manager):
        return {'train': self._generate_examples()}

    def _generate_examples(self):
        for i, (name, glyph) in enumerate(self._rows):
            yield i, {'name': name, 'glyph': glyph}


def write_glyphs(names: list[str], glyphs: np.ndarray, out: Path) -> None:
    """Builds the data set in a scratch folder and, once it is whole, puts it in place of `out`."""
    with tempfile.TemporaryDirectory() as scratch:
        builder = EmojiGlyphs(names=names, glyphs=glyphs, data_dir=scratch)
        # Insertion order is the order of a fixed hash of the keys: the same on every machine.
        tfds.disable_progress_bar()
        builder.download_and_prepare()
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(builder.data_dir, out)


def train_tokenizer(captions: Iterable[str], vocab_size: int, path: Path) -> None:
    """Learns a lower-cased WordPiece vocabulary; every text starts with ``[BOS]``."""
    found = tk.Tokenizer(tk.models.WordPiece(unk_token=tokenizer.UNK))
    found.normalizer = tk.normalizers.BertNormalizer(lowercase=True)
    found.pre_tokenizer = tk.pre_tokenizers.BertPreTokenizer()
    special = [tokenizer.PAD, tokenizer.UNK, tokenizer.BOS]
    trainer = tk.trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=special, show_progress=False)
    found.train_from_iterator(captions, trainer)
    bos = found.token_to_id(tokenizer.BOS)
    found.post_processor = tk.processors.TemplateProcessing(
        single=f'{tokenizer.BOS} $A', special_tokens=[(tokenizer.BOS, bos)])
    found.save(str(path))


def make_glyphs(font: Path, out: Path, vocab: int) -> int:
    """Writes ``glyphs/`` and ``tokenizer.json`` under `out`; returns the number of glyphs."""
    names, glyphs = render_all(font)
    order = sorted(range(len(names)), key=lambda i: names[i] not in FIRST)
    kept = sorted(order[i] for i in select_distinct(glyphs[order], MIN_DISTANCE))
    names = [names[i] for i in kept]
    write_glyphs(names, glyphs[kept], out / 'glyphs')
    captions = [data.caption(n, c) for n in names for c in data.COLOURS]
    train_tokenizer(captions, vocab, out / 'tokenizer.json')
    return len(kept)


# --- The classifier ---


def training_batch(rng: np.random.Generator, pairs: data.Pairs) -> dict[str, np.ndarray]:
    """Roughed-up renders on named (three in four, never held-out pairs) or random colours."""
    seen = np.flatnonzero(~pairs.held_out)
    rows = rng.choice(seen, BATCH)
    palette = np.asarray(list(data.COLOURS.values()), np.float32)
    rgb = palette[pairs.colour[rows]]
    named = rng.random(BATCH) < 0.75
    rgb = np.where(named[:, None], rgb, rng.uniform(0, 255, rgb.shape).astype(np.float32))
    x = data.compose(pairs.glyphs[pairs.glyph[rows]], rgb)
    shifts = rng.integers(-1, 2, (BATCH, 2))
    # The shift rolls; margins are plain background, so nothing wraps around into view.
    x = np.stack([np.roll(im, s, (0, 1)) for im, s in zip(x, shifts)])
    blur = 0.25 * (np.roll(x, 1, 1) + np.roll(x, -1, 1) + np.roll(x, 1, 2) + np.roll(x, -1, 2))
    share = rng.uniform(0, 0.5, (BATCH, 1, 1, 1)) * (rng.random((BATCH, 1, 1, 1)) < 0.5)
    x = (1 - share) * x + share * blur
    x = x * rng.uniform(0.9, 1.1, (BATCH, 1, 1, 1))
    x = x + rng.uniform(0, 0.15, (BATCH, 1, 1, 1)) * rng.standard_normal(x.shape)
    return {'image': x.astype(np.float32), 'glyph': pairs.glyph[rows],
            'colour': pairs.colour[rows], 'named': named.astype(np.float32)}


def train_classifier(steps: int, seed: int, out: Path) -> dict[str, float]:
    """Trains and writes the judge; returns its accuracies on real images, seen and held out."""
    pairs = data.load_pairs()
    counts = (len(pairs.names), len(data.COLOURS))
    apply = judge.build(*counts)
    params = nnx.to_pure_dict(nnx.state(judge.Classifier(*counts, nnx.Rngs(seed)), nnx.Param))
    tx = optax.adamw(optax.cosine_decay_schedule(2e-3, steps), weight_decay=1e-3)

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        glyph, colour, _ = apply(params, batch['image'])
        cross = optax.softmax_cross_entropy_with_integer_labels
        return jnp.mean(cross(glyph, batch['glyph'])
                        + cross(colour, batch['colour']) * batch['named'])

    @jax.jit
    def step(params: Any, opt: Any, batch: Any):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt, loss

    opt, rng = tx.init(params), np.random.default_rng(seed)
    for _ in tqdm(range(steps), 'classifier', unit=' updates', file=sys.stderr, dynamic_ncols=True):
        params, opt, _ = step(params, opt, training_batch(rng, pairs))
    flat.save(out, params, {'glyphs': str(counts[0]), 'steps': str(steps)}, dtype=jnp.bfloat16)
    glyph, colour, _ = judge.judge_all(judge.load(out), pairs.images(np.arange(len(pairs.glyph))))
    right, held = glyph == pairs.glyph, pairs.held_out
    return {'glyph': float(right[~held].mean()), 'glyph_held_out': float(right[held].mean()),
            'colour': float((colour == pairs.colour).mean())}


def define_flags() -> None:
    flags.DEFINE_string('out', str(data.FILES), 'Folder to write.')
    flags.DEFINE_string('font', '/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf', 'The font.')
    flags.DEFINE_integer('vocab', 1600, 'Entries of the WordPiece vocabulary.')
    flags.DEFINE_integer('steps', 2500, 'Training steps of the classifier.')
    flags.DEFINE_integer('seed', 0, 'Seed of the classifier.')


def main(arguments: list[str]) -> None:
    if arguments not in (['glyphs'], ['classifier']):
        raise UserError('expected `glyphs` or `classifier`, got '
                        f'{" ".join(arguments) or "nothing"}')
    out, font = commands.folder('--out', FLAGS.out), Path(FLAGS.font)
    if arguments == ['classifier']:
        print(train_classifier(FLAGS.steps, FLAGS.seed, out / judge.WEIGHTS.name))
    elif font.is_file():
        print(f'{make_glyphs(font, out, FLAGS.vocab)} glyphs written to {out}')
    else:
        raise UserError(f'no font at {font}; install fonts-noto-color-emoji or pass --font')


if __name__ == '__main__':
    commands.run('make', main, define_flags)
