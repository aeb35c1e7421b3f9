"""``python -m ddmd_jax.plan --config=configs/lumina.py --topology=v5e:4x4 [--json]``

Asks the TPU's own compiler what a distillation's programs cost on a topology: memory, products,
traffic; the largest batch that fits, and what would make one fit. No TPU and no weights are
needed; minutes of compiling are. Exit codes are `main`'s.
"""

import dataclasses
import json
import os
import sys
from typing import Any

# Shapes and constants live on the CPU; libtpu is only asked to compile.
os.environ['JAX_PLATFORMS'] = 'cpu'

from absl import flags  # noqa: E402

from ddmd_jax import config as config_lib  # noqa: E402
from ddmd_jax.util import commands  # noqa: E402
from ddmd_jax.util.errors import UserError  # noqa: E402

FLAGS = flags.FLAGS
ONLINE = ('prompts', 'images')  # data sets whose captions are encoded on the mesh


def define_flags() -> None:
    config_lib.define_flag()
    flags.DEFINE_string('topology', 'v5e:4x4', 'TPU generation and shape, as v5e:4x4.')
    flags.DEFINE_boolean('json', False, 'Print JSON rather than a table.')
    flags.DEFINE_boolean('search', True, 'Look for the largest batch that fits, and for levers '
                         'where something does not; --nosearch saves minutes.')
    flags.DEFINE_list('only', [], 'Programs to compile, of generator_step, critic_step, '
                      'critic_on_images, rollout, sample, decode and encode; default: all.')
    flags.DEFINE_boolean('layout', False, 'Print the layout of every parameter; compile nothing.')


def parts_for(config: Any, mesh: Any) -> tuple[Any, Any, int, Any]:
    """(The config's teacher, `mesh`, tokens of a caption, the text encoder if it is to run).

    A published teacher's parameters are shapes.
    """
    from ddmd_jax import families

    t, family = config.teacher, families.get(config.teacher.name)
    options = families.LoadOptions(t.path, mesh, t.dtype, _largest(config), t.remat, t.attention,
                                   t.param_dtype, t.variant)
    if family.abstract:
        teacher = family.abstract(options)
    else:  # no array can lie on devices that are only described
        teacher = family.load_teacher(dataclasses.replace(options, mesh=None))
    tokens = max(config.data.get('lengths', ()), default=teacher.text.length)
    return teacher, mesh, tokens, teacher.text if config.data.name in ONLINE else None


def _largest(config: Any) -> Any:
    """The size of the run's largest pictures: what has to fit."""
    return max(config.data.get('sizes', ()), key=lambda size: size[0] * size[1], default=None)


def main(arguments: list[str]) -> None:
    commands.only_flags(arguments)
    commands.need(config='try --config=lumina')
    for flag in ('json', 'only'):
        if FLAGS.layout and FLAGS[flag].value:
            raise UserError(f'--layout compiles nothing and prints a table; leave out --{flag}')
    from ddmd_jax.parallel import sharding
    from ddmd_jax.planner import chips, layout, plan, programs
    from ddmd_jax.train import distillation

    chips.chip_for(FLAGS.topology)
    try:
        config_lib.check(FLAGS.config)
        if FLAGS.config.task != 'distill':
            raise UserError('only distillations are planned; give a config of that task')
        mesh = sharding.make_mesh(FLAGS.config.mesh, programs.topology(FLAGS.topology))
        c = FLAGS.config
        sharding.check_batch(c.data.global_batch, mesh, distillation.parts_of_batch(c))
        if FLAGS.layout:
            print(layout.layout(c, *parts_for(c, mesh)))
            return
        planned = plan.plan(c, parts_for, mesh, FLAGS.topology, FLAGS.search, FLAGS.only)
    except config_lib.ConfigError as e:
        print(e, file=sys.stderr)
        sys.exit(2)
    print(json.dumps(planned, indent=1) if FLAGS.json else plan.table(planned))


def run() -> None:
    commands.run('plan', main, define_flags, config_lib.parser('plan'))
