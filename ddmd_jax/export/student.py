"""The student of a run's newest checkpoint, and what the run says of it."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ddmd_jax import config as config_lib, families
from ddmd_jax.diffusion import time as time_maps
from ddmd_jax.families import Family, LoadOptions
from ddmd_jax.families.family import Export, Exported, Source
from ddmd_jax.parallel import sharding
from ddmd_jax.train.durable import checkpoint as ckpt
from ddmd_jax.weights import flat

FILE = 'student.safetensors'
ALONE = f"""from ddmd_jax.weights import flat

params, about = flat.load('{{folder}}/{FILE}', 'export it again')
"""


@dataclasses.dataclass(frozen=True)
class Student:
    """A student whose weights are still to be read; `manifest` is flat, names with dots."""

    workdir: Path
    step: int
    manifest: Mapping[str, Any]
    family: str
    export: Export
    source: Source
    ema: bool
    mesh: Mesh

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
        return time_maps.chosen(self.source.time, self.manifest.get('method.shift'))

    def read(self) -> Any:
        """The weights, fp32, over the mesh.

        Raises:
          CheckpointError: damaged, or of another shape than the teacher.
        """
        saved = self.workdir / 'checkpoints' / str(self.step)
        if fault := ckpt.damage(saved):
            raise ckpt.CheckpointError(
                f'checkpoint {saved} is damaged ({fault}); start the run again, which goes back to '
                'the newest good one, or move that folder away')
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32),
                            self.source.abstract)
        return ckpt.restore_part(saved, 'ema' if self.ema else 'student', like,
                                 sharding.shard_tree(like, self.source.rules, self.mesh))

    def file(self, name: str) -> Any:
        """JSON that the run has left in its folder, or None."""
        path = self.workdir / name
        return json.loads(path.read_text()) if path.is_file() else None

    def field(self, name: str) -> Any:
        """A field of the run's config as it was last; None if it is not there."""
        return field_of(self.workdir, name)


def field_of(workdir: Path, name: str) -> Any:
    """A field of a run's config as it was last; None if it is not there."""
    path = workdir / 'config.json'
    return config_lib.field(json.loads(path.read_text()) if path.is_file() else None, name)


def open_run(workdir: Path) -> tuple[int, dict[str, Any], Family]:
    """(step, manifest, teacher's family) of a distillation's newest checkpoint.

    Raises:
      CheckpointError: there is none, it is of another task, or of an unknown family.
    """
    step, manifest = ckpt.read_manifest(workdir)
    if manifest.get('task', 'distill') != 'distill':
        raise ckpt.CheckpointError(f'{workdir} trains a teacher; its result is '
                                   f'{workdir / "teacher.safetensors"}')
    try:
        return step, manifest, families.get(str(manifest.get('teacher.name')))
    except families.UnknownFamily as e:
        raise ckpt.CheckpointError(f'{workdir} distils a teacher that is unknown here: {e}') from e


def open_student(workdir: Path, teacher: str, ema: bool) -> Student:
    """The student of a run's newest checkpoint; reads none of its weights.

    `teacher` is the teacher's path if it has moved.

    Raises:
      CheckpointError: see `open_run`.
      WeightsError: the teacher cannot be read.
    """
    step, manifest, family = open_run(workdir)
    export = family.export or plain_export(family)
    source = export.open_source(teacher or manifest.get('teacher.path', ''))
    if source.identity not in (None, manifest.get('teacher_identity', source.identity)):
        ckpt.warn(f'{workdir} distils another teacher than the one at {teacher or "its path"}: '
                  'tokenizer and decoder may not match the student')
    return Student(workdir, step, manifest, family.name, export, source, ema,
                   sharding.make_mesh({'fsdp': -1}))


def plain_export(family: Family) -> Export:
    """Of a family that brings none of its own: safetensors and Orbax, by the names it has here."""
    def open_source(path: str) -> Source:
        teacher = family.load_teacher(LoadOptions(path))
        shapes = jax.eval_shape(lambda: teacher.params)
        return Source(teacher.identity, shapes, teacher.rules, teacher.time)

    def write_weights(student: Exported, out: Path) -> None:
        flat.save(out / FILE, student.params, {'family': family.name, 'step': str(student.step)},
                  dtype=student.dtype)

    return Export(open_source, write_weights, {'safetensors': (FILE,)}, ALONE)
