"""The mechanics around Algorithm 1: gradients, accumulation, optimisers, EMA, jit.

`method/algorithm.py` has the objectives. An update binds the trained trees to networks,
differentiates, applies, and leaves the state as it was where something is not finite. Both updates
donate the state, and draw their randomness from the seed and a counter of the state, so that a
resumed run draws what the uninterrupted one would.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from ddmd_jax.data.batch import Batch, Cond
from ddmd_jax.diffusion.sampling import Predict, rollout
from ddmd_jax.method.algorithm import Metrics, critic_objective, generator_objective
from ddmd_jax.method.inputs import GeneratorKeys, Models
from ddmd_jax.method.recipe import Recipe
from ddmd_jax.models.adapters import Binding, Full
from ddmd_jax.parallel import sharding
from ddmd_jax.train import optim
from ddmd_jax.train.state import TrainState

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frozen:
    """The teacher's parameters and the null prompt's conditioning: no update changes them."""

    teacher: Any
    null: Cond


@dataclasses.dataclass(frozen=True)
class Mechanics:
    """How the objectives' gradients become updates.

    Attributes:
      student_tx, critic_tx: optimisers; the critic's trains the regularisers' parameters too.
      seed: root of everything drawn.
      accumulate: micro-batches of one update.
      ema, ema_ramp: see `ema_decay`.
      merge: decay of the critic towards the student after each student update (IDA); 1 is off.
      teacher_passes: one of `inputs.TEACHER_PASSES`.
      student, critic: bindings of the trained trees to networks.
    """

    student_tx: optax.GradientTransformation
    critic_tx: optax.GradientTransformation
    seed: int = 0
    accumulate: int = 1
    ema: float = 0.999
    ema_ramp: bool = True
    merge: float = 1.0
    teacher_passes: str = 'together'
    student: Binding = Full()
    critic: Binding = Full()


# The updates of one step, by name. 'critic_first': the critic's, each on a batch of its own, then
# the student's. 'same_images' (DMD2's): the student's, one of the critic's on the very images that
# it learnt from, then the critic's others, each on a batch of its own.
# 'one_rollout': as 'critic_first', but all on the prompts of one batch and on samples from one way
# of the student through all its steps, which it does not leave before its own update.
ORDERS = ('critic_first', 'same_images', 'one_rollout')


class Program(NamedTuple):
    """The jitted methods of `Updates`, each of ``(frozen, state, batch)``."""

    generator: Any
    critic: Any
    rollout: Any


@dataclasses.dataclass(frozen=True)
class Updates:
    """Algorithm 1's two updates of one network architecture, by one recipe."""

    predict: Predict
    recipe: Recipe
    mechanics: Mechanics

    def generator(self, frozen: Frozen, state: TrainState,
                  batch: Batch) -> tuple[TrainState, Metrics, Array]:
        """One update of the student, its EMA, and the critic's merge.

        With it the samples ``[B, ...]`` that it learnt from, of the student as it was.
        """
        m, key = self.mechanics, self._generator_key(state)
        recipe = self.recipe.at(state.step, state.alpha_share)
        # `train.offload`: trees that are kept in the hosts' memory are fetched here.
        frozen = sharding.on_device(frozen)
        state = dataclasses.replace(state, ema=sharding.on_device(state.ema))
        critic = m.critic.bind(frozen.teacher, state.critic)
        models = Models(self.predict, frozen.teacher, frozen.null, state.extra or {},
                        m.teacher_passes)

        def loss_fn(trained: Any, batch: Batch, key: Array) -> tuple[Array, tuple[Metrics, Array]]:
            student = m.student.bind(frozen.teacher, trained)
            loss, metrics, x = generator_objective(student, critic, models, batch, recipe, key)
            return loss, (metrics, x)

        grads, metrics, x = accumulated_grads(loss_fn, state.student, batch, key, m.accumulate)
        new = moved(state, grads, m.student_tx, m.ema, m.ema_ramp)
        if m.merge != 1.0:
            new = dataclasses.replace(new, critic=average(state.critic, new.student, m.merge))

        grad_norm = optax.global_norm(grads)
        finite = jnp.isfinite(metrics['loss']) & jnp.isfinite(grad_norm)
        return keep_if(finite, new, state), metrics | {
            'grad_norm': grad_norm, 'finite': finite, 'alpha_share': state.alpha_share,
            'critic_extra': state.critic_extra}, x

    def critic(self, frozen: Frozen, state: TrainState,
               batch: Batch) -> tuple[TrainState, Metrics]:
        """One update of the critic, and of the regularisers' parameters."""
        m = self.mechanics
        key = jax.random.fold_in(
            jax.random.fold_in(jax.random.key(m.seed), 1), state.critic_step)
        if m.student.leans or m.critic.leans:  # else it stays where `train.offload` keeps it
            frozen = sharding.on_device(frozen)
        student = m.student.bind(frozen.teacher, state.student)

        def loss_fn(params: Any, batch: Batch, key: Array) -> tuple[Array, tuple[Metrics, None]]:
            trained, extra = params
            critic = m.critic.bind(frozen.teacher, trained)
            models = Models(self.predict, frozen.teacher, frozen.null, extra or {})
            loss, metrics = critic_objective(critic, student, models, batch, self.recipe, key)
            return loss, (metrics, None)

        params = (state.critic, state.extra)
        grads, metrics, _ = accumulated_grads(loss_fn, params, batch, key, m.accumulate)
        updates, opt = m.critic_tx.update(grads[0], state.critic_opt, state.critic)
        new = {'critic_step': state.critic_step + 1, 'critic_opt': opt,
               'critic': optax.apply_updates(state.critic, updates)}
        if state.extra is not None:
            updates, opt = m.critic_tx.update(grads[1], state.extra_opt, state.extra)
            new |= {'extra_opt': opt, 'extra': optax.apply_updates(state.extra, updates)}

        grad_norm = optax.global_norm(grads)
        finite = jnp.isfinite(metrics['fake_loss']) & jnp.isfinite(grad_norm)
        # Every other field is handed on untouched: it may not even be in the device's memory.
        kept = keep_if(finite, new, {name: getattr(state, name) for name in new})
        return dataclasses.replace(state, **kept), metrics | {
            'critic_grad_norm': grad_norm, 'finite': finite}

    def rollout(self, frozen: Frozen, state: TrainState,
                batch: Batch) -> tuple[Array, list[Array]]:
        """`sampling.rollout` of the student as it is, with the noise of its next update.

        In a warm-up, while the student's count stands still, each has noise of its own.
        """
        m = self.mechanics
        if m.student.leans:
            frozen = sharding.on_device(frozen)
        student = m.student.bind(frozen.teacher, state.student)
        key = GeneratorKeys.of(self._generator_key(state)).simulation
        key = jnp.where((state.step == 0) & (state.critic_step > 0),
                        jax.random.fold_in(key, state.critic_step), key)
        return rollout(functools.partial(self.predict, student), batch.cond, self.recipe.steps,
                       key, (batch.rows, *batch.shape), m.accumulate)

    def _generator_key(self, state: TrainState) -> Array:
        """Of everything that the generator's next update draws."""
        return jax.random.fold_in(
            jax.random.fold_in(jax.random.key(self.mechanics.seed), 0), state.step)

    def jitted(self, mesh: Mesh, state_shardings: TrainState, frozen_shardings: Frozen) -> Program:
        """All for a mesh: explicit shardings in and out, the state donated."""
        batch, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
        given = frozen_shardings, state_shardings, batch
        return Program(
            jax.jit(self.generator, in_shardings=given,
                    out_shardings=(state_shardings, whole, batch), donate_argnums=1),
            jax.jit(self.critic, in_shardings=given,
                    out_shardings=(state_shardings, whole), donate_argnums=1),
            jax.jit(self.rollout, in_shardings=given, out_shardings=batch))


def plain(loss_fn: Callable[[Any, Any, Array], tuple[Array, Metrics]],
          config: Any) -> Any:
    """The jitted update ``(state, batch, steps) -> (state, metrics)`` of a network with one loss.

    `steps`, the length of the run, which the learning rate's decay follows, is an argument and no
    constant: a run that is made longer finds its program compiled.

    Args:
      loss_fn: ``(params, batch, key) -> (loss, metrics)``.
      config: of the run: its seed, optimiser and EMA.
    """
    def update(state: TrainState, batch: Any, steps: Array) -> tuple[TrainState, Metrics]:
        tx = optim.make_optimizer(config.optim.student, steps)
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            state.student, batch, key)
        new = moved(state, grads, tx, config.student.ema, config.student.ema_ramp)
        grad_norm = optax.global_norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        return keep_if(finite, new, state), {
            'loss': loss, **metrics, 'grad_norm': grad_norm, 'finite': finite}

    return jax.jit(update, donate_argnums=0)


def moved(state: TrainState, grads: Any, tx: optax.GradientTransformation, ema: float,
          ramp: bool) -> TrainState:
    """`state` one update later: of the student, its optimiser and its average (`ema_decay`)."""
    updates, opt = tx.update(grads, state.student_opt, state.student)
    student = optax.apply_updates(state.student, updates)
    return dataclasses.replace(
        state, step=state.step + 1, student=student, student_opt=opt,
        ema=average(state.ema, student, ema_decay(state.step, ema, ramp)))


def accumulated_grads(loss_fn: Callable[[Any, Batch, Array], tuple[Array, tuple[Metrics, Any]]],
                      params: Any, batch: Batch, key: Array,
                      parts: int) -> tuple[Any, Metrics, Any]:
    """Mean gradient and metrics over `parts` micro-batches, and what each has of its rows.

    Micro-batches take every `parts`-th row, so that each holds rows of every device; each has a
    key of its own, but for a single one, which has `key`.

    Args:
      loss_fn: ``(params, batch, key) -> (loss, (metrics, arrays with a row an example))``.
    """
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    if parts == 1:
        (_, (metrics, rows)), grads = value_and_grad(params, batch, key)
        return grads, metrics, rows
    split = lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)
    join = lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:])

    def body(total: Any, inputs: tuple[Batch, Array]) -> tuple[Any, Any]:
        (_, (metrics, rows)), grads = value_and_grad(params, *inputs)
        return jax.tree.map(lambda a, b: a + b / parts, total, (grads, metrics)), rows

    inputs = (jax.tree.map(split, batch), jax.random.split(key, parts))
    first = jax.tree.map(lambda x: x[0], inputs)
    (_, (metrics, _)), grads = jax.eval_shape(value_and_grad, params, *first)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (grads, metrics))
    (grads, metrics), rows = jax.lax.scan(body, zeros, inputs)
    return grads, metrics, jax.tree.map(join, rows)


def ema_decay(step: Array, decay: float, ramp: bool) -> Array:
    """Decay after `step` updates: ``min(decay, (1 + n) / (10 + n))`` while ramping.

    Without the ramp a short run's average is mostly its starting point.
    """
    if not ramp:
        return jnp.asarray(decay, jnp.float32)
    n = step.astype(jnp.float32)
    return jnp.minimum(decay, (1.0 + n) / (10.0 + n))


def average(ema: Any, params: Any, decay: Array | float) -> Any:
    """``decay * ema + (1 - decay) * params``, leaf by leaf in fp32."""
    return jax.tree.map(lambda e, p: e * decay + p.astype(e.dtype) * (1.0 - decay), ema, params)


def keep_if(ok: Array, new: Any, old: Any) -> Any:
    """`new` where `ok`, else `old`: an update that went wrong leaves the state as it was."""
    return jax.tree.map(lambda n, o: jnp.where(ok, n, o), new, old)
