"""Bidirectional grouped-query attention with a key padding mask, in three ways that agree.

`xla` is `jax.nn.dot_product_attention`. It runs everywhere and keeps the ``[B, H, S, S]`` scores
in memory. `splash` is the Pallas kernel that comes with JAX for TPUs
(`jax.experimental.pallas.ops.tpu.splash_attention`), `cudnn` is cuDNN's flash attention for
CUDA: they hold a block of scores at a time, so that memory grows with S, not with its square.
Softmax is fp32 in all. Only `xla` can be differentiated twice.

They differ where it does not matter: a query that is padding attends to padding in `splash` and
to the real tokens in the others. Its output is finite, and nothing may depend on it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec as P

from ddmd_jax.parallel.sharding import BATCH, batch_ways
from ddmd_jax.util.errors import UserError

Array = jax.Array

KINDS = ('auto', 'xla', 'splash', 'cudnn')

GPUS = ('gpu', 'cuda', 'rocm')  # platforms
LANES = 128  # width of a TPU's registers: the kernel's blocks are multiples of it
# Tokens of a query block, and of the keys that one pass of the inner loop takes.
TILE = 256
# Keys of a block at most. Beside them the backward kernel has values, both gradients, buffers for
# what comes next and fp32 sums in 16 MiB: 832 KiB still compiles for v5e, 1 MiB does not.
KV_BYTES = 640 * 1024


def resolve(kind: str, device: jax.Device, dtype: str, head_dims: Iterable[int]) -> str:
    """The implementation that `kind` means on a device: 'xla', 'splash' or 'cudnn'.

    Args:
      kind: one of `KINDS`; 'auto' is splash on a TPU, cudnn on a GPU that it runs on, else xla. On
        a GPU that it does not run on, a line says why.
      device: one of those that will run it.
      dtype: of queries, keys and values.
      head_dims: sizes of the heads of all layers.

    Raises:
      ValueError: unknown kind.
      UserError: 'cudnn' does not run there.
    """
    if kind not in KINDS:
        raise ValueError(f'unknown attention {kind!r}: known are {", ".join(KINDS)}')
    if kind == 'cudnn' or (kind == 'auto' and device.platform in GPUS):
        why = no_cudnn(device, dtype, head_dims)
        if why and kind == 'cudnn':
            raise UserError(f"teacher.attention = 'cudnn' cannot be had here: {why}; take 'auto'")
        if why:
            _warn(why)
        return 'xla' if why else 'cudnn'
    if kind == 'auto':
        return 'splash' if device.platform == 'tpu' else 'xla'
    return kind


@functools.cache  # networks of a process have it said once
def _warn(why: str) -> None:
    print(f"warning: attention is XLA's, which keeps all scores in memory, not cuDNN's: {why}",
          file=sys.stderr)


def no_cudnn(device: jax.Device, dtype: str, head_dims: Iterable[int]) -> str:
    """Why cuDNN's flash attention does not run, in words; '' if it does. See `resolve`.

    The limits are those of its backward pass on every GPU from Ampere on ("Support Matrix" in
    cuDNN's documentation of attention); Hopper's forward pass takes larger heads.
    """
    # JAX calls CUDA's and ROCm's devices 'gpu', and tells them apart as here.
    if device.platform not in GPUS or 'cuda' not in device.client.platform_version:
        return f'the device is no GPU of CUDA ({device.device_kind})'
    if float(device.compute_capability) < 8:
        return (f'{device.device_kind} has compute capability {device.compute_capability}, and 8.0 '
                'is needed')
    if dtype not in ('bfloat16', 'float16'):
        return f'teacher.dtype is {dtype}, and bfloat16 is needed'
    if other := sorted({dim for dim in head_dims if dim > 128 or dim % 8}):
        return f'heads of size {other[0]}, where multiples of 8 up to 128 are needed'
    return ''


def attend(q: Array, k: Array, v: Array, mask: Array | None, *, kind: str = 'xla',
           mesh: Mesh | None = None, interpret: bool = False) -> Array:
    """``softmax(q k' / sqrt(D)) v`` over the keys that are not padding; head h uses h // (H/K).

    Args:
      q: ``[B, S, H, D]``.
      k: ``[B, S, K, D]``, K a divisor of H, of q's dtype; v is like k. By `xla` there may be
        another number of keys than of queries.
      v: see k.
      mask: bool ``[B, S]`` of the keys, True for real tokens; None if all of them are. `cudnn`
        only counts them: there padding stands behind the real ones.
      kind: 'xla', 'splash' or 'cudnn'; see `resolve` for 'auto'.
      mesh: what a kernel is mapped over: batch over data and fsdp (if it divides), heads over
        tensor. None is for one device. `xla` does not need it, the compiler partitions it.
      interpret: run `splash` without a TPU, and the call of `cudnn` by XLA: slow, for tests.

    Returns:
      ``[B, S, H, D]`` in q's dtype.

    Raises:
      ValueError: unknown kind; heads that do not divide by the mesh (not xla).
    """
    if kind == 'xla':
        keys = None if mask is None else mask[:, None, None, :]
        return jax.nn.dot_product_attention(q, k, v, mask=keys)
    kernels = {'splash': _splash, 'cudnn': _cudnn}
    if kind not in kernels:
        raise ValueError(f'unknown attention {kind!r}: attend knows {", ".join(KINDS[1:])}, and '
                         'resolve() says which of them auto is')
    local = functools.partial(kernels[kind], interpret=interpret)
    inputs = (q, k, v) if mask is None else (q, k, v, mask)
    if mesh is None:
        return local(*inputs)
    _check_heads(q, k, mesh, kind)
    # A batch of a few pictures does not split over a pod: every device then does all of it.
    rows = BATCH if q.shape[0] % batch_ways(mesh) == 0 else P(None)
    heads = P(*rows, None, 'tensor')
    specs = (heads, heads, heads, rows)[:len(inputs)]
    # The compiler partitions no Pallas kernel, and JAX's rule for cuDNN's does not tie the lengths
    # to the batch: a device with some of the rows could be given the lengths of others. Splash does
    # not say over which mesh axes its outputs vary, so that check_vma would refuse it.
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=heads,
                         check_vma=False)(*inputs)


def _splash(q: Array, k: Array, v: Array, mask: Array | None = None, *,
            interpret: bool) -> Array:
    """`attend` by the kernel, on one device."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    batch, seq, heads, dim = q.shape
    tile, block = _block_sizes(seq, dim, k.dtype.itemsize)
    more_q, more_kv = -seq % tile, -seq % block
    # The kernel does not scale. Heads are the second axis there, and no dim need be padded.
    q = (q.astype(jnp.float32) * dim**-0.5).astype(q.dtype)
    lay = lambda x, more: jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))).swapaxes(1, 2)
    ids = None
    if mask is not None or more_kv:
        # Tokens attend to those of the same id: 1 is real, 0 is padding. No row is left without
        # keys, which would divide by zero: a token has itself, and where queries are added
        # below, so are keys.
        real = jnp.ones((batch, seq), jnp.int32) if mask is None else mask.astype(jnp.int32)
        lengthen = lambda more: jnp.pad(real, ((0, 0), (0, more)))
        ids = splash.SegmentIds(lengthen(more_q), lengthen(more_kv))
    everything = splash.FullMask((seq + more_q, seq + more_kv))
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([everything] * heads), head_shards=1, q_seq_shards=1,
        interpret=interpret, block_sizes=splash.BlockSizes(
            block_q=tile, block_kv=block, block_kv_compute=tile, block_q_dkv=tile,
            block_kv_dkv=block, block_kv_dkv_compute=tile, use_fused_bwd_kernel=True))
    out = jax.vmap(kernel)(lay(q, more_q), lay(k, more_kv), lay(v, more_kv), ids)
    return out.swapaxes(1, 2)[:, :seq]


def _cudnn(q: Array, k: Array, v: Array, mask: Array | None = None, *,
           interpret: bool) -> Array:
    """`attend` by cuDNN's flash attention, on one device.

    Padding is a length a row, which needs no mask of ``[S, S]``. Queries have none: those that are
    padding cost little, and so are as finite as the others. Gradients of keys and values that are
    padding are zeros, which is what cuDNN writes there (tests of JAX's and of Transformer Engine's
    hold it to that).
    """
    batch, seq = k.shape[:2]
    # Without lengths, its backward pass on Hopper is NaN where all scores of a query are below
    # -88 and S is no multiple of its tile (NVIDIA/cudnn-frontend, issues 160 and 1072). A row of
    # nothing but padding has one key, so that its softmax is not 0 / 0.
    lengths = (jnp.full((batch,), seq, jnp.int32) if mask is None
               else jnp.maximum(jnp.sum(mask, axis=1, dtype=jnp.int32), 1))
    if seq % 2:  # JAX refuses to differentiate it: a token more, which no length counts
        q, k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q, k, v))
    return jax.nn.dot_product_attention(
        q, k, v, key_value_seq_lengths=lengths,
        implementation='xla' if interpret else 'cudnn')[:, :seq]


def _block_sizes(seq: int, dim: int, itemsize: int) -> tuple[int, int]:
    """Tokens of a query block, and of the block of keys that is held while queries pass.

    Short sequences are one block. Long ones have query blocks of `TILE`, and as few blocks of
    keys as `KV_BYTES` allows, equal multiples of `TILE`: the fused backward kernel writes a
    ``[S, D]`` partial gradient of q for each of them. S = 4096 + 256 in bf16: 17 blocks of
    queries, 2 of 2304 keys (256 of them padding). Compiled for v5e, value and gradient there need
    a 16th of the temporary memory of square blocks of 256, and about half of their scheduled
    instructions (counted, not timed).
    """
    tile = min(TILE, _round_up(seq, LANES))
    tiles = -(-seq // tile)
    most = max(1, KV_BYTES // (tile * _round_up(dim, LANES) * itemsize))
    blocks = -(-tiles // most)
    return tile, tile * -(-tiles // blocks)


def _round_up(size: int, unit: int) -> int:
    return unit * -(-size // unit)


def _check_heads(q: Array, k: Array, mesh: Mesh, kind: str) -> None:
    """Raises ValueError unless each device has the same number of heads."""
    ways = mesh.shape['tensor']
    for what, size in (('query', q.shape[2]), ('key', k.shape[2])):
        if size % ways:
            raise ValueError(f'{kind} attention: the number of {what} heads, {size}, does not '
                             f"divide by the mesh's tensor = {ways}")
