"""FLOPs by architecture against those counted in the programs that CPU compiles, exactly."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
import tiny
from flax import nnx

from ddmd_jax.models import autoencoder_kl as vae, discriminator, flops, layers
from ddmd_jax.models.nextdit import NextDiT, NextDiTConfig
from ddmd_jax.models.text.caption import CaptionEncoder, CaptionEncoderConfig
from ddmd_jax.models.text.clip import ClipConfig, ClipText
from ddmd_jax.models.text.gemma2 import Gemma2, Gemma2Config
from ddmd_jax.models.text.qwen3 import Qwen3, Qwen3Config
from ddmd_jax.models.unet import UNet, UNetConfig
from ddmd_jax.planner import costs

# Rows, for a cost is that of one.
BATCH = 2

TOY = NextDiTConfig(**tiny.MODEL['denoiser'])
VAE = vae.AutoencoderKLConfig(latent_channels=4, block_out_channels=(8, 16, 16),
                              layers_per_block=1, norm_num_groups=4, use_post_quant_conv=True)

SMALL = {'vocab_size': 30, 'hidden_size': 24, 'intermediate_size': 40, 'num_hidden_layers': 4,
         'num_attention_heads': 4, 'num_key_value_heads': 2, 'head_dim': 8}


def arg(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def counted(fn, *args):
    found = costs.summary(jax.jit(fn).lower(*args).compile().as_text())
    assert not found.unknown_loops
    return found.flops


@pytest.mark.parametrize('changes, size, tokens', [
    ({'num_layers': 3, 'num_refiner_layers': 2}, (8, 8), 5),
    ({'num_layers': 2, 'num_kv_heads': 2, 'ffn_dim_multiplier': 0.7, 'unroll': True,
      'fold_tokens': True}, (8, 20), 3),
    ({'num_attention_heads': 4, 'axes_dim_rope': (4, 2, 2), 'num_kv_heads': 2, 'patch_size': 2,
      'in_channels': 5, 'cap_feat_dim': 24}, (6, 4), 7),
], ids=['scanned', 'unrolled', 'heads'])
def test_nextdit_forward(changes, size, tokens):
    cfg = dataclasses.replace(TOY, **changes)
    make = lambda: NextDiT(cfg, nnx.Rngs(0))
    got = counted(layers.functional(make), layers.abstract_params(make),
                  arg(BATCH, *size, cfg.in_channels), arg(BATCH),
                  arg(BATCH, tokens, cfg.cap_feat_dim), arg(BATCH, tokens, dtype=bool))
    assert got == BATCH * flops.nextdit_forward(cfg, size, tokens)
    features = counted(layers.functional(make, 'features'), layers.abstract_params(make),
                       arg(BATCH, *size, cfg.in_channels), arg(BATCH),
                       arg(BATCH, tokens, cfg.cap_feat_dim), arg(BATCH, tokens, dtype=bool))
    assert features == BATCH * flops.nextdit_features(cfg, size, tokens)


@pytest.mark.parametrize('module, cfg', [
    (Gemma2, Gemma2Config(**SMALL)), (Qwen3, Qwen3Config(**SMALL)),
    (Gemma2, Gemma2Config(**SMALL, penultimate=False))], ids=['gemma2', 'qwen3', 'all layers'])
def test_causal_forward(module, cfg):
    make = lambda: module(cfg, nnx.Rngs(0))
    got = counted(layers.functional(make), layers.abstract_params(make),
                  arg(BATCH, 7, dtype=jnp.int32), arg(BATCH, 7, dtype=bool))
    assert got == BATCH * flops.causal_forward(cfg, 7)


@pytest.mark.parametrize('projected', [False, True])
def test_clip_forward(projected):
    cfg = ClipConfig(20, 24, 40, 3, 4, 9, projection_dim=10, penultimate=not projected)
    make = lambda: ClipText(cfg, nnx.Rngs(0))
    got = counted(layers.functional(make), layers.abstract_params(make),
                  arg(BATCH, 9, dtype=jnp.int32))
    assert got == BATCH * flops.clip_forward(cfg, 9)


def test_unet_forward():
    """Over latents with an even edge and an odd one; levels that differ in all they have."""
    cfg = UNetConfig(
        down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D'),
        up_block_types=('CrossAttnUpBlock2D', 'UpBlock2D'), block_out_channels=(8, 16),
        layers_per_block=1, transformer_layers_per_block=(1, 2), attention_head_dim=(2, 4),
        cross_attention_dim=6, addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 + 24, norm_num_groups=4)
    make = lambda: UNet(cfg, nnx.Rngs(0))
    got = counted(layers.functional(make), layers.abstract_params(make), arg(BATCH, 6, 5, 4),
                  arg(BATCH), arg(BATCH, 7, 6), arg(BATCH, 7, dtype=bool), arg(BATCH, 6),
                  arg(BATCH, 6))
    assert got == BATCH * flops.unet_forward(cfg, (6, 5), 7)
    got = counted(layers.functional(make, 'features'), layers.abstract_params(make),
                  arg(BATCH, 6, 5, 4), arg(BATCH), arg(BATCH, 7, 6), arg(BATCH, 7, dtype=bool),
                  arg(BATCH, 6), arg(BATCH, 6))
    assert got == BATCH * flops.unet_features(cfg, (6, 5), 7)


@pytest.mark.parametrize('name, shape', [
    ('convolutions', (16, 19, 8)), ('convolutions', (4, 4, 8)), ('tokens', (4, 5, 8))])
def test_heads_of_a_gan(name, shape):
    head = discriminator.make_head(name, shape)
    params = jax.eval_shape(lambda: discriminator.init(head, jax.random.key(0)))
    got = counted(layers.functional(lambda: head(nnx.Rngs(0))), params, arg(BATCH, *shape))
    assert got == BATCH * flops.head(name, shape)


def test_sdxl_by_hand():
    """The published U-Net at 1024 pixels: 5.98 TFLOPs a row, as others count, and the scores."""
    scores = 4 * (10 * 4096**2 * 640 + 60 * 1024**2 * 1280)
    assert flops.unet_forward(UNetConfig(), (128, 128), 77) - scores == pytest.approx(
        5.98e12, rel=0.01)


def test_caption_forward():
    cfg = CaptionEncoderConfig(vocab_size=20, max_length=9, dim=16, num_layers=3)
    make = lambda: CaptionEncoder(cfg, nnx.Rngs(0))
    got = counted(layers.functional(make), layers.abstract_params(make),
                  arg(BATCH, 9, dtype=jnp.int32), arg(BATCH, 9, dtype=bool))
    assert got == BATCH * flops.caption_forward(cfg, 9)


def test_autoencoder_decode():
    """With attention, a level that changes channels and two that do not, and `post_quant_conv`."""
    _, decode = vae.functional(VAE)
    got = counted(decode, vae.abstract_params(VAE), arg(BATCH, 2, 5, VAE.latent_channels))
    assert got == BATCH * flops.autoencoder_decode(VAE, (2, 5))


def test_a_decoder_without_attention_lacks_attention():
    plain = dataclasses.replace(VAE, mid_block_add_attention=False)
    pixels, dim = 2 * 5, VAE.block_out_channels[-1]
    assert (flops.autoencoder_decode(VAE, (2, 5)) - flops.autoencoder_decode(plain, (2, 5))
            == 2 * (4 * pixels * dim**2 + 2 * pixels**2 * dim))


def test_lumina_by_hand():
    """The published network at 1024 pixels: twice parameters times tokens, and attention."""
    layer = 2 * 4352 * (2 * 2304**2 + 2 * 2304 * 768 + 3 * 2304 * 9216) + 4 * 4352**2 * 2304
    assert flops.nextdit_forward(NextDiTConfig(), (128, 128), 256) == pytest.approx(
        28 * layer, rel=0.01)  # a refiner of the image is a little less than a layer


def test_latents_that_patches_do_not_tile_are_refused():
    with pytest.raises(ValueError, match='multiples of patch_size = 2'):
        flops.nextdit_forward(NextDiTConfig(), (128, 127), 256)
