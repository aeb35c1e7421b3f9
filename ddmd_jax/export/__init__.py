"""A student for others to load: a diffusers pipeline, safetensors, or an Orbax checkpoint."""

import dataclasses
from pathlib import Path

from ddmd_jax.export import card
from ddmd_jax.export.student import Student, open_student, write_orbax
from ddmd_jax.families.family import Exported
from ddmd_jax.train.durable.checkpoint import CheckpointError
from ddmd_jax.weights.flat import WeightsError

FORMATS = ('diffusers', 'safetensors', 'orbax')
DTYPES = ('float32', 'bfloat16', 'float16')


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What is to be exported of a run, and how.

    Attributes:
      format: one of FORMATS.
      dtype: of the tensors, one of DTYPES.
      ema: the EMA student, or the raw one.
      sampler: of the pipeline's scheduler, of `sampling.STUDENT_MODES`; '' is the run's.
      teacher: where the teacher lies, if no longer where it was.
    """

    format: str = 'diffusers'
    dtype: str = 'float32'
    ema: bool = True
    sampler: str = ''
    teacher: str = ''


def export(workdir: Path, out: Path, wanted: Wanted = Wanted()) -> list[Path]:
    """Writes the newest student of a run into `out`; returns what was written, model first.

    One process does it, with all of its devices.

    Raises:
      CheckpointError: there is no checkpoint, it is damaged, or it has no student.
      WeightsError: the teacher cannot be read, `out` holds something of the same name, or the
        family has no such format.
    """
    student = open_student(workdir, wanted.teacher, wanted.ema)
    family = student.export
    form = wanted.format
    write = {'diffusers': family.write_pipeline, 'safetensors': family.write_weights,
             'orbax': write_orbax}[form]
    names = {**family.names, 'orbax': ('params',)}
    if write is None or form not in names:
        raise WeightsError(f'students of {student.family} are not written as {form}; give --format='
                           f'{" or ".join(names)}')
    planned = (*names[form], *card.NAMES)
    there = [out / name for name in planned if (out / name).exists()]
    if there:  # before anything large is read
        raise WeightsError(f'{there[0]} exists already; choose another place or delete it')
    exported = Exported(student.read(), student.source, student.step, student.steps, student.time,
                        wanted.dtype, wanted.sampler or student.sampler)
    out.mkdir(parents=True, exist_ok=True)
    write(exported, out)
    card.write(student, out, form, exported)
    return [out / name for name in (*names[form], card.README) if (out / name).exists()]


__all__ = ['CheckpointError', 'DTYPES', 'FORMATS', 'Student', 'Wanted', 'export']
