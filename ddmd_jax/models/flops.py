"""FLOPs of a forward pass by its architecture, without any compiled program.

FLOPs are two for each multiply-add of matrix products and convolutions; nothing else counts
(norms, softmax, activations, rotations). One row, or one latent, of the sizes given: padding of
captions counts, for it is computed, and what a backward pass, recomputation or the padding of a
kernel's blocks add does not. `planner.costs` counts the same in the text of a compiled program.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ddmd_jax.models import discriminator
from ddmd_jax.models.autoencoder_kl import AutoencoderKLConfig
from ddmd_jax.models.nextdit import BlockConfig, NextDiTConfig
from ddmd_jax.models.text.caption import CaptionEncoderConfig
from ddmd_jax.models.text.causal import CausalConfig
from ddmd_jax.models.text.clip import ClipConfig
from ddmd_jax.models.unet import UNetConfig
from ddmd_jax.models.zimage import TIME_HIDDEN, ZImageConfig, filled_length

_TIME_FEATURES = 256  # of the sinusoidal embedding that `time_1` takes


def _linear(rows: int, din: int, dout: int) -> int:
    return 2 * rows * din * dout


def _attention(tokens: int, dim: int) -> int:
    """Of all to all, scores and their sums of values; heads of `dim` channels in all."""
    return 4 * tokens**2 * dim


# --- NextDiT, Z-Image ---


def nextdit_forward(cfg: NextDiTConfig, size: tuple[int, int], tokens: int) -> int:
    """FLOPs of one row's pass through `NextDiT`.

    Args:
      cfg: of the network.
      size: (height, width) of its latents, multiples of the patch size.
      tokens: length of its caption with padding.

    Raises:
      ValueError: latents that patches do not tile.
    """
    image = _patches(cfg, size)
    dim, patch = cfg.hidden_size, cfg.in_channels * cfg.patch_size**2
    # Once a row, not once a token: the time's embedding and the scale of the head.
    time = (_linear(1, _TIME_FEATURES, cfg.time_dim) + _linear(1, cfg.time_dim, cfg.time_dim)
            + _linear(1, cfg.time_dim, dim))
    ends = _linear(tokens, cfg.cap_feat_dim, dim) + 2 * _linear(image, patch, dim)
    refiners = _block(cfg, tokens, modulation=False) + _block(cfg, image, modulation=True)
    return (time + ends + cfg.num_refiner_layers * refiners
            + cfg.num_layers * _block(cfg, tokens + image, modulation=True))


def zimage_forward(cfg: ZImageConfig, size: tuple[int, int], tokens: int) -> int:
    """FLOPs of one row's pass through `ZImage`, as `nextdit_forward`'s; its fill counts."""
    image = _patches(cfg, size)
    dim, patch = cfg.dim, cfg.in_channels * cfg.patch_size**2
    time = (_linear(1, _TIME_FEATURES, TIME_HIDDEN) + _linear(1, TIME_HIDDEN, cfg.time_dim)
            + _linear(1, cfg.time_dim, dim))
    ends = _linear(tokens, cfg.cap_feat_dim, dim) + 2 * _linear(image, patch, dim)
    tokens, image = filled_length(tokens), filled_length(image)
    refiners = _block(cfg, tokens, modulation=False) + _block(cfg, image, modulation=True)
    return (time + ends + cfg.n_refiner_layers * refiners
            + cfg.n_layers * _block(cfg, tokens + image, modulation=True))


def nextdit_features(cfg: NextDiTConfig, size: tuple[int, int], tokens: int) -> int:
    """FLOPs of one row's way to the last layer's tokens, `NextDiT.features`."""
    return nextdit_forward(cfg, size, tokens) - _head_of(cfg, cfg.hidden_size, size)


def zimage_features(cfg: ZImageConfig, size: tuple[int, int], tokens: int) -> int:
    """FLOPs of one row's way to the last layer's tokens, `ZImage.features`."""
    return zimage_forward(cfg, size, tokens) - _head_of(cfg, cfg.dim, size)


def _head_of(cfg: NextDiTConfig | ZImageConfig, dim: int, size: tuple[int, int]) -> int:
    """Of what follows the last layer: the scale by the time, and the way to patches."""
    patch = cfg.in_channels * cfg.patch_size**2
    return _linear(1, cfg.time_dim, dim) + _linear(_patches(cfg, size), dim, patch)


def _patches(cfg: NextDiTConfig | ZImageConfig, size: tuple[int, int]) -> int:
    if any(edge % cfg.patch_size for edge in size):
        raise ValueError(f'latents of {size[0]} x {size[1]}: both must be multiples of '
                         f'patch_size = {cfg.patch_size}')
    return size[0] * size[1] // cfg.patch_size**2


def _block(cfg: BlockConfig, tokens: int, *, modulation: bool) -> int:
    """Of one `Block` over so many tokens; its modulation is once a row."""
    dim, kv_dim = cfg.hidden_size, cfg.num_kv_heads * cfg.head_dim
    qkv_out = 2 * _linear(tokens, dim, dim) + 2 * _linear(tokens, dim, kv_dim)
    ffn = 3 * _linear(tokens, dim, cfg.ffn_dim)
    gates = _linear(1, cfg.time_dim, 4 * dim) if modulation else 0
    return qkv_out + _attention(tokens, dim) + ffn + gates


# --- U-Net ---


def unet_forward(cfg: UNetConfig, size: tuple[int, int], tokens: int) -> int:
    """FLOPs of one row's pass through `UNet`, over latents of `size` and so many tokens of text.

    All taps of a convolution count that do not lie in its padding.
    """
    dims, count = cfg.block_out_channels, cfg.layers_per_block
    total, sizes, skips = _unet_down(cfg, size, tokens)
    total += _conv(size, dims[0], cfg.out_channels)
    before = dims[-1]
    for place, dim in enumerate(dims[::-1]):
        level = cfg.levels - 1 - place
        for _ in range(count + 1):
            total += _unet_resnet(cfg, sizes[level], before + skips.pop(), dim)
            if cfg.up_block_types[place].startswith('CrossAttn'):
                total += _transformer(cfg, level, sizes[level], tokens)
            before = dim
        if level:
            total += _conv(sizes[level - 1], dim, dim)
    return total


def unet_features(cfg: UNetConfig, size: tuple[int, int], tokens: int) -> int:
    """FLOPs of one row's way to the mid block's output, `UNet.features`."""
    return _unet_down(cfg, size, tokens)[0]


def _unet_resnet(cfg: UNetConfig, size: tuple[int, int], din: int, dout: int) -> int:
    return _resnet(size, din, dout) + _linear(1, cfg.time_dim, dout)


def _unet_down(cfg: UNetConfig, size: tuple[int, int],
               tokens: int) -> tuple[int, list[tuple[int, int]], list[int]]:
    """(FLOPs up to the mid block's output, sizes of the levels, widths of what came down)."""
    dims, count = cfg.block_out_channels, cfg.layers_per_block
    # Once a row: the embeddings of the step, of the pooled text and the six numbers.
    embeddings = (_linear(1, dims[0], cfg.time_dim) + 2 * _linear(1, cfg.time_dim, cfg.time_dim)
                  + _linear(1, cfg.projection_class_embeddings_input_dim, cfg.time_dim))
    total = embeddings + _conv(size, cfg.in_channels, dims[0])
    sizes, skips, before = [size], [dims[0]], dims[0]
    for level, dim in enumerate(dims):
        for _ in range(count):
            total += _unet_resnet(cfg, sizes[level], before, dim)
            if cfg.down_block_types[level].startswith('CrossAttn'):
                total += _transformer(cfg, level, sizes[level], tokens)
            before = dim
            skips.append(dim)
        if level < cfg.levels - 1:
            total += _halved(sizes[level], dim)
            sizes.append((-(-sizes[level][0] // 2), -(-sizes[level][1] // 2)))
            skips.append(dim)
    total += 2 * _unet_resnet(cfg, sizes[-1], before, before) + _transformer(
        cfg, cfg.levels - 1, sizes[-1], tokens)
    return total, sizes, skips


def _transformer(cfg: UNetConfig, level: int, size: tuple[int, int], tokens: int) -> int:
    """Of the blocks over all pixels of a level, and the products about them."""
    pixels, dim = size[0] * size[1], cfg.block_out_channels[level]
    to_itself = 4 * _linear(pixels, dim, dim) + _attention(pixels, dim)
    to_text = (2 * _linear(pixels, dim, dim) + 4 * pixels * tokens * dim
               + 2 * _linear(tokens, cfg.cross_attention_dim, dim))
    ffn = _linear(pixels, dim, 8 * dim) + _linear(pixels, 4 * dim, dim)
    depth = cfg.transformer_layers_per_block[level]
    return 2 * _linear(pixels, dim, dim) + depth * (to_itself + to_text + ffn)


def _halved(size: tuple[int, int], dim: int) -> int:
    """A convolution of 3 x 3 taps and stride 2, its padding of 1 met at the end of odd edges."""
    rows, cols = (3 * -(-edge // 2) - 1 - edge % 2 for edge in size)
    return 2 * rows * cols * dim * dim


# --- Heads of a GAN ---


def head(name: str, shape: Sequence[int]) -> int:
    """FLOPs of one row's pass through a head of `discriminator.HEADS`, of features of `shape`."""
    *edges, dim = shape
    if name == 'tokens':
        hidden = discriminator.HIDDEN
        return _linear(math.prod(edges), dim, hidden) + _linear(1, hidden, 1)
    total, taps = 0, discriminator.TAPS
    for _ in range(discriminator.halvings(edges[0], edges[1])):
        # Stride 2 and a padding of 1, which is met at the end of even edges only.
        total += 2 * math.prod(taps * (n // 2) - 1 - (n % 2 == 0) for n in edges) * dim * dim
        edges = [n // 2 for n in edges]
    left = math.prod(max(1, n // taps) for n in edges)
    return total + _linear(left, math.prod(min(n, taps) for n in edges) * dim, dim) + _linear(
        left, dim, 1)


# --- Text encoders ---


def caption_forward(cfg: CaptionEncoderConfig, tokens: int) -> int:
    """FLOPs of one row's pass through the embedded default's `CaptionEncoder`."""
    dim = cfg.dim
    return cfg.num_layers * (_linear(tokens, dim, 4 * dim) + _attention(tokens, dim)
                             + 2 * _linear(tokens, dim, 4 * dim))


def causal_forward(cfg: CausalConfig, tokens: int) -> int:
    """FLOPs of one row's pass through Gemma-2 or Qwen3, of the layers that are run.

    All keys of a query count, also those that the causal mask or a window hides: the scores are
    computed. Looking tokens up is no product.
    """
    dim, q_dim = cfg.hidden_size, cfg.num_attention_heads * cfg.head_dim
    kv_dim = cfg.num_key_value_heads * cfg.head_dim
    qkv_out = 2 * _linear(tokens, dim, q_dim) + 2 * _linear(tokens, dim, kv_dim)
    ffn = 3 * _linear(tokens, dim, cfg.intermediate_size)
    return cfg.depth * (qkv_out + _attention(tokens, q_dim) + ffn)


def clip_forward(cfg: ClipConfig, tokens: int) -> int:
    """FLOPs of one row's pass through CLIP's text tower, of the layers that are run."""
    dim = cfg.hidden_size
    layer = (4 * _linear(tokens, dim, dim) + _attention(tokens, dim)
             + 2 * _linear(tokens, dim, cfg.intermediate_size))
    projection = 0 if cfg.penultimate else _linear(1, dim, cfg.projection_dim or 0)
    return cfg.depth * layer + projection


# --- AutoencoderKL ---


def autoencoder_decode(cfg: AutoencoderKLConfig, size: tuple[int, int]) -> int:
    """FLOPs of decoding one latent of `size` (height, width) to pixels, in one piece.

    Taps of a convolution that lie in its padding do not count, as in `planner.costs.flops`. A
    program for TPU may do more: of a single picture XLA makes a batch of eight strips, and
    computes columns at their seams in vain (9 % more for 32 x 32 latents on v5e).
    """
    dims = cfg.block_out_channels[::-1]
    latent = cfg.latent_channels
    total = _conv(size, latent, latent, taps=1) if cfg.use_post_quant_conv else 0
    total += _conv(size, latent, dims[0]) + 2 * _resnet(size, dims[0], dims[0])
    if cfg.mid_block_add_attention:
        pixels = size[0] * size[1]
        total += 4 * _linear(pixels, dims[0], dims[0]) + _attention(pixels, dims[0])
    for level, (din, dout) in enumerate(zip((dims[0], *dims), dims)):
        if level:  # all blocks but the last end in twice the size
            size = (2 * size[0], 2 * size[1])
            total += _conv(size, din, din)
        total += _resnet(size, din, dout) + cfg.layers_per_block * _resnet(size, dout, dout)
    return total + _conv(size, dims[-1], cfg.out_channels)


def _resnet(size: tuple[int, int], din: int, dout: int) -> int:
    shortcut = 0 if din == dout else _conv(size, din, dout, taps=1)
    return _conv(size, din, dout) + _conv(size, dout, dout) + shortcut


def _conv(size: tuple[int, int], din: int, dout: int, taps: int = 3) -> int:
    """A convolution that keeps the size, `taps` (1 or 3) along each edge."""
    # Of three taps, one meets padding at either end of an edge.
    rows, cols = (taps * edge - (taps - 1) for edge in size)
    return 2 * rows * cols * din * dout
