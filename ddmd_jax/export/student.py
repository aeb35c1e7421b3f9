"""The student of a run's newest checkpoint, and what the run says of it."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from ddmd_jax import config as config_lib, families
from ddmd_jax.diffusion import time as time_maps
from ddmd_jax.export.plain import export_of
from ddmd_jax.families.family import Export, Exported, Source
from ddmd_jax.parallel import sharding
from ddmd_jax.train.durable import checkpoint as ckpt


@dataclasses.dataclass(frozen=True)
class Student:
    """A checkpoint that has been looked at, not read: `manifest` is flat, names with dots."""

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
        """What the run draws with; a manifest does not say, as it may change."""
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
        fault = ckpt.damage(saved)
        if fault:
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
        return config_lib.field(self.file('config.json'), name)


def write_orbax(student: Exported, out: Path) -> None:
    """``OUT/params``: the parameters by their names here, as an Orbax checkpoint."""
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as writer:
        writer.save(out / 'params', args=ocp.args.StandardSave(
            jax.tree.map(lambda x: x.astype(student.dtype), student.params)))


def open_student(workdir: Path, teacher: str, ema: bool) -> Student:
    """Raises `CheckpointError` and `WeightsError`; reads no weights of the student."""
    step, manifest = ckpt.read_manifest(workdir)
    if manifest.get('task', 'distill') != 'distill':
        raise ckpt.CheckpointError(f'{workdir} trains a teacher, there is no student in it; it is '
                                   'in teacher.safetensors there, once the run is through')
    try:
        family = families.get(str(manifest.get('teacher.name')))
    except families.UnknownFamily as e:
        raise ckpt.CheckpointError(f'{workdir} distils a teacher that is unknown here: {e}') from e
    export = export_of(family)
    source = export.open_source(teacher or manifest.get('teacher.path', ''))
    if source.identity not in (None, manifest.get('teacher_identity', source.identity)):
        ckpt.warn(f'{workdir} distils another teacher than the one at {teacher or "its path"}: '
                  'what is written beside the student may not belong to it')
    return Student(workdir, step, manifest, family.name, export, source, ema,
                   sharding.make_mesh({'fsdp': -1}))
