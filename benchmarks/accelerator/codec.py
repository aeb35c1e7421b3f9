"""Refines the decoder of the embedded world's codec for a given time, on whatever device is there.

    python -m benchmarks.accelerator.codec --out=OUT --seconds=180 --config=emoji_codec \\
        --config.codec.frozen_encoder=True --config.init_from=codec.safetensors

The encoder, and so the latents that teachers are trained on, stays as it is. Scenes are composed
beforehand by as many processes as there are cores. Leaves in OUT: codec.safetensors (EMA, bf16),
codec.metrics.jsonl, codec.png (unseen images over their reconstructions) and codec.json. `--tiny`
proves it in a minute of a CPU.
"""

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

from absl import app, flags, logging

from benchmarks.accelerator import bounded, record
from ddmd_jax import config as config_lib

STARTED = time.monotonic()
PART = 1024  # scenes that are composed together
TINY = {'data': {'global_batch': 4}, 'train': {'steps': 60},
        'codec': {'sides': (8,), 'unseen': 4}}

_CONFIG = config_lib.define_flag()
_OUT = flags.DEFINE_string('out', None, 'Folder of the results.', required=True)
_SECONDS = flags.DEFINE_float('seconds', 180, 'When it should have ended.')
_SCENES = flags.DEFINE_integer('scenes', 262_144, 'How many are composed: 12 KB each.', PART)
_TINY = flags.DEFINE_boolean('tiny', False, 'Few scenes, small crops, a few steps.')


def composed(own: Any, step: int, count: int, processes: int) -> Any:
    """`own` over the first `count` scenes, which are composed here and now."""
    import numpy as np

    from ddmd_jax.families.emoji import codec, scenes

    images = np.empty((count, scenes.SIDE, scenes.SIDE, 3), np.uint8)
    parts = [range(i, min(i + PART, count)) for i in range(0, count, PART)]
    made = scenes.load().batches(codec.SEED, parts, processes)
    for part, (_, some) in zip(parts, made, strict=True):
        images[part.start:part.stop] = some
    return dataclasses.replace(
        own, rows=np.arange(count),
        lookup=lambda rows, side: codec.crops(images[rows], rows, side, step))


def main(_: list[str]) -> None:
    from PIL import Image

    from ddmd_jax import families
    from ddmd_jax.evaluation import pictures
    from ddmd_jax.parallel import sharding
    from ddmd_jax.train import codec

    logging.set_verbosity(logging.WARNING)
    config, out = _CONFIG.value, Path(_OUT.value)
    bounded.prepared(config, TINY if _TINY.value else None)
    own = families.get(config.teacher.name).codec(config)
    begun = time.monotonic()
    count, processes = _SCENES.value, os.cpu_count() or 1
    if _TINY.value:
        count, processes, own = PART, 1, dataclasses.replace(own, unseen=own.unseen[:16])
    own = composed(own, 2 ** (len(config.codec.widths) - 1), count, processes)
    figures = {'scenes': len(own.rows), 'scenes_seconds': round(time.monotonic() - begun, 1)}
    print(f'{len(own.rows)} scenes in {figures["scenes_seconds"]} s', flush=True)
    task = codec.Codec(config, own, sharding.make_mesh(config.mesh))
    ema, more = bounded.trained(task, config, STARTED + _SECONDS.value, out / 'codec.metrics.jsonl')
    measured = task.write(out / 'codec.safetensors', ema, more['steps'])
    real = own.unseen[:codec.SHOWN]
    grid = pictures.rows_of_images([images.astype('float32') / 127.5 - 1
                                    for images in (real, task.reconstruct(ema, real))])
    Image.fromarray(grid).save(out / 'codec.png')
    record.write(out, 'codec', figures | more | measured | {
        'peak_bytes': record.peak_bytes(), 'config': config.to_dict(),
        'total_seconds': round(time.monotonic() - STARTED, 1)})


if __name__ == '__main__':
    app.run(main)
