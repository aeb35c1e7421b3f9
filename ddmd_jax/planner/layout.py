"""Where a distillation's arrays lie on a mesh, as a table; from shapes alone, nothing compiled."""

import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec as P

from ddmd_jax import families as teachers
from ddmd_jax.parallel import sharding
from ddmd_jax.train import distillation
from ddmd_jax.util import text
from ddmd_jax.weights import flat

REST = 'counters, null prompt'


@dataclasses.dataclass(frozen=True)
class Row:
    """Where one leaf of a tree lies: `size` and `per_device` in bytes."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    spec: P
    memory: str  # 'device' or 'host'
    size: int
    per_device: int


def rows_of(tree: Any, shardings: Any) -> list[Row]:
    """A row for each leaf of a tree of arrays or `ShapeDtypeStruct`s, in the tree's order."""
    def row(path, leaf, sharding):
        name = jax.tree_util.keystr(path, simple=True, separator='/')
        shape, width = tuple(leaf.shape), leaf.dtype.itemsize
        memory = 'host' if sharding.memory_kind == 'pinned_host' else 'device'
        return Row(name, shape, leaf.dtype.name, sharding.spec, memory, math.prod(shape) * width,
                   math.prod(sharding.shard_shape(shape)) * width)
    return jax.tree.leaves(jax.tree_util.tree_map_with_path(row, tree, shardings))


def table(rows: Sequence[Row]) -> str:
    """Rows of a layout in aligned columns, and their totals."""
    cells = [('parameter', 'shape', 'dtype', 'split over', 'bytes', 'per device')]
    cells += [(r.path, 'x'.join(map(str, r.shape)) or 'scalar', r.dtype, spec_text(r.spec),
               text.in_units(r.size), text.in_units(r.per_device)) for r in rows]
    cells.append((f'all {len(rows)}', '', '', '', text.in_units(sum(r.size for r in rows)),
                  text.in_units(sum(r.per_device for r in rows))))
    return text.aligned(cells, numbers=2)


def spec_text(spec: P) -> str:
    """``- fsdp tensor`` for ``P(None, 'fsdp', 'tensor')``; `whole` where nothing is split."""
    word = lambda axis: '-' if axis is None else axis if isinstance(axis, str) else '+'.join(axis)
    return ' '.join(map(word, spec)) if any(spec) else 'whole'


def layout(config: Any, teacher: teachers.Teacher, mesh: Mesh, tokens: int,
           encoder: teachers.TextEncoder | None = None) -> str:
    """The student's parameters one by one, then a line for every tree of their shape.

    Args:
      config: of a distillation.
      teacher: with shapes or arrays as parameters.
      mesh: what they are laid out over.
      tokens: length of a caption.
      encoder: the text encoder, if prompts are encoded on the mesh, likewise.

    Raises:
      ShardingError: a parameter that no rule fits, or that does not divide.
    """
    null = teacher.cond.shapes(1, tokens, jnp.bfloat16)
    p = distillation.plan(config, teacher, null, mesh)
    fields = lambda tree: {f.name: getattr(tree, f.name) for f in dataclasses.fields(tree)}
    shapes = fields(p.spec.shapes) | fields(jax.eval_shape(lambda: p.frozen))
    rows = rows_of(shapes, fields(p.spec.shardings) | fields(p.frozen_shardings))
    params = rows_of(p.spec.shapes.student, p.spec.shardings.student)
    # Of a tree that is not the student's, as where adapters are trained, by the teacher's names.
    networks = (p.spec.shapes.student, p.spec.shapes.critic, p.frozen.teacher)
    trees = by_tree(rows, {path for tree in networks for path in flat.flatten(tree)})
    if encoder:
        trees['text encoder'] = rows_of(
            encoder.params, sharding.shard_tree(encoder.params, encoder.rules, mesh))
    sizes = ' '.join(f'{axis}={size}' for axis, size in mesh.shape.items())
    return '\n'.join([
        f'{mesh.size} devices ({sizes}). The student:', '', table(params), '',
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
        '+'.join(sorted({r.memory for r in rows})), text.in_units(sum(r.size for r in rows)),
        text.in_units(sum(r.per_device for r in rows)))
    everything = [row for rows in trees.values() for row in rows]
    kinds = sorted({row.memory for row in everything})
    return text.aligned(
        [('tree', 'arrays', 'dtype', 'memory', 'bytes', 'per device')]
        + [line(name, rows) for name, rows in trees.items()]
        + [line('all', [r for r in everything if r.memory == kind]) for kind in kinds], numbers=2)


def otherwise(trees: dict[str, list[Row]], params: Sequence[Row]) -> list[str]:
    """Lines for what a rule splits unlike the student's parameter of that name."""
    specs = {row.path: row.spec for row in params}
    odd = [dataclasses.replace(row, path=f'{name}/{row.path}') for name, rows in trees.items()
           for row in rows if row.spec != specs.get(row.path, row.spec)]
    return ['', 'Except:', '', table(odd)] if odd else []
