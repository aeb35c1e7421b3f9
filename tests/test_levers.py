"""Levers that trade memory for time or bits: each does what it says, and leaves the rest alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from ddmd_jax.config.fields import OPTIMISER
from ddmd_jax.families.base import kernels_in
from ddmd_jax.families.emoji import teacher as emoji
from ddmd_jax.parallel import sharding
from ddmd_jax.train.optim import learning_rate, make_optimizer

MESH = sharding.make_mesh({}, jax.devices()[:1])
TX = optax.sgd(0.1, momentum=0.9)  # Adam would blow up rounding where a gradient is near 0


def two_rounds(**changes):
    """State after two rounds of both updates, and the last round's metrics."""
    spec, program, frozen = tiny.build_run(tiny.small_network, tiny.small_params(), TX, MESH,
                                           **changes)
    state, batch = spec.create(), tiny.make_batch(4)
    for _ in range(2):
        state, _ = program.critic(frozen, state, batch)
        state, metrics, *_ = program.generator(frozen, state, batch)
    return state, metrics, frozen


def close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(
        np.asarray(x), np.asarray(y), rtol=1e-4, atol=1e-6), a, b)


@pytest.fixture(scope='module')
def plain():
    return two_rounds()


@pytest.mark.parametrize('schedule', ['decoupled_hybrid', 'coupled_shared'])
def test_passes_apart_are_passes_together(schedule):
    """Three passes and, where levels are shared, two."""
    a, b = (two_rounds(recipe=tiny.make_recipe(schedule), teacher_passes=passes)
            for passes in ('together', 'apart'))
    close(dataclasses.asdict(a[0]), dataclasses.asdict(b[0]))
    close(a[1], b[1])


def test_passes_apart_are_one_program_run_thrice():
    """A loop around one pass, not a batch of three: that is what saves the memory."""
    def rows(passes):
        seen = []
        def spy(params, x_t, t, cond):
            seen.append(x_t.shape[0])
            return tiny.small_network(params, x_t, t, cond)
        spec, program, frozen = tiny.build_run(spy, tiny.small_params(), TX, MESH,
                                               teacher_passes=passes)
        program.generator.lower(frozen, spec.targets, tiny.make_batch(4))
        return max(seen)
    assert (rows('together'), rows('apart')) == (12, 4)


@pytest.mark.parametrize('offload', [('ema',), ('teacher',), ('ema', 'teacher')], ids=str)
def test_what_is_offloaded_stays_in_host_memory_and_computes_the_same(
        plain, offload):
    state, metrics, frozen = two_rounds(offload=offload)
    kinds = lambda tree: {x.sharding.memory_kind for x in jax.tree.leaves(tree)}
    assert kinds(state.ema) == {'pinned_host' if 'ema' in offload else 'device'}
    assert kinds(frozen.teacher) == {'pinned_host' if 'teacher' in offload else 'device'}
    assert kinds((state.student, state.critic, state.student_opt, state.critic_opt)) == {'device'}
    close(dataclasses.asdict(state), dataclasses.asdict(plain[0]))
    close(metrics, plain[1])


def test_bf16_kernels_of_a_bf16_teacher_predict_the_same_bits(params):
    model = {**tiny.MODEL, 'denoiser': tiny.MODEL['denoiser'] | {'dtype': 'bfloat16'}}
    predict = jax.jit(emoji.make_denoiser(model))
    halves = kernels_in(params[0], 'bfloat16')
    kernel = halves['layers']['attn']['to_q']['kernel']
    assert kernel.dtype == jnp.bfloat16 and halves['x_embedder']['bias'].dtype == jnp.float32
    x = jax.random.normal(jax.random.key(0), (4, *tiny.SHAPE))
    at = (x, jnp.linspace(0.1, 0.9, 4), tiny.make_cond(4))
    np.testing.assert_array_equal(predict(params[0], *at), predict(halves, *at))


def test_only_the_first_moment_is_kept_in_bf16():
    """And the update it gives is AdamW's to bf16's three digits."""
    cfg, params = dict(tiny.load_config('emoji').optim.student), tiny.small_params()[1]
    grads = jax.tree.map(lambda x: 0.1 * x, params)
    updates = {}
    for dtype in ('float32', 'bfloat16'):
        tx = make_optimizer(cfg | {'mu_dtype': dtype}, 10)
        updates[dtype], opt = jax.jit(tx.update)(grads, tx.init(params), params)
        adam = next(s for s in jax.tree.leaves(opt, is_leaf=lambda s: hasattr(s, 'mu'))
                    if hasattr(s, 'mu'))
        assert {x.dtype.name for x in jax.tree.leaves(adam.mu)} == {dtype}
        assert {x.dtype.name for x in jax.tree.leaves(adam.nu)} == {'float32'}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-9),
                 updates['float32'], updates['bfloat16'])


@pytest.mark.parametrize('warmup', [0, 100, 1000, 1500])
@pytest.mark.parametrize('share', [0.2, 1.0])
def test_a_rate_that_decays_ends_at_0(warmup, share):
    """Also where warm-up leaves less of the run than the decay asks for."""
    rate = learning_rate({'warmup': warmup, 'decay': share, 'lr': 1.0}, 1000)
    found = np.asarray([float(rate(count)) for count in range(0, 1001, 50)])
    peak = found.argmax()
    assert (np.diff(found)[:peak] >= 0).all() and (np.diff(found)[peak:] <= 0).all()
    assert found[-1] == 0 if warmup < 1000 else found[-1] > 0.6


@pytest.fixture
def muon():
    values = {f.path: f.default for f in OPTIMISER}
    return make_optimizer(values | {'name': 'muon', 'lr': 1e-3, 'muon_lr': 1e-2}, 10)


def test_muon_makes_every_layers_matrix_orthogonal(muon):
    """Each layer's kernel of a stack by itself; what is no such kernel is AdamW's."""
    shapes = {'layers': {'to_q': {'kernel': (3, 8, 5), 'lora_A': (3, 8, 2), 'lora_B': (3, 2, 5)},
                         'norm': {'weight': (3, 8)}},
              'out': {'kernel': (8, 4)}}
    grads = jax.tree.map(lambda shape: jax.random.normal(jax.random.key(1), shape), shapes,
                         is_leaf=lambda x: isinstance(x, tuple))
    params = jax.tree.map(jnp.zeros_like, grads)
    updates, _ = jax.jit(muon.update)(grads, muon.init(params), params)
    for matrices in updates['layers']['to_q'].values():
        # Newton and Schulz's five steps leave singular values between .6 and 1.3 of the rate.
        wide = max(1.0, matrices.shape[-1] / matrices.shape[-2]) ** 0.5  # as Muon scales these
        found = np.linalg.svd(np.asarray(matrices))[1] / 1e-2 / wide
        assert found.min() > .5 and found.max() < 1.4
    for leaf in (updates['out']['kernel'], updates['layers']['norm']['weight']):
        assert np.ptp(np.abs(np.asarray(leaf))) < 1e-6  # Adam's first step: the sign, times a rate
