"""Makes data files: sets of prompts, embeddings of them, the embedded world's drawings.

    python -m ddmd_jax.prepare prompts    makes a set of prompts from files of them
    python -m ddmd_jax.prepare embed      encodes a set of prompts with a teacher's text encoder
    python -m ddmd_jax.prepare emoji      draws the objects of the embedded world

``python -m ddmd_jax.prepare WORD --help`` lists the flags of a word. Exit codes: 0 done; 1 it
could not go on (one line on stderr says why); 2 a flag is wrong.
"""

import dataclasses
import os
import sys
from typing import Any

from absl import flags

from ddmd_jax.util import commands, places

FLAGS = flags.FLAGS


def prompts_flags() -> None:
    commands.define_places('input', 'Files of prompts: .txt, .jsonl, .csv, .tsv, .parquet; '
                           'separated by commas, or repeated.')
    commands.define_place('out', '', 'Folder to write; it must not exist yet.')
    flags.DEFINE_string('field', 'prompt', 'Name of the field or column; not of .txt.')
    flags.DEFINE_integer('min_chars', 1, 'Shorter prompts are dropped.', 1)
    flags.DEFINE_integer('max_chars', 2000, 'Longer prompts are dropped.', 1)
    flags.DEFINE_float('near_threshold', 0.85, 'Jaccard similarity (of runs of 5 characters) from '
                       'which prompts are near-duplicates; 1 keeps them all.', 0.3, 1)
    flags.DEFINE_float('validation', 0.01, 'Share of prompts in the validation split.', 0, 1)
    commands.finite('near_threshold', 'validation')


def embed_flags() -> None:
    commands.define_place('prompts', '', 'Folder of a set of prompts (`prepare prompts`).')
    flags.DEFINE_enum('split', 'train', ('train', 'validation'), 'Split of the set.')
    flags.DEFINE_string('teacher', '', 'Family of the text encoder, such as lumina, or '
                        'the full name of a module of yours.')
    commands.define_place('path', '', 'Its diffusers folder, URL or hub id; as '
                          'config.teacher.path.', places.ANY)
    flags.DEFINE_string('variant', '', 'Variant of its weights, such as fp16; as '
                        'config.teacher.variant.')
    commands.define_place('out', '', 'Folder to write; it must not exist yet.')
    flags.DEFINE_integer('batch', 64, 'Prompts encoded at a time, over all devices.', 1)
    commands.at_most(100_000, 'batch')
    flags.DEFINE_enum('dtype', 'bfloat16', ('bfloat16', 'float32'), "Of the encoder's products.")


def emoji_flags() -> None:
    commands.define_place('packages', '', 'Folder of the emoji sets\' npm packages (.tgz).',
                          places.LOCAL)
    commands.define_place('out', '', 'Folder to write; it must not exist yet.', places.LOCAL)


def _separate(item: str) -> list[str]:
    """The files of one --input: a comma separates two unless a file is called so."""
    names = [item] if os.path.exists(item) else item.split(',')
    return [os.fspath(places.of(name)) for name in names if name]


def prompts() -> None:
    commands.need(input='name files of prompts', out='name a folder to write')
    from ddmd_jax.data.prompts import build

    files = tuple(name for item in FLAGS.input for name in _separate(item))
    given: dict[str, Any] = {f.name: FLAGS[f.name].value
                             for f in dataclasses.fields(build.Settings) if f.name != 'input'}
    settings = build.Settings(files, **given)
    card, there = build.prepare(settings, places.of(FLAGS.out))
    print(f'prepare: {build.summary(card["counts"])}', file=sys.stderr)
    sizes = ', '.join(f'{n} {split}' for split, n in card['splits'].items())
    print(f'{FLAGS.out} {"is done already" if there else "written"}: {sizes}; '
          f'identity {card["identity"]}')


def embed() -> None:
    commands.need(prompts='name a folder', out='name a folder',
                  teacher='name a family, such as lumina')
    from ddmd_jax import embedding, families
    from ddmd_jax.data.prompts.set import open_set
    from ddmd_jax.parallel import sharding

    mesh = sharding.make_mesh({'fsdp': -1})
    text = families.get(FLAGS.teacher).load_text(
        families.LoadOptions(FLAGS.path, mesh, FLAGS.dtype, variant=FLAGS.variant))
    stored = open_set(FLAGS.prompts, FLAGS.split)
    identity, there = embedding.embed(stored, text, mesh, places.of(FLAGS.out), FLAGS.batch)
    print(f'{FLAGS.out} {"is done already" if there else "written"}: {len(stored)} prompts; '
          f'identity {identity}')


def emoji() -> None:
    commands.need(packages='name a folder', out='name a folder')
    from ddmd_jax.families.emoji import make_drawings

    count = make_drawings.make(places.of(FLAGS.packages, places.LOCAL),
                               places.of(FLAGS.out, places.LOCAL))
    print(f'{FLAGS.out} written: {count} drawings')


# Each word has its own flags; they are defined only when it is the one that is asked for.
COMMANDS = {'prompts': (prompts_flags, prompts), 'embed': (embed_flags, embed),
            'emoji': (emoji_flags, emoji)}


def main() -> None:
    word = sys.argv.pop(1) if len(sys.argv) > 1 else 'nothing'
    if word in ('--help', '-h'):
        print(__doc__)
        sys.exit(1)  # as absl has it
    if word not in COMMANDS:
        sys.exit(f'prepare: expected `prompts`, `embed` or `emoji`, got {word}')
    define_flags, run = COMMANDS[word]

    def act(arguments: list[str]) -> None:
        commands.only_flags(arguments)
        run()

    commands.run('prepare', act, define_flags)


if __name__ == '__main__':
    main()
