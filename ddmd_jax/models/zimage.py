"""Z-Image's transformer (diffusers: `ZImageTransformer2DModel`).

Same parameters, same forward pass, same conventions as the published network: its time input
runs from 0 (noise) to 1 (clean) and its output is the velocity ``x - noise``, which its pipeline
negates. The blocks are NextDiT's; what differs stands here.

  * Image and caption are each filled up to a multiple of `UNIT` tokens with a learnt token. Those
    are attended to like any other, and a caption's positions count over its own.
  * Sequence lengths are static: every caption of a batch has the places of the longest. A caption's
    own fill ends at its next multiple of `UNIT`, whatever the batch, and only what lies behind is
    masked; so each row's output is that of the row alone, as diffusers computes it.
  * Tokens of the image come first in the joint sequence. Their position on axis 0 is one more than
    the filled caption's last; the image's own fill lies at (0, 0, 0).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from ddmd_jax.models.layers import (
    RMSNorm,
    gather_kernels,
    layer_norm,
    rotary_angles,
    rows_stay,
    scan_layers,
    stack_layers,
    timestep_embedding,
)
from ddmd_jax.models.nextdit import RULES as NEXTDIT_RULES, Block, linear, patchify, unpatchify

Array = jax.Array

UNIT = 32  # tokens: image and caption are each filled up to a multiple of it
TIME_HIDDEN = 1024  # between the two matrices of the time embedding
RULES = (*NEXTDIT_RULES, (r'pad_token$', ()))


@dataclasses.dataclass(frozen=True)
class ZImageConfig:
    """Fields up to `axes_dims` are diffusers' names; defaults are those of Z-Image and its Turbo.

    diffusers lists patch sizes, of which the published network has one, and has a field
    `n_kv_heads` that its network does not read.
    """

    patch_size: int = 2
    in_channels: int = 16
    dim: int = 3840
    n_layers: int = 30
    n_refiner_layers: int = 2
    n_heads: int = 30
    norm_eps: float = 1e-5
    cap_feat_dim: int = 2560
    rope_theta: float = 256.0
    t_scale: float = 1000.0
    axes_dims: tuple[int, int, int] = (32, 48, 48)
    dtype: str = 'float32'  # of activations and matrix products; parameters stay fp32
    remat: str = 'none'
    attention: str = 'xla'  # see models/attention.py
    fold_tokens: bool = False  # see layers.Linear; for CPU
    unroll: bool = False  # compile every layer: on CPU a scan copies what it saves

    # What a block reads (`nextdit.BlockConfig`).

    @property
    def hidden_size(self) -> int:
        return self.dim

    @property
    def num_kv_heads(self) -> int:
        return self.n_heads

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def ffn_dim(self) -> int:
        return int(self.dim / 3 * 8)

    @property
    def time_dim(self) -> int:
        return min(self.dim, 256)

    def __post_init__(self):
        if self.dim % self.n_heads:
            raise ValueError('dim must be a multiple of n_heads')
        if sum(self.axes_dims) != self.head_dim or any(d % 2 for d in self.axes_dims):
            raise ValueError(f'axes_dims {self.axes_dims} must be even numbers that sum to the '
                             f'head size {self.head_dim}')


class ZImage(nnx.Module):
    """``(x_t [B,H,W,C], t [B], caption [B,L,D], mask [B,L]) -> velocity [B,H,W,C]`` in fp32.

    Captions are padded on the right. `mesh` is what attention by kernel is mapped over; the rest
    the compiler partitions.
    """

    def __init__(self, cfg: ZImageConfig, rngs: nnx.Rngs, mesh: Mesh | None = None):
        dim, patch_dim = cfg.dim, cfg.patch_size**2 * cfg.in_channels
        self.cfg, self.mesh = cfg, mesh
        self.x_embedder = linear(cfg, patch_dim, dim, rngs, bias=True)
        self.x_pad_token = nnx.Param(jnp.zeros((1, dim), jnp.float32))
        self.time_1 = linear(cfg, 256, TIME_HIDDEN, rngs, bias=True)
        self.time_2 = linear(cfg, TIME_HIDDEN, cfg.time_dim, rngs, bias=True)
        self.caption_norm = RMSNorm(cfg.cap_feat_dim, eps=cfg.norm_eps, dtype=jnp.dtype(cfg.dtype))
        self.caption_proj = linear(cfg, cfg.cap_feat_dim, dim, rngs, bias=True)
        self.cap_pad_token = nnx.Param(jnp.zeros((1, dim), jnp.float32))
        stack = lambda num, of_time: stack_layers(
            lambda r: Block(cfg, r, mesh, of_time=of_time), num, rngs)
        as_it_is = lambda temb: temb
        self.context_refiner = stack(cfg.n_refiner_layers, None)
        self.noise_refiner = stack(cfg.n_refiner_layers, as_it_is)
        self.layers = stack(cfg.n_layers, as_it_is)
        self.out_scale = linear(cfg, cfg.time_dim, dim, rngs, bias=True, zero=True)
        self.out_proj = linear(cfg, dim, patch_dim, rngs, bias=True, zero=True)

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
        """(tokens of the image without its fill, time embedding, patches a side)."""
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        batch, height, width, _ = x_t.shape
        grid = (height // cfg.patch_size, width // cfg.patch_size)
        image_len = grid[0] * grid[1]
        use = lambda params: gather_kernels(params, RULES, self.mesh, dtype)
        run = lambda layers, x, *args: scan_layers(
            layers, rows_stay(x, self.mesh), *args, remat=cfg.remat, unroll=cfg.unroll, use=use)

        temb = self.time_2(jax.nn.silu(self.time_1(
            timestep_embedding(t * cfg.t_scale, 256).astype(dtype))))

        # Places of a caption: its tokens, learnt ones up to its own multiple, and, where the batch
        # holds longer ones, some that nobody sees.
        lengths = jnp.sum(mask, axis=1, dtype=jnp.int32)
        filled = lengths + -lengths % UNIT
        places = jnp.arange(filled_length(mask.shape[1]))
        cap = self.caption_proj(self.caption_norm(caption.astype(dtype)))
        cap = jnp.pad(cap, ((0, 0), (0, len(places) - cap.shape[1]), (0, 0)))
        cap = jnp.where((places < lengths[:, None])[..., None], cap,
                        self.cap_pad_token[...].astype(dtype))
        seen = places < filled[:, None]

        img = self.x_embedder(patchify(x_t.astype(dtype), cfg.patch_size))
        fill = filled_length(image_len) - image_len
        pads = jnp.broadcast_to(self.x_pad_token[...].astype(dtype), (batch, fill, cfg.dim))
        img = jnp.concatenate([img, pads], axis=1)

        img_angles, cap_angles = self._angles(filled, len(places), grid, fill)
        cap = run(self.context_refiner, cap, seen, cap_angles)
        img = run(self.noise_refiner, img, None, img_angles, temb)
        joint = run(self.layers, jnp.concatenate([img, cap], axis=1),
                    jnp.concatenate([jnp.ones((batch, img.shape[1]), bool), seen], axis=1),
                    jnp.concatenate([img_angles, cap_angles], axis=1), temb)
        return joint[:, :image_len], temb, grid

    def _angles(self, filled: Array, cap_len: int, grid: tuple[int, int],
                fill: int) -> tuple[Array, Array]:
        """Rotary angles of image and caption: on axis 0 a caption counts from 1."""
        batch = filled.shape[0]
        cap_pos = jnp.zeros((batch, cap_len, 3), jnp.int32).at[..., 0].set(1 + jnp.arange(cap_len))
        rows, cols = jnp.meshgrid(jnp.arange(grid[0]), jnp.arange(grid[1]), indexing='ij')
        tokens = (batch, grid[0] * grid[1])
        img_pos = jnp.stack([jnp.broadcast_to(filled[:, None] + 1, tokens),
                             jnp.broadcast_to(rows.reshape(-1), tokens),
                             jnp.broadcast_to(cols.reshape(-1), tokens)], axis=-1)
        img_pos = jnp.pad(img_pos, ((0, 0), (0, fill), (0, 0)))
        angles = lambda pos: rotary_angles(pos, self.cfg.axes_dims, self.cfg.rope_theta)
        return angles(img_pos), angles(cap_pos)


def filled_length(tokens: int) -> int:
    """The next multiple of `UNIT`."""
    return tokens + -tokens % UNIT
