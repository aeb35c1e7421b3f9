"""FLOPs of a forward pass by its architecture, without any compiled program.

FLOPs are two for each multiply-add of matrix products and convolutions; nothing else counts
(norms, softmax, activations, rotations). One row, or one latent, of the sizes given: padding of
captions counts, for it is computed, and what a backward pass, recomputation or the padding of a
kernel's blocks add does not. `planner.costs` counts the same in the text of a compiled program.
"""

from __future__ import annotations

from ddmd_jax.models.autoencoder_kl import AutoencoderKLConfig
from ddmd_jax.models.nextdit import BlockConfig, NextDiTConfig
from ddmd_jax.models.text.caption import CaptionEncoderConfig
from ddmd_jax.models.text.causal import CausalConfig
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
