"""Health: what tells a run that works from one that is dying, in numbers and in a word.

Losses do not: the proxy loss has no fixed scale. These figures are computed on the device,
inside the generator step, from arrays it has anyway; the verdict is host arithmetic over the
logged history.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ddmd_jax.method.losses import Directions, Predictions

Array = jax.Array

# The undistilled weights' contrast may be so far from real data's for their colours to be a
# reference: in few steps they may draw nothing but pale blurs.
SOUND = 0.05
LEFT = 1 / 3  # share of what those lack by which a student that can stay pale has left them
REFERENCE = 3  # logged intervals that make up the reference the verdict compares with
HEALTHY, OVER_BAKED, CRITIC_LAGS = 'healthy', 'over-baked', 'critic lags'
WASHED_OUT, COLOUR_CAST = 'washed out', 'colour cast'
BAKED = 'stop here, lower alpha, or give the critic more updates'
COLLAPSING = 'collapsing'  # worse than over-baked: captions are about to be lost
BROKEN = 'broken'  # a figure is NaN or Inf
WORDS = (HEALTHY, OVER_BAKED, CRITIC_LAGS, WASHED_OUT, COLOUR_CAST, COLLAPSING, BROKEN)
# What the verdict looks at.
WATCHED = ('dm_rel_gap', 'dm_cos', 'x_std', 'fake_loss', 'ema_std', 'ema_start', 'ema_cast')
RATE_OVER = 10  # updates over which growth is measured, at least


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """Where the verdict turns; docs/metrics.md says how these were set.

    Attributes:
      gap_up: growth of dm_rel_gap that counts as up.
      gap_large: dm_rel_gap below this is small, however much it grew: it starts at 0.
      cos_down: growth of 1 - dm_cos that counts as down.
      std_up: x_std above that of real data that counts as up.
      ema_std_up: ema_std above that of real data, and of the undistilled weights, that counts
        as up.
      ema_std_down: ema_std below both that counts as down.
      pale, regained: ema_std below `pale` of real data's counts as down too where it has risen and
        the last third of the updates has not made up `regained` of what it lacks.
      cast: of the EMA student, against the undistilled weights.
      fake_up: growth of fake_loss, in units of the samples' variance, that counts as up.
      lost, ahead: growing on as it does, ema_std is beyond `lost` in `ahead` updates.
    """

    gap_up: float = 1.3
    gap_large: float = 0.25
    cos_down: float = 1.3
    std_up: float = 1.1
    ema_std_up: float = 1.08
    ema_std_down: float = 0.97
    pale: float = 0.95
    regained: float = 0.1
    cast: float = 0.02
    fake_up: float = 1.3
    lost: float = 2.1
    ahead: float = 25.0


SHIPPED = Thresholds()


def rms(x: Array) -> Array:
    """Root mean square over everything, a scalar."""
    return jnp.sqrt(jnp.mean(jnp.square(x)))


def image_std(x: Array) -> Array:
    """Mean over the batch of each sample's standard deviation (``[B, ...]`` -> scalar)."""
    return jnp.mean(jnp.std(x, axis=tuple(range(1, x.ndim))))


def measure(x_hat: Array, p: Predictions, delta: Directions,
            limit: float = 1.0) -> dict[str, Array]:
    """Scalars of one generator update.

    Args:
      x_hat: ``[B, ...]`` the student's samples.
      p: the predictions that were compared.
      delta: the directions it took.
      limit: magnitude beyond which a value counts as saturated (1 for pixels).

    Returns:
      dm_rel_gap = rms(Delta_DM) / rms(x_hat_real); dm_cos, mean cosine of critic's and
      teacher's predictions; dm_to_ca = rms(Delta_DM) / rms(Delta_CA) (0 without CA); x_std,
      mean per-sample standard deviation; saturation, share of values beyond `limit`; and the
      shares of samples whose normaliser was floored.
    """
    axes = tuple(range(1, x_hat.ndim))
    dot = jnp.sum(p.dm_fake * p.dm_cond, axis=axes)
    norms = jnp.sqrt(jnp.sum(jnp.square(p.dm_fake), axis=axes)
                     * jnp.sum(jnp.square(p.dm_cond), axis=axes))
    ca = rms(delta.raw_ca)
    return {
        'dm_rel_gap': rms(delta.raw_dm) / jnp.maximum(rms(p.dm_cond), 1e-8),
        'dm_cos': jnp.mean(dot / jnp.maximum(norms, 1e-8)),
        'dm_to_ca': jnp.where(ca > 0, rms(delta.raw_dm) / jnp.maximum(ca, 1e-8), 0.0),
        'x_std': image_std(x_hat),
        'saturation': jnp.mean(jnp.abs(x_hat) > limit),
        'floor_hit_ca': delta.floor_hit_ca,
        'floor_hit_dm': delta.floor_hit_dm,
    }


def probe(x: Array, start: Array, limit: float = 1.0,
          data_std: float | None = None) -> dict[str, Array]:
    """Figures of the EMA student: its samples against those it began with.

    The EMA student is what ships; it can fail where the raw student looks well.

    Args:
      x: ``[B, H, W, C]`` samples of the EMA student.
      start: those of the undistilled weights, same prompts, same noise, same sampler.
      limit: as in `measure`.
      data_std: mean per-sample standard deviation of real data, if it is known.

    Returns:
      ema_std, mean per-sample standard deviation in units of real data's, or if that is not
      known of the start's; ema_start, the start's in the same unit; ema_cast, rms over samples
      and channels of how far a sample's channel mean has moved, in units of the start's standard
      deviation (a colour cast, darkening, grey); ema_saturation.
    """
    mean = lambda a: jnp.mean(a, axis=(1, 2))
    contrast = jnp.maximum(image_std(start), 1e-8)
    unit = data_std or contrast
    return {'ema_std': image_std(x) / unit,
            'ema_start': contrast / unit,
            'ema_cast': rms(mean(x) - mean(start)) / contrast,
            'ema_saturation': jnp.mean(jnp.abs(x) > limit)}


def verdict(history: Sequence[dict[str, Any]], data_std: float | None = None,
            limits: Thresholds = SHIPPED) -> tuple[str, str]:
    """A word and its reason, from logged intervals, oldest first.

    Each has `step` and the figures of `WATCHED`, those of the EMA where they are measured.
    Compares the last interval with the mean of the first `REFERENCE`, and the EMA student
    with real data and the weights it began as. Over-baked: contrast above that of real data,
    `data_std`. Washed out, colour cast: the EMA samples have lost contrast or do not gain what they
    lack, or moved as a whole.
    Collapsing: their contrast grows so fast, or so far, that captions are about to be lost. The
    critic lags: its error on the student's samples grows, or the gap to the teacher does while
    the predictions turn apart.

    Without `data_std` the first three are not told: few steps without distillation draw pale
    images, which a student that works leaves.
    """
    if not history:
        return HEALTHY, 'too early to tell'
    unsound = [k for k in WATCHED if not math.isfinite(history[-1].get(k, 0.0))]
    if unsound:
        return BROKEN, f'{", ".join(unsound)} not finite'
    average = _collapses(history, limits)
    if average is None and data_std:
        average = _average_fails(history, limits)
    if average:
        return average
    if len(history) <= REFERENCE:
        return HEALTHY, 'too early to tell'
    now, start = history[-1], _reference(history)
    std = now['x_std'] / max(data_std or start['x_std'], 1e-8)
    seen = f'x_std x{std:.2f} that of {"real data" if data_std else "the start"}'
    lag = _critic_lags(now, start, limits)
    if data_std and std > limits.std_up:
        return OVER_BAKED, f'{seen}: {BAKED}{"; " + lag if lag else ""}'
    if lag:
        return CRITIC_LAGS, f'{lag}: more critic updates or a higher critic lr'
    return HEALTHY, f'{seen}, dm_rel_gap {now["dm_rel_gap"]:.3f}'


def before(history: Sequence[dict[str, Any]]) -> str:
    """Words on logged lines that were collapsing though the last one is not, or ''.

    Captions that were lost do not come back with the contrast.
    """
    steps = [line['step'] for line in history if line.get('health') == COLLAPSING]
    if not steps or history[-1]['step'] == steps[-1]:
        return ''
    return f'{COLLAPSING} before, from update {steps[0]} to {steps[-1]}'


def _collapses(history: Sequence[dict[str, Any]], limits: Thresholds) -> tuple[str, str] | None:
    """Verdict on where the EMA student is going, where a run probes it."""
    std, rate = history[-1].get('ema_std', 1.0), _rate(history)
    if std + limits.ahead * rate <= limits.lost:
        return None
    going = f', {rate:+.3f} an update' if std <= limits.lost else ''
    return COLLAPSING, (f"the EMA student's contrast x{std:.2f}{going}: "
                        'captions are about to be lost; stop, and take an earlier checkpoint')


def _rate(history: Sequence[dict[str, Any]]) -> float:
    """Growth of ema_std an update, since the newest line `RATE_OVER` updates back or more.

    0 if it falls, or if there is no such line yet. The undistilled weights at step 0 are not
    taken for one: a run that goes on from a student (`init_from`) does not begin there.
    """
    now = history[-1]
    far = (h for h in reversed(history[:-1]) if now['step'] - h['step'] >= RATE_OVER)
    then = next(far, None) if 'ema_std' in now else None
    if then is None or 'ema_std' not in then:
        return 0.0
    return max(0.0, now['ema_std'] - then['ema_std']) / (now['step'] - then['step'])


def _average_fails(history: Sequence[dict[str, Any]],
                   limits: Thresholds) -> tuple[str, str] | None:
    """Verdict on the EMA student by itself, where a run probes it."""
    now = history[-1]
    std, cast, start = now.get('ema_std', 1.0), now.get('ema_cast', 0.0), now.get('ema_start', 1.0)
    seen = (f"the EMA student's contrast x{std:.2f} (undistilled x{start:.2f}), its colours moved "
            f'by {cast:.3f}')
    if std > limits.ema_std_up * max(start, 1.0):
        return OVER_BAKED, f'{seen}: {BAKED}'
    steadier = 'lower the learning rates or raise the batch'
    if std < limits.ema_std_down * min(start, 1.0):
        return WASHED_OUT, f'{seen}: {steadier}'
    if _stays_pale(history, limits):
        return WASHED_OUT, f'{seen}, and hardly rises: let tau_CA begin noisier, or raise alpha'
    # Where few steps without distillation fail, a student that works leaves their colours.
    if cast > limits.cast and abs(start - 1) <= SOUND:
        return COLOUR_CAST, f'{seen}: {steadier}'
    return None


def _stays_pale(history: Sequence[dict[str, Any]], limits: Thresholds) -> bool:
    """Whether the EMA student has risen, is short of real contrast, and rises no longer.

    What begins pale, as few steps do without distillation, is given time: until it has left that,
    it has only been averaged over few updates. Thirds of the run so far are the one clock that fits
    runs of any length.
    """
    now = history[-1]
    std, step = now.get('ema_std', 1.0), now.get('step', 0)
    start = now.get('ema_start', 1.0)
    if std >= limits.pale or len(history) <= REFERENCE or std - start < LEFT * (1 - start):
        return False
    past = (h for h in reversed(history) if h['step'] <= 2 / 3 * step)
    then: dict[str, Any] = next(past, {})
    return 'ema_std' in then and std - then['ema_std'] < limits.regained * (1 - std)


def _reference(history: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means of the numbers of the first `REFERENCE` intervals."""
    first = history[:REFERENCE]
    return {k: sum(h[k] for h in first) / REFERENCE for k in ('dm_rel_gap', 'dm_cos', 'x_std')} | {
        'fake': sum(_fake(h) for h in first) / REFERENCE}


def _fake(values: dict[str, Any]) -> float:
    """The critic's loss on the student's samples in units of their variance."""
    return values.get('fake_loss', 0.0) / max(values['x_std'] ** 2, 1e-8)


def _critic_lags(now: dict[str, Any], start: dict[str, float], limits: Thresholds) -> str:
    """A sign that the critic does not keep up, or ''."""
    gap = now['dm_rel_gap'] / max(start['dm_rel_gap'], 1e-8)
    apart = (1 - now['dm_cos']) / max(1 - start['dm_cos'], 1e-8)
    fake = _fake(now) / max(start['fake'], 1e-8)
    if fake > limits.fake_up:
        return f'fake_loss in units of the samples\' variance x{fake:.2f} since the start'
    # It starts at 0, critic and teacher being equal: a small gap is none, however it grew.
    if gap > limits.gap_up and now['dm_rel_gap'] > limits.gap_large and apart > limits.cos_down:
        return f'dm_rel_gap x{gap:.2f} and 1 - dm_cos x{apart:.2f} since the start'
    return ''
