"""The planner: what the TPU's compiler says of a distillation's steps, without a TPU."""

import importlib.util
import json
import re
from importlib import metadata

import forked
import jax
import jax.numpy as jnp
import pytest
import tiny

from ddmd_jax.families.emoji import codec
from ddmd_jax.parallel import sharding
from ddmd_jax.planner import chips, programs

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is None, reason='libtpu is not installed (jax[tpu])')


# What the launch scripts tell the TPU's compiler, which ends at a flag that it does not know.
LAUNCHED = re.search(r'ENV LIBTPU_INIT_ARGS="(.+)"',
                     (tiny.ROOT / 'launch' / 'docker' / 'Dockerfile').read_text())[1]


def plan(*flags):
    return forked.run('ddmd_jax.plan', *flags, ALLOW_MULTIPLE_LIBTPU_LOAD='1',
                      LIBTPU_INIT_ARGS=LAUNCHED)


# Of a compiled program: exact, and no clock is asked.
COUNTS = 'flops', 'temp_bytes', 'alias_bytes', 'hbm_bytes', 'collective_bytes'


def is_as_it_was(golden, found):
    """What a change does to the compiled programs is seen, and written down, in a golden file.

    Another compiler may count otherwise: numbers are of one version of JAX and libtpu.
    """
    file = tiny.ROOT / 'tests' / 'golden' / golden
    versions = {name: metadata.version(name) for name in ('jax', 'jaxlib', 'libtpu')}
    known = json.loads(file.read_text())
    if known['versions'] != versions:
        pytest.skip(f'{file} holds the counts of {known["versions"]}, here are {versions}')
    now = json.dumps({'versions': versions, 'counts': found}, indent=1) + '\n'
    assert known['counts'] == found, f'{file} would now be\n{now}'


@pytest.mark.parametrize('slices', ['99999999999', '1025'])
def test_more_slices_than_anybody_has_are_not_described(slices):
    with pytest.raises(programs.PlanError, match='at most 1024 slices are planned for'):
        programs.topology(f'{slices}xv5e:4x4')


@pytest.mark.tpu_compiler
@needs_libtpu
def test_both_steps_are_compiled_for_a_topology(weights):
    done = plan('--config=configs/emoji.py', '--topology=v5e:2x2', '--json',
                f'--config.teacher.path={weights}', '--config.student.steps=2',
                '--config.data.global_batch=8', '--config.mesh.data=1', '--config.mesh.fsdp=4',
                '--nosearch')  # toys are so small that the search would end in millions of rows
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found['chips'], found['global_batch']) == (4, 8)
    assert found['hbm_bytes_per_chip'] == 16 * 2**30
    # Seven trees of the student's size and a teacher, most of them a quarter on each chip.
    whole = 8 * sum(x.nbytes for x in jax.tree.leaves(tiny.random_params(tiny.TOY, 0)['denoiser']))
    decoder = sum(x.nbytes for x in jax.tree.leaves(codec.read()[1]))  # all of it on every chip
    assert whole / 4 < found['resident_bytes'] - decoder < whole
    generator, critic = found['programs']['generator_step'], found['programs']['critic_step']
    assert list(found['programs']) == ['generator_step', 'critic_step', 'sample', 'decode']
    for name, p in found['programs'].items():
        assert p['fits'] and p['unknown_loops'] == [] and p['compile_seconds'] > 0
        # A picture of 64 x 64 pixels is decoded in the chip's own memory.
        assert p['peak_bytes'] > found['resident_bytes']
        assert p['temp_bytes'] > 0 or name == 'decode'
        assert p['roofline_seconds'] > 0
        # What is computed is what the architecture asks for, but for what the compiler turned
        # into sums at so small a size, and the seams of the strips that it decodes a picture in
        # (`flops.autoencoder_decode`): 31 % of so small a one.
        assert 0.8 < p['flops'] / p['analytic_flops'] < (1.4 if name == 'decode' else 1.25)
    # 2 rows of 16 x 16 latents, whose few channels the chip's layout pads to 64.
    samples = 2 * 16 * 16 * 64 * 4
    for p, own in ((generator, samples), (critic, 0)):
        assert sum(p['collective_bytes'].values()) > 0
        # The whole state is donated: metrics alone have a buffer of their own, and the samples.
        assert 0 <= p['output_bytes'] - p['alias_bytes'] - own < 2**16
    assert found['run']['chip_hours'] > 0 and 'advice' not in found
    # The generator's has the teacher's three passes and the critic's one more than the critic's.
    assert 1.3 * critic['flops'] < generator['flops'] < 4 * critic['flops']
    is_as_it_was('plan.json', {name: {key: p[key] for key in COUNTS}
                               for name, p in found['programs'].items()})


@pytest.mark.tpu_compiler
@needs_libtpu
def test_the_text_encoder_counts_where_prompts_are_encoded_on_the_mesh(weights):
    flags = ['--topology=v5e:2x2', '--json', f'--config.teacher.path={weights}', '--only=encode']
    done = plan('--config=configs/emoji_prompts.py', *flags)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    encode = found['programs'].pop('encode')
    assert not found['programs'] and 'run' not in found and 'largest_batch' not in found
    assert encode['fits'] and encode['rows'] == 32
    assert 0.8 < encode['flops'] / encode['analytic_flops'] < 1.25
    params = tiny.random_params(tiny.TOY, 0)
    held = lambda name: sum(x.nbytes for x in jax.tree.leaves(params[name]))
    # Batch is split four ways, nothing else is.
    assert found['resident_bytes'] > 8 * held('denoiser') + held('text')


@pytest.mark.tpu_compiler
@needs_libtpu
@pytest.mark.parametrize('flags, words', [
    (['--topology=v5e:three'], "plan: no topology 'v5e:three'"),
    (['--topology=v5e:2x2', '--config.mesh.data=3'], 'plan: mesh'),
    (['--topology=2xv5e:2x2', '--config.mesh.data=1', '--config.mesh.fsdp=8'],
     'set mesh.data to a multiple of 2'),
    (['--topology=v5e:2x2', '--config.data.global_batch=4'], 'does not divide by 16'),
    (['--topology=v5e:2x2', '--only=encode'],
     '--only encode: the programs are generator_step, critic_step, sample, decode'),
])
def test_what_cannot_be_planned_is_said_in_one_line(flags, words):
    done = plan('--config=configs/emoji.py', *flags)
    said = [x for x in done.stderr.splitlines() if x.startswith('plan: ')]
    assert done.returncode == 1 and len(said) == 1 and words in said[0]


@pytest.mark.tpu_compiler
@needs_libtpu
def test_only_sums_of_gradients_go_from_slice_to_slice():
    mesh = sharding.make_mesh({'data': 4, 'fsdp': 2}, programs.topology('2xv5e:2x2'))
    slices = [{chip.slice_index for chip in place.flat} for place in mesh.devices]
    assert slices == [{0}, {0}, {1}, {1}]

    def step(kernel, x):
        return kernel - jax.grad(lambda k: jnp.mean((x @ k) ** 2))(kernel)

    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('fsdp', None))
    rows = sharding.batch_sharding(mesh)
    compiled = jax.jit(step, in_shardings=(split, rows), out_shardings=split).lower(
        jax.ShapeDtypeStruct((1024, 256), jnp.float32),
        jax.ShapeDtypeStruct((16, 1024), jnp.float32)).compile()
    # What is sent by way of the hosts; the kernel is gathered inside each slice.
    sent = re.findall('_xla_megascale_transfer_type="([A-Z_]+)"', compiled.as_text())
    assert set(sent) == {'ALL_REDUCE'}


@pytest.mark.parametrize('name, slices, shape', [
    ('v5e:4x4', 1, 'v5e:4x4'), ('2xv5e:4x4', 2, 'v5e:4x4'), ('16xv5p:2x2x2', 16, 'v5p:2x2x2'),
    ('0xv5e:4x4', 1, '0xv5e:4x4')])  # which no compiler knows
def test_slices_stand_in_front_of_a_topology(name, slices, shape):
    assert chips.split_slices(name) == (slices, shape)
    if slices > 1:
        assert chips.chip_for(name) is chips.chip_for(shape)


def test_a_wrong_config_is_refused_before_anything_is_compiled():
    done = plan('--config=configs/emoji.py', '--config.method.alpha=0.5')
    assert done.returncode == 2 and 'method.alpha' in done.stderr


def test_a_device_holds_its_part():
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    tree = {'kernel': jax.ShapeDtypeStruct((4, 6), jnp.float32),
            'bias': jax.ShapeDtypeStruct((6,), jnp.bfloat16)}
    layout = jax.tree.map(lambda _: sharding.replicated(mesh), tree)
    assert programs.bytes_per_device(tree, layout) == 4 * 6 * 4 + 6 * 2
