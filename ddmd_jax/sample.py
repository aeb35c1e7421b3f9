"""``python -m ddmd_jax.sample --checkpoint=WORKDIR --prompt='a red apple' --out=DIR``: images.

Draws with the EMA student of a run, or with its teacher (``--teacher``), on all devices.
Exit codes: 0 done; 1 it could not go on (one line on stderr says why); 2 a flag is wrong.

All functions raise `UserError` where prompts, weights or places are not as they must be.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

import ddmd_jax
from ddmd_jax.export.models import Model, encoded, find_model, load
from ddmd_jax.util import buckets, commands, places, shape
from ddmd_jax.util.errors import UserError

if TYPE_CHECKING:  # JAX takes seconds to import: not before the flags are right
    import numpy as np

    from ddmd_jax.diffusion.drawing import ImageName, Sampler
    from ddmd_jax.families import Teacher
    from ddmd_jax.util.places import Place

FLAGS = flags.FLAGS
TEACHER_STEPS = 50  # of the guided teacher, unless --steps says otherwise
TRAJECTORY = 8  # of a sampler's steps that a sheet shows, at most
MARK = '.sample.json'  # in a folder that is being written to; see `marked`
OTHERS = ('.jpg', '.jpeg', '.gif', '.bmp', '.tif', '.tiff', '.avif')  # no names of folders


def define_flags() -> None:
    commands.define_place('checkpoint', '', 'Folder of the run (its --workdir).')
    flags.DEFINE_integer('step', None, 'Checkpoint to draw with; default: the newest.', 1)
    flags.DEFINE_multi_string('prompt', [], 'Prompt; may be repeated; empty is the null prompt.')
    commands.define_place('prompts', '', 'More prompts: a file as `prepare prompts` takes them '
                          '(.txt: one a line), or the folder of a set of prompts.')
    flags.DEFINE_enum('split', 'train', ('train', 'validation'), 'Split of a set.')
    flags.DEFINE_string('field', 'prompt', 'Field or column that holds the prompts; not of .txt.')
    flags.DEFINE_integer('count', 1, 'Images of each prompt.', 1)
    flags.DEFINE_integer('steps', None, 'Steps; default: those the student was trained for, or '
                         f'{TEACHER_STEPS} of the teacher.', 1)
    flags.DEFINE_integer('seed', 0, 'Seed.', 0, 2**32 - 1)
    flags.DEFINE_enum('sampler', None, ('renoise', 'deterministic'),
                      "Sampler of the student; default: the run's.")
    flags.DEFINE_boolean('teacher', False, 'Draw with the teacher instead of the student.')
    flags.DEFINE_float('guidance', None, 'Guidance scale of the teacher; 1 is none; default: the '
                       "run's, or its family's.", 0)
    flags.DEFINE_enum('solver', 'euler', ('euler', 'heun'), 'ODE solver of the teacher.')
    flags.DEFINE_boolean('grid', False, 'Also a sheet of all images with their prompts.')
    flags.DEFINE_boolean('compare_teacher', False, 'On the sheet, the teacher on the same noise.')
    flags.DEFINE_boolean('trajectory', False, 'A sheet of what is predicted to be clean along '
                         f'the way: of each sampler up to {TRAJECTORY} of its steps.')
    flags.DEFINE_list('size', None, "HEIGHT,WIDTH in pixels; default: the teacher's own.")
    flags.DEFINE_integer('batch', 8, 'Images drawn at a time, over all devices.', 1)
    commands.define_place('teacher_path', '', 'Path of the teacher if it moved; without '
                          "--checkpoint, its family's name or path.", places.ANY)
    flags.DEFINE_string('variant', None, "Variant of the teacher's weights, as fp16; default: "
                        "the run's; '' is none.")
    commands.define_place('out', '', 'Folder to write to, or one file: FILE.png or FILE.webp.')
    flags.DEFINE_enum('format', 'png', ('png', 'webp'), 'Format of files in a folder.')
    flags.DEFINE_boolean('overwrite', False, 'Replace existing files.')
    commands.finite('guidance')
    commands.at_most(1000, 'steps', 'guidance')
    commands.at_most(100_000, 'count', 'batch')
    flags.register_validator('size', lambda given: given is None or len(given) == 2 and all(
        side.isdecimal() and len(side) < 6 and int(side) for side in given),
        'must be HEIGHT,WIDTH, as 768,1024')


def check_flags() -> None:
    """Refuses flags that do not go together; reads nothing."""
    if not (FLAGS.teacher and FLAGS.teacher_path):
        commands.need(checkpoint='name the --workdir of a run, or draw with a teacher: --teacher '
                      '--teacher_path=emoji')
    if FLAGS.step and not FLAGS.checkpoint:
        raise UserError('--step is a checkpoint of a run; name the run with --checkpoint')
    if not FLAGS.prompts:
        commands.need(prompt='repeat it for several, or name a file: --prompts')
    commands.need(out='name a folder, or a file that ends in .png or .webp')
    if Path(FLAGS.out).suffix.lower() in OTHERS:
        raise UserError(f'--out {FLAGS.out}: only .png and .webp are written')
    if FLAGS.teacher and (FLAGS.compare_teacher or FLAGS['sampler'].present):
        raise UserError("--compare_teacher and --sampler are the student's; leave out --teacher")
    for name in ('guidance', 'solver'):
        if FLAGS[name].present and not (FLAGS.teacher or FLAGS.compare_teacher):
            raise UserError(f"--{name} is the teacher's, a student takes none; give --teacher or "
                            '--compare_teacher with it')


def main(arguments: list[str]) -> None:
    commands.only_flags(arguments)
    check_flags()
    from ddmd_jax.parallel import distributed

    distributed.start(None, None, None, os.environ, command='sample')
    with distributed.ending_together():
        distributed.agree('command', commands.given() | {'version': ddmd_jax.__version__})
        draw()


def draw() -> None:
    """What the flags ask for, by this process or by several together."""
    import jax

    from ddmd_jax.diffusion import drawing
    from ddmd_jax.parallel import sharding

    prompts = read_prompts(FLAGS.prompt, FLAGS.prompts, FLAGS.split, FLAGS.field)
    named = drawing.names(prompts, FLAGS.count, FLAGS.seed)
    model = find_model(FLAGS.checkpoint, FLAGS.teacher_path,
                       tuple(map(int, FLAGS.size)) if FLAGS.size else None, FLAGS.step,
                       FLAGS.variant)
    files, sheet = targets(places.of(FLAGS.out), named, len(prompts))
    mesh = sharding.make_mesh({'fsdp': -1})
    request = encoded(named, model, mesh)
    whose = ['teacher'] if FLAGS.teacher else ['student'] + ['teacher'] * FLAGS.compare_teacher
    teacher, params = load(model, whose, mesh)
    columns, batch = samplers(model, teacher), drawing.filled(min(FLAGS.batch, len(named)), mesh)
    about, writes = describe(model, columns[-1], teacher), not jax.process_index()
    drawn, times = [], []
    with marked([*files, *([sheet] if sheet else [])] if writes else []):
        for sampler in columns:
            times.append(drawing.Times())
            how = drawing.along(sampler, shown(sampler)) if FLAGS.trajectory else sampler
            batches = drawing.generate(how, params[sampler.model], request, batch, mesh, times[-1])
            last = writes and sampler is columns[-1]
            drawn.append(write(batches, named, files if last else [], about,
                               keep=sheet is not None))
        if sheet and writes:
            write_sheet(sheet, prompts, columns, drawn, about)
    if not writes:
        return
    print(f'{FLAGS.out}: {len(named)} image{"s" * (len(named) != 1)}, in batches of {batch}')
    for s, t in zip(columns, times):
        print(f'{s.model}, {s.steps} steps: {s.evaluations} network evaluations and '
              f'{t.drawing / t.images:.4f} s an image, {t.decoding / t.images:.4f} s more to '
              f'decode it; compiled before in {t.compiling:.1f} s')


# --- What is asked for ---


def read_prompts(given: Sequence[str], name: str, split: str, field: str = 'prompt') -> list[str]:
    """`given`, then those of the file or set `name` ('' is none), normalised.

    Empty ones of `given` are the null prompt; those of a file are left out.
    """
    from ddmd_jax.data.prompts import build, files
    from ddmd_jax.data.prompts.text import normalise

    found = [normalise(text) for text in given]
    if name:
        place = buckets.local(places.of(name))
        texts = (build.open_set(place, split) if place.is_dir() else files.read(place, field))
        more = list(filter(None, map(normalise, texts)))
        if not more:
            raise UserError(f'{name} holds no prompt')
        found += more
    return found


def targets(out: Place, named: Sequence[ImageName],
            prompts: int) -> tuple[list[Place], Place | None]:
    """(a file for each image, the sheet's or None); their folder is made.

    If `out` is a file, the sheet is that file, and images are not written one by one.
    """
    from ddmd_jax.diffusion import drawing
    from ddmd_jax.evaluation import pictures

    sheet = FLAGS.grid or FLAGS.compare_teacher or FLAGS.trajectory
    rows, columns = (prompts, FLAGS.count) if not (FLAGS.compare_teacher or FLAGS.trajectory) else (
        len(named), 3 * TRAJECTORY)
    if sheet and max(rows, columns) > (most := pictures.ROWS):
        raise UserError(f'a sheet has at most {most} rows and {most} columns, not {rows} and '
                        f'{columns}; leave out --grid')
    files, grid = [], None
    if out.suffix.lower() not in pictures.SUFFIXES:
        folder, suffix = out, f'.{FLAGS.format}'
        files = [out / name for name in drawing.file_names(named, suffix)]
        grid = out / f'grid{suffix}' if sheet else None
    elif sheet:
        folder, grid = out.parent, out
    elif len(named) == 1:
        folder, files = out.parent, [out]
    else:
        raise UserError(f'--out {out} is one file for {len(named)} images; name a folder, or '
                        'give --grid for a sheet of them')
    taken = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    taken -= begun(folder)
    there = [file for file in (*files, grid) if file and file.name in taken]
    if there and not FLAGS.overwrite:
        more = f' and {len(there) - 1} more' if there[1:] else ''
        raise UserError(f'{there[0]} exists already{more}; choose another --out, or replace '
                        'with --overwrite')
    commands.folder('--out', folder, places.BUCKETS)
    return files, grid


def begun(folder: Place) -> set[str]:
    """Names of files that a command which did not come to its end was about to write."""
    try:
        return set(shape.load((folder / MARK).read_bytes(), [str]))
    except (OSError, ValueError):
        return set()


@contextlib.contextmanager
def marked(written: Sequence[Place]) -> Iterator[None]:
    """Inside, a file beside what is being `written` says so: the same command may go on after it.

    What is there already, and is being replaced, is not the command's own.
    """
    from ddmd_jax.util import files

    if len(written) < 2:  # one file is there whole or not at all
        yield
        return
    folder = written[0].parent
    # A folder of a bucket is not there before its first file is.
    there = {file.name for file in folder.iterdir()} - begun(folder) if folder.is_dir() else set()
    files.write_json(folder / MARK, sorted({file.name for file in written} - there))
    yield
    files.remove(folder / MARK)


# --- How ---


def samplers(model: Model, teacher: Teacher) -> list[Sampler]:
    """The columns of a sheet that the flags ask for; images of the last are written one by one."""
    from ddmd_jax.diffusion import drawing
    from ddmd_jax.train.durable import checkpoint as ckpt

    steps = FLAGS.steps or model.steps
    guidance = model.guidance if FLAGS.guidance is None else FLAGS.guidance
    if FLAGS.teacher:
        return [drawing.of_teacher(teacher, FLAGS.steps or TEACHER_STEPS, guidance, FLAGS.solver)]
    if steps != model.steps:
        ckpt.warn(f'the student was trained for {model.steps} steps, not for {steps}')
    student = drawing.of_student(teacher, steps, model.time(teacher.time),
                                 FLAGS.sampler or model.sampler)
    if not FLAGS.compare_teacher:
        return [student]
    return [drawing.of_teacher(teacher, TEACHER_STEPS, guidance, FLAGS.solver),
            drawing.of_teacher(teacher, steps), student]


def shown(sampler: Sampler) -> list[int]:
    """The steps that --trajectory shows, evenly spaced, the first and the last among them."""
    import numpy as np

    count = min(sampler.steps, TRAJECTORY)
    return np.linspace(0, sampler.steps - 1, count).round().astype(int).tolist()


# --- Writing ---


def describe(model: Model, sampler: Sampler, teacher: Teacher) -> dict[str, str]:
    """Metadata that all files of one sampler share."""
    of_run = {'checkpoint': str(model.workdir), 'step': str(model.saved and model.saved.step)}
    return {
        'model': sampler.model, 'seed': str(FLAGS.seed), 'steps': str(sampler.steps),
        'evaluations': str(sampler.evaluations), 'guidance': f'{sampler.guidance:g}',
        'sampler': sampler.method, **(of_run if sampler.model == 'student' else {}),
        'teacher': model.path or model.family.name, 'teacher_identity': teacher.identity,
        'Software': f'ddmd_jax {ddmd_jax.__version__}'}


def write(batches: Iterable[np.ndarray], named: Sequence[ImageName], files: Sequence[Place],
          about: Mapping[str, str], keep: bool) -> np.ndarray | None:
    """Writes images to `files`, if there are any, as they come; returns them all if `keep`.

    `batches` are ``[<= B, H, W, 3]`` in [-1, 1], in the order of `named` and `files`; or ``[<= B,
    K, H, W, 3]`` along the way, of which the last is the image.
    """
    import numpy as np
    from PIL import Image

    from ddmd_jax.evaluation import pictures

    kept, start = [], 0
    for images in batches:
        for image, name, file in zip(images, named[start:], files[start:]):
            last = image if image.ndim == 3 else image[-1]
            pictures.save(Image.fromarray(pictures.to_uint8(last)), file, {
                'prompt': name.prompt, 'image': str(name.number), **about})
        kept += [images] * keep
        start += len(images)
    return np.concatenate(kept) if keep else None


def write_sheet(file: Place, prompts: Sequence[str], columns: Sequence[Sampler],
                drawn: Sequence[Any], about: Mapping[str, str]) -> None:
    """A row a prompt, a column an image of it; or a row an image, a column a sampler or a step."""
    from ddmd_jax.evaluation import pictures

    titles, n = [sampler.title for sampler in columns], FLAGS.count
    if columns[1:] or FLAGS.trajectory:
        prompts = [prompt for prompt in prompts for _ in range(n)]
    if FLAGS.trajectory:
        titles, drawn = [], [images[:, k] for images in drawn for k in range(images.shape[1])]
        for sampler in columns:
            times = sampler.times()
            model = sampler.model + (f', w={sampler.guidance:g}' if sampler.guidance != 1 else '')
            titles += [f'{model}\nstep {k + 1} of {sampler.steps}, t = {times[k]:.2f}'
                       for k in shown(sampler)]
    elif n > 1 and not columns[1:]:
        titles = [f'{columns[0].model}\nimage {i + 1}' for i in range(n)]
        drawn = [drawn[0][i::n] for i in range(n)]
    pictures.captioned_sheet([prompt or '(empty)' for prompt in prompts], titles, drawn, file,
                             {'prompt': json.dumps(prompts, ensure_ascii=False), **about})


if __name__ == '__main__':
    commands.run('sample', main, define_flags)
