"""Rows of a table: drawn on the same prompts and the same noise, measured, shown side by side.

At a run's end they are its student beside its teacher; ``python -m ddmd_jax.evaluate`` draws the
same ones, or others, by the same functions.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from ddmd_jax.diffusion import drawing, time as time_maps
from ddmd_jax.diffusion.drawing import Request, Sampler, Times
from ddmd_jax.evaluation import pictures, tables
from ddmd_jax.evaluation.kept import Held, Kept, Real
from ddmd_jax.evaluation.suites import Examples, Images, Suite
from ddmd_jax.util import files
from ddmd_jax.util.errors import UserError
from ddmd_jax.util.places import Place

if TYPE_CHECKING:
    from ddmd_jax.families import Teacher

SHEET_ROWS = 10
SHEET_BLOCK = 4  # images of a caption in a block of the sheet, if the suite draws so many
BLOCK_ROWS = 6
RESULT, SHEET = 'eval.json', 'samples.png'


def beside(teacher: Teacher, student: Sampler, steps: int, guidance: float,
           solver: str) -> dict[str, Sampler]:
    """A student's way to draw, the last, and its teacher's, by the name of their row."""
    return {
        'teacher_guided': drawing.of_teacher(teacher, steps, guidance, solver),
        'teacher_few_step': drawing.of_teacher(teacher, student.steps),
        # What the sampler alone is worth: the student before its first update.
        'teacher_in_student_sampler': dataclasses.replace(student, model='teacher'),
        'student': student}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A student and its teacher, to be drawn beside one another.

    Attributes:
      config: of the run; `eval` and `student` say how each is drawn, `seed` with which noise.
      teacher: with its parameters.
      student: parameters of the student.
      step: its updates.
      mesh: on which both lie.
      weights: names `student` (`flat.corner_identity`).
    """

    config: Any
    teacher: Teacher
    student: Any
    step: int
    mesh: Mesh
    weights: str | None = None

    def samplers(self) -> dict[str, Sampler]:
        """The ways to draw, by the name of their row."""
        e, student = self.config.eval, self.config.student
        few_steps = drawing.of_student(
            self.teacher, student.steps,
            time_maps.chosen(self.teacher.time, self.config.method.shift,
                             student.get('first_step')), student.sampler)
        return beside(self.teacher, few_steps, e.teacher_steps, e.guidance, e.solver)

    def entries(self) -> dict[str, Entry]:
        """What is drawn, by the name of its row."""
        params = {'teacher': self.teacher.params, 'student': self.student}
        return {name: Entry(sampler, params[sampler.model])
                for name, sampler in self.samplers().items()}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row to be drawn: how, and with whose parameters, which lie on the mesh."""

    sampler: Sampler
    params: Any


def missing(images: Mapping[str, Held | Kept]) -> dict[str, list[int]]:
    """Numbers of the images of each row that are still to be drawn, as process 0 sees them."""
    found = {name: one.missing() for name, one in images.items()}
    if jax.process_count() == 1:
        return found
    from jax.experimental import multihost_utils

    masks = {name: np.isin(np.arange(len(images[name])), rows) for name, rows in found.items()}
    agreed = multihost_utils.broadcast_one_to_all(masks)
    return {name: np.flatnonzero(mask).tolist() for name, mask in agreed.items()}


def draw(entries: Mapping[str, Entry], images: Mapping[str, Held | Kept], request: Request,
         batch: int, mesh: Mesh) -> dict[str, Times]:
    """Draws what is missing of each row; THE way to draw for a table, a run's own or any other.

    Every process takes part; process 0 keeps the images, batch by batch.

    Args:
      entries: the rows.
      images: where theirs are kept.
      request: at least what is missing of any row; names are unique.
      batch: images at a time, over all devices.
      mesh: on which the parameters lie.
    """
    place = {name: row for row, name in enumerate(request.names)}
    found = missing(images)
    times: dict[str, Times] = {}
    for row, entry in entries.items():
        kept, left, times[row] = images[row], found[row], Times()
        named = kept.named
        part = request.pick([place[named[i]] for i in left])
        for drawn in drawing.generate(entry.sampler, entry.params, part, batch, mesh, times[row]):
            if jax.process_index() == 0:
                kept.add(left[:len(drawn)], pictures.to_uint8(drawn))
            left = left[len(drawn):]
        if jax.process_index() == 0:
            kept.finish()
    return times


def evaluate(compared: Comparison, suite: Suite, encode: Callable[[Sequence[str]], Any],
             workdir: Place, seconds: Callable[[], Mapping[str, float]]) -> None:
    """Draws and measures a suite; writes ``eval.json`` and ``samples.png``; prints the table.

    Args:
      compared: what is drawn.
      suite: of which prompts, and how it is measured; one with `examples`.
      encode: ``texts -> conditioning``, arrays in the host's memory.
      workdir: where to write.
      seconds: what the run took so far, by part; called at the end.
    """
    config, entries = compared.config, compared.entries()
    assert suite.examples is not None
    examples = suite.examples(config.eval.prompts, config.eval.held_out, config.seed)
    names = drawing.names(examples.captions, 1, config.seed)
    images = {name: Held(names) for name in entries}
    draw(entries, images, Request.encoded(names, encode), config.eval.batch, compared.mesh)
    if jax.process_index() != 0:
        return
    settings = {name: settings_of(entry.sampler) for name, entry in entries.items()}
    rows, _, gaps = measured(examples, images, settings)
    for why in gaps:
        raise UserError(f'{why}; {workdir / RESULT} was not written')
    samples(examples, images, {name: e.sampler.title for name, e in entries.items()},
            workdir / SHEET)
    files.write_json(workdir / RESULT, {'rows': rows, 'seconds': dict(seconds()),
                                        'seed': config.seed, 'step': compared.step,
                                        'weights': compared.weights,
                                        'config': config.to_dict()})
    held = examples.held_out is not None and bool(examples.held_out.any())
    print(f'{tables.terminal(rows, suite.columns)}\n\n{workdir / RESULT}\n{workdir / SHEET}'
          + '  (* prompt held out of all training)' * held)


def measured(examples: Examples, images: Mapping[str, Images],
             settings: Mapping[str, Mapping[str, Any]],
             ) -> tuple[list[dict[str, Any]], dict[str, dict[str, np.ndarray]], list[str]]:
    """(rows of the table, numbers of each image by row, what is no figure, a line each)."""
    every: dict[str, Images] = dict(images)
    if examples.real is not None:
        every = {'real': Real(examples.real), **every}
    rows: list[dict[str, Any]] = []
    each: dict[str, dict[str, np.ndarray]] = {}
    gaps: list[str] = []
    for name, found in tqdm(every.items(), 'measuring', unit=' rows', file=sys.stderr,
                            dynamic_ncols=True):
        figures, each[name] = examples.look(found)
        for figure, value in figures.items():
            if isinstance(value, float) and not math.isfinite(value):
                gaps.append(f'{figure} of {name} is {value}, no figure')
                figures[figure] = None
        rows.append({'name': name, **settings.get(name, settings_of(None)), **figures})
    return rows, each, gaps


def samples(examples: Examples, images: Mapping[str, Images], titles: Mapping[str, str],
            path: Place) -> None:
    """``samples.png``: some of the prompts, a column a row of the table."""
    held = (np.zeros(len(examples.captions), bool) if examples.held_out is None
            else examples.held_out)
    shown = _shown(examples.captions, held)
    captions = [examples.captions[i] + ' *' * bool(held[i]) for i in shown[:, 0]]
    every = dict(images) if examples.real is None else {
        'real': Real(examples.real), **images}
    columns = [found[shown.reshape(-1)] for found in every.values()]
    pictures.captioned_sheet(
        captions, [titles.get(name, name) for name in every],
        [x.reshape(*shown.shape, *x.shape[1:]) for x in columns], path)


def sheet(compared: Comparison, request: Request, workdir: Place) -> None:
    """Writes ``samples.png`` alone: for a family without a suite."""
    entries = compared.entries()
    images = {name: Held(request.names) for name in entries}
    draw(entries, images, request, compared.config.eval.batch, compared.mesh)
    if jax.process_index() == 0:
        rows = np.arange(len(request.names))
        pictures.captioned_sheet(
            [name.prompt for name in request.names],
            [entry.sampler.title for entry in entries.values()],
            [found[rows] for found in images.values()], workdir / SHEET)
        print(workdir / SHEET)


def settings_of(sampler: Sampler | None) -> dict[str, Any]:
    """How a row was drawn; real images were not."""
    return {name: getattr(sampler, name, None) for name in tables.SETTINGS}


def _shown(captions: Sequence[str], held_out: np.ndarray) -> np.ndarray:
    """Images of the sheet, ``[R, K]``: mostly prompts seen in training, the last few held out.

    K is `SHEET_BLOCK` if some captions come so often, else 1.
    """
    rows = np.arange(len(captions))
    images: dict[str, list[int]] = {}
    for row, caption in enumerate(captions):
        images.setdefault(caption, []).append(row)
    blocks = [found[:SHEET_BLOCK] for found in images.values() if len(found) >= SHEET_BLOCK]
    choice, most = np.asarray(blocks or rows[:, None]), BLOCK_ROWS if blocks else SHEET_ROWS
    seen, unseen = choice[~held_out[choice[:, 0]]], choice[held_out[choice[:, 0]]]
    few = min(len(unseen), most // 3)
    return np.concatenate([seen[:most - few], unseen[:few]])
