"""A student for others to load: a diffusers pipeline, safetensors, or an Orbax checkpoint."""

from __future__ import annotations

from pathlib import Path

from ddmd_jax.export import card
from ddmd_jax.export.student import Student, open_student
from ddmd_jax.families.emoji import export as emoji
from ddmd_jax.families.lumina import export as lumina
from ddmd_jax.train.durable.checkpoint import CheckpointError
from ddmd_jax.weights.flat import WeightsError

FORMATS = ('diffusers', 'safetensors', 'orbax')
DTYPES = ('float32', 'bfloat16', 'float16')
FAMILIES = {'emoji': emoji, 'lumina': lumina}


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
      WeightsError: the teacher cannot be read, or `out` holds something of the same name.
    """
    student = open_student(workdir, FAMILIES, teacher, average)
    family = FAMILIES[student.family]
    planned = (*family.NAMES[form], *card.NAMES)
    there = [out / name for name in planned if (out / name).exists()]
    if there:  # before anything large is read
        raise WeightsError(f'{there[0]} exists already; choose another place or delete it')
    params = student.read()
    out.mkdir(parents=True, exist_ok=True)
    sampler = sampler or student.sampler
    if form == 'orbax':
        student.write_orbax(params, out / family.NAMES[form][0], dtype)
    elif form == 'safetensors':
        family.write_weights(student, params, out, dtype)
    else:
        family.write_pipeline(student, params, out, dtype, sampler)
    card.write(student, out, form, dtype, sampler, family)
    named = (*family.NAMES[form], card.README)
    return [out / name for name in named if (out / name).exists()]


__all__ = ['CheckpointError', 'DTYPES', 'FORMATS', 'Student', 'export']
