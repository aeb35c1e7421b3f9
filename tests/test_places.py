"""Every flag and field that names a file or a folder: what it takes, and what it refuses."""

import ast
import os
import re

import forked
import pytest
import tiny
from absl import flags

from ddmd_jax import config as config_lib
from ddmd_jax.config import fields, together
from ddmd_jax.util import commands as frame, places

PACKAGE = tiny.ROOT / 'ddmd_jax'
# (module, flag) -> URLs that it takes. Whoever defines another flag of this kind adds a line.
FLAGS = {
    ('checkpoints', ''): 'BUCKETS',
    # An evaluation's images are added batch by batch, and read again at random.
    ('evaluate', ''): 'LOCAL', ('evaluate', 'out'): 'LOCAL',
    ('evaluate', 'checkpoint'): 'BUCKETS', ('evaluate', 'model'): 'ANY',
    ('evaluate', 'teacher_path'): 'ANY', ('evaluate', 'weights'): 'ANY',
    ('evaluate', 'prompts'): 'BUCKETS', ('evaluate', 'results'): 'BUCKETS',
    ('evaluate', 'images'): 'BUCKETS', ('evaluate', 'reference'): 'BUCKETS',
    ('evaluate', 'python'): 'LOCAL',  # a program
    ('export', 'checkpoint'): 'BUCKETS', ('export', 'out'): 'BUCKETS', ('export', 'teacher'): 'ANY',
    ('families.emoji.make_judge', 'out'): 'LOCAL',
    ('main', 'compile_cache'): 'BUCKETS',
    ('main', 'workdir'): 'GS',  # Orbax writes no arrays behind s3://
    ('prepare prompts', 'input'): 'BUCKETS', ('prepare prompts', 'out'): 'BUCKETS',
    ('prepare embed', 'prompts'): 'BUCKETS', ('prepare embed', 'path'): 'ANY',
    ('prepare embed', 'out'): 'BUCKETS',
    # Images are read at random, and the folder is written part by part.
    ('prepare images', 'input'): 'LOCAL', ('prepare images', 'captions'): 'LOCAL',
    ('prepare images', 'path'): 'ANY', ('prepare images', 'out'): 'LOCAL',
    ('prepare emoji', 'packages'): 'LOCAL', ('prepare emoji', 'out'): 'LOCAL',  # tfds writes them
    ('report', ''): 'BUCKETS', ('report', 'out'): 'BUCKETS',
    ('sample', 'checkpoint'): 'BUCKETS', ('sample', 'out'): 'BUCKETS',
    ('sample', 'prompts'): 'BUCKETS', ('sample', 'teacher_path'): 'ANY',
    # A study starts its runs as processes of this machine, and keeps no more than their results.
    ('study', 'config'): 'LOCAL', ('study', 'workdir'): 'LOCAL',
    ('study.summarise', ''): 'BUCKETS',
}
FIELDS = {'resume': places.BUCKETS, 'init_from': places.BUCKETS, 'teacher.path': places.ANY,
          'data.path': places.BUCKETS}
# What is wrong with a name, wherever it stands, and the words that say so.
NOWHERE = [
    ('gs:/bucket/P', 'has one slash too few for a URL: gs://bucket/P'),
    ('$DDMD_NOT_SET/P', 'holds $DDMD_NOT_SET, which is not set'),
    ('${DDMD_NOT_SET}/P', 'holds ${DDMD_NOT_SET}, which is not set'),
    ('~nobody-of-that-name/P', 'begins with ~nobody-of-that-name, and there is no such user'),
    ('a\0b', 'holds a NUL')]
ELSEWHERE = [
    ('gs://bucket/P', 'must be a local path, not a gs:// URL'),
    ('S3://bucket/P', 'must be a local path, not a s3:// URL'),
    ('https://host/P', 'must be a local path, not a https:// URL')]
FOREIGN = [('https://host/P', 'must be a local path')]


def defined():
    """``{(module, flag): schemes}`` of all calls of `define_place`; flags that bypass it."""
    found, others = {}, []
    for path in PACKAGE.rglob('*.py'):
        module = '.'.join(path.relative_to(PACKAGE).with_suffix('').parts)
        tree = ast.parse(path.read_text())
        # The words of `prepare` have flags of their own.
        words = {id(n): f' {f.name.removesuffix("_flags")}' for f in tree.body
                 if isinstance(f, ast.FunctionDef) and f.name.endswith('_flags')
                 and f.name != 'define_flags' for n in ast.walk(f)}
        for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
            name = getattr(call.func, 'attr', '')
            if name in ('define_place', 'define_places'):
                schemes = [a.attr for a in call.args if isinstance(a, ast.Attribute)]
                module = module.replace('evaluation.options', 'evaluate')  # whose flags stand apart
                flag = (module.removesuffix('.__main__') + words.get(id(call), ''),
                        call.args[0].value)
                found[flag] = (schemes or ['BUCKETS'])[0]
            elif name in ('DEFINE_string', 'DEFINE_multi_string', 'DEFINE_list'):
                said = ' '.join(a.value for a in call.args[1:] if isinstance(a, ast.Constant)
                                 and isinstance(a.value, str))
                if re.search(r'\b(folder|file|path|url)', said, re.IGNORECASE):
                    others.append((module, call.args[0].value))
    return found, others


def test_every_flag_that_names_a_place_is_defined_as_one():
    found, others = defined()
    assert found == {flag: schemes for flag, schemes in FLAGS.items() if flag[1]}
    # Hub names and the values of other flags are no places.
    assert others == [('export.__main__', 'push')]


def test_nobody_else_makes_a_place_of_what_was_typed():
    """`expanduser` stands in one file; a path made elsewhere is of a place, or of the package."""
    users = {p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob('*.py')
             if 'expanduser' in p.read_text()}
    assert users == {'util/places.py'}


@pytest.mark.parametrize('flag, schemes', FLAGS.items())
def test_a_flag_refuses_what_is_no_place_for_it(flag, schemes):
    parser = frame._PlaceParser(getattr(places, schemes))
    other = {'LOCAL': ELSEWHERE, 'ANY': []}.get(schemes, FOREIGN)
    for named, words in NOWHERE + other:
        with pytest.raises(ValueError, match=re.escape(f'it {words}')):
            parser.parse(named)


def test_a_place_may_be_one_of_something():
    parser = frame._PlaceParser(places.LOCAL, 'SUITE')
    home = os.path.expanduser('~')
    assert parser.parse('a:row=~/b=c') == f'a:row={home}/b=c'
    for given in ('x', 'x=', '=x', ''):
        with pytest.raises(ValueError, match='it is not SUITE=PATH'):
            parser.parse(given)
    for named, words in NOWHERE + ELSEWHERE:
        with pytest.raises(ValueError, match=re.escape(f'it {words}')):
            parser.parse(f'x={named}')


def test_every_field_that_names_a_place_is_one():
    known = {f.path: f.doc for f in fields.COMMON + fields.DISTILL + fields.PRETRAIN + fields.CODEC
             + fields.under('data', fields.PROMPTS)}
    found = {path for path, doc in known.items()
             if re.search(r'\b(a|another) (run|file|folder)|the folder', doc)}
    assert found == set(FIELDS)
    assert found == {path for condition, path, *_ in together.CONDITIONS
                     if condition.__name__.startswith('place_')}


@pytest.mark.parametrize('field, schemes', FIELDS.items())
def test_a_field_refuses_what_is_no_place_for_it(field, schemes):
    for named, words in NOWHERE + FOREIGN * (schemes is not places.ANY):
        config = config_lib.load('lumina')
        config.teacher.path = 'owner/name'
        with config.unlocked():
            section, _, name = field.rpartition('.')
            (config[section] if section else config)[name] = named
        wrong = [line for line in config_lib.validate(config) if line.startswith(f'{field}: ')]
        assert len(wrong) == 1 and f'which {words}' in wrong[0], wrong


@pytest.mark.parametrize('args', [
    ['main', '--config=emoji', '--workdir=URL'],
    ['main', '--config=URL', '--workdir=/nowhere'],
    ['sample', '--teacher', '--teacher_path=emoji', '--prompt=x', '--out=URL'],
    ['evaluate', '--model=emoji', '--suite=emoji', '--prompts=emoji=URL', '--out=x'],
    ['evaluate', '--compare', 'URL', 'URL'],
    ['export', '--checkpoint=URL', '--out=x'],
    ['prepare', 'prompts', '--input=URL', '--out=x'],
    ['prepare', 'embed', '--prompts=URL', '--out=x', '--teacher=lumina'],
    ['prepare', 'images', '--input=URL', '--out=x', '--teacher=sdxl', '--path=x'],
    ['prepare', 'images', '--input=x', '--captions=URL', '--out=x', '--teacher=sdxl', '--path=x'],
    ['prepare', 'images', '--input=x', '--out=URL', '--teacher=sdxl', '--path=x'],
    ['report', 'URL'], ['checkpoints', 'URL'],
    ['study', '--config=emoji', '--workdir=URL'], ['study.summarise', 'URL']])
@pytest.mark.parametrize('url', ['ftp://bucket/P', 'gs:/bucket/P'])
def test_a_command_refuses_in_one_line_and_makes_nothing(tmp_path, args, url):
    module, *rest = (arg.replace('URL', url) for arg in args)
    before = os.listdir(tiny.ROOT)
    done = forked.run(f'ddmd_jax.{module}', *rest)
    lines = [line for line in done.stderr.splitlines() if line]
    assert done.returncode in (1, 2) and len(lines) == 1, done.stderr
    assert lines[0].startswith(f'{module.split(".")[-1]}: ') and url in lines[0]
    assert os.listdir(tiny.ROOT) == before


def test_home_and_variables_are_filled_in_everywhere(monkeypatch, tmp_path):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('DATA', str(tmp_path / 'data'))
    monkeypatch.chdir(tmp_path)
    assert places.of('~/run') == tmp_path / 'run'
    assert places.of('$DATA/run') == places.of('${DATA}/run') == tmp_path / 'data' / 'run'
    assert places.of('run') == tmp_path / 'run' == places.of(f'file://{tmp_path}/run')
    assert places.filled('my.family:~/teacher') == f'my.family:{tmp_path}/teacher'
    assert places.fault('my.family:$NOT_SET/teacher').startswith('holds $NOT_SET')
    # What is no place, or is there by that very name, stays.
    (tmp_path / '$5 a month.txt').touch()
    for named in ('owner/name', 'emoji', '$5 a month.txt', ''):
        assert places.filled(named) == named and not places.fault(named)


def test_a_folder_of_this_machine_is_not_taken_for_a_bucket(monkeypatch, tmp_path):
    (tmp_path / 'gs:' / 'bucket' / 'P').mkdir(parents=True)  # of a version that did
    monkeypatch.chdir(tmp_path)
    for named in ('gs://bucket/P', 'gs:/bucket/P'):
        assert places.fault(named, places.LOCAL)
        with pytest.raises(places.PlaceError, match=named):
            places.of(named, places.LOCAL)


def test_a_flag_may_be_left_out_or_empty():
    values = flags.FlagValues()
    flags.DEFINE(frame._PlaceParser(places.LOCAL), 'out', None, 'A file.', flag_values=values)
    assert values(['x']) and values.out is None
    assert values(['x', '--out=']) and values.out == ''


def test_what_reads_a_bucket_is_asked_for_at_once(monkeypatch):
    monkeypatch.setitem(places.READERS, 'gs', 'no_such_reader')
    assert places.fault('gs://bucket/P') == (
        'needs no_such_reader to be read: pip install no_such_reader')
    monkeypatch.setitem(places.READERS, 'gs', 'fsspec')
    for named in ('gs://', 'gs:///P'):
        assert places.fault(named) == 'names no bucket; write gs://BUCKET/PATH'
    assert places.fault('gs://bucket/../P').startswith('holds ..')
    assert places.fault('az://bucket/P') == (
        'must be a local path or gs:// or s3://, not a az:// URL')
