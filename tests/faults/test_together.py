"""What one process refuses or cannot read ends them all, and leaves the run as it was."""

import json
import shutil

import pytest
import runs
import stores

from ddmd_jax.train.durable import checksums
from ddmd_jax.util import buckets, jsonl, places

pytestmark = [pytest.mark.slow, pytest.mark.faults]
FIELDS = {'data.global_batch': 16, 'log.every': 1, 'train.steps': 4, 'mesh.data': 1,
          'mesh.fsdp': 2, 'mesh.tensor': 2}
GONE = 'process {} has failed (its own output says why)'


@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    return runs.Runs(tmp_path_factory.mktemp('together'), TOY='1')


@pytest.fixture(scope='module')
def finished(toy):
    """A run of two processes, with checkpoints of steps 2 and 4."""
    both(toy, toy.root / 'finished')
    return toy.root / 'finished'


@pytest.fixture
def workdir(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / 'run')


def both(toy, workdir, code=0, fields=({}, {}), **environ):
    """[(stdout, stderr) of process 0, of process 1], which have fields of their own."""
    started = toy.start_together(2, workdir, [FIELDS | own for own in fields], **environ)
    return [runs.ended(p, code) for p in started]


def told(ended):
    """What each process says in the end, in one line; there is no traceback."""
    assert all('Traceback' not in err for _, err in ended), ended
    return [runs.said(err, 'main: ')[-1] for _, err in ended]


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes()
            for p in sorted(folder.rglob('*')) if p.is_file() and p.name not in ('lock', 'probe')
            and 'compile_cache' not in p.parts}


@pytest.mark.parametrize('other, words', [
    ({'optim.student.lr': 5e-3}, 'optim.student.lr: 0.001 -> 0.005'),
    ({'seed': 7}, 'seed: 0 -> 7')])
def test_a_start_that_is_refused_leaves_what_the_run_says_of_itself(toy, workdir, other, words):
    before = contents(workdir)
    lines = told(both(toy, workdir, 1, (other, other)))
    assert any(words in line for line in lines), lines
    assert contents(workdir) == before and 'config.json' in before


def test_a_start_that_fails_writes_nothing_of_a_run(toy, tmp_path):
    fields = {'init_from': tmp_path / 'nowhere'}
    lines = told(both(toy, tmp_path / 'run', 1, (fields, fields)))
    assert any(f'config.init_from: no {tmp_path}/nowhere' in line for line in lines), lines
    assert not contents(tmp_path / 'run')


def test_processes_of_unlike_configs_end_at_once(toy, workdir):
    before = contents(workdir)
    lines = told(both(toy, workdir, 1, ({}, {'seed': 1, 'train.steps': 6})))
    assert ('process 1 has another config than process 0: seed: 0, here 1; train.steps: 4, here 6'
            in lines[1])
    assert GONE.format(1) in lines[0] and contents(workdir) == before


@pytest.mark.parametrize('name, what', [('IDENTITY', 'data'), ('TEACHER', 'teacher')])
def test_processes_of_unlike_data_or_teachers_end_at_once(toy, workdir, name, what):
    before = contents(workdir)
    lines = told(both(toy, workdir, 1, **{name: ['', 'other']}))
    assert (f"process 1 has another teacher or data than process 0: {what}_identity: 'toy', here "
            "'other'") in lines[1]
    assert GONE.format(1) in lines[0] and contents(workdir) == before


def test_data_that_both_have_and_the_run_has_not_are_refused(toy, workdir):
    before = contents(workdir)
    lines = told(both(toy, workdir, 1, IDENTITY='other'))
    assert any("data_identity: 'toy' -> 'other'" in line for line in lines), lines
    assert contents(workdir) == before


def test_devices_that_one_process_lacks_are_its_own_fault(toy, workdir):
    before = contents(workdir)
    lines = told(both(toy, workdir, 1, JAX_PLATFORMS=['cpu', 'cuda']))
    assert 'JAX cannot use the devices that it is told to (JAX_PLATFORMS=cuda)' in lines[1]
    assert GONE.format(1) in lines[0] and contents(workdir) == before


@pytest.mark.parametrize('which', [0, 1])
def test_a_checkpoint_that_one_process_cannot_read_is_not_called_damaged(toy, workdir, which):
    before = contents(workdir)
    lines = told(both(toy, workdir, 1, UNREADABLE=[str(i == which or '') for i in range(2)]))
    assert 'the disk or its network does not answer' in lines[which], lines
    assert contents(workdir) == before  # nothing is moved away
    ended = both(toy, workdir, fields=[{'train.steps': 5}] * 2, DIGEST='1')
    assert [runs.digests(out)['start'][0] for out, _ in ended] == [4, 4]


def test_a_damaged_checkpoint_is_left_by_both_for_the_one_before(toy, workdir):
    """Whichever of the two has come upon the damage: together they read all files."""
    folder = workdir / 'checkpoints' / '4'
    names = sorted(json.loads((folder / checksums.NAME).read_text()))
    for part in (0, 1):
        bad = shutil.copytree(workdir, workdir.with_name(f'bad{part}'))
        name = next(x for x in names[part::2] if (folder / x).stat().st_size)
        raw = bytearray((folder / name).read_bytes())
        raw[0] ^= 255
        (bad / 'checkpoints' / '4' / name).write_bytes(raw)
        ended = both(toy, bad, DIGEST='1')
        starts, ends = ([runs.digests(out)[what] for out, _ in ended] for what in ('start', 'end'))
        assert starts[0] == starts[1] and starts[0][0] == 2
        assert ends[0] == ends[1] and ends[0][0] == 4
        warned = [runs.said(err, 'warning: ') for _, err in ended]
        assert any('checkpoints/4 is damaged' in x for x in warned[0]), ended
        runs.assert_same(bad, workdir, 4)


def test_two_processes_train_in_a_bucket_as_on_a_disk(toy, finished):
    with stores.serving('gs', 'together') as url:
        workdir = places.of(f'{url}/run')
        both(toy, workdir, fields=[{'train.steps': 2}] * 2)
        assert checksums.steps(workdir / 'checkpoints') == [2]
        ended = both(toy, workdir, DIGEST='1')
        assert [runs.digests(out)['start'][0] for out, _ in ended] == [2, 2]
        ends = [runs.digests(out)['end'] for out, _ in both(toy, finished, DIGEST='1')]
        assert [runs.digests(out)['end'] for out, _ in ended] == ends
        assert checksums.steps(workdir / 'checkpoints') == [2, 4]
        assert all(checksums.fault(workdir / 'checkpoints' / str(s)) == '' for s in (2, 4))
        strip = lambda entry: {k: v for k, v in entry.items() if isinstance(v, str)}
        assert [x['step'] for x in jsonl.read(workdir / 'metrics.jsonl')] == [1, 2, 3, 4]
        assert [strip(x) for x in jsonl.read(workdir / 'metrics.jsonl')] == [
            strip(x) for x in jsonl.read(finished / 'metrics.jsonl')]
        assert not any(name.startswith('damaged') for name in buckets.listing(workdir))
        # And what one process refuses there, all of them do.
        before = {k: buckets.version(v) for k, v in buckets.listing(workdir).items()}
        lines = told(both(toy, workdir, 1, [{'optim.student.lr': 5e-3}] * 2))
        assert any('optim.student.lr: 0.001 -> 0.005' in line for line in lines), lines
        after = {k: buckets.version(v) for k, v in buckets.listing(workdir).items()}
        assert {k: v for k, v in after.items() if 'lock' not in k and 'cache' not in k} == {
            k: v for k, v in before.items() if 'lock' not in k and 'cache' not in k}
