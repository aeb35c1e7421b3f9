"""Bad input at the command line: one clear line, the right exit code, nothing written."""

import functools
import re
import subprocess
import sys

import forked
import pytest
import tiny
from absl import flags

from ddmd_jax.util import commands as frame
from ddmd_jax.util.errors import UserError

CASES = [
    (['--config=nofile.py'], 2, 'nofile.py cannot be read'),
    (['--config=configs/emoji.py', '--config.method.alhpa=3'], 2,
     'method.alhpa: no such field; did you mean method.alpha?'),
    (['--config=configs/emoji.py', '--config.seed=1', '--config.critic.ordr=one_rollout'], 2,
     'critic.ordr: no such field; did you mean critic.order?'),
    (['--config=configs/emoji.py', '--config.student.first_step=9'], 2,
     'emoji.py lacks student.first_step; set it in the file'),
    (['--config=configs/emoji.py', '--config.criti.order=one_rollout'], 2,
     'criti.order: no such field; did you mean critic.order?'),
    (['--config=configs/emoji.py', '--config.criti.x=1'], 2,
     'criti.x: no such field; did you mean critic?'),
    (['--config=configs/emoji.py', '--config.train.steps=few'], 2, 'config.train.steps'),
    (['--config', 'configs/emoji.py', '--config.method.alhpa=3'], 2, 'did you mean method.alpha?'),
    (['--config=configs/emoji.py:hybird'], 2, 'method.schedule'),
    (['--config=configs/emoji.py', '--workdir='], 1, '--workdir'),
    (['--config=configs/emoji.py', '--workdir=/proc/nowhere'], 1, 'cannot be made'),
    (['--config=configs/emoji.py', '--config.teacher.path=/nowhere.safetensors'], 1,
     'weights missing: /nowhere.safetensors; correct the path'),
]
# What a config's file may be, of whatever command has one.
CONFIGS = [
    ('', '=nofile.py', 'nofile.py cannot be read'), ('', '=FOLDER', 'cannot be read'),
    ('', '=emoji --config.nope=1', 'nope: no such field; known here: '),
    ('def get_config():\n  raise RuntimeError("boom\\nboom")', '=FILE',
     'mine.py cannot be run (RuntimeError boom boom)'),
    ('def get_config():\n  return {}["x"]', '=FILE --config.seed=3',
     "mine.py cannot be run (KeyError 'x')"),
    ('x = = 1', '=FILE', 'cannot be run (SyntaxError invalid syntax'),
    ('x = 1', '=FILE', 'cannot be run (it has no get_config()'),
    ('get_config = lambda: 3', '=FILE', 'returns a int, not a ConfigDict')]


@pytest.mark.parametrize('args, code, words', CASES)
def test_bad_input(tmp_path, args, code, words):
    if not any(a.startswith('--workdir') for a in args):
        args = [*args, f'--workdir={tmp_path / "run"}']
    done = forked.run('ddmd_jax.main', *args)
    errors = [x for x in done.stderr.splitlines() if x.startswith(('main:', 'config:', 'method.'))]
    assert done.returncode == code, done.stderr
    assert words in ' '.join(errors) and 'Traceback' not in done.stderr


@pytest.mark.parametrize('program, args, words', CONFIGS)
def test_a_config_that_is_none_is_one_line(tmp_path, program, args, words):
    (tmp_path / 'mine.py').write_text(program)
    args = f'--config{args}'.replace('FILE', str(tmp_path / 'mine.py')).replace(
        'FOLDER', str(tmp_path)).split()
    for module in ('ddmd_jax.main', 'ddmd_jax.plan'):
        done = forked.run(module, *args)
        assert done.returncode == 2 and words in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith('config: ')


PREPARE = [
    ([], 1, 'expected `prompts`, `embed`, `images` or `emoji`, got nothing'),
    (['emojis'], 1, 'got emojis'),
    (['prompts', '--batch=3'], 2, "Unknown command line flag 'batch'"),  # of `embed`
    (['embed'], 1, 'no --prompts given'),
    (['embed', '--prompts=OUT'], 1, 'no --out given'),
    (['embed', '--prompts=OUT', '--out=NEW'], 1, 'no --teacher given; name a family'),
    (['embed', '--batch=few'], 2, '--batch=few'),
    (['prompts'], 1, 'no --input given'),
    (['prompts', '--input=FILE'], 1, 'no --out given'),
    (['prompts', '--input=FILE', '--out=OUT', 'more.txt'], 1, "unexpected argument 'more.txt'"),
    (['prompts', '--input=FILE', '--out=OUT', '--feild=x'], 2, "Unknown command line flag 'feild'"),
    (['prompts', '--input=FILE', '--out=OUT', '--validation=2'], 2, 'validation'),
    (['prompts', '--input=FILE', '--out=OUT', '--near_threshold=0'], 2, 'near_threshold'),
    (['prompts', '--input=FILE,/nowhere.txt', '--out=OUT'], 1, 'no file /nowhere.txt'),
    (['prompts', '--input=FILE', '--out=/proc/nowhere/set'], 1, '/proc/nowhere'),
    (['prompts', '--input=FILE', '--out=/'], 1, 'exists and is no set of prompts'),
    (['prompts', '--input=FILE', '--out=FILE'], 1, 'exists and is no set of prompts'),
]


@pytest.fixture(scope='module')
def prepare():
    return functools.partial(forked.run, 'ddmd_jax.prepare')


@pytest.mark.parametrize('args, code, words', PREPARE)
def test_bad_input_of_prepare(prepare, tmp_path, args, code, words):
    (tmp_path / 'prompts.txt').write_text('a cat\n')
    names = {'FILE': str(tmp_path / 'prompts.txt'), 'OUT': str(tmp_path / 'out')}
    for name, path in names.items():
        args = [a.replace(name, path) for a in args]
    done = prepare(*args)
    errors = [x for x in done.stderr.splitlines() if x]
    assert done.returncode == code, done.stderr
    assert len(errors) == 1 and errors[0].startswith('prepare: ') and words in errors[0]
    assert not done.stdout and not list(tmp_path.glob('out*/*'))


@pytest.mark.parametrize('args, code, words', [
    (['judge'], 1, "unexpected argument 'judge'"), (['--step=3'], 2, "'step'"),
    ([], 1, 'no --out given; name a file'),
    (['--out=/proc/nowhere/judge.safetensors'], 1, 'cannot be made'),
    (['--steps=few'], 2, '--steps=few'), (['--steps=0'], 2, '--steps=0'),
    (['--seed=-1'], 2, '--seed=-1'), (['--out=/proc'], 1, '--out=/proc is a folder; name a file')])
def test_bad_input_of_the_judges_training(args, code, words):
    done = forked.run('ddmd_jax.families.emoji.make_judge', *args)
    (error,) = filter(None, done.stderr.splitlines())
    assert done.returncode == code and error.startswith('make_judge: ') and words in error


def test_prepare_prompts_says_what_it_made_and_that_it_is_done(prepare, tmp_path):
    (tmp_path / 'a,b.txt').write_text('a cat\n\na dog\n')
    (tmp_path / 'c.jsonl').write_text('{"caption": "a cat"}\n')
    args = ['prompts', f'--input={tmp_path}/a,b.txt', f'--input={tmp_path}/c.jsonl',
            '--field=caption', f'--out={tmp_path}/out']
    first, second = prepare(*args), prepare(*args)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert 'out written: 2 train, 0 validation; identity ' in first.stdout
    assert second.stdout == first.stdout.replace('written', 'is done already')
    bars = re.compile(r'[^\n]*%\|[^\n]*')  # shown where it took a second
    assert bars.sub('', first.stderr).strip() == (
        'prepare: 4 read, 1 empty, 1 equal to another after normalisation')


@pytest.mark.parametrize('args', [['--help'], ['prompts', '--help']])
def test_help_of_prepare(prepare, args):
    done = prepare(*args)
    assert done.returncode == 1  # as absl has it
    assert ('--near_threshold' if 'prompts' in args else 'makes a set of prompts') in done.stdout


@pytest.mark.parametrize('args', [['prepare', 'prompts'], ['prepare', 'embed'], ['sample'],
                                  ['export'], ['report'], ['checkpoints']])
def test_flags_are_parsed_before_jax_is_imported(args):
    """JAX takes seconds, which a wrong flag need not wait for."""
    code = (f'import runpy, sys; sys.argv = {["x", *args[1:], "--help"]}\n'
            f'try: runpy.run_module("ddmd_jax.{args[0]}", run_name="__main__", alter_sys=True)\n'
            'except SystemExit: assert "jax" not in sys.modules')
    done = subprocess.run([sys.executable, '-c', code], cwd=tiny.ROOT, capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0 and 'flags:' in done.stdout, done.stderr


@pytest.mark.parametrize('error, said', [
    (UserError('no cat; get one'), 'x: no cat; get one'),
    (FileNotFoundError(2, 'No such file', '/a/b'), 'x: /a/b cannot be read or written (No such'),
    (OSError(28, 'No space left on device'), 'x: there is no room on the disk; make some'),
    (KeyboardInterrupt(), 'x: stopped')])
def test_an_error_of_a_command_is_one_line(monkeypatch, error, said):
    def fail(arguments):
        raise error

    monkeypatch.setattr(frame, 'FLAGS', {'verbosity': flags.FLAGS['verbosity']})
    with pytest.raises(SystemExit) as e:
        frame.call('x', fail, ['x'])
    assert e.value.code.startswith(said) and '\n' not in e.value.code
