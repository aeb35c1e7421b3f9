"""What a compiled program costs: counts by hand against the reader's, on CPU's text and TPU's.

``python tests/test_planner_hlo.py sharded`` with eight host devices runs the collectives by
hand; ``... tpu`` compiles for a TPU topology, which needs libtpu and no TPU.
"""

import importlib.util
import json
import re
import sys
import textwrap

import jax
import jax.numpy as jnp
import pytest
import tiny
from hypothesis import given, strategies as hs
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from ddmd_jax.planner import chips, costs, hlo, repeats

BF16 = jnp.bfloat16


def arg(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def text_of(fn, *args):
    return jax.jit(fn).lower(*args).compile().as_text()


def module_of(text):
    """Module of hand-written computations, the last of them ENTRY."""
    return hlo.parse('HloModule written, num_partitions=16\n\n' + textwrap.dedent(text))


def without_trip_counts(text):
    """As TPU writes it."""
    return re.sub(r'"known_trip_count":\{"n":"\d+"\}', '"nothing":"1"', text)


# --- FLOPs and HBM traffic of programs compiled here ---


def test_matmul():
    found = costs.summary(text_of(lambda x, y: x @ y, arg(64, 32), arg(32, 48)))
    assert found.flops == 2 * 64 * 32 * 48
    assert found.hbm_bytes == 4 * (64 * 32 + 32 * 48 + 64 * 48)
    assert found.collective_bytes == dict.fromkeys(hlo.COLLECTIVES, 0)
    assert not (found.pallas or found.unknown_loops or found.branches)


def test_batched_and_transposed_products():
    dots = lambda q, k: jnp.einsum('bshd,bthd->bhst', q, k)
    assert costs.summary(text_of(dots, arg(2, 8, 3, 16), arg(2, 9, 3, 16))).flops == (
        2 * (2 * 3 * 8 * 9) * 16)


def scanned(length):
    return lambda x, w: jax.lax.scan(lambda h, _: (jnp.tanh(h @ w), None), x, None, length)[0]


@pytest.mark.parametrize('edit', [str, without_trip_counts], ids=['known', 'derived'])
def test_a_scan_counts_every_trip(edit):
    text = edit(text_of(scanned(7), arg(64, 32), arg(32, 32)))
    assert costs.summary(text).flops == 7 * 2 * 64 * 32 * 32
    assert ('known_trip_count' in text) == (edit is str)


@pytest.mark.parametrize('edit', [str, without_trip_counts], ids=['known', 'derived'])
def test_nested_scans_multiply(edit):
    inner = scanned(5)
    fn = lambda x, w: jax.lax.scan(lambda h, _: (inner(h, w), None), x, None, 3)[0]
    module = hlo.parse(edit(text_of(fn, arg(64, 32), arg(32, 32))))
    assert costs.flops(module) == 15 * 2 * 64 * 32 * 32
    # the inner condition: once too often
    assert costs.repeats_in(module).counts.most_common(1)[0][1] == 3 * 6


def test_a_loop_that_depends_on_data_is_reported():
    fn = lambda x: jax.lax.while_loop(lambda c: c.sum() < 5, lambda c: c @ c, x)
    found = costs.summary(text_of(fn, arg(32, 32)))
    assert len(found.unknown_loops) == 1
    assert found.flops == 2 * 32**3


def mlp_loss(weights, x):
    """Mean square of a residual MLP over stacked ``(w_in [L, D, F], w_out [L, F, D])``."""
    def layer(h, w):
        return h + jax.nn.gelu(h @ w[0].astype(h.dtype)) @ w[1].astype(h.dtype), None
    out = jax.lax.scan(jax.checkpoint(layer), x, weights)[0]
    return jnp.mean(out.astype(jnp.float32)**2)


def mlp_flops(layers, batch, dim, inner):
    """Of its gradient: 2 products forward, 4 backward, 1 again (nothing needs the second's)."""
    return layers * 7 * 2 * batch * dim * inner


def test_gradient_of_a_scanned_mlp_with_remat():
    layers, batch, dim, inner = 5, 16, 24, 40
    text = text_of(jax.grad(mlp_loss), (arg(layers, dim, inner), arg(layers, inner, dim)),
                   arg(batch, dim))
    assert costs.summary(text).flops == mlp_flops(layers, batch, dim, inner)


def conv(x, w, stride=1, padding='VALID', groups=1):
    return jax.lax.conv_general_dilated(
        x, w, (stride, stride), padding, dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        feature_group_count=groups)


@pytest.mark.parametrize('options, positions, channels', [
    ({}, (14 * 3)**2, 8),
    # At each of the two borders one output position has a tap in the padding.
    ({'padding': 'SAME'}, (16 * 3 - 2)**2, 8),
    ({'stride': 2}, (7 * 3)**2, 8),
    ({'groups': 4}, (14 * 3)**2, 2),
], ids=['valid', 'same', 'strided', 'grouped'])
def test_conv2d(options, positions, channels):
    text = text_of(lambda x, w: conv(x, w, **options), arg(2, 16, 16, 8), arg(3, 3, channels, 16))
    assert costs.summary(text).flops == 2 * 2 * positions * channels * 16


def test_gradients_of_a_strided_convolution_cost_what_it_costs():
    """Holes of the dilated convolutions, three quarters of their taps, do not count."""
    loss = lambda x, w: (conv(x, w, stride=2)**2).sum()
    text = text_of(jax.grad(loss, (0, 1)), arg(2, 17, 17, 8), arg(3, 3, 8, 16))
    assert costs.summary(text).flops == 3 * 2 * 2 * (8 * 3)**2 * 8 * 16


def test_a_conditional_counts_its_dearer_branch():
    fn = lambda p, x: jax.lax.cond(p, lambda x: x @ x @ x, lambda x: x @ x, x)
    found = costs.summary(text_of(fn, arg(dtype=bool), arg(32, 32)))
    assert found.flops == 2 * 2 * 32**3
    assert len(found.branches) == 1


def test_a_scan_reads_slices_of_its_inputs_and_writes_slices_of_its_outputs():
    """Whole arrays, 100 times, would be 100 times more."""
    layers, dim = 100, 64
    fn = lambda x: jax.lax.scan(lambda c, row: (c, jnp.sin(row)), 0, x)[1]
    found = costs.summary(text_of(fn, arg(layers, dim, dim)))
    assert 2 * 4 * layers * dim**2 <= found.hbm_bytes < 8 * 4 * layers * dim**2


# --- Spellings of the TPU backend ---


@pytest.mark.parametrize('text, bytes_, hbm', [
    ('bf16[256,512]{1,0:T(8,128)(2,1)}', 256 * 512 * 2, 256 * 512 * 2),
    ('bf16[10,96]{1,0:T(8,128)(2,1)}', 10 * 96 * 2, 16 * 128 * 2),
    ('bf16[10,96]{0,1:T(8,128)(2,1)}', 10 * 96 * 2, 96 * 128 * 2),  # the other way round
    ('f32[3,10,96]{2,1,0:T(8,128)S(1)}', 3 * 10 * 96 * 4, 0),  # in VMEM
    ('f32[]{:T(128)}', 4, 512),
    ('f32[4,4]', 64, 64),
    ('pred[7]{0}', 7, 7),
    ('s4[7]{0}', 4, 4),
    ('f8e4m3fn[16]{0}', 16, 16),
    ('c64[2]{0}', 16, 16),
    ('token[]', 0, 0),
])
def test_shapes(text, bytes_, hbm):
    root = module_of(f'ENTRY main {{\n  ROOT a = {text} parameter(0)\n}}').entry.root
    assert (root.shape.bytes, root.shape.hbm) == (bytes_, hbm)


def test_tuples_comments_and_operands_with_shapes():
    root = module_of('''\
        ENTRY %main (a: f32[2]) -> ((f32[2], s32[]), f32[2]) {
          %a.1 = f32[2]{0} parameter(0), sharding={devices=[2,1]<=[2]}, metadata={op_name="x)"}
          %b = s32[]{:T(128)} constant(-3)
          %c = (f32[2]{0}, /*index=1*/s32[]) tuple(f32[2]{0} %a.1, s32[] %b)
          ROOT %d = ((f32[2]{0}, s32[]), f32[2]{0}) tuple(%c, /*index=1*/%a.1)
        }''').entry.root
    assert root.operands == ('c', 'a.1')
    assert [s.dims for s in hlo.leaves(root.shape)] == [(2,), (), (2,)]
    assert root.shapes[0][1] == hlo.Shape('s32', (), (), ())
    assert module_of('ENTRY m {\n ROOT a = f32[] parameter(0)\n}').entry.name == 'm'


@pytest.mark.parametrize('shapes, attributes, want', [
    # A plain product; a product of batches, which stand in the window; a grouped convolution.
    ('bf16[256,2048] bf16[256,512] bf16[512,2048]', 'dim_labels=bf_io->bf', 256 * 2048 * 512),
    ('bf16[4,8,512,512] bf16[4,512,8,64] bf16[4,512,8,64]',
     'window={size=4x8 stride=3x7 lhs_dilate=4x8}, dim_labels=0b1f_0o1i->01bf',
     4 * 8 * 512 * 512 * 64),
    ('bf16[8,64,64,4,64] bf16[8,64,64,4,32] bf16[3,3,32,4,64]',
     'window={size=3x3x4 stride=1x1x3 pad=1_1x1_1x0_0 lhs_dilate=1x1x4}, '
     'dim_labels=b012f_01i2o->b012f', 8 * (64 * 3 - 2)**2 * 4 * 64 * 32),
    # One step of a "collective matmul": two blocks of the contracted axis in the window.
    ('bf16[4096,16384,1] bf16[4096,2,1024] bf16[2,1024,16384]',
     'window={size=2}, dim_labels=b0f_0io->bf0', 4096 * 16384 * 2048),
])
def test_products_as_convolutions(shapes, attributes, want):
    out, a, b = shapes.split()
    module = module_of(f'''\
        ENTRY main {{
          a = {a} parameter(0)
          b = {b} parameter(1)
          ROOT c = {out} convolution(a, b), {attributes}
        }}''')
    assert costs.flops(module) == 2 * want


LOOP = '''\
body {
  p = (s32[], f32[8,8], s32[]) parameter(0)
  i = s32[] get-tuple-element(p), index=0
  x = f32[8,8] get-tuple-element(p), index=1
  n = s32[] get-tuple-element(p), index=2
  one = s32[] constant(STEP)
  j = s32[] add(i, one)
  y = f32[8,8] convolution(x, x), dim_labels=bf_io->bf
  ROOT out = (s32[], f32[8,8], s32[]) tuple(j, y, n)
}
less {
  a = s32[] parameter(0)
  b = s32[] parameter(1)
  ROOT c = pred[] compare(a, b), direction=DIRECTION
}
condition {
  p = (s32[], f32[8,8], s32[]) parameter(0)
  i = s32[]{:T(128)} get-tuple-element(p), index=0
  n = s32[] get-tuple-element(p), index=2
  ROOT go = pred[] fusion(i, n), kind=kLoop, calls=less
}
ENTRY main {
  x = f32[8,8] parameter(0)
  k = s32[] parameter(1)
  zero = s32[] constant(START)
  i = s32[]{:T(128)S(6)} copy(zero)
  n = s32[] constant(20)
  t = (s32[], f32[8,8], s32[]) tuple(i, x, LIMIT)
  ROOT w = (s32[], f32[8,8], s32[]) while(t), condition=condition, body=body CONFIG
}
'''


OUTER = '''\
outer {
  p = (s32[], f32[8,8], s32[]) parameter(0)
  i = s32[] get-tuple-element(p), index=0
  x = f32[8,8] get-tuple-element(p), index=1
  n = s32[] get-tuple-element(p), index=2
  one = s32[] constant(1)
  j = s32[] add(i, one)
  t = (s32[], f32[8,8], s32[]) tuple(one, x, INNER)
  w = (s32[], f32[8,8], s32[]) while(t), condition=condition, body=body
  y = f32[8,8] get-tuple-element(w), index=1
  ROOT out = (s32[], f32[8,8], s32[]) tuple(j, y, n)
}
ENTRY'''


def loop(text=LOOP, start=0, step=1, direction='LT', limit='n', config=''):
    edits = {'START': start, 'STEP': step, 'DIRECTION': direction, 'LIMIT': limit,
             'CONFIG': config}
    for word, value in edits.items():
        text = text.replace(word, str(value))
    return module_of(text)


@pytest.mark.parametrize('options, trips', [
    ({}, 20), ({'start': 3}, 17), ({'step': 3}, 7), ({'direction': 'LE'}, 21),
    ({'start': 30}, 0), ({'start': 25, 'step': -1, 'direction': 'GT'}, 5),
    ({'config': ', backend_config={"known_trip_count":{"n":"9"}}'}, 9),
])
def test_trip_counts(options, trips):
    module = loop(**options)
    assert costs.flops(module) == trips * 2 * 8**3
    assert not costs.repeats_in(module).unknown_loops


@pytest.mark.parametrize('inner, trips, unknown', [('n', 20 * 19, []), ('j', 20, ['w'])])
def test_an_inner_loop_knows_what_the_outer_one_hands_on_unchanged(inner, trips, unknown):
    text = LOOP.replace('body=body CONFIG', 'body=outer').replace('ENTRY', OUTER)
    module = loop(text.replace('INNER', inner))
    assert costs.flops(module) == trips * 2 * 8**3
    assert costs.repeats_in(module).unknown_loops == unknown


@pytest.mark.parametrize('options', [{'limit': 'k'}, {'step': 0}], ids=['argument', 'endless'])
def test_unknown_trip_counts(options, monkeypatch):
    monkeypatch.setattr(repeats, 'MAX_TRIPS', 1000)
    module = loop(**options)
    assert costs.repeats_in(module).unknown_loops == ['w']
    assert costs.flops(module) == 2 * 8**3


def test_computations_that_are_called():
    module = module_of('''\
        square {
          a = f32[8,8] parameter(0)
          ROOT b = f32[8,8] dot(a, a), lhs_contracting_dims={1}, rhs_contracting_dims={0}
        }
        ENTRY main {
          a = f32[8,8] parameter(0)
          b = f32[8,8] call(a), to_apply=square
          c = f32[8,8] custom-call(b), custom_call_target="x", called_computations={square}
          ROOT d = f32[8,8] map(c), dimensions={0,1}, to_apply=square
        }''')
    # not what is applied to each element
    assert costs.repeats_in(module).counts == {'main': 1, 'square': 2}
    assert costs.flops(module) == 2 * 2 * 8**3


@pytest.mark.parametrize('groups, size', [
    ('{{0,1},{2,3}}', 2), ('[2,8]<=[16]', 8), ('[4,4]<=[2,8]T(1,0)', 4), ('{}', 16),
    ("mesh['axis_0'=4,'axis_1'=2] {'axis_1'}", 2),
    ("mesh['axis_0'=4,'axis_1'=2] {'axis_0','axis_1'}", 8),
    ("mesh['axis_0'=4,'axis_1'=2] {'axis_0':(2)2}", 2),
    ("mesh['axis_0'=1,'axis_1'=4,'axis_2'=2], device_ids=([4,2]T(1,0)) {'axis_1'}", 4),
])
def test_replica_groups(groups, size):
    module = module_of(f'''\
        ENTRY main {{
          a = bf16[64,512]{{1,0:T(8,128)(2,1)}} parameter(0)
          ROOT b = bf16[64,512]{{1,0}} all-to-all(a), replica_groups={groups}, dimensions={{0}}
        }}''')
    (found,) = costs.collectives(module)
    assert (found.group, found.sent) == (size, 64 * 512 * 2 * (size - 1) // size)


def test_asynchronous_pairs_count_once():
    groups = 'channel_id=1, replica_groups=[4,4]<=[16]'
    module = module_of(f'''\
        add {{
          x = f32[] parameter(0)
          y = f32[] parameter(1)
          ROOT z = f32[] add(x, y)
        }}
        wrapped {{
          p = f32[64]{{0}} parameter(0)
          ROOT q = f32[16]{{0}} reduce-scatter(p), {groups}, dimensions={{0}}, to_apply=add
        }}
        ENTRY main {{
          a = f32[64]{{0}} parameter(0)
          b = (f32[64]{{0}}, f32[256]{{0}}) all-gather-start(a), {groups}, dimensions={{0}}
          c = f32[256]{{0}} all-gather-done(b)
          d = (f32[64]{{0}}, f32[256]{{0}}) all-reduce-start(a, c), {groups}, to_apply=add
          e = (f32[64]{{0}}, f32[256]{{0}}) all-reduce-done(d)
          f = (f32[64]{{0}}, f32[64]{{0}}, u32[], u32[]) collective-permute-start(a), \
channel_id=2, source_target_pairs={{{{0,1}},{{1,0}}}}
          g = f32[64]{{0}} collective-permute-done(f)
          h = ((f32[64]{{0}}), f32[16]{{0}}, s32[]) async-start(g), calls=wrapped
          ROOT i = f32[16]{{0}} async-done(h)
        }}''')
    assert costs.collective_bytes(module) == {
        'all-gather': 3 * 256, 'all-reduce': 2 * 1280 * 3 // 4, 'reduce-scatter': 256 * 3 // 4,
        'all-to-all': 0, 'collective-permute': 256}
    assert costs.waited_bytes(module) == 0
    # Each reads what it is given and writes its result; the `-done` halves do nothing.
    assert costs.hbm_bytes(module) == (256 + 1024) + 2 * 1280 + 2 * 256 + (256 + 64)


# One all-gather over three fusions, as libtpu writes it, in a branch of a conditional.
CHAIN = '''\
%first (p: bf16[8,128]) -> (bf16[8,128], bf16[32,128], u32[]) {
  %p = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %ag.1 = bf16[32,128]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=6, GROUPS
  ROOT %c = (bf16[8,128]{1,0}, bf16[32,128]{1,0}, u32[]) custom-call(%ag.1), \
custom_call_target="AsyncCollectiveStart"
}
%product (a: bf16[128,128], p: bf16[8,128], o: bf16[32,128]) -> (bf16[128,128], bf16[32,128]) {
  %a = bf16[128,128]{1,0:T(8,128)(2,1)} parameter(0)
  %p = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(1)
  %o = bf16[32,128]{1,0:T(8,128)(2,1)} parameter(2)
  %y = bf16[128,128]{1,0:T(8,128)(2,1)} convolution(%a, %a), dim_labels=bf_io->bf
  %ag.2 = bf16[32,128]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=6, GROUPS
  ROOT %t = (bf16[128,128]{1,0}, bf16[32,128]{1,0}, bf16[32,128]{1,0}) tuple(%y, %ag.2, %o)
}
%last (p: bf16[8,128], o: bf16[32,128]) -> bf16[32,128] {
  %p = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %o = bf16[32,128]{1,0:T(8,128)(2,1)} parameter(1)
  %ag.3 = bf16[32,128]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=6, GROUPS
  ROOT %c = bf16[32,128]{1,0:T(8,128)(2,1)} custom-call(%p, %o, %ag.3), \
custom_call_target="AsyncCollectiveDone"
}
%branch (t: (bf16[8,128], bf16[128,128])) -> bf16[32,128] {
  %t = (bf16[8,128]{1,0}, bf16[128,128]{1,0}) parameter(0)
  %p = bf16[8,128]{1,0} get-tuple-element(%t), index=0
  %a = bf16[128,128]{1,0} get-tuple-element(%t), index=1
  %s = (bf16[8,128]{1,0}, bf16[32,128]{1,0}, u32[]) fusion(%p), kind=kCustom, calls=%first
  %o = bf16[32,128]{1,0} get-tuple-element(%s), index=1
  %m = (bf16[128,128]{1,0:T(8,128)(2,1)}, bf16[32,128]{1,0:T(8,128)(2,1)}, \
bf16[32,128]{1,0:T(8,128)(2,1)}) fusion(%a, %p, %o), kind=kCustom, calls=%product
  %n = bf16[32,128]{1,0} get-tuple-element(%m), index=1
  ROOT %d = bf16[32,128]{1,0:T(8,128)(2,1)} fusion(%p, %n), kind=kCustom, calls=%last
}
%nothing (t: (bf16[8,128], bf16[128,128])) -> bf16[32,128] {
  %t = (bf16[8,128]{1,0}, bf16[128,128]{1,0}) parameter(0)
  ROOT %z = bf16[32,128]{1,0} constant({...})
}
ENTRY %main (k: s32[], p: bf16[8,128], a: bf16[128,128]) -> bf16[32,128] {
  %k = s32[] parameter(0)
  %p = bf16[8,128]{1,0} parameter(1)
  %a = bf16[128,128]{1,0} parameter(2)
  %t = (bf16[8,128]{1,0}, bf16[128,128]{1,0}) tuple(%p, %a)
  ROOT %r = bf16[32,128]{1,0} conditional(%k, %t, %t), branch_computations={%nothing, %branch}
}
'''.replace('GROUPS', "replica_groups=mesh['axis_0'=4,'axis_1'=4] {'axis_1'}, dimensions={0}")


def test_a_collective_spread_over_fusions_counts_once():
    module = module_of(CHAIN)
    assert costs.repeats_in(module).branches == {'r': 'branch'}
    assert [(c.name, c.kind, c.count, c.sent) for c in costs.collectives(module)] == [
        ('ag.1', 'all-gather', 1, 3 * 8 * 128 * 2)]
    assert costs.waited_bytes(module) == 0
    assert costs.flops(module) == 2 * 128**3
    # The gather reads its part and writes the whole, once; the product reads and writes its own.
    assert costs.hbm_bytes(module) == 2 * ((8 + 32) * 128 + 2 * 128 * 128)


def test_the_fusion_of_an_all_reduce_and_its_slice_is_a_reduce_scatter():
    module = module_of('''\
        %all-reduce-scatter (p: bf16[512,256]) -> bf16[128,256] {
          %p = bf16[512,256]{1,0} parameter(0)
          %r = bf16[512,256]{1,0} all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%add
          %i = u32[] partition-id()
          %z = u32[] constant(0)
          ROOT %s = bf16[128,256]{1,0} dynamic-slice(%r, %i, %z), dynamic_slice_sizes={128,256}
        }
        ENTRY %main (p: bf16[512,256]) -> bf16[128,256] {
          %p = bf16[512,256]{1,0} parameter(0)
          ROOT %f = bf16[128,256]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter
        }''')
    want = dict.fromkeys(hlo.COLLECTIVES, 0) | {'reduce-scatter': 512 * 256 * 2 * 3 // 4}
    assert costs.collective_bytes(module) == want
    assert costs.waited_bytes(module) == want['reduce-scatter']
    assert costs.hbm_bytes(module) == 2 * 256 * (512 + 128)


def test_a_reduce_scatter_of_several_arrays():
    module = module_of('''\
        %all-reduce-scatter (p: f32[64], q: f32[32]) -> (f32[16], f32[8]) {
          %p = f32[64]{0} parameter(0)
          %q = f32[32]{0} parameter(1)
          %r = (f32[64]{0}, f32[32]{0}) all-reduce(%p, %q), replica_groups=[4,4]<=[16]
          %i = u32[] partition-id()
          %a = f32[64]{0} get-tuple-element(%r), index=0
          %b = f32[32]{0} get-tuple-element(%r), index=1
          %c = f32[16]{0} dynamic-slice(%a, %i), dynamic_slice_sizes={16}
          %d = f32[8]{0} dynamic-slice(%b, %i), dynamic_slice_sizes={8}
          ROOT %t = (f32[16]{0}, f32[8]{0}) tuple(%c, %d)
        }
        ENTRY %main (p: f32[64], q: f32[32]) -> (f32[16], f32[8]) {
          %p = f32[64]{0} parameter(0)
          %q = f32[32]{0} parameter(1)
          ROOT %f = (f32[16]{0}, f32[8]{0}) fusion(%p, %q), calls=%all-reduce-scatter
        }''')
    assert [(c.kind, c.sent) for c in costs.collectives(module)] == [
        ('reduce-scatter', (64 + 32) * 4 * 3 // 4)]
    assert costs.hbm_bytes(module) == 4 * (64 + 32 + 16 + 8)


SLICING = '''\
%view (p: f32[6,8,128]) -> f32[6,1024] {
  %p = f32[6,8,128]{2,1,0} parameter(0)
  ROOT %b = f32[6,1024]{1,0} bitcast(%p)
}
%fused (p: f32[6,8,128], i: s32[], u: f32[6,1024]) -> (f32[1,1024], f32[6,1024]) {
  %p = f32[6,8,128]{2,1,0} parameter(0)
  %i = s32[]{:S(6)} parameter(1)
  %u = f32[6,1024]{1,0} parameter(2)
  %z = s32[] constant(0)
  %v = f32[6,1024]{1,0} fusion(%p), kind=kLoop, calls=%view
  %s = f32[1,1024]{1,0} dynamic-slice(%v, %i, %z), dynamic_slice_sizes={1,1024}
  %n = f32[1,1024]{1,0} ROW
  %w = f32[6,1024]{1,0} dynamic-update-slice(%u, %n, %i, %z)
  %m = f32[6,1024]{1,0} OUT
  ROOT %t = (f32[1,1024]{1,0}, f32[6,1024]{1,0}) tuple(%n, %m)
}
ENTRY %main (p: f32[6,8,128], u: f32[6,1024], i: s32[]) -> (f32[1,1024], f32[6,1024]) {
  %p = f32[6,8,128]{2,1,0} parameter(0)
  %u = f32[6,1024]{1,0} parameter(1)
  %i = s32[]{:S(6)} parameter(2)
  ROOT %f = (f32[1,1024]{1,0}, f32[6,1024]{1,0}) fusion(%p, %i, %u), kind=kLoop, calls=%fused
}
'''


@pytest.mark.parametrize('row, out, rows', [
    ('negate(%s)', 'bitcast(%w)', 1 + 1 + 1),  # a row read, a row written, a row updated
    # Read as a whole elsewhere, it counts as a whole; so does an update that is used further.
    ('reduce(%v, %z), dimensions={0}', 'bitcast(%w)', 6 + 1 + 1),
    ('negate(%s)', 'negate(%w)', 1 + 6 + 1 + 6),
    # Two updates by one fusion are taken for a pass over the whole.
    ('negate(%s)', 'dynamic-update-slice(%w, %n, %z, %i)', 1 + 6 + 1 + 6),
])
def test_a_fusion_that_slices_reads_the_slice(row, out, rows):
    module = module_of(SLICING.replace('ROW', row).replace('OUT', out))
    assert costs.hbm_bytes(module) == 4 * 1024 * rows


def test_gather_scatter_and_copies_between_memories():
    module = module_of('''\
        ENTRY %main (t: f32[1000,128], i: s32[8], u: f32[8,128]) -> f32[1000,128] {
          %t = f32[1000,128]{1,0} parameter(0)
          %i = s32[8]{0:S(1)} parameter(1)
          %u = f32[8,128]{1,0} parameter(2)
          %g = f32[8,128]{1,0:S(1)} gather(%t, %i), slice_sizes={1,128}
          %c = (f32[8,128]{1,0:S(1)}, f32[8,128]{1,0}, u32[]{:S(2)}) copy-start(%u)
          %d = f32[8,128]{1,0:S(1)} copy-done(%c)
          %a = f32[8,128]{1,0:S(1)} add(%g, %d)
          %s = ((f32[1000,128]{1,0}), f32[4,128]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%t)
          %e = f32[4,128]{1,0:S(1)} slice-done(%s)
          ROOT %r = f32[1000,128]{1,0} scatter(%t, %i, %a), to_apply=%add
        }''')
    # Gather reads 8 rows, the copies 8 and 4, scatter reads and writes 8; the rest is VMEM.
    assert costs.hbm_bytes(module) == 4 * 128 * (8 + 8 + 4 + 2 * 8)


def test_pallas_calls():
    module = module_of('''\
        ENTRY %main (q: bf16[2,8]) -> (bf16[2,8], bf16[2,8]) {
          %q = bf16[2,8]{1,0} parameter(0)
          %flash.clone.3 = bf16[2,8]{1,0} custom-call(%q), custom_call_target="tpu_custom_call", \
        backend_config={"custom_call_config":{"body":"a\\"})b{","cost_estimate":{"flops":"640"}}}
          %splash.7 = bf16[2,8]{1,0} custom-call(%q, %q), custom_call_target="tpu_custom_call", \
        frontend_attributes={kernel_metadata={
        "xprof_metadata":"{\\"block_q\\": 128"
        }}, metadata={op_name="jit(g)/splash/pallas_call" stack_frame_id=5}
          ROOT %t = (bf16[2,8]{1,0}, bf16[2,8]{1,0}) tuple(%flash.clone.3, %splash.7)
        }''')
    q = hlo.Shape('bf16', (2, 8), (1, 0))
    assert costs.pallas_calls(module) == (costs.PallasCall('flash', 1, 640, (q,), (q,)),
                                        costs.PallasCall('splash', 1, None, (q, q), (q,)))
    assert costs.flops(module) == 640


# --- Kernels whose arithmetic is known ---


def splash(name, operands, results, config='{}'):
    """Module of one call of a kernel, as TPU writes it."""
    shapes = operands.split()
    lines = [f'a{n} = {shape} parameter({n})' for n, shape in enumerate(shapes)]
    given = ', '.join(f'a{n}' for n in range(len(shapes)))
    return module_of('ENTRY main {\n' + '\n'.join(lines) + f'''
          ROOT {name} = ({', '.join(results.split())}) custom-call({given}), \
custom_call_target="tpu_custom_call", backend_config={{"custom_call_config":{config}}}
        }}''')


# Four rows, 6 heads that share 2 of keys, 256 queries and 384 keys (in blocks of 128), 96 channels.
MHA = 's8[1,2,3] s8[1,2,3] bf16[4,6,256,96] bf16[4,2,384,96] bf16[4,2,384,96]'
SEGMENTS = ' s32[4,256,128] s32[4,8,384]'
BACKWARD = SEGMENTS + ' f32[4,6,8,256] bf16[4,6,256,96] f32[4,6,8,256]'
FORWARD_RESULTS = 'f32[4,256,128] f32[4,256,128] f32[4,256,96] bf16[4,6,256,96]'
GRADIENTS = 'f32[4,128,96] f32[4,128,96] KEYS bf16[4,2,384,96] bf16[4,2,384,96]'
PRODUCT = 2 * 4 * 6 * 256 * 384 * 96


@pytest.mark.parametrize('name, operands, results, want', [
    ('mha_fwd_no_residuals.5', MHA, FORWARD_RESULTS, 2 * PRODUCT),
    ('mha_fwd_segmented_residuals.clone.7', MHA + SEGMENTS,
     FORWARD_RESULTS + ' f32[4,6,256,128]', 2 * PRODUCT),
    # One row: vmap's axis is gone. In fp32 a product is still one.
    ('mha_fwd_no_residuals', 's8[1,2,3] s8[1,2,3] f32[6,256,96] f32[2,384,96] f32[2,384,96]',
     'f32[256,128] f32[256,128] f32[256,96] f32[6,256,96]', 2 * PRODUCT // 4),
    ('mqa_fwd_no_residuals', 's8[1,2,3] s8[1,2,3] s8[1,2,3] bf16[4,6,256,96] bf16[4,384,96] '
     'bf16[4,384,96]', FORWARD_RESULTS, 2 * PRODUCT),
    ('mha_fwd_no_residuals', MHA.removesuffix('96]') + '192]', FORWARD_RESULTS,
     PRODUCT + 2 * PRODUCT),  # values are twice as wide
    ('mha_dkv_segmented_no_residuals.3', MHA + BACKWARD,
     GRADIENTS.replace('KEYS', 'bf16[4,3,6,256,96]'), 5 * PRODUCT),  # fused: dq of three blocks
    ('mha_dkv_segmented_no_residuals.3', MHA + BACKWARD, GRADIENTS.replace('KEYS ', ''),
     4 * PRODUCT),
    ('mha_dq_segmented_no_residuals.3', MHA + BACKWARD, 'f32[4,256,96] bf16[4,6,256,96]',
     3 * PRODUCT),
    # Not known: channels before tokens, too few operands, another kernel.
    ('mha_fwd_no_residuals', MHA.replace('384,96', '96,384'), FORWARD_RESULTS, None),
    ('mha_fwd_no_residuals', 's8[1,2,3] bf16[4,6,256,96]', FORWARD_RESULTS, None),
    ('mha_sideways', MHA, FORWARD_RESULTS, None),
])
def test_splash_attention_counts_its_products(name, operands, results, want):
    module = splash('splash_' + name, operands, results)
    (call,) = costs.pallas_calls(module)
    assert (call.name, call.flops) == ('splash_' + name.split('.')[0], want)
    assert costs.flops(module) == (want or 0)


def test_an_estimate_of_its_own_wins():
    module = splash('splash_mha_fwd_no_residuals.5', MHA, FORWARD_RESULTS,
                    config='{"cost_estimate":{"flops":"640"}}')
    assert costs.pallas_calls(module)[0].flops == costs.flops(module) == 640


# --- Texts that are none ---


@pytest.mark.parametrize('text, words', [
    ('', 'no line starts with HloModule'),
    ('a program, but not this kind', 'no line starts with HloModule'),
    ('HloModule m\n', '0 ENTRY'),
    ('HloModule m\nENTRY a {\n ROOT b = f32[] parameter(0)\n', 'ends within computation a'),
    ('HloModule m\nENTRY a {\n}\n', 'a is empty'),
    ('HloModule m\nENTRY a {\n what is this\n}\n', "not an instruction: 'what is this'"),
    ('HloModule m\nENTRY a {\n b = what(c)\n}\n', 'not a shape'),
    ('HloModule m\nENTRY a {\n b = f32[2] add\n}\n', 'no opcode'),
    ('HloModule m\nENTRY a {\n b = f32[2] negate(c)\n}\n', 'operand c is not defined'),
    ('HloModule m\nENTRY a {\n b = f32[2] parameter(0)\n c = f32[2] fusion(b), calls=d\n}\n',
     'computation d is called'),
    ('HloModule m\nENTRY a {\n b = f32[2] parameter(0)\n'
     ' c = f32[2] convolution(b, b)\n}\n', 'c has no dim_labels'),
    ('HloModule m\nENTRY a {\n b = f32[] parameter(0)\n c = f32[2] dot(b), '
     'lhs_contracting_dims={3}\n}\n', 'unknown spelling'),
])
def test_garbage_is_a_value_error(text, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        costs.summary(text)


SLICED = SLICING.replace('ROW', 'negate(%s)').replace('OUT', 'bitcast(%w)')


@given(hs.data())
def test_damaged_text_is_read_or_refused(data):
    lines = ('HloModule m\n' + data.draw(hs.sampled_from([CHAIN, SLICED]))).splitlines()
    cut = data.draw(hs.integers(0, len(lines) - 1))
    kept = lines[cut][:data.draw(hs.integers(0, len(lines[cut])))]
    try:
        found = costs.summary('\n'.join([*lines[:cut], kept, *lines[cut + 1:]]))
    except ValueError:
        return
    assert found.flops >= 0 and found.hbm_bytes >= 0


# --- Collectives of a partitioned program, on eight devices of the host ---


def check_sharded():
    """Runs in a process of its own."""
    mesh = jax.make_mesh((4, 2), ('x', 'y'), axis_types=(AxisType.Auto,) * 2)
    put = lambda shape, *spec: jax.ShapeDtypeStruct(
        shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))
    costs_of = lambda fn, *args: costs.summary(text_of(fn, *args))
    none = dict.fromkeys(hlo.COLLECTIVES, 0)

    # The compiler's choice: weights in shards are gathered, a split contraction is reduced.
    found = costs_of(lambda x, w: x @ w, put((64, 32), 'x'), put((32, 48), None, 'y'))
    assert (found.flops, found.collective_bytes) == (2 * 16 * 32 * 24, none), found
    both = jax.jit(lambda x, w: x @ w, out_shardings=NamedSharding(mesh, P()))
    found = costs_of(both, put((64, 32), None, 'x'), put((32, 48), 'x', None))
    assert found.flops == 2 * 64 * 8 * 48, found
    assert found.collective_bytes == none | {'all-reduce': 2 * 64 * 48 * 4 * 3 // 4}, found
    gather = jax.jit(lambda x: x * 2, out_shardings=NamedSharding(mesh, P('y')))
    found = costs_of(gather, put((64, 32), ('y', 'x')))
    assert found.collective_bytes == none | {'all-gather': 32 * 32 * 4 * 3 // 4}, found

    # Each kind by hand, three times over.
    @jax.shard_map(mesh=mesh, in_specs=P('x', 'y'), out_specs=P('x', 'y'), check_vma=False)
    def program(x):  # [16, 16] on each device
        def body(x, _):
            y = jax.lax.all_gather(x, 'x', tiled=True)
            y = jax.lax.psum_scatter(jnp.sin(y), 'x', tiled=True)
            y = jax.lax.psum(jnp.sin(y), ('x', 'y'))
            y = jax.lax.all_to_all(jnp.sin(y), 'y', 1, 0, tiled=True)
            y = jax.lax.ppermute(jnp.sin(y), 'x', [(i, (i + 1) % 4) for i in range(4)])
            return jnp.sin(y).reshape(16, 16), None
        return jax.lax.scan(body, x, None, 3)[0]

    size = 16 * 16 * 4
    found = costs_of(program, put((64, 32), 'x', 'y'))
    assert found.collective_bytes == {
        'all-gather': 3 * size * 3, 'reduce-scatter': 3 * size * 3,
        'all-reduce': 3 * 2 * size * 7 // 8, 'all-to-all': 3 * size // 2,
        'collective-permute': 3 * size}, found
    print('all checks passed')


def test_collectives_of_partitioned_programs():
    assert 'all checks passed' in tiny.run_on_devices(__file__, 8, 'sharded')


# --- Chips ---


def test_the_table_of_chips():
    assert {name: (chip.hbm_bytes / 2**30, chip.peak_bf16_flops, chip.hbm_bandwidth,
                   chip.ici_bandwidth) for name, chip in chips.CHIPS.items()} == {
        'v4': (32, 275e12, 1.2e12, 300e9), 'v5e': (16, 197e12, 819e9, 200e9),
        'v5p': (95, 459e12, 2765e9, 600e9), 'v6e': (32, 918e12, 1638e9, 400e9)}
    for name, chip in chips.CHIPS.items():
        assert chip.name == name
        assert 8 * 2**30 <= chip.hbm_bytes <= 200 * 2**30
        assert 1e14 < chip.peak_bf16_flops < 1e16
        assert 5e11 < chip.hbm_bandwidth < 1e13
        assert 1e11 <= chip.ici_bandwidth < chip.hbm_bandwidth
        assert 'docs.cloud.google.com/tpu' in chip.source
        # A product needs hundreds of operations a byte to be bound by arithmetic.
        assert 100 < chip.peak_bf16_flops / chip.hbm_bandwidth < 1000


@pytest.mark.parametrize('topology, name', [
    ('v5e:4x4', 'v5e'), ('v4:2x2x1', 'v4'), ('v5p:2x2x2', 'v5p'), ('v6e:16x16', 'v6e'),
    ('v5litepod-16', 'v5e'), ('v6e-8', 'v6e'), ('v5p', 'v5p')])
def test_chip_for(topology, name):
    assert chips.chip_for(topology) is chips.CHIPS[name]


@pytest.mark.parametrize('topology', ['v9:2x2', '', 'h100'])
def test_chips_that_are_not_there(topology):
    with pytest.raises(ValueError, match='starts with one of v4, v5e, v5p, v6e'):
        chips.chip_for(topology)


@pytest.mark.parametrize('costs, want', [
    ((197e12, 819e6, 0), (1.0, 'compute')),
    ((197e12, 2 * 819e9, 0), (2.0, 'memory')),
    ((197e12, 819e9, 3 * 200e9), (3.0, 'network')),
])
def test_roofline(costs, want):
    assert chips.roofline(chips.CHIPS['v5e'], *costs) == want


# --- Programs compiled for a TPU ---

TPU_MLP = {'layers': 6, 'batch': 1024, 'dim': 512, 'inner': 2048}
TPU_CHIPS = 4


def print_tpu():
    """Costs of programs compiled for v5e:2x2, in a process of its own."""
    from jax.experimental import pallas as pl, topologies
    # Otherwise it is not the program that a TPU would run.
    jax.config.update('jax_disable_most_optimizations', False)
    topology = topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x2')
    mesh = jax.make_mesh((TPU_CHIPS,), ('fsdp',), axis_types=(AxisType.Auto,),
                         devices=topology.devices)
    put = lambda shape, dtype, *spec: jax.ShapeDtypeStruct(
        shape, dtype, sharding=NamedSharding(mesh, P(*spec)))
    layers, batch, dim, inner = TPU_MLP.values()
    weights = (put((layers, dim, inner), jnp.float32, None, 'fsdp'),
               put((layers, inner, dim), jnp.float32, None, None, 'fsdp'))
    step = lambda w, x: jax.tree.map(lambda a, g: a - 0.1 * g, w, jax.grad(mlp_loss)(w, x))
    text = text_of(step, weights, put((batch, dim), BF16, 'fsdp'))
    module = hlo.parse(text)

    dots = lambda q, k: jnp.einsum('bshd,bthd->bhst', q, k)
    q = put((4, 512, 8, 64), BF16)

    def kernel(x, y, out):
        out[...] = jnp.dot(x[...], y[...], preferred_element_type=jnp.float32)

    product = pl.pallas_call(
        kernel, jax.ShapeDtypeStruct((256, 256), jnp.float32), name='product',
        cost_estimate=pl.CostEstimate(flops=7, transcendentals=0, bytes_accessed=0))
    one = jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(
        topology.devices[0]))
    pallas = costs.pallas_calls(hlo.parse(text_of(product, one, one)))
    print('costs', json.dumps({
        'known': 'known_trip_count' in text, 'unknown': costs.repeats_in(module).unknown_loops,
        'flops': costs.flops(module), 'hbm': costs.hbm_bytes(module),
        'sums': costs.collective_bytes(module),
        'gathers': [(c.count, c.group, c.sent) for c in costs.collectives(module)
                    if c.kind == 'all-gather'],
        'dots': costs.summary(text_of(dots, q, q)).flops,
        'pallas': [(c.name, c.count, c.flops) for c in pallas]}))


@pytest.fixture(scope='module')
def tpu():
    if importlib.util.find_spec('libtpu') is None:
        pytest.skip('libtpu is not installed')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('TPU_SKIP_MDS_QUERY', '1')  # else it looks for a cloud machine's metadata
        patch.setenv('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')  # compiling takes no hold of a TPU
        out = tiny.run_on_devices(__file__, 1, 'tpu')
    return json.loads(re.search('^costs (.*)$', out, re.MULTILINE)[1])


@pytest.mark.tpu_compiler
def test_flops_of_a_program_for_tpu(tpu):
    layers, batch, dim, inner = TPU_MLP.values()
    want = mlp_flops(layers, batch // TPU_CHIPS, dim, inner)
    assert tpu['flops'] == pytest.approx(want, rel=0.02)
    assert tpu['dots'] == pytest.approx(2 * 4 * 8 * 512 * 512 * 64, rel=0.02)
    assert not tpu['unknown']


@pytest.mark.tpu_compiler
def test_collectives_of_a_program_for_tpu(tpu):
    """Two matrices a layer, gathered in bf16 forward and again backward; gradients reduced."""
    layers, _, dim, inner = TPU_MLP.values()
    matrix = dim * inner * 2 * (TPU_CHIPS - 1) // TPU_CHIPS
    assert {count for count, _, _ in tpu['gathers']} == {layers}
    assert {group for _, group, _ in tpu['gathers']} == {TPU_CHIPS}
    assert all(sent == pytest.approx(matrix, rel=0.1) for _, _, sent in tpu['gathers'])
    assert tpu['sums']['all-gather'] == pytest.approx(4 * layers * matrix, rel=0.1)
    # A gradient is scattered or, where the compiler finds no way to, reduced as a whole.
    reduced = tpu['sums']['reduce-scatter'] + tpu['sums']['all-reduce'] / 2
    assert reduced == pytest.approx(2 * layers * matrix, rel=0.1)


@pytest.mark.tpu_compiler
def test_hbm_traffic_of_a_program_for_tpu(tpu):
    """All of it fits into VMEM: weights are read twice, forward and to update, written once."""
    layers, batch, dim, inner = TPU_MLP.values()
    weights = 2 * layers * dim * inner * 4 // TPU_CHIPS
    assert weights * 2 <= tpu['hbm'] <= 1.1 * (weights * 3 + batch // TPU_CHIPS * dim * 2)


@pytest.mark.tpu_compiler
def test_a_pallas_kernel_for_tpu(tpu):
    assert tpu['pallas'] == [['product', 1, 7]]


if __name__ == '__main__':
    {'sharded': check_sharded, 'tpu': print_tpu}[sys.argv[1]]()
