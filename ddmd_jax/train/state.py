"""The train state: one plain pytree of arrays, born sharded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from ddmd_jax.parallel import sharding

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """`step` counts student updates, `critic_step` critic updates; both are int32 scalars.

    Pre-training a teacher uses the same state with all that is a critic's None. The
    teacher is not part of it: it is an argument of the step, never donated, never saved.
    `alpha_share` (fp32) is how much of ``alpha - 1`` the student is still asked for, and
    `critic_extra` (int32) how many more critic updates a step has than the config says: what the
    health verdict has done to a run, 1 and 0 unless `train.on_health` lets it. `head` and its
    optimiser are the GAN's, None without one.
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
    head: Any = None
    head_opt: Any = None


def ema_decay(step: Array, decay: float, ramp: bool) -> Array:
    """Decay after `step` updates: ``min(decay, (1 + n) / (10 + n))`` while ramping.

    Without the ramp a short run's average is mostly its starting point.
    """
    if not ramp:
        return jnp.asarray(decay, jnp.float32)
    n = step.astype(jnp.float32)
    return jnp.minimum(decay, (1.0 + n) / (10.0 + n))


def update_ema(ema: Any, params: Any, decay: Array) -> Any:
    """``decay * ema + (1 - decay) * params``, leaf by leaf in fp32."""
    return jax.tree.map(lambda e, p: e * decay + p.astype(e.dtype) * (1.0 - decay), ema, params)


def keep_if(ok: Array, new: Any, old: Any) -> Any:
    """`new` where `ok`, else `old`: a step that went wrong leaves the state as it was."""
    return jax.tree.map(lambda n, o: jnp.where(ok, n, o), new, old)


def abstract_and_shardings(make: Callable[..., TrainState], rules: sharding.Rules, mesh: Mesh,
                           *source: Any, host: Sequence[str] = ()) -> tuple[Any, Any]:
    """Shapes of the state that ``make(*source)`` builds, and shardings; nothing is allocated.

    `host` names fields of the state that stay in the hosts' memory.
    """
    abstract = jax.eval_shape(make, *source)
    shardings = sharding.shard_tree(abstract, rules, mesh)
    moved = {name: sharding.in_host_memory(getattr(shardings, name)) for name in host}
    return abstract, dataclasses.replace(shardings, **moved)


def create(make: Callable[..., TrainState], rules: sharding.Rules, mesh: Mesh,
           *source: Any, host: Sequence[str] = ()) -> TrainState:
    """Builds ``make(*source)`` in one jitted program whose outputs are already sharded."""
    _, shardings = abstract_and_shardings(make, rules, mesh, *source, host=host)
    build = lambda *source: make(*sharding.on_device(source))
    return jax.jit(build, out_shardings=shardings)(*source)


def fresh(student: Any, student_tx: optax.GradientTransformation, critic: Any = None,
          critic_tx: optax.GradientTransformation | None = None, head: Any = None) -> TrainState:
    """A state at step 0; EMA starts at the student's weights (a copy: buffers are donated).

    `critic_tx` trains the critic and, if there is one, the `head` of a GAN.
    """
    zero = jnp.zeros((), jnp.int32)
    copy = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, jnp.float32) + 0, tree)
    student, critic = copy(student), copy(critic)
    return TrainState(
        step=zero, critic_step=zero + 0, student=student, critic=critic, ema=copy(student),
        student_opt=student_tx.init(student),
        critic_opt=critic_tx.init(critic) if critic_tx is not None else None,
        alpha_share=jnp.ones((), jnp.float32) if critic_tx is not None else None,
        critic_extra=zero + 0 if critic_tx is not None else None,
        head=head, head_opt=critic_tx.init(head) if head is not None else None)
