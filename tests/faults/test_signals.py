"""SIGTERM and SIGINT, the lock, a NaN: real processes, through `main`."""

import json
import signal
import time

import pytest
import runs

from ddmd_jax.train.durable import rollback

pytestmark = [pytest.mark.slow, pytest.mark.faults]
LONG = {'train.steps': 100_000, 'checkpoint.every': 100_000}


@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    return runs.Runs(tmp_path_factory.mktemp('signals'), TOY='1')


@pytest.fixture(scope='module')
def networks(tmp_path_factory):
    return runs.Runs(tmp_path_factory.mktemp('networks'))


def wait_for_line(process, workdir, count=1):
    """Until so many lines of metrics are there."""
    path = workdir / 'metrics.jsonl'
    while not path.exists() or len(path.read_text().splitlines()) < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_well(toy, number):
    workdir = toy.root / signal.Signals(number).name
    process = toy.start(workdir, LONG)
    wait_for_line(process, workdir, 2)
    before = runs.lines(workdir)[-1]['step']
    process.send_signal(number)
    process.send_signal(signal.SIGTERM)  # in a hurry: changes nothing
    _, err = runs.ended(process)
    (line,) = runs.said(err)
    name = signal.Signals(number).name
    (saved,) = [int(p.name) for p in (workdir / 'checkpoints').iterdir() if p.name.isdigit()]
    assert line == (f'main: {name}: stopped at step {saved} of 100000, saved in {workdir}/'
                    'checkpoints; run the same command to go on')
    assert before <= saved and 'Traceback' not in err
    # Going on from there is as if nothing had been: the half logged interval as well.
    end = {'train.steps': saved + 4, 'checkpoint.every': 100_000}
    toy.finish(workdir, end)
    toy.finish(toy.root / f'{name}-whole', end)
    runs.assert_same(workdir, toy.root / f'{name}-whole', saved + 4)


def test_a_signal_before_the_first_step_ends_a_run_with_nothing_to_save(toy):
    process = toy.start(toy.root / 'early', LONG)
    while not (toy.root / 'early' / 'lock').exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = runs.ended(process)
    assert 'SIGTERM: stopped' in runs.said(err)[0]


def test_two_runs_of_one_folder(toy):
    workdir = toy.root / 'locked'
    first = toy.start(workdir, LONG)
    wait_for_line(first, workdir)
    _, err = toy.finish(workdir, LONG, code=1)
    (line,) = runs.said(err)
    assert f'main: {workdir} is in use by process {first.pid} on ' in line
    first.kill()
    first.wait()
    toy.finish(workdir, {'train.steps': 2})  # nobody holds it any more


def test_a_nan_is_gone_back_on_left_out_and_replayed(networks):
    workdir, fields = networks.root / 'nan', {'train.steps': 8, 'train.on_nan': 'rollback'}
    networks.finish(workdir, fields, NAN='9')  # two batches a step: the fifth's, after a checkpoint
    (entry,) = [json.loads(x) for x in (workdir / 'bad_batches.jsonl').read_text().splitlines()]
    assert entry['step'] == 5 and entry['checkpoint'] == 4 and entry['batches'] == [8, 9]
    assert [len(rows) for rows in entry['rows']] == [4, 4]
    assert [x['step'] for x in runs.lines(workdir)] == [3, 6, 8]
    data = json.loads((workdir / 'checkpoints' / '8' / 'data' / 'metadata').read_text())
    assert data['next_index'] == 8 * 2 + 2
    out, _ = networks.finish(workdir, fields, ['--replay'], NAN='9')
    first, *figures = out.splitlines()
    assert first.startswith('step 5, from checkpoint 4: batches [8, 9], rows [[')
    assert any(x.startswith('loss nan') and x.endswith('<- not finite') for x in figures)
    assert any(x.startswith('finite 0.0') for x in figures)


def test_a_nan_ends_a_run_that_does_not_go_back(toy):
    _, err = toy.finish(toy.root / 'abort', {'train.steps': 8}, code=1, NAN='9')
    assert runs.said(err)[-1].startswith('main: step 5: NaN or Inf in ')


def test_a_nan_before_the_first_checkpoint_is_gone_back_on_from_the_start(toy):
    workdir = toy.root / 'early-nan'
    fields = {'train.steps': 6, 'train.on_nan': 'rollback', 'checkpoint.every': 6}
    _, err = toy.finish(workdir, fields, NAN='7')
    assert 'no checkpoint had been written yet' in err and 'back at the start, leaving out' in err
    (entry,) = rollback.read(workdir)
    assert entry['checkpoint'] is None and entry['step'] == 4 and entry['batches'] == [6, 7]
    assert [x['step'] for x in runs.lines(workdir)] == [3, 6]
    out, _ = toy.finish(workdir, fields, ['--replay'], NAN='7')
    first, *figures = out.splitlines()
    assert first.startswith('step 4, from the start: batches [6, 7], rows [[')
    assert 'finite 0.0' in figures and any(x.startswith('loss nan') for x in figures)


def test_a_bad_verdict_that_lasts_ends_training_and_is_saved(networks):
    fields = {'train.steps': 20, 'train.on_health': 'stop', 'log.every': 1,
              'optim.student.lr': 6e-6, 'optim.critic.lr': 6e-6}
    _, err = networks.finish(networks.root / 'unwell', fields)
    last = runs.lines(networks.root / 'unwell')[-1]
    assert 3 <= last['step'] < 20 and last['health'] != 'healthy'
    assert f"step {last['step']}: {last['health']} for 3 logged intervals (" in err
    assert (networks.root / 'unwell' / 'checkpoints' / str(last['step'])).is_dir()
