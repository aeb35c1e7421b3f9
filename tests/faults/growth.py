"""``python tests/faults/growth.py SAVES SETTLED``: what saving adds to this process's memory.

Prints JSON: `arrays` of a checkpoint, `blocks_per_save` (Python's allocated ones, by least
squares) and `rss_growth` (bytes, median of the last 20 saves over that of the 20 after SETTLED).
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]
os.environ['JAX_PLATFORMS'] = 'cpu'

import jax
import numpy as np
import optax
import tiny

from ddmd_jax.data import loader
from ddmd_jax.data.order import Order
from ddmd_jax.families.emoji import teacher as emoji
from ddmd_jax.parallel import sharding
from ddmd_jax.train import state as st
from ddmd_jax.train.durable import saving
from ddmd_jax.train.feed import Feed


def rss() -> int:
    return int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')


def main(saves: int, settled: int) -> dict[str, float]:
    tx, tree = optax.adam(1e-3), tiny.make_params()[0]
    mesh = sharding.make_mesh({'data': 1}, jax.devices()[:1])
    state = st.create(lambda t: st.fresh(t, tx, t, tx), emoji.RULES, mesh, tree)
    advance = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    data = Feed(loader.batches(Order(np.arange(64), 2, 0), lambda rows, length: rows, 2),
                lambda batch: batch)
    blocks, memory = [], []
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = saving.Checkpoints(Path(folder), keep=2, manifest={'a': 1})
        for step in range(1, saves + 1):
            state = advance(state)
            checkpoints.save(step, state, data)
            assert checkpoints.wait() == ''
            blocks.append(sys.getallocatedblocks())
            memory.append(rss())
        checkpoints.close()
    blocks, memory = blocks[settled:], memory[settled:]
    return {'arrays': len(jax.tree.leaves(state)),
            'blocks_per_save': float(np.polyfit(np.arange(len(blocks)), blocks, 1)[0]),
            'rss_growth': statistics.median(memory[-20:]) - statistics.median(memory[:20])}


if __name__ == '__main__':
    print(json.dumps(main(*map(int, sys.argv[1:]))))
