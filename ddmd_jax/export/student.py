"""The student of a run's newest checkpoint, and what the run says of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from ddmd_jax import config as config_lib
from ddmd_jax.parallel import sharding
from ddmd_jax.train.durable import checkpoint as ckpt


@dataclasses.dataclass(frozen=True)
class Source:
    """A teacher as far as its student needs it: where it lies, and its shapes.

    `identity` is its weights', `abstract` are ShapeDtypeStructs of the parameters, `config` the
    published one of the network, `own` what the family wants to find again.
    """

    identity: str | None

    folder: Path | None
    abstract: Any
    rules: sharding.Rules
    config: dict[str, Any]
    shift: float
    own: Any = None


@dataclasses.dataclass(frozen=True)
class Student:
    """A checkpoint that has been looked at, not read: `manifest` is flat, names with dots."""

    workdir: Path
    step: int
    manifest: Mapping[str, Any]
    family: str
    source: Source
    average: bool
    mesh: Mesh

    @property
    def steps(self) -> int:
        return self.manifest.get('student.steps', 1)

    @property
    def sampler(self) -> str:
        """What the run draws with; a manifest does not say, as it may change."""
        return self.field('student.sampler') or 'renoise'

    @property
    def shift(self) -> float:
        """Of time: the run's, or else the teacher's."""
        shift = self.manifest.get('method.shift')
        return self.source.shift if shift is None else shift

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
        return ckpt.restore_part(saved, 'ema' if self.average else 'student', like,
                                 sharding.shard_tree(like, self.source.rules, self.mesh))

    def write_orbax(self, params: Any, folder: Path, dtype: str) -> None:
        """The parameters as they are named here, as an Orbax checkpoint of nothing else."""
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as writer:
            writer.save(folder, args=ocp.args.StandardSave(
                jax.tree.map(lambda x: x.astype(dtype), params)))

    def file(self, name: str) -> Any:
        """JSON that the run has left in its folder, or None."""
        path = self.workdir / name
        return json.loads(path.read_text()) if path.is_file() else None

    def field(self, name: str) -> Any:
        """A field of the run's config as it was last; None if it is not there."""
        return config_lib.field(self.file('config.json'), name)


def open_student(workdir: Path, families: Mapping[str, Any], teacher: str,
                 average: bool) -> Student:
    """Raises `CheckpointError` and `WeightsError`; reads no weights of the student."""
    step, manifest = ckpt.read_manifest(workdir)
    name = manifest.get('teacher.name')
    if manifest.get('task', 'distill') != 'distill':
        raise ckpt.CheckpointError(f'{workdir} trains a teacher, there is no student in it; it is '
                                   'in teacher.safetensors there, once the run is through')
    if name not in families:
        raise ckpt.CheckpointError(f'{workdir} distils the teacher {name!r}, which is unknown '
                                   f'here; known: {", ".join(families)}')
    source = families[name].open_source(teacher or manifest.get('teacher.path', ''))
    if source.identity not in (None, manifest.get('teacher_identity', source.identity)):
        ckpt.warn(f'{workdir} distils another teacher than the one at {teacher or "its path"}: '
                  'what is written beside the student may not belong to it')
    return Student(workdir, step, manifest, name, source, average,
                   sharding.make_mesh({'fsdp': -1}))
