"""The student of a run's checkpoint, and what the run says of it."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from ddmd_jax import config as config_lib, families
from ddmd_jax.diffusion import time as time_maps
from ddmd_jax.families import Family, LoadOptions
from ddmd_jax.families.family import Export, Exported, Source
from ddmd_jax.models import adapters
from ddmd_jax.models.adapters import Binding
from ddmd_jax.parallel import sharding
from ddmd_jax.train.durable import checkpoint as ckpt
from ddmd_jax.util import run_files
from ddmd_jax.util.errors import UserError
from ddmd_jax.util.places import Place
from ddmd_jax.weights import flat

FILE = 'student.safetensors'
ALONE = f"""from ddmd_jax.weights import flat

params, about = flat.load('{{folder}}/{FILE}', 'export it again')
"""


@dataclasses.dataclass(frozen=True)
class Student:
    """A student whose weights are still to be read."""

    workdir: Place
    saved: ckpt.Saved
    family: str
    export: Export
    source: Source
    ema: bool
    mesh: Mesh
    teacher: str  # path
    variant: str  # of its files

    @functools.cached_property
    def binding(self) -> Binding:
        """How what the run trained becomes its student."""
        return binding_of(self.manifest)

    @property
    def step(self) -> int:
        """Updates that it has had."""
        return self.saved.step

    @property
    def manifest(self) -> Mapping[str, Any]:
        """Of its checkpoint: flat, names with dots."""
        return self.saved.manifest

    @property
    def steps(self) -> int:
        return self.manifest.get('student.steps', 1)

    @property
    def sampler(self) -> str:
        """The run's; a manifest does not say, as it may change."""
        return self.field('student.sampler') or 'renoise'

    @property
    def time(self) -> time_maps.TimeMap:
        """The run's time map, or else the teacher's."""
        return time_maps.chosen(self.source.time, self.manifest.get('method.shift'),
                                self.manifest.get('student.first_step'))

    def read(self) -> Any:
        """What was trained, fp32, over the mesh: of a fully fine-tuned student its weights.

        Raises:
          CheckpointError: damaged, or of another shape than the teacher.
        """
        like = trained_shapes(self.binding, self.source.abstract)
        return self.saved.part('ema' if self.ema else 'student', like,
                               sharding.shard_tree(like, self.source.rules, self.mesh))

    def network(self, trained: Any) -> Any:
        """The student's own weights, fp32: adapters are merged into the teacher's, read for it.

        Raises:
          WeightsError: the teacher's are not there.
        """
        if not self.binding.leans:
            return trained
        base = families.get(self.family).load_teacher(LoadOptions(
            self.teacher, self.mesh, variant=self.variant)).params
        merge = lambda base, trained: adapters.materialised(self.binding.bind(base, trained))
        layout = sharding.shard_tree(jax.eval_shape(lambda: base), self.source.rules, self.mesh)
        return jax.jit(merge, out_shardings=layout)(base, trained)

    def file(self, name: str) -> Any:
        """What the run has left in its folder, or None; see `run_files.read`."""
        return run_files.read(self.workdir, name)

    def field(self, name: str) -> Any:
        """A field of the run's config as it was last; None if it is not there."""
        return field_of(self.workdir, name)


def binding_of(manifest: Mapping[str, Any]) -> Binding:
    """How what a run trained becomes its student, by its manifest."""
    prefix = 'student.adapter.'
    fields = {name.removeprefix(prefix).replace('.', '/'): value
              for name, value in manifest.items() if name.startswith(prefix)}
    return adapters.from_section(flat.unflatten(fields))


def trained_shapes(binding: Binding, base: Any) -> Any:
    """Of what a run trains of its student, fp32, given arrays or shapes of the teacher."""
    return jax.eval_shape(lambda base: binding.init(base, jax.random.key(0)), base)


def field_of(workdir: Place, name: str) -> Any:
    """A field of a run's config as it was last; None if it is not there.

    Raises:
      UserError: the config is damaged, or has a value there that the field may not hold.
    """
    config = run_files.read(workdir, 'config.json')
    value = config_lib.field(config, name)
    rule = next((f.rule for f in config_lib.fields_of(config or {}) if f.path == name), None)
    if value is not None and rule is not None and not rule.ok(value):
        raise UserError(f'{workdir / "config.json"} is damaged ({name} is {value!r:.40}, and must '
                        f'be {rule.allowed}); start the run again, which writes it')
    return value


def open_run(workdir: Place, step: int | None = None) -> tuple[ckpt.Saved, Family]:
    """(the checkpoint `step` of a distillation, None the newest; its teacher's family).

    Raises:
      CheckpointError: there is none, it is of another task, or of an unknown family.
    """
    saved = ckpt.saved(workdir, step)
    manifest = saved.manifest
    if manifest.get('task', 'distill') != 'distill':
        raise ckpt.CheckpointError(f'{workdir} trains a teacher; its result is '
                                   f'{workdir / "teacher.safetensors"}')
    try:
        return saved, families.get(str(manifest.get('teacher.name')))
    except families.UnknownFamily as e:
        raise ckpt.CheckpointError(f'{workdir} distils a teacher that is unknown here: {e}') from e


def open_student(workdir: Place, teacher: str, ema: bool, step: int | None = None,
                 variant: str | None = None) -> Student:
    """The student of a run's checkpoint `step`, None the newest; reads none of its weights.

    `teacher` is the teacher's path if it has moved, `variant` that of its files, None the run's.

    Raises:
      CheckpointError: see `open_run`; or the run distils another teacher.
      WeightsError: the teacher cannot be read.
    """
    saved, family = open_run(workdir, step)
    export = family.export or plain_export(family)
    if variant is None:
        variant = saved.manifest.get('teacher.variant', '')
    path = teacher or saved.manifest.get('teacher.path', '')
    source = export.open_source(path, *family.of_variant(variant))
    check_teacher(saved, source.identity, source.time, '--teacher')
    return Student(workdir, saved, family.name, export, source, ema,
                   sharding.make_mesh({'fsdp': -1}), path, variant)


def check_teacher(saved: ckpt.Saved, identity: str | None, time: time_maps.TimeMap,
                  flag: str) -> None:
    """Raises `CheckpointError` unless these are the weights that the run distils, whose text side
    and decoder the student goes with, and their time map where the run has none of its own; None
    is not known. `flag` is where another path is given."""
    known, of_time = (saved.manifest.get(name) for name in ('teacher_identity', 'teacher_time'))
    if None not in (known, identity) and known != identity:
        raise ckpt.CheckpointError(
            f'{saved.folder} distils another teacher (identity {known}) than the one given '
            f'({identity}); give the path of its own with {flag}')
    if of_time not in (None, time.identity) and saved.manifest.get('method.shift') is None:
        raise ckpt.CheckpointError(
            f'{saved.folder} distils a teacher of another time ({of_time}) than the one given '
            f'({time.identity}), by its scheduler_config.json; give the path of its own with '
            f'{flag}')


def plain_export(family: Family) -> Export:
    """Of a family that brings none of its own: safetensors and Orbax, by the names it has here."""
    def open_source(path: str, variant: str = '') -> Source:
        teacher = family.load_teacher(LoadOptions(path, variant=variant))
        shapes = jax.eval_shape(lambda: teacher.params)
        return Source(teacher.identity, shapes, teacher.rules, teacher.time)

    def write_weights(student: Exported, out: Path) -> None:
        flat.save(out / FILE, student.params, {'family': family.name, 'step': str(student.step)},
                  dtype=student.dtype)

    return Export(open_source, write_weights, {'safetensors': (FILE,)}, ALONE)
