"""A run goes on on other devices and processes, and ends in a word when one of them dies."""

import json
import signal
import time

import jax
import numpy as np
import pytest
import runs

from ddmd_jax.train.durable import checksums, rollback

pytestmark = [pytest.mark.slow, pytest.mark.faults]
BATCH = {'data.global_batch': 16, 'log.every': 1}
MESHES = {1: {}, 4: {'mesh.data': 1, 'mesh.fsdp': 2, 'mesh.tensor': 2},
          8: {'mesh.data': 2, 'mesh.fsdp': 2, 'mesh.tensor': 2}}


@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    return runs.Runs(tmp_path_factory.mktemp('processes'), TOY='1')


def moved(started, workdir, steps, devices, processes=1):
    """(digest of the state at start, at end) of a run on so many devices."""
    fields = BATCH | {'train.steps': steps} | MESHES[devices]
    if processes == 1:
        out, _ = started.finish(workdir, fields, devices=devices, DIGEST='1')
        found = [runs.digests(out)]
    else:
        both = started.start_together(processes, workdir, fields, devices=devices // processes,
                                      DIGEST='1')
        found = [runs.digests(runs.ended(p)[0]) for p in both]
    assert all(x == found[0] for x in found)
    return found[0]['start'], found[0]['end']


def moves(started, workdir, places):
    """A run of two steps on each of `places` (devices, processes), where it starts as it ended."""
    met = [moved(started, workdir, 2 * i, *place) for i, place in enumerate(places, 1)]
    for (_, end), (start, _) in zip(met, met[1:]):
        assert end == start  # step and every bit
    assert [end[0] for _, end in met] == [2 * i for i in range(1, len(places) + 1)]


def test_a_state_is_the_same_on_any_mesh_and_any_number_of_processes(toy):
    moves(toy, toy.root / 'moved', [(8, 1), (4, 1), (1, 1), (8, 1), (8, 2), (8, 1)])


def test_networks_train_alike_on_any_mesh(tmp_path):
    networks = runs.Runs(tmp_path)
    moves(networks, tmp_path / 'moved', [(8, 1), (1, 1)])
    networks.finish(tmp_path / 'stayed', BATCH | {'train.steps': 4})
    for a, b in zip(runs.lines(tmp_path / 'moved'), runs.lines(tmp_path / 'stayed'), strict=True):
        numbers = [k for k, v in a.items() if not isinstance(v, str)]
        np.testing.assert_allclose([a[k] for k in numbers], [b[k] for k in numbers], rtol=5e-3,
                                   atol=1e-4, err_msg=str(a['step']))


def training_together(toy, workdir, *flags, fields=None, **environ):
    """Two processes of one run that have logged three steps."""
    fields = BATCH | {'train.steps': 100_000, 'checkpoint.every': 2} | MESHES[4] | (fields or {})
    started = toy.start_together(2, workdir, fields, flags, **environ)
    while not (workdir / 'metrics.jsonl').exists() or len(runs.lines(workdir)) < 3:
        assert all(p.poll() is None for p in started), [p.communicate() for p in started]
        time.sleep(0.1)
    return started


@pytest.mark.parametrize('which', [0, 1])
def test_the_other_ends_when_one_is_killed_and_a_restart_resumes(toy, which):
    workdir = toy.root / f'killed{which}'
    started = training_together(toy, workdir, '--peer_timeout=8')
    while not checksums.steps(workdir / 'checkpoints'):
        time.sleep(0.1)
    victim, survivor = started.pop(which), started[0]
    victim.kill()
    victim.communicate()
    _, err = survivor.communicate(timeout=60)
    assert survivor.returncode != 0
    if which == 0:  # JAX's own words, unless ours come first
        assert ('the JAX distributed service detected fatal errors' in err
                or 'process 0 does not answer' in err)
    else:
        line = runs.said(err)[-1]
        assert line.startswith('main: process 0: ') and 'Traceback' not in err
        assert 'process 1 has not been heard of for 8 s' in line or 'process is gone (' in line
    first = runs.lines(workdir)[-1]['step']
    _, err = toy.finish(workdir, BATCH | {'train.steps': first + 2} | MESHES[4], devices=4)
    assert f'resumed {workdir} at step ' in err and 'at step 0' not in err


@pytest.mark.parametrize('which', [0, 1])
def test_a_device_that_fails_is_told_by_every_process(toy, which):
    started = toy.start_together(
        2, toy.root / f'broken{which}', BATCH | {'train.steps': 100} | MESHES[4],
        BREAK=['4' if i == which else '' for i in range(2)])
    ended = [runs.ended(p, code=1, timeout=120)[1] for p in started]
    words = [runs.said(err)[-1] for err in ended]
    assert words[which] == f'main: process {which}: JaxRuntimeError: INTERNAL: the device halted'
    assert words[1 - which].startswith(f'main: process {1 - which}: process {which} has failed')
    assert 'Traceback' in ended[which] and 'Traceback' not in ended[1 - which]


def test_a_signal_to_one_process_stops_all_of_them_at_one_step(toy):
    """More of them while that is saved change nothing."""
    workdir, away = toy.root / 'preempted', {'checkpoint.every': 100_000}
    started = training_together(toy, workdir, fields=away,
                                SIGNAL=['saved:1:0.01', 'saving:1:0'])
    started[1].send_signal(signal.SIGTERM)
    told = [runs.said(runs.ended(p, timeout=120)[1], 'main: SIGTERM') for p in started]
    assert told[0] == told[1] and len(told[0]) == 1 and 'stopped at step ' in told[0][0]
    step = int(told[0][0].split('stopped at step ')[1].split()[0])
    folder = workdir / 'checkpoints' / str(step)
    assert checksums.known(folder) and checksums.fault(folder) == ''
    fields = BATCH | away | MESHES[4]
    ends = [[runs.digests(runs.ended(p)[0]) for p in toy.start_together(
        2, place, fields | {'train.steps': step + more}, DIGEST='1')]
        for place, more in ((toy.root / 'asked', 0), (workdir, 1))]
    assert ends[1][0]['start'] == ends[0][0]['end'] and ends[1][0] == ends[1][1]


def test_a_nan_in_one_process_is_gone_back_on_by_all_of_them(toy):
    """As by one process with the same batch, up to rounding."""
    fields = BATCH | MESHES[4] | {'train.steps': 8, 'train.on_nan': 'rollback'}
    together, alone = toy.root / 'nan2', toy.root / 'nan1'
    started = toy.start_together(2, together, fields, NAN=['-1', '9'], DIGEST='1')
    out = [runs.ended(p)[0] for p in started]
    assert runs.digests(out[0]) == runs.digests(out[1])
    toy.finish(alone, fields, devices=4, NAN='9')
    one, two = ([entry | {'time': 0} for entry in rollback.read(w)] for w in (alone, together))
    assert one == two and len(one) == 1
    assert one[0]['step'] == 5 and one[0]['checkpoint'] == 4 and one[0]['batches'] == [8, 9]
    a, b = (jax.tree.leaves(runs.state_of(w, 8)) for w in (alone, together))
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    place = [json.loads((w / 'checkpoints' / '8' / 'data' / 'metadata').read_text())['next_index']
             for w in (alone, together)]
    assert place == [8 * 2 + 2] * 2


def test_a_bad_verdict_that_lasts_ends_all_processes_at_one_step(toy):
    """Also when they were resumed, and only one of them knows the lines before."""
    workdir = toy.root / 'unwell'
    fields = BATCH | MESHES[4] | {'train.on_health': 'stop', 'checkpoint.every': 100}
    for steps in (2, 20):
        started = toy.start_together(2, workdir, fields | {'train.steps': steps}, DIGEST='1')
        ended = [runs.ended(p) for p in started]
    ends = [runs.digests(out)['end'] for out, _ in ended]
    last = runs.lines(workdir)[-1]
    assert ends[0] == ends[1] and ends[0][0] == last['step'] == 3
    assert 'step 3: over-baked for 3 logged intervals (so)' in ended[0][1]
    assert (workdir / 'checkpoints' / '3').is_dir()


def test_a_save_that_fails_is_tried_again_by_all_processes_at_once(toy, small_disk):
    workdir, filler = small_disk / 'run', small_disk / 'filler'
    fields = BATCH | MESHES[4] | {'train.steps': 7, 'checkpoint.every': 4,
                                 'checkpoint.timeout': 60}
    started = toy.start_together(2, workdir, fields, FILL=str(filler), FREE='5')
    ended = [runs.ended(p)[1] for p in started]
    told = [x for err in ended for x in runs.said(err)]
    assert any(x.startswith(f'warning: checkpoint {workdir}/checkpoints/4 could not be written (')
               for x in told)
    assert checksums.steps(workdir / 'checkpoints') == [5, 7]
    assert all(checksums.fault(workdir / 'checkpoints' / str(s)) == '' for s in (5, 7))
