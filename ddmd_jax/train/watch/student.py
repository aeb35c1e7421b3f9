"""The EMA student of a distillation as it goes: figures, a word on its health, images."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ddmd_jax import families
from ddmd_jax.data import DataFileError
from ddmd_jax.data.conditioning import Prompts
from ddmd_jax.diffusion import drawing, process
from ddmd_jax.diffusion.drawing import Request
from ddmd_jax.evaluation import pictures, suites
from ddmd_jax.evaluation.suites import Suite
from ddmd_jax.families import Teacher
from ddmd_jax.method import health
from ddmd_jax.method.recipe import Recipe
from ddmd_jax.parallel import sharding
from ddmd_jax.train import prompts as prompt_sources
from ddmd_jax.train.watch.logs import RunLog, means

GRID = 8  # prompts of the picture that is logged during training
PANEL_TAU = 0.5  # uniform time at which the panels compare teacher and critic


class StudentWatch:
    """Draws the student of fixed prompts and noise, measures what it drew, and shows it.

    `teacher` has the weights that the run starts from; networks are given as parameters of its.
    """

    def __init__(self, config: Any, teacher: Teacher, recipe: Recipe, prompts: Prompts, mesh: Mesh):
        c, self.teacher = config, teacher
        self._decode: Any = teacher.latents.decode
        student = drawing.of_student(teacher, c.student.steps, recipe.steps.time, c.student.sampler)
        self._probed = self._judged = None
        self._start: Any = None  # what the student drew when it was the teacher
        if c.log.probe:
            probed = request_of(prompts, c.log.probe, c.seed)
            self._probed = drawing.drawer(student, probed, mesh)
            self._probe = jax.jit(functools.partial(
                health.probe, limit=recipe.limit, data_std=teacher.latents.std))
        suite = suite_of(c)
        if c.log.judge and suite and suite.watched:
            held_out = c.log.judge // 3
            examples = suite.watched(c.log.judge - held_out, held_out, c.seed)
            self._figures = examples.measure
            encode = prompt_sources.image_encoder(c, teacher, mesh)
            judged = Request.encoded(drawing.names(examples.captions, 1, c.seed), encode)
            self._judged = drawing.drawer(student, judged, mesh)
        shown = request_of(prompts, GRID, c.seed)
        self.draw = drawing.drawer(student, shown, mesh)  # latents of the pictures that are logged
        self._noised = noised_predictor(teacher, recipe, shown, mesh)

    def measure(self, student: Any, history: list[dict[str, Any]],
                values: dict[str, Any]) -> tuple[dict[str, Any], str]:
        """(`values` of this step with those of what the student draws and with its health, and all
        that as one line); `history` are those of the steps before."""
        if self._probed:
            # Compared with the teacher's weights, so that a resumed run finds the same start.
            if self._start is None:
                self._start = self._probed(self.teacher.params)
            values = values | means([self._probe(self._probed(student), self._start)])
        if self._judged:
            images = np.asarray(self._decode(self._judged(student)))
            values = {**values, **self._figures(np.clip(images, -1, 1))}
        word, reason = health.verdict([*history, values], self.teacher.latents.std)
        values = values | {'health': word, 'health_reason': reason}
        fake = f'fake {values["fake_loss"]:.3f} ' if 'fake_loss' in values else ''
        return values, (f'loss {values["loss"]:.3f} {fake}gap {values["dm_rel_gap"]:.3f} '
                        f'dm/ca {values["dm_to_ca"]:.2f} std {values["x_std"]:.3f} {word}')

    def show(self, student: Any, critic: Any, step: int, log: RunLog) -> None:
        """Images of the student; what teacher and critic predict of them re-noised."""
        if not self._decode:
            return
        x = self.draw(student)
        real, fake = (self._noised(params, x) for params in (self.teacher.params, critic))
        images = [np.asarray(self._decode(z)) for z in (x, real, fake)]
        log.image(step, 'panels/student_real_fake_difference',
                  pictures.rows_of_images([*images, images[1] - images[2]]))


def suite_of(config: Any) -> Suite | None:
    """The suite that `eval.suite` names, or else the family's own; None if it has none.

    Raises:
      DataFileError: there is no such suite, or it is a published one.
    """
    named = config.eval.get('suite', '')
    suite = suites.find(named) if named else families.get(config.teacher.name).suite
    if suite and suite.examples is None:
        raise DataFileError(f'eval.suite={named} wants prompt files of its own; leave it out, and '
                            f'evaluate the run: python -m ddmd_jax.evaluate --suite={named}')
    return suite


def request_of(prompts: Prompts, count: int, seed: int) -> Request:
    """`count` images of different training prompts (fewer if there are fewer, then again)."""
    rows = np.random.default_rng(seed).permutation(np.unique(prompts.rows))
    rows = np.resize(rows, count)
    names = drawing.names([prompts.caption(int(row)) for row in rows], 1, seed)
    return Request(names, prompts.cond(rows), prompts.null)


def noised_predictor(teacher: Teacher, recipe: Recipe, request: Request,
                     mesh: Mesh) -> Callable[[Any, jax.Array], jax.Array]:
    """``(params, x [n, ...]) -> x_hat``: a network's predictions of samples re-noised to PANEL_TAU.

    The noise never changes, so that networks and updates can be compared. Both sides are whole on
    every device.
    """
    count, split = len(request.names), sharding.batch_sharding(mesh)
    rows = drawing.filled(count, mesh)

    def predict(params: Any, x: jax.Array, cond: Any) -> jax.Array:
        x, cond = jax.lax.with_sharding_constraint(jax.tree.map(
            lambda a: jnp.resize(a, (rows, *a.shape[1:])), (x, cond)), split)
        tau = recipe.steps.time(jnp.full((rows,), PANEL_TAU))
        x_tau = process.renoise(x, tau, jax.random.normal(jax.random.key(0), x.shape, jnp.float32))
        return teacher.predict_clean(sharding.on_device(params), x_tau, tau, cond)[:count]

    program = jax.jit(predict, out_shardings=sharding.replicated(mesh))
    return lambda params, x: program(params, x, request.cond)
