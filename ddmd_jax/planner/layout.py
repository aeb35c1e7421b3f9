"""Where a distillation's arrays lie on a mesh, as a table; from shapes alone, nothing compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ddmd_jax import families as teachers
from ddmd_jax.parallel import sharding
from ddmd_jax.parallel.sharding import Row
from ddmd_jax.train import distill

REST = 'counters, null prompt'


def layout(config: Any, teacher: teachers.Teacher, mesh: Mesh, tokens: int,
           text: teachers.TextEncoder | None = None) -> str:
    """The student's parameters one by one, then a line for every tree of their shape.

    Args:
      config: of a distillation.
      teacher: with shapes or arrays as parameters.
      mesh: what they are laid out over.
      tokens: length of a caption.
      text: the text encoder, if prompts are encoded on the mesh, likewise.

    Raises:
      ShardingError: a parameter that no rule fits, or that does not divide.
    """
    null = {'embeds': jax.ShapeDtypeStruct((1, tokens, teacher.cond_width), jnp.bfloat16),
            'mask': jax.ShapeDtypeStruct((1, tokens), bool)}
    p = distill.plan(config, teacher, null, mesh)
    fields = lambda state: {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    shapes = fields(p.state) | {'teacher': jax.eval_shape(lambda: teacher.params), 'null': null}
    rows = sharding.layout(shapes, fields(p.state_shardings) | p.frozen_shardings)
    params = sharding.layout(p.state.student, p.state_shardings.student)
    trees = by_tree(rows, {row.path for row in params})
    if text:
        trees['text encoder'] = sharding.layout(
            text.params, sharding.shard_tree(text.params, text.rules, mesh))
    sizes = ' '.join(f'{axis}={size}' for axis, size in mesh.shape.items())
    return '\n'.join([
        f'{mesh.size} devices ({sizes}). The student:', '', sharding.layout_table(params), '',
        'All that stays between the steps, each tree laid out as the student is:', '',
        tree_table(trees), *otherwise(trees, params)])


def by_tree(rows: Sequence[Row], params: Collection[str]) -> dict[str, list[Row]]:
    """Rows by the tree that they are of, with the parameters' own names as paths.

    ``student_opt/1/0/mu/final/bias`` is `final/bias` of ``student_opt/1/0/mu``, where there is
    such a parameter; what is none goes to `REST` under its whole path.
    """
    found: dict[str, list[Row]] = {}
    for row in rows:
        parts = row.path.split('/')
        cut = next((i for i in range(1, len(parts)) if '/'.join(parts[i:]) in params), None)
        tree = REST if cut is None else '/'.join(parts[:cut])
        name = row.path if cut is None else '/'.join(parts[cut:])
        found.setdefault(tree, []).append(dataclasses.replace(row, path=name))
    return found | {REST: found.pop(REST, [])}  # last


def tree_table(trees: dict[str, list[Row]]) -> str:
    """A line of totals per tree, and one per kind of memory."""
    line = lambda name, rows: (
        name, str(len(rows)), '+'.join(sorted({r.dtype for r in rows})),
        '+'.join(sorted({r.memory for r in rows})), sharding.in_units(sum(r.size for r in rows)),
        sharding.in_units(sum(r.per_device for r in rows)))
    everything = [row for rows in trees.values() for row in rows]
    kinds = sorted({row.memory for row in everything})
    return sharding.aligned(
        [('tree', 'arrays', 'dtype', 'memory', 'bytes', 'per device')]
        + [line(name, rows) for name, rows in trees.items()]
        + [line('all', [r for r in everything if r.memory == kind]) for kind in kinds], numbers=2)


def otherwise(trees: dict[str, list[Row]], params: Sequence[Row]) -> list[str]:
    """Lines for what a rule splits unlike the student's parameter of that name."""
    specs = {row.path: row.spec for row in params}
    odd = [dataclasses.replace(row, path=f'{name}/{row.path}') for name, rows in trees.items()
           for row in rows if row.spec != specs.get(row.path, row.spec)]
    return ['', 'Except:', '', sharding.layout_table(odd)] if odd else []
