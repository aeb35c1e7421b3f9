"""A teacher family of one's own, and of another process: coloured squares by a VP teacher.

    export PYTHONPATH=examples
    python -m own_teacher.train teacher.safetensors
    python -m ddmd_jax.main --config=examples/own_teacher/config.py --workdir=RUN \\
        --config.teacher.path=teacher.safetensors
    python -m ddmd_jax.sample --checkpoint=RUN --prompt='red left' --out=red_left.png
    python -m ddmd_jax.export --checkpoint=RUN --format=safetensors --out=STUDENT

The teacher predicts epsilon at the 100 discrete steps of a variance-preserving table, as SDXL
does at its 1000. `process` maps the table onto the package's one flow; nothing else knows of it.
`shapes` has the examples, `teacher` the network and its text side, `train` trains both. The
package finds `FAMILY` by the name that the config gives: ``own_teacher``.
"""

from ddmd_jax.families import DataSet, Family
from own_teacher import shapes, teacher

FAMILY = Family(
    __name__, load=teacher.load, one_size=(shapes.SIZE, shapes.SIZE), guidance=2.0,
    data_sets={'shapes': DataSet(shapes.load)}, suite=shapes.SUITE)
