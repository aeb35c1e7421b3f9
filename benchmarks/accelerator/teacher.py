"""Trains the embedded teacher for a given time, on whatever device is there.

    python -m benchmarks.accelerator.teacher --out=OUT --seconds=240 --config=FILE [--config.x=y]

Goes on from `--config.init_from=teacher.safetensors`, else from scratch. All scenes are composed
beforehand by as many processes as there are cores, and encoded on the device. Leaves in OUT:
teacher.safetensors (EMA, bf16), teacher.metrics.jsonl, teacher.png (real images over guided
samples of their captions) and teacher.json. `--tiny` proves it in a minute of a CPU.
"""

import os
import time
from pathlib import Path
from typing import Any

from absl import app, flags, logging

from benchmarks.accelerator import bounded, record
from ddmd_jax import config as config_lib

STARTED = time.monotonic()
PART = 1024  # scenes that are composed and encoded together
TINY = {
    'teacher.model.denoiser': {
        'hidden_size': 32, 'num_layers': 1, 'num_attention_heads': 2, 'num_kv_heads': 1,
        'multiple_of': 16, 'axes_dim_rope': (4, 6, 6), 'cap_feat_dim': 16, 'unroll': False},
    'teacher.model.text': {'dim': 16, 'num_layers': 1, 'num_heads': 2},
    'data': {'global_batch': 8, 'scenes': 64}, 'train': {'steps': 60},
}

_CONFIG = config_lib.define_flag()
_OUT = flags.DEFINE_string('out', None, 'Folder of the results.', required=True)
_SECONDS = flags.DEFINE_float('seconds', 240, 'When it should have ended.')
_DTYPE = flags.DEFINE_string('dtype', 'bfloat16', "Of the denoiser's activations and products.")
_TINY = flags.DEFINE_boolean('tiny', False, 'A small network, a few scenes and steps.')


def fill(encoded: Any, processes: int) -> None:
    """Makes all of `EncodedScenes` at once, so that no step of the first epoch waits for them."""
    import numpy as np

    from ddmd_jax.families.emoji import words

    count = len(encoded.there)
    parts = [np.arange(i, min(i + PART, count)) for i in range(0, count, PART)]
    made = encoded.world.batches(encoded.seed, parts, processes)
    for rows, (found, images) in zip(parts, made, strict=True):
        padded = np.resize(images, (min(PART, count), *images.shape[1:]))  # one compiled shape
        encoded.latents[rows] = np.asarray(encoded.codec.encode(padded))[:len(rows)]
        captions = list(map(encoded.world.caption, found))
        encoded.ids[rows] = words.encode(captions, encoded.length)[0]
        encoded.there[rows] = True


def main(_: list[str]) -> None:
    from PIL import Image

    from ddmd_jax.train import pretrain

    logging.set_verbosity(logging.WARNING)
    config, out = _CONFIG.value, Path(_OUT.value)
    with config.unlocked():
        config.teacher.model.denoiser.dtype = _DTYPE.value
    bounded.prepared(config, TINY if _TINY.value else None)
    task = pretrain.prepare(config)
    begun = time.monotonic()
    fill(task.own.lookup, 1 if _TINY.value else os.cpu_count() or 1)
    figures = {'scenes': config.data.scenes, 'scenes_seconds': round(time.monotonic() - begun, 1)}
    print(f'{config.data.scenes} scenes in {figures["scenes_seconds"]} s', flush=True)
    ema, more = bounded.trained(task, config, STARTED + _SECONDS.value,
                                out / 'teacher.metrics.jsonl')
    task.own.save(out / 'teacher.safetensors', ema, more['steps'])
    Image.fromarray(task.own.show(ema)).save(out / 'teacher.png')
    record.write(out, 'teacher', figures | more | {
        'peak_bytes': record.peak_bytes(), 'config': config.to_dict(),
        'total_seconds': round(time.monotonic() - STARTED, 1)})


if __name__ == '__main__':
    app.run(main)
