"""What saving and resuming cost: stall of a save, time to resume, growth of memory.

    python benchmarks/resume.py            # writes benchmarks/resume.json; minutes on two cores

The stall and the resumption are those of `configs/emoji.py` with its own teacher and batch, for a
few steps; memory is watched over 4,000 steps of a toy network, with a save every 10, and again with
a single one at the end: while caches fill, and over the 2,000 steps after that.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]
STEPS, EVERY, DOCUMENTED = 6, 2, 20  # of the emoji run; what configs/emoji.py has for EVERY
TOY_STEPS, TOY_EVERY = 4000, 10
WARM, SETTLED, WINDOW = 500, 2000, 50  # steps that bound the slopes; of means over so many


def rss() -> int:
    """Resident bytes of this process."""
    return int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')


def emoji_config() -> Any:
    import tiny

    config = tiny.load_config('emoji')
    config.train.steps, config.checkpoint.every = STEPS, EVERY
    config.log.update({'every': 1000, 'images_every': 1000, 'probe': 0})
    return config


def toy_config(weights: Path) -> Any:
    config = emoji_config()
    config.teacher.path, config.student.steps, config.critic.updates = str(weights), 2, 1
    config.data.global_batch, config.train.steps = 4, TOY_STEPS
    config.checkpoint.every, config.log.every = TOY_EVERY, 50
    return config


def trained(config: Any, workdir: Path) -> dict[str, Any]:
    """Seconds of each step and save of one run, seconds until its first, and memory by step."""
    import jax

    from ddmd_jax.train import train
    from ddmd_jax.train.durable import resume, saving

    begun, ends, memory, stalls = time.monotonic(), [], [], []
    first, restored = [], []
    task = train.prepare(config)
    step, save, start = task.step, saving.Checkpoints.save, resume.start

    def timed_step(*args: Any) -> Any:
        first.append(time.monotonic())
        state, metrics = jax.block_until_ready(step(*args))
        ends.append(time.monotonic() - first[-1])
        memory.append(rss())
        return state, metrics

    def timed_save(self: Any, *args: Any) -> None:
        save(self, *args)
        stalls.append(self.stalled)

    def timed_start(*args: Any) -> Any:
        at = time.monotonic()
        state = jax.block_until_ready(start(*args))
        restored.append(time.monotonic() - at)
        return state

    task.step, saving.Checkpoints.save, resume.start = timed_step, timed_save, timed_start
    train.fit(task, config, workdir)
    return {'steps': ends[1:], 'saves': stalls, 'restore': restored[0],
            'ready': first[0] - begun if first else None, 'memory': memory}


def stall() -> dict[str, Any]:
    """The emoji run, then the same one resumed in this process's successor."""
    workdir = Path(sys.argv[2])
    found = trained(emoji_config(), workdir)
    step, save = statistics.median(found['steps']), max(found['saves'])
    size = sum(p.stat().st_size for p in (workdir / 'checkpoints' / str(STEPS)).rglob('*')
               if p.is_file())
    return {'step_seconds': step, 'stall_seconds_max': save, 'saves': len(found['saves']),
            'checkpoint_bytes': size, 'share_of_interval': save / (step * DOCUMENTED)}


def resumed() -> dict[str, Any]:
    config = emoji_config()
    config.train.steps = STEPS + 1
    found = trained(config, Path(sys.argv[2]))
    return {'restore_seconds': found['restore'], 'first_step_begins_seconds': found['ready']}


def slope(y: Any) -> tuple[float, float]:
    """(least squares slope, its standard error) of a series.

    The error is a bootstrap's, of residuals in blocks of five: they are not independent.
    """
    import numpy as np

    x, rng, size = np.arange(len(y)), np.random.default_rng(0), 5
    fit = np.polyfit(x, y, 1)
    line = np.polyval(fit, x)
    blocks = np.lib.stride_tricks.sliding_window_view(y - line, size)
    draw = lambda: blocks[rng.integers(len(blocks), size=-(-len(y) // size))].ravel()[:len(y)]
    drawn = [np.polyfit(x, line + draw(), 1)[0] for _ in range(2000)]
    return float(fit[0]), float(np.std(drawn))


def memory(every: int = TOY_EVERY) -> dict[str, Any]:
    """Resident memory of the toy run, and how it grows from when caches are filled."""
    import numpy as np
    sys.path.append(str(ROOT / 'tests' / 'faults'))
    import runs

    folder = Path(sys.argv[2])
    config = toy_config(runs.make_weights(folder))
    config.checkpoint.every = every
    found = trained(config, folder / f'toy{every}')
    y = np.asarray(found['memory'], float).reshape(-1, WINDOW).mean(axis=1)
    spans = {'filling': y[WARM // WINDOW:SETTLED // WINDOW], 'settled': y[SETTLED // WINDOW:]}
    slopes = {name: slope(part) for name, part in spans.items()}
    return {'steps': TOY_STEPS, 'saves': len(found['saves']),
            'stall_seconds_median': statistics.median(found['saves']),
            'step_seconds': statistics.median(found['steps']),
            'rss_bytes': {str(step): int(y[step // WINDOW - 1])
                          for step in (100, WARM, 1000, SETTLED, 3000, TOY_STEPS)},
            **{name: {'bytes_per_step': grows / WINDOW, 'standard_error': error / WINDOW}
               for name, (grows, error) in slopes.items()}}


PARTS = {'stall': stall, 'resumed': resumed, 'memory': memory,
         'memory_one_save': lambda: memory(TOY_STEPS)}


def main() -> None:
    """Each part in a process of its own."""
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in PARTS:
            done = subprocess.run(
                [sys.executable, __file__, name, folder], cwd=ROOT, check=True, text=True,
                stdout=subprocess.PIPE, env=os.environ | {
                    'JAX_PLATFORMS': 'cpu', 'JAX_COMPILATION_CACHE_DIR': f'{folder}/xla',
                    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'})
            results[name] = json.loads(done.stdout.splitlines()[-1])
            print(name, results[name], flush=True)
    (HERE / 'resume.json').write_text(json.dumps(results, indent=1) + '\n')


if __name__ == '__main__':
    if len(sys.argv) > 1:
        print(json.dumps(PARTS[sys.argv[1]]()))
    else:
        main()
