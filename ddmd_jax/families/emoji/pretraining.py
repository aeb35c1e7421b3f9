"""How the embedded teacher is trained: on encoded scenes, its text encoder with it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddmd_jax.data.batch import Cond
from ddmd_jax.diffusion import sampling
from ddmd_jax.diffusion.time import Shift
from ddmd_jax.evaluation import pictures
from ddmd_jax.families.emoji import codec, scenes, teacher, words
from ddmd_jax.families.emoji.codec import Codec
from ddmd_jax.families.pretraining import Pretraining
from ddmd_jax.util.errors import UserError

SHOWN = 12  # prompts of the picture that is logged during training
STEPS, GUIDANCE = 20, 3.0


class EncodedScenes:
    """Latents and tokens of training scenes ``0 .. count - 1``, made when first asked for.

    Latents are kept as fp16: 4 KB a scene, so that an epoch of them fits the memory of a small
    machine, and later epochs cost neither composing nor encoding.
    """

    def __init__(self, world: scenes.World, codec: Codec, seed: int, count: int, length: int):
        self.world, self.codec, self.seed, self.length = world, codec, seed, length
        self.latents = np.zeros((count, *codec.latents.shape), np.float16)
        self.ids = np.zeros((count, length), np.int32)
        self.there = np.zeros(count, bool)

    def __call__(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        new = rows[~self.there[rows]]
        if len(new):
            found, images = self.world.batch(self.seed, new)
            # One compiled shape: the first epoch asks for whole batches, later ones for nothing.
            padded = np.resize(images, (len(rows), *images.shape[1:]))
            self.latents[new] = np.asarray(self.codec.encode(padded))[:len(new)]
            self.ids[new] = words.encode(list(map(self.world.caption, found)), self.length)[0]
            self.there[new] = True
        ids = self.ids[rows]
        return {'image': self.latents[rows], 'ids': ids, 'mask': ids != 0}


def pretraining(config: Any) -> Pretraining:
    """By a config of the task `pretrain`; raises `DataFileError`, `WeightsError`, `UserError`."""
    model, world, space = config.teacher.model.to_dict(), scenes.load(), codec.load()
    try:
        teacher.check_fits(model)
    except ValueError as e:
        raise UserError(f'teacher.model: {e}') from e
    predict, encode = teacher.make_denoiser(model), teacher.make_text_encoder(model)
    length, count = model['text']['max_length'], config.data.scenes

    def condition(params: Any, batch: dict[str, Any], drop: Any) -> Cond:
        # The null prompt is [BOS] alone, and every caption starts with [BOS]: mask the rest.
        kept = batch['mask'] & (~drop | (jnp.arange(length) == 0))
        return encode(params['text'], batch['ids'], kept)

    return Pretraining(
        identity=f'emoji scenes {world.identity}, codec {space.identity}',
        rows=np.arange(count), lookup=EncodedScenes(world, space, config.seed, count, length),
        init=functools.partial(teacher.init_params, model), rules=teacher.RULES,
        condition=condition,
        predict_clean=lambda params, *inputs: predict(params['denoiser'], *inputs),
        show=_shower(config, world, space),
        save=lambda path, params, steps: teacher.save(path, model, params, steps),
        read=lambda path: teacher.read(path)[1])


def _shower(config: Any, world: scenes.World, space: Codec) -> Any:
    """``params -> grid``: real images, and guided samples of the same prompts."""
    model = config.teacher.model.to_dict()
    model['denoiser']['unroll'] = False  # a program that runs seldom had better compile fast
    predict, encode = teacher.make_denoiser(model), teacher.make_text_encoder(model)
    found, images = world.batch(config.seed, np.arange(SHOWN))
    length = model['text']['max_length']
    ids, mask = words.encode([world.caption(scene) for scene in found], length)
    null_ids, null_mask = words.encode([''] * SHOWN, length)

    @jax.jit
    def draw(params: Any) -> jax.Array:
        cond = encode(params['text'], ids, mask)
        null = encode(params['text'], null_ids, null_mask)
        noise = jax.random.normal(
            jax.random.key(config.seed), (SHOWN, *space.latents.shape), jnp.float32)
        return sampling.sample_teacher(
            functools.partial(predict, params['denoiser']), cond, noise,
            Shift(teacher.SHIFT).grid(STEPS), sampling.Guidance(GUIDANCE, null))

    real, decode = images.astype(np.float32) / 127.5 - 1, space.latents.decode
    assert decode
    return lambda params: pictures.rows_of_images([real, np.asarray(decode(draw(params)))])
