"""``python -m ddmd_jax.export --checkpoint=WORKDIR --out=DIR``: a student for others to load.

Writes the averaged student of a run as ``DIR/transformer/``, which diffusers loads. Exit code 1,
and one line on stderr, if it cannot.
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import app, flags, logging

FLAGS = flags.FLAGS
FORMATS = ('diffusers',)
DTYPES = ('float32', 'bfloat16', 'float16')


def define_flags() -> None:
    flags.DEFINE_string('checkpoint', None, 'Folder of the run (its --workdir).')
    flags.DEFINE_string('out', None, 'Folder to write; its transformer/ must not exist yet.')
    flags.DEFINE_enum('format', 'diffusers', FORMATS, 'What reads the result.')
    flags.DEFINE_enum('dtype', 'float32', DTYPES, 'Type of the tensors written.')
    flags.DEFINE_string('teacher', '', 'The teacher\'s folder, if it is no longer where it was.')


def export(workdir: Path, out: Path, dtype: str, teacher: str = '') -> Path:
    """Writes ``out/transformer``; returns it.

    Raises:
      CheckpointError: there is no checkpoint, it is damaged, or its student has no published
        format.
      WeightsError: the teacher's config cannot be read, or `out` holds a transformer already.
    """
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from ddmd_jax import sharding
    from ddmd_jax.models.layers import abstract_params
    from ddmd_jax.models.nextdit import NextDiT
    from ddmd_jax.teachers import lumina
    from ddmd_jax.train import checkpoint as ckpt
    from ddmd_jax.weights import diffusers, fetch
    from ddmd_jax.weights.flat import WeightsError

    step, manifest = ckpt.read_manifest(workdir)
    if manifest.get('teacher.name') != 'lumina':
        raise ckpt.CheckpointError(
            f'{workdir} distils the teacher {manifest.get("teacher.name")!r}, which no diffusers '
            'pipeline knows; only students of lumina can be exported')
    if (out / 'transformer').exists():  # before anything large is read
        raise WeightsError(f'{out / "transformer"} exists already; choose another place or '
                           'delete it')
    folder = fetch.local_folder(teacher or manifest['teacher.path'], lumina.FILES)
    source = lumina.transformer_folder(folder)
    published = diffusers.read_json(source / 'config.json')
    cfg = lumina.model_config(published)
    abstract = abstract_params(lambda: NextDiT(cfg, nnx.Rngs(0)))
    mesh = sharding.make_mesh({'fsdp': -1})
    saved = workdir / 'checkpoints' / str(step)
    fault = ckpt.damage(saved)
    if fault:
        raise ckpt.CheckpointError(
            f'checkpoint {saved} is damaged ({fault}); start the run again, which goes back to the '
            'newest good one, or move that folder away')
    params = ckpt.restore_ema(workdir, step, abstract,
                              sharding.shard_tree(abstract, lumina.RULES, mesh))
    if jax.process_index() == 0:
        lumina.export(params, published, out / 'transformer', jnp.dtype(dtype))
    return out / 'transformer'


def main(argv: list[str]) -> None:
    if not FLAGS['verbosity'].present:
        logging.set_verbosity(logging.WARNING)  # of libraries' chatter; as in `main`
    if len(argv) > 1:
        sys.exit(f'export: unexpected argument {argv[1]!r}; flags look like --out=DIR')
    for name in ('checkpoint', 'out'):
        if not FLAGS[name].value:
            sys.exit(f'export: no --{name} given')
    from ddmd_jax.sharding import ShardingError
    from ddmd_jax.train.checkpoint import CheckpointError
    from ddmd_jax.weights.flat import WeightsError

    path = lambda name: Path(FLAGS[name].value).expanduser().absolute()
    out = path('out')
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        sys.exit(f'export: --out {out} cannot be made ({e.strerror}); choose another')
    try:
        print(export(path('checkpoint'), out, FLAGS.dtype, FLAGS.teacher))
    except (CheckpointError, ShardingError, WeightsError) as e:
        sys.exit(f'export: {e}')
    except OSError as e:
        sys.exit(f'export: {out} cannot be written ({e}); choose another place')


if __name__ == '__main__':
    define_flags()
    app.run(main)
