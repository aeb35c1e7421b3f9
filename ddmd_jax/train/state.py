"""The train state: one plain pytree of arrays, born sharded."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from ddmd_jax.parallel import sharding
from ddmd_jax.train import optim

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """All that a run changes and a checkpoint holds; the teacher is not part of it.

    Attributes:
      step: student updates so far, int32 scalar.
      critic_step: critic updates so far, int32 scalar.
      student, critic: what is trained of each (`models/adapters.py`), fp32.
      ema: average of `student`; images are drawn with it.
      student_opt, critic_opt: optax states.
      alpha_share: how much of ``alpha - 1`` the student is still asked for, fp32 scalar; 1 unless
        the health verdict lowered it (`train.on_health`).
      critic_extra: further critic updates a step, int32 scalar; 0 unless the verdict added some.
      extra: parameters of regularisers, by name, and `extra_opt` the optax state of all of them.

    A teacher's own training uses the same state with everything of a critic None.
    """

    step: Array
    critic_step: Array
    student: Any
    critic: Any
    ema: Any
    student_opt: Any
    critic_opt: Any
    alpha_share: Any = None
    critic_extra: Any = None
    extra: Any = None
    extra_opt: Any = None


def fresh(student: Any, student_tx: optax.GradientTransformation, critic: Any = None,
          critic_tx: optax.GradientTransformation | None = None,
          extra: Any = None) -> TrainState:
    """A state at step 0 around trees to train; the EMA starts at the student's weights.

    `critic_tx` trains the critic and, if there are any, the regularisers' parameters `extra`.
    """
    zero = jnp.zeros((), jnp.int32)
    copy = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, jnp.float32) + 0, tree)
    student, critic = copy(student), copy(critic)
    judged = critic_tx is not None
    return TrainState(
        step=zero, critic_step=zero + 0, student=student, critic=critic, ema=copy(student),
        student_opt=student_tx.init(student),
        critic_opt=critic_tx.init(critic) if judged else None,
        alpha_share=jnp.ones((), jnp.float32) if judged else None,
        critic_extra=zero + 0 if judged else None,
        extra=extra or None, extra_opt=critic_tx.init(extra) if extra else None)


@dataclasses.dataclass(frozen=True)
class StateSpec:
    """How a run's state is built and laid out; nothing is allocated until `create`.

    Attributes:
      make: ``make(*source)`` is the state at step 0; traced for shapes, jitted to build.
      rules: lay it out over `mesh`.
      source: arrays, or shapes where the state is only to be compiled for.
      host: fields of the state that stay in the hosts' memory (`train.offload`).
    """

    make: Callable[..., TrainState]
    rules: sharding.Rules
    mesh: Mesh
    source: tuple[Any, ...] = ()
    host: tuple[str, ...] = ()

    @functools.cached_property
    def shapes(self) -> TrainState:
        """`ShapeDtypeStruct`s in place of arrays."""
        return jax.eval_shape(self.make, *self.source)

    @functools.cached_property
    def shardings(self) -> TrainState:
        rules = (*self.rules, *optim.RULES)
        laid_out = sharding.shard_tree(self.shapes, rules, self.mesh)
        moved = {name: sharding.in_host_memory(getattr(laid_out, name)) for name in self.host}
        return dataclasses.replace(laid_out, **moved)

    @property
    def targets(self) -> TrainState:
        """Shapes that say where their arrays lie: what programs and restores are given."""
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                            self.shapes, self.shardings)

    def create(self) -> TrainState:
        """The state at step 0, by one jitted program whose outputs are already sharded."""
        build = lambda *source: self.make(*sharding.on_device(source))
        return jax.jit(build, out_shardings=self.shardings)(*self.source)
