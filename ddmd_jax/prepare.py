"""Makes data files: sets of prompts, embeddings, latents of images, the embedded world's drawings.

    python -m ddmd_jax.prepare prompts    makes a set of prompts from files of them
    python -m ddmd_jax.prepare embed      encodes a set of prompts with a teacher's text encoder
    python -m ddmd_jax.prepare images     encodes real images with captions by a teacher's codec
    python -m ddmd_jax.prepare emoji      draws the objects of the embedded world

``python -m ddmd_jax.prepare WORD --help`` lists the flags of a word. Exit codes: 0 done; 1 it
could not go on (one line on stderr says why); 2 a flag is wrong.
"""

import dataclasses
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from ddmd_jax.util import commands, places
from ddmd_jax.util.errors import UserError

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


def images_flags() -> None:
    from ddmd_jax.data.images.sources import USUAL

    # Images are read at random, and parts of the folder are added one by one: no bucket does that.
    commands.define_places('input', 'A folder of images, .tar files of WebDataset, or tfds:NAME '
                           '(or its folder); separated by commas, or repeated.', places.LOCAL)
    commands.define_place('captions', '', "A folder's captions: a .jsonl, .csv, .tsv or .parquet "
                          'with columns of files and captions; default: NAME.txt beside NAME.jpg.',
                          places.LOCAL)
    flags.DEFINE_string('field', USUAL.caption, 'Column or field of captions; not of .txt.')
    flags.DEFINE_string('file_field', USUAL.file, "Column of images' names, of --captions.")
    flags.DEFINE_string('image_field', USUAL.image, 'Feature of images, of tfds:NAME.')
    flags.DEFINE_string('split', USUAL.split, 'Split of tfds:NAME.')
    flags.DEFINE_string('teacher', '', 'Family of the codec, such as sdxl.')
    commands.define_place('path', '', "The pipeline's folder, URL or hub id; as "
                          'config.teacher.path.', places.ANY)
    flags.DEFINE_string('variant', '', 'Variant of its weights, such as fp16; as '
                        'config.teacher.variant.')
    commands.define_place('out', '', 'Folder to write; it must not exist yet.', places.LOCAL)
    flags.DEFINE_list('sizes', ['1024x1024'], 'Sizes in pixels, HEIGHTxWIDTH: each image goes to '
                      'the one of the nearest aspect, and is cut at its middle.')
    flags.DEFINE_boolean('mean', False, "Keep the posterior's means instead of samples of it.")
    flags.DEFINE_integer('seed', 0, 'Of the samples.', 0, 2**32 - 1)
    flags.DEFINE_float('max_bad', 0.01, 'Share of images that may be left out: damaged, too small, '
                       'without a caption.', 0, 1)
    flags.DEFINE_integer('batch', 1, 'Images that a device encodes at a time.', 1)
    flags.DEFINE_integer('process', 0, 'Which of --processes this is, from 0.', 0)
    flags.DEFINE_integer('processes', 1, 'Processes that write the folder together.', 1)
    commands.finite('max_bad')
    flags.register_validator('sizes', lambda given: bool(given) and all(
        re.fullmatch(r'[1-9]\d*x[1-9]\d*', size) for size in given),
        'must be HEIGHTxWIDTH, as 832x1216')


def emoji_flags() -> None:
    commands.define_place('packages', '', 'Folder of the emoji sets\' npm packages (.tgz).',
                          places.LOCAL)
    commands.define_place('out', '', 'Folder to write; it must not exist yet.', places.LOCAL)


def _inputs(schemes: Sequence[str]) -> tuple[str, ...]:
    """What --input names; a comma separates two unless a file is called so."""
    return tuple(places.checked(name, schemes) for item in FLAGS.input
                 for name in ([item] if os.path.exists(item) else item.split(',')) if name)


def prompts() -> None:
    commands.need(input='name files of prompts', out='name a folder to write')
    from ddmd_jax.data.prompts import build

    files = tuple(os.fspath(places.of(name)) for name in _inputs(places.BUCKETS))
    given: dict[str, Any] = {f.name: FLAGS[f.name].value
                             for f in dataclasses.fields(build.Settings) if f.name != 'input'}
    settings = build.Settings(files, **given)
    card, there = build.prepare(settings, places.of(FLAGS.out))
    print(f'prepare: {build.summary(card["counts"])}', file=sys.stderr)
    sizes = ', '.join(f'{n} {split}' for split, n in card['splits'].items())
    print(f'{FLAGS.out} {"is done already" if there else "written"}: {sizes}; '
          f'identity {card["identity"]}')


def images() -> None:
    commands.need(input='name a folder of images', teacher='name a family, such as sdxl',
                  path="name the pipeline's folder", out='name a folder to write')
    from ddmd_jax import families, imaging
    from ddmd_jax.data.images import cache, sources
    from ddmd_jax.parallel import sharding

    if FLAGS.process >= FLAGS.processes:
        raise UserError(f'--process={FLAGS.process} must lie in 0..{FLAGS.processes - 1}')
    sizes = tuple(dict.fromkeys((int(h), int(w)) for h, w in (s.split('x') for s in FLAGS.sizes)))
    fields = sources.Fields(FLAGS.field, FLAGS.file_field, FLAGS.image_field, FLAGS.split)
    source = sources.open_source(_inputs(places.LOCAL), FLAGS.captions, fields)
    mesh = sharding.make_mesh({'fsdp': -1})
    encoder = families.get(FLAGS.teacher).load_images(
        families.LoadOptions(FLAGS.path, mesh, variant=FLAGS.variant))
    wanted = imaging.Wanted(sizes, FLAGS.mean, FLAGS.seed, FLAGS.max_bad, FLAGS.batch)
    out = Path(places.of(FLAGS.out, places.LOCAL))
    card, there = imaging.encode(source, encoder, wanted, mesh, out,
                                 (FLAGS.process, FLAGS.processes))
    if card is None:
        print(f"{FLAGS.out}: this process's part is written; others have theirs to write")
        return
    counts = ', '.join(f'{n} of {h}x{w}' for n, (h, w) in zip(
        card['of_each_size'], card['settings']['sizes']))
    left_out = card['left_out']
    print(f'{FLAGS.out} {"is done already" if there else "written"}: {card["count"]} images '
          f'({counts}), {left_out["count"]} left out; identity {card["identity"]}')
    if left_out['count']:
        print(f'prepare: {cache.summary(left_out["first"], left_out["count"])}', file=sys.stderr)


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
            'images': (images_flags, images), 'emoji': (emoji_flags, emoji)}


def main() -> None:
    word = sys.argv.pop(1) if len(sys.argv) > 1 else 'nothing'
    if word in ('--help', '-h'):
        print(__doc__)
        sys.exit(1)  # as absl has it
    if word not in COMMANDS:
        sys.exit(f'prepare: expected `prompts`, `embed`, `images` or `emoji`, got {word}')
    define_flags, run = COMMANDS[word]

    def act(arguments: list[str]) -> None:
        commands.only_flags(arguments)
        run()

    commands.run('prepare', act, define_flags)


if __name__ == '__main__':
    main()
