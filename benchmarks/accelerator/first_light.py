"""First light: the full-size teacher of a config at random weights, updated by the real programs.

    python -m benchmarks.accelerator.first_light --out=OUT --config=lumina [--config.x=y]

No file is read: shapes are the published network's, weights are drawn on the device, prompts and
real latents are random. The programs of `main` are compiled and run on the whole train state,
twice from the same seed: everything they say has to be finite, and the same again, to `--tolerance`
where kernels sum in no fixed order, as cuDNN's backward pass does. `--config` is any config of a
published teacher; its mesh becomes `fsdp` over what devices there are if it does not fit them.
Leaves OUT/first_light.json (OUT/NAME.json with `--name`), written anew after each stage.

`--largest` runs nothing: it doubles the batch for as long as the device, or `--memory_gib`, holds
what the compiler says of the largest program. `--tiny` is either at toy size.
"""

import contextlib
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
    """Something was not finite, not the same again, or too large."""


def define_flags() -> None:
    config_lib.define_flag()
    flags.DEFINE_string('out', None, 'Folder of the results.')
    flags.DEFINE_string('name', 'first_light', 'Of the file there.')
    flags.DEFINE_integer('updates', 3, 'Of each program in each of two runs, at most.', 1)
    flags.DEFINE_float('seconds', 180, 'When it should have ended; fewer updates then.')
    flags.DEFINE_float('tolerance', 0.0, 'Relative, by which the second run may be another.')
    flags.DEFINE_boolean('largest', False, 'Find the largest batch that fits.')
    flags.DEFINE_float('memory_gib', None, "Of a device, for --largest; default: the device's own.",
                       1e-6)
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


def compiled(subject: Any,
             precision: str = '') -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """(Compiled programs by name, what is known of each before it has run).

    `precision` is that of products; JAX's setting of it is its thread's own, and would not be
    known to those that compile here.
    """
    import jax

    from ddmd_jax.planner import measure, programs

    found, _ = programs.programs(
        subject.config, subject.teacher, subject.planned.spec.mesh, subject.tokens)

    def one(kind: str) -> tuple[Any, float]:
        begun = time.monotonic()
        with jax.default_matmul_precision(precision) if precision else contextlib.nullcontext():
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
    """(A line an update: its program, seconds, metrics as numbers, and the device's peak memory
    where this update has raised it; the state at its end).

    Programs run in turn, from step 0. Ends after `updates` of each, after the first ones once
    `until` is past, or when something is not finite.
    """
    import jax

    frozen, lines, z, x = subject.planned.frozen, [], None, None
    state = jax.block_until_ready(subject.planned.spec.create())
    for _ in range(updates):
        for kind, program in programs.items():
            begun, before = time.monotonic(), record.peak_bytes() or 0
            given = subject.batch_of(kind, z, x)
            found = jax.block_until_ready(program(frozen, state, given))
            seconds, metrics = time.monotonic() - begun, {}
            if kind == 'rollout':
                z, (x, *_) = found
            else:
                state, metrics, *made = found
                x = made[0] if made else x
            metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
            peak = record.peak_bytes() or 0
            lines.append({'program': kind, 'seconds': seconds,
                          'peak_bytes': peak if peak > before else None, 'metrics': metrics})
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
    program is left out where there are more. Images are those that programs have been given, and
    peak memory is told of programs that have raised it."""
    import jax

    rows, peak = subject.config.data.global_batch, record.peak_flops(
        jax.devices()[0].device_kind, subject.config.teacher.dtype)
    found: dict[str, Any] = {}
    for kind in subject.counts:
        times = [x['seconds'] for x in lines if x['program'] == kind]
        seconds = statistics.median(times[1:] or times)
        flops, planned = known[kind]['analytic_flops'], known[kind]['planned_peak_bytes']
        peak_bytes = max(x['peak_bytes'] or 0 for x in lines if x['program'] == kind) or None
        found[kind] = known[kind] | {
            'seconds': seconds, 'seconds_of_each': times, 'images_per_second': rows / seconds,
            'flops_utilisation': flops / seconds / peak if flops and peak else None,
            'peak_bytes': peak_bytes,
            'planned_to_peak': planned / peak_bytes if planned and peak_bytes else None}
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


def planned_peak(subject: Any) -> float:
    """Bytes of the largest program; infinite where the compiler refuses one.

    Raises:
      UserError: the compiler does not say.
    """
    try:
        found = [x['planned_peak_bytes'] for x in compiled(subject)[1].values()]
    except Exception as e:  # XLA's own kind is not public
        if 'RESOURCE_EXHAUSTED' not in str(e):
            raise
        return math.inf
    if None in found:
        raise UserError('the compiler for this device does not say how much memory a program needs')
    return max(found)


def largest(config: Any, out: Path, name: str, until: float = math.inf,
            memory: float | None = None, tiny: bool = False) -> dict[str, Any]:
    """The largest batch, of doublings of the config's, whose programs fit; as ``out/NAME.json``.

    Ends at the first that does not, or when another would not be compiled before `until`. `memory`
    is a device's, in bytes; None asks it.

    Raises:
      NotLit: not even the config's own fits.
      UserError: the device does not say how much memory it has.
    """
    import jax

    from benchmarks.accelerator import synthetic

    limit = memory or (jax.devices()[0].memory_stats() or {}).get('bytes_limit')
    if not limit:
        raise UserError('this device does not say how much memory it has; give --memory_gib')
    config_lib.check(config)
    network, tried, took = synthetic.shrunk(config) if tiny else {}, [], 0.0
    mesh = mesh_of(config)
    while not tried or tried[-1]['fits'] and time.monotonic() + took < until:
        begun = time.monotonic()
        config_lib.check(config)
        subject = synthetic.subject(config, mesh, network)
        peak = planned_peak(subject)
        took = time.monotonic() - begun
        tried.append({'rows': config.data.global_batch, 'planned_peak_bytes': peak,
                      'fits': peak <= limit, 'seconds': round(took, 1)})
        found = max((x['rows'] for x in tried if x['fits']), default=0)
        figures = {'tiny': tiny, 'config': config.to_dict(), 'memory_bytes': limit,
                   'tried': tried, 'largest_rows': found, 'ended': not tried[-1]['fits']}
        record.write(out, name, figures, 'first_light')
        print(f'{tried[-1]}', flush=True)
        del subject
        with config.unlocked():
            config.data.global_batch *= 2
    if not found:
        raise NotLit(f'not even {tried[0]["rows"]} rows fit {limit / 2**30:.2f} GiB')
    return figures


def main(arguments: list[str]) -> None:
    commands.only_flags(arguments)
    commands.need(config='try --config=lumina', out='give a folder for the results')
    if FLAGS.config.task != 'distill':
        raise UserError(f'--config trains a {FLAGS.config.task}; an update of a distillation is '
                        'what is run, such as of --config=lumina')
    out = commands.folder('--out', FLAGS.out)
    until = STARTED + SHARE * FLAGS.seconds
    try:
        if FLAGS.largest:
            found = largest(FLAGS.config, out, FLAGS.name, until,
                            FLAGS.memory_gib and FLAGS.memory_gib * 2**30, FLAGS.tiny)
            return print(f'{found["largest_rows"]} rows are the largest batch that fits'
                         + ('' if found['ended'] else ', of those there was time for'))
        found = lit(FLAGS.config, out, FLAGS.name, FLAGS.updates, until, FLAGS.tolerance,
                    FLAGS.tiny)
    except config_lib.ConfigError as e:
        print(e, file=sys.stderr)
        sys.exit(2)
    used = found['flops_utilisation']
    print(f'{found["step_seconds"]:.3f} s a step of {found["of_a_step"]}'
          + (f', {used:.1%} of the peak FLOP/s' if used else ''))


if __name__ == '__main__':
    commands.run('first_light', main, define_flags, config_lib.parser('first_light'))
