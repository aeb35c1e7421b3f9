"""The GAN in DMD2's form (its section 4.3): non-saturating, on re-noised samples.

The classifier is a head on the critic's trunk, so that it starts from what the teacher knows. It
needs real images, which CA and DM do not.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ddmd_jax.config.fields import FIXED, Field
from ddmd_jax.config.rules import POSITIVE, TAU_RANGE, WEIGHT, choice
from ddmd_jax.diffusion.process import renoise
from ddmd_jax.diffusion.sampling import deinterleave, interleave
from ddmd_jax.families.base import Teacher
from ddmd_jax.method.regularisers import Regulariser, Sight, Term
from ddmd_jax.method.schedules import draw_between
from ddmd_jax.models import discriminator, flops

Array = jax.Array


def student_gan_loss(fake: Array) -> Array:
    """``mean softplus(-fake)``: falls as the head takes the student's samples for real ones.

    `fake` are logits ``[B]``, high for real; the result is a scalar in fp32.
    """
    return jnp.mean(jax.nn.softplus(-fake.astype(jnp.float32)))


def critic_gan_loss(real: Array, fake: Array) -> Array:
    """``mean softplus(-real) + mean softplus(fake)`` of logits ``[B]`` each, a scalar in fp32.

    2 log 2 = 1.39 for a head that cannot tell them apart.
    """
    return student_gan_loss(real) + student_gan_loss(-fake)


def r1_penalty(gradient: Array) -> Array:
    """``1/2 mean |d logit / d x|^2`` over real samples (Mescheder et al. 2018), a scalar.

    `gradient` is ``[B, ...]``, of each sample's own logit in that sample.
    """
    squares = jnp.square(gradient.astype(jnp.float32))
    return 0.5 * jnp.mean(jnp.sum(squares, axis=tuple(range(1, squares.ndim))))


class Gan(Regulariser):
    """A GAN on the critic's trunk, with R1 where its weight is above 0."""

    name: ClassVar[str] = 'gan'
    fields: ClassVar = (
        Field('weight', WEIGHT, 0.0, FIXED, "weight of the GAN in the student's loss"),
        Field('critic_weight', POSITIVE, 1e-2, FIXED, "its weight in the critic's loss"),
        Field('r1', WEIGHT, 0.0, FIXED, 'weight of R1'),
        Field('tau', TAU_RANGE, (0.0, 0.98), FIXED,
              'range, in uniform time, of the levels at which the classifier judges'),
        Field('head', choice('tokens', 'convolutions'), 'tokens', FIXED,
              "the classifier's head; `convolutions` is DMD2's, of trunks whose features are maps",
              later=True),
    )
    curves: ClassVar = {
        'gan_loss': "the student's GAN loss", 'gan_critic_loss': "the classifier's loss",
        'gan_real': 'mean logit of real latents', 'gan_fake': "mean logit of the student's",
        'gan_r1': 'R1 penalty'}
    rules: ClassVar = discriminator.RULES
    needs_real: ClassVar[bool] = True
    needs_critic: ClassVar[bool] = True

    def __init__(self, section: Any, teacher: Teacher):
        self.weight, self.critic_weight = section.weight, section.critic_weight
        self.r1, (low, high) = section.r1, section.tau
        self.tau = (low, high)
        if teacher.features is None:
            raise ValueError(f'{teacher.family} gives no features for a classifier to read')
        shape = discriminator.feature_shape(teacher)
        self.head = discriminator.make_head(section.get('head', 'tokens'), shape)
        self.classify = discriminator.make_classify(teacher.features, self.head)
        self.feature_flops = teacher.feature_flops
        self.head_flops = flops.head(section.get('head', 'tokens'), shape)

    def init(self, key: Array) -> Any:
        return discriminator.init(self.head, key)

    def flops(self, tokens: int) -> tuple[int, int] | None:
        if self.feature_flops is None:
            return None
        judged = self.feature_flops(tokens) + self.head_flops
        # The student's: there and back to the sample. The critic's: two rows, and what is trained;
        # R1 goes back to the sample, and through all of that once more.
        return 2 * judged, (6 + (6 if self.r1 else 0)) * judged

    def noised(self, x: Array, keys: Array, sight: Sight) -> tuple[Array, Array]:
        """`x` re-noised for the classifier, and the level ``[B]`` of each sample."""
        k_tau, k_noise = keys
        tau = sight.steps.time(draw_between(k_tau, *self.tau, x.shape[:1]))
        return renoise(x, tau, jax.random.normal(k_noise, x.shape, jnp.float32)), tau

    def student_term(self, x_hat: Array, sight: Sight) -> Term:
        x_tau, tau = self.noised(x_hat, sight.keys, sight)
        loss = student_gan_loss(
            self.classify(sight.critic, sight.own, x_tau, tau, sight.batch.cond))
        return self.weight * loss, {'gan_loss': loss}

    def critic_term(self, x: Array, sight: Sight) -> Term:
        k_real, k_fake = map(jax.random.split, sight.keys)
        cond = sight.batch.cond
        x_real, t_real = self.noised(sight.batch.real, k_real, sight)
        x_fake, t_fake = self.noised(x, k_fake, sight)
        both = interleave((x_real, t_real, cond), (x_fake, t_fake, cond))
        real, fake = deinterleave(self.classify(sight.critic, sight.own, *both), 2)
        loss = critic_gan_loss(real, fake)
        total = self.critic_weight * loss
        curves = {'gan_critic_loss': loss, 'gan_real': jnp.mean(real), 'gan_fake': jnp.mean(fake)}
        if self.r1:
            logits = lambda x: jnp.sum(self.classify(sight.critic, sight.own, x, t_real, cond))
            curves['gan_r1'] = r1_penalty(jax.grad(logits)(x_real))
            total += self.r1 * curves['gan_r1']
        return total, curves


REGULARISER = Gan
