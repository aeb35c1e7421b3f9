"""All three on the teacher of `examples/own_teacher`, a few updates. See `__init__`."""

from ddmd_jax.config import defaults


def get_config():
    return defaults('distill', {
        'teacher.name': 'own_teacher', 'data.name': 'shapes',
        'method.schedule': 'extensions.schedule.WINDOW',
        'method.regularisers': ('extensions.drift',), 'method.drift.weight': 0.1,
        'eval.suite': 'extensions.suite.SUITE',
        'student.steps': 2, 'data.global_batch': 16, 'train.steps': 6, 'student.ema': 0.9,
        'method.alpha': 1.3, 'optim.student.lr': 1e-4, 'optim.critic.lr': 5e-4,
        'critic.updates': 1, 'checkpoint.every': 3, 'log.every': 2, 'log.probe': 8,
        'eval.prompts': 16, 'eval.batch': 16, 'eval.teacher_steps': 5})
