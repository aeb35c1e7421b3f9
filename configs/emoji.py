"""Decoupled DMD on the embedded teacher: scenes of emoji, 50 guided steps into 4 unguided ones.

    python -m ddmd_jax.main --config=emoji --workdir=DIR
    python -m ddmd_jax.main --config=emoji:coupled_shared --workdir=DIR

The argument after the colon is one of the paper's four schedules (its Table 1), which is the
paper's as are Algorithm 1 and, by its authors' answers, per-term normalisation. Fields that
differ from the defaults (docs/config.md) were chosen at this size, with the reasons beside.
"""

from ddmd_jax.config import defaults


def get_config(schedule: str = 'decoupled_hybrid', data: str = 'emoji'):
    return defaults('distill', {
        'teacher.name': 'emoji',
        'teacher.attention': 'xla',  # few tokens need no kernel
        'data.name': data, 'data.global_batch': 32,
        'method.schedule': schedule,
        # At 2 the teacher is nearest to real images; at 3 about as many captions come right, and
        # colours are half as far off again (docs/teachers.md).
        'method.alpha': 2.0, 'eval.guidance': 2.0,
        # Few updates, hence large ones; the critic is the faster of the two, as is common practice.
        'optim.student.lr': 3e-5, 'optim.critic.lr': 1e-4,
        'optim.student.b2': 0.99, 'optim.critic.b2': 0.99,
        'optim.student.decay': 0.5, 'optim.critic.decay': 0.5,
        'critic.updates': 2,
        # Minutes on two cores: a short run, a short memory, figures often.
        'train.steps': 160, 'student.ema': 0.98,
        'checkpoint.every': 20, 'log.every': 5, 'log.images_every': 20, 'log.probe': 32,
        # No image depends on the batch; small ones let the progress bar move.
        'eval.prompts': 256, 'eval.held_out': 128, 'eval.batch': 32,
    })
