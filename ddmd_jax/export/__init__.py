"""A student for others to load: a diffusers pipeline, safetensors, or an Orbax checkpoint."""

from __future__ import annotations

from pathlib import Path

from ddmd_jax.export import card
from ddmd_jax.export.student import Student, open_student, write_orbax
from ddmd_jax.families.family import Exported
from ddmd_jax.train.durable.checkpoint import CheckpointError
from ddmd_jax.weights.flat import WeightsError

FORMATS = ('diffusers', 'safetensors', 'orbax')
DTYPES = ('float32', 'bfloat16', 'float16')


def export(workdir: Path, out: Path, dtype: str, teacher: str = '', form: str = 'diffusers',
           average: bool = True, sampler: str = '') -> list[Path]:
    """Writes the newest student of a run into `out`; returns what was written, model first.

    One process does it, with all of its devices.

    Args:
      dtype: of the tensors, one of DTYPES.
      teacher: where the teacher lies, if no longer where it was.
      form: one of FORMATS.
      average: the averaged student, or the live one.
      sampler: what the pipeline's scheduler does, of `sampling.STUDENT_MODES`; '' is the run's.

    Raises:
      CheckpointError: there is no checkpoint, it is damaged, or its student has no published
        format.
      WeightsError: the teacher cannot be read, `out` holds something of the same name, or the
        family has no such format.
    """
    student = open_student(workdir, teacher, average)
    family = student.export
    if form not in family.names:
        raise WeightsError(f'students of {student.family} are not written as {form}; give --format='
                           f'{" or ".join(name for name in FORMATS if name in family.names)}')
    planned = (*family.names[form], *card.NAMES)
    there = [out / name for name in planned if (out / name).exists()]
    if there:  # before anything large is read
        raise WeightsError(f'{there[0]} exists already; choose another place or delete it')
    sampler = sampler or student.sampler
    exported = Exported(student.read(), student.source, student.step, student.steps, student.time,
                        dtype, sampler)
    out.mkdir(parents=True, exist_ok=True)
    if form == 'orbax':
        write_orbax(exported, out / family.names[form][0])
    elif form == 'safetensors':
        family.write_weights(exported, out)
    else:
        family.write_pipeline(exported, out)
    card.write(student, out, form, exported)
    named = (*family.names[form], card.README)
    return [out / name for name in named if (out / name).exists()]


__all__ = ['CheckpointError', 'DTYPES', 'FORMATS', 'Student', 'export']
