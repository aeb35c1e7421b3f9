"""Figures of docs/plans.md, made by the planner; no TPU is needed, about an hour on two cores.

    python benchmarks/scaling.py plans     # benchmarks/plans/*.json: ddmd_jax.plan on each topology
    python benchmarks/scaling.py levers    # benchmarks/levers.json: one field changed at a time
    python benchmarks/scaling.py tables    # writes both as tables into docs/plans.md
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


def levers() -> None:
    """The generator's step on `ROOMY` with each of `LEVERS`, compiled with the least effort."""
    found = []
    for changed in LEVERS:
        step, resident = _quick(changed, ROOMY, 'generator_step')
        found.append({'changed': changed, 'resident_bytes': resident, **step})
        print(changed, {k: step.get(k) for k in ('fits', 'temp_bytes', 'compile_seconds')})
    (HERE / 'levers.json').write_text(json.dumps(
        {'topology': ROOMY, 'config': CONFIG, 'effort': -1, 'levers': found}, indent=1) + '\n')


def _quick(changed: dict[str, Any], topology: str, which: str) -> tuple[dict[str, Any], int]:
    """(One program of the config with fields changed, by the least effort; resident bytes)."""
    os.environ['JAX_PLATFORMS'] = 'cpu'
    sys.path[:0] = [str(ROOT)]
    from configs import lumina
    from ddmd_jax.parallel import sharding
    from ddmd_jax.planner import chips, command, measure, programs, search

    config = lumina.get_config()
    for field, value in {'data.name': 'embeddings', **changed}.items():
        config = search.with_field(config, field, value)
    mesh = sharding.make_mesh(config.mesh, programs.topology(topology))
    built, resident = programs.programs(config, *command.parts_for(config, mesh))
    return measure.measure(built[which], chips.chip_for(topology), measure.LEAST_EFFORT), resident


def _gib(size: float) -> str:
    return f'{size / 2**30:.2f}'


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
                f'{sum(p["collective_bytes"].values()) / 2**30:.1f}',
                f'{p["roofline_seconds"]:.2f}']) + ' |')
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
    """Puts both tables between their marks in docs/plans.md."""
    text = DOCS.read_text()
    made_by = {'plans': plans_table, 'levers': levers_table}
    for name, made in ((name, make()) for name, make in made_by.items()):
        start, end = f'<!-- {name}: benchmarks/scaling.py -->', f'<!-- end of {name} -->'
        before, rest = text.split(start)
        text = before + start + '\n' + made + '\n' + end + rest.split(end, 1)[1]
    DOCS.write_text(text)


def main(argv: list[str]) -> Any:
    known = {'plans': plans, 'levers': levers, 'tables': tables}
    if len(argv) != 1 or argv[0] not in known:
        sys.exit(f'scaling: say one of {", ".join(known)}')
    known[argv[0]]()


if __name__ == '__main__':
    main(sys.argv[1:])
