"""Algorithm 1 of the paper: the generator's update and the critic's, as two jitted programs.

Read `generator_loss` and `critic_update` next to the paper. Both take the frozen teacher as an
argument, donate the state, and draw their randomness from `fold_in(root, counter)`, so that a
resumed run draws what the uninterrupted one would have drawn.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from ddmd_jax.data.batch import null_like
from ddmd_jax.data.conditioning import REAL
from ddmd_jax.diffusion import process, sampling
from ddmd_jax.diffusion.sampling import Predict, deinterleave, interleave
from ddmd_jax.diffusion.time import FewSteps, Shift
from ddmd_jax.losses.critic import critic_loss
from ddmd_jax.losses.decoupled import Predictions, decoupled_loss, decoupled_update
from ddmd_jax.losses.gan import critic_gan_loss, r1_penalty, student_gan_loss
from ddmd_jax.losses.mean_variance import mean_variance_kl
from ddmd_jax.method import health as diagnostics, schedules
from ddmd_jax.method.recipe import Method
from ddmd_jax.parallel import sharding
from ddmd_jax.train import state as st

Array = jax.Array
Metrics = dict[str, Array]


def _student_samples(predict: Predict, student: Any, cond: Any, m: Method, key: Array,
                     shape: tuple[int, ...]) -> tuple[Array, Array]:
    """``(x_hat [B, ...], pre-shift t [B])``: backward simulation, then the student's step."""
    few = FewSteps(Shift(m.shift), m.num_steps)
    z, k = sampling.student_inputs(
        functools.partial(predict, jax.lax.stop_gradient(student)), cond, few, key, shape)
    return predict(student, z, few.times[k], cond), few.uniform[k]


def _several(predict: Predict, params: Any, inputs: Sequence[tuple[Array, Array, Any]],
             passes: str) -> list[Array]:
    """Predictions of several ``(x_t [B, ...], t [B], cond)`` by one network."""
    if passes == 'apart':
        stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *inputs)
        return list(jax.lax.map(lambda one: predict(params, *one), stacked))
    return deinterleave(predict(params, *interleave(*inputs)), len(inputs))


def _predictions(predict: Predict, frozen: Any, critic: Any, x: Array, cond: Any, levels: Any,
                 noises: Any, m: Method) -> Predictions:
    """Teacher's and critic's clean predictions of `x` re-noised to (tau_CA, tau_DM).

    With a shared level the teacher's conditional prediction serves both terms.
    """
    (tau_ca, tau_dm), (noise_ca, noise_dm) = levels, noises
    null = null_like(frozen['null'], cond)
    x_ca, x_dm = process.renoise(x, tau_ca, noise_ca), process.renoise(x, tau_dm, noise_dm)
    inputs = [(x_ca, tau_ca, cond), (x_ca, tau_ca, null)]
    if not schedules.SCHEDULES[m.schedule].shared:
        inputs.append((x_dm, tau_dm, cond))
    ca_cond, ca_uncond, *dm = _several(predict, frozen['teacher'], inputs, m.teacher_passes)
    dm_fake = predict(critic, x_dm, tau_dm, cond)
    return Predictions(ca_cond, ca_uncond, dm[0] if dm else ca_cond, dm_fake)


# Keys of what only some recipes draw are folded in under these numbers: the default's draws are
# then those it has always had.
DRAW_ALPHA, DRAW_GAN = 1, 2


def generator_keys(root: Array, step: Array, parts: int) -> Array:
    """Keys ``[parts]`` of the micro-batches of the generator's update number `step`, from 0."""
    return micro_keys(jax.random.fold_in(jax.random.fold_in(root, 0), step), parts)


def micro_keys(key: Array, parts: int) -> Array:
    """An update's key for each of its micro-batches ``[parts]``: a single one has it as it is."""
    return key[None] if parts == 1 else jax.random.split(key, parts)


def draw_levels(key: Array, m: Method, t: Array,
                like: Array) -> tuple[tuple[Array, Array], Array | float]:
    """``(tau_CA [B], tau_DM [B])`` and alpha of a micro-batch with this key.

    `t` ``[B]`` are the pre-shift times of the generator's steps, `like` ``[B, ...]`` the samples.
    """
    schedule = schedules.SCHEDULES[m.schedule]
    levels = schedules.draw_levels(jax.random.split(key, 4)[1], schedule, t, m.tau_ca, m.tau_dm,
                                   m.shift)
    return levels, m.draw_alpha(jax.random.fold_in(key, DRAW_ALPHA), like)


def split_real(batch: Any) -> tuple[Any, Array | None]:
    """(conditioning, real latents ``[B, H, W, C]`` of the same prompts or None) of a batch."""
    return {name: x for name, x in batch.items() if name != REAL}, batch.get(REAL)


def _gan_inputs(x: Array, key: Array, m: Method) -> tuple[Array, Array]:
    """`x` re-noised for the GAN's head, and the level ``[B]`` of each sample."""
    k_tau, k_noise = jax.random.split(key)
    tau = schedules.draw_tau(k_tau, jnp.zeros(x.shape[:1]), False, m.gan.tau, m.shift)
    return process.renoise(x, tau, jax.random.normal(k_noise, x.shape)), tau


def _regularisers(x_hat: Array, critic: Any, head: Any, cond: Any, m: Method,
                  key: Array) -> tuple[Array, Metrics]:
    """What is asked of the samples `x_hat` beside CA and DM, weighted; gradient reaches them."""
    total, metrics = jnp.zeros(()), {}
    if m.mean_variance:
        mv = m.mean_variance
        metrics['mv_kl'] = mean_variance_kl(x_hat, mv.mean, mv.variance)
        total += mv.weight * metrics['mv_kl']
    if m.gan:
        x_tau, tau = _gan_inputs(x_hat, jax.random.fold_in(key, DRAW_GAN), m)
        metrics['gan_loss'] = student_gan_loss(m.gan.classify(critic, head, x_tau, tau, cond))
        total += m.gan.weight * metrics['gan_loss']
    return total, metrics


def generator_loss(predict: Predict, student: Any, critic: Any, frozen: Any, cond: Any,
                   m: Method, key: Array, shape: tuple[int, ...],
                   head: Any = None) -> tuple[Array, Metrics]:
    """Loss of one micro-batch and its health; differentiate in `student` only.

    Args:
      predict: ``(params, x_t, t, cond) -> x_hat``, shared by student, critic and teacher.
      student, critic: parameters.
      frozen: ``{'teacher': params, 'null': Cond of one row}``.
      cond: conditioning ``[B, ...]``; real latents that come with it are not looked at.
      m: the recipe, of this update where it changes (`Method.at`).
      key: PRNG key of everything drawn here.
      shape: ``[B, H, W, C]`` of the latents.
      head: parameters of the GAN's head, if there is one.
    """
    cond, _ = split_real(cond)
    k_sim, _, k_ca, k_dm = jax.random.split(key, 4)
    schedule = schedules.SCHEDULES[m.schedule]
    x_hat, t = _student_samples(predict, student, cond, m, k_sim, shape)
    x = jax.lax.stop_gradient(x_hat)
    levels, alpha = draw_levels(key, m, t, x)
    noise_ca = jax.random.normal(k_ca, shape)
    noise_dm = noise_ca if schedule.shared else jax.random.normal(k_dm, shape)
    p = _predictions(predict, frozen, critic, x, cond, levels, (noise_ca, noise_dm), m)
    update = decoupled_update(x, p, alpha=alpha, normaliser=m.normaliser, floor=m.floor)
    further, metrics = _regularisers(x_hat, critic, head, cond, m, key)
    loss = decoupled_loss(x_hat, update, m.weight_ca, m.weight_dm) + further
    return loss, {'loss': loss, **metrics, **diagnostics.health(x, p, update, m.limit)}


def critic_objective(predict: Predict, student: Any, critic: Any, cond: Any, m: Method,
                     key: Array, shape: tuple[int, ...],
                     head: Any = None) -> tuple[Array, Metrics]:
    """Denoising loss on fresh student samples at ``tau' ~ U``, and the GAN's if there is one.

    Differentiate in `critic` and `head` only. With a GAN `cond` comes with real latents.
    """
    cond, real = split_real(cond)
    k_sim, k_tau, k_noise = jax.random.split(key, 3)
    x, t = _student_samples(predict, student, cond, m, k_sim, shape)
    x = jax.lax.stop_gradient(x)
    tau = schedules.draw_tau(k_tau, t, False, m.tau_critic, m.shift)
    x_tau = process.renoise(x, tau, jax.random.normal(k_noise, shape))
    loss = critic_loss(predict(critic, x_tau, tau, cond), x, tau, m.critic_weighting)
    if not m.gan:
        return loss, {'fake_loss': loss}
    further, metrics = _judged(critic, head, real, x, cond, m, jax.random.fold_in(key, DRAW_GAN))
    return loss + further, {'fake_loss': loss, **metrics}


def _judged(critic: Any, head: Any, real: Array, fake: Array, cond: Any, m: Method,
            key: Array) -> tuple[Array, Metrics]:
    """The GAN's loss of critic and head, weighted, on real and fake latents ``[B, ...]``."""
    k_real, k_fake = jax.random.split(key)
    (x_real, t_real), (x_fake, t_fake) = _gan_inputs(real, k_real, m), _gan_inputs(fake, k_fake, m)
    both, levels, conds = interleave((x_real, t_real, cond), (x_fake, t_fake, cond))
    logits = deinterleave(m.gan.classify(critic, head, both, levels, conds), 2)
    loss = critic_gan_loss(*logits)
    total = m.gan.critic_weight * loss
    metrics = {'gan_critic_loss': loss, 'gan_real': jnp.mean(logits[0]),
               'gan_fake': jnp.mean(logits[1])}
    if m.gan.r1:
        logit_sum = lambda x: jnp.sum(m.gan.classify(critic, head, x, t_real, cond))
        metrics['gan_r1'] = r1_penalty(jax.grad(logit_sum)(x_real))
        total += m.gan.r1 * metrics['gan_r1']
    return total, metrics


def accumulated_grads(loss_fn: Callable, params: Any, cond: Any, key: Array, parts: int,
                      sample_shape: tuple[int, ...]) -> tuple[Any, Metrics]:
    """Mean gradient and metrics over `parts` micro-batches of ``cond [B, ...]``.

    `loss_fn(params, cond, key, shape) -> (loss, metrics)`. Micro-batches take every
    `parts`-th row, so that each holds rows of every device.
    """
    batch = jax.tree.leaves(cond)[0].shape[0]
    shape = (batch // parts, *sample_shape)
    value_and_grad = jax.value_and_grad(lambda p, c, k: loss_fn(p, c, k, shape), has_aux=True)
    if parts == 1:
        (_, metrics), grads = value_and_grad(params, cond, key)
        return grads, metrics
    split = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), cond)

    def body(total, inputs):
        (_, metrics), grads = value_and_grad(params, *inputs)
        return jax.tree.map(lambda a, b: a + b / parts, total, (grads, metrics)), None

    inputs = (split, micro_keys(key, parts))
    first = jax.tree.map(lambda x: x[0], inputs)
    (_, metrics), grads = jax.eval_shape(value_and_grad, params, *first)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (grads, metrics))
    return jax.lax.scan(body, zeros, inputs)[0]


def _finite(loss: Array, grad_norm: Array) -> Array:
    return jnp.isfinite(loss) & jnp.isfinite(grad_norm)


def generator_update(predict: Predict, tx: optax.GradientTransformation, m: Method,
                     sample_shape: tuple[int, ...], state: st.TrainState, frozen: Any,
                     cond: Any, root: Array) -> tuple[st.TrainState, Metrics]:
    """One student update and its EMA; a step that is not finite leaves the state as it was."""
    state = dataclasses.replace(state, ema=sharding.on_device(state.ema))
    frozen = sharding.on_device(frozen)
    key = jax.random.fold_in(jax.random.fold_in(root, 0), state.step)
    now = m.at(state.step, state.alpha_share)
    loss_fn = lambda p, c, k, shape: generator_loss(
        predict, p, state.critic, frozen, c, now, k, shape, state.head)
    grads, metrics = accumulated_grads(
        loss_fn, state.student, cond, key, m.accumulate, sample_shape)
    grad_norm = optax.global_norm(grads)
    updates, opt = tx.update(grads, state.student_opt, state.student)
    student = optax.apply_updates(state.student, updates)
    decay = st.ema_decay(state.step, m.ema, m.ema_ramp)
    new = dataclasses.replace(state, step=state.step + 1, student=student, student_opt=opt,
                              ema=st.update_ema(state.ema, student, decay))
    if m.merge < 1.0:  # the critic follows what it will be asked about (IDA)
        new = dataclasses.replace(new, critic=st.update_ema(state.critic, student, m.merge))
    finite = _finite(metrics['loss'], grad_norm)
    return st.keep_if(finite, new, state), metrics | {
        'grad_norm': grad_norm, 'finite': finite, 'alpha_share': state.alpha_share,
        'critic_extra': state.critic_extra}


def critic_update(predict: Predict, tx: optax.GradientTransformation, m: Method,
                  sample_shape: tuple[int, ...], state: st.TrainState, cond: Any,
                  root: Array) -> tuple[st.TrainState, Metrics]:
    """One update of the critic, and of a GAN's head, on fresh student samples."""
    key = jax.random.fold_in(jax.random.fold_in(root, 1), state.critic_step)
    params = {'critic': state.critic} | ({'head': state.head} if m.gan else {})
    loss_fn = lambda p, c, k, shape: critic_objective(
        predict, state.student, p['critic'], c, m, k, shape, p.get('head'))
    grads, metrics = accumulated_grads(loss_fn, params, cond, key, m.accumulate, sample_shape)
    grad_norm = optax.global_norm(grads)
    finite = _finite(metrics['fake_loss'], grad_norm)
    new = {'critic_step': state.critic_step + 1}
    for name, old in params.items():
        updates, new[f'{name}_opt'] = tx.update(grads[name], getattr(state, f'{name}_opt'), old)
        new[name] = optax.apply_updates(old, updates)
    # The rest of the state is handed on untouched: it may not even be in the device's memory.
    kept = st.keep_if(finite, new, {name: getattr(state, name) for name in new})
    return dataclasses.replace(state, **kept), metrics | {
        'critic_grad_norm': grad_norm, 'finite': finite}


@dataclasses.dataclass(frozen=True)
class Steps:
    """The two programs: `generator(state, frozen, cond)` and `critic(state, cond)`."""

    generator: Callable[[st.TrainState, Any, Any], tuple[st.TrainState, Metrics]]
    critic: Callable[[st.TrainState, Any], tuple[st.TrainState, Metrics]]


def make_steps(predict: Predict, student_tx: optax.GradientTransformation,
               critic_tx: optax.GradientTransformation, m: Method,
               sample_shape: tuple[int, ...], seed: int, mesh: Mesh, state_shardings: Any,
               frozen_shardings: Any) -> Steps:
    """Jits Algorithm 1 for a mesh: explicit shardings in and out, the state donated."""
    batch, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    root = jax.random.key(seed)
    generator = lambda state, frozen, cond: generator_update(
        predict, student_tx, m, sample_shape, state, frozen, cond, root)
    critic = lambda state, cond: critic_update(
        predict, critic_tx, m, sample_shape, state, cond, root)
    return Steps(
        generator=jax.jit(generator, in_shardings=(state_shardings, frozen_shardings, batch),
                          out_shardings=(state_shardings, whole), donate_argnums=0),
        critic=jax.jit(critic, in_shardings=(state_shardings, batch),
                       out_shardings=(state_shardings, whole), donate_argnums=0))
