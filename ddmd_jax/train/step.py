"""Algorithm 1 of the paper: the generator's update and the critic's, as two jitted programs.

Read `generator_loss` and `critic_update` next to the paper. Both take the frozen teacher as an
argument, donate the state, and draw their randomness from `fold_in(root, counter)`, so that a
resumed run draws what the uninterrupted one would have drawn.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from ddmd_jax import process, sampling, schedules, sharding
from ddmd_jax.data import conditioning
from ddmd_jax.losses.critic import critic_loss
from ddmd_jax.losses.decoupled import Predictions, decoupled_loss, decoupled_update
from ddmd_jax.sampling import Predict, deinterleave, interleave
from ddmd_jax.train import diagnostics, state as st

Array = jax.Array
Metrics = dict[str, Array]

# How the teacher's two or three predictions of a step are made: in one call, or one after another
# in the memory of one. They are equal but for rounding.
TEACHER_PASSES = ('together', 'apart')


@dataclasses.dataclass(frozen=True)
class Method:
    """The recipe: everything about the objective that a config can say."""

    schedule: str
    alpha: float
    weight_ca: float
    weight_dm: float
    tau_ca: tuple[float, float]
    tau_dm: tuple[float, float]
    tau_critic: tuple[float, float]
    normaliser: str
    floor: float
    critic_weighting: str
    num_steps: int
    shift: float
    ema: float
    ema_ramp: bool
    accumulate: int
    limit: float = 1.0  # see Teacher.limit
    teacher_passes: str = 'together'  # one of TEACHER_PASSES

    @property
    def times(self) -> Array:
        return sampling.student_times(self.num_steps, self.shift)


def _student_samples(predict: Predict, student: Any, cond: Any, m: Method, key: Array,
                     shape: tuple[int, ...]) -> tuple[Array, Array]:
    """``(x_hat [B, ...], pre-shift t [B])``: backward simulation, then the student's step."""
    z, k = sampling.student_inputs(
        predict, jax.lax.stop_gradient(student), cond, m.times, key, shape)
    return predict(student, z, m.times[k], cond), process.step_times(m.num_steps)[k]


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
    null = conditioning.null_like(frozen['null'], cond)
    x_ca, x_dm = process.renoise(x, tau_ca, noise_ca), process.renoise(x, tau_dm, noise_dm)
    inputs = [(x_ca, tau_ca, cond), (x_ca, tau_ca, null)]
    if not schedules.SCHEDULES[m.schedule].shared:
        inputs.append((x_dm, tau_dm, cond))
    ca_cond, ca_uncond, *dm = _several(predict, frozen['teacher'], inputs, m.teacher_passes)
    dm_fake = predict(critic, x_dm, tau_dm, cond)
    return Predictions(ca_cond, ca_uncond, dm[0] if dm else ca_cond, dm_fake)


def generator_loss(predict: Predict, student: Any, critic: Any, frozen: Any, cond: Any,
                   m: Method, key: Array, shape: tuple[int, ...]) -> tuple[Array, Metrics]:
    """Proxy loss of one micro-batch and its health; differentiate in `student` only.

    Args:
      predict: ``(params, x_t, t, cond) -> x_hat``, shared by student, critic and teacher.
      student, critic: parameters.
      frozen: ``{'teacher': params, 'null': Cond of one row}``.
      cond: conditioning ``[B, ...]``.
      m: the recipe.
      key: PRNG key of everything drawn here.
      shape: ``[B, H, W, C]`` of the latents.
    """
    k_sim, k_tau, k_ca, k_dm = jax.random.split(key, 4)
    schedule = schedules.SCHEDULES[m.schedule]
    x_hat, t = _student_samples(predict, student, cond, m, k_sim, shape)
    x = jax.lax.stop_gradient(x_hat)
    levels = schedules.draw_levels(k_tau, schedule, t, m.tau_ca, m.tau_dm, m.shift)
    noise_ca = jax.random.normal(k_ca, shape)
    noise_dm = noise_ca if schedule.shared else jax.random.normal(k_dm, shape)
    p = _predictions(predict, frozen, critic, x, cond, levels, (noise_ca, noise_dm), m)
    update = decoupled_update(x, p, alpha=m.alpha, normaliser=m.normaliser, floor=m.floor)
    loss = decoupled_loss(x_hat, update, m.weight_ca, m.weight_dm)
    return loss, {'loss': loss, **diagnostics.health(x, p, update, m.limit)}


def critic_objective(predict: Predict, student: Any, critic: Any, cond: Any, m: Method,
                     key: Array, shape: tuple[int, ...]) -> tuple[Array, Metrics]:
    """Denoising loss on fresh student samples at ``tau' ~ U``; differentiate in `critic` only."""
    k_sim, k_tau, k_noise = jax.random.split(key, 3)
    x, t = _student_samples(predict, student, cond, m, k_sim, shape)
    x = jax.lax.stop_gradient(x)
    tau = schedules.draw_tau(k_tau, t, False, m.tau_critic, m.shift)
    x_tau = process.renoise(x, tau, jax.random.normal(k_noise, shape))
    loss = critic_loss(predict(critic, x_tau, tau, cond), x, tau, m.critic_weighting)
    return loss, {'fake_loss': loss}


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

    inputs = (split, jax.random.split(key, parts))
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
    loss_fn = lambda p, c, k, shape: generator_loss(
        predict, p, state.critic, frozen, c, m, k, shape)
    grads, metrics = accumulated_grads(
        loss_fn, state.student, cond, key, m.accumulate, sample_shape)
    grad_norm = optax.global_norm(grads)
    updates, opt = tx.update(grads, state.student_opt, state.student)
    student = optax.apply_updates(state.student, updates)
    decay = st.ema_decay(state.step, m.ema, m.ema_ramp)
    new = dataclasses.replace(state, step=state.step + 1, student=student, student_opt=opt,
                              ema=st.update_ema(state.ema, student, decay))
    finite = _finite(metrics['loss'], grad_norm)
    return st.keep_if(finite, new, state), metrics | {'grad_norm': grad_norm, 'finite': finite}


def critic_update(predict: Predict, tx: optax.GradientTransformation, m: Method,
                  sample_shape: tuple[int, ...], state: st.TrainState, cond: Any,
                  root: Array) -> tuple[st.TrainState, Metrics]:
    """One critic update on fresh student samples."""
    key = jax.random.fold_in(jax.random.fold_in(root, 1), state.critic_step)
    loss_fn = lambda p, c, k, shape: critic_objective(predict, state.student, p, c, m, k, shape)
    grads, metrics = accumulated_grads(
        loss_fn, state.critic, cond, key, m.accumulate, sample_shape)
    grad_norm = optax.global_norm(grads)
    updates, opt = tx.update(grads, state.critic_opt, state.critic)
    finite = _finite(metrics['fake_loss'], grad_norm)
    new = {'critic_step': state.critic_step + 1, 'critic_opt': opt,
           'critic': optax.apply_updates(state.critic, updates)}
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
