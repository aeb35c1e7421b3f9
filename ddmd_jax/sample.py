"""``python -m ddmd_jax.sample --checkpoint=WORKDIR --prompt='a red heart' --out=DIR``: images.

Draws with the EMA student of a run, or with its teacher (``--teacher``), on all devices.
Exit codes: 0 done; 1 it could not go on (one line on stderr says what, where and how to mend it);
2 a flag is wrong.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import app, flags, logging

from ddmd_jax.util import arguments

if TYPE_CHECKING:
    from ddmd_jax.diffusion.drawing import ImageName, Sampler, Times

FLAGS = flags.FLAGS
TEACHER_STEPS = 50  # of the guided teacher, unless --steps says otherwise
SHEET = 60  # rows and columns of a sheet: a WebP has at most 16,383 pixels a side
OTHERS = ('.jpg', '.jpeg', '.gif', '.bmp', '.tif', '.tiff', '.avif')  # no names of folders


def define_flags() -> None:
    flags.DEFINE_string('checkpoint', '', 'Folder of the run (its --workdir).')
    flags.DEFINE_multi_string('prompt', [], 'What to draw, repeated for more; empty is '
                              'the null prompt.')
    flags.DEFINE_string('prompts', '', 'More prompts: a file as `prepare prompts` takes them '
                        '(.txt: one a line), or the folder of a set of prompts.')
    flags.DEFINE_enum('split', 'train', ('train', 'validation'), 'Which prompts of a set.')
    flags.DEFINE_integer('count', 1, 'Images of each prompt.', 1)
    flags.DEFINE_integer('steps', None, 'Steps; default: those the student was trained for, or '
                         f'{TEACHER_STEPS} of the teacher.', 1)
    flags.DEFINE_integer('seed', 0, 'Seed.', 0, 2**32 - 1)
    flags.DEFINE_enum('sampler', 'renoise', ('renoise', 'deterministic'), 'The student\'s.')
    flags.DEFINE_boolean('teacher', False, 'Draw with the teacher instead of the student.')
    flags.DEFINE_float('guidance', None, 'The teacher\'s; 1 is none; default: its family\'s.', 0)
    flags.DEFINE_enum('solver', 'euler', ('euler', 'heun'), 'The teacher\'s.')
    flags.DEFINE_boolean('grid', False, 'Also a sheet of all images with their prompts.')
    flags.DEFINE_boolean('compare_teacher', False, 'On the sheet, the teacher on the same noise.')
    flags.DEFINE_list('size', None, 'HEIGHT,WIDTH in pixels; default: the teacher\'s own.')
    flags.DEFINE_integer('batch', 8, 'Images drawn at a time, over all devices.', 1)
    flags.DEFINE_string('teacher_path', '', 'Where the teacher lies, if no longer where it was; '
                        'with --teacher and no --checkpoint: which. `emoji` is the shipped one.')
    flags.DEFINE_string('out', '', 'Folder to write to, or one file: FILE.png or FILE.webp.')
    flags.DEFINE_enum('format', 'png', ('png', 'webp'), 'Of files in a folder.')
    flags.DEFINE_boolean('overwrite', False, 'Replace files that are there.')
    flags.register_validator('size', lambda given: given is None or len(given) == 2 and all(
        side.isdecimal() and int(side) for side in given), 'must be HEIGHT,WIDTH, as 768,1024')


def refusal() -> str:
    """Why the flags do not go together, or ''; nothing is read."""
    if not FLAGS.checkpoint and not (FLAGS.teacher and FLAGS.teacher_path):
        return ('no --checkpoint given; name the --workdir of a run, or draw with a teacher: '
                '--teacher --teacher_path=emoji')
    if not FLAGS.prompt and not FLAGS.prompts:
        return 'no --prompt given; repeat it for several, or name a file: --prompts'
    if not FLAGS.out:
        return 'no --out given; name a folder, or a file that ends in .png or .webp'
    if Path(FLAGS.out).suffix.lower() in OTHERS:
        return f'--out {FLAGS.out}: only .png and .webp are written'
    if FLAGS.teacher and (FLAGS.compare_teacher or FLAGS['sampler'].present):
        return "--compare_teacher and --sampler are the student's; leave out --teacher"
    for name in ('guidance', 'solver'):
        if FLAGS[name].present and not (FLAGS.teacher or FLAGS.compare_teacher):
            return (f"--{name} is the teacher's, a student takes none; give --teacher or "
                    '--compare_teacher with it')
    if FLAGS.grid and FLAGS.count > SHEET:
        return f'--count={FLAGS.count}: a sheet has {SHEET} columns; leave out --grid'
    return ''


def samplers(model: Any, teacher: Any) -> list[Sampler]:
    """The columns of a sheet that the flags ask for; images of the last are written one by one."""
    from ddmd_jax.diffusion import drawing, time as time_maps
    from ddmd_jax.train.durable import checkpoint as ckpt

    steps = FLAGS.steps or model.steps
    guidance = model.family.guidance if FLAGS.guidance is None else FLAGS.guidance
    if FLAGS.teacher:
        return [drawing.of_teacher(teacher, FLAGS.steps or TEACHER_STEPS, guidance, FLAGS.solver)]
    if steps != model.steps:
        ckpt.warn(f'the student was trained for {model.steps} steps, not for {steps}')
    student = drawing.of_student(
        teacher, steps, time_maps.chosen(teacher.time, model.shift), FLAGS.sampler)
    if not FLAGS.compare_teacher:
        return [student]
    return [drawing.of_teacher(teacher, TEACHER_STEPS, guidance, FLAGS.solver),
            drawing.of_teacher(teacher, steps), student]


def describe(model: Any, sampler: Sampler, teacher: Any) -> dict[str, str]:
    """What all files of one sampler say of themselves."""
    of_run = {'checkpoint': str(model.workdir), 'step': str(model.step)}
    return {
        'model': sampler.model, 'seed': str(FLAGS.seed), 'steps': str(sampler.steps),
        'evaluations': str(sampler.evaluations), 'guidance': f'{sampler.guidance:g}',
        'sampler': sampler.method, **(of_run if sampler.model == 'student' else {}),
        'teacher': model.path or model.family.name, 'teacher_identity': teacher.identity,
        'Software': f'ddmd_jax {importlib.metadata.version("ddmd_jax")}'}


def run(out: Path) -> None:
    """Everything from prompts to files; raises the errors that `main` puts in one line."""
    import jax

    from ddmd_jax import imaging
    from ddmd_jax.diffusion import drawing
    from ddmd_jax.parallel import sharding

    prompts = imaging.read_prompts(FLAGS.prompt, FLAGS.prompts, FLAGS.split)
    size = tuple(map(int, FLAGS.size)) if FLAGS.size else None
    workdir = Path(FLAGS.checkpoint).expanduser().absolute() if FLAGS.checkpoint else None
    model = imaging.find_model(workdir, FLAGS.teacher_path, size)
    named = drawing.names(prompts, FLAGS.count, FLAGS.seed)
    files, sheet = imaging.places(out, named, FLAGS.grid or FLAGS.compare_teacher,
                                  f'.{FLAGS.format}', FLAGS.overwrite)
    mesh = sharding.make_mesh({'fsdp': -1})
    request = imaging.request(named, model, mesh)
    whose = ['teacher'] if FLAGS.teacher else ['student'] + ['teacher'] * FLAGS.compare_teacher
    teacher, params = imaging.load(model, whose, mesh)
    todo, batch = samplers(model, teacher), drawing.filled(
        min(FLAGS.batch, len(named)), mesh)
    draw = lambda sampler, some, times: drawing.generate(
        sampler, params[sampler.model], some, batch, mesh, times)
    about = describe(model, todo[-1], teacher)
    # The sheet shows SHEET rows at most. Samplers that are on the sheet alone draw no more.
    kept = min(len(named), SHEET * (1 if todo[1:] else FLAGS.count)) if sheet else 0
    times = [drawing.Times() for _ in todo]
    shown = [imaging.write(draw(sampler, request.first(kept), clock), named, [], {}, kept)
             for sampler, clock in zip(todo[:-1], times)]
    writes, some = jax.process_index() == 0, request if files else request.first(kept)
    shown.append(imaging.write(draw(todo[-1], some, times[-1]), some.names,
                               files if writes else [], about, kept))
    if not writes:
        return
    if sheet:
        draw_sheet(sheet, named, todo, shown, about)
    n = times[-1].images
    print(f'{out}: {n} image{"s" * (n != 1)}, in batches of {batch}')
    print('\n'.join(map(summary, todo, times)))


def draw_sheet(file: Path, named: Sequence[ImageName], todo: Sequence[Sampler],
               shown: Sequence[Any], about: dict[str, str]) -> None:
    """A row a prompt, a column an image of it; or a row an image, a column a way to draw it."""
    from ddmd_jax.evaluation import pictures

    prompts, titles = [n.prompt for n in named[:len(shown[0])]], [s.title for s in todo]
    if len(prompts) < len(named):
        print(f'warning: the sheet shows the first {len(prompts)} of {len(named)} images',
              file=sys.stderr)
    if not todo[1:] and FLAGS.count > 1:
        prompts = prompts[::FLAGS.count]
        titles = [f'{todo[0].model}\nimage {i + 1}' for i in range(FLAGS.count)]
        shown = [shown[0][i::FLAGS.count] for i in range(FLAGS.count)]
    captions = [prompt or '(empty)' for prompt in prompts]
    pictures.captioned_sheet(captions, titles, shown, file,
                             {'prompt': json.dumps(prompts, ensure_ascii=False), **about})


def summary(sampler: Sampler, times: Times) -> str:
    """What one way of drawing took."""
    n = times.images
    return (f'{sampler.model}, {sampler.steps} steps: {sampler.evaluations} network '
            f'evaluations and {times.drawing / n:.4f} s an image, {times.decoding / n:.4f} s more '
            f'to decode it; compiled before in {times.compiling:.1f} s')


def main(argv: list[str]) -> None:
    if not FLAGS['verbosity'].present:
        logging.set_verbosity(logging.WARNING)  # of libraries' chatter; as in `main`
    if len(argv) > 1:
        sys.exit(f'sample: unexpected argument {argv[1]!r}; flags look like --prompt=WORDS')
    if why := refusal():
        sys.exit(f'sample: {why}')
    from ddmd_jax.data import DataFileError
    from ddmd_jax.families import UnknownFamily
    from ddmd_jax.imaging import RequestError
    from ddmd_jax.parallel import distributed
    from ddmd_jax.parallel.sharding import ShardingError
    from ddmd_jax.train.durable.checkpoint import CheckpointError
    from ddmd_jax.weights.flat import WeightsError

    out = Path(FLAGS.out).expanduser().absolute()
    try:
        distributed.start(None, None, None, os.environ)
        run(out)
    except (CheckpointError, DataFileError, RequestError, ShardingError, UnknownFamily,
            WeightsError, distributed.DistributedError) as e:
        sys.exit(f'sample: {e}')
    except OSError as e:
        sys.exit(f'sample: {e.filename or out}: {e.strerror or e}')
    except KeyboardInterrupt:
        sys.exit(f'sample: stopped; images that were finished are in {out}')


if __name__ == '__main__':
    define_flags()
    app.run(main, flags_parser=arguments.parser('sample'))
