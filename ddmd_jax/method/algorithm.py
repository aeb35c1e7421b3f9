"""Algorithm 1 of Decoupled DMD (arXiv 2511.22677): the generator's objective and the critic's.

Read them beside the paper. ``t = 0`` is noise and ``t = 1`` is clean; `models.predict` gives clean
predictions x_hat, in which everything is compared; `recipe` holds what a config can say. Both are
pure functions of their arguments. Line 1, the start from the teacher's weights, is `plan` of
`train/distillation.py`; the two updates alternate in its `step`; gradients, optimisers and EMA are
`train/update.py`'s.
"""

import functools

import jax
import jax.numpy as jnp

from ddmd_jax.data.batch import Batch, null_like
from ddmd_jax.diffusion.process import expand_time, renoise
from ddmd_jax.diffusion.sampling import step_assignment, student_inputs
from ddmd_jax.method import health, losses
from ddmd_jax.method.inputs import CriticKeys, GeneratorKeys, Models, Params
from ddmd_jax.method.recipe import Recipe
from ddmd_jax.method.regularisers import Sight
from ddmd_jax.method.schedules import draw_between

Array = jax.Array
Metrics = dict[str, Array]


def generator_objective(student: Params, critic: Params, models: Models, batch: Batch,
                        recipe: Recipe, key: Array) -> tuple[Array, Metrics, Array]:
    """Loss of the student on one batch, and its health; differentiate in `student` alone.

    Args:
      student: parameters of the generator G.
      critic: parameters of s_fake.
      models: the network's function, the teacher (s_real), and the null prompt.
      batch: B prompts; their real latents, if any, are the regularisers'.
      recipe: as it is at this update (`Recipe.at`).
      key: of everything drawn here.

    Returns:
      (scalar, scalars by name, the samples x ``[B, ...]`` that it was made of).
    """
    keys, cond, few = GeneratorKeys.of(key), batch.cond, recipe.steps
    shape = (batch.rows, *batch.shape)

    # A step of the few-step schedule for every example, and z_t by *backward simulation*: the
    # student's own earlier steps, without gradient, so that it trains on what it meets when it
    # samples. Examples take the steps in turn.
    simulate = functools.partial(models.predict, jax.lax.stop_gradient(student))
    if batch.z is None:
        z, k = student_inputs(simulate, cond, few, keys.simulation, shape)
    else:  # the critic's updates of this step have simulated it
        z, k = batch.z, step_assignment(batch.rows, few.n)

    # x = G(z_t). The gradient of this update enters here and nowhere else.
    x_hat = models.predict(student, z, few.times[k], cond)
    x = jax.lax.stop_gradient(x_hat)

    # tau_CA and tau_DM of Table 1, given the generator's step: CFG augmentation in [t, 1] and
    # distribution matching in [0, 1] for the hybrid schedule. Drawn in uniform time, then mapped.
    tau = recipe.schedule.levels(keys.levels, few.uniform[k], recipe.ranges, few.time)

    # Two noisy samples of one x, with independent noise; classic DMD shares level and noise.
    noise_ca = jax.random.normal(keys.noise_ca, shape, jnp.float32)
    noise_dm = noise_ca if recipe.schedule.shared else (
        jax.random.normal(keys.noise_dm, shape, jnp.float32))
    x_ca, x_dm = renoise(x, tau.ca, noise_ca), renoise(x, tau.dm, noise_dm)

    # s_real with the prompt and with the null prompt at tau_CA; s_real with the prompt at tau_DM,
    # unless that is the first of them once more. Never guided: guidance is Delta_CA's to add.
    wanted = [(x_ca, tau.ca, cond), (x_ca, tau.ca, null_like(models.null, cond))]
    if not recipe.schedule.shared:
        wanted.append((x_dm, tau.dm, cond))
    ca_cond, ca_uncond, *rest = models.teach(wanted)
    dm_cond = rest[0] if rest else ca_cond

    # s_fake at tau_DM, on the very sample that s_real saw.
    dm_fake = models.predict(critic, x_dm, tau.dm, cond)
    p = losses.Predictions(ca_cond, ca_uncond, dm_cond, dm_fake)

    # Delta_CA = (alpha - 1) (s_real_cond - s_real_uncond), Delta_DM = s_real_cond - s_fake_cond,
    # each divided by a distance of its own.
    alpha = expand_time(recipe.alpha.draw(keys.alpha, batch.rows), x)
    delta = losses.directions(x, p, alpha, recipe.normaliser)

    # The proxy loss whose gradient in x is -Delta / size: descending it moves x along Delta.
    loss = losses.proxy_loss(
        x_hat, recipe.weight_ca * delta.ca + recipe.weight_dm * delta.dm)

    # The paper's other regularisers, beside DM or in its place (section 4).
    metrics: Metrics = {}
    for place, (name, regulariser) in enumerate(recipe.regularisers.items()):
        sight = Sight(critic, models.extra.get(name), batch, keys.regularisers(place), few)
        term, curves = regulariser.student_term(x_hat, sight)
        loss, metrics = loss + term, metrics | curves

    return loss, {'loss': loss, **metrics, **health.measure(x, p, delta, recipe.limit)}, x


def critic_objective(critic: Params, student: Params, models: Models, batch: Batch,
                     recipe: Recipe, key: Array) -> tuple[Array, Metrics]:
    """Loss of the critic on fresh samples of the student; differentiate in `critic`.

    Regularisers with parameters of their own are trained by the same loss: differentiate in
    `models.extra` too.

    Args as of `generator_objective`; nothing of `recipe` read here changes in a run.

    Returns:
      (scalar, scalars by name).
    """
    keys, cond, few = CriticKeys.of(key), batch.cond, recipe.steps
    shape = (batch.rows, *batch.shape)

    # A fresh sample of the student as it is now, of every step of its schedule, no gradient; or
    # one that this step's other updates have made.
    generate = functools.partial(models.predict, jax.lax.stop_gradient(student))
    if batch.x is None:
        z, k = student_inputs(generate, cond, few, keys.simulation, shape)
        x = jax.lax.stop_gradient(generate(z, few.times[k], cond))
    else:
        x = batch.x

    # tau' ~ U, whatever the generator's step: s_fake is asked at all levels of tau_DM.
    tau = few.time(draw_between(keys.level, *recipe.critic_range, (batch.rows,)))
    x_tau = renoise(x, tau, jax.random.normal(keys.noise, shape, jnp.float32))

    # Denoising: s_fake learns the distribution that the student draws from.
    x_hat = models.predict(critic, x_tau, tau, cond)
    fake_loss = losses.critic_loss(x_hat, x, tau, recipe.critic_weighting)

    # A GAN's head learns here too, on the critic's trunk.
    loss, metrics = fake_loss, {'fake_loss': fake_loss}
    for place, (name, regulariser) in enumerate(recipe.regularisers.items()):
        sight = Sight(critic, models.extra.get(name), batch, keys.regularisers(place), few)
        term, curves = regulariser.critic_term(x, sight)
        loss, metrics = loss + term, metrics | curves

    return loss, metrics
