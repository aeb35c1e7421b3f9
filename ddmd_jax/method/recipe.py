"""The recipe of a distillation: everything about the objectives that a config can say."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from ddmd_jax.diffusion.time import FewSteps, chosen
from ddmd_jax.families.base import Teacher
from ddmd_jax.method import regularisers, schedules
from ddmd_jax.method.losses import Normaliser
from ddmd_jax.method.regularisers import Regulariser
from ddmd_jax.method.schedules import Alpha, Range, Ranges, Schedule

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Settings of Algorithm 1.

    Attributes:
      steps: the student's few-step schedule, under the run's time map.
      schedule: where the two terms are re-noised to (Table 1).
      ranges: of tau_CA and tau_DM, in uniform time.
      alpha: the guidance scale to bake in.
      weight_ca, weight_dm: of the two terms.
      normaliser: how they are divided.
      critic_range: of the critic's levels, in uniform time.
      critic_weighting: of its denoising loss, one of `losses.WEIGHTINGS`.
      limit: magnitude beyond which a value of a latent counts as saturated.
      regularisers: terms beside CA and DM, by name.
    """

    steps: FewSteps
    schedule: Schedule
    ranges: Ranges
    alpha: Alpha
    weight_ca: float = 1.0
    weight_dm: float = 1.0
    normaliser: Normaliser = Normaliser()
    critic_range: Range = (0.0, 0.98)
    critic_weighting: str = 'velocity'
    limit: float = 1.0
    regularisers: Mapping[str, Regulariser] = dataclasses.field(default_factory=dict)

    def at(self, step: Array | int, alpha_share: Array | float = 1.0) -> Recipe:
        """The recipe of student update `step`, counted from 0; see `TrainState.alpha_share`."""
        return dataclasses.replace(self, alpha=self.alpha.at(step, alpha_share),
                                   ranges=self.ranges.at(step))


def from_config(config: Any, teacher: Teacher) -> Recipe:
    """The recipe of a checked config; the teacher's time map unless `method.shift` is given."""
    m = config.method
    return Recipe(
        steps=FewSteps(chosen(teacher.time, m.shift, config.student.get('first_step')),
                       config.student.steps),
        schedule=schedules.get(m.schedule),
        ranges=Ranges(tuple(m.tau_ca), tuple(m.tau_dm), tuple(m.tau_ca_end), tuple(m.tau_dm_end),
                      m.tau_relax),
        alpha=Alpha(m.alpha, tuple(m.alpha_range), m.alpha_ramp),
        weight_ca=m.weight_ca, weight_dm=m.weight_dm,
        normaliser=Normaliser(m.normaliser, m.floor),
        critic_range=tuple(config.critic.tau), critic_weighting=config.critic.weighting,
        limit=teacher.latents.limit, regularisers=regularisers.build(m, teacher))
