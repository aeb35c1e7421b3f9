"""NextDiT and the caption encoder: shapes, masks, positions, and variants that must agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from ddmd_jax.families.emoji import teacher as emoji
from ddmd_jax.models import layers, nextdit
from ddmd_jax.models.nextdit import NextDiTConfig

BATCH, TIME = 2, 0.3


def variant(**changes):
    """The tiny model with two layers, so that a scan over them has something to scan."""
    return tiny.MODEL | {'denoiser': tiny.MODEL['denoiser'] | {'num_layers': 2} | changes}


@pytest.fixture(scope='module')
def deep():
    """The denoiser's parameters, none of them zero."""
    return tiny.random_params(variant(), seed=1)['denoiser']


@pytest.fixture(scope='module')
def run():
    """``run(params, x, cond, t)``: the clean prediction of the plain variant, compiled."""
    predict = jax.jit(emoji.make_denoiser(variant()))
    times = lambda t: jnp.broadcast_to(jnp.float32(t), (BATCH,))
    return lambda params, x, cond, t=TIME: np.asarray(predict(params, x, times(t), cond))


def picture(height=8, width=8, seed=0):
    return jax.random.normal(jax.random.key(seed), (BATCH, height, width, 3))


COND = tiny.make_cond(BATCH)  # row 0 has one padded token, row 1 none
X = picture()


def close(a, b, atol=2e-5):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=atol, rtol=1e-4)


def differs(a, b):
    """By more than rounding could explain."""
    return np.abs(np.asarray(a) - np.asarray(b)).max() > 1e-3


# --- Shapes and conventions ---


@pytest.mark.parametrize('height, width', [(8, 8), (8, 12)])
def test_shapes(deep, run, height, width):
    got = run(deep, picture(height, width), COND)
    assert got.shape == (BATCH, height, width, 3) and got.dtype == np.float32
    assert np.isfinite(got).all()


def test_patches_are_read_row_by_row():
    """Token (r, c) is the patch at row r, column c; channels run fastest, as in diffusers."""
    x = np.asarray(picture(8, 12))
    tokens = nextdit.patchify(x, 4)
    assert tokens.shape == (BATCH, 6, 48)
    np.testing.assert_array_equal(tokens[:, 1 * 3 + 2], x[:, 4:8, 8:12].reshape(BATCH, -1))
    np.testing.assert_array_equal(nextdit.unpatchify(tokens, (2, 3), 4), x)


def test_fresh_networks_predict_no_velocity(run):
    """The zeroed head: a teacher from scratch starts at v = 0, so x_hat is its input."""
    fresh = jax.jit(lambda: emoji.init_params(variant(), jax.random.key(0)))()
    np.testing.assert_array_equal(run(fresh['denoiser'], X, COND), X)


def test_every_example_has_its_own_time(deep, run):
    """All of a batch's times differ in training; a mix-up shows nowhere in inference."""
    early, late, both = (run(deep, X, COND, t) for t in (0.2, 0.7, (0.2, 0.7)))
    velocity = lambda x_hat, t: (x_hat - np.asarray(X)) / (1 - t)
    assert differs(velocity(early, 0.2), velocity(late, 0.7))
    close(both, np.stack([early[0], late[1]]), atol=1e-6)


def test_positions_matter(deep, run):
    """Without rotary positions, moving a patch would only move its output."""
    roll = lambda a: np.roll(np.asarray(a), 4, axis=2)
    assert differs(run(deep, roll(X), COND), roll(run(deep, X, COND)))


def test_examples_are_independent(deep, run):
    """A reshape that mixes batch and tokens would let them see one another."""
    other = X.at[1].set(picture(seed=3)[1])
    np.testing.assert_array_equal(run(deep, other, COND)[0], run(deep, X, COND)[0])


# --- Captions ---


def test_padding_cannot_influence_the_output(deep, run):
    garbage = COND | {'embeds': jnp.where(COND['mask'][..., None], COND['embeds'], 50.0)}
    assert not np.array_equal(garbage['embeds'], COND['embeds'])
    close(run(deep, X, garbage), run(deep, X, COND), atol=1e-6)


def test_the_length_of_the_padding_does_not_matter(deep, run):
    """The image's positions start where the *real* caption ends, not where padding does."""
    longer = {'embeds': jnp.pad(COND['embeds'], ((0, 0), (0, 3), (0, 0))),
              'mask': jnp.pad(COND['mask'], ((0, 0), (0, 3)))}
    close(run(deep, X, longer), run(deep, X, COND))


def test_the_mask_matters(deep, run):
    """Unmasking row 0's padded token changes that row, and no other."""
    seen = COND | {'mask': jnp.ones_like(COND['mask'])}
    before, after = run(deep, X, COND), run(deep, X, seen)
    assert differs(before[0], after[0])
    close(before[1], after[1], atol=1e-6)


@pytest.mark.parametrize('token', range(3))
def test_every_real_token_matters(deep, run, token):
    changed = COND | {'embeds': COND['embeds'].at[:, token].multiply(-1.0)}
    before, after = run(deep, X, COND), run(deep, X, changed)
    assert differs(before[0], after[0]) and differs(before[1], after[1])


def test_the_order_of_words_matters(deep, run):
    swapped = COND | {'embeds': COND['embeds'].at[:, :2].set(COND['embeds'][:, 1::-1])}
    assert differs(run(deep, X, swapped), run(deep, X, COND))


# --- Variants that must agree ---


@pytest.mark.parametrize('changes', [
    {'unroll': True}, {'fold_tokens': True}, {'remat': 'full'}, {'remat': 'dots'}], ids=str)
def test_variants_give_equal_outputs(deep, run, changes):
    predict = jax.jit(emoji.make_denoiser(variant(**changes)))
    got = predict(deep, X, jnp.full(BATCH, TIME), COND)
    close(got, run(deep, X, COND))


def test_bf16_activations_stay_near_and_come_out_in_fp32(deep, run):
    """Parameters and residual x_t stay fp32: only the velocity carries bf16's rounding."""
    predict = jax.jit(emoji.make_denoiser(variant(dtype='bfloat16')))
    got = predict(deep, X, jnp.full(BATCH, 0.98), COND)
    assert got.dtype == jnp.float32
    close(got, run(deep, X, COND, 0.98), atol=2e-3)


@pytest.mark.parametrize('remat', sorted(layers.REMAT_POLICIES))
def test_remat_gives_equal_gradients(remat):
    """Recomputing is for the backward pass: there it must change nothing but memory."""
    stack = layers.stack_layers(lambda r: layers.Linear(8, 8, rngs=r), 3, nnx.Rngs(0))
    graphdef, params = nnx.split(stack)

    def loss(params, how):
        out = layers.scan_layers(nnx.merge(graphdef, params), X.reshape(-1, 8), remat=how)
        return jnp.sum(jnp.square(out))

    close(*(jax.grad(loss)(params, how).kernel[...] for how in ('none', remat)), atol=1e-3)


def test_remat_reaches_the_layers(deep):
    """A config field that nothing reads would pass every comparison of outputs."""
    def recomputes(**changes):
        predict = emoji.make_denoiser(variant(**changes))
        return 'remat' in str(jax.make_jaxpr(predict)(deep, X, jnp.ones(BATCH), COND))
    assert recomputes(remat='full') and recomputes(remat='dots') and not recomputes()


# --- Configs ---


@pytest.mark.parametrize('changes, words', [
    ({'hidden_size': 33}, 'hidden_size'),
    ({'num_kv_heads': 3}, 'num_kv_heads'),
    ({'axes_dim_rope': (4, 4, 4)}, 'sum to the head size 16'),
    ({'axes_dim_rope': (5, 5, 6)}, 'even'),  # a channel cannot be turned without its partner
])
def test_config_errors(changes, words):
    with pytest.raises(ValueError, match=words):
        NextDiTConfig(**(tiny.MODEL['denoiser'] | changes))


def test_the_published_config():
    """Lumina-Image-2.0's sizes, from its `config.json`."""
    cfg = NextDiTConfig()
    assert (cfg.head_dim, cfg.time_dim, cfg.ffn_dim) == (96, 1024, 9216)


# --- Layers ---


def test_rms_norm():
    x = np.asarray(picture()).reshape(BATCH, -1)
    norm = layers.RMSNorm(x.shape[1], eps=1e-5, dtype=jnp.float32)
    norm.weight[...] = jnp.full(x.shape[1], 2.0)
    close(norm(x), 2 * x / np.sqrt(np.mean(x**2, axis=1, keepdims=True) + 1e-5))


def test_rotary_scores_depend_on_distances_only():
    """The point of rotary positions, on all axes; and lengths are kept."""
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16))
    turn = lambda x, at: layers.apply_rotary(
        x, layers.rotary_angles(jnp.array([[at]]), (4, 6, 6)))
    score = lambda a, b: jnp.sum(turn(q, a) * turn(k, b))
    close(score((3, 1, 4), (1, 5, 9)), score((5, 11, 5), (3, 15, 10)), atol=1e-4)
    assert differs(score((3, 1, 4), (1, 5, 9)), score((3, 1, 4), (2, 5, 9)))
    close(jnp.linalg.norm(turn(q, (7, 8, 9))), jnp.linalg.norm(q))


def test_sinusoids_are_cosines_then_sines():
    """diffusers' `Timesteps` with flip_sin_to_cos: the halves the other way load silently."""
    got = np.asarray(layers.sinusoidal_embedding(jnp.array([0.7]), 8))[0]
    args = 0.7 * 10000.0 ** (-np.arange(4) / 4)
    close(got, np.concatenate([np.cos(args), np.sin(args)]))


def test_stacked_layers_start_apart():
    """One key for all of them would start every layer with the same weights."""
    stack = layers.stack_layers(lambda r: layers.Linear(3, 3, rngs=r), 2, nnx.Rngs(0))
    assert differs(stack.kernel[...][0], stack.kernel[...][1])


# --- The caption encoder ---


def test_caption_encoder_ignores_padding():
    encode = jax.jit(emoji.make_text_encoder(tiny.MODEL))
    params = tiny.random_params(tiny.MODEL, seed=2)['text']
    mask = jnp.arange(6)[None] < jnp.array([[3], [6]])
    ids = jax.random.randint(jax.random.key(1), (2, 6), 0, 32)
    before = encode(params, ids, mask)
    assert before['embeds'].shape == (2, 6, 16)
    np.testing.assert_array_equal(before['mask'], mask)
    padded = encode(params, jnp.where(mask, ids, 31 - ids), mask)['embeds']
    close(np.asarray(padded)[mask], np.asarray(before['embeds'])[mask], atol=1e-6)
    # It is bidirectional: the first state has seen the last real word.
    reworded = encode(params, ids.at[:, 2].set((ids[:, 2] + 1) % 32), mask)['embeds']
    assert differs(reworded[0, 0], before['embeds'][0, 0])
