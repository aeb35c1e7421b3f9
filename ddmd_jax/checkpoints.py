"""``python -m ddmd_jax.checkpoints WORKDIR [--verify] [--prune --keep=N --every=K]``

Lists a run's checkpoints; with `--verify` reads every file and says which are damaged; with
`--prune` deletes all but the newest `--keep` good ones and those at multiples of `--every`.
Exit codes: 0; 1 if one is damaged or it could not be done (one line on stderr); 2 a wrong flag.
"""

import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from absl import app, flags, logging

from ddmd_jax.util import arguments, text

FLAGS = flags.FLAGS
# Entries of a manifest in the listing: enough to tell runs apart.
SHOWN = ('task', 'teacher.name', 'method.schedule', 'student.steps', 'data.global_batch', 'seed',
         'version.ddmd_jax', 'version.jax')


def define_flags() -> None:
    flags.DEFINE_boolean('verify', False, 'Read every file and compare it with its checksum.')
    flags.DEFINE_boolean('prune', False, 'Delete checkpoints that --keep and --every do not keep; '
                         'verifies them first.')
    flags.DEFINE_integer('keep', 2, 'Newest good checkpoints that --prune keeps.', lower_bound=1)
    flags.DEFINE_integer('every', 0, 'Multiples of this are kept too; 0 is off.', lower_bound=0)


def listing(directory: Path, verify: bool) -> tuple[str, list[int]]:
    """(a table of the checkpoints, steps of the damaged ones, which only `verify` finds)."""
    from ddmd_jax.train.durable import checksums

    rows, damaged = [], []
    for step in checksums.steps(directory):
        folder = directory / str(step)
        size = sum(path.stat().st_size for path in checksums.files(folder).values())
        age = text.duration(time.time() - folder.stat().st_mtime)
        row = [str(step), text.in_units(size), age]
        if verify:
            fault = checksums.fault(folder)
            damaged += [step] if fault else []
            row.append(f'damaged: {fault}' if fault else
                       'good' if checksums.known(folder) else 'readable')
        rows.append([*row, _summary(folder)])
    return text.aligned(rows, numbers=0), damaged


def _summary(folder: Path) -> str:
    from ddmd_jax.train.durable.checkpoint import CheckpointError, manifest_of

    try:
        manifest: dict[str, Any] = manifest_of(folder)
    except CheckpointError:
        return 'no readable manifest'
    return ' '.join(f'{name.rpartition(".")[2]}={manifest[name]}' for name in SHOWN
                    if name in manifest)


def kept(good: list[int], keep: int, every: int) -> set[int]:
    """Steps that stay of those that are good."""
    return set(good[-keep:]) | {step for step in good if every and step % every == 0}


def prune(directory: Path, keep: int, every: int) -> list[int]:
    """Deletes good checkpoints that need not stay; returns their steps. Damaged ones are left.

    Raises:
      LockError: a run has the folder.
    """
    from ddmd_jax.train.durable import checksums, lock

    with lock.held(directory.parent):
        for scratch in directory.glob('*.deleted'):  # of a command that was killed
            shutil.rmtree(scratch)
        good = [s for s in checksums.steps(directory) if not checksums.fault(directory / str(s))]
        gone = [step for step in good if step not in kept(good, keep, every)]
        for step in gone:
            # Renamed first: one that is half deleted must not look like a checkpoint.
            scratch = (directory / str(step)).rename(directory / f'{step}.deleted')
            shutil.rmtree(scratch)
        return gone


def main(argv: list[str]) -> None:
    if not FLAGS['verbosity'].present:
        logging.set_verbosity(logging.WARNING)  # of libraries' chatter; as in `main`
    os.environ['JAX_PLATFORMS'] = 'cpu'  # nothing is computed, and a run may have the devices
    if len(argv) != 2:
        sys.exit(f'checkpoints: expected one folder, the --workdir of a run, got {len(argv) - 1}')
    from ddmd_jax.train.durable.checkpoint import CheckpointError, checkpoints_in
    from ddmd_jax.train.durable.lock import LockError

    try:
        directory = checkpoints_in(Path(argv[1]).expanduser().absolute())
        if FLAGS.prune:
            gone = prune(directory, FLAGS.keep, FLAGS.every)
            print(f'deleted: {", ".join(map(str, gone)) or "none"}')
        table, damaged = listing(directory, FLAGS.verify)
    except (CheckpointError, LockError) as e:
        sys.exit(f'checkpoints: {e}')
    except OSError as e:
        sys.exit(f'checkpoints: {e.filename} cannot be changed ({e.strerror})')
    print(table)
    if damaged:
        sys.exit(f'checkpoints: damaged: {", ".join(map(str, damaged))}; resuming moves them aside')


if __name__ == '__main__':
    define_flags()
    app.run(main, flags_parser=arguments.parser('checkpoints'))
