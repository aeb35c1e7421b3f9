"""``python -m ddmd_jax.checkpoints WORKDIR [--verify] [--prune --keep=N --every=K]``

Lists a run's checkpoints; with `--verify` reads every file and says which are damaged; with
`--prune` deletes all but the newest `--keep` good ones and those at multiples of `--every`.
Exit codes: 0; 1 if one is damaged or it could not be done (one line on stderr); 2 a wrong flag.
"""

import os
import time

from absl import flags

from ddmd_jax.util import commands, files, places, text
from ddmd_jax.util.errors import UserError
from ddmd_jax.util.places import Place

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


def listing(directory: Place, verify: bool) -> tuple[str, list[int]]:
    """(a table of the checkpoints, steps of the damaged ones, which only `verify` finds)."""
    from ddmd_jax.train.durable import checkpoint as ckpt, checksums

    rows, damaged = [], []
    for step in checksums.steps(directory):
        folder = directory / str(step)
        size = sum(checksums.sizes(folder).values())
        row = [str(step), text.in_units(size), text.duration(time.time() - files.written(folder))]
        if verify:
            fault = checksums.fault(folder)
            damaged += [step] if fault else []
            row.append(f'damaged: {fault}' if fault else
                       'good' if checksums.known(folder) else 'readable')
        try:
            saved = ckpt.manifest_of(folder)
            row.append(' '.join(f'{name.rpartition(".")[2]}={saved[name]}' for name in SHOWN
                                if name in saved))
        except ckpt.CheckpointError:
            row.append('no readable manifest')
        rows.append(row)
    return text.aligned(rows, numbers=0), damaged


def prune(directory: Place, keep: int, every: int) -> list[int]:
    """Deletes good checkpoints that need not stay; returns their steps. Damaged ones are left."""
    from ddmd_jax.train.durable import checksums, lock

    with lock.held(directory.parent):
        for scratch in directory.glob('*.deleted'):  # of a command that was killed
            files.remove(scratch)
        good = [s for s in checksums.steps(directory) if not checksums.fault(directory / str(s))]
        gone = [step for step in good[:-keep] if not every or step % every]
        for step in gone:
            # Renamed first: one that is half deleted must not look like a checkpoint.
            scratch = directory / f'{step}.deleted'
            files.move(directory / str(step), scratch)
            files.remove(scratch)
        return gone


def main(arguments: list[str]) -> None:
    os.environ['JAX_PLATFORMS'] = 'cpu'  # nothing is computed, and a run may have the devices
    if len(arguments) != 1:
        raise UserError(f'expected one folder, the --workdir of a run, got {len(arguments)}')
    from ddmd_jax.train.durable import checksums
    from ddmd_jax.train.durable.checkpoint import checkpoints_in

    directory = checkpoints_in(places.of(arguments[0]))
    if not checksums.steps(directory):
        raise UserError(f'{directory} is empty: the run has saved nothing yet')
    if FLAGS.prune:
        gone = prune(directory, FLAGS.keep, FLAGS.every)
        print(f'deleted: {", ".join(map(str, gone)) or "none"}')
    table, damaged = listing(directory, FLAGS.verify)
    print(table)
    if damaged:
        raise UserError(f'damaged: {", ".join(map(str, damaged))}; resuming moves them aside')


if __name__ == '__main__':
    commands.run('checkpoints', main, define_flags)
