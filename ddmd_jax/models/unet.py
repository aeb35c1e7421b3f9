"""SDXL's U-Net (diffusers: `UNet2DConditionModel` as SDXL configures it), which predicts noise.

Same function as the published one in ``[B, H, W, C]``, with the same names of parameters but for
the transformers' blocks, which are stacked (`layers.stack_layers`): importing a checkpoint is
renaming (`families/sdxl/names.py`). Its time is the number of a step of the teacher's table, 0 the
cleanest; the paper's time is mapped onto it by the family.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from ddmd_jax.models.attention import attend
from ddmd_jax.models.convolution import Downsample, GroupNorm, ResnetBlock, Upsample, conv
from ddmd_jax.models.layers import (
    REMAT_POLICIES,
    Linear,
    gather_kernels,
    rows_stay,
    scan_layers,
    stack_layers,
    timestep_embedding,
)

Array = jax.Array

# How a mesh holds it, kernels of convolutions by their last two axes like matrices: in by `fsdp`,
# out by `tensor`, or the reverse where the product comes back to the residual stream. The two
# whose other side is a latent's few channels by their own channels alone.
RULES = (
    (r'(to_q|to_k|to_v|ff/proj|linear_1|conv1|time_emb_proj)/kernel$', ('fsdp', 'tensor')),
    (r'(to_out|ff/out|linear_2|conv2|conv_shortcut|proj_in|proj_out)/kernel$',
     ('tensor', 'fsdp')),
    (r'(^|/)conv/kernel$', ('tensor', 'fsdp')),  # that change the size
    (r'conv_in/kernel$', (None, 'fsdp')),
    (r'conv_out/kernel$', ('fsdp', None)),
    (r'(bias|scale)$', ()),
)
TIME_IDS = 6  # original height and width, top and left of the crop, target height and width


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Fields up to `norm_eps` are diffusers' names; defaults are SDXL-base's."""

    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[str, ...] = ('DownBlock2D', *('CrossAttnDownBlock2D',) * 2)
    up_block_types: tuple[str, ...] = (*('CrossAttnUpBlock2D',) * 2, 'UpBlock2D')
    block_out_channels: tuple[int, ...] = (320, 640, 1280)
    layers_per_block: int = 2  # residual blocks on the way down; one more on the way up
    transformer_layers_per_block: tuple[int, ...] = (1, 2, 10)
    attention_head_dim: tuple[int, ...] = (5, 10, 20)  # the numbers of heads, whatever the name
    cross_attention_dim: int = 2048
    addition_time_embed_dim: int = 256  # of each of the six numbers
    projection_class_embeddings_input_dim: int = 2816  # of the pooled text and these
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    dtype: str = 'float32'  # of activations, matrix products and convolutions; parameters are fp32
    remat: str = 'none'
    attention: str = 'xla'  # of self-attention; see models/attention.py

    @property
    def levels(self) -> int:
        return len(self.block_out_channels)

    @property
    def factor(self) -> int:
        """Latents that a pixel of the mid block stands for, along an edge."""
        return 2 ** (self.levels - 1)

    @property
    def time_dim(self) -> int:
        return 4 * self.block_out_channels[0]

    @property
    def head_dims(self) -> tuple[int, ...]:
        """Size of a head, level by level."""
        return tuple(c // heads
                     for c, heads in zip(self.block_out_channels, self.attention_head_dim))

    @property
    def pooled_dim(self) -> int:
        """Width of the pooled text."""
        return (self.projection_class_embeddings_input_dim
                - TIME_IDS * self.addition_time_embed_dim)

    def __post_init__(self):
        lists = (self.down_block_types, self.up_block_types, self.transformer_layers_per_block,
                 self.attention_head_dim)
        if not self.block_out_channels or any(len(x) != self.levels for x in lists):
            raise ValueError(f'block_out_channels {self.block_out_channels}, and a block type, a '
                             'transformer depth and a number of heads for each, differ in length')
        if any(c % self.norm_num_groups or c % heads
               for c, heads in zip(self.block_out_channels, self.attention_head_dim)):
            raise ValueError(f'block_out_channels {self.block_out_channels} must be multiples of '
                             f'norm_num_groups = {self.norm_num_groups} and of the numbers of '
                             f'heads {self.attention_head_dim}')
        known = {'DownBlock2D', 'CrossAttnDownBlock2D', 'UpBlock2D', 'CrossAttnUpBlock2D'}
        if other := sorted({*self.down_block_types, *self.up_block_types} - known):
            raise ValueError(f'blocks of type {other[0]}; supported are '
                             f'{", ".join(sorted(known))}')
        if self.pooled_dim < 1:
            raise ValueError(
                'projection_class_embeddings_input_dim = '
                f'{self.projection_class_embeddings_input_dim} leaves no room for pooled text '
                f'beside {TIME_IDS} x addition_time_embed_dim = {self.addition_time_embed_dim}')


def _linear(cfg: UNetConfig, din: int, dout: int, rngs: nnx.Rngs, *,
            bias: bool = True) -> Linear:
    return Linear(din, dout, use_bias=bias, dtype=jnp.dtype(cfg.dtype),
                  param_dtype=jnp.float32, rngs=rngs)


# --- Transformers ---


class Attention(nnx.Module):
    """``[B, S, D] -> [B, S, D]``: to itself, or to a context ``[B, L, context_dim]``."""

    def __init__(self, cfg: UNetConfig, dim: int, heads: int, rngs: nnx.Rngs,
                 mesh: Mesh | None, context_dim: int | None = None):
        self.to_q = _linear(cfg, dim, dim, rngs, bias=False)
        self.to_k = _linear(cfg, context_dim or dim, dim, rngs, bias=False)
        self.to_v = _linear(cfg, context_dim or dim, dim, rngs, bias=False)
        self.to_out = _linear(cfg, dim, dim, rngs)
        # Texts are 77 keys: their scores are few, and a kernel has nothing to save.
        self.kind = cfg.attention if context_dim is None else 'xla'
        self.heads, self.mesh = heads, mesh

    def __call__(self, x: Array, context: Array, mask: Array | None = None) -> Array:
        split = lambda y: y.reshape(*y.shape[:-1], self.heads, -1)
        q, k, v = split(self.to_q(x)), split(self.to_k(context)), split(self.to_v(context))
        out = attend(q, k, v, mask, kind=self.kind, mesh=self.mesh)
        return self.to_out(out.reshape(x.shape))


class FeedForward(nnx.Module):
    """GEGLU: ``out(value * gelu(gate))``, both of one product; GELU without approximation."""

    def __init__(self, cfg: UNetConfig, dim: int, rngs: nnx.Rngs):
        self.proj, self.out = _linear(cfg, dim, 8 * dim, rngs), _linear(cfg, 4 * dim, dim, rngs)

    def __call__(self, x: Array) -> Array:
        value, gate = jnp.split(self.proj(x), 2, axis=-1)
        gate = jax.nn.gelu(gate.astype(jnp.float32), approximate=False).astype(gate.dtype)
        return self.out(value * gate)


class TransformerBlock(nnx.Module):
    """To itself, to the text, through the network; each normed before (LayerNorm) and residual."""

    def __init__(self, cfg: UNetConfig, dim: int, heads: int, rngs: nnx.Rngs, mesh: Mesh | None):
        # Mean and variance one after the other: see clip.
        norm = lambda: nnx.LayerNorm(dim, epsilon=1e-5, use_fast_variance=False, rngs=rngs,
                                     dtype=jnp.dtype(cfg.dtype), param_dtype=jnp.float32)
        self.norm1, self.norm2, self.norm3 = norm(), norm(), norm()
        self.attn1 = Attention(cfg, dim, heads, rngs, mesh)
        self.attn2 = Attention(cfg, dim, heads, rngs, mesh, cfg.cross_attention_dim)
        self.ff = FeedForward(cfg, dim, rngs)

    def __call__(self, x: Array, context: Array, mask: Array | None) -> Array:
        y = self.norm1(x)
        x = x + self.attn1(y, y)
        x = x + self.attn2(self.norm2(x), context, mask)
        return x + self.ff(self.norm3(x))


class Transformer(nnx.Module):
    """`depth` blocks over the pixels of ``[B, H, W, D]``, residual (`Transformer2DModel`)."""

    def __init__(self, cfg: UNetConfig, dim: int, heads: int, depth: int, rngs: nnx.Rngs,
                 mesh: Mesh | None):
        self.cfg, self.mesh = cfg, mesh
        self.norm = GroupNorm(dim, cfg.norm_num_groups, eps=1e-6)  # whatever norm_eps says
        self.proj_in, self.proj_out = _linear(cfg, dim, dim, rngs), _linear(cfg, dim, dim, rngs)
        self.transformer_blocks = stack_layers(
            lambda r: TransformerBlock(cfg, dim, heads, r, mesh), depth, rngs)

    def __call__(self, x: Array, context: Array, mask: Array | None) -> Array:
        use = lambda params: gather_kernels(params, RULES, self.mesh, jnp.dtype(self.cfg.dtype))
        tokens = self.proj_in(self.norm(x).reshape(x.shape[0], -1, x.shape[-1]))
        tokens = scan_layers(self.transformer_blocks, rows_stay(tokens, self.mesh), context, mask,
                             remat=self.cfg.remat, use=use)
        return x + self.proj_out(tokens).reshape(x.shape)


# --- Blocks ---


@dataclasses.dataclass(frozen=True)
class Given:
    """What every block is given beside its input."""

    temb: Array  # [B, time_dim]: of the step, the pooled text and the six numbers
    context: Array  # [B, L, cross_attention_dim]
    mask: Array | None  # bool [B, L]


def _run(cfg: UNetConfig, mesh: Mesh | None, layer: nnx.Module, *args: Any,
         **static: Any) -> Array:
    """`layer` of `args`, its kernels gathered first; recomputed for a gradient as `remat` says."""
    graphdef, params = nnx.split(layer)

    def body(params: Any, *args: Any) -> Array:
        use = gather_kernels(params, RULES, mesh, jnp.dtype(cfg.dtype))
        return nnx.merge(graphdef, use)(*args, **static)

    if cfg.remat != 'none':
        body = jax.checkpoint(body, policy=REMAT_POLICIES[cfg.remat])
    return rows_stay(body(params, *args), mesh)


class Level(nnx.Module):
    """Residual blocks of one width, a transformer behind each of them if it attends to the text.

    `dins` are the widths that go into each residual block.
    """

    def __init__(self, cfg: UNetConfig, level: int, dins: list[int], attends: bool,
                 rngs: nnx.Rngs, mesh: Mesh | None):
        dim = cfg.block_out_channels[level]
        self.cfg, self.mesh = cfg, mesh
        self.resnets = nnx.List([
            ResnetBlock(cfg, din, dim, rngs, eps=cfg.norm_eps, time_dim=cfg.time_dim)
            for din in dins])
        self.attentions = nnx.List([
            Transformer(cfg, dim, cfg.attention_head_dim[level],
                        cfg.transformer_layers_per_block[level], rngs, mesh)
            for _ in (dins if attends else ())])

    def step(self, i: int, x: Array, given: Given) -> Array:
        """The i-th residual block, and the transformer behind it."""
        x = _run(self.cfg, self.mesh, self.resnets[i], x, given.temb)
        return self.attentions[i](x, given.context, given.mask) if self.attentions else x


class DownBlock(Level):
    """A level on the way down, half the size at its end unless `last`."""

    def __init__(self, cfg: UNetConfig, level: int, rngs: nnx.Rngs, mesh: Mesh | None):
        dims, last = cfg.block_out_channels, level == cfg.levels - 1
        dins = [dims[max(level - 1, 0)], *[dims[level]] * (cfg.layers_per_block - 1)]
        attends = cfg.down_block_types[level] == 'CrossAttnDownBlock2D'
        super().__init__(cfg, level, dins, attends, rngs, mesh)
        self.downsamplers = nnx.List([] if last else [Downsample(cfg, dims[level], rngs)])

    def __call__(self, x: Array, given: Given) -> list[Array]:
        """Everything that the way up will be given, the output last."""
        outputs = []
        for i in range(len(self.resnets)):
            x = self.step(i, x, given)
            outputs.append(x)
        for layer in self.downsamplers:
            outputs.append(_run(self.cfg, self.mesh, layer, outputs[-1]))
        return outputs


class MidBlock(nnx.Module):
    """A residual block, a transformer, and a residual block of the last level's width."""

    def __init__(self, cfg: UNetConfig, rngs: nnx.Rngs, mesh: Mesh | None):
        dim = cfg.block_out_channels[-1]
        self.cfg, self.mesh = cfg, mesh
        self.resnets = nnx.List([
            ResnetBlock(cfg, dim, dim, rngs, eps=cfg.norm_eps, time_dim=cfg.time_dim)
            for _ in range(2)])
        self.attentions = nnx.List([Transformer(
            cfg, dim, cfg.attention_head_dim[-1], cfg.transformer_layers_per_block[-1], rngs,
            mesh)])

    def __call__(self, x: Array, given: Given) -> Array:
        x = _run(self.cfg, self.mesh, self.resnets[0], x, given.temb)
        x = self.attentions[0](x, given.context, given.mask)
        return _run(self.cfg, self.mesh, self.resnets[1], x, given.temb)


class UpBlock(Level):
    """A level on the way up, beside what came down; twice the size at its end but for the last.

    `place` counts from the mid block; `before` is the width of what comes from there, `skips` the
    widths of what came down, to be taken from their end.
    """

    def __init__(self, cfg: UNetConfig, place: int, before: int, skips: list[int],
                 rngs: nnx.Rngs, mesh: Mesh | None):
        level, count = cfg.levels - 1 - place, cfg.layers_per_block + 1
        dim = cfg.block_out_channels[level]
        dins = [(before if i == 0 else dim) + skips[-1 - i] for i in range(count)]
        attends = cfg.up_block_types[place] == 'CrossAttnUpBlock2D'
        super().__init__(cfg, level, dins, attends, rngs, mesh)
        self.upsamplers = nnx.List([Upsample(cfg, dim, rngs)] if level else [])

    def __call__(self, x: Array, skips: list[Array], given: Given) -> Array:
        """`skips` lose as many from their end as are used."""
        for i in range(len(self.resnets)):
            x = self.step(i, jnp.concatenate([x, skips.pop()], axis=-1), given)
        for layer in self.upsamplers:
            x = _run(self.cfg, self.mesh, layer, x, size=skips[-1].shape[1:3])
        return x


# --- The network ---


class Embedding(nnx.Module):
    """``[B, din] -> [B, dim]``: two products with SiLU between (diffusers `TimestepEmbedding`)."""

    def __init__(self, cfg: UNetConfig, din: int, rngs: nnx.Rngs):
        self.linear_1 = _linear(cfg, din, cfg.time_dim, rngs)
        self.linear_2 = _linear(cfg, cfg.time_dim, cfg.time_dim, rngs)

    def __call__(self, x: Array) -> Array:
        return self.linear_2(jax.nn.silu(self.linear_1(x)))


class UNet(nnx.Module):
    """The noise in a variance-preserving sample ``[B, H, W, C]``, fp32.

    Called with the sample, the step of the table ``[B]``, `embeds` ``[B, L, D]`` of the text and
    their mask (bool ``[B, L]``; None: all are read), the pooled text ``[B, P]``, and `time_ids`
    ``[B, 6]``: heights before widths, the original's, the crop's top left corner, the target's.
    Latents may have any size: an odd edge is rounded up on the way down. `mesh` is what attention
    by kernel and gathered kernels are laid out over; None is for one device.
    """

    def __init__(self, cfg: UNetConfig, rngs: nnx.Rngs, mesh: Mesh | None = None):
        dims, levels = cfg.block_out_channels, range(cfg.levels)
        self.cfg, self.mesh = cfg, mesh
        self.conv_in = conv(cfg, cfg.in_channels, dims[0], rngs)
        self.time_embedding = Embedding(cfg, dims[0], rngs)
        self.add_embedding = Embedding(cfg, cfg.projection_class_embeddings_input_dim, rngs)
        self.down_blocks = nnx.List([DownBlock(cfg, i, rngs, mesh) for i in levels])
        self.mid_block = MidBlock(cfg, rngs, mesh)
        # Widths of what came down: of conv_in, and of all that each level puts out.
        skips = [dims[0]]
        for block, dim in zip(self.down_blocks, dims):
            skips += [dim] * (len(block.resnets) + len(block.downsamplers))
        ups, before = [], dims[-1]
        for i in levels:
            ups.append(UpBlock(cfg, i, before, skips, rngs, mesh))
            before, skips = dims[-1 - i], skips[:-cfg.layers_per_block - 1]
        self.up_blocks = nnx.List(ups)
        self.conv_norm_out = GroupNorm(dims[0], cfg.norm_num_groups, cfg.norm_eps)
        self.conv_out = conv(cfg, dims[0], cfg.out_channels, rngs)

    def __call__(self, x: Array, step: Array, embeds: Array, mask: Array | None, pooled: Array,
                 time_ids: Array) -> Array:
        x, skips, given = self._down(x, step, embeds, mask, pooled, time_ids)
        for block in self.up_blocks:
            x = block(x, skips, given)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x))).astype(jnp.float32)

    def features(self, x: Array, step: Array, embeds: Array, mask: Array | None, pooled: Array,
                 time_ids: Array) -> Array:
        """The mid block's output ``[B, H / f, W / f, D]``, of inputs as in a call; nothing above.

        f is the config's `factor`. DMD2's classifier judges these (section 4.3 there).
        """
        return self._down(x, step, embeds, mask, pooled, time_ids)[0]

    def _down(self, x: Array, step: Array, embeds: Array, mask: Array | None, pooled: Array,
              time_ids: Array) -> tuple[Array, list[Array], Given]:
        """(the mid block's output, what the way up is given, what every block is given)."""
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        ids = timestep_embedding(time_ids.reshape(-1), cfg.addition_time_embed_dim)
        ids = ids.reshape(x.shape[0], -1)
        time = timestep_embedding(step, cfg.block_out_channels[0])
        added = jnp.concatenate([pooled.astype(jnp.float32), ids], axis=-1)
        temb = (self.time_embedding(time.astype(dtype))
                + self.add_embedding(added.astype(dtype)))
        given = Given(temb, embeds.astype(dtype), mask)

        x = rows_stay(self.conv_in(x.astype(dtype)), self.mesh)
        skips = [x]
        for block in self.down_blocks:
            outputs = block(x, given)
            x, skips = outputs[-1], skips + outputs
        return self.mid_block(x, given), skips, given
