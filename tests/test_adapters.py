"""LoRA: adapters over one copy of the teacher's weights, in networks, updates, runs and files.

``python tests/test_adapters.py`` on eight devices runs the part about shards by hand.
"""

import dataclasses
import functools
import json
import math
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small
import tiny
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec as P
from saved import save

from ddmd_jax import config as config_lib, families
from ddmd_jax.config.fields import OPTIMISER
from ddmd_jax.export import student as students, write as export
from ddmd_jax.families.base import kernels_in
from ddmd_jax.families.emoji import teacher as emoji
from ddmd_jax.families.lumina import names as lumina
from ddmd_jax.families.sdxl import export as sdxl_export, names as sdxl
from ddmd_jax.models import adapters
from ddmd_jax.models.adapters import AdapterError, Full, LoRA
from ddmd_jax.models.convolution import conv
from ddmd_jax.models.layers import Linear, abstract_params, scan_layers, stack_layers
from ddmd_jax.models.unet import UNet, UNetConfig
from ddmd_jax.parallel import sharding
from ddmd_jax.parallel.sharding import AXES, spec_for
from ddmd_jax.planner import command, programs
from ddmd_jax.train import optim, train
from ddmd_jax.train.durable import checkpoint as ckpt, resume
from ddmd_jax.train.durable.checkpoint import CheckpointError
from ddmd_jax.train.update import Mechanics, Updates
from ddmd_jax.weights import flat, lora
from ddmd_jax.weights.flat import WeightsError

MESH = AbstractMesh((2, 2, 2), AXES)
TARGETS = ('(to_q|to_k|to_v|to_out)$', '(feed_forward|ff)/')
BLOCKS = LoRA(4, 2.0, TARGETS)
SMALL = LoRA(2, 1.0, ('x_embedder',))  # of `tiny.small_network`
NAMES = lora.Names('transformer', lumina.transformer)


def stirred(tree, seed=0):
    """A tree of adapters as training leaves it: nothing is zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(0.2 * rng.standard_normal(x.shape), x.dtype), tree)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


# --- Which kernels ---


@pytest.mark.parametrize(('targets', 'want'), [
    (('to_q$',), {'to_q'}),
    (('-to_q$', 'to_'), {'to_k', 'to_v', 'to_out'}),
    (('to_q$', '-attn/', 'linear_'), {'to_q', 'linear_1', 'linear_2', 'linear_3'}),
    (TARGETS, {'to_q', 'to_k', 'to_v', 'to_out', 'linear_1', 'linear_2', 'linear_3'}),
])
def test_the_first_target_found_decides(params, targets, want):
    found = LoRA(2, 1.0, targets).kernels(params[0])
    assert {path.split('/')[-2] for path in found} == want


@pytest.mark.parametrize(('rank', 'targets', 'words'), [
    (2, ('to_q$', 'to_w$'), "'to_w\\$' matches no module.*end in .*to_q, to_v"),
    (2, ('-to_q',), 'leave out every module'),
    (17, TARGETS, 'rank 17 is above 16, the rank of .*to_k'),
])
def test_adapters_that_do_not_fit_are_one_line(params, rank, targets, words):
    with pytest.raises(AdapterError, match=words) as e:
        LoRA(rank, 1.0, targets).kernels(params[0])
    assert len(str(e.value).splitlines()) == 1


@pytest.mark.parametrize(('field', 'value', 'words'), [
    ('student.adapter.kind', 'lore', "did you mean 'lora'"),
    ('student.adapter.rank', 0, 'at least 1'),
    ('critic.adapter.alpha', 0.0, 'above 0'),
    ('critic.adapter.targets', (), 'one or more regular expressions'),
    ('critic.adapter.targets', ('to_(q',), 'unterminated subpattern'),
])
def test_a_wrong_section_is_one_line(field, value, words):
    config = tiny.load_config('emoji')
    config.update_from_flattened_dict({field: value})
    [line] = config_lib.validate(config)
    assert line.startswith(field) and words in line


def test_a_critic_is_merged_only_with_its_own_kind():
    config = tiny.load_config('emoji')
    config.critic.merge, config.student.adapter.kind = 0.9, 'lora'
    assert 'differ' in config_lib.validate(config)[0]
    config.critic.adapter.kind = 'lora'
    assert config_lib.validate(config) == []


def test_adapters_that_are_merged_begin_as_one():
    """The mean of two products is that of their factors only where one factor is the same."""
    fields = {'critic.adapter.rank': 2}
    for merge, alike in ((0.9, True), (1.0, False)):
        task = small.task_of(lora_config(**fields, **{'critic.merge': merge}))
        state = task.spec.create()
        first = jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()),
                                             state.student, state.critic))
        assert all(first) == alike


def test_a_section_is_a_binding():
    assert adapters.from_section(None) == Full()
    section = {'kind': 'lora', 'rank': 8, 'alpha': None, 'targets': {'1': 'b', '0': 'a'}}
    assert adapters.from_section(section) == LoRA(8, 1.0, ('a', 'b'))
    assert adapters.from_section(section | {'alpha': 4.0}) == LoRA(8, 0.5, ('a', 'b'))
    assert adapters.from_section(section | {'kind': 'full'}) == Full()


def test_manifests_say_nothing_of_adapters_where_all_is_trained():
    """So that checkpoints from before there were any can be gone on from."""
    config = tiny.load_config('emoji')
    assert not any('adapter' in name for name in ckpt.comparable(config.to_dict()))
    config.student.adapter.update({'kind': 'lora', 'rank': 8})
    manifest = ckpt.comparable(config.to_dict())
    assert not any(name.startswith('critic.adapter') for name in manifest)
    assert students.binding_of(manifest) == LoRA(8, 1.0, TARGETS)


# --- Networks ---


@pytest.fixture
def optimised():
    """Programs as users have them: bits of those that tests have depend on what is fused."""
    name = 'jax_disable_most_optimizations'
    jax.config.update(name, False)
    yield
    jax.config.update(name, os.environ[name.upper()] == '1')  # conftest.py sets it


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_fresh_student_is_its_teacher_and_a_merged_one_itself(optimised, params, dtype):
    """Bit for bit the first, of a base in either type; within rounding the second."""
    base = kernels_in(params[0], dtype)
    denoise = jax.jit(emoji.make_denoiser(
        tiny.MODEL | {'denoiser': tiny.MODEL['denoiser'] | {'dtype': dtype}}))
    x = jax.random.normal(jax.random.key(1), (2, *tiny.SHAPE))
    draw = lambda p: np.asarray(denoise(p, x, jnp.full(2, 0.4), tiny.make_cond(2)))
    trained = BLOCKS.init(base, jax.random.key(0))
    assert not any(np.any(leaf) for name, leaf in flat.flatten(trained).items() if 'lora_B' in name)
    teacher = draw(base)
    np.testing.assert_array_equal(draw(BLOCKS.bind(base, trained)), teacher)

    bound = BLOCKS.bind(base, stirred(trained))
    got, want = draw(bound), draw(kernels_in(adapters.materialised(bound), dtype))
    size = np.sqrt(np.mean(want**2))
    assert np.abs(want - teacher).max() > 0.1 * size
    assert np.abs(got - want).max() <= (1e-5 if dtype == 'float32' else 1e-2) * size


def test_a_starts_as_pefts_does(params):
    """Kaiming's uniform with a = sqrt(5): within 1 / sqrt(inputs), and all the way there."""
    for name, leaf in flat.flatten(BLOCKS.init(params[0], jax.random.key(0))).items():
        if name.endswith('lora_A'):
            bound = leaf.shape[-2] ** -0.5
            assert 0.9 * bound < np.abs(leaf).max() <= bound


class Toy(nnx.Module):
    """A convolution and a stack of matrices."""

    def __init__(self, rngs):
        cfg = UNetConfig(dtype='float64')
        self.conv_in = conv(cfg, 3, 6, rngs)
        self.layers = stack_layers(lambda r: Linear(
            6, 6, fold=True, rngs=r, dtype=jnp.float64, param_dtype=jnp.float64), 3, rngs)

    def __call__(self, x, remat):
        run = lambda y: scan_layers(self.layers, y, remat=remat)
        return run(jnp.tanh(self.conv_in(x)))


@pytest.mark.parametrize('remat', ['none', 'dots', 'full'])
def test_gradients_are_those_of_the_materialised_kernel(remat):
    """In float64: dA = scale dW B^T and dB = scale A^T dW, of convolutions tap by tap."""
    with jax.enable_x64(True):
        model = Toy(nnx.Rngs(0))
        graph, params = nnx.split(model)
        base = jax.tree.map(lambda x: x.astype(jnp.float64),
                            flat.unflatten(flat.flatten(nnx.to_pure_dict(params))))
        binding = LoRA(2, 1.5, ('conv_in', 'layers'))
        trained = stirred(jax.tree.map(lambda x: x.astype(jnp.float64), binding.init(
            base, jax.random.key(0))))
        x = jax.random.normal(jax.random.key(1), (2, 5, 4, 3), jnp.float64)

        def loss(full):
            state = jax.tree.map(lambda v: v, params)
            nnx.replace_by_pure_dict(state, full)
            return jnp.sum(jnp.sin(nnx.merge(graph, state)(x, remat)))

        bound = binding.bind(base, trained)
        got = flat.flatten(jax.jit(jax.grad(lambda t: loss(binding.bind(base, t))))(trained))
        whole = flat.flatten(jax.jit(jax.grad(loss))(adapters.materialised(bound)))
        factors = flat.flatten(trained)
        for path in ('conv_in/kernel', 'layers/kernel'):
            a, b, dw = factors[f'{path}/lora_A'], factors[f'{path}/lora_B'], whole[path]
            assert dw.dtype == jnp.float64 and np.abs(dw).max() > 0.1
            db = jnp.swapaxes(a, -1, -2) @ dw
            db = db.sum((0, 1), keepdims=True) if path.startswith('conv') else db
            want = {'lora_A': dw @ jnp.swapaxes(b, -1, -2), 'lora_B': db}
            for name, value in want.items():
                np.testing.assert_allclose(got[f'{path}/{name}'], 1.5 * value, rtol=1e-10,
                                           atol=1e-12)


def test_a_linear_layers_gradient_is_of_its_factors_alone():
    """Two products as large as the kernel's own, forward and for x; a third would be of the sum."""
    wide, rows, rank = 128, 64, 4
    graphdef, state = nnx.split(Linear(wide, wide, use_bias=False, rngs=nnx.Rngs(0)))
    base = state['kernel'].get_value()
    a, b = stirred((jnp.ones((wide, rank)), jnp.ones((rank, wide))))

    def loss(kernel, x):
        given = jax.tree.map(lambda leaf: leaf, state)
        nnx.replace_by_pure_dict(given, {'kernel': kernel})
        return jnp.sum(jnp.sin(nnx.merge(graphdef, given)(x)))

    apart = lambda a, b, x: loss(adapters.Adapted(base, a, b, 2.0), x)
    summed = lambda a, b, x: loss(base + 2.0 * (a @ b), x)
    x = jnp.linspace(-1, 1, rows * wide).reshape(rows, wide)
    grads = [jax.jit(jax.grad(of, (0, 1, 2))) for of in (apart, summed)]
    for got, want in zip(*(grad(a, b, x) for grad in grads)):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)
    product = 2 * rows * wide * wide
    flops = [grad.lower(a, b, x).compile().cost_analysis()['flops'] for grad in grads]
    assert flops[0] < 2.5 * product and flops[1] > 3 * product


def test_convolutions_and_matrices_of_a_unet_are_adapted():
    cfg = UNetConfig(**{k: v for k, v in UNET.items()})
    shapes = abstract_params(lambda: UNet(cfg, nnx.Rngs(0)))
    binding = LoRA(2, 1.0, ('conv', '(proj_in|proj_out|time_emb_proj)$', *TARGETS))
    trained = flat.flatten(jax.eval_shape(lambda b: binding.init(b, jax.random.key(0)), shapes))
    kernel = 'down_blocks/0/resnets/0/conv1/kernel'
    assert trained[f'{kernel}/lora_A'].shape == (3, 3, 8, 2)
    assert trained[f'{kernel}/lora_B'].shape == (1, 1, 2, 8)
    kernel = 'mid_block/attentions/0/transformer_blocks/attn2/to_k/kernel'
    assert trained[f'{kernel}/lora_A'].shape == (1, 12, 2)
    assert trained[f'{kernel}/lora_B'].shape == (1, 2, 8)
    layout = sharding.shard_tree(flat.unflatten(trained), sdxl_export.sdxl.RULES, MESH)
    assert all(jax.tree.leaves(layout))


UNET = {'block_out_channels': (8,), 'down_block_types': ('CrossAttnDownBlock2D',),
        'up_block_types': ('CrossAttnUpBlock2D',), 'layers_per_block': 1,
        'transformer_layers_per_block': (1,), 'attention_head_dim': (2,),
        'cross_attention_dim': 12, 'addition_time_embed_dim': 8,
        'projection_class_embeddings_input_dim': 20 + 6 * 8, 'norm_num_groups': 4}


# --- Layout ---


@pytest.mark.parametrize(('path', 'shape', 'want'), [
    ('layers/attn/to_q/kernel/lora_A', (6, 32, 4), P(None, ('fsdp', 'tensor'), None)),
    ('layers/attn/to_q/kernel/lora_B', (6, 4, 32), P(None, None, ('tensor', 'fsdp'))),
    ('student_opt/1/0/mu/layers/attn/to_out/kernel/lora_A', (6, 32, 4),
     P(None, ('tensor', 'fsdp'), None)),
    ('ema/layers/attn/to_out/kernel/lora_B', (6, 4, 32), P(None, None, ('fsdp', 'tensor'))),
    ('layers/attn/to_q/kernel/lora_B', (6, 4, 34), P(None, None, 'tensor')),  # not by 4
    ('x_embedder/kernel/lora_A', (45, 4), P(None, None)),
    ('x_embedder/kernel/lora_B', (3, 32), P(None, 'fsdp')),
])
def test_factors_are_split_over_their_kernels_axes(path, shape, want):
    assert spec_for(path, shape, emoji.RULES, MESH) == want


def test_a_convolutions_factors_are_split_by_their_channels():
    rules = sdxl_export.sdxl.RULES
    spec = lambda name, shape: spec_for(f'down/conv1/kernel/{name}', shape, rules, MESH)
    assert spec('lora_A', (3, 3, 8, 2)) == P(None, None, ('fsdp', 'tensor'), None)
    assert spec('lora_B', (1, 1, 2, 8)) == P(None, None, None, ('tensor', 'fsdp'))


def test_a_chip_has_its_share_of_every_factor_whatever_the_axes():
    """With one axis alone, too: a factor that only the other one split lay whole on each chip."""
    base = jax.eval_shape(lambda: tiny.make_params()[0])
    trained = jax.eval_shape(lambda: BLOCKS.init(base, jax.random.key(0)))
    for axes in ({'fsdp': 4}, {'tensor': 4}, {'fsdp': 2, 'tensor': 2}):
        mesh = AbstractMesh(tuple(axes.get(a, 1) for a in sharding.AXES), sharding.AXES)
        laid = sharding.shard_tree(trained, emoji.RULES, mesh)
        for leaf, layout in zip(jax.tree.leaves(trained), jax.tree.leaves(laid), strict=True):
            assert math.prod(layout.shard_shape(leaf.shape)) * 4 == math.prod(leaf.shape)


def test_weight_decay_is_for_matrices_and_factors_alone():
    tx = optim.make_optimizer({field.path: field.default for field in OPTIMISER} | {
        'name': 'adamw', 'lr': 1.0, 'weight_decay': 0.1, 'warmup': 0, 'decay': 0.0}, 10)
    params = {'a': {name: jnp.ones((2, 3, 3)) for name in ('kernel', 'lora_A', 'lora_B')},
              'b': {'bias': jnp.ones((2, 3)), 'weight': jnp.ones((2, 3)),
                    'embedding': jnp.ones((5, 3))}}
    moved, _ = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    for leaf in jax.tree.leaves(moved['a']):
        np.testing.assert_allclose(leaf, -0.1, rtol=1e-6)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(moved['b']))


@pytest.mark.slow
def test_eight_devices_have_shards_and_the_same_gradients():
    found = json.loads(tiny.run_on_devices(__file__).splitlines()[-1])
    assert found == {'shard': [1, 8, 4], 'shards': 8, 'whole': [1, 32, 4], 'error': found['error']}
    assert found['error'] < 1e-5


def on_devices():
    """Gradients of the adapters of a tiny NextDiT over eight devices and on one."""
    base = tiny.make_params()[0]
    trained = stirred(BLOCKS.init(base, jax.random.key(0)))
    cond, x = tiny.make_cond(8), jax.random.normal(jax.random.key(1), (8, *tiny.SHAPE))

    def grads(mesh):
        predict = emoji.lumina.make_denoiser(emoji.model_configs(tiny.MODEL)[0], mesh)
        loss = lambda t, base, x, cond: jnp.mean(jnp.square(predict(
            BLOCKS.bind(base, t), x, jnp.full(8, 0.4), cond)))
        lay_out = lambda tree: sharding.shard_tree(tree, emoji.RULES, mesh)
        put = lambda tree: jax.device_put(tree, lay_out(tree))
        rows = jax.device_put((x, cond), sharding.batch_sharding(mesh))
        return put(trained), jax.jit(jax.grad(loss), out_shardings=lay_out(trained))(
            put(trained), put(base), *rows)

    laid, many = grads(sharding.make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2}))
    _, one = grads(sharding.make_mesh({}, jax.devices()[:1]))
    factor = laid['layers']['attn']['to_q']['kernel']['lora_A']
    errors = jax.tree.map(lambda a, b: float(np.abs(a - b).max() / np.abs(b).max()),
                          *map(jax.device_get, (many, one)))
    print(json.dumps({'shard': factor.addressable_shards[0].data.shape,
                      'shards': len(factor.addressable_shards), 'whole': factor.shape,
                      'error': max(jax.tree.leaves(errors))}))


@pytest.mark.slow
@pytest.mark.parametrize('family', families.NAMES)
def test_adapters_take_three_tenths_of_the_memory_at_most(family):
    """Of what stays between the steps, text side and decoder too, by the planner."""
    mesh = sharding.make_mesh({}, jax.devices()[:1])

    def resident(kind):
        config = tiny.load_config('emoji' if family == 'emoji' else 'zimage')
        config.teacher.name = family
        config.student.adapter.kind = config.critic.adapter.kind = kind
        return programs.programs(config, *command.parts_for(config, mesh))[1]

    full, low = resident('full'), resident('lora')
    print(f'{family}: {full / 2**30:.4f} GiB, {low / 2**30:.4f} GiB, {low / full:.3f}')
    assert low <= 0.30 * full


# --- Updates and runs, of a network of one matrix ---


@pytest.mark.parametrize(('student', 'critic'), [
    (SMALL, SMALL), (SMALL, Full()), (Full(), SMALL)])
@pytest.mark.parametrize(('offload', 'gan', 'accumulate'), [
    ((), False, 1), (('ema', 'teacher'), True, 2)])
def test_updates_move_the_adapters_alone(student, critic, offload, gan, accumulate):
    base = tiny.small_params()[0]
    keys = jax.random.split(jax.random.key(0))
    params = base, student.init(base, keys[0]), critic.init(base, keys[1])
    recipe, extra = tiny.make_recipe(), None
    if gan:
        made = tiny.make_gan(tiny.small_tokens, base, r1=0.1)
        recipe = tiny.make_recipe(regularisers={'gan': made})
        extra = {'gan': made.init(jax.random.key(3))}
    spec, program, frozen = tiny.build_run(
        tiny.small_network, params, optax.adam(1e-2), sharding.make_mesh({}, jax.devices()[:1]),
        offload, recipe, extra, student=student, critic=critic, accumulate=accumulate)
    state = spec.create()
    assert jax.tree.structure(state.student) == jax.tree.structure(params[1])
    batch = tiny.make_batch(4, real=jax.random.normal(jax.random.key(5), (4, *tiny.SHAPE)))
    before = jax.device_get(state)
    for _ in range(2):  # A moves once B is no longer zero
        state, metrics = program.critic(frozen, state, batch)
        assert bool(metrics['finite']) and float(metrics['critic_grad_norm']) > 0
        state, metrics, *_ = program.generator(frozen, state, batch)
        assert bool(metrics['finite']) and float(metrics['grad_norm']) > 0
    for name in ('student', 'critic', 'ema'):
        pairs = zip(jax.tree.leaves(jax.device_get(getattr(state, name))),
                    jax.tree.leaves(getattr(before, name)), strict=True)
        assert all(not np.array_equal(x, y) for x, y in pairs), name
    same(frozen.teacher, base)


@pytest.mark.parametrize('offload', [(), ('ema', 'teacher')])
def test_the_same_images_are_of_adapters_too(offload):
    """DMD2's order, wherever teacher and average lie."""
    base, tx = tiny.small_params()[0], optax.sgd(1e-2)
    params = base, *(stirred(SMALL.init(base, jax.random.key(0)), seed) for seed in (1, 2))
    build = lambda where: tiny.build_run(
        tiny.small_network, params, tx, sharding.make_mesh({}, jax.devices()[:1]), where,
        student=SMALL, critic=SMALL)
    (spec, program, frozen), batch = build(offload), tiny.make_batch(4)

    def step(state):
        state, metrics, x = program.generator(frozen, state, batch)
        state, judged = program.critic(frozen, state, dataclasses.replace(batch, x=x))
        return state, {'finite': metrics['finite'] & judged['finite']}

    state, metrics = step(spec.create())
    assert bool(metrics['finite']) and (int(state.step), int(state.critic_step)) == (1, 1)
    # Neither update looks at the average.
    average = jax.device_put(stirred(params[1], 3), spec.shardings.ema)
    other, _ = step(dataclasses.replace(spec.create(), ema=average))
    same((other.student, other.critic), (state.student, state.critic))
    alone, *_ = program.generator(frozen, spec.create(), batch)
    spec, _, frozen = build(())
    updates = Updates(tiny.small_network, tiny.make_recipe(), Mechanics(
        tx, tx, student=SMALL, critic=SMALL))
    start = spec.create()
    _, (x, *_) = jax.jit(updates.rollout)(frozen, start, batch)  # the generator's own samples
    judged, _ = jax.jit(updates.critic)(frozen, start, dataclasses.replace(batch, x=x))
    for name, of in (('student', alone), ('ema', alone), ('critic', judged)):
        found, want, before = (jax.device_get(getattr(x, name)) for x in (state, of, start))
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-7), found, want)
        pairs = zip(jax.tree.leaves(found), jax.tree.leaves(before), strict=True)
        assert all(np.abs(x - y).max() > 1e-5 for x, y in pairs), name
    same(frozen.teacher, base)


def lora_config(**fields):
    return small.config_of(**{
        'student.adapter.kind': 'lora', 'student.adapter.rank': 2,
        'student.adapter.targets': ('x_embedder',), 'critic.adapter.kind': 'lora',
        'critic.adapter.rank': 1, 'critic.adapter.targets': ('x_embedder',),
        'log.probe': 2, **fields})


def test_a_run_resumes_to_the_last_bit_and_holds_no_base(tmp_path):
    fields = {'train.steps': 3, 'checkpoint.every': 1, 'train.offload': 'ema+teacher'}
    run = lambda folder, **changed: train.fit(
        small.task_of(config := lora_config(**fields | changed)), config, folder)[0]
    whole = run(tmp_path / 'whole')
    run(tmp_path / 'parts', **{'train.steps': 1})
    same(run(tmp_path / 'parts'), whole)
    assert {leaf.size for leaf in jax.tree.leaves(whole.student)} == {6}  # 3 x 2 and 2 x 3
    saved = ckpt.saved(tmp_path / 'whole')
    assert saved.manifest['teacher_identity'] == 'small'
    assert students.binding_of(saved.manifest) == SMALL

    # Another run's weights: student, critic and EMA, of these ranks and no other.
    task = small.task_of(config := lora_config(init_from=str(tmp_path / 'whole')))
    begin = lambda task, config: resume.begin(
        resume.origin(config), resume.manifest_of(config, task.identities), task,
        task.feed(frozenset()))[0]
    begun = begin(task, config)
    same((begun.student, begun.critic, begun.ema), (whole.student, whole.critic, whole.ema))
    config = lora_config(init_from=str(tmp_path / 'whole'), **{'student.adapter.rank': 1})
    with pytest.raises(CheckpointError, match='holds no student of this shape'):
        begin(small.task_of(config), config)
    config = lora_config(init_from=str(tmp_path / 'whole'), **{'student.adapter.kind': 'full'})
    with pytest.raises(CheckpointError, match='share no parameter; is adapter.kind the same'):
        begin(small.task_of(config), config)
    # Factors of another scale would be another network, and their shapes do not tell.
    config = lora_config(init_from=str(tmp_path / 'whole'), **{'student.adapter.alpha': 2.0})
    same(begin(small.task_of(config), config).student, whole.student)
    config.student.adapter.alpha = 8.0
    with pytest.raises(CheckpointError, match='student.adapter.alpha 2, here it is 8; set config'):
        begin(small.task_of(config), config)


def test_a_critic_is_bound_by_its_own_section():
    """As the panels of training show it."""
    task = small.task_of(lora_config(**{'critic.adapter.rank': 2, 'critic.adapter.alpha': 6.0}))
    base, trained = task.frozen.teacher, stirred(SMALL.init(task.frozen.teacher, jax.random.key(0)))
    change = lambda whose: jax.tree.map(lambda x, y: x - y, adapters.materialised(
        task.network(trained, whose)), base)['x_embedder']['kernel']
    np.testing.assert_allclose(change('critic'), 3 * change('student'), atol=1e-5)
    assert np.any(change('student'))


@pytest.mark.parametrize('whose', ['student', 'critic'])
def test_an_adapter_that_does_not_fit_is_found_in_its_section(whose):
    config = lora_config(**{f'{whose}.adapter.rank': 4})
    with pytest.raises(AdapterError, match=f'^config.{whose}.adapter.rank 4 is above 3, the rank '
                       r'of x_embedder \(3, 3\)'):
        small.task_of(config)


# --- Files ---


def factors_of(rank=4, seed=0):
    base = tiny.make_params()[0]
    trained = stirred(LoRA(rank, 0.5, TARGETS).init(base, jax.random.key(0)), seed)
    kernels = {name: leaf.shape for name, leaf in flat.flatten(base).items()
               if name.endswith('kernel')}
    return kernels, lora.on_host(trained, 0.5)


def products(factors):
    return {path: a @ b for path, (a, b) in factors.items()}


def close(a, b, atol=1e-6):
    assert a.keys() == b.keys()
    for path, value in a.items():
        np.testing.assert_allclose(value, b[path], atol=atol, err_msg=path)


@pytest.mark.parametrize(('naming', 'prefix'), [
    ('diffusers', 'transformer.'), ('comfyui', 'diffusion_model.'), ('comfyui', 'lora_unet_')])
def test_a_file_comes_back_as_it_was_written(tmp_path, naming, prefix):
    kernels, factors = factors_of()
    names = dataclasses.replace(NAMES, comfyui=prefix)
    lora.write(tmp_path / lora.FILE, factors, names, naming)
    opened = flat.open_file(tmp_path / lora.FILE, '')
    assert all(name.startswith(prefix) for name in opened.keys())  # noqa: SIM118
    assert lora.find(tmp_path) == tmp_path / lora.FILE == lora.find(tmp_path / lora.FILE)
    close(products(lora.read(tmp_path / lora.FILE, kernels, names)), products(factors))
    about = json.loads(opened.metadata().get(lora.CONFIG, '{}'))
    if naming == 'diffusers':
        assert about['transformer.r'] == about['transformer.lora_alpha'] == 4
        assert 'layers.0.attn.to_out.0' in about['transformer.target_modules']


def write_by_hand(path, tensors, **metadata):
    import safetensors.numpy

    safetensors.numpy.save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path,
                                {k: json.dumps(v) for k, v in metadata.items()} or None)
    return path


A, B = (np.random.default_rng(i).standard_normal(s).astype(np.float32)
        for i, s in enumerate([(2, 32), (16, 2)]))


@pytest.mark.parametrize(('tensors', 'config', 'scale'), [
    # PEFT's own, with and without a config, and of an adapter by name.
    ({'base_model.model.layers.0.attn.to_k.lora_A.weight': A,
      'base_model.model.layers.0.attn.to_k.lora_B.weight': B}, {}, 1.0),
    ({'transformer.layers.0.attn.to_k.lora_A.default.weight': A,
      'transformer.layers.0.attn.to_k.lora_B.default.weight': B},
     {'transformer.r': 2, 'transformer.lora_alpha': 6}, 3.0),
    ({'transformer.layers.0.attn.to_k.lora_A.weight': A,
      'transformer.layers.0.attn.to_k.lora_B.weight': B},
     {'transformer.r': 2, 'transformer.lora_alpha': 6, 'transformer.use_rslora': True},
     6 / 2**0.5),
    # A config that leaves the rank to the factors.
    ({'transformer.layers.0.attn.to_k.lora_A.weight': A,
      'transformer.layers.0.attn.to_k.lora_B.weight': B}, {'transformer.lora_alpha': 6}, 3.0),
    # diffusers' older names, and kohya's with and without an alpha (diffusers #13249).
    ({'transformer.layers.0.attn.to_k.lora.down.weight': A,
      'transformer.layers.0.attn.to_k.lora.up.weight': B}, {}, 1.0),
    ({'lora_unet_layers_0_attn_to_k.lora_down.weight': A,
      'lora_unet_layers_0_attn_to_k.lora_up.weight': B,
      'lora_unet_layers_0_attn_to_k.alpha': np.float32(1)}, {}, 0.5),
    ({'lora_unet_layers_0_attn_to_k.lora_down.weight': A,
      'lora_unet_layers_0_attn_to_k.lora_up.weight': B}, {}, 1.0),
    # Of an adapter named in front of its factors.
    ({'diffusion_model.layers.0.attn.to_k.default.lora_A.weight': A,
      'diffusion_model.layers.0.attn.to_k.default.lora_B.weight': B}, {}, 1.0),
])
def test_a_start_is_read_from_files_of_others(tmp_path, tensors, config, scale):
    file = write_by_hand(tmp_path / 'x.safetensors', tensors, **({lora.CONFIG: config} if config
                                                                  else {}))
    kernels, _ = factors_of()
    given = lora.read(file, kernels, NAMES)
    close(products(given), {'layers/attn/to_k/kernel': scale * (B @ A).T[None]}, 1e-5)


@pytest.mark.parametrize('module', [
    'diffusion_model.layers.0.attention.out', 'lora_unet_layers_0_attention_out',
    'transformer.layers.0.attention.to_out.0'])
def test_z_images_own_name_of_a_projection_is_read(tmp_path, module):
    file = write_by_hand(tmp_path / 'x.safetensors', {
        f'{module}.lora_down.weight': A, f'{module}.lora_up.weight': B,
        f'{module}.alpha': A[:1, 0]})
    kernels = {'layers/attn/to_out/kernel': (1, 32, 16)}
    given = lora.read(file, kernels, families.get('zimage').export.adapters)
    close(products(given), {'layers/attn/to_out/kernel': A[0, 0] / 2 * (B @ A).T[None]}, 1e-5)


def test_pefts_own_folder_says_its_alpha_beside_its_file(tmp_path):
    kernels, module = factors_of()[0], 'base_model.model.layers.0.attn.to_k'
    write_by_hand(tmp_path / lora.PEFT_FILE,
                  {f'{module}.lora_A.weight': A, f'{module}.lora_B.weight': B}, format='pt')
    config = {'peft_type': 'LORA', 'r': 2, 'lora_alpha': 8, 'alpha_pattern': {}, 'use_dora': False}
    (tmp_path / lora.PEFT_CONFIG).write_text(json.dumps(config))
    given = lora.read(lora.find(tmp_path), kernels, NAMES)
    close(products(given), {'layers/attn/to_k/kernel': 4 * (B @ A).T[None]}, 1e-5)
    (tmp_path / lora.PEFT_CONFIG).write_text(json.dumps(config | {'use_dora': True}))
    with pytest.raises(WeightsError, match='made with use_dora'):
        lora.read(lora.find(tmp_path), kernels, NAMES)


def test_a_start_of_a_lower_rank_is_what_is_given_and_can_learn():
    base, path = tiny.make_params()[0], 'layers/attn/to_k/kernel'
    binding = LoRA(4, 2.0, ('to_k$',))
    started = binding.start(base, jax.random.key(0), {path: (A.T[None], B.T[None])})
    bound = adapters.materialised(binding.bind(base, started))
    change = flat.flatten(jax.tree.map(lambda x, y: x - y, bound, base))
    for name, delta in change.items():
        want = (B @ A).T[None] if name == path else 0.0
        np.testing.assert_allclose(delta, want, atol=1e-5, err_msg=name)
    # No column of A is zero, also where there is nothing of the file's.
    factors = flat.flatten(started)
    assert all(np.all(np.any(x != 0, axis=-2)) for name, x in factors.items() if 'lora_A' in name)
    np.testing.assert_array_equal(factors[f'{path}/lora_A'][..., :2], A.T[None])
    # Zero beside what is not zero is given: begun afresh, the product would be another.
    for a, b in ((0 * A, B), (A, 0 * B)):
        given = {path: (a.T[None], b.T[None])}
        factors = flat.flatten(binding.start(base, jax.random.key(0), given))
        assert not np.any(factors[f'{path}/lora_A'] @ factors[f'{path}/lora_B'])


MODULE = 'transformer.layers.0.attn.to_k'


@pytest.mark.parametrize(('tensors', 'config', 'words'), [
    ({f'{MODULE}.lora_A.weight': A[:, :8], f'{MODULE}.lora_B.weight': B}, {},
     r'of another base: a factor of layers.0.attn.to_k is \(2, 8\), here it would be \(2, 32\)'),
    ({'transformer.layers.7.attn.to_k.lora_A.weight': A}, {}, 'layers.7.attn.to_k, which is no'),
    ({f'{MODULE}.lora_A.weight': A, f'{MODULE}.lora_B.weight': B,
      'diffusion_model.layers.0.attn.to_k.lora_A.weight': 2 * A}, {},
     'has factor A of layers.0.attn.to_k twice, by two names'),
    ({f'{MODULE}.lora_A.weight': A}, {}, 'lacks the factor B of layers.0.attn.to_k'),
    ({f'{MODULE}.lora_A.weight': A, f'{MODULE}.dora_scale': B}, {}, 'no factor of a plain LoRA'),
    ({'lora_te1_x.lora_down.weight': A}, {}, 'adapts lora_te1_x, which is no module'),
    ({f'{MODULE}.lora_A.weight': A}, {'transformer.use_dora': True}, 'made with use_dora'),
    ({f'{MODULE}.lora_A.weight': A}, [1], 'cannot be read'),
    ({f'{MODULE}.lora_A.weight': A.astype(jnp.float8_e4m3fn)}, {},
     r'holds F8_E4M3 \(.*to_k.lora_A.weight\); quantised factors are not read'),
    ({f'{MODULE}.lora_A.weight': A.astype(np.int8)}, {}, 'holds I8'),
])
def test_a_file_that_does_not_fit_is_one_line(tmp_path, tensors, config, words):
    file = write_by_hand(tmp_path / 'x.safetensors', tensors, **{lora.CONFIG: config})
    with pytest.raises(WeightsError, match=words) as e:
        lora.read(file, factors_of()[0], NAMES)
    assert len(str(e.value).splitlines()) == 1 and 'x.safetensors' in str(e.value)


def test_a_start_must_fit_the_runs_adapters():
    base, (_, given) = tiny.make_params()[0], factors_of(rank=4)
    with pytest.raises(AdapterError, match='rank 4 at .*, adapter.rank is 2'):
        LoRA(2, 1.0, TARGETS).start(base, jax.random.key(0), given)
    with pytest.raises(AdapterError, match='feed_forward/linear_1, which adapter.targets leave'):
        LoRA(4, 1.0, TARGETS[:1]).start(base, jax.random.key(0), given)


def test_nobody_writes_what_comfyui_leaves_out(tmp_path):
    with pytest.raises(WeightsError, match='--naming=diffusers'):
        lora.write(tmp_path / lora.FILE, factors_of()[1], NAMES, 'comfyui')


@pytest.mark.parametrize(('theirs', 'ours'), [
    ('input_blocks_1_0_in_layers_2', 'down_blocks_0_resnets_0_conv1'),
    ('input_blocks_3_0_op', 'down_blocks_0_downsamplers_0_conv'),
    ('input_blocks_4_0_skip_connection', 'down_blocks_1_resnets_0_conv_shortcut'),
    ('input_blocks_8_1_transformer_blocks_9_attn2_to_out_0',
     'down_blocks_2_attentions_1_transformer_blocks_9_attn2_to_out_0'),
    ('middle_block_0_emb_layers_1', 'mid_block_resnets_0_time_emb_proj'),
    ('middle_block_1_proj_in', 'mid_block_attentions_0_proj_in'),
    ('middle_block_2_out_layers_3', 'mid_block_resnets_1_conv2'),
    ('output_blocks_2_1_transformer_blocks_0_ff_net_0_proj',
     'up_blocks_0_attentions_2_transformer_blocks_0_ff_net_0_proj'),
    ('output_blocks_5_2_conv', 'up_blocks_1_upsamplers_0_conv'),
    ('output_blocks_8_0_in_layers_2', 'up_blocks_2_resnets_2_conv1'),
    ('input_blocks_0_0', 'conv_in'), ('out_2', 'conv_out'),
    ('time_embed_2', 'time_embedding_linear_2'), ('label_emb_0_0', 'add_embedding_linear_1'),
    ('down_blocks_0_resnets_0_conv1', 'down_blocks_0_resnets_0_conv1'),
])
def test_names_of_stabilitys_own_code(theirs, ours):
    """Against all modules of SDXL at full size: each of the names stands for one there is."""
    assert sdxl.of_sgm(theirs) == ours
    assert ours in sdxl_modules()


@functools.cache
def sdxl_modules():
    shapes = flat.flatten(abstract_params(lambda: UNet(UNetConfig(), nnx.Rngs(0))))
    return {name.removesuffix('.weight').replace('.', '_') for path, leaf in shapes.items()
            if path.endswith('kernel') for name in sdxl.unet(path).names(leaf.shape)}


# --- Students of a run ---


RUN = {'teacher.name': 'emoji', 'student.steps': 4, 'data.name': 'emoji', 'method.alpha': 4.0,
       'student.adapter.kind': 'lora', 'student.adapter.rank': 2, 'student.adapter.alpha': 6.0,
       'student.adapter.targets.0': 'to_q$', 'student.adapter.targets.1': 'linear_2$'}
EMOJI = LoRA(2, 3.0, ('to_q$', 'linear_2$'))


@pytest.fixture(scope='module')
def run_folder(weights, tmp_path_factory):
    """(the teacher, what a run has trained of its student, the run's folder)."""
    teacher = families.load_teacher(str(weights))
    trained = stirred(EMOJI.init(teacher.params, jax.random.key(0)))
    folder = tmp_path_factory.mktemp('run')
    run = RUN | {'teacher.path': str(weights), 'teacher_identity': teacher.identity}
    return teacher, trained, save(folder, run, trained)


def test_a_lora_run_is_exported_merged_or_as_adapters(run_folder, tmp_path):
    teacher, trained, workdir = run_folder
    export.export(workdir, tmp_path / 'merged', export.Wanted('safetensors'))
    _, found = emoji.read(str(tmp_path / 'merged' / 'student.safetensors'))
    merged = adapters.materialised(EMOJI.bind(teacher.params, trained))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6),
                 found['denoiser'], merged)

    written = export.export(workdir, tmp_path / 'lora', export.Wanted('lora', 'bfloat16'))
    assert [p.name for p in written] == [lora.FILE, 'scheduler', 'README.md']
    card = written[-1].read_text()
    assert '--config.init_from=lora --workdir' in card and 'base_model_relation' not in card
    kernels = {name: leaf.shape for name, leaf in flat.flatten(teacher.params).items()
               if name.endswith('kernel')}
    found = lora.read(written[0], kernels, families.get('emoji').export.adapters)
    want = lora.on_host(trained, 3.0)
    for path, (a, b) in want.items():
        np.testing.assert_allclose(found[path][0], a, rtol=1e-2, atol=1e-6)
        np.testing.assert_allclose(found[path][1], b, rtol=1e-2, atol=1e-6)


def test_a_fully_trained_student_has_no_adapters_to_export(run_folder, tmp_path):
    teacher, _, _ = run_folder
    manifest = {k: v for k, v in RUN.items() if 'adapter' not in k}
    workdir = save(tmp_path / 'run', manifest, teacher.params)
    with pytest.raises(WeightsError, match='trained all of its student'):
        export.export(workdir, tmp_path / 'out', export.Wanted('lora'))


def test_a_run_begins_at_a_lora(run_folder, tmp_path):
    """As adapters where the run has some, else merged into the student."""
    teacher, trained, workdir = run_folder
    export.export(workdir, tmp_path / 'lora', export.Wanted('lora'))
    config = tiny.load_config('emoji')
    config.update_from_flattened_dict({
        'teacher.path': ckpt.saved(workdir).manifest['teacher.path'],
        'init_from': str(tmp_path / 'lora'), 'student.adapter.targets': EMOJI.targets,
        'student.adapter.rank': 3, 'log.probe': 0})
    want = adapters.materialised(EMOJI.bind(teacher.params, trained))
    for kind in ('lora', 'full'):
        config.student.adapter.kind = kind
        task = train.prepare(config)
        found = task.read_weights(str(resume.origin(config).path))
        assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, task.spec.shapes.student)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5),
                     adapters.materialised(task.network(found)), want)


def test_a_lora_is_of_the_weights_it_was_trained_over(run_folder, tmp_path):
    """Which its header says; over others of the same shapes it would draw something else."""
    teacher, _, workdir = run_folder
    file = export.export(workdir, tmp_path, export.Wanted('lora'))[0]
    kernels = {name: leaf.shape for name, leaf in flat.flatten(teacher.params).items()
               if name.endswith('kernel')}
    read = lambda base: lora.read(file, kernels, families.get('emoji').export.adapters, base)
    assert read(teacher.identity).keys() == read('').keys()
    with pytest.raises(WeightsError, match='trained over other weights .* than the teacher'):
        read('another')


if __name__ == '__main__':
    on_devices()
    sys.exit()
