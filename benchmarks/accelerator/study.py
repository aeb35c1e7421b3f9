"""Runs of `ddmd_jax.study` on the embedded teacher, as many as fit into the time.

    python -m benchmarks.accelerator.study --out=OUT --seconds=240 [--suite=paper] [--processes=4]

A run is a process of its own; they share the device's memory. Leaves OUT/study/results with a JSON
file a run, the suite's report of them, and study.json, which says how many there are. Results that
stand there already, or in `--results`, are not made again. A run that the time's end stops is lost.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from absl import flags

from benchmarks.accelerator import record
from ddmd_jax.study import suites
from ddmd_jax.util import commands
from ddmd_jax.util.errors import UserError

STARTED = time.monotonic()
SHARE = 0.85  # of the time, after which runs are stopped
MEMORY = 0.9  # of the device's, for all of them
FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string('out', None, 'Folder of the results.')
    flags.DEFINE_float('seconds', 240, 'When it should have ended.')
    flags.DEFINE_string('suite', 'paper', 'Of the study.')
    flags.DEFINE_list('only', [], 'Experiments, by name; default all.')
    flags.DEFINE_integer('seeds', None, "How many; default the suite's.", 1)
    flags.DEFINE_integer('processes', 4, 'Runs at a time.', 1)
    flags.DEFINE_string('results', '', 'Folder of results that are there: docs/steps/results.')


def main(arguments: list[str]) -> None:
    commands.only_flags(arguments)
    commands.need(out='give a folder for the results')
    out = commands.folder('--out', FLAGS.out)
    try:
        suite = suites.find(FLAGS.suite)
        experiments = suites.chosen(suite, False, tuple(FLAGS.only))
    except ValueError as e:
        raise UserError(str(e)) from e
    folder, config = out / 'study', str(Path(__file__).parents[2] / 'configs' / 'emoji.py')
    results = folder / 'results'
    results.mkdir(parents=True, exist_ok=True)
    for known in Path(FLAGS.results).glob('*.json') if FLAGS.results else ():
        shutil.copy(known, results)
    before = len(list(results.glob('*.json')))
    study = [sys.executable, '-m', 'ddmd_jax.study', f'--suite={suite.name}', f'--config={config}',
             f'--workdir={folder}', f'--only={",".join(e.name for e in experiments)}',
             *([f'--seeds={FLAGS.seeds}'] if FLAGS.seeds else [])]
    running = subprocess.Popen(
        [*study, f'--processes={FLAGS.processes}'],
        env=os.environ | {'XLA_CLIENT_MEM_FRACTION': f'{MEMORY / FLAGS.processes:.3f}'})
    try:
        running.wait(max(1.0, STARTED + SHARE * FLAGS.seconds - time.monotonic()))
    except subprocess.TimeoutExpired:
        running.send_signal(signal.SIGTERM)  # which ends the runs under way
        running.wait()
    for left in ('runs', 'compile_cache'):
        shutil.rmtree(folder / left, ignore_errors=True)
    count = len(list(results.glob('*.json')))
    wanted = len(experiments) * (FLAGS.seeds or suite.seeds)
    record.write(out, 'study', {
        'suite': suite.name, 'results': count, 'new': count - before, 'wanted': wanted,
        'processes': FLAGS.processes, 'seconds': round(time.monotonic() - STARTED, 1)})
    print(f'{count} results, {count - before} of them new; {suite.name} wants {wanted}')
    if running.returncode not in (0, 1) or not count:
        raise UserError(f'the study ended with code {running.returncode}, and {count} results')
    if running.returncode:
        subprocess.run([*study, '--report_only'], check=False)


if __name__ == '__main__':
    commands.run('study', main, define_flags)
