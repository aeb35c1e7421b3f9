"""Figures of docs/plans.md, made by the planner; no TPU is needed, about an hour on two cores.

    python benchmarks/scaling.py plans     # benchmarks/plans/*.json: ddmd_jax.plan on each topology
    python benchmarks/scaling.py steps     # and the steps of SDXL and Z-Image
    python benchmarks/scaling.py levers    # benchmarks/levers.json: one field changed at a time
    python benchmarks/scaling.py costs     # benchmarks/costs.json: counted, nothing is compiled
    python benchmarks/scaling.py tables    # writes all as tables into docs/plans.md
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
DOCS = ROOT / 'docs' / 'plans.md'
CONFIG = 'configs/lumina.py'
# (topology, global batch, further flags); four rows a chip.
PLANS = (('v5e:4x4', 64, ()), ('v5p:2x2x4', 64, ('--nosearch',)),
         ('v6e:4x4', 64, ('--nosearch',)),
         ('v5e:16x16', 1024, ('--nosearch', '--only=generator_step,critic_step')))
# (config, topology, fields, effort) by file, whose steps are compiled one by one: SDXL's network,
# which has few layers alike, takes the compiler ten minutes a program by the least effort (-1).
SDXL, LORA = 'sdxl:decoupled_hybrid', 'zimage:lora'
STEPS = {
    'sdxl_v6e_4x4_128': (SDXL, 'v6e:4x4', {}, -1),
    'sdxl_v5e_4x4_64': (SDXL, 'v5e:4x4', {'data.global_batch': 64, 'train.accumulate': 1}, -1),
    'sdxl_v5e_4x4_128': (SDXL, 'v5e:4x4', {'critic.order': 'one_rollout'}, -1),
    'zimage_lora_v5e_4x4_64': (LORA, 'v5e:4x4', {'data.global_batch': 64,
                                                 'critic.order': 'one_rollout'}, 0),
    'zimage_v5p_2x2x4_384': ('zimage', 'v5p:2x2x4', {'data.global_batch': 384}, -1),
    'zimage_v5e_16x16_1024': ('zimage', 'v5e:16x16', {
        'data.global_batch': 1024, 'mesh.fsdp': 256, 'critic.order': 'one_rollout'}, 0)}
# Configs that are counted, in their own order of updates ('') and in two others.
COUNTED = ('emoji', 'lumina', 'sdxl:dmd2', 'sdxl:decoupled_hybrid', 'zimage')
ORDERS = ('', 'critic_first', 'one_rollout')
ROOMY = 'v5p:2x2x4'  # where every lever's program fits
LEVERS = (
    {}, {'teacher.remat': 'dots'}, {'teacher.remat': 'none'}, {'teacher.attention': 'xla'},
    {'train.teacher_passes': 'apart'}, {'teacher.param_dtype': 'bfloat16'},
    {'optim.student.mu_dtype': 'bfloat16', 'optim.critic.mu_dtype': 'bfloat16'},
    {'train.offload': 'ema'}, {'train.offload': 'teacher'},
    {'data.global_batch': 128}, {'data.global_batch': 128, 'train.accumulate': 2},
    {'mesh.fsdp': 8, 'mesh.tensor': 2},
)


def plans() -> None:
    """A file for each of `PLANS`; those that stand are kept."""
    folder = HERE / 'plans'
    folder.mkdir(exist_ok=True)
    for topology, batch, flags in PLANS:
        file = folder / f'{topology.replace(":", "_")}_{batch}.json'
        if file.exists():
            continue
        command = [sys.executable, '-m', 'ddmd_jax.plan', f'--config={CONFIG}', '--json',
                   f'--topology={topology}', f'--config.data.global_batch={batch}',
                   '--config.data.name=embeddings']
        done = subprocess.run([*command, *flags], cwd=ROOT, text=True, capture_output=True,
                              check=False)
        if done.returncode:
            sys.exit(f'scaling: {" ".join(command)} failed: {done.stderr.strip()[-2000:]}')
        file.write_text(done.stdout)
        print(file)


def steps() -> None:
    """A file for each of `STEPS`; programs that stand there are kept."""
    for name, (config, topology, fields, effort) in STEPS.items():
        file = HERE / 'plans' / f'{name}.json'
        found = json.loads(file.read_text()) if file.exists() else {
            'config': config, 'topology': topology, 'fields': fields, 'effort': effort,
            'programs': {}}
        for which in _steps_of(config, fields):
            if which not in found['programs']:
                step, found['resident_bytes'] = _compiled(config, fields, topology, which, effort)
                found['programs'][which] = step
                file.write_text(json.dumps(found, indent=1) + '\n')
                print(file, which, {k: step.get(k) for k in ('fits', 'compile_seconds')})


def _steps_of(name: str, fields: dict[str, Any]) -> list[str]:
    """Programs of a step."""
    config = _config(name, fields)
    from ddmd_jax.planner import programs

    return list(programs.runs(config))


def levers() -> None:
    """The generator's step on `ROOMY` with each of `LEVERS`, compiled with the least effort."""
    found = []
    for changed in LEVERS:
        step, resident = _compiled(
            CONFIG, {'data.name': 'embeddings', **changed}, ROOMY, 'generator_step', -1)
        found.append({'changed': changed, 'resident_bytes': resident, **step})
        print(changed, {k: step.get(k) for k in ('fits', 'temp_bytes', 'compile_seconds')})
    (HERE / 'levers.json').write_text(json.dumps(
        {'topology': ROOMY, 'config': CONFIG, 'effort': -1, 'levers': found}, indent=1) + '\n')


def _compiled(name: str, fields: dict[str, Any], topology: str, which: str,
              effort: float) -> tuple[dict[str, Any], int]:
    """(One program of the config with fields changed; resident bytes)."""
    from ddmd_jax.parallel import sharding
    from ddmd_jax.planner import chips, command, measure, programs

    config = _config(name, fields)
    mesh = sharding.make_mesh(config.mesh, programs.topology(topology))
    built, resident = programs.programs(config, *command.parts_for(config, mesh))
    return measure.measure(built[which], chips.chip_for(topology), effort), resident


def _config(name: str, fields: dict[str, Any]) -> Any:
    os.environ['JAX_PLATFORMS'] = 'cpu'
    sys.path[:0] = [str(ROOT)]
    from ddmd_jax import config as config_lib

    config = config_lib.load(name)
    with config.unlocked():  # `critic.order` is there only where it is said
        config.update_from_flattened_dict(fields)
    return config


def costs() -> None:
    """By count, of every config: network evaluations of an update, and bytes that stay."""
    rows = [{'config': name, **{order: _evaluations(name, order) for order in ORDERS},
             'resident_bytes': {kind: _resident(name, kind) for kind in ('full', 'lora')}}
            for name in COUNTED]
    (HERE / 'costs.json').write_text(json.dumps(rows, indent=1) + '\n')


def _evaluations(name: str, order: str) -> float:
    """Network evaluations of a row for one update of the student."""
    from ddmd_jax.planner import programs

    config = _config(name, {'critic.order': order} if order else {})
    asked = programs.evaluations(config)
    return sum(often * asked[which] for which, often in programs.runs(config).items())


def _resident(name: str, kind: str) -> int:
    """What stays between the steps, on one device; a LoRA's rank is the default of the field."""
    import jax

    from ddmd_jax.parallel import sharding
    from ddmd_jax.planner import command, programs

    config = _config(name, {f'{network}.adapter.kind': kind for network in ('student', 'critic')})
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    return programs.programs(config, *command.parts_for(config, mesh))[1]


def _gib(size: float) -> str:
    return f'{size / 2**30:.2f}'


def _sent(program: dict[str, Any]) -> list[str]:
    """GiB that a chip sends in a program, and the seconds that it takes at least."""
    return [f'{sum(program["collective_bytes"].values()) / 2**30:.1f}',
            f'{program["roofline_seconds"]:.2f}']


def plans_table() -> str:
    """One line for each program of each plan."""
    lines = ['| topology, batch | program | peak GiB | of | TFLOP | sent GiB | least s |',
             '|' + '---|' * 7]
    for topology, batch, _ in PLANS:
        file = HERE / 'plans' / f'{topology.replace(":", "_")}_{batch}.json'
        found = json.loads(file.read_text())
        for name, p in found['programs'].items():
            lines.append('| ' + ' | '.join([
                f'{topology}, {batch}', f'`{name}`', _gib(p['peak_bytes']),
                _gib(found['usable_bytes_per_chip']), f'{p["flops"] / 1e12:.1f}',
                *_sent(p)]) + ' |')
    return '\n'.join(lines)


def steps_table() -> str:
    """One line for each program of each of `STEPS`."""
    lines = ['| config, topology | changed | program | peak GiB | of | TFLOP | of analytic | '
             'sent GiB | least s |', '|' + '---|' * 9]
    for name, (config, topology, fields, effort) in STEPS.items():
        if not (file := HERE / 'plans' / f'{name}.json').exists():
            continue  # has not been compiled yet
        words = ', '.join(f'`{k}={v}`' for k, v in fields.items())
        for which, p in json.loads(file.read_text())['programs'].items():
            title = f'`{config}`, {topology}{" *" * (effort < 0)}'
            start = f'| {title} | {words} | `{which}` | '
            if 'error' in p:
                lines.append(f'{start}refused: {p["error"][:80]} | | | | | |')
                continue
            usable = p['peak_bytes'] + p['headroom_bytes']
            lines.append(start + ' | '.join([
                _gib(p['peak_bytes']) + ' -' * (not p['fits']), _gib(usable),
                f'{p["flops"] / 1e12:.1f}',
                f'{p["flops"] / p["analytic_flops"]:.2f}', *_sent(p)]) + ' |')
    return '\n'.join(lines)


def costs_table() -> str:
    """One line for each config that is counted."""
    lines = ['| config | evaluations | `critic_first` | `one_rollout` | saved | resident GiB | '
             'by LoRA | share |', '|' + '---|' * 8]
    for row in json.loads((HERE / 'costs.json').read_text()):
        own, first, one = (row[order] for order in ORDERS)
        full, lora = (row['resident_bytes'][kind] for kind in ('full', 'lora'))
        lines.append(f'| `{row["config"]}` | {own:g} | {first:g} | {one:g} | '
                     f'{1 - one / first:.0%} | {_gib(full)} | {_gib(lora)} | {lora / full:.2f} |')
    return '\n'.join(lines)


def levers_table() -> str:
    """One line for each lever, with what it changes against the first."""
    found = json.loads((HERE / 'levers.json').read_text())['levers']
    first = found[0]
    lines = ['| changed | resident GiB | temporaries GiB | peak GiB | TFLOP | sent GiB |',
             '|' + '---|' * 6]
    for one in found:
        words = ', '.join(f'`{k}={v}`' for k, v in one['changed'].items()) or '(as shipped)'
        if 'error' in one:
            lines.append(f'| {words} | {_gib(one["resident_bytes"])} | refused: '
                         f'{one["error"][:80]} | | | |')
            continue
        less = one['peak_bytes'] - first['peak_bytes']
        lines.append(
            f'| {words} | {_gib(one["resident_bytes"])} | {_gib(one["temp_bytes"])} | '
            f'{_gib(one["peak_bytes"])} ({less / 2**30:+.2f}) | {one["flops"] / 1e12:.1f} | '
            f'{sum(one["collective_bytes"].values()) / 2**30:.1f} |')
    return '\n'.join(lines)


def tables() -> None:
    """Puts all tables between their marks in docs/plans.md."""
    text = DOCS.read_text()
    made_by = {'plans': plans_table, 'steps': steps_table, 'levers': levers_table,
               'costs': costs_table}
    for name, made in ((name, make()) for name, make in made_by.items()):
        start, end = f'<!-- {name}: benchmarks/scaling.py -->', f'<!-- end of {name} -->'
        before, rest = text.split(start)
        text = before + start + '\n' + made + '\n' + end + rest.split(end, 1)[1]
    DOCS.write_text(text)


def main(argv: list[str]) -> Any:
    known = {'plans': plans, 'steps': steps, 'levers': levers, 'costs': costs, 'tables': tables}
    if len(argv) != 1 or argv[0] not in known:
        sys.exit(f'scaling: say one of {", ".join(known)}')
    known[argv[0]]()


if __name__ == '__main__':
    main(sys.argv[1:])
