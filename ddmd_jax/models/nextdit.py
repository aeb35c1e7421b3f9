"""NextDiT, the transformer of Lumina-Image-2.0 (diffusers: `Lumina2Transformer2DModel`).

Same parameters, same forward pass, same conventions as the published network: its time
input runs from 0 (noise) to 1 (clean) and its output is the velocity `x - noise`; that the
pipeline of diffusers negates it and calls time `1 - t / 1000` is that pipeline's affair.
Sequence lengths are static here: where diffusers packs each caption in front of its image,
we keep ``[image | padded caption]`` and mask the padding, which comes last, so that a kernel needs
only a length a row. Attention does not care for the order of keys and the rotary positions are
those of the packed sequence, so the outputs agree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from ddmd_jax.models.attention import attend
from ddmd_jax.models.layers import (
    Linear,
    RMSNorm,
    apply_rotary,
    gather_kernels,
    layer_norm,
    rotary_angles,
    rows_stay,
    scan_layers,
    sinusoidal_embedding,
    stack_layers,
)

Array = jax.Array

# How a mesh holds it. Matrices in by `fsdp`, out by `tensor` (or the reverse where the product
# comes back); the two whose other side is a patch's few numbers by the hidden size alone;
# everything small is whole on every device.
RULES = (
    (r'(to_q|to_k|to_v|linear_1|linear_3|modulation|time_1)/kernel$', ('fsdp', 'tensor')),
    (r'(to_out|linear_2|time_2|caption_proj|out_scale)/kernel$', ('tensor', 'fsdp')),
    (r'x_embedder/kernel$', (None, 'fsdp')),
    (r'out_proj/kernel$', ('fsdp', None)),
    (r'(bias|weight)$', ()),
)


@dataclasses.dataclass(frozen=True)
class NextDiTConfig:
    """Fields up to `cap_feat_dim` are diffusers' names; defaults are Lumina-Image-2.0's."""

    patch_size: int = 2
    in_channels: int = 16
    hidden_size: int = 2304
    num_layers: int = 26
    num_refiner_layers: int = 2
    num_attention_heads: int = 24
    num_kv_heads: int = 8
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    axes_dim_rope: tuple[int, int, int] = (32, 32, 32)
    cap_feat_dim: int = 2304
    dtype: str = 'float32'  # of activations and matrix products; parameters stay fp32
    remat: str = 'none'
    attention: str = 'xla'  # see models/attention.py
    fold_tokens: bool = False  # see layers.Linear; for CPU
    unroll: bool = False  # compile every layer: on CPU a scan copies what it saves

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def time_dim(self) -> int:
        return min(self.hidden_size, 1024)

    @property
    def ffn_dim(self) -> int:
        inner = 4 * self.hidden_size
        if self.ffn_dim_multiplier is not None:
            inner = int(self.ffn_dim_multiplier * inner)
        return self.multiple_of * -(-inner // self.multiple_of)

    def __post_init__(self):
        if self.hidden_size % self.num_attention_heads:
            raise ValueError('hidden_size must be a multiple of num_attention_heads')
        if self.num_attention_heads % self.num_kv_heads:
            raise ValueError('num_attention_heads must be a multiple of num_kv_heads')
        if self.ffn_dim < 1:
            raise ValueError(f'ffn_dim_multiplier {self.ffn_dim_multiplier} leaves no width')
        if sum(self.axes_dim_rope) != self.head_dim or any(d % 2 for d in self.axes_dim_rope):
            raise ValueError(f'axes_dim_rope {self.axes_dim_rope} must be even numbers that sum '
                             f'to the head size {self.head_dim}')


class BlockConfig(Protocol):
    """What a block reads of its network's config; Z-Image's blocks are built of these too."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def ffn_dim(self) -> int: ...
    @property
    def time_dim(self) -> int: ...  # width of what modulates
    @property
    def norm_eps(self) -> float: ...
    @property
    def dtype(self) -> str: ...
    @property
    def attention(self) -> str: ...
    @property
    def fold_tokens(self) -> bool: ...


def linear(cfg: BlockConfig, din: int, dout: int, rngs: nnx.Rngs, *, bias: bool,
           zero: bool = False) -> Linear:
    """A layer in `cfg`'s dtype, its parameters in fp32; of zeros if `zero`."""
    init = nnx.initializers.zeros_init() if zero else nnx.initializers.xavier_uniform()
    return Linear(din, dout, fold=cfg.fold_tokens, use_bias=bias, kernel_init=init,
                  dtype=jnp.dtype(cfg.dtype), param_dtype=jnp.float32, rngs=rngs)


class Attention(nnx.Module):
    """Grouped-query self-attention with RMS-normed, rotated queries and keys."""

    def __init__(self, cfg: BlockConfig, rngs: nnx.Rngs, mesh: Mesh | None):
        kv_dim = cfg.num_kv_heads * cfg.head_dim
        self.to_q = linear(cfg, cfg.hidden_size, cfg.hidden_size, rngs, bias=False)
        self.to_k = linear(cfg, cfg.hidden_size, kv_dim, rngs, bias=False)
        self.to_v = linear(cfg, cfg.hidden_size, kv_dim, rngs, bias=False)
        self.to_out = linear(cfg, cfg.hidden_size, cfg.hidden_size, rngs, bias=False)
        # The published attention's own eps is 1e-5 whatever norm_eps says.
        self.norm_q = RMSNorm(cfg.head_dim, eps=1e-5, dtype=jnp.dtype(cfg.dtype))
        self.norm_k = RMSNorm(cfg.head_dim, eps=1e-5, dtype=jnp.dtype(cfg.dtype))
        self.head_dim, self.kind, self.mesh = cfg.head_dim, cfg.attention, mesh

    def __call__(self, x: Array, mask: Array | None, angles: Array) -> Array:
        split = lambda y: y.reshape(*y.shape[:-1], -1, self.head_dim)
        q = apply_rotary(self.norm_q(split(self.to_q(x))), angles)
        k = apply_rotary(self.norm_k(split(self.to_k(x))), angles)
        out = attend(q, k, split(self.to_v(x)), mask, kind=self.kind, mesh=self.mesh)
        return self.to_out(out.reshape(x.shape))


class FeedForward(nnx.Module):
    """SwiGLU (diffusers `LuminaFeedForward`): ``linear_2(silu(linear_1 x) * linear_3 x)``."""

    def __init__(self, cfg: BlockConfig, rngs: nnx.Rngs):
        self.linear_1 = linear(cfg, cfg.hidden_size, cfg.ffn_dim, rngs, bias=False)
        self.linear_2 = linear(cfg, cfg.ffn_dim, cfg.hidden_size, rngs, bias=False)
        self.linear_3 = linear(cfg, cfg.hidden_size, cfg.ffn_dim, rngs, bias=False)

    def __call__(self, x: Array) -> Array:
        gate = jax.nn.silu(self.linear_1(x).astype(jnp.float32)).astype(x.dtype)
        return self.linear_2(gate * self.linear_3(x))


class Block(nnx.Module):
    """Sandwich-normed transformer block; with `of_time`, scaled and gated by the time embedding.

    `of_time` stands before the modulation's one matrix: silu in NextDiT, nothing in Z-Image.
    """

    def __init__(self, cfg: BlockConfig, rngs: nnx.Rngs, mesh: Mesh | None = None, *,
                 of_time: Callable[[Array], Array] | None = None):
        norm = lambda: RMSNorm(cfg.hidden_size, eps=cfg.norm_eps, dtype=jnp.dtype(cfg.dtype))
        self.attn = Attention(cfg, rngs, mesh)
        self.feed_forward = FeedForward(cfg, rngs)
        self.norm1, self.norm2, self.ffn_norm1, self.ffn_norm2 = norm(), norm(), norm(), norm()
        self.of_time = of_time
        if of_time:
            self.modulation = linear(
                cfg, cfg.time_dim, 4 * cfg.hidden_size, rngs, bias=True, zero=True)

    def __call__(self, x: Array, mask: Array | None, angles: Array,
                 temb: Array | None = None) -> Array:
        if temb is None or self.of_time is None:
            x = x + self.norm2(self.attn(self.norm1(x), mask, angles))
            return x + self.ffn_norm2(self.feed_forward(self.ffn_norm1(x)))
        scale_attn, gate_attn, scale_ffn, gate_ffn = jnp.split(
            self.modulation(self.of_time(temb))[:, None], 4, axis=-1)
        attn = self.attn(self.norm1(x) * (1 + scale_attn), mask, angles)
        x = x + jnp.tanh(gate_attn) * self.norm2(attn)
        ffn = self.feed_forward(self.ffn_norm1(x) * (1 + scale_ffn))
        return x + jnp.tanh(gate_ffn) * self.ffn_norm2(ffn)


class NextDiT(nnx.Module):
    """``(x_t [B,H,W,C], t [B], caption [B,L,D], mask [B,L]) -> velocity [B,H,W,C]`` in fp32.

    Captions are padded on the right. `mesh` is what attention by kernel is mapped over; the rest
    the compiler partitions.
    """

    def __init__(self, cfg: NextDiTConfig, rngs: nnx.Rngs, mesh: Mesh | None = None):
        patch_dim = cfg.patch_size**2 * cfg.in_channels
        self.cfg, self.mesh = cfg, mesh
        self.x_embedder = linear(cfg, patch_dim, cfg.hidden_size, rngs, bias=True)
        self.time_1 = linear(cfg, 256, cfg.time_dim, rngs, bias=True)
        self.time_2 = linear(cfg, cfg.time_dim, cfg.time_dim, rngs, bias=True)
        self.caption_norm = RMSNorm(cfg.cap_feat_dim, eps=cfg.norm_eps, dtype=jnp.dtype(cfg.dtype))
        self.caption_proj = linear(cfg, cfg.cap_feat_dim, cfg.hidden_size, rngs, bias=True)
        self.context_refiner = stack_layers(
            lambda r: Block(cfg, r, mesh), cfg.num_refiner_layers, rngs)
        self.noise_refiner = stack_layers(
            lambda r: Block(cfg, r, mesh, of_time=jax.nn.silu), cfg.num_refiner_layers, rngs)
        self.layers = stack_layers(
            lambda r: Block(cfg, r, mesh, of_time=jax.nn.silu), cfg.num_layers, rngs)
        self.out_scale = linear(cfg, cfg.time_dim, cfg.hidden_size, rngs, bias=True, zero=True)
        self.out_proj = linear(cfg, cfg.hidden_size, patch_dim, rngs, bias=True, zero=True)

    def __call__(self, x_t: Array, t: Array, caption: Array, mask: Array) -> Array:
        tokens, temb, grid = self._trunk(x_t, t, caption, mask)
        x32 = layer_norm(tokens) * (1 + self.out_scale(jax.nn.silu(temb)))[:, None]
        out = self.out_proj(x32.astype(tokens.dtype)).astype(jnp.float32)
        return unpatchify(out, grid, self.cfg.patch_size)

    def features(self, x_t: Array, t: Array, caption: Array, mask: Array) -> Array:
        """The image's tokens ``[B, S, D]`` after the last layer, of inputs as in a call."""
        return self._trunk(x_t, t, caption, mask)[0]

    def _trunk(self, x_t: Array, t: Array, caption: Array,
               mask: Array) -> tuple[Array, Array, tuple[int, int]]:
        """(tokens of the image, time embedding, patches a side)."""
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        batch, height, width, _ = x_t.shape
        grid = (height // cfg.patch_size, width // cfg.patch_size)
        cap_angles, img_angles = self._angles(mask, grid)
        use = lambda params: gather_kernels(params, RULES, self.mesh, dtype)
        run = lambda layers, x, *args: scan_layers(
            layers, x, *args, remat=cfg.remat, unroll=cfg.unroll, use=use)

        temb = self.time_2(jax.nn.silu(self.time_1(sinusoidal_embedding(t, 256).astype(dtype))))
        cap = self.caption_proj(self.caption_norm(caption.astype(dtype)))
        cap = run(self.context_refiner, rows_stay(cap, self.mesh), mask, cap_angles)
        img = self.x_embedder(patchify(x_t.astype(dtype), cfg.patch_size))
        img = run(self.noise_refiner, rows_stay(img, self.mesh), None, img_angles, temb)

        joint_mask = jnp.concatenate([jnp.ones((batch, img.shape[1]), bool), mask], axis=1)
        joint = rows_stay(jnp.concatenate([img, cap], axis=1), self.mesh)
        angles = jnp.concatenate([img_angles, cap_angles], axis=1)
        joint = run(self.layers, joint, joint_mask, angles, temb)
        return joint[:, :img.shape[1]], temb, grid

    def _angles(self, mask: Array, grid: tuple[int, int]) -> tuple[Array, Array]:
        """Rotary angles: a caption counts on axis 0; its image sits at axis 0 = its length."""
        batch, cap_len = mask.shape
        zeros = jnp.zeros((batch, cap_len), jnp.int32)
        cap_pos = jnp.stack([zeros + jnp.arange(cap_len), zeros, zeros], axis=-1)
        rows, cols = jnp.meshgrid(jnp.arange(grid[0]), jnp.arange(grid[1]), indexing='ij')
        tokens = (batch, grid[0] * grid[1])
        start = jnp.broadcast_to(jnp.sum(mask, axis=1, dtype=jnp.int32)[:, None], tokens)
        img_pos = jnp.stack([start, jnp.broadcast_to(rows.reshape(-1), tokens),
                             jnp.broadcast_to(cols.reshape(-1), tokens)], axis=-1)
        dims = self.cfg.axes_dim_rope
        return rotary_angles(cap_pos, dims), rotary_angles(img_pos, dims)


def patchify(x: Array, patch: int) -> Array:
    """``[B, H, W, C] -> [B, H/p * W/p, p * p * C]``, rows first, channels fastest."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // patch, patch, w // patch, patch, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, (h // patch) * (w // patch), -1)


def unpatchify(tokens: Array, grid: tuple[int, int], patch: int) -> Array:
    """Inverse of `patchify` for a ``grid`` of patches."""
    b, (h, w) = tokens.shape[0], grid
    x = tokens.reshape(b, h, w, patch, patch, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h * patch, w * patch, -1)
