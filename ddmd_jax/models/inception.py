"""Inception-v3 as FID knows it (``inception-2015-12-05``), up to its 2048 pooled features.

It is TensorFlow's graph of 2015 and not torchvision's network of the same name: averages of a
window leave its padding out, and the last block's pool takes maxima. Layers are named as in the
published PyTorch file (torch-fidelity, pytorch-fid: ``…inception-2015-12-05-6726825d.pth``).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from ddmd_jax.weights.names import Entry

Array = jax.Array

SIDE = 299
FEATURES = 2048
EPS = 1e-3
UNUSED = (r'fc\.(weight|bias)', r'.*\.num_batches_tracked')
RULES = ((r'.', ()),)  # 24 million parameters: every device has all of them

# A convolution is (name, channels, kernel, stride). A branch is a pool or None, and steps one after
# the other; a step of two convolutions puts their channels side by side.
Size = tuple[int, int]
Conv = tuple[str, int, Size, int]


def _conv(name: str, channels: int, kernel: int | Size = 1, stride: int = 1) -> Conv:
    return name, channels, (kernel, kernel) if isinstance(kernel, int) else kernel, stride


def _block_a(pool: int) -> tuple:
    return ((None, _conv('branch1x1', 64)),
            (None, _conv('branch5x5_1', 48), _conv('branch5x5_2', 64, 5)),
            (None, _conv('branch3x3dbl_1', 64), _conv('branch3x3dbl_2', 96, 3),
             _conv('branch3x3dbl_3', 96, 3)),
            ('average', _conv('branch_pool', pool)))


_BLOCK_B = ((None, _conv('branch3x3', 384, 3, 2)),
            (None, _conv('branch3x3dbl_1', 64), _conv('branch3x3dbl_2', 96, 3),
             _conv('branch3x3dbl_3', 96, 3, 2)),
            ('halve',))


def _block_c(width: int) -> tuple:
    return ((None, _conv('branch1x1', 192)),
            (None, _conv('branch7x7_1', width), _conv('branch7x7_2', width, (1, 7)),
             _conv('branch7x7_3', 192, (7, 1))),
            (None, _conv('branch7x7dbl_1', width), _conv('branch7x7dbl_2', width, (7, 1)),
             _conv('branch7x7dbl_3', width, (1, 7)), _conv('branch7x7dbl_4', width, (7, 1)),
             _conv('branch7x7dbl_5', 192, (1, 7))),
            ('average', _conv('branch_pool', 192)))


_BLOCK_D = ((None, _conv('branch3x3_1', 192), _conv('branch3x3_2', 320, 3, 2)),
            (None, _conv('branch7x7x3_1', 192), _conv('branch7x7x3_2', 192, (1, 7)),
             _conv('branch7x7x3_3', 192, (7, 1)), _conv('branch7x7x3_4', 192, 3, 2)),
            ('halve',))


def _block_e(pool: str) -> tuple:
    return ((None, _conv('branch1x1', 320)),
            (None, _conv('branch3x3_1', 384),
             (_conv('branch3x3_2a', 384, (1, 3)), _conv('branch3x3_2b', 384, (3, 1)))),
            (None, _conv('branch3x3dbl_1', 448), _conv('branch3x3dbl_2', 384, 3),
             (_conv('branch3x3dbl_3a', 384, (1, 3)), _conv('branch3x3dbl_3b', 384, (3, 1)))),
            (pool, _conv('branch_pool', 192)))


BLOCKS = {
    'Mixed_5b': _block_a(32), 'Mixed_5c': _block_a(64), 'Mixed_5d': _block_a(64),
    'Mixed_6a': _BLOCK_B, 'Mixed_6b': _block_c(128), 'Mixed_6c': _block_c(160),
    'Mixed_6d': _block_c(160), 'Mixed_6e': _block_c(192), 'Mixed_7a': _BLOCK_D,
    'Mixed_7b': _block_e('average'), 'Mixed_7c': _block_e('largest'),
}
POOLS = {
    'average': lambda x: nnx.avg_pool(x, (3, 3), (1, 1), 'SAME', count_include_pad=False),
    'largest': lambda x: nnx.max_pool(x, (3, 3), (1, 1), 'SAME'),
    'halve': lambda x: nnx.max_pool(x, (3, 3), (2, 2), 'VALID'),
}


class Norm(nnx.Module):
    """A batch norm at inference, by torch's names."""

    def __init__(self, channels: int):
        self.weight, self.running_var = (nnx.Param(jnp.ones(channels)) for _ in range(2))
        self.bias, self.running_mean = (nnx.Param(jnp.zeros(channels)) for _ in range(2))

    def __call__(self, x: Array) -> Array:
        scale = self.weight[...] * jax.lax.rsqrt(self.running_var[...] + EPS)
        return (x - self.running_mean[...]) * scale + self.bias[...]


class ConvNorm(nnx.Module):
    """Convolution, norm, ReLU; `padding` is the same on both sides of an axis."""

    def __init__(self, din: int, conv: Conv, rngs: nnx.Rngs, padding: bool = True):
        _, channels, kernel, stride = conv
        pads = [(k // 2 * (padding and stride == 1),) * 2 for k in kernel]
        self.conv = nnx.Conv(din, channels, kernel, stride, padding=pads, use_bias=False, rngs=rngs)
        self.bn = Norm(channels)

    def __call__(self, x: Array) -> Array:
        return jax.nn.relu(self.bn(self.conv(x)))


class Block(nnx.Module):
    """Branches side by side; `width` is how many channels come out."""

    def __init__(self, din: int, branches: tuple, rngs: nnx.Rngs):
        self.branches, self.width = nnx.static(branches), 0
        for _, *steps in branches:
            channels = din
            for step in steps:
                convs = _together(step)
                for conv in convs:
                    setattr(self, conv[0], ConvNorm(channels, conv, rngs))
                channels = sum(conv[1] for conv in convs)
            self.width += channels

    def __call__(self, x: Array) -> Array:
        found = []
        for pool, *steps in self.branches:
            y = x if pool is None else POOLS[pool](x)
            for step in steps:
                y = jnp.concatenate([getattr(self, conv[0])(y) for conv in _together(step)], -1)
            found.append(y)
        return jnp.concatenate(found, axis=-1)


def _together(step: tuple) -> tuple[Conv, ...]:
    """The convolutions of a step: one, or those of a pair."""
    return (step,) if isinstance(step[0], str) else step


class Inception(nnx.Module):
    """``[B, 299, 299, 3] fp32 in [0, 255] -> [B, 2048] fp32``."""

    def __init__(self, rngs: nnx.Rngs):
        stem = lambda din, *conv, **more: ConvNorm(din, _conv('', *conv), rngs, **more)
        self.Conv2d_1a_3x3 = stem(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = stem(32, 32, 3, padding=False)
        self.Conv2d_2b_3x3 = stem(32, 64, 3)
        self.Conv2d_3b_1x1 = stem(64, 80)
        self.Conv2d_4a_3x3 = stem(80, 192, 3, padding=False)
        width = 192
        for name, branches in BLOCKS.items():
            block = Block(width, branches, rngs)
            setattr(self, name, block)
            width = block.width

    def __call__(self, pixels: Array) -> Array:
        x = (pixels - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(POOLS['halve'](x)))
        x = POOLS['halve'](x)
        for name in BLOCKS:
            x = getattr(self, name)(x)
        return jnp.mean(x, axis=(1, 2))


def entry(path: str) -> Entry:
    """Published counterpart of our parameter at `path`."""
    name = path.replace('/', '.')
    if name.endswith('.kernel'):
        return Entry(name.removesuffix('kernel') + 'weight', 'conv')
    return Entry(name)
