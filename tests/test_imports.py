"""Imports go down the layers only, and in no circle; those inside functions count like any other.

A module imports from its own folder, or from a layer below. Commands are on top; only they import
planner, study, report and export.
"""

import ast
import functools

import tiny

PACKAGE = tiny.ROOT / 'ddmd_jax'
LAYERS = (  # from the bottom
    {'util', 'config.rules', 'config.fields'},
    {'parallel'},
    {'weights', 'data'},
    {'models', 'diffusion'},
    {'evaluation'},
    {'families'},
    {'method'},
    {'config'},  # its conditions on several fields ask everything below
    {'train'},
    {'planner', 'study', 'report', 'export', 'embedding', 'imaging'},
    {'main', 'sample', 'evaluate', 'prepare', 'plan', 'checkpoints'},
)
RANK = {f'ddmd_jax.{name}': rank for rank, names in enumerate(LAYERS) for name in names}
# Edges that go up all the same, and why.
ALLOWED = {
    'ddmd_jax.diffusion.drawing -> ddmd_jax.families': 'names the type of a teacher',
    'ddmd_jax.evaluation.evaluate -> ddmd_jax.families': 'names the type of a teacher',
}


def modules():
    """``{dotted name: path}``; a folder stands for its ``__init__``."""
    found = {}
    for path in PACKAGE.rglob('*.py'):
        parts = path.relative_to(PACKAGE.parent).with_suffix('').parts
        found['.'.join(parts[:-1] if parts[-1] == '__init__' else parts)] = path
    return found


def imports(path, names):
    """Modules of the package that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                whole = f'{node.module}.{alias.name}'
                found.add(whole if whole in names else node.module)
    return {name for name in found if name in names and name != 'ddmd_jax'}


@functools.cache
def graph():
    names = modules()
    return {name: imports(path, names) - {name} for name, path in names.items()}


def layer(name):
    """The entry of LAYERS that a module belongs to, the longest first."""
    parts = name.split('.')
    return next(found for n in (3, 2) if (found := '.'.join(parts[:n])) in RANK)


def test_imports_go_down():
    same = lambda a, b: a.split('.')[1] == b.split('.')[1]  # folder
    up = {f'{name} -> {other}' for name, others in graph().items() if name != 'ddmd_jax'
          for other in others
          if not same(name, other) and RANK[layer(name)] <= RANK[layer(other)]}
    assert up == set(ALLOWED)


def test_planner_and_study_stand_apart():
    users = {name.split('.')[1] for name, others in graph().items()
             for other in others if other.split('.')[1] in ('planner', 'study')}
    assert users == {'plan', 'planner', 'study'}


def test_there_is_no_circle():
    left = graph()
    while gone := {name for name, others in left.items() if not others & set(left)}:
        left = {name: others for name, others in left.items() if name not in gone}
    assert not left, {name: sorted(others & set(left)) for name, others in left.items()}


# Functions of more than six parameters, and why.
MANY = {
    'data.order.Order.__init__': 'a constructor: rows, sizes and buckets of a run',
    'models.attention.attend': 'three tensors, mask and scale, as in every published attention',
    'weights.diffusers.export_tree': 'a folder, its files, and a tree with its names and types',
    'planner.costs._pairs': 'the seven numbers of one axis of a convolution, as HLO has them',
    'families.emoji.code.pipeline.EmojiPipeline.__init__': 'diffusers: one for each component',
    'study.claims.apart': 'a row of the study: a table of claims, not a call among others',
    'study.claims.alone': 'likewise', 'study.claims.alike': 'likewise',
    'study.claims_page.write': 'likewise: the page of all of them',
}


def test_functions_take_six_parameters_at_most():
    found = set()
    for name, path in modules().items():
        tree = ast.parse(path.read_text())
        owners = {id(f): c.name for c in ast.walk(tree) if isinstance(c, ast.ClassDef)
                  for f in c.body}
        for f in ast.walk(tree):
            if isinstance(f, ast.FunctionDef):
                a = f.args
                names = [x.arg for x in a.posonlyargs + a.args + a.kwonlyargs]
                if len(set(names) - {'self', 'cls'}) > 6:
                    found.add('.'.join(filter(None, [
                        name.removeprefix('ddmd_jax.'), owners.get(id(f)), f.name])))
    assert found == set(MANY)
