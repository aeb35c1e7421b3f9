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
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from ddmd_jax.export.models import Model, encoded, find_model, load
from ddmd_jax.util import buckets, commands, places
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


def main(arguments: list[str]) -> None:
    modes = [name for name in ('compare', 'blind', 'grid') if FLAGS[name].value]
    if len(modes) > 1:
        raise UserError(f'--{modes[0]} and --{modes[1]} are two commands; give one')
    if modes:
        return {'compare': compare, 'blind': blind, 'grid': grid}[modes[0]](arguments)
    commands.only_flags(arguments)
    commands.need(suite='name one or more, as --suite=hps_v2,geneval', out='name a folder')
    if FLAGS.checkpoint and FLAGS.model:
        raise UserError('--checkpoint and --model are two ways to name a model; give one')
    if FLAGS.images and (FLAGS.checkpoint or FLAGS.model):
        raise UserError('--images are there already; leave out --checkpoint and --model')
    if FLAGS.images and len(FLAGS.suite) > 1:
        raise UserError('--images are those of one suite; name one --suite')
    from ddmd_jax.parallel import distributed

    distributed.start(None, None, None, os.environ, command='evaluate')
    with distributed.ending_together():
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

    prompts, results = pairs('prompts'), pairs('results')
    by = Measures(
        FLAGS.metrics, pairs('weights'),
        buckets.local(places.of(FLAGS.reference)) if FLAGS.reference else None,
        {name: buckets.local(places.of(found[-1])) for name, found in results.items()})
    out = commands.folder('--out', FLAGS.out)
    held = files.lock(out / '.lock') if jax.process_index() == 0 else (None, '')
    if jax.process_index() == 0 and held[0] is None:
        raise UserError(f'--out {out} is being written by {held[1]}; wait for it, or choose '
                        'another')
    size = tuple(map(int, FLAGS.size)) if FLAGS.size else None
    models = [find_model(run, FLAGS.teacher_path, size, FLAGS.step, FLAGS.variant)
              for run in FLAGS.checkpoint] or (
        [find_model('', FLAGS.model, size, variant=FLAGS.variant)] if FLAGS.model else [])
    asked = [ask(find_suite(name, models), prompts, models) for name in FLAGS.suite]
    about, notes = draw(asked, models, out) if models else {}, []
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
            'seed': FLAGS.seed, **about,
            'suites': {one.suite.name: one.about() for one in asked}}))
        print(f'\n{out / results_lib.RESULT}\n{out / results_lib.PAGE}')
        notes = [note for part in parts for note in part.notes]
        for note in notes:
            print(f'evaluate: {note}', file=sys.stderr)
    distributed.together('evaluated')
    return not notes


def pairs(flag: str) -> dict[str, list[str]]:
    """``NAME=PATH`` of a flag that may be repeated, paths by name."""
    found: dict[str, list[str]] = {}
    for given in FLAGS[flag].value or ():
        name, _, path = given.partition('=')
        found.setdefault(name, []).append(path)
    return found


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
            mesh: Mesh) -> tuple[dict[str, Entry], dict[str, Any]]:
    """(rows that are drawn, their parameters on `mesh`; what names their weights).

    Raises:
      UserError: a student is asked for where there is none, or runs have different teachers.
    """
    from ddmd_jax.diffusion import drawing
    from ddmd_jax.evaluation.evaluate import Entry
    from ddmd_jax.models import adapters
    from ddmd_jax.weights import flat

    first, whose = models[0], {'student' if row == 'student' else 'teacher' for row in rows}
    teacher, params = load(first, sorted(whose) if first.saved else ['teacher'], mesh)
    if not first.saved:  # published weights are a student's if their folder or a flag says so
        exported = few_steps(first.path)
        if 'student' in whose and not (exported or FLAGS.steps):
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
    about: dict[str, Any] = {'teacher': teacher.identity}
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
        about[row] = flat.corner_identity(adapters.unbound(mine), mesh)
    return found, about


def student_rows(models: Sequence[Model]) -> list[str]:
    """Names of the students' rows: of one run 'student', of several their folders'."""
    names = [model.workdir.name if model.workdir else '' for model in models]
    if len(names) == 1:
        return ['student']
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f'--checkpoint: two runs are called {twice[0]}, and their rows need names '
                        'of their own')
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
    steps = diffusers.read_json(folder / 'model_index.json').get('steps')
    scheduler = folder / 'scheduler' / 'scheduler_config.json'
    if not isinstance(steps, int) or not scheduler.is_file():
        return None
    stochastic = diffusers.read_json(scheduler).get('stochastic_sampling')
    return steps, 'renoise' if stochastic else 'deterministic'


def rows_of(asked: Sequence[Asked], models: Sequence[Model]) -> list[str]:
    """What is drawn, of `ROWS`."""
    if FLAGS.rows:
        return list(FLAGS.rows)
    if not models[0].saved:
        return ['student' if few_steps(models[0].path) else 'teacher_guided']
    return list(ROWS) if any(one.examples is not None for one in asked) else ['student']


def draw(asked: Sequence[Asked], models: Sequence[Model], out: Path) -> dict[str, Any]:
    """Draws what is missing of every row of every suite into ``images``; what names the weights."""
    import jax

    from ddmd_jax.evaluation import evaluate
    from ddmd_jax.evaluation.kept import Kept
    from ddmd_jax.parallel import sharding

    rows = rows_of(asked, models)
    names = [row for row in rows if row != 'student'] + (
        student_rows(models) if 'student' in rows else [])
    there = {one.suite.name: {row: Kept(out / 'images' / one.suite.name / row, one.named,
                                        FLAGS.keep) for row in names} for one in asked}
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
            weights = about.get(row, about['teacher'])
            settings = {'model': entry.sampler.model, **evaluate.settings_of(entry.sampler),
                        'sampler': entry.sampler.method, 'weights': weights}
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
    step = models[0].saved.step if models[0].saved else None
    return {'step': step, 'weights': about}


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
