"""Export of a family that brings none of its own: the network by the names it has here."""

from pathlib import Path

import jax

from ddmd_jax.families import Family, LoadOptions
from ddmd_jax.families.family import Export, Exported, Source
from ddmd_jax.weights import flat

FILE = 'student.safetensors'
ALONE = f"""from ddmd_jax.weights import flat

params, about = flat.load('{{folder}}/{FILE}', 'export it again')
"""


def export_of(family: Family) -> Export:
    """The family's own export, or else one that writes safetensors and Orbax checkpoints."""
    def open_source(path: str) -> Source:
        teacher = family.load_teacher(LoadOptions(path))
        shapes = jax.eval_shape(lambda: teacher.params)
        return Source(teacher.identity, shapes, teacher.rules, teacher.time)

    def write_weights(student: Exported, out: Path) -> None:
        flat.save(out / FILE, student.params, {'family': family.name, 'step': str(student.step)},
                  dtype=student.dtype)

    return family.export or Export(
        open_source, write_weights, {'safetensors': (FILE,)}, ALONE)
