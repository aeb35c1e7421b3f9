"""Kernels against XLA's attention: values, gradients, padding, meshes.

Pallas's is interpreted, so that no TPU is needed. Of cuDNN's, the same call is made of XLA, with
lengths for a mask as there, and the program is lowered for CUDA, which needs no GPU.
``python tests/test_attention.py`` with eight host devices runs the half that needs a mesh, and with
the argument `tpu` it compiles for a TPU.
"""

import functools
import importlib.util
import os
import re
import sys
import types

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec as P

from ddmd_jax import families
from ddmd_jax.families.base import LoadOptions
from ddmd_jax.families.emoji import teacher as emoji
from ddmd_jax.models import attention, nextdit
from ddmd_jax.models.unet import UNetConfig
from ddmd_jax.models.zimage import ZImageConfig
from ddmd_jax.parallel.sharding import AXES, make_mesh
from ddmd_jax.util.errors import UserError

HEADS = P(('data', 'fsdp'), None, 'tensor')
ROWS = P(('data', 'fsdp'))


@pytest.fixture(autouse=True)
def exact():
    with jax.default_matmul_precision('highest'):
        yield


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks of queries and of keys at 300 tokens: the least that the kernel allows."""
    monkeypatch.setattr(attention, 'TILE', 128)
    monkeypatch.setattr(attention, 'KV_BYTES', 2 * 128 * 128 * 4)


def make(batch, seq, heads, kv_heads, dim, dtype='float32', seed=0):
    """Queries, keys, values, and the weights of a loss over the outputs."""
    rng = np.random.default_rng(seed)
    shapes = [(batch, seq, n, dim) for n in (heads, kv_heads, kv_heads, heads)]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def lengths(*sizes, seq):
    """Mask whose rows begin with so many real tokens, or end with -so many."""
    at = np.arange(seq)
    return jnp.asarray([at < n if n >= 0 else at >= seq + n for n in sizes])


def everything(q, k, v, weights, mask, attend):
    """Outputs, and gradients for q, k and v of a loss over the real tokens."""
    def loss(q, k, v):
        out = attend(q, k, v, mask)
        kept = out if mask is None else jnp.where(mask[:, :, None, None], out, 0)
        return jnp.sum(kept.astype(jnp.float32) * weights), kept

    grads, out = jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
    return {'out': out, 'dq': grads[0], 'dk': grads[1], 'dv': grads[2]}


def run(kind, inputs, mask):
    """`everything` by one implementation, compiled, as fp32 NumPy arrays."""
    attend = functools.partial(attention.attend, kind=kind, interpret=kind != 'xla')
    got = jax.jit(functools.partial(everything, attend=attend))(*inputs, mask)
    assert {x.dtype for x in got.values()} == {inputs[0].dtype}
    return {name: np.asarray(x, np.float32) for name, x in got.items()}


def check_close(got, want, tolerance):
    for name, x in want.items():
        error, rms = np.abs(got[name] - x).max(), np.sqrt(np.mean(np.square(x)))
        assert rms > 0 and error <= tolerance * rms, (name, error, rms)


# --- Agreement ---


@pytest.mark.parametrize('shape, mask', [
    ((2, 128, 2, 2, 32), None),
    ((2, 128, 4, 2, 16), lengths(128, 70, seq=128)),  # two queries a key
    ((1, 100, 3, 1, 24), None),  # no multiple of anything
    ((2, 100, 4, 2, 24), lengths(100, 1, seq=100)),
], ids=['whole', 'masked-grouped', 'odd', 'odd-masked-grouped'])
def test_splash_equals_xla(shape, mask):
    inputs = make(*shape)
    check_close(run('splash', inputs, mask), run('xla', inputs, mask), 1e-4)


def test_splash_equals_xla_over_several_blocks(small_blocks):
    """Blocks of keys without a real one come before and after those that matter."""
    assert attention._block_sizes(300, 24, 4) == (128, 256)
    inputs, mask = make(3, 300, 2, 1, 24), lengths(300, 40, -20, seq=300)
    check_close(run('splash', inputs, mask), run('xla', inputs, mask), 1e-4)


def test_splash_equals_xla_in_bf16():
    inputs, mask = make(2, 100, 4, 2, 24, 'bfloat16'), lengths(100, 70, seq=100)
    exact = run('xla', [x.astype(jnp.float32) for x in inputs], mask)
    check_close(run('splash', inputs, mask), exact, 0.05)
    check_close(run('xla', inputs, mask), exact, 0.05)


BOTH_FORMS = {kind: jax.jit(functools.partial(everything, attend=functools.partial(
    attention.attend, kind=kind, interpret=True))) for kind in ('xla', 'cudnn')}
IMAGE, CAPTION = 24, 9  # tokens


@hypothesis.given(st.lists(st.integers(1, CAPTION), min_size=3, max_size=3))
@pytest.mark.parametrize('dtype, tolerance', [('float32', 1e-5), ('bfloat16', 0.05)])
def test_lengths_are_masks(dtype, tolerance, captions):
    """An image and its padded caption of whatever length."""
    mask = jnp.concatenate([jnp.ones((3, IMAGE), bool), lengths(*captions, seq=CAPTION)], axis=1)
    inputs = make(3, IMAGE + CAPTION, 4, 2, 24, dtype)
    exact = BOTH_FORMS['xla'](*(x.astype(jnp.float32) for x in inputs), mask)
    got = BOTH_FORMS['cudnn'](*inputs, mask)
    host = lambda tree: {name: np.asarray(x, np.float32) for name, x in tree.items()}
    check_close(host(got), host(exact), tolerance)


@pytest.mark.parametrize('mask', [None, lengths(3, 1, seq=9)])
def test_a_caption_alone_has_lengths_too(mask):
    inputs = make(2, 9, 4, 1, 24)
    check_close(run('cudnn', inputs, mask), run('xla', inputs, mask), 1e-5)


# --- Padding ---


@pytest.mark.parametrize('kind', attention.KINDS[1:])
def test_masked_keys_have_no_influence(kind):
    """Not a small one: whatever they hold, nothing on a real token changes in a bit."""
    mask = lengths(70, 30, seq=100)
    q, k, v, weights = make(2, 100, 4, 2, 24)
    plain = run(kind, (q, k, v, weights), mask)
    odd = lambda x: jnp.where(mask[:, :, None, None], x, 1e3 * x[::-1, ::-1] - 7)
    other = run(kind, (q, odd(k), odd(v), weights), mask)
    for name, x in plain.items():
        np.testing.assert_array_equal(x, other[name], err_msg=name)
    for name in ('dk', 'dv'):
        assert not plain[name][~np.asarray(mask)].any()


@pytest.mark.parametrize('kind, seq', [('splash', 128), ('splash', 100), ('cudnn', 100)])
def test_a_row_of_nothing_but_padding_stays_finite(kind, seq):
    """Even where a loss looks at its outputs; and the row beside it does not notice."""
    inputs = make(2, seq, 2, 1, 24)

    @jax.jit
    def step(mask):
        attend = lambda q, k, v, _: attention.attend(q, k, v, mask, kind=kind, interpret=True)
        return everything(*inputs, None, attend)

    got, want = step(lengths(seq, 0, seq=seq)), step(lengths(seq, seq, seq=seq))
    for name, x in got.items():
        assert np.isfinite(x).all(), name
        np.testing.assert_array_equal(x[0], want[name][0], err_msg=name)


def test_no_mask_is_a_mask_of_ones():
    inputs = make(1, 100, 2, 1, 24)
    check_close(run('splash', inputs, None), run('splash', inputs, lengths(100, seq=100)), 1e-6)


# --- Choices and errors ---


def device(platform, version='', capability='9.0'):
    """What `resolve` asks a device for."""
    return types.SimpleNamespace(
        platform=platform, device_kind='NVIDIA X1', compute_capability=capability,
        client=types.SimpleNamespace(platform_version=version))


CUDA = device('gpu', 'PJRT C API\ncuda 13000')


def test_auto_is_the_kernel_of_the_device(capsys):
    kinds = [attention.resolve('auto', x, 'bfloat16', [96]) for x in (
        device('tpu'), device('cpu'), CUDA, jax.devices()[0])]
    assert kinds == ['splash', 'xla', 'cudnn', 'xla']
    assert {attention.resolve('xla', device(x), 'float32', [96]) for x in ('tpu', 'cpu')} == {'xla'}
    assert attention.resolve('splash', device('cpu'), 'float32', [96]) == 'splash'
    assert attention.resolve('cudnn', CUDA, 'float16', [64, 128]) == 'cudnn'
    assert capsys.readouterr() == ('', '')


@pytest.mark.parametrize('where, dtype, dims, why', [
    (CUDA, 'float32', [96], 'teacher.dtype is float32, and bfloat16 is needed'),
    (CUDA, 'bfloat16', [96, 160], 'heads of size 160, where multiples of 8 up to 128 are needed'),
    (CUDA, 'bfloat16', [20], 'heads of size 20, where multiples of 8 up to 128 are needed'),
    (device('gpu', 'cuda 12', '7.5'), 'bfloat16', [96],
     'NVIDIA X1 has compute capability 7.5, and 8.0 is needed'),
    (device('gpu', 'rocm 70000'), 'bfloat16', [96], 'the device is no GPU of CUDA (NVIDIA X1)'),
])
def test_where_cudnn_does_not_run_a_line_says_why(where, dtype, dims, why, capsys):
    attention._warn.cache_clear()
    assert attention.resolve('auto', where, dtype, dims) == 'xla'
    assert attention.resolve('auto', where, dtype, dims) == 'xla'  # said once
    assert capsys.readouterr().err == (
        "warning: attention is XLA's, which keeps all scores in memory, not cuDNN's: "
        f'{why}\n')
    with pytest.raises(UserError, match=f"attention = 'cudnn' .*: {re.escape(why)}; take 'auto'"):
        attention.resolve('cudnn', where, dtype, dims)


def test_cudnn_takes_the_published_networks():
    for dims in ([nextdit.NextDiTConfig().head_dim], [ZImageConfig().head_dim],
                 UNetConfig().head_dims):
        assert attention.resolve('auto', CUDA, 'bfloat16', dims) == 'cudnn'


@pytest.mark.parametrize('family', ['lumina', 'sdxl', 'zimage'])
def test_a_teacher_that_cannot_have_cudnn_is_not_built(family):
    with pytest.raises(UserError, match='the device is no GPU of CUDA'):
        families.get(family).abstract(LoadOptions(attention='cudnn', dtype='bfloat16'))


def test_cudnn_is_refused_where_there_is_no_gpu():
    for where in (device('cpu'), device('tpu')):
        with pytest.raises(UserError, match='the device is no GPU of CUDA'):
            attention.resolve('cudnn', where, 'bfloat16', [96])


def test_unknown_kinds_name_the_known():
    with pytest.raises(ValueError, match="'flash': known are auto, xla, splash, cudnn"):
        attention.resolve('flash', CUDA, 'bfloat16', [96])
    for kind in ('flash', 'auto'):
        with pytest.raises(ValueError, match=f"'{kind}': attend knows xla, splash, cudnn"):
            attention.attend(*make(1, 8, 2, 1, 8)[:3], None, kind=kind)


@pytest.mark.parametrize('seq, dim, itemsize, want', [
    (64 + 16, 24, 2, (128, 128)),
    (256, 96, 2, (256, 256)),
    (1024 + 256, 96, 2, (256, 1280)),
    (4096, 96, 2, (256, 2048)),
    (4096 + 256, 96, 2, (256, 2304)),
    (4096 + 256, 96, 4, (256, 1280)),  # as many bytes hold half as many keys
    (4096 + 256, 256, 2, (256, 1280)),
])
def test_blocks_follow_the_length(seq, dim, itemsize, want):
    assert attention._block_sizes(seq, dim, itemsize) == want


@pytest.mark.parametrize('kind', ['splash', 'cudnn'])
@pytest.mark.parametrize('shape, words', [
    ((4, 8, 3, 1, 8), 'query heads, 3, does not divide by .* tensor = 2'),
    ((4, 8, 4, 1, 8), 'key heads, 1, does not divide by .* tensor = 2'),
])
def test_what_does_not_divide_is_refused(shape, words, kind):
    mesh = AbstractMesh((2, 2, 2), AXES)  # sizes are all that is looked at
    with pytest.raises(ValueError, match=f'{kind} attention: .*{words}'):
        attention.attend(*make(*shape)[:3], None, kind=kind, mesh=mesh)


# --- In the network ---


def with_attention(kind, shape=tiny.SHAPE, **changes):
    """``params -> ((loss, x_hat), gradients)`` of the tiny NextDiT; captions differ in length."""
    cond, noise = tiny.make_cond(2), jax.random.normal(jax.random.key(1), (2, *shape))
    model = tiny.MODEL | {'denoiser': tiny.MODEL['denoiser'] | {'attention': kind} | changes}

    def loss(params):
        x_hat = emoji.make_denoiser(model)(params, noise, jnp.asarray([0.3, 0.8]), cond)
        return jnp.sum(jnp.square(x_hat)), x_hat

    return jax.value_and_grad(loss, has_aux=True)


@pytest.mark.parametrize('kind', [pytest.param('splash', marks=pytest.mark.slow), 'cudnn'])
def test_nextdit_does_not_notice_which_attention_it_has(kind, monkeypatch):
    """Padding attends to other tokens in a kernel than in XLA's: no image may depend on it."""
    monkeypatch.setattr(nextdit, 'attend', functools.partial(attention.attend, interpret=True))
    params = tiny.make_params()[0]
    (_, x), dx = jax.jit(with_attention('xla'))(params)
    (_, y), dy = jax.jit(with_attention(kind))(params)
    for a, b in zip(jax.tree.leaves((x, dx)), jax.tree.leaves((y, dy)), strict=True):
        rms = max(float(jnp.sqrt(jnp.mean(jnp.square(a)))), 1e-3)
        assert float(jnp.abs(a - b).max()) <= 1e-3 * rms


# --- Lowered for CUDA ---


CALLS = ['__cudnn$fmhaSoftmax', '__cudnn$fmhaSoftmaxBackward']


@pytest.fixture
def for_cuda(monkeypatch):
    """``(program, *shapes) -> its text as it is given to CUDA's compiler``."""
    monkeypatch.setattr(  # asks the cuDNN that is installed
        'jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version', lambda: 91000)
    return lambda program, *shapes: jax.jit(program).trace(*shapes).lower(
        lowering_platforms=('cuda',)).as_text()


def score_matrices(text, seq):
    """Types of the program's tensors with two axes of the sequence's length."""
    return {x for x in re.findall(r'tensor<([\dx]+x\w+)>', text)
            if x.split('x').count(str(seq)) > 1}


@pytest.mark.parametrize('padded', [True, False])
def test_cudnn_gets_lengths_and_no_mask(for_cuda, padded):
    batch, seq, heads, kv_heads, dim = TPU_SHAPE
    q, k = (jax.ShapeDtypeStruct((batch, seq, n, dim), jnp.bfloat16) for n in (heads, kv_heads))
    mask = jax.ShapeDtypeStruct((batch, seq), bool) if padded else None
    program = lambda kind: functools.partial(
        everything, attend=functools.partial(attention.attend, kind=kind))
    text = for_cuda(program('cudnn'), q, k, k, q, mask)
    assert re.findall(r'@(__cudnn\$\w+)', text) == CALLS
    for line in re.findall(r'.*@__cudnn.*', text):
        assert f'tensor<{batch}xi32>, tensor<{batch}xi32>' in line  # queries' lengths, and keys'
        assert r'mask_type\22: \22PADDING\22' in line
    assert not score_matrices(text, seq)
    assert score_matrices(for_cuda(program('xla'), q, k, k, q, mask), seq)


def test_a_network_for_cuda_has_no_mask(for_cuda):
    params, shape = jax.eval_shape(lambda: tiny.make_params()[0]), (20, 28, 3)
    text = lambda kind: for_cuda(with_attention(kind, shape, dtype='bfloat16'), params)
    found, plain = text('cudnn'), text('xla')
    assert set(re.findall(r'@(__cudnn\$\w+)', found)) == set(CALLS)
    for tokens in (5 * 7, 5 * 7 + tiny.CAPTION):  # alone, and with the caption: odd, and made even
        assert score_matrices(plain, tokens)
        assert not score_matrices(found, tokens) | score_matrices(found, tokens + 1)
    assert 'stablehlo.sort' not in found  # nor do keys move so that padding comes last


# --- A mesh, and the compiler for it ---


def test_eight_devices_do_what_one_does():
    assert 'all checks passed' in tiny.run_on_devices(__file__, 8)


def check_mesh():
    """What the subprocess runs: 2 x 2 rows' shards, two heads' shards."""
    mesh = make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2})
    inputs = make(4, 100, 4, 2, 24)
    place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    spread = [place(x, HEADS) for x in inputs]
    for kind, padding in (('splash', lengths(100, 30, 0, -50, seq=100)), ('splash', None),
                          ('cudnn', lengths(100, 30, 0, 50, seq=100))):
        attend = functools.partial(attention.attend, kind=kind, interpret=True)
        one = jax.jit(functools.partial(everything, attend=attend))(*inputs, padding)
        eight = jax.jit(functools.partial(everything, attend=functools.partial(attend, mesh=mesh)))(
            *spread, None if padding is None else place(padding, ROWS))
        for x in eight.values():
            assert x.sharding.is_equivalent_to(NamedSharding(mesh, HEADS), 4), x.sharding
        host = lambda tree: jax.tree.map(np.asarray, tree)
        check_close(host(eight), host(one), 1e-5)
    print('all checks passed')


TPU_SHAPE = 4, 4096 + 256, 24, 8, 96  # Lumina-Image-2.0 at 1024 px, two images a pair of chips


@pytest.mark.tpu_compiler
@pytest.mark.skipif(not importlib.util.find_spec('libtpu'), reason='libtpu is not installed')
def test_the_tpu_compiler_needs_no_score_matrix():
    out = tiny.run_on_devices(__file__, 1, 'tpu')
    temporaries = int(re.search(r'temporaries: (\d+) bytes', out)[1])
    batch, seq, heads, *_ = TPU_SHAPE
    scores = (batch // 2) * (heads // 2) * seq * seq * 4  # of one chip, fp32
    assert temporaries < scores / 20, (temporaries, scores)


def compile_for_tpu(kind='splash'):
    """What the subprocess runs: value and gradient, ahead of time, for four chips of a v5e."""
    # Nobody to ask where we are, and no chip that two processes could fight over.
    os.environ.update(TPU_SKIP_MDS_QUERY='1', ALLOW_MULTIPLE_LIBTPU_LOAD='1')
    jax.config.update('jax_disable_most_optimizations', False)
    from jax.experimental import topologies

    chips = topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x2').devices
    mesh = make_mesh({'fsdp': 2, 'tensor': 2}, chips)
    assert set(mesh.axis_types) == {AxisType.Auto}
    batch, seq, heads, kv_heads, dim = TPU_SHAPE

    def abstract(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    q, k = (abstract((batch, seq, n, dim), jnp.bfloat16, HEADS) for n in (heads, kv_heads))
    mask = abstract((batch, seq), bool, ROWS)
    attend = functools.partial(attention.attend, kind=kind, mesh=mesh)
    step = jax.jit(functools.partial(everything, attend=attend))
    memory = step.lower(q, k, k, q, mask).compile().memory_analysis()
    print(f'temporaries: {memory.temp_size_in_bytes} bytes')


if __name__ == '__main__':
    if sys.argv[1:2] == ['tpu']:
        compile_for_tpu(*sys.argv[2:])
    else:
        check_mesh()
