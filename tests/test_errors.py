"""What is the machine's fault is told apart from what a file is at fault for, at one door."""

import ast
import errno
import hashlib
import os

import forked
import numpy as np
import pytest
import tiny
from saved import save

from ddmd_jax.train.durable import checkpoint as ckpt, checksums, saving
from ddmd_jax.util import errors, files

TREE = {'bias': np.ones(3, np.float32)}


def of_number(number, path=None):
    return OSError(number, os.strerror(number), path)


def of_store(module, words):
    """What a package that reads buckets raises; it need not be installed."""
    return type('Refused', (Exception,), {'__module__': module})(words)


@pytest.mark.parametrize('error, words', [
    (of_number(errno.ENOSPC, '/d/f'), '/d/f: there is no room on the disk; make some'),
    (of_number(errno.EACCES, '/d/f'), '/d/f: permission is denied; see to the permissions'),
    (of_number(errno.EROFS), 'permission is denied'),
    (of_number(errno.EIO), 'the disk or its network does not answer'),
    (of_number(errno.EMFILE), 'raise `ulimit -n`'),
    (MemoryError(), 'not enough memory'),
    (ConnectionResetError(), 'the network does not answer'),
    # Libraries that pass no number on.
    (RuntimeError('I/O error: No space left on device (os error 28)'), 'no room on the disk'),
    (ValueError("PERMISSION_DENIED: Error opening '/d/f' [errno='13']"), '/d/f: permission is'),
    (RuntimeError("Unable to initialize backend 'cuda': no GPU"), 'set JAX_PLATFORMS=cpu'),
    (RuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes'), 'not enough memory'),
    (of_store('gcsfs.retry', 'quota exceeded'), 'a bucket cannot be read or written; see to its'),
    (of_store('botocore.exceptions', 'No credentials'), 'the network and your access'),
    (of_store('google.auth.exceptions', 'No credentials'), 'a bucket cannot be read'),
    (OSError('Forbidden: gs://b/f'), 'permission is denied'),  # gcsfs's
    (PermissionError('Access Denied'), 'permission is denied'),  # s3fs's
    (ExceptionGroup('many', [KeyError(1), of_number(errno.EDQUOT)]), 'no room on the disk'),
])
def test_the_machine_is_at_fault(error, words):
    fault = errors.environment(error)
    assert words in str(fault) and len(str(fault).splitlines()) == 1
    try:
        try:
            raise error
        except type(error) as e:
            raise ValueError('damaged: what it looked like') from e
    except ValueError as later:
        assert words in str(errors.environment(later))


@pytest.mark.parametrize('error', [
    of_number(errno.ENOENT), of_number(errno.EISDIR), ValueError('no JSON'), KeyError('x'),
    FileNotFoundError('b/f'), of_store('google.protobuf.message', 'no such field'),
    errors.UserError('--out was refused: permission denied is what its owner says')])
def test_what_was_read_is_at_fault(error):
    assert errors.environment(error) is None


def test_no_handler_of_everything_names_a_cause_it_does_not_know():
    """`except Exception` asks the door first, or a comment says why it need not."""
    unexplained = []
    for file in sorted((tiny.ROOT / 'ddmd_jax').rglob('*.py')):
        lines = file.read_text().splitlines()
        for node in ast.walk(ast.parse('\n'.join(lines))):
            if not isinstance(node, ast.ExceptHandler) or not isinstance(node.type, ast.Name):
                continue
            if node.type.id in ('Exception', 'BaseException'):
                asks = any(isinstance(x, ast.Call) and 'environment' in ast.unparse(x.func)
                           for x in ast.walk(node))
                if not asks and '#' not in lines[node.lineno - 1] and not any(
                        isinstance(x, ast.Raise) and x.exc is None for x in node.body):
                    unexplained.append(f'{file.name}:{node.lineno}')
    assert not unexplained


@pytest.mark.parametrize('command', [
    ['main', '--config=emoji', '--workdir=RUN'],
    ['sample', '--checkpoint=RUN', '--prompt=a', '--out=RUN/x.png'],
    ['export', '--checkpoint=RUN', '--out=RUN/x']])
def test_devices_that_are_not_there_spoil_no_checkpoint(tmp_path, command):
    run = save(tmp_path / 'run', {'task': 'distill', 'teacher.name': 'emoji'}, TREE)
    before = sorted(checksums.files(tmp_path))
    told = forked.run(f'ddmd_jax.{command[0]}', *(x.replace('RUN', str(run)) for x in command[1:]),
                      JAX_PLATFORMS='cuda')
    said = [x for x in told.stderr.splitlines() if x.startswith(f'{command[0]}: ')]
    assert told.returncode == 1 and len(said) == 1, told.stderr
    assert 'JAX_PLATFORMS=cuda' in said[0] and 'set JAX_PLATFORMS=cpu' in said[0]
    assert 'Traceback' not in told.stderr
    assert set(before) <= set(checksums.files(tmp_path))


def test_a_listing_asks_for_no_device(tmp_path):
    run = save(tmp_path / 'run', {'teacher.name': 'emoji'}, TREE)
    assert ckpt.saved(run).manifest['teacher.name'] == 'emoji'
    told = forked.run('ddmd_jax.checkpoints', run, '--verify', JAX_PLATFORMS='cuda')
    assert told.returncode == 0 and 'good' in told.stdout


# --- What cannot be read just now is not damaged ---


@pytest.fixture
def failing(monkeypatch):
    """``failing(times)``: so many times, a file's bytes cannot be read.

    ``failing(times, error)`` raises that one.
    """
    monkeypatch.setattr(files, 'WAITS', (0, 0))
    left, digest = [0, None], hashlib.file_digest

    def read(file, kind):
        if left[0]:
            left[0] -= 1
            raise left[1] or of_number(errno.EIO, file.name)
        return digest(file, kind)

    monkeypatch.setattr(hashlib, 'file_digest', read)
    return lambda times, error=None: left.__setitem__(slice(None), (times, error))


def test_a_file_is_tried_again(tmp_path, failing):
    folder = save(tmp_path / 'run', {'teacher.name': 'emoji'}, TREE) / 'checkpoints' / '3'
    failing(2)
    assert checksums.fault(folder) == ''


def test_a_file_that_stays_unreadable_ends_the_run_and_moves_nothing(tmp_path, failing):
    run = save(tmp_path / 'run', {'teacher.name': 'emoji'}, TREE, step=3)
    later = save(tmp_path / 'later', {'teacher.name': 'emoji'}, TREE, step=4)
    (later / 'checkpoints' / '4').rename(run / 'checkpoints' / '4')
    failing(10**6)
    with pytest.raises(errors.EnvironmentFault, match='does not answer as it should') as e:
        saving.Checkpoints(run, {'teacher.name': 'emoji'})
    assert 'delete' not in str(e.value) and str(run) in str(e.value)
    assert checksums.steps(run / 'checkpoints') == [3, 4] and not (run / 'damaged').exists()
    with pytest.raises(errors.EnvironmentFault):
        ckpt.saved(run).part('ema', TREE, None)
    failing(1, of_store('gcsfs.retry', 'quota exceeded'))
    with pytest.raises(errors.EnvironmentFault, match='a bucket cannot be read'):
        ckpt.newest_good(run / 'checkpoints')
    failing(1, RuntimeError('a bug'))
    with pytest.raises(RuntimeError, match='a bug'):
        ckpt.damage(run / 'checkpoints' / '4')
    failing(0)
    assert ckpt.newest_good(run / 'checkpoints') == (4, {})
