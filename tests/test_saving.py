"""Saving by itself: saves that hang, what libraries say, what stays in memory, what is logged."""

import json
import logging
import struct
import threading
import time
import types

import pytest
from tensorboardX.proto.event_pb2 import Event
from test_checkpoints import feed, opened, state_at

from ddmd_jax.train.durable import checkpoint as ckpt, checksums, quiet_orbax as quiet, saving
from ddmd_jax.train.watch import logs

# --- A save that hangs ---


@pytest.fixture
def hanging(tmp_path, monkeypatch):
    """``hanging(where)``: (checkpoints with one good save, of which the next will hang there)."""
    released, opened_here = threading.Event(), []

    def made(where):
        checkpoints, data = opened(tmp_path), feed()
        opened_here.append(checkpoints)
        checkpoints.save(1, state_at(1), data)
        assert checkpoints.wait() == ''
        checkpoints.timeout = 0.5
        hang = lambda *args, **kwargs: released.wait(60)
        monkeypatch.setattr(*{'copying': (checkpoints.manager, 'save'),
                              'summing': (checksums, 'write')}[where], hang)
        return checkpoints, data

    yield made
    released.set()
    for checkpoints in opened_here:
        checkpoints._worker.shutdown()  # what it still does must not meet another test's saves


def asked(checkpoints, how):
    """Does something that has to find out; waits for the moment when it can."""
    if how == 'under_way':
        while checkpoints.under_way:
            pass
    elif how == 'save':
        checkpoints.save(3, state_at(3), feed())
    else:
        getattr(checkpoints, how)()


@pytest.mark.parametrize('how', ['under_way', 'save', 'wait', 'close'])
def test_a_save_that_hangs_is_found_out_by_whoever_asks(hanging, how):
    checkpoints, data = hanging('summing')
    checkpoints.save(2, state_at(2), data)
    assert checkpoints.under_way
    with pytest.raises(saving.HungError, match=r'checkpoints/2 was not on disk after 0\.5 s .*; '
                       'step 1 is the newest checkpoint in .*; see to the disk') as e:
        asked(checkpoints, how)
    assert len(str(e.value).splitlines()) == 1 and isinstance(e.value, ckpt.CheckpointError)


def test_a_copy_that_hangs_does_not_hold_its_caller_for_ever(hanging):
    checkpoints, data = hanging('copying')
    with pytest.raises(saving.HungError, match='checkpoints/2 was not on disk'):
        checkpoints.save(2, state_at(2), data)


def test_the_error_that_ends_a_run_is_told_beside_the_save_that_hangs(hanging):
    checkpoints, data = hanging('summing')
    checkpoints.save(2, state_at(2), data)
    with pytest.raises(saving.HungError, match='the loss is NaN; checkpoint .* was not on disk'):
        try:
            raise RuntimeError('the loss is NaN\nand so on')
        finally:
            checkpoints.close()


def test_a_save_in_time_is_no_hang(tmp_path):
    checkpoints = opened(tmp_path, timeout=60)
    checkpoints.save(1, state_at(1), feed())
    assert checkpoints.wait() == '' and not checkpoints.under_way
    checkpoints.close()


# --- A save that fails ---


def test_only_the_checksums_are_written_again_where_they_alone_failed(tmp_path, monkeypatch):
    checkpoints, data = opened(tmp_path), feed()
    with monkeypatch.context() as m:
        m.setattr(checksums, 'write', lambda folder: 1 / 0)
        checkpoints.save(1, state_at(1), data)
        assert 'division by zero' in checkpoints.wait()
    monkeypatch.setattr(checkpoints.manager, 'save', lambda *args, **kwargs: 1 / 0)
    checkpoints.save(1, state_at(1), data)
    assert checkpoints.wait() == '' and checkpoints.latest == 1
    checkpoints.close()
    folder = tmp_path / 'checkpoints' / '1'
    assert checksums.known(folder) and checksums.fault(folder) == ''


def test_what_a_failed_save_has_left_is_deleted(tmp_path, monkeypatch):
    checkpoints = opened(tmp_path)

    def torn(step, **kwargs):
        folder = tmp_path / 'checkpoints' / f'{step}.orbax-checkpoint-tmp' / 'state'
        folder.mkdir(parents=True)
        (folder / 'half').write_bytes(b'x')
        raise OSError(28, 'No space left on device')

    # Orbax looks for what earlier runs have left when it is opened, in a thread that its first save
    # waits for: that one must not find what is torn here.
    checkpoints.save(1, state_at(1), feed())
    assert checkpoints.wait() == ''
    with monkeypatch.context() as m:
        m.setattr(checkpoints.manager, 'save', torn)
        checkpoints.save(2, state_at(2), feed())
        assert 'No space left' in checkpoints.wait()
    assert [p.name for p in (tmp_path / 'checkpoints').iterdir()] == ['1']
    checkpoints.save(2, state_at(2), feed())
    assert checkpoints.wait() == ''
    checkpoints.close()


# --- What libraries say ---


def loop_gone():
    """The traceback of a callback from C into a loop that is closed."""
    import asyncio

    loop = asyncio.new_event_loop()
    loop.close()
    with pytest.raises(RuntimeError) as e:
        loop.call_soon_threadsafe(print)
    return e.value


def test_only_reports_to_a_closed_loop_are_dropped(monkeypatch):
    told, hook = [], quiet._unraisable
    monkeypatch.setattr(hook, 'before', told.append, raising=False)
    error = loop_gone()
    what = lambda error, trace: types.SimpleNamespace(
        exc_type=type(error), exc_value=error, exc_traceback=trace)
    hook(what(error, error.__traceback__.tb_next))  # as C sees it: without the frame above
    assert not told
    ours = what(error, error.__traceback__)
    another = what(ValueError('Event loop is closed'), error.__traceback__.tb_next)
    hook(ours), hook(another)
    assert told == [ours, another]


@pytest.mark.parametrize('logger, level, path, text, said', [
    ('absl', 'ERROR', 'site-packages/orbax/x.py', 'pages', False),
    ('absl', 'WARNING', 'site-packages/orbax/x.py', 'slow', True),
    ('absl', 'ERROR', 'ddmd_jax/x.py', 'ours', True),
    ('asyncio', 'ERROR', 'asyncio/x.py', 'Task exception was never retrieved', False),
    ('asyncio', 'ERROR', 'asyncio/x.py', 'slow callback', True),
])
def test_only_orbax_errors_are_not_logged(logger, level, path, text, said):
    quiet.quiet_orbax()
    record = logging.LogRecord(logger, getattr(logging, level), path, 1, text, None, None)
    assert bool(logging.getLogger(logger).filter(record)) == said


# --- What is logged ---


def events(folder):
    """Those of all of TensorBoard's files in a folder, read as its reader does."""
    found = []
    for path in sorted(folder.iterdir(), key=lambda p: p.stat().st_mtime_ns):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from('Q', data, at)
            found.append(Event.FromString(data[at + 12:at + 12 + length]))
            at += length + 16
    return found


def test_the_time_left_is_reckoned_from_steps_and_not_from_compiling(tmp_path):
    started, log = time.monotonic(), logs.RunLog(tmp_path, 0, 9, 'toy')
    time.sleep(0.3)
    log.tick(1)
    assert log.bar.format_dict['elapsed'] <= time.monotonic() - started - 0.3
    log.close()


def test_a_log_goes_on_where_its_run_does(tmp_path):
    log = logs.RunLog(tmp_path, 0, 9, 'toy')
    for step in (3, 6, 9):
        log.scalars(step, {'loss': step / 2, 'health': 'healthy'})
    log.close()
    with (tmp_path / 'metrics.jsonl').open('a') as f:
        f.write('{"step": 10, "los')  # its writer was killed
    log = logs.RunLog(tmp_path, 6, 9, 'toy')
    assert log.history == [{'step': s, 'loss': s / 2, 'health': 'healthy'} for s in (3, 6)]
    log.scalars(9, {'loss': -1.0})
    log.close()
    lines = [json.loads(x) for x in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    assert [(x['step'], x['loss']) for x in lines] == [(3, 1.5), (6, 3.0), (9, -1.0)]
    shown = [(e.step, e.session_log.status, [v.simple_value for v in e.summary.value])
             for e in events(tmp_path / 'tensorboard')]
    assert shown[-2:] == [(7, 1, []), (9, 0, [-1.0])]  # from 7 on, what was before is not shown
    assert (6, 0, [3.0]) in shown


def test_a_log_remembers_the_ends_of_a_run_only(tmp_path):
    log = logs.RunLog(tmp_path, 0, 1000, 'toy')
    for step in range(1, 301):
        log.scalars(step, {'loss': float(step)})
    log.close()
    ends = [*range(1, 65), *range(237, 301)]
    assert [x['loss'] for x in log.history] == ends
    again = logs.RunLog(tmp_path, 300, 1000, 'toy')
    again.close()
    assert [x['loss'] for x in again.history] == ends
