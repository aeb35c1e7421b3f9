"""``python -m ddmd_jax.plan --config=configs/lumina.py --topology=v5e:4x4 [--json]``

Asks the TPU's own compiler what a distillation's steps cost on a topology: memory, products,
traffic. No TPU and no weights are needed; minutes of compiling are. Exit codes are `main`'s.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

# Shapes and constants live on the CPU; libtpu is only asked to compile.
os.environ['JAX_PLATFORMS'] = 'cpu'

from absl import app, flags, logging  # noqa: E402
from ml_collections import config_flags  # noqa: E402

FLAGS = flags.FLAGS


def define_flags() -> None:
    config_flags.DEFINE_config_file('config', None, 'A file of configs/.', lock_config=True)
    flags.DEFINE_string('topology', 'v5e:4x4', 'TPU generation and shape, as v5e:4x4.')
    flags.DEFINE_boolean('json', False, 'Print JSON rather than a table.')


def teacher_for(config: Any, mesh: Any) -> tuple[Any, int]:
    """(the config's teacher, the published one as shapes; tokens of a caption)."""
    from ddmd_jax import teachers
    from ddmd_jax.teachers import lumina

    t = config.teacher
    if t.name == 'lumina':
        return lumina.abstract(mesh, t.dtype, config.data.size, t.remat, t.attention), lumina.TOKENS
    teacher = teachers.load_family(t.name, t.path, None, t.dtype, None, t.remat)
    return teacher, teacher.encode([''])['mask'].shape[1]


def table(found: dict[str, Any]) -> str:
    """The report in words and GiB."""
    gib = lambda b: f'{b / 2**30:.2f} GiB'
    lines = [f'{found["topology"]}: {found["chips"]} chips of {gib(found["hbm_bytes_per_chip"])}, '
             f'global batch {found["global_batch"]}; per chip:',
             f'  resident (student, critic, EMA, optimisers, teacher)  '
             f'{gib(found["resident_bytes"])}']
    for name, p in found['programs'].items():
        if 'error' in p:
            lines.append(f'  {name}: does not fit: {p["error"]}')
            continue
        sent = sum(p['collective_bytes'].values())
        lines.append(
            f'  {name}: {"fits" if p["fits"] else "does not fit"}, peak {gib(p["peak_bytes"])} '
            f'(temporaries {gib(p["temp_bytes"])}); {p["flops"] / 1e12:.2f} TFLOP'
            + (f' without {p["kernel_calls_without_flops"]} attention kernels'
               if p['kernel_calls_without_flops'] else '')
            + f', {gib(p["hbm_bytes"])} through memory, {gib(sent)} sent; at least '
            f'{p["roofline_seconds"]:.2f} s, bound by {p["bound_by"]}; compiled in '
            f'{p["compile_seconds"]:.0f} s')
    return '\n'.join(lines)


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    if len(argv) > 1:
        sys.exit(f'plan: unexpected argument {argv[1]!r}; flags look like --topology=v5e:4x4')
    if FLAGS.config is None:
        sys.exit('plan: no --config given; try --config=configs/lumina.py')
    from ddmd_jax import config as config_lib, sharding
    from ddmd_jax.planner import programs
    from ddmd_jax.weights.flat import WeightsError

    try:
        config_lib.check(FLAGS.config)
        if FLAGS.config.task != 'distill':
            sys.exit('plan: only distillations are planned; give a config of that task')
        mesh = sharding.make_mesh(FLAGS.config.mesh, programs.topology(FLAGS.topology))
        c = FLAGS.config
        sharding.check_batch(c.data.global_batch, mesh, c.student.steps * c.train.accumulate)
        teacher, tokens = teacher_for(c, mesh)
        found = programs.report(c, teacher, mesh, FLAGS.topology, tokens)
    except config_lib.ConfigError as e:
        print(e, file=sys.stderr)
        sys.exit(2)
    except (programs.PlanError, sharding.ShardingError, WeightsError) as e:
        sys.exit(f'plan: {e}')
    print(json.dumps(found, indent=1) if FLAGS.json else table(found))


if __name__ == '__main__':
    define_flags()
    app.run(main)
