"""``python -m ddmd_jax.checkpoints WORKDIR [--verify] [--prune --keep=N --every=K]``

Lists a run's checkpoints; with `--verify` reads every file and says which are damaged; with
`--prune` deletes all but the newest `--keep` good ones, those at multiples of `--every`, the best
by the run's `checkpoint.best`, and those that `--replay` goes back to.
Exit codes: 0; 1 if one is damaged or it could not be done (one line on stderr); 2 a wrong flag.
"""

import os
import time
from collections.abc import Sequence

from absl import flags

from ddmd_jax.util import commands, files, places, shape, text
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


def best(directory: Place, steps: Sequence[int]) -> int | None:
    """Which of `steps` is the best by what the run was last told to go by; None if by nothing."""
    from ddmd_jax import config as config_lib
    from ddmd_jax.train.durable.saving import Retention
    from ddmd_jax.util import run_files

    config = run_files.read(directory.parent, 'config.json')
    named, mode = (config_lib.field(config, f'checkpoint.{name}') for name in ('best', 'best_mode'))
    by, found = Retention(best=named or '', mode=mode or 'min'), {}
    for step in steps if named else ():
        file = directory / str(step) / 'metrics' / 'metrics'  # as Orbax writes them
        if file.is_file():
            found[step] = by.figure(shape.load(file.read_bytes(), {str: float}))
    sign = 1 if by.mode == 'min' else -1
    return min(reversed(found), key=lambda step: sign * found[step], default=None)


def prune(directory: Place, keep: int, every: int) -> list[int]:
    """Deletes good checkpoints that need not stay; returns their steps. Damaged ones are left."""
    from ddmd_jax.train.durable import checksums, lock, rollback

    with lock.held(directory.parent):
        pinned = {entry['checkpoint'] for entry in rollback.read(directory.parent)}
        for scratch in directory.glob('*.deleted'):  # of a command that was killed
            files.remove(scratch)
        good = [s for s in checksums.steps(directory) if not checksums.fault(directory / str(s))]
        stay = {*good[-keep:], *pinned, best(directory, good)}
        gone = [step for step in good if step not in stay and (not every or step % every)]
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
