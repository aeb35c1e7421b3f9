"""Layout rules as tables, and, in processes of their own, steps on eight devices and on one.

``python tests/test_sharding.py 2,2,2`` with eight host devices runs the second half by hand.
"""

import dataclasses
import math
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import AbstractMesh, PartitionSpec as P

from ddmd_jax.families.emoji import teacher as emoji
from ddmd_jax.parallel import sharding
from ddmd_jax.parallel.sharding import AXES, ShardingError, make_mesh, shard_tree, spec_for
from ddmd_jax.train import state as st

MESH = AbstractMesh((2, 2, 2), AXES)  # sizes are all that the rules look at
SHARED = ('student', 'critic', 'ema', 'student_opt', 'critic_opt')


# --- Rules ---


@pytest.mark.parametrize('path, shape, want', [
    # A matrix going in, the same one stacked over layers, and an optimiser's moments of it.
    ('time_1/kernel', (48, 32), P('fsdp', 'tensor')),
    ('layers/attn/to_q/kernel', (6, 32, 32), P(None, 'fsdp', 'tensor')),
    ('student_opt/1/0/mu/layers/attn/to_q/kernel', (6, 32, 32), P(None, 'fsdp', 'tensor')),
    # Coming out, the axes swap: the product needs one reduction, not two.
    ('layers/attn/to_out/kernel', (6, 32, 32), P(None, 'tensor', 'fsdp')),
    ('ema/layers/feed_forward/linear_2/kernel', (6, 128, 32), P(None, 'tensor', 'fsdp')),
    # A patch's few numbers stay together; only the hidden size is split.
    ('x_embedder/kernel', (48, 32), P(None, 'fsdp')),
    ('critic/out_proj/kernel', (32, 48), P('fsdp', None)),
    ('ema/x_embedder/kernel', (45, 32), P(None, 'fsdp')),  # patches of odd size are no error
    # Small things are whole.
    ('x_embedder/bias', (32,), P(None)),
    ('layers/norm1/weight', (6, 32), P(None, None)),
    ('step', (), P()),
    ('student_opt/1/0/count', (), P()),
])
def test_rules_of_the_emoji_teacher(path, shape, want):
    assert spec_for(path, shape, emoji.RULES, MESH) == want


def test_specs_are_aligned_to_the_right():
    """Stacked dimensions stand in front: aligned left, layers would be split instead."""
    rules = [('kernel', ('fsdp', None))]
    assert spec_for('kernel', (4, 6), rules, MESH) == P('fsdp', None)
    assert spec_for('kernel', (7, 5, 4, 6), rules, MESH) == P(None, None, 'fsdp', None)


def test_the_first_rule_wins():
    rules = [('special/kernel', (None, 'tensor')), ('kernel', ('fsdp', None))]
    assert spec_for('special/kernel', (4, 6), rules, MESH) == P(None, 'tensor')


@pytest.mark.parametrize('path, shape, words', [
    ('adapter/lora_a', (32, 4), r'no sharding rule matches adapter/lora_a \(32, 4\)'),
    ('x_embedder/kernel', (48, 33),
     r'x_embedder/kernel \(48, 33\): 33 does not divide by mesh axis fsdp=2'),
    ('layers/attn/to_q/kernel', (6, 32, 33), r'33 does not divide by mesh axis tensor=2'),
    ('x_embedder/kernel', (48,), r'2 axes for x_embedder/kernel \(48,\)'),
])
def test_errors_name_the_parameter(path, shape, words):
    with pytest.raises(ShardingError, match=words):
        spec_for(path, shape, emoji.RULES, MESH)


def abstract_state(params):
    tx = optax.adamw(1e-3)
    return jax.eval_shape(lambda p: st.fresh(p, tx, p, tx), params)


def named(path):
    return jax.tree_util.keystr(path)


def at_patches(path):
    """Whether a kernel is one of the two that have a patch's few numbers on one side."""
    return 'x_embedder' in named(path) or 'out_proj' in named(path)


def test_every_parameter_of_a_state_has_its_rule():
    """All five trees follow the one list, and no matrix among them is left whole."""
    params = jax.eval_shape(lambda: emoji.init_params(tiny.MODEL, jax.random.key(0)))
    state = abstract_state(params)
    layout = shard_tree(state, emoji.RULES, MESH)
    for name in SHARED:
        leaves = jax.tree_util.tree_leaves_with_path(getattr(layout, name))
        specs = {path: set(s.spec) for path, s in leaves if "'kernel'" in named(path)}
        copies = 2 if name.endswith('opt') else 1  # both of Adam's moments
        assert len(specs) == copies * 33
        for path, spec in specs.items():
            assert ({'fsdp'} if at_patches(path) else {'fsdp', 'tensor'}) <= spec, path


def test_a_whole_tree_is_checked():
    with pytest.raises(ShardingError, match='critic/layers/odd'):
        shard_tree({'critic': {'layers': {'odd': jnp.zeros((2, 2))}}}, emoji.RULES, MESH)


# --- Meshes ---

EIGHT = [None] * 8  # errors come before any device is looked at


@pytest.mark.parametrize('axes', [
    {'data': 3}, {'data': 4}, {'data': 4, 'fsdp': 4}, {'data': -1, 'fsdp': 3}], ids=str)
def test_meshes_that_do_not_fit_are_refused(axes):
    with pytest.raises(ShardingError, match='does not fit 8 devices'):
        make_mesh(axes, EIGHT)


@pytest.mark.parametrize('axes', [
    {'data': -1, 'fsdp': -1, 'tensor': 8},  # whose product is 8
    {'data': -2, 'fsdp': -4},
    {'data': 0, 'fsdp': -1},
    {'data': 8, 'expert': 2},  # an axis that no rule can name
], ids=str)
def test_nonsense_is_refused_in_words(axes):
    with pytest.raises(ShardingError):
        make_mesh(axes, EIGHT)


def test_one_device_needs_no_sizes():
    mesh = make_mesh({}, jax.devices()[:1])
    assert mesh.axis_names == AXES and set(mesh.shape.values()) == {1}
    assert make_mesh({'data': -1}, jax.devices()[:1]).shape == mesh.shape


@dataclasses.dataclass(frozen=True)
class Chip:
    """As much of a device as laying out a mesh looks at."""

    id: int
    slice_index: int = 0
    platform: str = 'fake'
    device_kind: str = 'fake'
    process_index: int = 0
    coords: tuple[int, ...] = ()
    core_on_chip: int = 0


def chips(*per_slice):
    """Chips of slices of these sizes, dealt out in turns: no order may be relied on."""
    of = [i for i, count in enumerate(per_slice) for _ in range(count)]
    return [Chip(i, of[i]) for i in sorted(range(len(of)), key=lambda i: (i * 5) % 7)]


def slices_at(mesh):
    """The slice of every place in a mesh."""
    return np.vectorize(lambda chip: chip.slice_index)(mesh.devices)


@pytest.mark.parametrize('axes, want', [
    ({'data': 2, 'fsdp': 2, 'tensor': 2}, [0, 1]),
    ({'data': 4, 'tensor': 2}, [0, 0, 1, 1]),  # the slice is the outer factor
    ({'data': -1, 'fsdp': 2}, [0, 0, 1, 1]),
    ({'data': 8}, [0, 0, 0, 0, 1, 1, 1, 1]),
    ({'data': 2, 'fsdp': -1}, [0, 1]),
], ids=str)
def test_only_data_goes_from_slice_to_slice(axes, want):
    mesh = make_mesh(axes, chips(4, 4))
    assert mesh.axis_names == AXES and len({chip.id for chip in mesh.devices.flat}) == 8
    found = slices_at(mesh).reshape(mesh.shape['data'], -1)
    assert [set(row) for row in found] == [{i} for i in want]


def test_a_single_slice_is_laid_out_as_if_it_were_none():
    one = [Chip(i, 3) for i in range(8)]
    mesh = make_mesh({'data': 1, 'fsdp': -1}, one)
    assert [*mesh.devices.flat] == one and mesh.shape['fsdp'] == 8


def test_fsdp_goes_from_one_host_of_gpus_to_another():
    """To JAX a host of GPUs is a slice; data still comes first."""
    gpus = [dataclasses.replace(chip, id=8 * chip.slice_index + i, platform='gpu')
            for i, chip in enumerate(sorted(chips(4, 4), key=lambda chip: chip.slice_index))]
    mesh = make_mesh({'fsdp': -1}, gpus)
    assert [*mesh.devices.flat] == gpus and mesh.shape['fsdp'] == 8
    assert [set(row.flat) for row in slices_at(make_mesh({'data': 2, 'fsdp': 4}, gpus))] == [
        {0}, {1}]


@pytest.mark.parametrize('torus', [(8, 8), (4, 8), (4, 4, 4)], ids=str)
@pytest.mark.parametrize('fsdp', [8, 16, 32])
def test_an_axis_may_take_a_part_of_a_toruss(torus, fsdp):
    kind = 'TPU v6 lite' if len(torus) == 2 else 'TPU v5'
    tpus = [Chip(i, 0, 'tpu', kind, i // 4, (*at, 0)[:3])
            for i, at in enumerate(np.ndindex(*torus))]
    mesh = make_mesh({'data': -1, 'fsdp': fsdp}, tpus)
    assert mesh.shape['fsdp'] == fsdp
    assert {chip.id for chip in mesh.devices.flat} == {chip.id for chip in tpus}


@pytest.mark.parametrize('axes, per_slice, words', [
    ({'fsdp': -1}, (4, 4), 'data=1 does not divide by the 2 slices.*mesh.data to a multiple of 2'),
    ({'data': -1, 'fsdp': 3}, (4, 4, 4), 'data=4 does .* 3 slices.*divisor of the 4 devices'),
    ({'data': 2, 'fsdp': 4}, (2, 6), r'slices have \[2, 6\] devices'),
], ids=str)
def test_a_mesh_that_slices_would_cut_is_refused_in_one_line(axes, per_slice, words):
    with pytest.raises(ShardingError, match=words) as e:
        make_mesh(axes, chips(*per_slice))
    assert len(str(e.value).splitlines()) == 1


def test_batches_split_over_data_and_fsdp():
    """Not over tensor, whose devices share their rows; and each part of a batch splits anew."""
    sharding.check_batch(8, MESH)
    sharding.check_batch(16, MESH, parts=4)
    with pytest.raises(ShardingError, match='data.global_batch 6 .*next that does is 8$'):
        sharding.check_batch(6, MESH)
    with pytest.raises(ShardingError, match='data.global_batch 24 .*next that does is 32$'):
        sharding.check_batch(24, MESH, parts=4)


# --- Eight devices (DESIGN: tests 7 and 8) ---


def test_eight_devices_do_what_one_does():
    assert 'all checks passed' in tiny.run_on_devices(__file__, 8, '2,2,2')


@pytest.mark.slow
def test_so_they_do_where_parameters_alone_are_split():
    assert 'all checks passed' in tiny.run_on_devices(__file__, 8, '1,8,1')


def check_shards(tree, name, mesh):
    """Matrices are split fsdp x tensor ways, and so most of a device's bytes are gone.

    The two at the patches are split over fsdp alone: both are small.
    """
    fsdp, ways = mesh.shape['fsdp'], mesh.shape['fsdp'] * mesh.shape['tensor']
    held = total = kernels = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        assert len(leaf.addressable_shards) == mesh.size
        (size,) = {shard.data.size for shard in leaf.addressable_shards}
        held, total = held + size, total + leaf.size
        if "'kernel'" in named(path):
            kernels += 1
            assert (fsdp if at_patches(path) else ways) * size == leaf.size, (name, path)
    assert kernels == 29 * (2 if name.endswith('opt') else 1), (name, kernels)
    assert held < (1 / ways + 0.05) * total, (name, held, total)


def check_state(state, mesh):
    for name in SHARED:
        check_shards(getattr(state, name), name, mesh)


def check_batch(mesh):
    """Rows are split over data and fsdp, and every device of a tensor group has the same."""
    batch = sharding.put_batch({'x': np.arange(8.0)}, mesh, 8)['x']
    rows = 8 // (mesh.shape['data'] * mesh.shape['fsdp'])
    at = {shard.device: np.asarray(shard.data) for shard in batch.addressable_shards}
    for i, group in enumerate(mesh.devices.reshape(-1, mesh.shape['tensor'])):
        for device in group:
            np.testing.assert_array_equal(at[device], np.arange(i * rows, (i + 1) * rows))


def moved(new, old):
    """How steps moved each leaf, on the host."""
    return jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), new, old)


def check_close(one, eight):
    """What moved, moved alike: next to the parameters themselves, any move is small.

    To a thousandth, or, where a parameter's move is that small, two roundings of a parameter
    around 1. Moments start at zero and have no such excuse.
    """
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(eight),
                            strict=True):
        error, size = np.abs(a - b).max(), np.abs(a).max()
        rounding = 0.0 if '_opt' in named(path) else 2.5e-7
        still = named(path) in ('.alpha_share', '.critic_extra')  # health alone moves them
        assert (size > 0) != still and error <= 1e-3 * size + rounding, (named(path), error, size)


def check_metrics(one, eight):
    for a, b in zip(one, eight, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_allclose(b[name], a[name], rtol=2e-4, atol=1e-6, err_msg=name)


class Counted:
    """A network that counts how often it is traced."""

    def __init__(self, predict):
        self.predict, self.traces = predict, 0

    def __call__(self, *args):
        self.traces += 1
        return self.predict(*args)


class Run:
    """A toy run on a mesh: its programs, and all that they need, on the devices."""

    def __init__(self, params, mesh):
        # Clipped AdamW, so that there are a global norm and two moments; a large eps, as it
        # would else blow up rounding where |g| is 0.
        tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, b2=0.95, eps=1e-2))
        self.mesh, self.predict = mesh, Counted(emoji.make_denoiser(tiny.MODEL))
        spec, self.program, self.frozen = tiny.build_run(self.predict, params, tx, mesh)
        self.batch, self.state = sharding.put_batch(tiny.make_batch(8), mesh, 8), spec.create()

    def lower(self):
        return [update.lower(self.frozen, self.state, self.batch)
                for update in (self.program.critic, self.program.generator)]

    def two_rounds(self):
        """(what two rounds of critic and generator moved, metrics of the four steps).

        Nothing is sent to a device meanwhile, and nothing is traced or compiled again.
        """
        start, metrics, traced = jax.tree.map(np.array, self.state), [], self.predict.traces
        self.check()
        with jax.transfer_guard('disallow'):
            for _ in range(2):
                for update in (self.program.critic, self.program.generator):
                    self.state, found, *_ = update(self.frozen, self.state, self.batch)
                    metrics.append(found)
        self.check()  # steps must hand back what they were given
        assert self.predict.traces == traced > 0
        critic, generator = self.program.critic, self.program.generator
        assert [update._cache_size() for update in (critic, generator)] == [1, 1]
        return moved(self.state, start), jax.device_get(metrics)

    def check(self):
        if self.mesh.size > 1:
            check_state(self.state, self.mesh)
            check_shards(self.frozen.teacher, 'teacher', self.mesh)

    def check_guard(self):
        """The guard above is awake: a batch that is still on the host does not get past it."""
        host = jax.device_get(self.batch)
        with (jax.transfer_guard('disallow'),
              pytest.raises(Exception, match='Disallowed host-to-device transfer')):
            self.program.critic(self.frozen, self.state, host)


def main(*meshes):
    """What the subprocesses run; a mesh is its three sizes."""
    params = tiny.make_params()
    runs = [Run(params, make_mesh({}, jax.devices()[:1]))]
    for sizes in meshes:
        sizes = [int(x) for x in sizes.split(',')]
        assert math.prod(sizes) == 8
        mesh = make_mesh(dict(zip(AXES, [-1, *sizes[1:]])))
        assert [*mesh.shape.values()] == sizes
        check_batch(mesh)
        runs.append(Run(params, mesh))
    with ThreadPoolExecutor(2) as pool:  # compiling is what takes the time
        [*pool.map(lambda low: low.compile(), [low for run in runs for low in run.lower()])]
    moves, metrics = runs[0].two_rounds()
    for run in runs[1:]:
        found = run.two_rounds()
        check_close(moves, found[0])
        check_metrics(metrics, found[1])
        run.check_guard()
    print('all checks passed')


if __name__ == '__main__':
    jax.config.update('jax_default_matmul_precision', 'highest')
    main(*sys.argv[1:])
