"""The same update here and in plain PyTorch: equal first, then timed in turns.

    python -m benchmarks.accelerator.vs_torch --out=OUT --size=20m|100m|half|full [--compile]

Lumina by diffusers' own `Lumina2Transformer2DModel`, and ours, on the same weights, prompts, noises
and levels: backward simulation, CA and DM, clipping, AdamW and EMA of a generator's update,
denoising loss of a critic's. What each says of every update, losses and norms of gradients, has to
be the same; a tiny network in fp32 goes first. A side has the device to itself in its turns, and
makes its state anew in each. `--compile` brings in `torch.compile` as a third side.

In bf16 PyTorch has fp32 parameters under `torch.autocast`; its AdamW is fused, its random numbers
are made before the clock starts, and it does not look whether an update is finite. `half` is half
of the layers, for what states of both sides need in 80 GB. Leaves OUT/vs_torch.json.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from absl import flags

from benchmarks.accelerator import first_light, record, synthetic
from benchmarks.accelerator.torch_update import Torch, published
from ddmd_jax import config as config_lib
from ddmd_jax.util import commands
from ddmd_jax.util.errors import UserError

STARTED = time.monotonic()
SHARE = 0.9  # of the time, which is planned for
FLAGS = flags.FLAGS
SIDES = ('ours', 'torch', 'torch_compiled')
LIMITS = {'float32': 1e-3, 'bfloat16': 0.1}  # relative, of losses and norms of gradients
COMPARED = {'generator': ('loss', 'grad_norm'), 'critic': ('fake_loss', 'critic_grad_norm')}
MOVED_LIMIT = 0.02  # of what weights have moved by, in fp32: AdamW turns rounding into signs
MOST_COMPARED = 200_000_000  # parameters of networks whose weights are compared, too
PERIOD = 0.01  # seconds between two looks at the memory in use


@dataclasses.dataclass(frozen=True)
class Size:
    """A Lumina: fields of its network, an image's edge in pixels, tokens of a caption, a batch.

    Ours is split over `devices`; `tiny` is as `synthetic.shrunk` makes it.
    """

    network: dict[str, Any]
    edge: int
    tokens: int
    rows: int = 4
    devices: int = 1
    tiny: bool = False


SMALL = {'num_refiner_layers': 1, 'multiple_of': 64, 'axes_dim_rope': (16, 24, 24)}
SIZES = {
    'tiny': Size(synthetic.TINY_NETWORKS['lumina'], 64, 12, 2, tiny=True),
    '20m': Size(SMALL | {'hidden_size': 384, 'num_layers': 6, 'num_attention_heads': 6,
                         'num_kv_heads': 2, 'cap_feat_dim': 384}, 256, 32),
    '100m': Size(SMALL | {'hidden_size': 768, 'num_layers': 7, 'num_attention_heads': 12,
                          'num_kv_heads': 4, 'cap_feat_dim': 768}, 256, 32),
    'half': Size({'num_layers': 13}, 1024, 256),
    'full': Size({}, 1024, 256),
}
ON_CPU = {'fold_tokens': True, 'unroll': True}  # of networks that are timed there


def define_flags() -> None:
    flags.DEFINE_string('out', None, 'Folder of the results.')
    flags.DEFINE_string('name', 'vs_torch', 'Of the file there.')
    flags.DEFINE_enum('size', 'full', list(SIZES), 'Of the network.')
    flags.DEFINE_enum('dtype', None, list(LIMITS), 'Default: bfloat16 of half and full.')
    flags.DEFINE_integer('rows', None, 'Of a batch, a multiple of 4 times --devices.', 1)
    flags.DEFINE_integer('devices', 1, 'Of ours; launch/demo.sh has a CPU device a core.', 1)
    flags.DEFINE_integer('updates', 3, 'Of each program in a turn; the first is not timed.', 2)
    flags.DEFINE_integer('rounds', 3, 'Turns of each side, at most.', 1)
    flags.DEFINE_float('seconds', 180, 'When it should have ended; fewer rounds then.')
    flags.DEFINE_boolean('tiny_first', True, 'Whether a tiny network in fp32 goes first.')
    flags.DEFINE_boolean('compile', False, 'Whether torch.compile is a side, too.')


# --- What both are given ---


def subject_of(size: Size, dtype: str) -> synthetic.Subject:
    """The distillation of `configs/lumina.py` at that size, split over the first devices."""
    import jax

    from ddmd_jax.parallel import sharding

    config = config_lib.load('lumina').unlock()
    fields = {'teacher.dtype': dtype, 'mesh.data': 1, 'mesh.fsdp': size.devices}
    if dtype == 'float32':
        fields |= synthetic.FP32
    else:
        fields['teacher.param_dtype'] = dtype
    config.update_from_flattened_dict(fields)
    network, mesh = dict(size.network), sharding.make_mesh(
        {'fsdp': size.devices}, jax.devices()[:size.devices])
    if size.tiny:
        synthetic.shrunk(config)
    else:
        config.update_from_flattened_dict({
            'data.sizes': ((size.edge, size.edge),), 'data.lengths': (size.tokens,),
            'data.global_batch': size.rows, 'optim.student.warmup': 0, 'optim.critic.warmup': 0})
        network |= ON_CPU if jax.devices()[0].platform == 'cpu' else {}
    config_lib.check(config)
    return synthetic.subject(config, mesh, network)


# --- The sides: `turn(updates)` is a line an update, and the weights at its end ---


class Ours:
    """The two programs of `main`."""

    def __init__(self, subject: synthetic.Subject):
        import jax

        precision = 'highest' if subject.config.teacher.dtype == 'float32' else ''
        self.subject, self.device = subject, jax.devices()[0]
        self.programs, self.known = first_light.compiled(subject, precision)
        # Teacher and batch stay when a turn is over.
        self.resident = sum(x.nbytes for x in jax.tree.leaves(
            (subject.planned.frozen, subject.batch)))

    def turn(self, updates: int) -> tuple[list[dict[str, Any]], Callable[[str], Any]]:
        lines, state = first_light.run(self.subject, self.programs, updates)
        return lines, lambda name: published(getattr(state, name))


# --- Comparison ---


@contextlib.contextmanager
def watched(platform: str) -> Iterator[list[int]]:
    """Looks at the memory in use on a GPU: [before, most]; on a CPU nothing can be said.

    There a process keeps what is freed, and whoever comes second finds it.
    """
    if platform == 'cpu':
        yield []
        return

    def used() -> int:
        import torch

        free, total = torch.cuda.mem_get_info()
        return total - free

    found, over = [used(), used()], threading.Event()

    def look() -> None:
        while not over.wait(PERIOD):
            found[1] = max(found[1], used())

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


def differences(lines: list[dict[str, Any]], others: list[dict[str, Any]]) -> dict[str, float]:
    """The largest relative difference of each of `COMPARED`, over all updates."""
    found: dict[str, float] = {}
    for a, b in zip(lines, others, strict=True):
        for name in COMPARED[a['program']]:
            x, y = a['metrics'][name], b['metrics'][name]
            off = float(np.nan_to_num(abs(x - y) / abs(y), nan=np.inf))
            found[name] = max(found.get(name, 0.0), off)
    return found


def moved_apart(a: dict[str, Any], b: dict[str, Any], start: dict[str, Any]) -> float:
    """How far two results are apart, by how far the second has moved."""
    total = lambda x, y: sum(float(np.sum(np.square(np.float64(x[k]) - y[k]))) for k in y)
    return (total(a, b) / max(total(b, start), 1e-30)) ** 0.5


def summed_up(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Median seconds of each program of a turn, its first run left out."""
    return {kind: statistics.median([x['seconds'] for x in lines if x['program'] == kind][1:])
            for kind in COMPARED}


def compared(size: Size, dtype: str, sides: tuple[str, ...], updates: int, rounds: int,
             until: float = float('inf'),
             note: Callable[[dict[str, Any]], None] = lambda found: None) -> dict[str, Any]:
    """Figures of all sides; `equal` says whether they are the same update.

    `note` is given them after every turn; there is no round that would end after `until`.
    """
    import diffusers
    import jax
    import torch

    try:
        subject = subject_of(size, dtype)
    except config_lib.ConfigError as e:
        raise UserError(str(e)) from e
    weights, platform = published(subject.planned.frozen.teacher), jax.devices()[0].platform
    parameters = sum(x.size for x in weights.values())
    build = {'ours': lambda: Ours(subject),
             'torch': lambda: Torch(subject, size.network, weights, False),
             'torch_compiled': lambda: Torch(subject, size.network, weights, True)}
    runners = {name: build[name]() for name in sides}
    figures: dict[str, Any] = {name: {'turns': [], 'peak_bytes': []} for name in sides}
    found = {'parameters': parameters, 'dtype': dtype, 'size': dataclasses.asdict(size),
             'programs': runners['ours'].known, 'torch': torch.__version__,
             'diffusers': diffusers.__version__, 'sides': figures}
    first: dict[str, Any] = {}
    for count in range(rounds):
        begun = time.monotonic()
        for name, side in runners.items():
            with watched(platform) as memory:
                lines, at_end = side.turn(updates)
            if not count:
                ends = ('student', 'critic', 'ema') if parameters <= MOST_COMPARED else ()
                first[name] = lines, {k: at_end(k) for k in ends}
            del at_end  # and with it a state of ours
            if isinstance(side, Torch):
                figures[name] |= {'attention': side.attention, 'dynamo': side.dynamo()}
                side.free()
            figures[name]['turns'].append(summed_up(lines))
            if memory:
                figures[name]['peak_bytes'].append(memory[1] - memory[0] + side.resident)
            note(found)
        if not count:
            found |= agreement(first, weights, dtype)
        for name in sides[1:]:
            found[f'{name}_to_ours'] = {kind: [
                a[kind] / b[kind] for a, b in zip(figures[name]['turns'], figures['ours']['turns'])]
                for kind in COMPARED}
        if 2 * time.monotonic() - begun > until or not found['equal']:
            break
    note(found)
    return found


def agreement(first: dict[str, Any], start: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Whether all sides have taken the same updates as ours, and by how much they differ."""
    lines, ends = first['ours']
    apart = {name: differences(others, lines) for name, (others, _) in first.items()}
    moved = {name: {k: moved_apart(x, ends[k], start) for k, x in theirs.items()}
             for name, (_, theirs) in first.items()}
    near = all(x <= LIMITS[dtype] for found in apart.values() for x in found.values())
    same = dtype != 'float32' or all(x <= MOVED_LIMIT for m in moved.values() for x in m.values())
    return {'differences': apart, 'moved_apart': moved, 'limit': LIMITS[dtype],
            'equal': near and same, 'updates': {name: x for name, (x, _) in first.items()}}


def main(arguments: list[str]) -> None:
    commands.only_flags(arguments)
    commands.need(out='give a folder for the results')
    # Two libraries take turns on one device: memory that is free is given back.
    os.environ.setdefault('XLA_PYTHON_CLIENT_ALLOCATOR', 'platform')
    out, size = commands.folder('--out', FLAGS.out), SIZES[FLAGS.size]
    dtype = FLAGS.dtype or ('bfloat16' if FLAGS.size in ('half', 'full') else 'float32')
    size = dataclasses.replace(size, rows=FLAGS.rows or size.rows, devices=FLAGS.devices)
    if size.tiny and (FLAGS.rows or FLAGS.devices > 1):
        raise UserError('--size=tiny has two rows on one device: leave out --rows and --devices')
    sides, figures = SIDES if FLAGS.compile else SIDES[:2], {}

    def note(name: str, found: dict[str, Any]) -> None:
        figures[name] = found
        record.write(out, FLAGS.name, figures, 'vs_torch')

    wanted = functools.partial(compared, size, dtype, sides, FLAGS.updates, FLAGS.rounds)
    first = functools.partial(compared, SIZES['tiny'], 'float32', SIDES[:2], 2, 1)
    alone = size.tiny or not FLAGS.tiny_first
    runs = {FLAGS.size: wanted} if alone else {'tiny': first, FLAGS.size: wanted}
    for name, run in runs.items():
        found = run(STARTED + SHARE * FLAGS.seconds, functools.partial(note, name))
        print(f'{name}: {found["differences"]}, ' + ', '.join(
            f'{k}: {v}' for k, v in found.items() if k.endswith('_to_ours')), flush=True)
        if not found['equal']:
            raise UserError(f'{name}: the updates of both sides are not the same: '
                            f'{found["differences"]}, {found["moved_apart"]}')


if __name__ == '__main__':
    commands.run('vs_torch', main, define_flags)
