"""How the embedded teacher was trained: composed emoji, token ids, both networks at once."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddmd_jax.data.batch import Cond
from ddmd_jax.diffusion import sampling
from ddmd_jax.diffusion.time import Shift
from ddmd_jax.evaluation import pictures
from ddmd_jax.families.emoji import data, teacher, tokenizer
from ddmd_jax.families.pretraining import Pretraining

SHOWN = 8  # prompts of the picture that is logged during training
STEPS, GUIDANCE = 20, 3.0


def pretraining(config: Any) -> Pretraining:
    """By a config of the task `pretrain`; raises `DataFileError` if the glyphs cannot be read."""
    model, pairs = config.teacher.model.to_dict(), data.load_pairs()
    predict, encode = teacher.make_denoiser(model), teacher.make_text_encoder(model)
    captions = [pairs.caption(i) for i in range(len(pairs.glyph))]
    ids, mask = tokenizer.encode(captions, model['text']['max_length'])
    images = pairs.images(np.arange(len(captions)))

    def condition(params: Any, batch: dict[str, Any], drop: Any) -> Cond:
        # The null prompt is [BOS] alone, and every caption starts with [BOS]: mask the rest.
        kept = batch['mask'] & (~drop | (jnp.arange(batch['mask'].shape[1]) == 0))
        return encode(params['text'], batch['ids'], kept)

    return Pretraining(
        rows=data.training_mixture(pairs, config.data.white_repeat),
        lookup=lambda rows: {'image': images[rows], 'ids': ids[rows], 'mask': mask[rows]},
        init=functools.partial(teacher.init_params, model), rules=teacher.RULES,
        condition=condition,
        predict_clean=lambda params, *inputs: predict(params['denoiser'], *inputs),
        show=_shower(config, pairs, ids, mask),
        save=lambda path, params, steps: teacher.save(path, model, params, steps),
        read=lambda path: teacher.read(path)[1])


def _shower(config: Any, pairs: data.Pairs, ids: np.ndarray, mask: np.ndarray) -> Any:
    """``params -> grid``: real images, and guided samples of the same prompts."""
    model = config.teacher.model.to_dict()
    model['denoiser']['unroll'] = False  # a program that runs seldom had better compile fast
    predict, encode = teacher.make_denoiser(model), teacher.make_text_encoder(model)
    rows = np.random.default_rng(config.seed).choice(len(ids), SHOWN, replace=False)
    null_ids, null_mask = tokenizer.encode([''] * SHOWN, ids.shape[1])

    @jax.jit
    def draw(params: Any) -> jax.Array:
        cond = encode(params['text'], ids[rows], mask[rows])
        null = encode(params['text'], null_ids, null_mask)
        noise = jax.random.normal(jax.random.key(config.seed), (SHOWN, *teacher.SHAPE))
        return sampling.sample_teacher(
            functools.partial(predict, params['denoiser']), cond, noise,
            Shift(teacher.SHIFT).grid(STEPS), sampling.Guidance(GUIDANCE, null))

    return lambda params: pictures.rows_of_images([pairs.images(rows), np.asarray(draw(params))])
