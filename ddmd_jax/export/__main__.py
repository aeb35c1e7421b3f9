"""``python -m ddmd_jax.export --checkpoint=WORKDIR --out=DIR``: a student for others to load.

Writes the EMA student of a run: as a pipeline that diffusers loads, as safetensors, as an Orbax
checkpoint, or its adapters as a LoRA, with a model card. Exit code 1, and one line on stderr, if
it cannot.
"""

from absl import flags

from ddmd_jax.util import commands, places
from ddmd_jax.util.errors import UserError

FLAGS = flags.FLAGS


def define_flags() -> None:
    commands.define_place('checkpoint', None, 'Folder of the run (its --workdir).')
    flags.DEFINE_integer('step', None, 'Checkpoint to export; default: the newest.', 1)
    commands.define_place('out', None, 'Folder to write; nothing in it is overwritten.')
    flags.DEFINE_enum('format', 'diffusers', ('diffusers', 'safetensors', 'orbax', 'lora'),
                      'Format to write; all but lora merge adapters into the teacher.')
    flags.DEFINE_enum('naming', 'diffusers', ('diffusers', 'comfyui'),
                      "Whose names a LoRA's tensors have.")
    flags.DEFINE_enum('dtype', 'float32', ('float32', 'bfloat16', 'float16'),
                      'Type of the tensors written.')
    flags.DEFINE_boolean('ema', True, 'The EMA student; --noema is the raw student.')
    flags.DEFINE_enum('sampler', '', ('', 'renoise', 'deterministic'),
                      "Sampler of the pipeline's scheduler; default: the run's.")
    commands.define_place('teacher', '', 'Path of the teacher if it moved.', places.ANY)
    flags.DEFINE_string('variant', None, "Variant of the teacher's weights, as fp16; default: "
                        "the run's; '' is none.")
    flags.DEFINE_string('push', '', 'OWNER/NAME on the hub to upload the folder to.')
    flags.DEFINE_boolean('private', False, 'Make the pushed repository private.')


def main(arguments: list[str]) -> None:
    commands.only_flags(arguments)
    commands.need(checkpoint='name the --workdir of a run', out='name a folder to write')
    if FLAGS['naming'].present and FLAGS.format != 'lora':
        raise UserError('--naming is a LoRA\'s; give --format=lora with it')
    if FLAGS.push and FLAGS.push.count('/') != 1:
        raise UserError(f'--push={FLAGS.push} is not OWNER/NAME')
    from ddmd_jax.export import write  # JAX takes seconds to import: not before the flags are right

    out = commands.folder('--out', FLAGS.out, places.BUCKETS)
    wanted = write.Wanted(FLAGS.format, FLAGS.dtype, FLAGS.ema, FLAGS.sampler, FLAGS.teacher,
                          FLAGS.step, FLAGS.variant, FLAGS.naming)
    workdir = places.of(FLAGS.checkpoint)
    print('\n'.join(map(str, write.export(workdir, out, wanted))))
    if FLAGS.push:
        print(write.push(out, FLAGS.push, FLAGS.private))


if __name__ == '__main__':
    commands.run('export', main, define_flags)
