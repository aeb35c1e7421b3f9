"""Mesh axes and the rules that lay a pytree of parameters out over them.

One ordered list of (regex, spec) lays out student, critic, EMA, optimiser moments and
teacher alike: a rule is searched in a leaf's path, so that `.../mu/layers/attn/to_q/kernel`
follows `layers/attn/to_q/kernel`. A spec names mesh axes for a leaf's *last* dimensions;
stacked layers add dimensions in front, which stay whole. The two factors of a kernel's low-rank
adapter lie under its path and are split over the kernel's axes: A along its inputs, B along its
outputs.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

from ddmd_jax.util import errors
from ddmd_jax.util.errors import UserError
from ddmd_jax.util.text import first_line

AXES = ('data', 'fsdp', 'tensor')
BATCH = P(('data', 'fsdp'))
FACTORS = ('lora_A', 'lora_B')  # [..., in, rank] and [..., rank, out]; the rank is whole
Rules = Sequence[tuple[str, tuple[str | None, ...]]]


class ShardingError(UserError, ValueError):
    """A mesh that does not fit the devices, or a rule that does not fit a parameter."""


def all_devices() -> list[jax.Device]:
    """All devices of all processes: every command asks here first.

    Raises:
      EnvironmentFault: JAX cannot use those it is told to, or is told to compile nothing.
    """
    if jax.config.jax_disable_jit:  # type: ignore[attr-defined]
        raise errors.EnvironmentFault('JAX_DISABLE_JIT is set; unset it: steps and samplers are '
                                      'compiled before they run')
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as e:  # a platform without a plug-in: a bare assertion
        raise errors.environment(e) or errors.no_devices(first_line(e)) from e


def make_mesh(axes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Mesh over all devices; one axis may be -1, meaning whatever is left.

    Where the devices lie in several slices, `data` goes over the slow network between them: its
    outermost factor is the slice, so that fsdp and tensor, which talk most, stay inside one. Within
    one, an axis may take a part of the torus's: 16 of 8 x 8.

    Raises:
      ShardingError: unknown axes, sizes that are not positive, that do not multiply to the
        number of devices, or `data` does not divide by the number of slices.
    """
    devices = all_devices() if devices is None else devices
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
    slices = slices_of(devices)
    inner = sizes if len(slices) == 1 else _within_slice(asked, sizes, slices)
    # Not `jax.make_mesh`, which splits a torus's axis on v5e alone and refuses slices.
    parts = [mesh_utils.create_device_mesh(inner, part, allow_split_physical_axes=True)
             for part in slices]
    return Mesh(np.concatenate(parts), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def slices_of(devices: Sequence[Any]) -> list[list[Any]]:
    """Devices by slice, in the slices' order; those that know of no slice are one.

    So are GPUs: to JAX each of their hosts is a slice, but fsdp may well go from one to another.
    """
    found: dict[int, list[Any]] = {}
    for device in devices:
        own = 0 if device.platform == 'gpu' else getattr(device, 'slice_index', 0)
        found.setdefault(own, []).append(device)
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
    whose, _, name = path.rpartition('/')
    kernel = whose if name in FACTORS else path
    rule = next((r for r in rules if re.search(r[0], kernel)), None)
    if rule is None:
        raise ShardingError(f'no sharding rule matches {path} {shape}')
    pattern, spec = rule
    long, other = None, None  # a factor's long dimension, and the kernel's axis for the other one
    if name in FACTORS and spec:
        *taps, din, dout = spec
        long, other = (-2, dout) if name == FACTORS[0] else (-1, din)
        spec = (*taps, din, None) if name == FACTORS[0] else (dout,)
    if len(spec) > len(shape):
        raise ShardingError(f'rule {pattern!r} has {len(spec)} axes for {path} {shape}')
    full: tuple[Any, ...] = (None,) * (len(shape) - len(spec)) + tuple(spec)
    for size, axis in zip(shape, full):
        if axis is not None and size % mesh.shape[axis]:
            raise ShardingError(f'{path} {shape}: {size} does not divide by mesh axis '
                                f'{axis}={mesh.shape[axis]} (rule {pattern!r})')
    if long and other:  # over both axes, where that goes: a `tensor` of 1 would leave B whole
        axes = tuple(axis for axis in (full[long], other) if axis)
        if shape[long] % math.prod(mesh.shape[axis] for axis in axes) == 0:
            full = (*full[:long], axes, *full[len(full) + long + 1:])
    return P(*full)


def shard_tree(tree: Any, rules: Rules, mesh: Mesh) -> Any:
    """Tree of `NamedSharding` for a tree of arrays or `ShapeDtypeStruct`s."""
    def one(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator='/')
        return NamedSharding(mesh, spec_for(name, tuple(leaf.shape), rules, mesh))
    return jax.tree_util.tree_map_with_path(one, tree)


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

    `parts` are those of which each has rows on every device, or rows would be sent around:
    micro-batches, and the student's steps where a row is simulated up to its own.
    """
    ways = batch_ways(mesh)
    unit = ways * parts
    if global_batch % unit:
        raise ShardingError(
            f'data.global_batch {global_batch} does not divide by {unit}: {ways} ways the mesh '
            f'splits it (data x fsdp) times {parts} parts (student steps x accumulation); the '
            f'next that does is {-(-global_batch // unit) * unit}')


def rows_here(mesh: Mesh, rows: int) -> np.ndarray:
    """Places of a batch of `rows` that this process's devices hold, ascending.

    They need not lie side by side, as a torus is walked in a ring, nor be this process's alone, as
    `tensor` may go over several.
    """
    held = batch_sharding(mesh).addressable_devices_indices_map((rows,))
    return np.unique(np.concatenate([np.arange(rows)[index] for index in held.values() if index]))


def put_batch(batch: Any, mesh: Mesh, rows: int) -> Any:
    """`rows_here` of a batch of `rows` -> global arrays, sharded on the batch axis."""
    put = lambda x: jax.make_array_from_process_local_data(
        batch_sharding(mesh), x, (rows, *x.shape[1:]))
    return jax.tree.map(lambda x: put(np.asarray(x)), batch)
