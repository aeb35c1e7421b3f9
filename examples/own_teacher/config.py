"""Coloured rectangles: 50 guided steps of the VP teacher into 2 unguided ones. See `__init__`."""

from ddmd_jax.config import defaults


def get_config():
    return defaults('distill', {
        'teacher.name': 'own_teacher', 'data.name': 'shapes',
        'student.steps': 2, 'data.global_batch': 32, 'train.steps': 100, 'student.ema': 0.98,
        'method.alpha': 1.3, 'optim.student.lr': 1e-4, 'optim.critic.lr': 5e-4,
        'critic.updates': 2, 'log.every': 20, 'log.probe': 16,
        'eval.prompts': 32, 'eval.held_out': 1, 'eval.guidance': 2.0})
