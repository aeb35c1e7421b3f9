"""AutoencoderKL against diffusers' own, random weights, fp32; needs the `parity` extra."""

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ddmd_jax.models import autoencoder_kl as vae
from ddmd_jax.weights import flat

pytestmark = pytest.mark.parity

FLUX = vae.AutoencoderKLConfig(latent_channels=4, block_out_channels=(16, 32, 32),
                               layers_per_block=1, norm_num_groups=8, sample_size=32)
VARIANTS = {
    'flux': FLUX,
    'quant': dataclasses.replace(FLUX, use_quant_conv=True, use_post_quant_conv=True,
                                 shift_factor=None, block_out_channels=(16, 32), sample_size=8),
    'no attention': dataclasses.replace(FLUX, mid_block_add_attention=False, layers_per_block=2,
                                        block_out_channels=(16, 32)),
}
# In latents: square, and not square with an odd edge.
sizes = pytest.mark.parametrize('variant, height, width', [
    ('flux', 4, 4), ('flux', 2, 5), ('quant', 4, 4), ('quant', 2, 5), ('no attention', 2, 5)])


def their_model(cfg):
    diffusers = pytest.importorskip('diffusers')
    fields = {k: v for k, v in dataclasses.asdict(cfg).items() if k != 'dtype'}
    levels = len(cfg.block_out_channels)
    return diffusers.AutoencoderKL(**fields, down_block_types=('DownEncoderBlock2D',) * levels,
                                   up_block_types=('UpDecoderBlock2D',) * levels).eval()


def convert(state_dict):
    """Torch names and tensors to ours, mechanically: leaf and axes by number of dimensions."""
    kinds = {4: ('kernel', (2, 3, 1, 0)), 2: ('kernel', (1, 0)), 1: ('scale', (0,))}
    ours = {}
    for name, tensor in state_dict.items():
        *path, kind = name.replace('.to_out.0.', '.to_out.').split('.')
        leaf, axes = kinds[tensor.ndim]
        ours['/'.join([*path, leaf if kind == 'weight' else kind])] = tensor.permute(*axes)
    assert len(ours) == len(state_dict)
    return ours


@dataclasses.dataclass(frozen=True)
class Pair:
    """One variant: their model; our parameters by flat name, and jitted functions of them."""

    cfg: vae.AutoencoderKLConfig
    theirs: Any
    params: dict[str, Any]
    moments: Callable
    decode: Callable


@functools.cache
def load(variant):
    torch = pytest.importorskip('torch')
    torch.manual_seed(0)
    cfg = VARIANTS[variant]
    theirs = their_model(cfg)
    with torch.no_grad():
        for p in theirs.parameters():  # norms and biases at other values than 1 and 0
            p.add_(0.1 * torch.randn_like(p))
    params = {k: jnp.asarray(v.numpy()) for k, v in convert(theirs.state_dict()).items()}
    return Pair(cfg, theirs, params,
                jax.jit(lambda flat_, x: our_model(cfg, flat_).encode_moments(x)),
                jax.jit(lambda flat_, z: our_model(cfg, flat_).decode(z)))


@functools.cache
def abstract_model(cfg):
    return nnx.eval_shape(lambda: vae.AutoencoderKL(cfg, nnx.Rngs(0)))


def our_model(cfg, named):
    graphdef, state = nnx.split(abstract_model(cfg))
    state = jax.tree.map(lambda x: x, state)  # a copy, the model is shared
    nnx.replace_by_pure_dict(state, flat.unflatten(named))
    return nnx.merge(graphdef, state)


def draw(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def to_torch(x, **kwargs):
    return pytest.importorskip('torch').tensor(x.transpose(0, 3, 1, 2), **kwargs)


def from_torch(x):
    return x.detach().numpy().transpose(0, 2, 3, 1)


def assert_near(got, want, share=1e-4):
    """No element further off than a share of the rms of `want`."""
    got = np.asarray(got)
    assert got.shape == want.shape and got.dtype == np.float32
    assert np.abs(got - want).max() <= share * np.sqrt(np.mean(np.square(want)))


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision('highest'):
        yield


@sizes
def test_encode(variant, height, width):
    pair = load(variant)
    images = np.tanh(draw(2, height * pair.cfg.factor, width * pair.cfg.factor, 3))
    want = pair.theirs.encode(to_torch(images)).latent_dist
    mean, logvar = pair.moments(pair.params, images)
    assert_near(mean, from_torch(want.mean))
    assert_near(logvar, from_torch(want.logvar))


def test_logvar_is_clipped():
    pair = load('flux')
    shift = jnp.asarray([0, 0, 0, 0, 99, 99, -99, -99], jnp.float32)
    name = 'encoder/conv_out/bias'
    _, logvar = pair.moments(pair.params | {name: pair.params[name] + shift},
                             np.tanh(draw(2, 16, 16, 3)))
    assert np.all(logvar[..., :2] == 20) and np.all(logvar[..., 2:] == -30)


@sizes
def test_decode_and_latent_gradient(variant, height, width):
    pair = load(variant)
    z = draw(2, height, width, 4)
    tz = to_torch(z, requires_grad=True)
    want = pair.theirs.decode(tz).sample
    want.square().sum().backward()

    @jax.jit
    @functools.partial(jax.grad, argnums=1, has_aux=True)
    def gradient(params, z):
        images = our_model(pair.cfg, params).decode(z)
        return jnp.sum(jnp.square(images)), images

    grad, got = gradient(pair.params, z)
    assert_near(got, from_torch(want))
    assert_near(grad, from_torch(tz.grad))


@pytest.mark.parametrize('variant, height, width', [
    ('flux', 13, 6),  # tiles of 8 every 6, one column: the last are 7 and 1 high
    ('quant', 5, 11),  # tiles of 4 every 3
    ('quant', 5, 2),  # one edge fits a tile
    ('quant', 4, 4)])  # both do: one piece
def test_tiled_decode(variant, height, width):
    pair = load(variant)
    z = draw(1, height, width, 4)
    whole = from_torch(pair.theirs.decode(to_torch(z)).sample)
    pair.theirs.enable_tiling()
    want = from_torch(pair.theirs.decode(to_torch(z)).sample)
    pair.theirs.disable_tiling()
    one_piece = max(height, width) * pair.cfg.factor <= pair.cfg.sample_size
    assert np.allclose(want, whole, atol=1e-3) == one_piece  # tiling shows
    got = vae.decode_tiled(functools.partial(pair.decode, pair.params), z, pair.cfg)
    assert_near(got, want)


@pytest.mark.parametrize('variant', ['flux', 'quant'])  # with a shift and without
def test_functional_and_scaling(variant):
    pair = load(variant)
    encode, decode = map(jax.jit, vae.functional(pair.cfg))
    images = np.tanh(draw(1, 8, 8, 3))
    mean = from_torch(pair.theirs.encode(to_torch(images)).latent_dist.mean)
    latents = encode(flat.unflatten(pair.params), images)
    assert_near(latents, (mean - (pair.cfg.shift_factor or 0.0)) * pair.cfg.scaling_factor)
    # Only the half that decodes, and list positions as integers, as NNX has them.
    model = nnx.to_pure_dict(nnx.state(our_model(pair.cfg, pair.params), nnx.Param))
    assert 0 in model['decoder']['up_blocks']
    half = {k: v for k, v in model.items() if k in ('decoder', 'post_quant_conv')}
    assert_near(decode(half, latents), from_torch(pair.theirs.decode(to_torch(mean)).sample))


def test_functional_names_what_does_not_fit():
    pair = load('flux')
    encode, _ = vae.functional(pair.cfg)
    name = 'encoder/down_blocks/1/resnets/0/conv_shortcut/kernel'
    absent = {k: v for k, v in pair.params.items() if k != name}
    turned = pair.params | {name: pair.params[name].transpose(3, 2, 0, 1)}
    for wrong in (absent, turned):
        with pytest.raises(ValueError, match=name):
            encode(flat.unflatten(wrong), np.zeros((1, 8, 8, 3), np.float32))


@pytest.mark.parametrize('cfg', [vae.AutoencoderKLConfig(), VARIANTS['quant']])
def test_names_and_shapes(cfg):
    torch = pytest.importorskip('torch')
    with torch.device('meta'):
        theirs = convert(their_model(cfg).state_dict())
    ours = flat.flatten(vae.abstract_params(cfg))
    assert {k: v.shape for k, v in ours.items()} == {k: tuple(v.shape) for k, v in theirs.items()}
    assert all(v.dtype == jnp.float32 for v in ours.values())


def test_bf16_activations():
    """As far from fp32 as diffusers' own bf16 is: how far that is, depends on the machine."""
    torch = pytest.importorskip('torch')
    pair = load('flux')
    half = dataclasses.replace(pair.cfg, dtype='bfloat16')
    theirs = copy.deepcopy(pair.theirs).to(torch.bfloat16)
    images, z = np.tanh(draw(2, 16, 16, 3)), draw(2, 4, 4, 4)
    mean, _ = jax.jit(lambda p, x: our_model(half, p).encode_moments(x))(pair.params, images)
    decoded = jax.jit(lambda p, z: our_model(half, p).decode(z))(pair.params, z)
    halved = lambda x: to_torch(x, dtype=torch.bfloat16)
    with torch.no_grad():
        their_mean = from_torch(theirs.encode(halved(images)).latent_dist.mean.float())
        their_decoded = from_torch(theirs.decode(halved(z)).sample.float())
    rms = lambda x: np.sqrt(np.mean(np.square(x)))
    for got, published, want in (
            (mean, their_mean, pair.moments(pair.params, images)[0]),
            (decoded, their_decoded, pair.decode(pair.params, z))):
        assert rms(published - want) <= 0.03 * rms(want)  # it is the same thing that they computed
        assert np.all(np.isfinite(got)) and rms(got - want) <= 1.2 * rms(published - want)
        assert not np.allclose(got, want, atol=1e-5)  # the option does something


def test_what_does_not_fit_is_said():
    model = abstract_model(FLUX)
    with pytest.raises(ValueError, match='multiples of 4; crop or resize to 8 x 12'):
        model.encode_moments(np.zeros((1, 10, 12, 3)))
    with pytest.raises(ValueError, match='channels last'):
        model.encode_moments(np.zeros((1, 3, 8, 8)))
    with pytest.raises(ValueError, match='channels last'):
        model.decode(np.zeros((1, 4, 8, 8)))
    with pytest.raises(ValueError, match='multiple of 16'):
        vae.decode_tiled(None, np.zeros((1, 9, 9, 4)), dataclasses.replace(FLUX, sample_size=24))
    with pytest.raises(ValueError, match='multiples of norm_num_groups'):
        vae.AutoencoderKLConfig(norm_num_groups=48)
