"""Samplers against exact solutions and hand-written loops; no network anywhere.

On Gaussian data N(m, s^2) the best clean prediction is known, and so is where the
probability-flow ODE ends: at ``m + s * noise``.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddmd_jax.diffusion import process, sampling
from ddmd_jax.diffusion.time import FewSteps, Shift
from ddmd_jax.families.lumina import teacher as lumina

SHAPE = (4, 2, 2, 3)
WIDTH = 0.5  # s of the Gaussian data


def gaussian(params, x_t, t, cond):
    """E[x | x_t] for data N(cond['m'], WIDTH^2), one mean an example."""
    del params
    t, m = process.expand_time(t, x_t), process.expand_time(cond['m'], x_t)
    gain = WIDTH**2 * t / ((t * WIDTH) ** 2 + (1 - t) ** 2)
    return m + gain * (x_t - t * m)


def means(*values):
    return {'m': jnp.array(values, jnp.float32)}


COND, NULL = means(1.0, -0.5, 2.0, 0.0), means(0.3, 0.3, 0.3, 0.3)


def wobble(params, x_t, t, cond):
    """No denoiser at all, but it depends on everything it is given, example by example."""
    t, c = process.expand_time(t, x_t), process.expand_time(cond['c'], x_t)
    return jnp.tanh(params * x_t + c) + 0.3 * t * x_t[:, ::-1]


class Spy:
    """Notes the rows of each call to a predictor (in a scan: of the one traced call)."""

    def __init__(self, predict):
        self.predict, self.rows = predict, []

    def __call__(self, params, x_t, t, cond):
        assert t.shape == x_t.shape[:1]
        self.rows.append(x_t.shape[0])
        return self.predict(params, x_t, t, cond)


def denoise(predict, params=None):
    return functools.partial(predict, params)


def close(a, b, atol=1e-5):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=atol, rtol=1e-5)


# --- The teacher's sampler ---


def teacher_error(steps, solver, guidance=1.0, shift=1.0):
    """Largest distance to the exact end of the ODE."""
    noise = jax.random.normal(jax.random.key(0), SHAPE)
    got = sampling.sample_teacher(denoise(gaussian), COND, noise, Shift(shift).grid(steps),
                                  sampling.Guidance(guidance, NULL), solver)
    # Equal widths: guidance moves the mean along the line from null to prompt, and beyond.
    m = NULL['m'] + guidance * (COND['m'] - NULL['m'])
    return float(jnp.abs(got - (m[:, None, None, None] + WIDTH * noise)).max())


@pytest.mark.parametrize('shift', [1.0, 3.0])
@pytest.mark.parametrize('guidance', [1.0, 3.0])
def test_euler_converges_to_the_exact_solution_at_first_order(shift, guidance):
    coarse, fine = (teacher_error(n, 'euler', guidance, shift) for n in (32, 128))
    assert fine < 0.05
    assert 3.0 < coarse / fine < 5.5  # a quarter of the step, a quarter of the error


def test_heun_is_clearly_better():
    """Second order: also catches a corrector that is evaluated at the wrong point."""
    coarse, fine = (teacher_error(n, 'heun') for n in (16, 64))
    assert fine < 0.1 * teacher_error(64, 'euler')
    assert coarse / fine > 8.0


def sampled(null, guidance, predict=gaussian, steps=4, rescale=None, **kwargs):
    return sampling.sample_teacher(denoise(predict), COND, jnp.ones(SHAPE), Shift().grid(steps),
                                   sampling.Guidance(guidance, null, rescale), **kwargs)


@pytest.mark.parametrize('solver', sampling.SOLVERS)
def test_a_teachers_steps_predict_by_the_guided_velocity(solver):
    """Euler's points are those that its predictions lead to, and every solver ends at the last."""
    noise, times = jax.random.normal(jax.random.key(2), SHAPE), Shift(2.0).grid(5)
    end, predicted = sampling.trace_teacher(denoise(gaussian), COND, noise, times,
                                            sampling.Guidance(3.0, NULL), solver)
    assert predicted.shape == (5, *SHAPE)
    close(predicted[-1], end)
    x, known = noise, 5 if solver == 'euler' else 1  # Heun's later points are its own
    for t, t_next, x_hat in zip(times[:known], times[1:], predicted):
        at = jnp.full(4, t)
        close(x_hat, sampling.guided(gaussian(None, x, at, COND), gaussian(None, x, at, NULL), 3.0),
              1e-4)
        x = x + (t_next - t) / (1 - t) * (x_hat - x)


def test_no_guidance_does_not_call_the_null_prompt():
    """Half the cost, and a poisoned null prompt must not be able to reach the sample."""
    poison = means(*[jnp.nan] * 4)
    assert np.isfinite(sampled(poison, 1.0)).all()
    assert np.isnan(sampled(poison, 2.0)).all()
    plain, guided = Spy(gaussian), Spy(gaussian)
    sampled(NULL, 1.0, plain), sampled(NULL, 2.0, guided)
    assert set(plain.rows) == {4} and set(guided.rows) == {8}


def test_guidance_formula():
    """``uncond + w (cond - uncond)``: peers mix it up with ``cond + w (cond - uncond)``."""
    close(sampling.guided(jnp.array(3.0), jnp.array(1.0), 2.5), 6.0)
    close(sampling.guided(jnp.array(3.0), jnp.array(1.0), 1.0), 3.0)


@pytest.mark.parametrize('solver', sampling.SOLVERS)
def test_rescaling_is_given_the_guided_velocity_and_the_conditional_one(solver):
    plain, guided = sampled(NULL, 1.0, solver=solver), sampled(NULL, 3.0, solver=solver)
    with_rescale = lambda rescale: sampled(NULL, 3.0, solver=solver, rescale=rescale)
    np.testing.assert_array_equal(with_rescale(None), guided)
    np.testing.assert_array_equal(with_rescale(lambda v, v_cond: v), guided)
    close(with_rescale(lambda v, v_cond: v_cond), plain)
    assert np.abs(guided - plain).max() > 0.1


def test_without_guidance_nothing_is_rescaled():
    poison = lambda v, v_cond: v * jnp.nan
    np.testing.assert_array_equal(sampled(NULL, 1.0, rescale=poison), sampled(NULL, 1.0))
    assert np.isnan(sampled(NULL, 1.5, rescale=poison)).all()


def test_lumina_gives_a_guided_velocity_the_conditional_ones_norm():
    """Row by row of the latent: over its width, not over height, channels or all of them."""
    v, v_cond = jax.random.normal(jax.random.key(0), (2, 2, 3, 5, 4))
    got = lumina.rescale(v, v_cond)
    close(jnp.linalg.norm(got, axis=2), jnp.linalg.norm(v_cond, axis=2))
    close(got / v, (got / v)[:, :, :1] * jnp.ones((5, 1)))  # a row keeps its direction
    close(lumina.rescale(v_cond, v_cond), v_cond)


def test_lumina_rescales_in_the_sampler():
    """One step from 0 to 1: the sample less the noise is the velocity."""
    uneven = lambda params, x_t, t, cond: wobble(0.5, x_t, t, {'c': cond['m']}) * jnp.arange(1., 4)
    velocity = lambda *args, **kwargs: sampled(*args, predict=uneven, steps=1, **kwargs) - 1.0
    plain, guided = velocity(NULL, 1.0), velocity(NULL, 3.0)
    got = velocity(NULL, 3.0, rescale=lumina.rescale)
    norm = lambda v: jnp.linalg.norm(v, axis=2)
    close(norm(got), norm(plain))
    assert float(jnp.abs(norm(guided) - norm(plain)).max()) > 0.1
    close(got / norm(got)[:, :, None], guided / norm(guided)[:, :, None])


@pytest.mark.parametrize('shift', [1.0, 3.0])
def test_times(shift):
    """The teacher's rise from 0 to exactly 1; the student's are every fourth of them."""
    times = np.asarray(Shift(shift).grid(16))
    assert times[0] == 0.0 and times[-1] == 1.0 and (np.diff(times) > 0).all()
    close(FewSteps(Shift(shift), 4).times, times[:-1:4])


# --- The student's sampler ---


def student_case(steps, batch=4):
    cond = {'c': jnp.linspace(-1, 1, batch)}
    return jnp.float32(0.8), cond, FewSteps(Shift(3.0), steps), jax.random.key(5)


def by_hand(params, cond, times, key, shape, mode):
    """Every z a full batch passes through, and the sample at the end, in a plain loop."""
    noises = [jax.random.normal(k, shape) for k in jax.random.split(key, len(times))]
    ends, z, seen = [*times[1:], 1.0], noises[0], []
    for j, (t, end) in enumerate(zip(times, ends, strict=True)):
        seen.append(z)
        x_hat = wobble(params, z, jnp.full(shape[0], t), cond)
        if mode == 'deterministic':
            z = z + (end - t) * (x_hat - z) / (1 - t)
        else:
            z = end * x_hat + (1 - end) * noises[(j + 1) % len(times)]
    return seen, z


@pytest.mark.parametrize('mode', sampling.STUDENT_MODES)
@pytest.mark.parametrize('steps', [1, 2, 4])
def test_sample_student_is_the_plain_loop(mode, steps):
    params, cond, few, key = student_case(steps)
    got = sampling.sample_student(denoise(wobble, params), cond, few, key, SHAPE, mode)
    seen, want = by_hand(params, cond, few.times, key, SHAPE, mode)
    close(got, want)
    last, predicted = sampling.trace_student(denoise(wobble, params), cond, few, key, SHAPE, mode)
    np.testing.assert_array_equal(last, got)
    close(predicted, [wobble(params, z, jnp.full(SHAPE[0], t), cond)
                      for z, t in zip(seen, few.times, strict=True)])
    close(predicted[-1], got)


def test_deterministic_student_is_eulers_method():
    """Two ways to the same ODE step: to the student's sampler and to the teacher's."""
    few, key = FewSteps(Shift(), 4), jax.random.key(1)
    got = sampling.sample_student(denoise(gaussian), COND, few, key, SHAPE, 'deterministic')
    noise = jax.random.normal(jax.random.split(key, 4)[0], SHAPE)
    want = sampling.sample_teacher(denoise(gaussian), COND, noise, jnp.append(few.times, 1.0))
    close(got, want)


def test_the_last_step_returns_the_prediction_itself():
    """No noise is left in the sample, in either mode."""
    constant = lambda params, x_t, t, cond: jnp.full_like(x_t, 0.25)
    for mode in sampling.STUDENT_MODES:
        got = sampling.sample_student(
            denoise(constant), None, FewSteps(Shift(3.0), 3), jax.random.key(0), SHAPE, mode)
        close(got, np.full(SHAPE, 0.25))


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match='unknown mode .*renoise'):
        params, *case = student_case(2)
        sampling.sample_student(denoise(wobble, params), *case, SHAPE, 'ddim')
    with pytest.raises(ValueError, match='unknown solver .*heun'):
        sampling.sample_teacher(denoise(gaussian), COND, jnp.ones(SHAPE), Shift().grid(2),
                                solver='rk4')


# --- Backward simulation ---


@pytest.mark.parametrize('steps', [1, 2, 4])
def test_backward_simulation_is_the_full_batch_loop(steps):
    """Row b stands at step b mod N, and is what running all rows through all steps gives."""
    shape = (8, *SHAPE[1:])
    params, cond, few, key = student_case(steps, batch=8)
    z, k = sampling.student_inputs(denoise(wobble, params), cond, few, key, shape)
    seen, _ = by_hand(params, cond, few.times, key, shape, 'renoise')
    np.testing.assert_array_equal(k, np.arange(8) % steps)
    for b in range(8):
        close(z[b], seen[b % steps][b])


def test_backward_simulation_meets_what_inference_meets():
    """Train / inference mismatch: the last row's z, predicted once more, is the sample."""
    params, cond, few, key = student_case(4)
    z, k = sampling.student_inputs(denoise(wobble, params), cond, few, key, SHAPE)
    sample = sampling.sample_student(denoise(wobble, params), cond, few, key, SHAPE)
    close(wobble(params, z, few.times[k], cond)[3], sample[3])


def test_backward_simulation_runs_only_the_rows_it_needs():
    spy = Spy(wobble)
    params, cond, few, key = student_case(4, batch=8)
    sampling.student_inputs(denoise(spy, params), cond, few, key, (8, 2, 2, 3))
    assert spy.rows == [6, 4, 2]  # N (N - 1) / 2 for each of the two groups


@pytest.mark.parametrize('steps, parts', [(1, 1), (2, 1), (4, 1), (4, 2), (2, 4)])
def test_a_rollout_is_the_full_batch_loop_shared_out(steps, parts):
    """Every example at every step once, every step equally often in each micro-batch (of every
    `parts`-th row) of a sample; z as simulated."""
    shape, spy = (8, *SHAPE[1:]), Spy(wobble)
    params, cond, few, key = student_case(steps, batch=8)
    z, samples = sampling.rollout(denoise(spy, params), cond, few, key, shape, parts)
    seen, _ = by_hand(params, cond, few.times, key, shape, 'renoise')
    assert len(samples) == steps
    for b in range(8):
        close(z[b], seen[b // parts % steps][b])
    if parts == 1:
        close(z, sampling.student_inputs(denoise(wobble, params), cond, few, key, shape)[0])
    for i, x in enumerate(samples):
        for b in range(8):
            k = (b // parts + i) % steps
            close(x[b], wobble(params, seen[k], few.times[k], cond)[b])
    assert spy.rows == [8]  # of a scan's body: N evaluations of a row, and no more


def test_no_gradient_flows_through_the_simulation():
    _, cond, few, key = student_case(4)
    total = lambda params: sampling.student_inputs(
        denoise(wobble, params), cond, few, key, SHAPE)[0].sum()
    assert float(jax.grad(total)(jnp.float32(0.8))) == 0.0


@pytest.mark.parametrize('batch, steps', [(8, 4), (6, 3), (5, 1)])
def test_every_step_is_equally_frequent(batch, steps):
    got = np.asarray(sampling.step_assignment(batch, steps))
    np.testing.assert_array_equal(np.bincount(got, minlength=steps), batch // steps)


def test_batches_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match='batch 6 must be a multiple of the 4 steps'):
        sampling.step_assignment(6, 4)


# --- Interleaving ---


@pytest.mark.parametrize('n', [1, 2, 3])
def test_interleave_keeps_an_examples_rows_together(n):
    """Side by side, so that a sharded batch stays where it is; and back again."""
    trees = [{'a': jnp.arange(4) + 10 * i, 'b': jnp.ones((4, 2)) * i} for i in range(n)]
    joined = sampling.interleave(*trees)
    np.testing.assert_array_equal(
        joined['a'], [b + 10 * i for b in range(4) for i in range(n)])
    for name, x in joined.items():
        for i, back in enumerate(sampling.deinterleave(x, n)):
            np.testing.assert_array_equal(back, trees[i][name])
