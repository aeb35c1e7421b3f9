"""Files of JSON lines: what a kill or a full disk leaves of them."""

import json
import subprocess
import sys

import pytest
import tiny
from hypothesis import given, strategies

from ddmd_jax.util import jsonl as lines

ENTRIES = strategies.lists(strategies.dictionaries(
    strategies.text(), strategies.floats(allow_nan=False) | strategies.text(), max_size=3),
    max_size=5)


@pytest.fixture(scope='module')
def path(tmp_path_factory):
    return tmp_path_factory.mktemp('lines') / 'x.jsonl'


def written(path, entries):
    path.unlink(missing_ok=True)
    for entry in entries:
        lines.append(path, entry)


@given(entries=ENTRIES, cut=strategies.integers(0, 400), more=strategies.booleans())
def test_of_a_file_cut_anywhere_whole_lines_stay_and_the_next_follows_them(
        path, entries, cut, more):
    written(path, entries)
    assert lines.read(path) == entries
    data = path.read_bytes()[:cut] if path.exists() else b''
    path.write_bytes(data)
    whole = entries[:data.count(b'\n')]
    assert lines.read(path) == whole
    if more:
        lines.append(path, {'more': 1})
        assert lines.read(path) == [*whole, {'more': 1}]
    else:
        assert lines.trim(path, lambda entry: True) == whole
        assert path.read_bytes().count(b'\n') == len(whole)
        assert path.read_bytes() == data[:data.rfind(b'\n') + 1]


def test_what_is_not_wanted_and_what_is_no_entry_is_trimmed(path):
    written(path, [{'step': i} for i in range(4)])
    with path.open('ab') as f:
        f.write(b'[1]\n\xff\xfe\n\0\0\0')
    with pytest.raises(ValueError, match=r'x\.jsonl, line 5 is no JSON object; mend it'):
        lines.read(path)
    assert lines.trim(path, lambda entry: entry['step'] < 2) == [{'step': 0}, {'step': 1}]
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n'
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_nothing_there_is_no_entry_and_is_not_made(tmp_path):
    assert lines.read(tmp_path / 'none') == lines.trim(tmp_path / 'none', bool) == []
    assert not (tmp_path / 'none').exists()


@pytest.mark.parametrize('room', [0, 1, 40])
def test_where_there_is_no_room_for_all_of_an_entry_nothing_of_it_stays(tmp_path, room):
    """The kernel takes what fits and refuses the rest, as it does of a disk that fills up."""
    path = tmp_path / 'x.jsonl'
    lines.append(path, {'first': 1})
    before = path.read_bytes()
    code = ('import resource, sys; from pathlib import Path\n'
            'from ddmd_jax.util import jsonl as lines\n'
            'resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), -1))\n'
            'try: lines.append(Path(sys.argv[1]), {"second": "x" * 100})\n'
            'except OSError as e: print(e.strerror)')
    done = subprocess.run([sys.executable, '-c', code, str(path), str(len(before) + room)],
                          cwd=tiny.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == 'File too large\n'
    assert path.read_bytes() == before and json.loads(before) == {'first': 1}
