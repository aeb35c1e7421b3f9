"""What images are drawn with: a run's student and its teacher, or weights at a path.

Heavy imports are made inside functions, as commands check their flags first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddmd_jax.util import places
from ddmd_jax.util.errors import UserError

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from ddmd_jax.diffusion.drawing import ImageName, Request
    from ddmd_jax.diffusion.time import TimeMap
    from ddmd_jax.families import Family, Teacher
    from ddmd_jax.train.durable.checkpoint import Saved
    from ddmd_jax.util.places import Place


@dataclasses.dataclass(frozen=True)
class Model:
    """Where the weights are: the teacher's, and those of a run's student if `workdir` is one.

    `steps`, `sampler`, `shift` and `first_step` are the run's then. So is `guidance`, by which the
    teacher is drawn; else it is the family's.
    """

    family: Family
    path: str
    dtype: str
    size: tuple[int, ...] | None
    workdir: Place | None = None
    saved: Saved | None = None
    steps: int = 1
    sampler: str = 'renoise'
    shift: float | None = None
    first_step: int | None = None
    variant: str = ''
    guidance: float = 1.0

    def time(self, own: TimeMap) -> TimeMap:
        """That its student draws by: the run's, or else the teacher's `own`."""
        from ddmd_jax.diffusion import time

        return time.chosen(own, self.shift, self.first_step)


def find_model(checkpoint: str | Path, path: str, size: tuple[int, ...] | None,
               step: int | None = None, variant: str | None = None) -> Model:
    """The teacher and student of a run's checkpoint `step`, None the newest; reads no weights.

    `path` is the teacher's if it has moved, or if there is no `checkpoint`; `size` that of the
    images, None the run's own; `variant` that of the teacher's files, likewise.
    """
    from ddmd_jax import families
    from ddmd_jax.export.student import field_of, open_run

    if checkpoint:
        workdir = places.of(checkpoint)
        opened, family = open_run(workdir, step)
        saved = opened.manifest
        first = tuple(saved[name] for name in ('data.sizes.0.0', 'data.sizes.0.1')
                      if name in saved)
        model = Model(
            family, '' if path == family.name else path or saved.get('teacher.path', ''),
            saved.get('teacher.dtype', family.dtype), size or first or None, workdir, opened,
            saved.get('student.steps', 1), field_of(workdir, 'student.sampler') or 'renoise',
            saved.get('method.shift'), saved.get('student.first_step'),
            saved.get('teacher.variant', '') if variant is None else variant,
            field_of(workdir, 'eval.guidance') or family.guidance)
    else:
        family, path = families.find(path)
        if family.load is None:
            raise UserError(f'--teacher_path {path}: only the text encoder of {family.name} is '
                            'supported')
        model = Model(family, path, family.dtype, size, variant=variant or '',
                      guidance=family.guidance)
    if size and (one := model.family.one_size):
        raise UserError(f'--size: {model.family.name} has one size, {one[0]},{one[1]}')
    return model


def encoded(named: Sequence[ImageName], model: Model, mesh: Mesh) -> Request:
    """The images asked for with their prompts encoded; the text encoder is let go."""
    from ddmd_jax.diffusion import drawing
    from ddmd_jax.families import LoadOptions
    from ddmd_jax.parallel import distributed
    from ddmd_jax.train import prompts

    text = model.family.load_text(LoadOptions(
        model.path, mesh, model.dtype, variant=model.variant))
    distributed.agree('text encoder or prompts', {
        'encoder': text.identity, 'prompts': drawing.digest(named)})
    prompts.count_cut(text, [list(dict.fromkeys(name.prompt for name in named))])
    return drawing.Request.encoded(named, lambda texts: prompts.encode_texts(texts, text, mesh))


def load(model: Model, whose: Sequence[str], mesh: Mesh) -> tuple[Teacher, dict[str, Any]]:
    """(the teacher without its weights, parameters on `mesh` by 'student' and 'teacher')."""
    import jax

    from ddmd_jax.export.student import binding_of, check_teacher, trained_shapes
    from ddmd_jax.families import LoadOptions
    from ddmd_jax.parallel import distributed, sharding

    # Kernels in the type of the products: predictions are the same, and half is read.
    teacher = model.family.load_teacher(LoadOptions(
        model.path, mesh, model.dtype, model.size, param_dtype=model.dtype, variant=model.variant))
    if teacher.latents.decode is None:
        raise UserError(f'{model.path} has no autoencoder beside its transformer; give the '
                        "pipeline's folder with --teacher_path")
    if model.saved:  # also where the teacher alone is drawn with: it is the run's
        check_teacher(model.saved, teacher.identity, teacher.time, '--teacher_path')
    distributed.agree('teacher or checkpoint', {
        'teacher': teacher.identity, 'time': teacher.time.identity,
        **(model.saved.identities() if model.saved else {})})
    lay_out = lambda tree: sharding.shard_tree(tree, teacher.rules, mesh)
    binding = binding_of(model.saved.manifest if model.saved else {})
    shapes = jax.eval_shape(lambda: teacher.params)
    params, base = {}, None
    if 'teacher' in whose or binding.leans:
        base = jax.device_put(teacher.params, lay_out(shapes))
    teacher = dataclasses.replace(teacher, params=None)  # no longer held on to
    if 'teacher' in whose:
        params['teacher'] = base
    if model.saved and 'student' in whose:
        trained = trained_shapes(binding, shapes)
        params['student'] = binding.bind(base, model.saved.part('ema', trained, lay_out(trained)))
    return teacher, params
