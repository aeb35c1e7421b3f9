"""Layout rules as tables, and, in a process of its own, one step on eight devices and on one.

``python tests/test_sharding.py`` with eight host devices runs the second half by hand.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import AbstractMesh, PartitionSpec as P

from ddmd_jax import sharding
from ddmd_jax.sharding import AXES, ShardingError, make_mesh, shard_tree, spec_for
from ddmd_jax.teachers import emoji
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
    out = tiny.run_on_devices(__file__, 8)
    assert 'all checks passed' in out


def check_shards(tree, name):
    """Matrices are split four ways (fsdp x tensor), and so most of a device's bytes are gone.

    The two at the patches are split over fsdp alone: both are small.
    """
    held = total = kernels = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        assert len(leaf.addressable_shards) == 8
        shard = leaf.addressable_shards[0].data
        held, total = held + shard.size, total + leaf.size
        if "'kernel'" in named(path):
            kernels += 1
            assert (2 if at_patches(path) else 4) * shard.size == leaf.size, (name, path)
    assert kernels == 29, (name, kernels)
    assert held < 0.3 * total, (name, held, total)


def check_state(state):
    for name in SHARED:
        check_shards(getattr(state, name), name)


def check_batch(mesh):
    """Rows are split over data and fsdp, and every device of a tensor pair has the same."""
    batch = sharding.put_batch({'x': np.arange(8.0)}, mesh)['x']
    assert {s.data.shape for s in batch.addressable_shards} == {(2,)}
    np.testing.assert_array_equal(batch, np.arange(8.0))


def moved(new, old):
    """How a step moved each leaf, on the host."""
    return jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), new, old)


def check_close(one, eight):
    """Parameters' *moves* agree: next to the parameters themselves, any move is small.

    To a thousandth, or two roundings of a parameter around 1 where a move is that small.
    """
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(eight),
                            strict=True):
        error, size = np.abs(a - b).max(), np.abs(a).max()
        assert size > 0 and error < 1e-3 * size + 2.5e-7, (jax.tree_util.keystr(path), error, size)


def check_metrics(one, eight):
    for name, value in one.items():
        np.testing.assert_allclose(eight[name], value, rtol=2e-4, atol=1e-6, err_msg=name)


def take_steps(predict, params, mesh):
    """A critic's and a generator's step of SGD: what each moved, and both metrics."""
    # Momentum, so that there is an optimiser state; Adam would blow up rounding where |g| is 0.
    make, steps, frozen = tiny.build_run(predict, params, optax.sgd(0.1, momentum=0.9), mesh)
    cond = sharding.put_batch(tiny.make_cond(8), mesh)
    state = make()
    if mesh.size == 8:
        check_state(state)
        check_shards(frozen['teacher'], 'teacher')
    start = jax.tree.map(np.array, state)
    state, critic_metrics = steps.critic(state, cond)
    state, metrics = steps.generator(state, frozen, cond)
    if mesh.size == 8:
        check_state(state)  # a step must hand back what it was given
    moves = {name: moved(getattr(state, name), getattr(start, name)) for name in SHARED[:3]}
    return moves, jax.device_get(metrics), jax.device_get(critic_metrics)


def main():
    """What the subprocess runs."""
    mesh = make_mesh({'data': -1, 'fsdp': 2, 'tensor': 2})
    assert dict(mesh.shape) == {'data': 2, 'fsdp': 2, 'tensor': 2}
    check_batch(mesh)
    predict, params = emoji.make_denoiser(tiny.MODEL), tiny.make_params()
    with jax.default_matmul_precision('highest'):
        one = take_steps(predict, params, make_mesh({}, jax.devices()[:1]))
        eight = take_steps(predict, params, mesh)
    check_close(one[0], eight[0])
    check_metrics(one[1], eight[1])
    check_metrics(one[2], eight[2])
    print('all checks passed')


if __name__ == '__main__':
    main()
