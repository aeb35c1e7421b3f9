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

import ddmd_jax
from ddmd_jax.evaluation import options
from ddmd_jax.evaluation.options import ROWS, define_flags
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
COUNT = (256, 128)  # prompts of a family's own suite, seen and held out, where no run says
OTHERS = ('real', 'images')  # rows that nobody draws


def main(arguments: list[str]) -> None:
    if mode := options.mode():
        from ddmd_jax.evaluation import side_by_side

        return side_by_side.show(mode, arguments)
    commands.only_flags(arguments)
    options.check()
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
    from ddmd_jax.train.durable import lock

    size = tuple(map(int, FLAGS.size)) if FLAGS.size else None
    models = [find_model(run, FLAGS.teacher_path, size, FLAGS.step, FLAGS.variant)
              for run in FLAGS.checkpoint] or (
        [find_model('', FLAGS.model, size, variant=FLAGS.variant)] if FLAGS.model else [])
    suites = [find_suite(name, models) for name in FLAGS.suite]
    rows = rows_of(suites, models) if models else []
    prompts, results = options.pairs('prompts', 1), options.pairs('results', 1)
    options.check_suites(suites, places.of(FLAGS.out, places.LOCAL), row_names(rows, models))
    by = Measures(
        FLAGS.metrics, options.pairs('weights'),
        buckets.local(places.of(FLAGS.reference)) if FLAGS.reference else None,
        {name: buckets.local(places.of(found[0])) for name, found in results.items()},
        {name: found[0] for name, found in options.pairs('python', 1).items()})
    out = commands.folder('--out', FLAGS.out)
    if (out / 'checkpoints').exists() or (out / 'config.json').exists():
        raise UserError(f'--out {out} is the folder of a run, whose own {results_lib.RESULT} would '
                        'be written over; choose another')
    held = lock.attempt(out / '.lock') if jax.process_index() == 0 else (None, '')
    if held[1]:
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


# --- What is asked for ---


def find_suite(name: str, models: Sequence[Model]) -> Suite:
    """The suite of that name; raises `DataFileError` or `UnknownFamily`."""
    from ddmd_jax import families
    from ddmd_jax.evaluation import suites

    if name in suites.SUITES or '.' in name:
        return suites.find(name)
    for family in [model.family for model in models] or map(families.get, families.NAMES):
        if family.suite is not None and family.suite.name == name:
            return family.suite
    raise UserError(f'--suite={name} is unknown; known: {", ".join(suites.SUITES)}, a suite of the '
                    "model's family, or my_module.SUITE")


def rows_of(suites: Sequence[Suite], models: Sequence[Model]) -> list[str]:
    """What is drawn, of `ROWS`; raises `UserError` for a flag that none of them looks at."""
    if FLAGS.rows:
        rows = list(FLAGS.rows)
    elif not models[0].saved:
        rows = ['student' if few_steps(models[0].path) else 'teacher_guided']
    else:
        rows = list(ROWS) if any(suite.read is None for suite in suites) else ['student']
    for flag, users in options.OF_ROWS.items():
        if not set(users) & set(rows):
            options.unused([flag], f'by the rows {", ".join(rows)}')
    return rows


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


def entries(models: Sequence[Model], rows: Sequence[str],
            mesh: Mesh) -> tuple[dict[str, Entry], dict[str, dict[str, Any]]]:
    """(rows that are drawn, their parameters on `mesh`; what tells their images from others').

    Raises:
      UserError: a student is asked for where there is none, or runs have different teachers.
    """
    from ddmd_jax.diffusion import drawing
    from ddmd_jax.evaluation.evaluate import Entry, beside
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

    guidance = first.guidance if FLAGS.guidance is None else FLAGS.guidance
    ways = beside(teacher, few(first), FLAGS.teacher_steps, guidance, FLAGS.solver)
    found = {row: Entry(way, params['teacher']) for row, way in ways.items()
             if row in rows and row != 'student'}
    text = first.family.text_identity
    whose: dict[str, Any] = {
        'step': None, 'weights': teacher.identity, 'latents': list(teacher.latents.shape),
        'codec': teacher.latents.codec, 'text': text(*filter(None, (first.path, first.variant)))
        if text and first.path else None}
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


def few_steps(path: str) -> tuple[int, str] | None:
    """(steps, sampler) of an exported student's folder; None of a teacher's."""
    from ddmd_jax.weights import diffusers, fetch, scheduler

    if not path:
        return None
    wanted = ('model_index.json', 'scheduler/scheduler_config.json')
    place = places.of(path, places.ANY)
    try:
        folder = (buckets.local(place, wanted.__contains__)
                  if places.is_url(place) or place.exists() else fetch.local_folder(path, wanted))
    except buckets.NothingThere:
        return None
    if not (folder / 'model_index.json').is_file():
        return None
    good = lambda value: value is None or not shape.count(value) and 0 < value <= 1000
    number = lambda value: '' if good(value) else 'not a number of steps'
    index = diffusers.read_json(folder / 'model_index.json', {
        f'{name}?': number for name in (scheduler.STEPS, 'steps')})  # the latter is emoji's
    steps, file = index.get(scheduler.STEPS, index.get('steps')), folder / wanted[1]
    if steps is None or not file.is_file():
        return None
    config = diffusers.read_json(file)
    renoises = config.get('stochastic_sampling') or config.get('_class_name') == 'LCMScheduler'
    return steps, 'renoise' if renoises else 'deterministic'


if __name__ == '__main__':
    commands.run('evaluate', main, define_flags)
