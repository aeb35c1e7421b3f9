"""``python -m ddmd_jax.evaluate --checkpoint=RUN --suite=hps_v2 --out=DIR``: a table of scores.

Draws the prompts of suites on all devices, keeps the images, measures them, and writes
``eval.json``, ``scores.parquet``, ``table.md`` and ``table.html``. Killed, it goes on where it
was. Without a model it measures again what DIR holds; ``--images=FOLDER`` measures images that
others have made. ``evaluate --compare A B``, ``--blind A B [C]`` and ``--grid A [B ...]`` take
folders of evaluations (DIR, or DIR:ROW).

Exit codes: 0 done; 1 it could not go on (one line on stderr says why); 2 a flag is wrong; 3 done,
but something is missing: a line on stderr says what, and the table has a gap there.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

import ddmd_jax
from ddmd_jax.export.models import Model, encoded, find_model, load
from ddmd_jax.util import buckets, commands, places, shape
from ddmd_jax.util.errors import UserError

if TYPE_CHECKING:  # JAX takes seconds to import: not before the flags are right
    from pathlib import Path

    from jax.sharding import Mesh

    from ddmd_jax.evaluation.asked import Asked
    from ddmd_jax.evaluation.evaluate import Entry
    from ddmd_jax.evaluation.suites import Suite

FLAGS = flags.FLAGS
MISSING = 3  # exit code
TEACHER_STEPS = 50
COUNT = (256, 128)  # prompts of a family's own suite, seen and held out, where no run says
ROWS = ('student', 'teacher_guided', 'teacher_few_step', 'teacher_in_student_sampler')
OTHERS = ('real', 'images')  # rows that nobody draws

# All flags, by who looks at them; what is given to somebody else is refused.
DRAWING = ('step', 'teacher_path', 'variant', 'rows', 'steps', 'sampler', 'teacher_steps',
           'guidance', 'solver', 'size', 'batch', 'fsdp', 'keep')
MEASURING = ('checkpoint', 'model', 'suite', 'prompts', 'count', 'limit', 'seed', 'official',
             'images', 'metrics', 'weights', 'reference', 'results', 'out')
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
    flags.DEFINE_float('guidance', None, "Its guidance scale; default: its family's.", 0)
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


def main(arguments: list[str]) -> None:
    modes = [name for name in OF_MODE if FLAGS[name].value]
    if len(modes) > 1:
        raise UserError(f'--{modes[0]} and --{modes[1]} are two commands; give one')
    if modes:
        unused({*DRAWING, *MEASURING, *SHOWING} - {*OF_MODE[modes[0]]}, f'of --{modes[0]}')
        if len(FLAGS.suite) > 1:
            raise UserError(f'--{modes[0]} takes rows of one suite; name one --suite')
        return {'compare': compare, 'blind': blind, 'grid': grid}[modes[0]](arguments)
    commands.only_flags(arguments)
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
    from ddmd_jax.parallel import distributed

    distributed.start(None, None, None, os.environ, command='evaluate')
    with distributed.ending_together():
        distributed.agree('command', commands.given() | {'version': ddmd_jax.__version__})
        complete = evaluate()
    if not complete:
        sys.exit(MISSING)


def evaluate() -> bool:
    """Draws and measures what the flags ask for; whether nothing is missing, as process 0 sees it.

    By this process or by several together.
    """
    import jax

    from ddmd_jax.evaluation import kept, measuring, results as results_lib
    from ddmd_jax.evaluation.evaluate import SHEET
    from ddmd_jax.evaluation.measuring import Measures
    from ddmd_jax.parallel import distributed
    from ddmd_jax.util import files

    size = tuple(map(int, FLAGS.size)) if FLAGS.size else None
    models = [find_model(run, FLAGS.teacher_path, size, FLAGS.step, FLAGS.variant)
              for run in FLAGS.checkpoint] or (
        [find_model('', FLAGS.model, size, variant=FLAGS.variant)] if FLAGS.model else [])
    suites = [find_suite(name, models) for name in FLAGS.suite]
    rows = rows_of(suites, models) if models else []
    prompts, results = pairs('prompts', 1), pairs('results', 1)
    check_used(suites, places.of(FLAGS.out, places.LOCAL), row_names(rows, models))
    by = Measures(
        FLAGS.metrics, pairs('weights'),
        buckets.local(places.of(FLAGS.reference)) if FLAGS.reference else None,
        {name: buckets.local(places.of(found[0])) for name, found in results.items()})
    out = commands.folder('--out', FLAGS.out)
    if (out / 'checkpoints').exists() or (out / 'config.json').exists():
        raise UserError(f'--out {out} is the folder of a run, whose own {results_lib.RESULT} would '
                        'be written over; choose another')
    held = files.lock(out / '.lock') if jax.process_index() == 0 else (None, '')
    if jax.process_index() == 0 and held[0] is None:
        raise UserError(f'--out {out} is being written by {held[1]}; wait for it, or choose '
                        'another')
    distributed.same_folder(out / '.lock', '--out')
    asked = [ask(suite, prompts, models) for suite in suites]
    if models:
        draw(asked, models, rows, out)
    notes = []
    if jax.process_index() == 0:
        parts = []
        for one in asked:
            if FLAGS.images:
                folder = buckets.local(places.of(FLAGS.images))
                parts.append(measuring.part_of_folder(one, folder, by))
                continue
            images = measuring.stored(out / 'images', one, (*ROWS[1:], ROWS[0]))
            parts.append(measuring.part(one, images, by, out / SHEET))
            for row, found in images.items() if FLAGS.official and one.prompts else ():
                kept.write_official(out / 'official' / one.suite.name / row, one.suite,
                                    one.prompts, found)
        print(results_lib.write(out, parts, {
            'seed': FLAGS.seed, 'suites': {one.suite.name: one.about() for one in asked}}))
        print(f'\n{out / results_lib.RESULT}\n{out / results_lib.PAGE}')
        notes = [note for part in parts for note in part.notes]
        for note in notes:
            print(f'evaluate: {note}', file=sys.stderr)
    distributed.together('evaluated')
    return not notes


def pairs(flag: str, most: int | None = None) -> dict[str, list[str]]:
    """``NAME=PATH`` of a flag that may be repeated, paths by name; raises `UserError`."""
    found: dict[str, list[str]] = {}
    for given in FLAGS[flag].value or ():
        name, _, path = given.partition('=')
        found.setdefault(name, []).append(path)
        if most and len(found[name]) > most:
            raise UserError(f'--{flag}={name} is given twice; leave one out')
    return found


# --- What is given and would not be looked at ---


def unused(names: Iterable[str], where: str) -> None:
    """Raises `UserError` if one of these flags is given."""
    if given := sorted(f'--{name}' for name in names if FLAGS[name].present):
        raise UserError(f'{", ".join(given)}: not used {where}; leave it out')


def check_used(suites: Sequence[Suite], out: Path, drawn: Sequence[str]) -> None:
    """Raises `UserError` for a suite twice, and for flags that none of the suites looks at.

    `drawn` are names of rows; others may be in `out` already.
    """
    from ddmd_jax.evaluation import measuring
    from ddmd_jax.evaluation.metrics import METRICS

    names = [suite.name for suite in suites]
    if twice := next((name for name in names if names.count(name) > 1), ''):
        raise UserError(f'--suite: two are called {twice}, and their images need a folder each; '
                        'name one')
    published = {suite.name: suite for suite in suites if suite.read is not None}
    if not published:
        unused(('prompts', 'limit', 'official', 'metrics', 'weights', 'reference', 'results'),
               "by a family's own suite")
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


# --- What is asked for ---


def find_suite(name: str, models: Sequence[Model]) -> Suite:
    """The suite of that name; raises `DataFileError` or `UnknownFamily`."""
    from ddmd_jax import families
    from ddmd_jax.evaluation import suites

    if name in suites.SUITES or '.' in name:
        return suites.find(name)
    own = [model.family for model in models] or map(families.get, families.NAMES)
    for family in own:
        if family.suite is not None and family.suite.name == name:
            return family.suite
    raise UserError(f'--suite={name} is unknown; known: {", ".join(suites.SUITES)}, a suite of the '
                    "model's family, or my_module.SUITE")


def ask(suite: Suite, prompts: Mapping[str, list[str]], models: Sequence[Model]) -> Asked:
    """A suite with its prompts; raises `DataFileError`."""
    from ddmd_jax.evaluation import asked
    from ddmd_jax.export.student import field_of

    if suite.read is None:
        run = models[0].workdir if models else None
        fields = [field_of(run, f'eval.{name}') if run else None
                  for name in ('prompts', 'held_out')]
        given = FLAGS.count or fields
        seen, held_out = COUNT if None in given else map(int, given)
        return asked.own(suite, seen, held_out, FLAGS.seed)
    if suite.name not in prompts:
        raise UserError(f'{suite.name} wants its prompts: --prompts={suite.name}=PATH; they come '
                        f'from {suite.origin}, {sum(suite.counts.values())} in all')
    place = buckets.local(places.of(prompts[suite.name][-1]))
    return asked.published(suite, place, FLAGS.limit, FLAGS.seed)


# --- Drawing ---


def entries(models: Sequence[Model], rows: Sequence[str],
            mesh: Mesh) -> tuple[dict[str, Entry], dict[str, dict[str, Any]]]:
    """(rows that are drawn, their parameters on `mesh`; what tells their images from others').

    Raises:
      UserError: a student is asked for where there is none, or runs have different teachers.
    """
    from ddmd_jax.diffusion import drawing
    from ddmd_jax.evaluation.evaluate import Entry
    from ddmd_jax.models import adapters
    from ddmd_jax.weights import flat

    first, needed = models[0], {'student' if row == 'student' else 'teacher' for row in rows}
    teacher, params = load(first, sorted(needed) if first.saved else ['teacher'], mesh)
    if not first.saved:  # published weights are a student's if their folder or a flag says so
        exported = few_steps(first.path)
        if 'student' in needed and not (exported or FLAGS.steps):
            raise UserError(f'--rows=student: {first.path or first.family.name} does not say that '
                            'it is a student; give its --steps, or a run with --checkpoint')
        steps, method = exported or (1, first.sampler)
        first = dataclasses.replace(first, steps=steps, sampler=method)
        params['student'] = params['teacher']

    def few(model: Model) -> drawing.Sampler:
        return drawing.of_student(teacher, FLAGS.steps or model.steps,
                                  model.time(teacher.time), FLAGS.sampler or model.sampler)

    guidance = first.family.guidance if FLAGS.guidance is None else FLAGS.guidance
    of_teacher = {
        'teacher_guided': lambda: drawing.of_teacher(teacher, FLAGS.teacher_steps, guidance,
                                                     FLAGS.solver),
        'teacher_few_step': lambda: drawing.of_teacher(teacher, FLAGS.steps or first.steps),
        'teacher_in_student_sampler': lambda: dataclasses.replace(few(first), model='teacher')}
    found = {row: Entry(make(), params['teacher']) for row, make in of_teacher.items()
             if row in rows}
    whose: dict[str, Any] = {
        'step': None, 'weights': teacher.identity, 'latents': list(teacher.latents.shape)}
    about = {row: {**whose, 'time': str(first.time(teacher.time) if row == ROWS[3]
                                        else teacher.time)} for row in found}
    for i, (row, model) in enumerate(zip(student_rows(models), [first, *models[1:]])
                                     if 'student' in rows else ()):
        mine = params['student']
        if i:
            another, loaded = load(model, ['student'], mesh)
            mine = loaded['student']
            if another.identity != teacher.identity:
                raise UserError(f'{model.workdir} distils another teacher than {first.workdir}; '
                                'evaluate runs of one teacher together')
        found[row] = Entry(few(model), mine)
        about[row] = {**whose, 'step': model.saved.step if model.saved else None,
                      'weights': flat.corner_identity(adapters.unbound(mine), mesh),
                      'time': str(model.time(teacher.time))}
    return found, about


def row_names(rows: Sequence[str], models: Sequence[Model]) -> list[str]:
    """Names of the rows that are drawn, the students' last."""
    return [row for row in rows if row != 'student'] + (
        student_rows(models) if 'student' in rows else [])


def student_rows(models: Sequence[Model]) -> list[str]:
    """Names of the students' rows: of one run 'student', of several their folders'.

    Raises:
      UserError: two have one name, or one that is no name or another row's.
    """
    if len(models) == 1:
        return ['student']
    names = [os.path.basename(os.path.abspath(str(model.workdir))) for model in models]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f'--checkpoint: two runs are called {name}, and their rows need names '
                            'of their own')
        if name in (*ROWS, *OTHERS) or not name.isprintable() or not name or ':' in name:
            raise UserError(f'--checkpoint: a run is called {name!r}, and its row cannot be; '
                            'evaluate it alone, or rename its folder')
    return names


def few_steps(path: str) -> tuple[int, str] | None:
    """(steps, sampler) of an exported student's folder; None of a teacher's."""
    from ddmd_jax.weights import diffusers

    if not path:
        return None
    wanted = ('model_index.json', 'scheduler/scheduler_config.json')
    try:
        folder = buckets.local(places.of(path, places.ANY), wanted.__contains__)
    except buckets.NothingThere:
        return None
    if not (folder / 'model_index.json').is_file():
        return None
    good = lambda value: value is None or not shape.count(value) and 0 < value <= 1000
    steps = diffusers.read_json(folder / 'model_index.json', {
        'steps?': lambda value: '' if good(value) else 'not a number of steps'}).get('steps')
    scheduler = folder / 'scheduler' / 'scheduler_config.json'
    if steps is None or not scheduler.is_file():
        return None
    stochastic = diffusers.read_json(scheduler).get('stochastic_sampling')
    return steps, 'renoise' if stochastic else 'deterministic'


def rows_of(suites: Sequence[Suite], models: Sequence[Model]) -> list[str]:
    """What is drawn, of `ROWS`; raises `UserError` for a flag that none of them looks at."""
    if FLAGS.rows:
        rows = list(FLAGS.rows)
    elif not models[0].saved:
        rows = ['student' if few_steps(models[0].path) else 'teacher_guided']
    else:
        rows = list(ROWS) if any(suite.read is None for suite in suites) else ['student']
    for flag, users in OF_ROWS.items():
        if not set(users) & set(rows):
            unused([flag], f'by the rows {", ".join(rows)}')
    return rows


def draw(asked: Sequence[Asked], models: Sequence[Model], rows: Sequence[str], out: Path) -> None:
    """Draws what is missing of every row of every suite into ``images``."""
    import jax

    from ddmd_jax.evaluation import evaluate
    from ddmd_jax.evaluation.kept import Kept
    from ddmd_jax.parallel import sharding

    there = {one.suite.name: {row: Kept(out / 'images' / one.suite.name / row, one.named,
                                        FLAGS.keep) for row in row_names(rows, models)}
             for one in asked}
    left = {suite: {row: set(found) for row, found in evaluate.missing(images).items()}
            for suite, images in there.items()}
    # Each device has all of the weights unless it is told otherwise, and the text encoder does
    # the same on each: bits of an image are then the same on any number of devices.
    mesh, requests = sharding.make_mesh({'data': -1, 'fsdp': FLAGS.fsdp}), {}
    for one in asked:  # the text encoder is let go before the denoiser is read
        wanted = sorted(set().union(*left[one.suite.name].values()))
        if wanted:
            requests[one.suite.name] = encoded([one.named[i] for i in wanted], models[0], mesh)
    found, about = entries(models, rows, mesh)
    for one in asked:
        images = there[one.suite.name]
        for row, entry in found.items():
            settings = {'model': entry.sampler.model, **evaluate.settings_of(entry.sampler),
                        'sampler': entry.sampler.method, **about[row]}
            if jax.process_index() == 0:
                images[row].claim(settings)
        if one.suite.name in requests:
            times = evaluate.draw(found, images, requests[one.suite.name], FLAGS.batch, mesh)
            for row, t in times.items():
                if t.images and jax.process_index() == 0:
                    print(f'{one.suite.name}, {row}: {t.images} images, '
                          f'{(t.drawing + t.decoding) / t.images:.4f} s an image; compiled before '
                          f'in {t.compiling:.1f} s')
        elif jax.process_index() == 0:
            for kept in images.values():
                kept.finish()


# --- Evaluations side by side ---


def named_rows(arguments: list[str], least: int, most: int) -> list[Any]:
    """The rows that the arguments name; raises `UserError`."""
    from ddmd_jax.evaluation import results

    mode = next(name for name in ('compare', 'blind', 'grid') if FLAGS[name].value)
    if not least <= len(arguments) <= most:
        count = f'{least}' if least == most else f'{least} to {most}'
        raise UserError(f'--{mode} takes {count} folders of evaluations (DIR or DIR:ROW), '
                        f'{len(arguments)} are given')
    return [results.read(place, FLAGS.suite[0] if FLAGS.suite else '') for place in arguments]


def compare(arguments: list[str]) -> None:
    """Prints the paired comparison of two rows; with --out, also writes it as JSON."""
    from ddmd_jax.evaluation import results
    from ddmd_jax.util import files

    first, second = named_rows(arguments, 2, 2)
    rows = results.compare(first, second)
    print(results.terminal_comparison(*results.comparison(first, second, rows)))
    if FLAGS.out:
        out = places.of(FLAGS.out, places.LOCAL)
        commands.folder('--out', out.parent)
        files.write_json(out, {'first': first.title, 'second': second.title, 'rows': rows})


def blind(arguments: list[str]) -> None:
    """Writes the page on which two or three rows are ranked."""
    from ddmd_jax.evaluation import blind as page

    rows = named_rows(arguments, 2, 3)
    commands.need(out='name the page, as --out=blind.html')
    out = places.of(FLAGS.out, places.LOCAL)
    commands.folder('--out', out.parent)
    print(page.write(out, rows, FLAGS.prompts_shown, FLAGS.seed))


def grid(arguments: list[str]) -> None:
    """Writes a sheet of rows side by side."""
    from ddmd_jax.evaluation import sheets

    rows = named_rows(arguments, 1, 8)
    commands.need(out='name the sheet, as --out=sheet.png')
    if FLAGS.best and FLAGS.worst:
        raise UserError('--best and --worst are two sheets; give one')
    out = places.of(FLAGS.out, places.LOCAL)
    if out.suffix.lower() not in ('.png', '.webp'):
        raise UserError(f'--out {out}: a sheet ends in .png or .webp')
    commands.folder('--out', out.parent)
    shown = sheets.chosen(rows[0], FLAGS.prompts_shown or sheets.PROMPTS, FLAGS.best, FLAGS.worst)
    sheets.write(out, rows, shown, FLAGS.best or FLAGS.worst, FLAGS.seeds)
    print(out)


if __name__ == '__main__':
    commands.run('evaluate', main, define_flags)
