"""Damaged inputs at the doors of the commands: a line and a code, or what is right; see `fuzz`.

A few here, and 850 more under `slow`; by hand `python tests/fuzz.py --inputs=20000 --seed=1`.
"""

import ast
import functools
import io
import json
import os
import shlex
import subprocess
import sys

import fuzz
import pytest
import tiny
from absl import flags

from ddmd_jax import main as train
from ddmd_jax.config import rules
from ddmd_jax.data import DataFileError
from ddmd_jax.data.prompts import build as prompt_build, files as prompt_files
from ddmd_jax.util import commands, places, run_files, shape
from ddmd_jax.util.errors import UserError


@pytest.mark.parametrize('door', sorted(fuzz.DOORS))
def test_a_few_at_every_door(door):
    for seed in range(8):
        fuzz.tried(door, seed)


@pytest.mark.slow
@pytest.mark.parametrize('door', sorted(fuzz.DOORS))
def test_many_at_every_door(door):
    for seed in range(100, 165):
        fuzz.tried(door, seed)


# --- What it has found, each once by hand ---


@pytest.mark.parametrize('raw, found', [
    (b'a cat\ra dog\r', ['a cat', 'a dog']),  # one line end was read, of three
    ('a cat\r\na dog'.encode('utf-16'), ['a cat', 'a dog']),
    ('\u732b'.encode('utf-32'), ['\u732b']),
    ('a cat'.encode('utf-16-le'), 'line 1: it holds a NUL'),  # was 'a c a t'
    ('caf\u00e9'.encode('utf-16')[:-1], 'a line after 0: not UTF-16, as its mark says')])
def test_text_is_read_right_or_refused(tmp_path, raw, found):
    (tmp_path / 'p.txt').write_bytes(raw)
    read = lambda: [x.strip() for x in prompt_files.read(tmp_path / 'p.txt', 'prompt')]
    if isinstance(found, list):
        assert read() == found
        return
    with pytest.raises(DataFileError, match=found):
        read()


def test_of_two_columns_of_one_name_none_is_meant(tmp_path):
    (tmp_path / 'p.csv').write_text('prompt,prompt\na,b\n')
    with pytest.raises(DataFileError, match="2 columns are called 'prompt'"):
        list(prompt_files.read(tmp_path / 'p.csv', 'prompt'))


@pytest.mark.parametrize('raw, like, words', [
    (b'[' * 10**5, {}, 'it is nested more than 100 deep'),
    (b'{"a": ' * 200 + b'1' + b'}' * 200, {}, 'it is nested more than 100 deep'),
    (b'[1]', {}, r'it is \[1\], not an object'), (b'{}', {'a': int}, "has no 'a'"),
    (b'{"a": true}', {'a': int}, 'a is True, not a whole number'),
    (b'{"a": [{"b": 1}]}', {'a': [{'b': str}]}, r'a\[0\].b is 1, not a text'),
    (b'{"a": {"x": null}}', {'a': {str: shape.count}}, 'a.x is None, not a count'),
    (b'{"a": NaN}', {'a': shape.finite}, 'a is nan, not a finite number'),
    (b'\xff\xfe{', {}, '.')])
def test_json_is_what_its_reader_takes_it_for(raw, like, words):
    with pytest.raises(ValueError, match=words) as e:
        shape.load(raw, like)
    assert len(str(e.value).splitlines()) == 1


@pytest.mark.parametrize('value, like', [
    ({'a': 1}, {'a': float}), ({}, {'a?': int}), ({'a': 1, 'b': 'x'}, {'a': int}),
    ({'a': None}, {'a': (int, type(None))}), ([], [int]), ({'x': 1}, {str: shape.count})])
def test_json_as_it_should_be(value, like):
    assert shape.load(json.dumps(value).encode('utf-8-sig'), like) == value


@pytest.mark.parametrize('name, content, words', [
    ('config.json', '[]', 'config.json is damaged'), ('eval.json', '{"rows": []}', 'not rows'),
    ('metrics.jsonl', '{"loss": 1}\n', "line 1: has no 'step'"),
    ('metrics.jsonl', '{"step": 1, "loss": [1]}\n', 'line 1: loss is'),
    ('times.jsonl', '{"step": 1, "time": NaN}\n', 'line 1: time is nan')])
def test_a_runs_files_are_what_a_run_writes(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=words):
        run_files.read(tmp_path, name)


@pytest.mark.parametrize('value', [2**31, 2**63, 10**400, -2**63])
def test_a_step_counts_in_32_bits(value):
    assert not rules.COUNT.ok(value) and rules.COUNT.ok(2**31 - 1) and rules.SEED.ok(2**32 - 1)


@pytest.mark.parametrize('value', [1e39, 1e-50, 5e-324, float('inf'), float('nan'), 10**400])
def test_a_number_is_one_in_float32(value):
    assert not rules.POSITIVE.ok(value) and not rules.WEIGHT.ok(value)
    assert rules.WEIGHT.ok(0) and rules.WEIGHT.ok(0.0)


def test_home_and_variables_stand_for_folders(monkeypatch, tmp_path):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('RUNS', str(tmp_path / 'r'))
    for text in ('~/a', '$HOME/a', '${HOME}/a'):
        assert places.of(text) == tmp_path / 'a'
    assert places.of('$RUNS/b') == tmp_path / 'r' / 'b'
    with pytest.raises(UserError, match=r'^\$NO_SUCH/b holds \$NO_SUCH, which is not set'):
        places.of('$NO_SUCH/b')


# --- Habits that a fault of a kind comes from ---


@functools.cache
def calls():
    """(place, call) of every call in the package."""
    return [(f'{file.name}:{node.lineno}', node)
            for file in sorted((tiny.ROOT / 'ddmd_jax').rglob('*.py'))
            for node in ast.walk(ast.parse(file.read_text('utf-8')))
            if isinstance(node, ast.Call)]


def test_draws_name_their_dtype():
    """With JAX_ENABLE_X64 another would be drawn, in float64."""
    bare = [place for place, call in calls()
            if ast.unparse(call.func) in ('jax.random.normal', 'jax.random.uniform')
            and len(call.args) < 3 and not any(k.arg == 'dtype' for k in call.keywords)]
    assert not bare


def test_text_files_name_their_encoding():
    """Else it is the locale's, which in a container is often ASCII."""
    bare = []
    for place, call in calls():
        name = ast.unparse(call.func)
        given = [ast.unparse(x) for x in call.args] + [k.arg for k in call.keywords]
        if name.endswith(('.read_text', '.write_text')):
            wrong = "'utf-8'" not in given and 'encoding' not in given
        elif name == 'open' or name.endswith('.open') and not name.startswith((
                'Image.', 'os.', 'tarfile.', 'zipfile.', 'archive.')):
            wrong = not any('b' in x for x in given[:1] + given[1:2]) and 'encoding' not in given
        else:
            continue
        bare += [place] if wrong else []
    assert not bare


def test_json_of_files_is_read_as_what_it_should_be():
    """By `shape.load`: `json.loads` alone lets through a list, a NaN, 10^5 brackets."""
    found = {place.split(':')[0] for place, call in calls()
             if ast.unparse(call.func) in ('json.loads', 'json.load')
             and 'json.dumps' not in ast.unparse(call)}
    assert found == {
        'shape.py', 'jsonl.py', 'checksums.py',  # which check it themselves, as do readers of data:
        'files.py', 'benchmarks.py',
        'card.py', 'page.py', 'examine.py', 'distributed.py', 'hlo.py',  # own
        'hps_v3_program.py',  # likewise, by a Python that has nothing of ours
        'trackers.py', '__main__.py'}  # a tracker is given up; --set name=JSON


def test_places_are_looked_up_at_one_door():
    """`places` knows ``~`` and ``$VAR``; `expanduser` alone knows half."""
    found = {place.split(':')[0] for place, call in calls()
             if ast.unparse(call.func).endswith(('expanduser', 'expandvars'))}
    assert found == {'places.py'}


def test_what_is_written_is_utf_8_whatever_the_locale(tmp_path):
    (tmp_path / 'p.txt').write_bytes('caf\u00e9 \u732b\n'.encode())
    env = {k: v for k, v in os.environ.items() if not k.startswith(('LC_', 'LANG'))} | {
        'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0',
        'PYTHONPATH': str(tiny.ROOT)}
    out = tmp_path / 'set'
    done = subprocess.run(
        [sys.executable, '-m', 'ddmd_jax.prepare', 'prompts', f'--input={tmp_path / "p.txt"}',
         f'--out={out}'], env=env, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [*prompt_build.open_set(out)] == ['caf\u00e9 \u732b']
    card = json.loads((out / 'card.json').read_text('utf-8'))
    assert card['splits'] == {'train': 1, 'validation': 0}


def test_a_terminal_that_lacks_a_character_ends_nothing(monkeypatch):
    out = io.BytesIO()
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(out, 'ascii'))
    monkeypatch.setattr(commands, 'FLAGS', {'verbosity': flags.FLAGS['verbosity']})
    commands.call('x', lambda rest: print('1 \u00b1 2 \udcc3'), ['x'])
    assert out.getvalue() == b'1 \\xb1 2 \\udcc3\n'


def test_a_name_that_the_locale_does_not_know_is_refused():
    with pytest.raises(UserError, match=r'^/a/caf.udcc3 .* the locale .* set PYTHONUTF8=1'):
        places.of('/a/caf\udcc3')


# --- Readers that go away, and Ctrl-C ---


@pytest.mark.parametrize('ends', ['>&-', '2>&-', '<&-', '>&- 2>&- <&-', '| true', '2>&1 | true'])
def test_who_reads_a_command_may_go_away(tmp_path, ends):
    (tmp_path / 'p.txt').write_text('a cat\n')
    program = [sys.executable, '-m', 'ddmd_jax.prepare', 'prompts', f'--input={tmp_path / "p.txt"}',
               f'--out={tmp_path / "out"}']
    done = subprocess.run(f'{shlex.join(program)} {ends}', shell=True, cwd=tiny.ROOT, text=True,
                          capture_output=True, check=False)
    assert 'Traceback' not in done.stderr and 'Exception ignored' not in done.stderr
    assert (tmp_path / 'out' / 'card.json').is_file()


@pytest.mark.parametrize('error, said', [
    (KeyboardInterrupt(), 'main: stopped'), (BrokenPipeError(), 1)])
def test_a_training_is_stopped_before_it_runs(monkeypatch, error, said):
    def interrupted(argv):
        raise error

    monkeypatch.setattr(train, '_main', interrupted)
    monkeypatch.setattr(sys, 'stdout', None)
    with pytest.raises(SystemExit) as e:
        train.main(['main'])
    assert e.value.code == said
