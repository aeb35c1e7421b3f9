"""Saves that fail or hang, files without room, memory that grows: real processes."""

import json

import pytest
import runs

from ddmd_jax.train.durable import checksums

pytestmark = [pytest.mark.slow, pytest.mark.faults]
ROOM = 'make room, then run the same command to go on from'


@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    return runs.Runs(tmp_path_factory.mktemp('saves'), TOY='1')


@pytest.fixture(scope='module')
def undisturbed(toy):
    """``undisturbed(steps)`` is the folder of a run that nothing happened to."""
    def run(steps):
        workdir = toy.root / f'whole{steps}'
        if not workdir.exists():
            toy.finish(workdir, {'train.steps': steps})
        return workdir

    return run


def no_library_speaks(err):
    """Nothing but our own lines and the progress bar."""
    assert 'Traceback' not in err and 'Error in' not in err and 'Exception' not in err, err


def test_a_full_disk_keeps_the_checkpoint_before(toy, small_disk, undisturbed):
    workdir, filler = small_disk / 'run', small_disk / 'filler'
    _, err = toy.finish(workdir, {'train.steps': 5}, code=1, FILL=str(filler))
    told = [x for x in runs.said(err) if 'tensorboard' not in x]  # whose thread may find out first
    assert told[0].startswith(f'warning: checkpoint {workdir}/checkpoints/4 could not be written (')
    assert told[-1].startswith('main: step 5 could not be saved, twice (')
    assert f'step 2 is the newest checkpoint in {workdir}/checkpoints' in told[-1]
    assert ROOM in told[-1]
    no_library_speaks(err)
    assert [p.name for p in (workdir / 'checkpoints').iterdir()] == ['2']  # no half ones
    filler.unlink()
    toy.finish(workdir, {'train.steps': 5})
    runs.assert_same(workdir, undisturbed(5), 5)


def test_files_that_may_not_grow_are_like_a_full_disk(toy):
    """A quota, as it were: the tensors find no room, what is small does."""
    workdir = toy.root / 'limited'
    _, err = toy.finish(workdir, {'train.steps': 5}, code=1, LIMIT='3')
    told = runs.said(err)
    assert told[-1].startswith('main: step 5 could not be saved, twice (')
    assert ROOM in told[-1]
    no_library_speaks(err)
    assert checksums.steps(workdir / 'checkpoints') == [2]
    assert [x['step'] for x in runs.lines(workdir)] == [3, 5]


@pytest.mark.parametrize('step, file, fields, environ', [
    ('3', 'metrics.jsonl', {}, {}),
    ('5', 'bad_batches.jsonl', {'train.on_nan': 'rollback'}, {'NAN': '9'}),
])
def test_a_line_that_finds_no_room_ends_the_run_and_is_written_by_the_next(
        toy, small_disk, undisturbed, step, file, fields, environ):
    workdir, filler = small_disk / 'run', small_disk / 'filler'
    fields = {'train.steps': 5} | fields
    _, err = toy.finish(workdir, fields, code=1, FILL=str(filler), AT=step, LEFT='0', **environ)
    assert runs.said(err)[-1] == (
        f'main: {workdir}: there is no room on the disk; make some, then run the same command '
        'again ([Errno 28] No space left on device)')
    no_library_speaks(err)
    assert (workdir / file).read_bytes() == b''
    filler.unlink()
    toy.finish(workdir, fields, **environ)
    if environ:
        (entry,) = [json.loads(x) for x in (workdir / file).read_text().splitlines()]
        assert entry['batches'] == [8, 9]
    else:
        runs.assert_same(workdir, undisturbed(5), 5)


def test_a_save_that_hangs_ends_the_run(toy, undisturbed):
    """A pipe in the place of a file: Orbax's thread waits in the kernel, as for a dead server."""
    workdir, fields = toy.root / 'hanging', {'train.steps': 100_000, 'checkpoint.timeout': 5}
    _, err = toy.finish(workdir, fields, code=1, HANG='manifest:2:0')
    (line,) = runs.said(err)
    assert line == (
        f'main: checkpoint {workdir}/checkpoints/4 was not on disk after 5 s (checkpoint.timeout): '
        'the write hangs and cannot be stopped; step 2 is the newest checkpoint in '
        f'{workdir}/checkpoints; see to the disk, then run the same command to go on from there')
    no_library_speaks(err)
    toy.finish(workdir, {'train.steps': 5})
    runs.assert_same(workdir, undisturbed(5), 5)


def test_a_save_that_hangs_in_one_of_two_processes_ends_both(toy):
    workdir, batch = toy.root / 'both', {'data.global_batch': 8}
    fields = batch | {'train.steps': 100_000, 'checkpoint.timeout': 8, 'mesh.data': 4}
    started = toy.start_together(2, workdir, fields, HANG=['manifest:2:0', ''])
    for process in started:  # each finds out by itself, or is told by the other
        _, err = runs.ended(process, 1)
        last = runs.said(err)[-1]
        assert last.startswith('main: ') and ('checkpoint.timeout' in last or 'has failed' in last)
        no_library_speaks(err)
    toy.finish(workdir, batch | {'train.steps': 5})
    assert checksums.steps(workdir / 'checkpoints') == [4, 5]
