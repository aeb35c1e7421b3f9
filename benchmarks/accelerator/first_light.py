"""First light: the full-size teacher of a config at random weights, updated by the real programs.

    python -m benchmarks.accelerator.first_light --out=OUT --config=lumina [--config.x=y]

No file is read: shapes are the published network's, weights are drawn on the device, prompts and
real latents are random. The programs of `main` are compiled and run on the whole train state,
twice from the same seed: everything they say has to be finite, and the same again. `--config` is
any config of a published teacher; its mesh becomes `fsdp` over what devices there are if it does
not fit them. Leaves OUT/first_light.json (OUT/NAME.json with `--name`), written anew after each
stage. `--tiny` is the same at toy size.
"""

import math
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from absl import flags

from benchmarks.accelerator import record
from ddmd_jax import config as config_lib
from ddmd_jax.util import commands
from ddmd_jax.util.errors import UserError

STARTED = time.monotonic()
SHARE = 0.9  # of the time, which is planned for
FLAGS = flags.FLAGS


class NotLit(UserError):
    """Something was not finite, or not the same again."""


def define_flags() -> None:
    config_lib.define_flag()
    flags.DEFINE_string('out', None, 'Folder of the results.')
    flags.DEFINE_string('name', 'first_light', 'Of the file there.')
    flags.DEFINE_integer('updates', 3, 'Of each program in each of two runs, at most.', 1)
    flags.DEFINE_float('seconds', 180, 'When it should have ended; fewer updates then.')
    flags.DEFINE_float('tolerance', 0.0, 'Relative, by which the second run may be another.')
    flags.DEFINE_boolean('tiny', False, 'A few small layers, 64 x 64 pixels.')


def mesh_of(config: Any) -> Any:
    """The config's mesh; where the devices are not those of its pod, `fsdp` over all of them."""
    import jax

    from ddmd_jax.parallel import sharding

    try:
        return sharding.make_mesh(config.mesh)
    except sharding.ShardingError:
        config.mesh.update({'data': 1, 'fsdp': jax.device_count(), 'tensor': 1})
        return sharding.make_mesh(config.mesh)


def compiled(subject: Any) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """(Compiled programs by name, what is known of each before it has run)."""
    from ddmd_jax.planner import measure, programs

    found, _ = programs.programs(
        subject.config, subject.teacher, subject.planned.spec.mesh, subject.tokens)

    def one(kind: str) -> tuple[Any, float]:
        begun = time.monotonic()
        return subject.lower(kind).compile(), time.monotonic() - begun

    with ThreadPoolExecutor(2) as pool:
        made = dict(zip(subject.counts, pool.map(one, subject.counts)))
    known = {}
    for kind, (program, seconds) in made.items():
        planned = found[kind if kind in found else f'{kind}_step']
        memory = program.memory_analysis()
        known[kind] = {
            'compile_seconds': round(seconds, 1), 'analytic_flops': planned.analytic_flops,
            'planned_peak_bytes': memory and measure.peak_of(memory, planned.beside),
            'temporary_bytes': memory and memory.temp_size_in_bytes}
    return {kind: program for kind, (program, _) in made.items()}, known


def run(subject: Any, programs: dict[str, Any], updates: int,
        until: float = math.inf) -> tuple[list[dict[str, Any]], Any]:
    """(A line an update: its program, seconds, and metrics as numbers; the state at its end).

    Programs run in turn, from step 0. Ends after `updates` of each, after the first ones once
    `until` is past, or when something is not finite.
    """
    import jax

    frozen, lines, z, x = subject.planned.frozen, [], None, None
    state = jax.block_until_ready(subject.planned.spec.create())
    for _ in range(updates):
        for kind, program in programs.items():
            begun = time.monotonic()
            given = subject.batch_of(kind, z, x)
            found = jax.block_until_ready(program(frozen, state, given))
            seconds, metrics = time.monotonic() - begun, {}
            if kind == 'rollout':
                z, (x, *_) = found
            else:
                state, metrics, *made = found
                x = made[0] if made else x
            metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
            lines.append({'program': kind, 'seconds': seconds,
                          'peak_bytes_so_far': record.peak_bytes(), 'metrics': metrics})
            if not_finite(lines[-1]):
                return lines, state
        if time.monotonic() > until:
            break
    return lines, state


def not_finite(line: dict[str, Any]) -> str:
    """What of an update is not finite, in words; '' if all of it is."""
    bad = [f'{name} = {x}' for name, x in line['metrics'].items() if not math.isfinite(x)]
    if not bad and not line['metrics'].get('finite', True):
        bad = ['its gradient, whose update was left out']
    return ', '.join(bad)


def apart(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> tuple[float, str]:
    """(Largest relative difference of two runs' metrics, where it is); infinite for other updates.
    """
    if [x['program'] for x in first] != [x['program'] for x in second]:
        return math.inf, 'the number of updates'
    found = [(0.0, '')]
    for place, (a, b) in enumerate(zip(first, second)):
        for name, x in a['metrics'].items():
            y = b['metrics'][name]
            if x != y:
                found.append((abs(x - y) / max(abs(x), abs(y)),
                              f'{name} of update {place} ({a["program"]}): {x!r}, then {y!r}'))
    return max(found)


def speed(subject: Any, known: dict[str, dict[str, Any]],
          lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Times of each program, and of a step of the config, by what ran; the first run of each
    program is left out where there are more."""
    import jax

    rows, peak = subject.config.data.global_batch, record.peak_flops(
        jax.devices()[0].device_kind, subject.config.teacher.dtype)
    found: dict[str, Any] = {}
    for kind in subject.counts:
        times = [x['seconds'] for x in lines if x['program'] == kind]
        seconds = statistics.median(times[1:] or times)
        flops = known[kind]['analytic_flops']
        found[kind] = known[kind] | {
            'seconds': seconds, 'seconds_of_each': times, 'images_per_second': rows / seconds,
            'flops_utilisation': flops / seconds / peak if flops and peak else None,
            'peak_bytes_so_far': max(
                x['peak_bytes_so_far'] or 0 for x in lines if x['program'] == kind) or None}
    counts = subject.counts
    step = sum(count * found[kind]['seconds'] for kind, count in counts.items())
    flops = sum(count * (known[kind]['analytic_flops'] or 0) for kind, count in counts.items())
    return {'programs': found, 'of_a_step': counts, 'step_seconds': step,
            'images_per_second': sum(
                count for kind, count in counts.items() if kind != 'rollout') * rows / step,
            'flops_utilisation': flops / step / peak if flops and peak else None,
            'peak_flops': peak}


def lit(config: Any, out: Path, name: str = 'first_light', updates: int = 3,
        until: float = math.inf, tolerance: float = 0.0, tiny: bool = False) -> dict[str, Any]:
    """Everything, written as ``out/NAME.json`` stage by stage; the figures.

    Raises:
      NotLit: see there.
      ConfigError, ShardingError, AdapterError: the config cannot be run here.
    """
    import jax

    from benchmarks.accelerator import synthetic

    config_lib.check(config)
    network = synthetic.shrunk(config) if tiny else {}
    mesh = mesh_of(config)
    config_lib.check(config)
    figures: dict[str, Any] = {'tiny': tiny, 'config': config.to_dict()}

    def written(stage: str, **more: Any) -> None:
        figures.update(more | {'stage': stage, 'peak_bytes': record.peak_bytes(),
                               'seconds': round(time.monotonic() - STARTED, 1)})
        record.write(out, name, figures, 'first_light')
        print(f'{stage}, {figures["seconds"]} s', flush=True)

    subject = synthetic.subject(config, mesh, network)
    written('weights drawn', parameters=sum(
        x.size for x in jax.tree.leaves(subject.teacher.params)), tokens=subject.tokens,
        latents=subject.teacher.latents.shape, rows=config.data.global_batch)
    programs, known = compiled(subject)
    written('compiled', programs=known)
    # What is left is for two runs, of which the first may take its half.
    now = time.monotonic()
    first = run(subject, programs, updates, now + (until - now) / 2)[0]
    fault = not_finite(first[-1])
    written('first run', updates=first, **({} if fault else speed(subject, known, first)))
    if not fault:
        second = run(subject, programs, len(first) // len(programs))[0]
        fault = not_finite(second[-1])
        difference, where = apart(first, second)
        written('done', again=second, largest_difference=difference, difference_at=where,
                **({} if fault else speed(subject, known, [*first, *second])))
        if not fault and difference > tolerance:
            raise NotLit(f'a second run from the same seed is another: {where}')
    if fault:
        raise NotLit(f'an update is not finite: {fault}')
    return figures


def main(arguments: list[str]) -> None:
    commands.only_flags(arguments)
    commands.need(config='try --config=lumina', out='give a folder for the results')
    if FLAGS.config.task != 'distill':
        raise UserError(f'--config trains a {FLAGS.config.task}; an update of a distillation is '
                        'what is run, such as of --config=lumina')
    out = commands.folder('--out', FLAGS.out)
    try:
        found = lit(FLAGS.config, out, FLAGS.name, FLAGS.updates, STARTED + SHARE * FLAGS.seconds,
                    FLAGS.tolerance, FLAGS.tiny)
    except config_lib.ConfigError as e:
        print(e, file=sys.stderr)
        sys.exit(2)
    used = found['flops_utilisation']
    print(f'{found["step_seconds"]:.3f} s a step of {found["of_a_step"]}'
          + (f', {used:.1%} of the peak FLOP/s' if used else ''))


if __name__ == '__main__':
    commands.run('first_light', main, define_flags, config_lib.parser('first_light'))
