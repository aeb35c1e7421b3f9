"""Makes data files: sets of prompts, and those that come with a teacher's family.

    python -m ddmd_jax.prepare prompts       makes a set of prompts from files of them
    python -m ddmd_jax.prepare embed         encodes a set of prompts with a teacher's text encoder
    python -m ddmd_jax.prepare emoji         renders the glyphs, learns the tokenizer
    python -m ddmd_jax.prepare classifier    trains the judge of the metrics (minutes)

``python -m ddmd_jax.prepare WORD --help`` lists the flags of a word. Exit codes: 0 done; 1 it
could not go on (one line on stderr says what, where and how to mend it); 2 a flag is wrong.
"""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import app, flags, logging

from ddmd_jax import families
from ddmd_jax.families.family import Command

FLAGS = flags.FLAGS
FAMILIES = f'{", ".join(families.NAMES)}, or the full name of a module of yours'


def prompts_flags() -> None:
    flags.DEFINE_multi_string('input', [], 'Files of prompts: .txt, .jsonl, .csv, .tsv, .parquet; '
                              'separated by commas, or repeated.')
    flags.DEFINE_string('out', '', 'Folder to write; it must not exist yet.')
    flags.DEFINE_string('field', 'prompt', 'Name of the field or column; not of .txt.')
    flags.DEFINE_integer('min_chars', 1, 'Shorter prompts are dropped.', 1)
    flags.DEFINE_integer('max_chars', 2000, 'Longer prompts are dropped.', 1)
    flags.DEFINE_float('near_threshold', 0.85, 'Jaccard similarity (of runs of 5 characters) from '
                       'which prompts are near-duplicates; 1 keeps them all.', 0.3, 1)
    flags.DEFINE_float('validation', 0.01, 'Share of prompts in the validation split.', 0, 1)


def embed_flags() -> None:
    flags.DEFINE_string('prompts', '', 'Folder of a set of prompts (`prepare prompts`).')
    flags.DEFINE_enum('split', 'train', ('train', 'validation'), 'Which of its prompts.')
    flags.DEFINE_string('teacher', 'lumina', f'Family of the text encoder: {FAMILIES}.')
    flags.DEFINE_string('path', '', 'Its diffusers folder, URL or hub id; as config.teacher.path.')
    flags.DEFINE_string('out', '', 'Folder to write; it must not exist yet.')
    flags.DEFINE_integer('batch', 64, 'Prompts encoded at a time, over all devices.', 1)
    flags.DEFINE_enum('dtype', 'bfloat16', ('bfloat16', 'float32'), 'Of the encoder\'s products.')
    flags.DEFINE_boolean('yes', False, 'Do not ask before the disk is written to.')


def _inputs(given: list[str]) -> tuple[str, ...]:
    """Names of files; a comma separates two unless a file is called so."""
    return tuple(name for item in given
                 for name in ([item] if Path(item).exists() else item.split(',')) if name)


def run_prompts() -> None:
    if not FLAGS.input:
        sys.exit('prepare: no --input given; name files of prompts')
    if not FLAGS.out:
        sys.exit('prepare: no --out given; name a folder to write')
    from ddmd_jax.data import DataFileError
    from ddmd_jax.data.prompts import build as prompts

    given: dict[str, Any] = {f.name: FLAGS[f.name].value
                             for f in dataclasses.fields(prompts.Settings) if f.name != 'input'}
    settings = prompts.Settings(_inputs(FLAGS.input), **given)
    try:
        card, there = prompts.prepare(settings, Path(FLAGS.out))
    except DataFileError as e:
        sys.exit(f'prepare: {e}')
    except KeyboardInterrupt:
        sys.exit('prepare: stopped; nothing was written')
    for line in prompts.warnings(card):
        print(f'prepare: warning: {line}', file=sys.stderr)
    sizes = ', '.join(f'{n} {split}' for split, n in card['splits'].items())
    print(f'{FLAGS.out} {"is done already" if there else "written"}: {sizes}; '
          f'identity {card["identity"]}')


def _agreed(words: str) -> bool:
    """What the user says to `words`; who cannot be asked has to say --yes beforehand."""
    if FLAGS.yes:
        print(f'prepare: {words}', file=sys.stderr)
    elif not sys.stdin.isatty():
        return False
    return FLAGS.yes or input(f'{words}. Write? [y/N] ').strip().lower() in ('y', 'yes')


def run_embed() -> None:
    for name in ('prompts', 'out'):
        if not FLAGS[name].value:
            sys.exit(f'prepare: no --{name} given; name a folder')
    from ddmd_jax import embedding
    from ddmd_jax.data import DataFileError
    from ddmd_jax.data.prompts.set import open_set
    from ddmd_jax.parallel import sharding
    from ddmd_jax.weights.flat import WeightsError

    mesh = sharding.make_mesh({'fsdp': -1})
    try:
        text = families.get(FLAGS.teacher).load_text(
            families.LoadOptions(FLAGS.path, mesh, FLAGS.dtype))
        job, there = embedding.embed(open_set(FLAGS.prompts, FLAGS.split), text, mesh,
                                     Path(FLAGS.out).absolute(), FLAGS.batch, _agreed)
    except (DataFileError, families.UnknownFamily, sharding.ShardingError, WeightsError) as e:
        sys.exit(f'prepare: {e}')
    except KeyboardInterrupt:
        sys.exit('prepare: stopped; the same command goes on, finished files are kept')
    print(f'{FLAGS.out} {"is done already" if there else "written"}: {len(job.lengths)} prompts; '
          f'identity {job.settings["identity"]}')


# Each word has its own flags; they are defined only when it is the one that is asked for.
COMMANDS: Mapping[str, Command] = {
    'prompts': Command(prompts_flags, run_prompts),
    'embed': Command(embed_flags, run_embed),
}


def commands() -> Mapping[str, Command]:
    """The words of this command, those that the built-in families offer among them."""
    found = dict(COMMANDS)
    for name in families.NAMES:
        found |= families.get(name).commands
    return found


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parser of what follows the word: [program, word, what is no flag, ...]."""
    word = argv[1] if len(argv) > 1 else 'nothing'
    if word in ('--help', '-h'):
        print(__doc__)
        sys.exit(1)  # as absl has it
    if word not in commands():
        names = [f'`{name}`' for name in commands()]
        sys.exit(f'prepare: expected {", ".join(names[:-1])} or {names[-1]}, got {word}')
    commands()[word].flags()
    try:
        program, *rest = FLAGS([argv[0], *argv[2:]])
    except flags.Error as e:
        print(f'prepare: {" ".join(str(e).split())}', file=sys.stderr)
        sys.exit(2)
    return [program, word, *rest]


def main(argv: list[str]) -> None:
    if not FLAGS['verbosity'].present:
        logging.set_verbosity(logging.WARNING)  # of libraries' chatter; as in `main`
    _, word, *rest = argv
    if rest:
        sys.exit(f'prepare: unexpected argument {rest[0]!r}; flags look like --out=DIR')
    commands()[word].run()


if __name__ == '__main__':
    app.run(main, flags_parser=parse_flags)
