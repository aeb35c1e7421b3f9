"""How fast prompts are read: rows a second of the loader, in each mode; minutes on two cores.

    python benchmarks/input.py PROMPTS [RUN]    # writes benchmarks/input.json
    python benchmarks/input.py scenes           # scenes of emoji a second, on one core

PROMPTS is a set of prompts (`ddmd_jax.prepare prompts`). RUN, the folder of a run
that was trained on it, adds the share of its seconds in which no batch was ready.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import numpy as np  # noqa: E402

from ddmd_jax import embedding, families as teachers
from ddmd_jax.data import conditioning, embeddings, loader
from ddmd_jax.data.order import Order  # noqa: E402
from ddmd_jax.data.prompts import build as sets  # noqa: E402
from ddmd_jax.families.emoji import scenes  # noqa: E402
from ddmd_jax.parallel import sharding  # noqa: E402
from ddmd_jax.train import prompts as sources  # noqa: E402

BATCH, SECONDS = 64, 10
LUMINA = {'tokens': 256, 'width': 2304, 'rows': 256}  # of one prompt; how many are written


def rate(prompts: conditioning.Prompts, buckets: tuple[int, ...] = ()) -> float:
    """Rows a second of a loader that nothing waits for but this loop."""
    order = Order(prompts.rows, BATCH, 0, prompts.lengths, buckets)
    batches = loader.batches(order, prompts.read, np.arange(BATCH))
    next(batches)
    start, count = time.monotonic(), 0
    while time.monotonic() - start < SECONDS:
        next(batches)
        count += 1
    return count * BATCH / (time.monotonic() - start)


def of_luminas_size(folder: Path) -> conditioning.Prompts:
    """Random embeddings as large as Lumina's, at full length."""
    rng = np.random.default_rng(0)
    make = lambda: {'embeds': rng.standard_normal((LUMINA['tokens'], LUMINA['width']), 'f').astype(
        embeddings.FLOAT)}
    embeddings.write(folder, {'width': LUMINA['width'], 'length': LUMINA['tokens'],
                              'identity': 'random'}, make(),
                     (('random', make()) for _ in range(LUMINA['rows'])))
    return conditioning.open_embeddings(str(folder), LUMINA['width'])


def scenes_a_second(seconds: float = SECONDS) -> float:
    """How many scenes one core composes, and Grain's order hands on by number."""
    world, order, count = scenes.load(), Order(np.arange(2**20), BATCH, 0), 0
    start = time.monotonic()
    while time.monotonic() - start < seconds:
        world.batch(0, order[count].rows.tolist())
        count += 1
    return count * BATCH / (time.monotonic() - start)


def main(argv: list[str]) -> None:
    if argv == ['scenes']:
        return print(f'{scenes_a_second():.0f} scenes a second on one core')
    if not 1 <= len(argv) <= 2:
        sys.exit(__doc__)
    mesh = sharding.make_mesh({})
    text = teachers.load_teacher('emoji').text
    found: dict[str, Any] = {'prompts': len(sets.open_set(argv[0])), 'batch': BATCH,
                             'cores': os.cpu_count()}
    with tempfile.TemporaryDirectory() as scratch:
        online = sources.online(argv[0], text, mesh, measure=True)
        found['online_rows_per_second'] = rate(online)
        found['online_bucketed_rows_per_second'] = rate(online, (8, text.length))
        start = time.monotonic()
        embedding.embed(sets.open_set(argv[0]), text, mesh, Path(scratch) / 'e', 256)
        found['embed_seconds'] = time.monotonic() - start
        found['cached_rows_per_second'] = rate(
            conditioning.open_embeddings(f'{scratch}/e', text.width))
        found['cached_rows_per_second_of_luminas_size'] = rate(of_luminas_size(Path(scratch) / 'l'))
    if len(argv) > 1:
        seconds = json.loads((Path(argv[1]) / 'eval.json').read_text())['seconds']
        found['run_seconds'] = seconds['train']
        found['run_input_wait_share'] = seconds['input_wait'] / seconds['train']
    (ROOT / 'benchmarks' / 'input.json').write_text(json.dumps(found, indent=1) + '\n')
    print(json.dumps(found, indent=1))


if __name__ == '__main__':
    main(sys.argv[1:])
