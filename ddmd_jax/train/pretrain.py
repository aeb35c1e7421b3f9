"""Task `pretrain`: trains the embedded teacher and its text encoder by flow matching."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.scipy.stats import norm
from jax.sharding import Mesh

from ddmd_jax.data import loader
from ddmd_jax.data.order import Order
from ddmd_jax.diffusion import process, sampling
from ddmd_jax.diffusion.time import Shift
from ddmd_jax.evaluation import pictures
from ddmd_jax.families.emoji import data as emoji, teacher, tokenizer
from ddmd_jax.parallel import sharding
from ddmd_jax.train import loop, optim, state as st
from ddmd_jax.train.loop import Task
from ddmd_jax.train.watch.profiling import NOTHING, Beside

Array = jax.Array

GRID = 8  # prompts in the picture logged during training
PICTURE_STEPS, PICTURE_GUIDANCE = 20, 3.0


def draw_times(key: Array, batch: int, mean: float, std: float) -> Array:
    """Stratified logit-normal times ``[batch]``: one from each of `batch` equal slices."""
    u = (jnp.arange(batch) + jax.random.uniform(key, (batch,))) / batch
    u = jnp.clip(u, 1e-4, 1 - 1e-4)
    return jax.nn.sigmoid(mean + std * norm.ppf(u)).astype(jnp.float32)


def flow_matching_loss(predict_clean: Callable, encode: Callable, params: Any, batch: Any,
                       key: Array, cfg: Any) -> Array:
    """Mean squared velocity error; captions give way to the null prompt at `cfg.dropout`."""
    k_time, k_noise, k_drop = jax.random.split(key, 3)
    x = batch['image']
    t = draw_times(k_time, x.shape[0], cfg.time_mean, cfg.time_std)
    noise = jax.random.normal(k_noise, x.shape)
    drop = jax.random.uniform(k_drop, (x.shape[0], 1)) < cfg.dropout
    # The null prompt is [BOS] alone, and every caption starts with [BOS]: mask the rest.
    mask = batch['mask'] & (~drop | (jnp.arange(batch['mask'].shape[1]) == 0))
    cond = encode(params['text'], batch['ids'], mask)
    x_t = process.renoise(x, t, noise)
    x_hat = predict_clean(params['denoiser'], x_t, t, cond)
    error = process.to_velocity(x_t, x_hat, t) - process.velocity(x, noise)
    return jnp.mean(jnp.square(error))


def make_step(config: Any, tx: optax.GradientTransformation) -> Callable:
    """``(state, batch) -> (state, metrics)``, jitted, state donated."""
    model = config.teacher.model.to_dict()
    predict_clean, encode = teacher.make_denoiser(model), teacher.make_text_encoder(model)
    root = jax.random.key(config.seed)

    def step(state: st.TrainState, batch: Any) -> tuple[st.TrainState, dict[str, Array]]:
        key = jax.random.fold_in(root, state.step)
        loss_fn = lambda p: flow_matching_loss(
            predict_clean, encode, p, batch, key, config.method)
        loss, grads = jax.value_and_grad(loss_fn)(state.student)
        grad_norm = optax.global_norm(grads)
        updates, opt = tx.update(grads, state.student_opt, state.student)
        student = optax.apply_updates(state.student, updates)
        decay = st.ema_decay(state.step, config.student.ema, config.student.ema_ramp)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        new = st.TrainState(state.step + 1, state.critic_step, student, None,
                            st.update_ema(state.ema, student, decay), opt, None)
        metrics = {'loss': loss, 'grad_norm': grad_norm, 'finite': finite}
        return st.keep_if(finite, new, state), metrics

    return jax.jit(step, donate_argnums=0)


def make_pictures(config: Any, pairs: emoji.Pairs, ids: np.ndarray, mask: np.ndarray) -> Callable:
    """Real images and the averaged model's guided samples of a few prompts, for TensorBoard."""
    model = config.teacher.model.to_dict()
    model['denoiser']['unroll'] = False
    predict, encode = teacher.make_denoiser(model), teacher.make_text_encoder(model)
    rows = np.random.default_rng(config.seed).choice(len(ids), GRID, replace=False)
    null_ids, null_mask = tokenizer.encode([''] * GRID, ids.shape[1])

    @jax.jit
    def draw(params: Any, noise: Array):
        cond = encode(params['text'], ids[rows], mask[rows])
        null = encode(params['text'], null_ids, null_mask)
        return sampling.sample_teacher(
            functools.partial(predict, params['denoiser']), cond, noise,
            Shift(teacher.SHIFT).grid(PICTURE_STEPS), sampling.Guidance(PICTURE_GUIDANCE, null))

    def show(state: st.TrainState, step: int, log: Any) -> None:
        noise = jax.random.normal(jax.random.key(config.seed), (GRID, *teacher.SHAPE))
        grid = pictures.rows_of_images([pairs.images(rows), np.asarray(draw(state.ema, noise))])
        log.image(step, 'samples/real_teacher', grid)

    return show


def make_task(config: Any, mesh: Mesh) -> Task:
    """Batches of composed emoji with token ids; the student trees hold denoiser and text."""
    pairs = emoji.load_pairs()
    length = config.teacher.model.text.max_length
    captions = [pairs.caption(i) for i in range(len(pairs.glyph))]
    ids, mask = tokenizer.encode(captions, length)
    images = pairs.images(np.arange(len(captions)))
    lookup = lambda rows, length: {'image': images[rows], 'ids': ids[rows], 'mask': mask[rows]}
    order = Order(emoji.training_mixture(pairs, config.data.white_repeat),
                  config.data.global_batch, config.seed)
    tx = optim.make_optimizer(config.optim.student, config.train.steps)
    step = make_step(config, tx)
    key = jax.random.key(config.seed)
    make = lambda: st.fresh(teacher.init_params(config.teacher.model.to_dict(), key), tx)
    return Task(
        name='pretrain', make_state=make, source=(), rules=teacher.RULES,
        data=loader.batches(order, lookup, config.data.global_batch), order=order,
        place=lambda batch: sharding.put_batch(batch.rows, mesh),
        advance=lambda state, next_batch, first: step(state, next_batch()),
        words=lambda m: f'loss {m["loss"]:.4f} grad {m["grad_norm"]:.2f}',
        probe=lambda state: {}, annotate=lambda history, step, m: m,
        pictures=make_pictures(config, pairs, ids, mask))


def run(config: Any, workdir: Path, mesh: Mesh, beside: Beside = NOTHING) -> None:
    """Trains to the end and writes the averaged weights as ``workdir/teacher.safetensors``."""
    state, seconds = loop.run(make_task(config, mesh), config, workdir, mesh, 'none', beside)
    out = workdir / 'teacher.safetensors'
    whole = jax.jit(lambda tree: tree, out_shardings=sharding.replicated(mesh))(state.ema)
    if jax.process_index() == 0:
        teacher.save(out, config.teacher.model.to_dict(), jax.device_get(whole), int(state.step))
        print(f'{out} written after {seconds.train:.0f} s of training in this run')
