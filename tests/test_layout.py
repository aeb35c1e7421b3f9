"""The printed layout: what a row says, and that eight trees of a shape are not eight tables."""

import math
import re

import jax
import jax.numpy as jnp
import pytest
import tiny
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec as P

from ddmd_jax.families.emoji import codec, teacher as emoji
from ddmd_jax.parallel import sharding
from ddmd_jax.parallel.sharding import AXES
from ddmd_jax.planner import layout as planner, programs
from ddmd_jax.train import distillation
from ddmd_jax.util import text

MESH = AbstractMesh((2, 2, 2), AXES)
TREES = ['critic', 'critic_opt/1/0/mu', 'critic_opt/1/0/nu', 'ema', 'student',
         'student_opt/1/0/mu', 'student_opt/1/0/nu', 'teacher']
TOKENS = 16


def small():
    """A tree of two leaves, and shardings that put the second into the hosts' memory."""
    tree = {'a': {'kernel': jax.ShapeDtypeStruct((3, 8, 4), jnp.float32)},
            'b': jax.ShapeDtypeStruct((6,), jnp.bfloat16)}
    lies = {'a': {'kernel': NamedSharding(MESH, P(None, 'fsdp', 'tensor'))},
            'b': sharding.in_host_memory(NamedSharding(MESH, P()))}
    return tree, lies


def test_a_row_says_where_a_leaf_lies():
    kernel, b = planner.rows_of(*small())
    assert kernel == planner.Row('a/kernel', (3, 8, 4), 'float32', P(None, 'fsdp', 'tensor'),
                                  'device', 384, 96)
    assert (b.path, b.dtype, b.memory, b.size, b.per_device) == ('b', 'bfloat16', 'host', 12, 12)


def test_a_table_ends_with_its_totals():
    _, kernel, b, total = planner.table(planner.rows_of(*small())).splitlines()
    assert re.split('  +', kernel) == ['a/kernel', '3x8x4', 'float32', '- fsdp tensor', '384 B',
                                       '96 B']
    assert re.split('  +', b) == ['b', '6', 'bfloat16', 'whole', '12 B', '12 B']
    assert re.split('  +', total) == ['all 2', '396 B', '108 B']


def test_an_axis_of_two_names_is_one_word():
    assert planner.spec_text(sharding.BATCH) == 'data+fsdp'


# --- A distillation's ---


@pytest.fixture(scope='module')
def teacher():
    return emoji.teacher_from(tiny.TOY, tiny.random_params(tiny.TOY, 0), codec.load().latents)


@pytest.fixture(scope='module')
def printed(teacher):
    return planner.layout(tiny.load_config('emoji'), teacher, MESH, TOKENS)


def test_parameters_are_listed_once_and_trees_have_a_line_each(printed, teacher):
    first = [line.split()[0] for line in printed.splitlines() if line]
    for row in planner.rows_of(teacher.params, sharding.shard_tree(
            teacher.params, teacher.rules, MESH)):
        assert first.count(row.path) == 1
        assert not any(x.endswith('/' + row.path) for x in first)
    assert [x for x in first if x in TREES] == TREES
    assert 'Except' not in printed
    assert '8 devices (data=2 fsdp=2 tensor=2)' in printed


def test_the_totals_are_what_a_device_holds(printed, teacher):
    null = teacher.cond.shapes(1, TOKENS, jnp.bfloat16)
    p = distillation.plan(tiny.load_config('emoji'), teacher, null, MESH)
    each = (programs.bytes_per_device(p.spec.shapes, p.spec.shardings)
            + programs.bytes_per_device(p.frozen, p.frozen_shardings))
    whole = sum(math.prod(x.shape) * x.dtype.itemsize
                for x in jax.tree.leaves((p.spec.shapes, p.frozen)))
    last = re.split('  +', printed.splitlines()[-1])
    assert last[0] == 'all'
    assert last[-2:] == [text.in_units(whole), text.in_units(each)]


def test_what_stays_with_the_hosts_is_counted_apart(teacher):
    config = tiny.load_config('emoji')
    config.train.offload = 'ema'
    lines = planner.layout(config, teacher, MESH, TOKENS).splitlines()[-len(TREES) - 3:]
    found = [(words[0], words[3]) for words in (re.split('  +', line) for line in lines)]
    assert found == [*((name, 'host' if name == 'ema' else 'device') for name in TREES),
                     (planner.REST, 'device'), ('all', 'device'), ('all', 'host')]


def test_a_tree_that_is_split_otherwise_is_told():
    row = lambda path, spec: planner.Row(path, (4, 4), 'float32', spec, 'device', 64, 32)
    params = [row('x/kernel', P('fsdp', None))]
    trees = planner.by_tree([row('student/x/kernel', P('fsdp', None)),
                             row('opt/mu/x/kernel', P(None, 'fsdp')), row('step', P())],
                            {r.path for r in params})
    assert list(trees) == ['student', 'opt/mu', planner.REST]
    told = '\n'.join(planner.otherwise(trees, params))
    assert 'Except' in told and 'opt/mu/x/kernel' in told and 'student' not in told
    assert planner.otherwise({'student': trees['student']}, params) == []
