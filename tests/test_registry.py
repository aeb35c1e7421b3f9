"""Families are found through one registry, and nobody outside them compares their names."""

import ast
import subprocess
import sys

import pytest
import tiny

from ddmd_jax import config as config_lib, families
from ddmd_jax.families import UnknownFamily
from ddmd_jax.weights.flat import WeightsError

NAMES = {*families.NAMES, *(name for family in map(families.get, families.NAMES)
                            for name in family.data_sets)}


def compared(tree):
    """Strings that a module compares with, or looks for in what it has spelt out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare | ast.MatchValue):
            yield from (leaf.value for leaf in ast.walk(node)
                        if isinstance(leaf, ast.Constant) and isinstance(leaf.value, str))


def test_no_general_code_compares_a_familys_name():
    package = tiny.ROOT / 'ddmd_jax'
    general = [file for file in package.rglob('*.py')
               if not {'families', 'configs'} & set(file.relative_to(package).parts)]
    assert len(general) > 80
    found = {str(file.relative_to(package)): names for file in general
             if (names := NAMES & set(compared(ast.parse(file.read_text()))))}
    assert not found


@pytest.mark.parametrize('code', ["t == 'emoji'", "'lumina' != t", "t in ('emoji', 'prompts')",
                                  "match t:\n  case 'sdxl': pass", "t not in {'zimage': 1}"])
def test_a_comparison_is_found(code):
    assert NAMES & set(compared(ast.parse(code)))


@pytest.mark.parametrize('name', families.NAMES)
def test_a_family_is_the_one_of_its_folder(name):
    assert families.get(name).name == name
    assert (tiny.ROOT / 'ddmd_jax/families' / name / '__init__.py').is_file()


def module(folder, text):
    (folder / 'mine').mkdir()
    (folder / 'mine' / '__init__.py').touch()
    (folder / 'mine' / 'family.py').write_text(text)


@pytest.mark.parametrize('text, words', [
    ('', 'must have a FAMILY of that name .* it has none'),
    ('from ddmd_jax.families import Family\nFAMILY = Family("another")', "called 'another'"),
    ('import not_installed', "'mine.family' cannot be imported .*not_installed"),
    ('1 / 0', "'mine.family' cannot be imported .ZeroDivisionError"),
])
def test_a_module_that_holds_no_family_is_one_line(tmp_path, monkeypatch, text, words):
    module(tmp_path, text)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [n for n in sys.modules if n.split('.')[0] == 'mine']:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UnknownFamily, match=words) as e:
        families.get('mine.family')
    assert len(str(e.value).splitlines()) == 1


@pytest.mark.parametrize('name', ['emojj', 'no_such.module', 'os.path.x', ''])
def test_a_name_of_no_family_is_one_line(name):
    with pytest.raises(UnknownFamily) as e:
        families.get(name)
    assert len(str(e.value).splitlines()) == 1


def test_weights_of_no_family_are_refused(tmp_path):
    (tmp_path / 'config.json').write_text('{"_class_name": "FluxTransformer2DModel"}')
    with pytest.raises(WeightsError, match='FluxTransformer2DModel, which no teacher family'):
        families.load_teacher(str(tmp_path))
    with pytest.raises(UnknownFamily, match='lumina does not ship'):
        families.load_teacher('lumina')


def test_a_family_of_a_text_side_alone_has_no_teacher(monkeypatch):
    alone = families.Family('mine.alone', text=lambda options: None)
    with pytest.raises(WeightsError, match='only the text encoder of mine.alone is supported'):
        alone.load_teacher(families.LoadOptions('anywhere'))
    monkeypatch.setattr(families, 'get', lambda name: alone)
    config = config_lib.load('emoji')
    config.teacher.name = 'mine.alone'
    assert 'has a text side here, and no teacher to distil' in config_lib.validate(config)[0]


def test_the_package_offers_the_teacher_at_its_door():
    """And imports nothing before it is asked for."""
    code = ('import sys, ddmd_jax; assert "jax" not in sys.modules\n'
            'from ddmd_jax import load_teacher; print(load_teacher("emoji").identity)')
    done = subprocess.run([sys.executable, '-c', code], cwd=tiny.ROOT, capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == families.load_teacher('emoji').identity
