"""`prepare emoji` and `prepare classifier`: the data files that ship with the package."""

import os
import sys
from pathlib import Path

from absl import flags

from ddmd_jax.families.emoji import data
from ddmd_jax.families.family import Command

FLAGS = flags.FLAGS


def render_flags() -> None:
    flags.DEFINE_string('font', '/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf',
                        'NotoColorEmoji.ttf (Debian: fonts-noto-color-emoji).')
    flags.DEFINE_string('out', '', 'Folder to write; default: the package\'s own data folder.')
    flags.DEFINE_integer('vocab', 1600, 'Entries of the WordPiece vocabulary.')


def classifier_flags() -> None:
    flags.DEFINE_string('out', '', 'Folder to write; default: the package\'s own data folder.')
    flags.DEFINE_integer('steps', 2500, 'Training steps.')
    flags.DEFINE_integer('seed', 0, 'Seed.')


def write_files(font: Path, out: Path, vocab: int) -> int:
    """Writes ``glyphs/`` and ``tokenizer.json`` under `out`; returns the number of glyphs."""
    from ddmd_jax.families.emoji import builder, render, tokenizer

    names, glyphs = render.render_all(font)
    order = sorted(range(len(names)), key=lambda i: names[i] not in render.FIRST)
    kept = render.select_distinct(glyphs[order], render.MIN_DISTANCE)
    kept = sorted(order[i] for i in kept)
    names = [names[i] for i in kept]
    builder.write(names, glyphs[kept], out / 'glyphs')
    captions = [data.caption(n, c) for n in names for c in data.COLOURS]
    tokenizer.train(captions, vocab, out / 'tokenizer.json')
    return len(kept)


def _folder() -> Path:
    """The folder of ``--out``, which must be writable; default the package's own."""
    out = Path(FLAGS.out) if FLAGS.out else data.FILES
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        sys.exit(f'prepare: --out {out} cannot be made ({e.strerror}); choose another')
    if not os.access(out, os.W_OK):
        sys.exit(f'prepare: --out {out} cannot be written; choose another')
    return out


def run_render() -> None:
    out, font = _folder(), Path(FLAGS.font)
    if not font.is_file():
        sys.exit(f'prepare: no font at {font}; install fonts-noto-color-emoji or pass --font')
    print(f'{write_files(font, out, FLAGS.vocab)} glyphs written to {out}')


def run_classifier() -> None:
    out = _folder()
    from ddmd_jax.families.emoji import judge as classifier

    print(classifier.train(FLAGS.steps, FLAGS.seed, out / classifier.WEIGHTS.name))


COMMANDS = {
    'emoji': Command(render_flags, run_render),
    'classifier': Command(classifier_flags, run_classifier)}
