"""Makes the data files that ship with the package.

    python -m ddmd_jax.prepare emoji         renders the glyphs, learns the tokenizer
    python -m ddmd_jax.prepare classifier    trains the judge of the metrics (minutes)
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from absl import app, flags

FLAGS = flags.FLAGS
flags.DEFINE_string('font', '/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf',
                    'NotoColorEmoji.ttf (Debian: fonts-noto-color-emoji).')
flags.DEFINE_string('out', '', 'Folder to write; default: the package\'s own data folder.')
flags.DEFINE_integer('vocab', 1600, 'emoji: entries of the WordPiece vocabulary.')
flags.DEFINE_integer('steps', 2500, 'classifier: training steps.')
flags.DEFINE_integer('seed', 0, 'classifier: seed.')


def prepare_emoji(font: Path, out: Path, vocab: int) -> int:
    """Writes ``glyphs/`` and ``tokenizer.json`` under `out`; returns the number of glyphs."""
    from ddmd_jax.data import builder, emoji, render, tokenizer

    names, glyphs = render.render_all(font)
    order = sorted(range(len(names)), key=lambda i: names[i] not in render.FIRST)
    kept = render.select_distinct(glyphs[order], render.MIN_DISTANCE)
    kept = sorted(order[i] for i in kept)
    names = [names[i] for i in kept]
    builder.write(names, glyphs[kept], out / 'glyphs')
    captions = [emoji.caption(n, c) for n in names for c in emoji.COLOURS]
    tokenizer.train(captions, vocab, out / 'tokenizer.json')
    return len(kept)


def main(argv: list[str]) -> None:
    from ddmd_jax.data import emoji

    if argv[1:] not in (['emoji'], ['classifier']):
        got = ' '.join(argv[1:]) or 'nothing'
        sys.exit(f'prepare: expected `emoji` or `classifier`, got {got}')
    out = Path(FLAGS.out) if FLAGS.out else emoji.FILES
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        sys.exit(f'prepare: --out {out} cannot be made ({e.strerror}); choose another')
    if not os.access(out, os.W_OK):
        sys.exit(f'prepare: --out {out} cannot be written; choose another')
    if argv[1] == 'classifier':
        from ddmd_jax.metrics import classifier

        print(classifier.train(FLAGS.steps, FLAGS.seed, out / classifier.WEIGHTS.name))
        return
    font = Path(FLAGS.font)
    if not font.is_file():
        sys.exit(f'prepare: no font at {font}; install fonts-noto-color-emoji or pass --font')
    print(f'{prepare_emoji(font, out, FLAGS.vocab)} glyphs written to {out}')


if __name__ == '__main__':
    app.run(main)
