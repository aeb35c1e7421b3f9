"""The flags of `evaluate`, and which of them nobody would look at: all functions raise `UserError`.

Nothing here imports JAX, which takes seconds: not before the flags are right.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from ddmd_jax.util import commands, places
from ddmd_jax.util.errors import UserError

if TYPE_CHECKING:
    from ddmd_jax.evaluation.suites import Suite

FLAGS = flags.FLAGS
flags.disclaim_key_flags()  # they are the command's, and in its --help
TEACHER_STEPS = 50
ROWS = ('student', 'teacher_guided', 'teacher_few_step', 'teacher_in_student_sampler')

# All flags, by who looks at them; what is given to somebody else is refused.
DRAWING = ('step', 'teacher_path', 'variant', 'rows', 'steps', 'sampler', 'teacher_steps',
           'guidance', 'solver', 'size', 'batch', 'fsdp', 'keep')
MEASURING = ('checkpoint', 'model', 'suite', 'prompts', 'count', 'limit', 'seed', 'official',
             'images', 'metrics', 'weights', 'python', 'reference', 'results', 'out')
SHOWING = ('prompts_shown', 'best', 'worst', 'seeds')
OF_MODE = {'compare': ('suite', 'out'), 'blind': ('suite', 'out', 'prompts_shown', 'seed'),
           'grid': ('suite', 'out', *SHOWING)}
OF_ROWS = {'teacher_steps': ROWS[1:2], 'guidance': ROWS[1:2], 'solver': ROWS[1:2],
           'steps': (ROWS[0], *ROWS[2:]), 'sampler': (ROWS[0], ROWS[3])}


def define_flags() -> None:
    commands.define_places('checkpoint', 'Folder of a run (its --workdir); may be repeated, for '
                           'runs of one teacher.')
    flags.DEFINE_integer('step', None, 'Checkpoint to draw with; default: the newest.', 1)
    commands.define_place('model', '', "Instead of a run, a teacher: its family's name, or the "
                          'path of published weights or of an exported student.', places.ANY)
    commands.define_place('teacher_path', '', 'Path of the teacher if it moved.', places.ANY)
    flags.DEFINE_string('variant', None, "Variant of the teacher's weights, as fp16; default: "
                        "the run's; '' is none.")
    flags.DEFINE_list('suite', [], 'Suites: hps_v2, hps_v3, dpg, geneval, t2i_compbench, coco10k, '
                      "the family's own by its name, or my_module.SUITE.")
    commands.define_places('prompts', 'SUITE=PATH, your copy of its prompt files.', head='SUITE')
    flags.DEFINE_list('count', None, "SEEN,HELD_OUT prompts of a family's own suite; default: the "
                      "run's.")
    flags.DEFINE_integer('limit', None, 'Only the first prompts of every group, for a try.', 1)
    flags.DEFINE_list('rows', [], f'What to draw, of {", ".join(ROWS)}; default: all for a '
                      "family's own suite, else the student, or the guided teacher without a run.")
    flags.DEFINE_integer('seed', 0, 'Seed.', 0, 2**32 - 1)
    flags.DEFINE_integer('steps', None, "Steps of the student; default: the run's.", 1)
    flags.DEFINE_enum('sampler', None, ('renoise', 'deterministic'),
                      "Sampler of the student; default: the run's.")
    flags.DEFINE_integer('teacher_steps', TEACHER_STEPS, 'Steps of the guided teacher.', 1)
    flags.DEFINE_float('guidance', None, "Its guidance scale; default: the run's, or its "
                       "family's.", 0)
    flags.DEFINE_enum('solver', 'euler', ('euler', 'heun'), 'Its ODE solver.')
    flags.DEFINE_list('size', None, "HEIGHT,WIDTH in pixels; default: the teacher's own.")
    flags.DEFINE_integer('batch', 8, 'Images drawn and written at a time, over all devices; it '
                         'changes no image.', 1)
    flags.DEFINE_integer('fsdp', 1, 'Devices that share one copy of the weights.', 1)
    flags.DEFINE_enum('keep', 'arrayrecord', ('arrayrecord', 'png'), 'How images are kept.')
    flags.DEFINE_boolean('official', False, "Also write images as the suites' own scorers expect "
                         'them, into DIR/official/SUITE/ROW.')
    commands.define_place('images', '', 'Measure the images of this folder, in the layout of the '
                          'suite, instead of drawing.')
    flags.DEFINE_list('metrics', None, "Metrics; default: the suite's.")
    commands.define_places('weights', 'METRIC=PATH of its weights; may be repeated for one that '
                           'wants several; default: the hub.', places.ANY, head='METRIC')
    commands.define_places('python', 'METRIC=PATH of a Python that has the package by which its '
                           'authors measure it: hps_v3 (hpsv3 on PyPI).', places.LOCAL,
                           head='METRIC')
    commands.define_place('reference', '', 'Folder of real images, for FID and its like.')
    commands.define_places('results', "SUITE=PATH or SUITE:ROW=PATH, what the suite's own scorer "
                           'has written.', head='SUITE')
    # Images are added to it one batch after another, and read again at random.
    commands.define_place('out', '', 'Folder to write to; of --compare, --blind and --grid: a '
                          'file.', places.LOCAL)
    flags.DEFINE_boolean('compare', False, 'Compare two evaluations, prompt by prompt.')
    flags.DEFINE_boolean('blind', False, 'Write a page on which people rank two or three '
                         'evaluations without knowing which is which.')
    flags.DEFINE_boolean('grid', False, 'Draw a sheet: a prompt a row, an evaluation a column.')
    flags.DEFINE_integer('prompts_shown', None, 'Prompts of a blind page (default all) or a sheet '
                         '(default 8).', 1)
    flags.DEFINE_string('best', '', 'Prompts of the sheet: the best by this figure of the first.')
    flags.DEFINE_string('worst', '', 'Prompts of the sheet: the worst by this figure.')
    flags.DEFINE_boolean('seeds', False, 'Columns of the sheet are the images of a prompt.')
    commands.finite('guidance')
    commands.at_most(1000, 'steps', 'guidance', 'teacher_steps')
    commands.at_most(100_000, 'batch', 'fsdp')
    flags.register_validator('size', lambda given: given is None or len(given) == 2 and all(
        side.isdecimal() and len(side) < 6 and int(side) for side in given),
        'must be HEIGHT,WIDTH, as 768,1024')
    flags.register_validator('count', lambda given: given is None or len(given) == 2 and all(
        n.isdecimal() and len(n) < 9 for n in given) and any(map(int, given)),
        'must be SEEN,HELD_OUT, as 256,128')
    flags.register_validator('rows', lambda given: set(given) <= set(ROWS),
                             f'must be of {", ".join(ROWS)}')
    for name in ('suite', 'rows', 'metrics'):
        flags.register_validator(name, lambda given: len(set(given or ())) == len(given or ()),
                                 'must not name one twice')


def pairs(flag: str, most: int | None = None) -> dict[str, list[str]]:
    """``NAME=PATH`` of a flag that may be repeated, paths by name."""
    found: dict[str, list[str]] = {}
    for given in FLAGS[flag].value or ():
        name, _, path = given.partition('=')
        found.setdefault(name, []).append(path)
        if most and len(found[name]) > most:
            raise UserError(f'--{flag}={name} is given twice; leave one out')
    return found


# --- Refused ---


def mode() -> str:
    """Of `OF_MODE`, which way to show evaluations is asked for; '' is none: images are measured."""
    modes = [name for name in OF_MODE if FLAGS[name].value]
    if len(modes) > 1:
        raise UserError(f'--{modes[0]} and --{modes[1]} are two commands; give one')
    for name in modes:
        unused({*DRAWING, *MEASURING, *SHOWING} - {*OF_MODE[name]}, f'of --{name}')
        if len(FLAGS.suite) > 1:
            raise UserError(f'--{name} takes rows of one suite; name one --suite')
    return ''.join(modes)


def check() -> None:
    """Refuses flags that do not go together."""
    commands.need(suite='name one or more, as --suite=hps_v2,geneval', out='name a folder')
    if FLAGS.checkpoint and FLAGS.model:
        raise UserError('--checkpoint and --model are two ways to name a model; give one')
    if FLAGS.images and (FLAGS.checkpoint or FLAGS.model):
        raise UserError('--images are there already; leave out --checkpoint and --model')
    if FLAGS.images and len(FLAGS.suite) > 1:
        raise UserError('--images are those of one suite; name one --suite')
    unused(SHOWING, 'without --blind or --grid')
    if not FLAGS.checkpoint:
        unused(('step', 'teacher_path'), 'without --checkpoint')
    if not (FLAGS.checkpoint or FLAGS.model):
        unused(DRAWING, 'where nothing is drawn, without --checkpoint and --model')
    if FLAGS.images:
        unused(('official',), 'with --images, which are laid out already')


def check_suites(suites: Sequence[Suite], out: Path, drawn: Sequence[str]) -> None:
    """Refuses a suite twice, and flags that none of the suites looks at.

    `drawn` are names of rows; others may be in `out` already.
    """
    from ddmd_jax.evaluation import measuring
    from ddmd_jax.evaluation.metrics import METRICS, OUTSIDE

    names = [suite.name for suite in suites]
    if twice := next((name for name in names if names.count(name) > 1), ''):
        raise UserError(f'--suite: two are called {twice}, and their images need a folder each; '
                        'name one')
    published = {suite.name: suite for suite in suites if suite.read is not None}
    if not published:
        unused(('prompts', 'limit', 'official', 'metrics', 'weights', 'python', 'reference',
                'results'), "by a family's own suite")
    if len(published) == len(suites):
        unused(('count',), "but by a family's own suite")
    metrics = {name: METRICS.get(name) for suite in published.values() for name in (
        suite.metrics if FLAGS.metrics is None else FLAGS.metrics)}
    if not any(metric and metric.between for metric in metrics.values()):
        unused(('reference',), f'by {", ".join(metrics) or "any metric"}')
    scored = [name for name, suite in published.items() if suite.results]
    results = [name.partition(':') for name in pairs('results')]
    for flag, given, known in (
            ('prompts', list(pairs('prompts')), list(published)),
            ('weights', list(pairs('weights')), list(metrics)),
            ('python', list(pairs('python', 1)), [name for name in metrics if name in OUTSIDE]),
            ('results', [name for name, *_ in results], scored)):
        for name in given:
            if name not in known:
                raise UserError(f'--{flag}={name}: not used; here it is of '
                                f'{", ".join(known) or "nothing"}')
    for name, colon, row in results:
        there = ['images'] if FLAGS.images else list(dict.fromkeys(
            [*drawn, *measuring.rows_in(out / 'images' / name)]))
        if colon and row not in there:
            raise UserError(f'--results={name}:{row}: no such row; there are '
                            f'{", ".join(there) or "none"}')
        if not colon and len(there) > 1:
            raise UserError(f'--results={name}: there are {len(there)} rows; say whose it is, as '
                            f'--results={name}:{there[0]}=PATH')
        if not colon and len([one for one, *_ in results if one == name]) > 1:
            raise UserError(f'--results={name} is given beside one of its row; leave one out')


def unused(names: Iterable[str], where: str) -> None:
    """Refuses these flags."""
    if given := sorted(f'--{name}' for name in names if FLAGS[name].present):
        raise UserError(f'{", ".join(given)}: not used {where}; leave it out')
