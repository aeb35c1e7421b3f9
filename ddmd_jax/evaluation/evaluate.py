"""The end of a run: its student beside its teacher, on the same prompts and the same noise."""

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
from ddmd_jax.diffusion.drawing import Request, Sampler
from ddmd_jax.evaluation import pictures, tables
from ddmd_jax.evaluation.suites import Suite
from ddmd_jax.util import files
from ddmd_jax.util.errors import UserError
from ddmd_jax.util.places import Place

if TYPE_CHECKING:
    from ddmd_jax.families import Teacher

SHEET_ROWS = 10
SHEET_BLOCK = 4  # images of a caption in a block of the sheet, if the suite draws so many
BLOCK_ROWS = 6
RESULT, SHEET = 'eval.json', 'samples.png'


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
            time_maps.chosen(self.teacher.time, self.config.method.shift), student.sampler)
        return {
            'teacher_guided': drawing.of_teacher(
                self.teacher, e.teacher_steps, e.guidance, e.solver),
            'teacher_few_step': drawing.of_teacher(self.teacher, student.steps),
            # What the sampler alone is worth: the student before its first update.
            'teacher_in_student_sampler': dataclasses.replace(few_steps, model='teacher'),
            'student': few_steps}

    def images(self, request: Request) -> dict[str, np.ndarray]:
        """``[n, H, W, 3]`` by the name of their row."""
        params = {'teacher': self.teacher.params, 'student': self.student}
        return {name: np.concatenate(list(drawing.generate(
            sampler, params[sampler.model], request, self.config.eval.batch, self.mesh)))
            for name, sampler in self.samplers().items()}


def evaluate(compared: Comparison, suite: Suite, encode: Callable[[Sequence[str]], Any],
             workdir: Place, seconds: Callable[[], Mapping[str, float]]) -> None:
    """Draws and measures a suite; writes ``eval.json`` and ``samples.png``; prints the table.

    Args:
      compared: what is drawn.
      suite: of which prompts, and how it is measured.
      encode: ``texts -> conditioning``, arrays in the host's memory.
      workdir: where to write.
      seconds: what the run took so far, by part; called at the end.
    """
    config = compared.config
    examples = suite.examples(config.eval.prompts, config.eval.held_out, config.seed)
    names = drawing.names(examples.captions, 1, config.seed)
    drawn = compared.images(Request.encoded(names, encode))
    images = drawn if examples.real is None else {'real': examples.real, **drawn}
    if jax.process_index() != 0:
        return
    rows = [{'name': name, **_settings(compared.samplers().get(name)), **examples.measure(x)}
            for name, x in tqdm(images.items(), 'measuring', unit=' rows', file=sys.stderr,
                                dynamic_ncols=True)]
    for row in rows:
        if bad := [n for n, v in row.items() if isinstance(v, float) and not math.isfinite(v)]:
            raise UserError(f'{bad[0]} of {row["name"]} is {row[bad[0]]}, no figure; '
                            f'{workdir / RESULT} was not written')
    held = np.zeros(len(names), bool) if examples.held_out is None else examples.held_out
    shown = _shown(examples.captions, held)
    captions = [examples.captions[i] + ' *' * bool(held[i]) for i in shown[:, 0]]
    _draw_sheet(compared, captions, {name: x[shown] for name, x in images.items()}, workdir)
    files.write_json(workdir / RESULT, {'rows': rows, 'seconds': dict(seconds()),
                                        'seed': config.seed, 'step': compared.step,
                                        'weights': compared.weights,
                                        'config': config.to_dict()})
    print(f'{tables.terminal(rows, suite.columns)}\n\n{workdir / RESULT}\n{workdir / SHEET}'
          + '  (* prompt held out of all training)' * bool(held.any()))


def sheet(compared: Comparison, request: Request, workdir: Place) -> None:
    """Writes ``samples.png`` alone: for a family without a suite."""
    images = compared.images(request)
    if jax.process_index() == 0:
        _draw_sheet(compared, [name.prompt for name in request.names], images, workdir)
        print(workdir / SHEET)


def _settings(sampler: Sampler | None) -> dict[str, Any]:
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


def _draw_sheet(compared: Comparison, captions: Sequence[str], images: Mapping[str, np.ndarray],
                workdir: Place) -> None:
    samplers = compared.samplers()
    titles = [samplers[name].title if name in samplers else name for name in images]
    pictures.captioned_sheet(captions, titles, list(images.values()), workdir / SHEET)
