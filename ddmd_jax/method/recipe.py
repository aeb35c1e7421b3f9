"""The recipe of a distillation: what its objectives are told, and how a config says it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ddmd_jax import families as teachers
from ddmd_jax.diffusion import process, time
from ddmd_jax.diffusion.time import FewSteps, Shift
from ddmd_jax.method import schedules
from ddmd_jax.models import discriminator

Array = jax.Array

# How the teacher's two or three predictions of a step are made: in one call, or one after another
# in the memory of one. They are equal but for rounding.
TEACHER_PASSES = ('together', 'apart')


@dataclasses.dataclass(frozen=True)
class MeanVariance:
    """Mean-variance regularisation: its weight, and the moments of real data."""

    weight: float
    mean: float
    variance: float


@dataclasses.dataclass(frozen=True)
class Gan:
    """The GAN: weights in the student's and in the critic's loss, of R1, the range of its tau.

    `classify(trunk, head, x_t [B, ...], t [B], cond)` gives logits ``[B]``, high for real; the
    trunk is the critic.
    """

    weight: float
    critic_weight: float
    r1: float
    tau: schedules.Span
    classify: Callable[..., Array]


@dataclasses.dataclass(frozen=True)
class Method:
    """The recipe: everything about the objective that a config can say.

    `at` makes of it the recipe of one student update, with alpha and the ranges of that moment.
    """

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
    alpha_range: schedules.Span = ()  # not empty: alpha is drawn from it, for each example
    alpha_ramp: int = 0
    tau_ca_end: schedules.Span = ()
    tau_dm_end: schedules.Span = ()
    tau_relax: int = 0
    merge: float = 1.0  # decay of the critic towards the student, after each of its updates
    mean_variance: MeanVariance | None = None
    gan: Gan | None = None

    @property
    def times(self) -> Array:
        return FewSteps(Shift(self.shift), self.num_steps).times

    def at(self, step: Array, alpha_share: Array) -> Method:
        """The recipe at student update `step`, with so much of ``alpha - 1``; see `TrainState`."""
        less = lambda alpha: 1.0 + alpha_share * (
            schedules.ramped(alpha, self.alpha_ramp, step) - 1.0)
        relaxed = lambda span, end: schedules.relaxed(span, end or span, self.tau_relax, step)
        return dataclasses.replace(
            self, alpha=less(self.alpha), alpha_range=tuple(map(less, self.alpha_range)),
            tau_ca=relaxed(self.tau_ca, self.tau_ca_end),
            tau_dm=relaxed(self.tau_dm, self.tau_dm_end))

    def draw_alpha(self, key: Array, like: Array) -> Array | float:
        """alpha for samples `like` ``[B, ...]``: one number, or one for each of them."""
        if not self.alpha_range:
            return self.alpha
        drawn = schedules.draw_alpha(key, self.alpha_range, like.shape[0])
        return process.expand_time(drawn, like)


def method_from(config: Any, teacher: teachers.Teacher) -> Method:
    """The recipe of a validated config for `teacher`, whose shift is used unless overridden."""
    m, c = config.method, config.critic
    return Method(
        schedule=m.schedule, alpha=m.alpha, weight_ca=m.weight_ca, weight_dm=m.weight_dm,
        tau_ca=tuple(m.tau_ca), tau_dm=tuple(m.tau_dm), tau_critic=tuple(c.tau),
        normaliser=m.normaliser, floor=m.floor, critic_weighting=c.weighting,
        num_steps=config.student.steps, shift=time.chosen(teacher.time, m.shift).shift,
        ema=config.student.ema, ema_ramp=config.student.ema_ramp,
        accumulate=config.train.accumulate, limit=teacher.latents.limit,
        teacher_passes=config.train.teacher_passes,
        alpha_range=tuple(m.alpha_range), alpha_ramp=m.alpha_ramp,
        tau_ca_end=tuple(m.tau_ca_end), tau_dm_end=tuple(m.tau_dm_end), tau_relax=m.tau_relax,
        merge=c.merge, mean_variance=_mean_variance(m.mean_variance, teacher),
        gan=_gan(m.gan, teacher))


def _mean_variance(c: Any, teacher: teachers.Teacher) -> MeanVariance | None:
    """Moments that a config leaves open are those of the teacher's data."""
    if not c.weight:
        return None
    known = teacher.latents.moments or (None, None)
    mean, variance = (k if x is None else x for x, k in zip((c.mean, c.variance), known))
    return MeanVariance(c.weight, mean, variance)


def _gan(c: Any, teacher: teachers.Teacher) -> Gan | None:
    if not c.weight:
        return None
    classify = discriminator.make_classify(teacher.features, feature_width(teacher))
    return Gan(c.weight, c.critic_weight, c.r1, tuple(c.tau), classify)


def feature_width(teacher: teachers.Teacher) -> int:
    """D of `Teacher.features`."""
    x = jax.ShapeDtypeStruct((1, *teacher.latents.shape), jnp.float32)
    cond = {'embeds': jax.ShapeDtypeStruct((1, 1, teacher.cond.width), jnp.float32),
            'mask': jax.ShapeDtypeStruct((1, 1), bool)}
    t = jax.ShapeDtypeStruct((1,), jnp.float32)
    return jax.eval_shape(teacher.features, teacher.params, x, t, cond).shape[-1]
