"""Terms beside CA and DM: the paper's mean-variance and GAN, and those of users.

A regulariser is a class in a module of its own. `method.regularisers` names them: the two here, or
'my_module' with a class `REGULARISER`. Each has a section ``method.<name>`` of the config.
"""

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ddmd_jax.config.fields import Field
from ddmd_jax.data.batch import Batch
from ddmd_jax.diffusion.time import FewSteps
from ddmd_jax.families.base import Teacher
from ddmd_jax.parallel.sharding import Rules

Array = jax.Array
Term = tuple[Array | float, dict[str, Array]]  # (weighted loss, curves by name), scalars all

BUILT_IN = ('gan', 'mean_variance')


@dataclasses.dataclass(frozen=True)
class Sight:
    """Inputs of a regulariser beside the student's samples.

    Attributes:
      critic: parameters of the critic, its trunk; gradients reach them in the critic's objective.
      own: its own parameters (`Regulariser.init`), likewise; None if it has none.
      batch: the prompts; `batch.real` where `needs_real`.
      keys: two, for everything it draws in this update.
      steps: the student's schedule; `steps.time` maps uniform times.
    """

    critic: Any
    own: Any
    batch: Batch
    keys: Array
    steps: FewSteps


class Regulariser:
    """One term beside CA and DM; a subclass says what differs from nothing.

    Attributes:
      name: of its section ``method.<name>`` and of its parameters in the state.
      fields: the section's fields; `weight` is one of them, and 0 leaves it out of the run.
      curves: what it logs, by name, a line of documentation each.
      rules: lay its parameters out over a mesh.
      needs_real: whether batches must come with real latents.
      needs_critic: whether the critic must be trained for it.
    """

    name: ClassVar[str]
    fields: ClassVar[Sequence[Field]] = ()
    curves: ClassVar[Mapping[str, str]] = {}
    rules: ClassVar[Rules] = ()
    needs_real: ClassVar[bool] = False
    needs_critic: ClassVar[bool] = False

    def __init__(self, section: Any, teacher: Teacher):
        """From its section of a config and the teacher of the run."""

    def init(self, key: Array) -> Any:
        """Parameters of its own at step 0, a nested dict of fp32 arrays; None if there are none."""
        return None

    def flops(self, tokens: int) -> tuple[int, int] | None:
        """What a row with captions of so many costs in the generator's objective and the critic's.

        Gradients included; for the planner. None if it is not known.
        """
        return 0, 0

    def student_term(self, x_hat: Array, sight: Sight) -> Term:
        """Its term in the generator's objective, of samples ``[B, ...]`` that gradients reach."""
        return jnp.zeros(()), {}

    def critic_term(self, x: Array, sight: Sight) -> Term:
        """Its term in the critic's objective, of samples ``[B, ...]`` without gradient."""
        return jnp.zeros(()), {}


def get(name: str) -> type[Regulariser]:
    """The class of a built-in regulariser, or ``REGULARISER`` of a user's module.

    Raises:
      ValueError: no such module, or it has no such class.
    """
    module = f'{__name__}.{name}' if name in BUILT_IN else name
    try:
        found = importlib.import_module(module).REGULARISER
    except (ImportError, AttributeError) as e:
        raise ValueError(f'regulariser {name!r} cannot be imported ({e}); known: '
                         f'{", ".join(BUILT_IN)}, or a module with a class REGULARISER') from e
    if not (isinstance(found, type) and issubclass(found, Regulariser)):
        raise ValueError(f'{name}.REGULARISER is no subclass of Regulariser')
    return found


def build(method: Any, teacher: Teacher) -> dict[str, Regulariser]:
    """Those of ``method.regularisers`` whose weight is above 0, by name, in that order."""
    kinds = [get(name) for name in method.regularisers]
    return {kind.name: kind(method[kind.name], teacher) for kind in kinds
            if method[kind.name].weight}
