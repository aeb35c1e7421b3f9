"""Mesh axes and the rules that lay a pytree of parameters out over them.

One ordered list of (regex, spec) lays out student, critic, EMA, optimiser moments and
teacher alike: a rule is searched in a leaf's path, so that `.../mu/layers/attn/to_q/kernel`
follows `layers/attn/to_q/kernel`. A spec names mesh axes for a leaf's *last* dimensions;
stacked layers add dimensions in front, which stay whole.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

AXES = ('data', 'fsdp', 'tensor')
BATCH = P(('data', 'fsdp'))
Rules = Sequence[tuple[str, tuple[str | None, ...]]]


class ShardingError(ValueError):
    """A mesh that does not fit the devices, or a rule that does not fit a parameter."""


def make_mesh(axes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Mesh over all devices; one axis may be -1, meaning whatever is left.

    Where the devices lie in several slices, `data` goes over the slow network between them: its
    outermost factor is the slice, so that fsdp and tensor, which talk most, stay inside one.

    Raises:
      ShardingError: unknown axes, sizes that are not positive, that do not multiply to the
        number of devices, or `data` does not divide by the number of slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [axes.get(a, 1) for a in AXES]
    asked = f'mesh {dict(axes)}'
    if set(axes) - set(AXES):
        raise ShardingError(f'{asked}: the axes are {", ".join(AXES)}')
    if any(s < 1 and s != -1 for s in sizes) or sizes.count(-1) > 1:
        raise ShardingError(f'{asked}: sizes are at least 1, and one of them may be -1')
    fixed = math.prod(s for s in sizes if s != -1)
    if -1 in sizes and len(devices) % fixed == 0:
        sizes[sizes.index(-1)] = len(devices) // fixed
    if math.prod(sizes) != len(devices):
        raise ShardingError(f'{asked} does not fit {len(devices)} devices: the sizes must '
                            'multiply to that number; -1 takes what is left')
    types = (AxisType.Auto,) * len(AXES)
    slices = slices_of(devices)
    if len(slices) == 1:
        return jax.make_mesh(sizes, AXES, axis_types=types, devices=devices)
    inner = _within_slice(asked, sizes, slices)
    # As `mesh_utils.create_hybrid_device_mesh` does, but each slice laid out by `jax.make_mesh`.
    parts = [jax.make_mesh(inner, AXES, axis_types=types, devices=part).devices for part in slices]
    return Mesh(np.concatenate(parts), AXES, axis_types=types)


def slices_of(devices: Sequence[Any]) -> list[list[Any]]:
    """Devices by slice, in the slices' order; those that know of no slice are one."""
    found: dict[int, list[Any]] = {}
    for device in devices:
        found.setdefault(getattr(device, 'slice_index', 0), []).append(device)
    return [found[index] for index in sorted(found)]


def _within_slice(asked: str, sizes: Sequence[int], slices: Sequence[Sequence[Any]]) -> list[int]:
    """Sizes of the mesh's axes inside one slice; raises `ShardingError`, see `make_mesh`."""
    count, counts = len(slices), sorted({len(part) for part in slices})
    if len(counts) > 1:
        raise ShardingError(f'{asked}: the {count} slices have {counts} devices; they must have '
                            'the same number')
    data, *rest = sizes
    if data % count:
        raise ShardingError(
            f'{asked}: data={data} does not divide by the {count} slices, and only data may '
            f'cross from one to another; set mesh.data to a multiple of {count}, fsdp x tensor to '
            f'a divisor of the {counts[0]} devices of a slice')
    return [data // count, *rest]


def spec_for(path: str, shape: tuple[int, ...], rules: Rules, mesh: Mesh) -> P:
    """PartitionSpec of one leaf; scalars are whole.

    Raises:
      ShardingError: no rule matches, or a sharded dimension does not divide (names the leaf).
    """
    if math.prod(shape) == 1:
        return P()
    rule = next((r for r in rules if re.search(r[0], path)), None)
    if rule is None:
        raise ShardingError(f'no sharding rule matches {path} {shape}')
    pattern, spec = rule
    if len(spec) > len(shape):
        raise ShardingError(f'rule {pattern!r} has {len(spec)} axes for {path} {shape}')
    full = (None,) * (len(shape) - len(spec)) + tuple(spec)
    for size, axis in zip(shape, full):
        if axis is not None and size % mesh.shape[axis]:
            raise ShardingError(f'{path} {shape}: {size} does not divide by mesh axis '
                                f'{axis}={mesh.shape[axis]} (rule {pattern!r})')
    return P(*full)


def shard_tree(tree: Any, rules: Rules, mesh: Mesh) -> Any:
    """Tree of `NamedSharding` for a tree of arrays or `ShapeDtypeStruct`s."""
    def one(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator='/')
        return NamedSharding(mesh, spec_for(name, tuple(leaf.shape), rules, mesh))
    return jax.tree_util.tree_map_with_path(one, tree)


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


def layout(tree: Any, shardings: Any) -> list[Row]:
    """A row for each leaf of a tree of arrays or `ShapeDtypeStruct`s, in the tree's order."""
    def row(path, leaf, sharding):
        name = jax.tree_util.keystr(path, simple=True, separator='/')
        shape, width = tuple(leaf.shape), leaf.dtype.itemsize
        memory = 'host' if sharding.memory_kind == 'pinned_host' else 'device'
        return Row(name, shape, leaf.dtype.name, sharding.spec, memory, math.prod(shape) * width,
                   math.prod(sharding.shard_shape(shape)) * width)
    return jax.tree.leaves(jax.tree_util.tree_map_with_path(row, tree, shardings))


def layout_table(rows: Sequence[Row]) -> str:
    """Rows of a layout in aligned columns, and their totals."""
    cells = [('parameter', 'shape', 'dtype', 'split over', 'bytes', 'per device')]
    cells += [(r.path, 'x'.join(map(str, r.shape)) or 'scalar', r.dtype, spec_words(r.spec),
               in_units(r.size), in_units(r.per_device)) for r in rows]
    cells.append((f'all {len(rows)}', '', '', '', in_units(sum(r.size for r in rows)),
                  in_units(sum(r.per_device for r in rows))))
    return aligned(cells, numbers=2)


def spec_words(spec: P) -> str:
    """``- fsdp tensor`` for ``P(None, 'fsdp', 'tensor')``; `whole` where nothing is split."""
    word = lambda axis: '-' if axis is None else axis if isinstance(axis, str) else '+'.join(axis)
    return ' '.join(map(word, spec)) if any(spec) else 'whole'


def in_units(size: int) -> str:
    """Bytes as B, KiB, MiB or GiB."""
    power = min(max(size.bit_length() - 1, 0) // 10, 3)
    return f'{size} B' if power == 0 else f'{size / 1024**power:.2f} {"KMG"[power - 1]}iB'


def aligned(cells: Sequence[Sequence[str]], numbers: int) -> str:
    """Lines of columns two spaces apart; the last `numbers` columns stand to the right."""
    widths = [max(map(len, column)) for column in zip(*cells)]
    left = len(widths) - numbers
    pad = lambda i, cell: cell.ljust(widths[i]) if i < left else cell.rjust(widths[i])
    return '\n'.join('  '.join(pad(i, c) for i, c in enumerate(line)).rstrip() for line in cells)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def in_host_memory(shardings: Any) -> Any:
    """The same layout, in the hosts' pinned memory; see `on_device`."""
    return jax.tree.map(lambda s: s.with_memory_kind('pinned_host'), shardings)


def on_device(tree: Any) -> Any:
    """Inside a jitted program: arrays from wherever they are to the device's own memory."""
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device), tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The batch axis is split over `data` and `fsdp`; other axes are whole."""
    return NamedSharding(mesh, BATCH)


def batch_ways(mesh: Mesh) -> int:
    """Into how many parts the mesh splits a batch."""
    return mesh.shape['data'] * mesh.shape['fsdp']


def check_batch(global_batch: int, mesh: Mesh, parts: int = 1) -> None:
    """Raises `ShardingError` if a batch does not split over the mesh in each of its parts.

    `parts` is student steps x accumulation: rows of every part must lie on every device, or
    each step would send them around.
    """
    ways = batch_ways(mesh)
    unit = ways * parts
    if global_batch % unit:
        raise ShardingError(
            f'data.global_batch {global_batch} does not divide by {unit}: {ways} ways the mesh '
            f'splits it (data x fsdp) times {parts} parts (student steps x accumulation); the '
            f'next that does is {-(-global_batch // unit) * unit}')


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """This process's rows of a batch -> global arrays, sharded on the batch axis."""
    sharding = batch_sharding(mesh)
    put = lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x))
    return jax.tree.map(put, batch)
