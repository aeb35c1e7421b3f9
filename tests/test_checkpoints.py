"""Checkpoints by themselves, of a state of two arrays: kept, damaged, resumed, locked."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import types

import forked
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from ml_collections import ConfigDict

from ddmd_jax import checkpoints as command
from ddmd_jax.data import loader
from ddmd_jax.data.order import Order
from ddmd_jax.parallel import sharding
from ddmd_jax.train import state as st
from ddmd_jax.train.durable import (
    checkpoint as ckpt,
    checksums,
    guards,
    lock,
    resume,
    saving,
    signals,
)
from ddmd_jax.train.feed import Feed

MANIFEST = {'teacher.name': 'emoji', 'method.alpha': 1.5}
TX = optax.adam(1e-3)
RULES = ((r'.', (None,)),)


def feed():
    read = loader.batches(Order(np.arange(64), 2, 0), lambda planned: planned.rows, np.arange(2))
    return Feed(read, lambda batch: batch)


def state_at(step):
    tree = {'kernel': jnp.full((8,), step, jnp.float32)}
    return dataclasses.replace(st.fresh(tree, TX, tree, TX), step=jnp.asarray(step, jnp.int32))


def opened(workdir, manifest=MANIFEST, keep=10, timeout=1800, **options):
    return saving.Checkpoints(workdir, manifest, saving.Retention(keep, **options), timeout)


def saved(workdir, steps=(1, 2, 3), judged=None, manifest=MANIFEST, **options):
    """A run's folder with checkpoints of `steps`, of the batch with that number each."""
    checkpoints, data = opened(workdir, manifest, **options), feed()
    for step in steps:
        next(data)
        checkpoints.judge(judged(step) if judged else {})
        checkpoints.save(step, state_at(step), data, [{'loss': np.float32(step / 3)}])
        checkpoints.wait()
    checkpoints.close()
    return workdir


def mesh():
    return sharding.make_mesh({'data': 1}, jax.devices()[:1])


def begin(workdir, resume_from='', init_from='', read=None, manifest=MANIFEST):
    """(kind of source, state, feed, checkpoints) of a run that starts in `workdir`."""
    checkpoints, data = opened(workdir, manifest), feed()
    config = ConfigDict({'resume': str(resume_from), 'init_from': str(init_from)})
    source = resume.choose(config, checkpoints)
    make = lambda: st.fresh({'kernel': jnp.zeros(8)}, TX, {'kernel': jnp.zeros(8)}, TX)
    task = types.SimpleNamespace(spec=st.StateSpec(make, RULES, mesh()), read_weights=read)
    state = resume.start(source, task, checkpoints, data)
    checkpoints.close()
    return source.kind, state, data, checkpoints


def flip(path):
    """Changes one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def largest(folder):
    return max(checksums.files(folder).values(), key=lambda path: path.stat().st_size)


# --- Four ways to start ---


def test_scratch_is_where_nothing_is(tmp_path):
    kind, state, data, _ = begin(tmp_path)
    assert kind == 'scratch' and int(state.step) == 0 and data.get_state() == {'next_index': 0}


def test_own_goes_before_what_the_config_names(tmp_path):
    saved(tmp_path / 'own', (1, 2)), saved(tmp_path / 'other', (5,))
    kind, state, data, checkpoints = begin(tmp_path / 'own', tmp_path / 'other')
    assert kind == 'own' and int(state.step) == 2 and data.get_state() == {'next_index': 2}
    assert checkpoints.interval == [{'loss': np.float32(2 / 3)}]  # bit for bit


@pytest.mark.parametrize('name, step', [('other', 3), ('other/checkpoints/2', 2)])
def test_resume_takes_everything_of_another_run(tmp_path, name, step):
    saved(tmp_path / 'other')
    kind, state, data, checkpoints = begin(tmp_path / 'own', tmp_path / name)
    assert kind == 'resume' and int(state.step) == step
    assert data.get_state() == {'next_index': step}
    assert checkpoints.interval == [{'loss': np.float32(step / 3)}]
    np.testing.assert_array_equal(state.ema['kernel'], np.full(8, step, np.float32))
    assert not checksums.steps(tmp_path / 'own' / 'checkpoints')


def test_resume_demands_the_same_experiment(tmp_path):
    saved(tmp_path / 'other')
    with pytest.raises(ckpt.CheckpointError, match=r'method\.alpha: 1\.5 -> 9'):
        begin(tmp_path / 'own', tmp_path / 'other', manifest=MANIFEST | {'method.alpha': 9})


def test_init_from_takes_weights_only_and_asks_nobody(tmp_path):
    saved(tmp_path / 'other')
    kind, state, data, _ = begin(tmp_path / 'own', init_from=tmp_path / 'other',
                                 manifest={'another': 'experiment'})
    assert kind == 'init' and int(state.step) == 0 and data.get_state() == {'next_index': 0}
    for tree in (state.student, state.critic, state.ema):
        np.testing.assert_array_equal(tree['kernel'], np.full(8, 3, np.float32))
    assert float(state.student_opt[0].mu['kernel'].sum()) == 0.0


def test_init_from_weights_leaves_the_critic_the_teacher(tmp_path):
    (tmp_path / 'weights').mkdir()
    read = lambda path: {'kernel': np.full(8, 7, np.float32)}
    kind, state, _, _ = begin(tmp_path / 'own', init_from=tmp_path / 'weights', read=read)
    assert kind == 'init'
    means = [float(x['kernel'].mean()) for x in (state.student, state.ema, state.critic)]
    assert means == [7.0, 7.0, 0.0]


@pytest.mark.parametrize('fields, words', [
    ({'resume_from': 'none'}, 'config.resume: .*none holds no checkpoints'),
    ({'init_from': 'none'}, 'config.init_from: no .*none'),
    ({'init_from': 'weights'}, r'no student of this shape \(kernel is \(3,\), not \(8,\)\)'),
])
def test_what_is_named_is_not_there(tmp_path, fields, words):
    (tmp_path / 'weights').mkdir()
    fields = {name: tmp_path / value for name, value in fields.items()}
    with pytest.raises(ckpt.CheckpointError, match=words) as e:
        begin(tmp_path / 'own', **fields, read=lambda path: {'kernel': np.zeros(3)})
    assert len(str(e.value).splitlines()) == 1


def test_a_checkpoint_of_the_format_before_is_refused_and_its_weights_are_read(tmp_path):
    old = saved(tmp_path / 'old') / 'checkpoints' / '3'
    manifest = old / 'manifest' / 'metadata'
    manifest.write_text(json.dumps(MANIFEST))
    (old / checksums.NAME).unlink()
    for workdir, named in ((tmp_path / 'old', ''), (tmp_path / 'new', old)):
        words = r'\(format 1, this one 2\).*--config.init_from='
        with pytest.raises(ckpt.CheckpointError, match=words) as e:
            begin(workdir, resume_from=named)
        assert len(str(e.value).splitlines()) == 1
    kind, state, *_ = begin(tmp_path / 'new', init_from=old)
    assert kind == 'init' and state.student['kernel'][0] == 3 and state.step == 0


def test_other_versions_warn(tmp_path, capsys):
    saved(tmp_path, manifest=MANIFEST | {'version.jax': '0.9.0', 'version.optax': '1'})
    begin(tmp_path, manifest=MANIFEST | {'version.jax': '0.10.2', 'version.optax': '1'})
    warned = capsys.readouterr().err
    assert "checkpoints/3 was written with other versions: jax: '0.9.0' -> '0.10.2'" in warned
    assert len(warned.splitlines()) == 1
    assert set(ckpt.versions()) == {f'version.{name}' for name in (*ckpt.PACKAGES, 'ddmd_jax')}


# --- Which stay ---


@pytest.mark.parametrize('options, stay', [
    ({'keep': 2}, [5, 6]),
    ({'keep': 1, 'every': 3}, [3, 6]),
    ({'keep': 1, 'best': 'fake_loss'}, [2, 6]),
    ({'keep': 1, 'best': 'fake_loss', 'mode': 'max'}, [4, 6]),
    ({'keep': 1, 'pinned': frozenset({1})}, [1, 6]),
])
def test_retention(tmp_path, options, stay):
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: 9.0, 5: 4.0, 6: 5.0}
    judged = lambda step: {'loss': 0.0, 'fake_loss': losses[step]}
    assert checksums.steps(saved(tmp_path, range(1, 7), judged, **options) / 'checkpoints') == stay
    reopened = opened(tmp_path, **options)  # the figures are on disk as well
    reopened.judge({'fake_loss': 6.0})
    reopened.save(7, state_at(7), feed())
    reopened.wait()
    assert reopened.latest == 7 and set(reopened.manager.all_steps()) == {*stay, 7} - (
        {5} if options == {'keep': 2} else {6} if options.get('every') != 3 else set())
    reopened.close()


def test_a_resumed_run_may_go_by_another_figure(tmp_path):
    """Whose checkpoints from before do not have it; one that is not finite is the worst."""
    saved(tmp_path, (1, 2), lambda step: {'loss': float(step)}, keep=1, best='loss')
    reopened = opened(tmp_path, keep=1, best='ema_std')
    for step, figure in ((3, 2.0), (4, 1.0), (5, float('nan')), (6, 3.0)):
        reopened.judge({'ema_std': figure})
        reopened.save(step, state_at(step), feed())
        assert reopened.wait() == ''
    assert set(reopened.manager.all_steps()) == {4, 6}
    reopened.save(7, state_at(7), feed())  # between two logged lines: judged by none
    assert reopened.wait() == '' and set(reopened.manager.all_steps()) == {4, 7}
    reopened.close()


def test_the_best_of_no_figure_is_refused(tmp_path):
    checkpoints = opened(tmp_path, best='fid')
    with pytest.raises(ckpt.CheckpointError, match="checkpoint.best: 'fid'.* there are loss$"):
        checkpoints.judge({'loss': 1.0, 'health': 'healthy'})
    checkpoints.close()


# --- Damage ---


def truncate(folder):
    path = largest(folder)
    path.write_bytes(path.read_bytes()[:-3])


def half_delete(folder):
    largest(folder).unlink()


def spoil_manifest(folder):
    (folder / 'manifest' / 'metadata').write_text('{')


def spoil_sums(folder):
    (folder / checksums.NAME).write_text('[')


def lead_out(folder):
    sums = json.loads((folder / checksums.NAME).read_text())
    sums['../../../secret'] = sums.pop('data/metadata')
    (folder / checksums.NAME).write_text(json.dumps(sums))


def never_summed_up(folder):
    (folder / checksums.NAME).unlink()
    spoil_manifest(folder)


def pickle_in_place(folder):
    """A pickle that would leave a trace, were it ever loaded, in place of every item's file."""
    class Trap:
        def __reduce__(self):
            return os.system, (f'touch {folder.parent.parent}/executed',)

    (folder / checksums.NAME).unlink()
    for path in checksums.files(folder).values():
        path.write_bytes(pickle.dumps(Trap()))


@pytest.mark.parametrize('damage, words', [
    (lambda folder: flip(largest(folder)), 'is not what was written'),
    (truncate, 'bytes, not'),
    (half_delete, 'is missing'),
    (spoil_manifest, 'manifest/metadata has 1 bytes, not'),
    (spoil_sums, 'checksums.json is not what was written'),
    (lead_out, 'leads out of the checkpoint'),
    (never_summed_up, 'it has no readable manifest'),
    (pickle_in_place, 'it has no readable manifest'),
])
def test_the_newest_good_checkpoint_is_taken(tmp_path, capsys, damage, words):
    saved(tmp_path)
    damage(tmp_path / 'checkpoints' / '3')
    kind, state, data, checkpoints = begin(tmp_path)
    assert int(state.step) == 2 and data.get_state() == {'next_index': 2}
    (warned,) = capsys.readouterr().err.splitlines()
    assert warned.startswith(f'warning: checkpoint {tmp_path}/checkpoints/3 is damaged (')
    assert words in warned and warned.endswith(
        f'moved to {tmp_path}/damaged/3, going on from step 2')
    assert (tmp_path / 'damaged' / '3').is_dir() and not (tmp_path / 'executed').exists()
    saved(tmp_path, (3,))  # its number is free again
    assert checksums.steps(tmp_path / 'checkpoints') == [1, 2, 3]


def test_one_that_was_not_summed_up_and_cannot_be_read_is_left_for_an_older(tmp_path, capsys):
    saved(tmp_path)
    folder = tmp_path / 'checkpoints' / '3'
    (folder / checksums.NAME).unlink()
    for path in (folder / 'state').rglob('*'):
        if path.is_file():
            path.write_bytes(b'x')
    assert int(begin(tmp_path)[1].step) == 2
    assert 'moved to' in capsys.readouterr().err


def test_one_that_is_good_but_cannot_be_read_is_not_called_damaged(tmp_path):
    """The code's state has changed: older checkpoints are no better."""
    saved(tmp_path)
    checkpoints = opened(tmp_path)
    with pytest.raises(ckpt.CheckpointError, match='checkpoints/3 cannot be read'):
        checkpoints.restore({'other': jnp.zeros(3)}, {'other': sharding.replicated(mesh())})
    checkpoints.close()
    assert checksums.steps(tmp_path / 'checkpoints') == [1, 2, 3]


def test_nothing_starts_anew_where_everything_is_damaged(tmp_path):
    saved(tmp_path, (1, 2))
    for step in (1, 2):
        truncate(tmp_path / 'checkpoints' / str(step))
    with pytest.raises(ckpt.CheckpointError, match='every checkpoint in .* is damaged: checkpo'):
        opened(tmp_path)
    assert checksums.steps(tmp_path / 'checkpoints') == [1, 2]  # nor is anything moved


# --- A save that fails ---


def test_a_failed_save_is_loud_and_what_stands_stays(tmp_path, monkeypatch, capfd):
    checkpoints, data = opened(tmp_path, keep=1), feed()
    checkpoints.save(1, state_at(1), data)
    assert checkpoints.wait() == ''
    broken = lambda *args, **kwargs: (_ for _ in ()).throw(OSError(28, 'No space left on device'))
    with monkeypatch.context() as m:
        m.setattr(checksums, 'write', broken)
        checkpoints.save(2, state_at(2), data)
        assert 'No space left' in checkpoints.wait()
    assert 'checkpoints/2 could not be written ([Errno 28] No space left' in capfd.readouterr().err
    checkpoints.save(3, state_at(3), data)
    assert checkpoints.wait() == '' and not checkpoints.under_way
    checkpoints.close()
    assert checkpoints.stalled > 0
    assert begin(tmp_path)[1].step == 3


# --- The command ---


def run_command(*args):
    return forked.run('ddmd_jax.checkpoints', *args)


def test_the_command_lists_verifies_and_prunes(tmp_path):
    saved(tmp_path, range(1, 6))
    flip(largest(tmp_path / 'checkpoints' / '5'))
    done = run_command(tmp_path, '--verify')
    assert done.returncode == 1 and done.stderr.startswith('checkpoints: damaged: 5; ')
    assert [line.split()[0] for line in done.stdout.splitlines()] == list('12345')
    assert 'good' in done.stdout and 'is not what was written' in done.stdout
    assert 'name=emoji' in done.stdout
    done = run_command(tmp_path, '--prune', '--keep=1', '--every=2')
    assert done.returncode == 0 and done.stdout.startswith('deleted: 1, 3\n')
    # A damaged one does not count among those that are kept, nor is it touched.
    assert checksums.steps(tmp_path / 'checkpoints') == [2, 4, 5]


def test_what_a_run_keeps_is_not_pruned(tmp_path):
    """The best by its own figure, and where `--replay` goes back to."""
    losses = {1: 5.0, 2: 1.0, 3: 4.0, 4: 3.0, 5: 2.0}
    saved(tmp_path, losses, lambda step: {'loss': losses[step]}, keep=9, best='loss')
    (tmp_path / 'config.json').write_text(json.dumps(
        {'checkpoint': {'best': 'loss', 'best_mode': 'min'}}))
    (tmp_path / 'bad_batches.jsonl').write_text(json.dumps(
        {'step': 4, 'checkpoint': 3, 'batches': [1], 'bad': ['loss'], 'rows': [[1]]}) + '\n')
    assert command.prune(tmp_path / 'checkpoints', 1, 0) == [1, 4]
    assert checksums.steps(tmp_path / 'checkpoints') == [2, 3, 5]


def test_a_run_is_not_pruned(tmp_path):
    saved(tmp_path)
    with lock.held(tmp_path), pytest.raises(lock.LockError, match=f'process {os.getpid()} on '):
        command.prune(tmp_path / 'checkpoints', 1, 0)


# --- The lock ---


def test_a_lock_is_refused_while_held_and_free_when_its_holder_dies(tmp_path):
    code = ('import sys, time; from pathlib import Path; from ddmd_jax.train.durable import lock\n'
            'with lock.held(Path(sys.argv[1])): print("held", flush=True); time.sleep(60)')
    holder = subprocess.Popen([sys.executable, '-c', code, str(tmp_path)], cwd=tiny.ROOT,
                              text=True, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == 'held\n'
    words = f'in use by process {holder.pid} on .*, since'
    with pytest.raises(lock.LockError, match=words) as e, lock.held(tmp_path):
        pass
    assert len(str(e.value).splitlines()) == 1
    holder.kill()
    holder.wait()
    with lock.held(tmp_path):
        assert str(os.getpid()) in (tmp_path / lock.NAME).read_text()


def test_a_file_system_without_locks_is_not_another_run(tmp_path, monkeypatch, capsys):
    def none(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, 'flock', none)
    with lock.held(tmp_path):
        pass
    assert f'warning: the file system of {tmp_path} has no locks' in capsys.readouterr().err


# --- Signals ---


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_what_has_nothing_to_save_and_waits_for_what_has(number):
    before = signal.getsignal(number)  # a background job's SIGINT is ignored
    with pytest.raises(signals.Stopped, match=signal.Signals(number).name), signals.watched():
        os.kill(os.getpid(), number)
        threading.Event().wait(5)
    with signals.watched(), pytest.raises(signals.Stopped), contextlib.suppress(Exception):
        os.kill(os.getpid(), number)  # while a library is at work whose errors are caught
        threading.Event().wait(5)
    with signals.watched(), pytest.raises(signals.Stopped), signals.deferred():
        os.kill(os.getpid(), number)
        assert signals.asked_to_stop(1) == signal.Signals(number).name
        os.kill(os.getpid(), number)  # the second one changes nothing
    assert signal.getsignal(number) is before and not signals.asked_to_stop(2)


# --- Guards ---


def test_spikes():
    assert not guards.spike([1.0, 1.1, 0.9, 1.0, 1.1, 1.2], 3)
    assert 'loss 5 is ' in guards.spike([1.0, 1.1, 0.9, 1.0, 1.1, 5.0], 3)
    assert not guards.spike([1.0, 1.1, 0.9, 1.0, 1.1, 5.0], 0)  # off
    assert not guards.spike([1.0, 1.1, 5.0], 3)  # too few to tell
    assert not guards.spike([1.0, 1.1, 0.9, 1.0, 1.1, -9.0], 3)  # falling is well
    assert guards.spike([1.0] * 6 + [1.1], 3) and not guards.spike([1.0] * 7, 3)


def test_a_bad_verdict_is_acted_on_only_if_it_lasts_and_is_asked_for():
    words = lambda *health, **acts: [{'health': h, 'health_reason': 'why', **acts} for h in health]
    bad = words('healthy', 'washed out', 'washed out', 'washed out')
    assert 'washed out for 3 logged intervals (why); stopped here' in guards.remedy(bad, 'stop')
    assert not guards.remedy(bad, 'nothing') and not guards.remedy(bad[:3], 'stop')
    assert not guards.remedy(words('healthy', 'healthy', 'healthy'), 'stop')
    assert not guards.remedy(words('washed out', 'over-baked', 'washed out'), 'stop')
    # From bad to worse is one illness.
    worse = guards.remedy(words('over-baked', 'over-baked', 'collapsing'), 'stop')
    assert worse.startswith('over-baked and collapsing for 3 logged intervals')
    grave = guards.remedy(words('collapsing'), 'stop_collapsing')
    assert grave == ("collapsing (why); stopped here, as train.on_health='stop_collapsing' says")
    assert not guards.remedy(words('collapsing', *3 * ['over-baked']), 'stop_collapsing')
    assert not guards.remedy([], 'stop_collapsing')
    assert 'alpha - 1 is halved' in guards.remedy(words(*3 * ['over-baked']), 'lower_alpha')
    assert not guards.remedy(bad, 'lower_alpha')  # it would be paler
    assert 'one more critic update' in guards.remedy(bad, 'raise_critic')


def test_what_was_done_is_given_time_and_is_not_done_for_ever():
    line = lambda share, extra=0.0: {'health': 'over-baked', 'alpha_share': share,
                                     'critic_extra': extra}
    acted = [line(1.0)] * 3 + [line(0.5)] * 2
    assert not guards.remedy(acted, 'lower_alpha')
    assert guards.remedy([*acted, line(0.5)], 'lower_alpha')
    assert not guards.remedy([line(guards.LEAST_ALPHA)] * 3, 'lower_alpha')
    assert not guards.remedy([line(1.0, guards.MOST_EXTRA)] * 3, 'raise_critic')


def test_batches_that_are_left_out_are_not_handed_out():
    order = Order(np.arange(64), 2, 0)
    data = feed()
    data.skip = frozenset({1, 2})
    data.set_state({'next_index': 0})
    taken = [next(data).tolist() for _ in range(3)]
    assert taken == [order[i].rows.tolist() for i in (0, 3, 4)]
    assert data.get_state() == {'next_index': 5}
