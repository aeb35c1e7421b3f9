"""A distillation of a network of one matrix: a task of `fit` that is ready in a second."""

import jax
import numpy as np
import tiny

from ddmd_jax.data.batch import CondSpec
from ddmd_jax.data.conditioning import Prompts
from ddmd_jax.data.order import Order
from ddmd_jax.diffusion.time import Shift
from ddmd_jax.families.base import Latents, Teacher
from ddmd_jax.families.emoji import teacher as emoji
from ddmd_jax.parallel import sharding
from ddmd_jax.train.distillation import Distillation, plan
from ddmd_jax.train.startup import Startup

LENGTHS = np.asarray([2, 3, 4, 4, 2, 3, 4, 2, 2])  # tokens of nine prompts
SHAPES = ((4, 4, 3), (2, 8, 3))


def config_of(**fields):
    """Of a run of two steps, each of one critic update and one of a student of one step."""
    config = tiny.load_config('emoji')
    config.update_from_flattened_dict({
        'student.steps': 1, 'critic.updates': 1, 'data.global_batch': 2, 'train.steps': 2,
        'log.probe': 0, 'log.every': 1, 'log.images_every': 100, 'checkpoint.every': 2,
        # A schedule that decays depends on how long the run is, and these are cut short.
        'optim.student.decay': 0.0, 'optim.critic.decay': 0.0} | fields)
    return config


def lookup(rows, length=None):
    rng = np.random.default_rng(0)
    embeds = rng.normal(size=(len(LENGTHS), 4, 16)).astype(np.float32)[rows]
    mask = np.arange(4)[None] < LENGTHS[rows][:, None]
    return {'embeds': embeds[:, :length], 'mask': mask[:, :length]}


def task_of(config, predict=tiny.small_network, buckets=(), shapes=SHAPES[:1]):
    """The task that `config` makes of nine prompts and a teacher of `tiny.small_params`."""
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    teacher = Teacher('small', tiny.small_params()[0], predict, Latents(shapes[0]),
                      CondSpec.text(16), Shift(), 'small', emoji.RULES)
    null = {'embeds': np.zeros((1, 4, 16), np.float32), 'mask': np.ones((1, 4), bool)}
    prompts = Prompts(np.arange(9), lookup, lambda rows: lookup(rows, None), null, str, 'small',
                      LENGTHS)
    order = Order(prompts.rows, config.data.global_batch, config.seed, LENGTHS, buckets, shapes)
    return Distillation(config, teacher, prompts, order, plan(config, teacher, null, mesh),
                        Startup())
