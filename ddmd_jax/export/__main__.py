"""``python -m ddmd_jax.export --checkpoint=WORKDIR --out=DIR``: a student for others to load.

Writes the EMA student of a run: as a pipeline that diffusers loads, as safetensors or as an
Orbax checkpoint, with a model card. Exit code 1, and one line on stderr, if it cannot.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

from absl import app, flags, logging

from ddmd_jax.diffusion.sampling import STUDENT_MODES
from ddmd_jax.util import arguments

FLAGS = flags.FLAGS


def define_flags() -> None:
    from ddmd_jax.export import DTYPES, FORMATS

    flags.DEFINE_string('checkpoint', None, 'Folder of the run (its --workdir).')
    flags.DEFINE_string('out', None, 'Folder to write; nothing in it is overwritten.')
    flags.DEFINE_enum('format', 'diffusers', FORMATS, 'What reads the result.')
    flags.DEFINE_enum('dtype', 'float32', DTYPES, 'Type of the tensors written.')
    flags.DEFINE_boolean('ema', True, 'The EMA student; --noema is the raw one.')
    flags.DEFINE_enum('sampler', '', ('', *STUDENT_MODES), 'What the pipeline\'s scheduler does; '
                      'default: what the run was trained for.')
    flags.DEFINE_string('teacher', '', 'The teacher\'s folder, if it is no longer where it was.')
    flags.DEFINE_string('push', '', 'OWNER/NAME on the hub to upload the folder to.')
    flags.DEFINE_boolean('private', False, 'Makes what --push makes private.')


def main(argv: list[str]) -> None:
    if not FLAGS['verbosity'].present:
        logging.set_verbosity(logging.WARNING)  # of libraries' chatter; as in `main`
    if len(argv) > 1:
        sys.exit(f'export: unexpected argument {argv[1]!r}; flags look like --out=DIR')
    for name in ('checkpoint', 'out'):
        if not FLAGS[name].value:
            sys.exit(f'export: no --{name} given')
    if FLAGS.push and FLAGS.push.count('/') != 1:
        sys.exit(f'export: --push={FLAGS.push} is not OWNER/NAME')
    from ddmd_jax.export import CheckpointError, Wanted, WeightsError, export, hub
    from ddmd_jax.parallel.sharding import ShardingError

    path = lambda name: Path(str(FLAGS[name].value)).expanduser().absolute()
    asked: dict[str, Any] = {f.name: FLAGS[f.name].value for f in dataclasses.fields(Wanted)}
    out = path('out')
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        sys.exit(f'export: --out {out} cannot be made ({e.strerror}); choose another')
    try:
        written = export(path('checkpoint'), out, Wanted(**asked))
        print('\n'.join(map(str, written)))
        if FLAGS.push:
            print(hub.push(out, FLAGS.push, FLAGS.private))
    except (CheckpointError, ShardingError, WeightsError, hub.PushError) as e:
        sys.exit(f'export: {e}')
    except OSError as e:
        sys.exit(f'export: {out} cannot be written ({e}); choose another place')


if __name__ == '__main__':
    define_flags()
    app.run(main, flags_parser=arguments.parser('export'))
