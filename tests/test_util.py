"""Files that are whole or not there, and text for people."""

import os
import subprocess
import sys

import pytest
import tiny

from ddmd_jax.util import files, text


def test_a_file_is_replaced_only_by_a_whole_one(tmp_path):
    path = tmp_path / 'a.json'
    files.write_json(path, {'é': 1}, sync=True)
    with pytest.raises(OSError), files.replacing(path) as scratch:
        scratch.write_text('half')
        raise OSError('no space left')
    assert path.read_text('utf-8') == '{\n "é": 1\n}'
    files.write(path, b'\x00')
    assert path.read_bytes() == b'\x00' and os.listdir(tmp_path) == ['a.json']


def test_a_folder_is_replaced_only_by_a_whole_one_and_begins_empty(tmp_path):
    path = tmp_path / 'folder'
    (tmp_path / 'folder.tmp').mkdir()
    (tmp_path / 'folder.tmp' / 'of a killed process').touch()
    with files.replacing(path, sync=True) as scratch:
        scratch.mkdir()
        (scratch / 'a').write_text('a')
    assert os.listdir(path) == ['a'] and os.listdir(tmp_path) == ['folder']


def test_two_processes_may_write_one_file(tmp_path):
    with files.replacing(tmp_path / 'a', own=True) as scratch:
        assert str(os.getpid()) in scratch.name
        scratch.touch()


def test_what_a_killed_process_has_left_goes_and_what_another_writes_stays(tmp_path):
    code = ('import os, sys; from pathlib import Path; from ddmd_jax.util import files\n'
            'with files.replacing(Path(sys.argv[1]), own=True) as scratch:\n'
            '    scratch.mkdir(); (scratch / "half").touch(); os.kill(os.getpid(), 9)')
    done = subprocess.run([sys.executable, '-c', code, str(tmp_path / 'a')], cwd=tiny.ROOT)
    assert done.returncode == -9
    (left,) = tmp_path.iterdir()
    _, tag, process, _ = left.name.split('.')
    (tmp_path / f'a.{tag}.{os.getppid()}.tmp').touch()  # of a process that runs
    (tmp_path / f'a.0123abcd.{process}.tmp').touch()  # of another machine
    with files.replacing(tmp_path / 'a', own=True) as scratch:
        scratch.touch()
    assert sorted(os.listdir(tmp_path)) == sorted(
        ['a', f'a.{tag}.{os.getppid()}.tmp', f'a.0123abcd.{process}.tmp'])


@pytest.mark.parametrize('message, line', [
    ('one\ntwo', 'one'), ('', 'ValueError'), ('\n  two\n', 'two'), ('***\ntwo', 'two')])
def test_an_error_in_one_line(message, line):
    assert text.first_line(ValueError(message)) == line


@pytest.mark.parametrize('size, words', [
    (0, '0 B'), (1023, '1023 B'), (1024, '1.00 KiB'), (3 * 2**19, '1.50 MiB'),
    (2**30, '1.00 GiB'), (5 * 2**40, '5120.00 GiB')])
def test_bytes_in_units(size, words):
    assert text.in_units(size) == words


@pytest.mark.parametrize('seconds, words', [
    (0.2, '0 s'), (59.7, '1 min 0 s'), (61, '1 min 1 s'), (3 * 3600 + 125, '3 h 2 min'),
    (2 * 86400, '2 d 0 h')])
def test_durations_in_their_two_largest_units(seconds, words):
    assert text.duration(seconds) == words


def test_tables():
    assert text.aligned([('', 'n'), ('long', '10')], numbers=1) == '       n\nlong  10'
    assert text.markdown(['a', 'b'], [['x|y', 1]]) == '| a | b |\n|---|---|\n| x\\|y | 1 |'
