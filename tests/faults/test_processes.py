"""A run goes on on other devices and processes, and ends in a word when one of them dies."""

import signal
import time

import numpy as np
import pytest
import runs

pytestmark = [pytest.mark.slow, pytest.mark.faults]
BATCH = {'data.global_batch': 16, 'log.every': 1}
MESHES = {1: {}, 4: {'mesh.data': 1, 'mesh.fsdp': 2, 'mesh.tensor': 2},
          8: {'mesh.data': 2, 'mesh.fsdp': 2, 'mesh.tensor': 2}}


@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    return runs.Runs(tmp_path_factory.mktemp('processes'))


def moved(toy, workdir, steps, devices, processes=1):
    """(digest of the state at start, at end) of a run on so many devices."""
    fields = BATCH | {'train.steps': steps} | MESHES[devices]
    if processes == 1:
        out, _ = toy.finish(workdir, fields, devices=devices, DIGEST='1')
        found = [runs.digests(out)]
    else:
        started = toy.start_together(processes, workdir, fields, devices=devices // processes,
                                     DIGEST='1')
        found = [runs.digests(runs.ended(p)[0]) for p in started]
    assert all(x == found[0] for x in found)
    return found[0]['start'], found[0]['end']


def test_a_state_is_the_same_on_any_mesh_and_any_number_of_processes(toy):
    workdir = toy.root / 'moved'
    chain = [(8, 1), (4, 1), (1, 1), (8, 1), (8, 2), (8, 1)]
    met = [moved(toy, workdir, 2 * i, *place) for i, place in enumerate(chain, 1)]
    for (_, end), (start, _) in zip(met, met[1:]):
        assert end == start  # step and every bit
    assert [end[0] for _, end in met] == [2, 4, 6, 8, 10, 12]
    toy.finish(toy.root / 'stayed', BATCH | {'train.steps': 12})
    for a, b in zip(runs.lines(workdir), runs.lines(toy.root / 'stayed'), strict=True):
        numbers = [k for k, v in a.items() if not isinstance(v, str)]
        np.testing.assert_allclose([a[k] for k in numbers], [b[k] for k in numbers], rtol=5e-3,
                                   atol=1e-4, err_msg=str(a['step']))


def training_together(toy, workdir, *flags):
    """Two processes of one run that have logged three steps."""
    started = toy.start_together(
        2, workdir, BATCH | {'train.steps': 100_000, 'checkpoint.every': 2} | MESHES[4], flags)
    while not (workdir / 'metrics.jsonl').exists() or len(runs.lines(workdir)) < 3:
        assert all(p.poll() is None for p in started), [p.communicate() for p in started]
        time.sleep(0.1)
    return started


def test_the_others_end_when_one_is_killed_and_a_restart_resumes(toy):
    workdir = toy.root / 'killed'
    survivor, victim = training_together(toy, workdir, '--peer_timeout=8')
    start = time.monotonic()
    victim.kill()
    victim.wait()
    _, err = runs.ended(survivor, code=1, timeout=60)
    assert time.monotonic() - start < 8 + 10
    assert runs.said(err)[-1].startswith('main: process 0: ') and 'Traceback' not in err
    assert 'process 1 has not been heard of for 8 s' in err or 'another process is gone' in err
    first = runs.lines(workdir)[-1]['step']
    _, err = toy.finish(workdir, BATCH | {'train.steps': first + 2} | MESHES[4], devices=4)
    assert f'resumed {workdir} at step ' in err and 'at step 0' not in err


def test_the_others_end_when_the_coordinator_is_killed(toy):
    """JAX itself sees to that, in its own words and with SIGABRT."""
    victim, survivor = training_together(toy, toy.root / 'headless', '--peer_timeout=8')
    victim.kill()
    victim.wait()
    _, err = survivor.communicate(timeout=60)
    assert survivor.returncode in (1, -signal.SIGABRT)
    assert 'process 0 does not answer' in err or 'another task died' in err or (
        'another process is gone' in err)


def test_a_signal_to_one_process_stops_all_of_them_at_one_step(toy):
    workdir = toy.root / 'preempted'
    started = training_together(toy, workdir)
    started[1].send_signal(signal.SIGTERM)
    told = [runs.said(runs.ended(p, timeout=120)[1], 'main: SIGTERM')[-1] for p in started]
    assert told[0] == told[1] and 'stopped at step ' in told[0]
    step = int(told[0].split('stopped at step ')[1].split()[0])
    assert (workdir / 'checkpoints' / str(step) / 'checksums.json').is_file()
