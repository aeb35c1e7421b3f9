"""The paper's claims, what the runs say of each, and the verdict.

Each claim is a function of the results, ``{experiment: {seed: result}}``, and has parts: a sentence
that can be wrong, the figure it is about, that figure for each seed, and the bound it has to pass.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from ddmd_jax.study import statistics as rule
from ddmd_jax.study.suites import BASE

Results = Mapping[str, Mapping[int, Mapping[str, Any]]]
Figure = Callable[[Mapping[str, Any]], float]

# Distances that differ by less than a quarter are alike. Their logarithms are compared, as a
# collapsed student's is many times a good one's.
EQUAL_FRECHET = math.log(1.25)
EQUAL_STD = 0.05  # share by which a contrast may differ from real images'


@dataclasses.dataclass(frozen=True)
class Part:
    """One sentence of a claim; `values` by seed, `bound` in words."""

    sentence: str
    figure: str
    values: dict[int, float]
    bound: str
    verdict: str


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim of the paper: its number in the list, a title, the paper's statement, its parts.

    `shows` names the experiments whose curves and pictures go with it, `curve` what is drawn.
    """

    number: int
    title: str
    statement: str
    parts: tuple[Part, ...]
    shows: tuple[str, ...]
    curve: str = 'ema_image_std'

    @property
    def verdict(self) -> str:
        return rule.together([part.verdict for part in self.parts])


# --- Figures of one result ---


def frechet(result: Mapping[str, Any]) -> float:
    """Logarithm of the Frechet distance of the final average to real images."""
    return math.log(result['student']['frechet'])


def frechet_grown(result: Mapping[str, Any]) -> float:
    """The same, less that of the undistilled weights in as many steps, by Euler."""
    return frechet(result) - math.log(result['few_step']['frechet'])


def frechet_since(result: Mapping[str, Any]) -> float:
    """The same, less that of what the student was at the start, in its own sampler."""
    return frechet(result) - math.log(result['start']['frechet'])


def guided_share(result: Mapping[str, Any]) -> float:
    """How much of the way to the guided, many-step teacher's samples the live student has come."""
    return result['figures']['guided_share']


def std_ratio(result: Mapping[str, Any]) -> float:
    """Contrast of the live student's samples to that of the weights it began with."""
    return result['figures']['std_ratio']


def trend(name: str) -> Figure:
    """Rank correlation of a curve with the step: 1 if it only rises."""
    def figure(result: Mapping[str, Any]) -> float:
        values = _numbers(result, name)
        return float(stats.spearmanr(range(len(values)), values).statistic)
    return figure


def low_share(result: Mapping[str, Any]) -> float:
    """Share of low frequencies in what has changed of the live student's samples."""
    return result['figures']['bands_live'][0]


def observer_cos(result: Mapping[str, Any]) -> float:
    return result['figures']['observer_cos']


def _numbers(result: Mapping[str, Any], name: str) -> list[float]:
    return [v for v in result['curves'].get(name, ()) if v is not None]


# --- Parts ---


def _values(results: Results, name: str, figure: Figure) -> dict[int, float]:
    """`figure` of an experiment for each seed that has one; a run that broke off has none."""
    found = {}
    for seed, result in sorted(results.get(name, {}).items()):
        if 'failed' in result:
            continue
        try:
            found[seed] = float(figure(result))
        except (KeyError, IndexError, ValueError, TypeError, ArithmeticError):  # it has none
            continue
    return {seed: value for seed, value in found.items() if np.isfinite(value)}


def _verdict(results: Results, names: Sequence[str], values: Mapping[int, float],
             decide: Callable[[Sequence[float]], str]) -> str:
    """Of a part that experiments `names` are asked.

    It cannot hold while one of their runs broke off: those that are left may be the lucky ones.
    """
    found = decide(list(values.values())) if values else rule.OPEN
    broke = any('failed' in run for name in names for run in results.get(name, {}).values())
    return rule.OPEN if broke and found == rule.HOLDS else found


def alone(results: Results, sentence: str, words: str, name: str, figure: Figure, *,
          over: float | None = None, under: float | None = None) -> Part:
    """A part about one experiment's figure, above `over` or below `under`."""
    values = _values(results, name, figure)
    if over is not None:
        return Part(sentence, words, values, f'above {over:g}',
                    _verdict(results, [name], values, lambda v: rule.above(v, over)))
    return Part(sentence, words, values, f'below {under:g}',
                _verdict(results, [name], values, lambda v: rule.below(v, under)))


def apart(results: Results, sentence: str, words: str, more: str, less: str, figure: Figure,
          over: float = 0.0) -> Part:
    """A part about the difference of one figure between two experiments at the same seed."""
    a, b = _values(results, more, figure), _values(results, less, figure)
    values = {seed: a[seed] - b[seed] for seed in a if seed in b}
    return Part(sentence, f'{words}: {more} - {less}', values, f'above {over:g}',
                _verdict(results, [more, less], values, lambda v: rule.above(v, over)))


def alike(results: Results, sentence: str, words: str, one: str, two: str, figure: Figure,
          margin: float) -> Part:
    """A part that says two experiments to be the same up to `margin`."""
    a, b = _values(results, one, figure), _values(results, two, figure)
    values = {seed: a[seed] - b[seed] for seed in a if seed in b}
    return Part(sentence, f'{words}: {one} - {two}', values, f'within {margin:g} of 0',
                _verdict(results, [one, two], values, lambda v: rule.within(v, margin)))


def sound(results: Results, sentence: str, name: str) -> Part:
    """A part that says an experiment's images to have the contrast of real ones.

    Few steps without distillation draw pale images: what keeps their contrast would be no good.
    """
    contrast = lambda result: result['student']['std'] / result['real']['std'] - 1
    values = _values(results, name, contrast)
    return Part(sentence, 'contrast to real images\', less 1', values, f'within {EQUAL_STD:g} of 0',
                _verdict(results, [name], values, lambda v: rule.within(v, EQUAL_STD)))


# --- The six claims (docs/study.md) ---


def engine(r: Results) -> Claim:
    return Claim(
        1, 'CA is the engine, and does not stop',
        'CA alone turns a multi-step model into a few-step one, then over-saturates and collapses; '
        'the variance of what it generates grows monotonically (Fig. 3).', (
            alone(r, 'CA alone takes few-step samples towards the guided many-step teacher\'s.',
                  'share of the way to them', 'ca_only', guided_share, over=0.0),
            alone(r, 'Its variance only grows.', 'rank correlation of x_std with the step',
                  'ca_only', trend('x_std'), over=0.9),
            apart(r, 'It grows beyond what CA + DM has.', 'contrast to that at the start',
                  'ca_only', BASE, std_ratio),
            alone(r, 'It ends further from real images than it began.',
                  'log frechet less the start\'s', 'ca_only', frechet_since, over=0.0)),
        ('ca_only', BASE), 'x_std')


def regulariser(r: Results) -> Claim:
    return Claim(
        2, 'DM is the regulariser', 'DM alone is stable but far weaker than CA or CA + DM.', (
            sound(r, 'DM alone ends with the contrast of real images.', 'dm_only'),
            apart(r, 'It goes less of the way than CA + DM.', 'share of the way to the guided '
                  'teacher', BASE, 'dm_only', guided_share)),
        ('dm_only', BASE, 'ca_only'), 'x_std')


def others(r: Results) -> Claim:
    return Claim(
        3, 'Other regularisers hold CA, and fall short of DM',
        'CA + mean-variance is stable but ends below CA + DM; CA + GAN controls the variance but '
        'is fragile (collapsed at 4k iterations there).', (
            apart(r, 'Mean-variance holds the variance of CA.', 'contrast to that at the start',
                  'ca_only', 'ca_mv', std_ratio),
            apart(r, 'CA + mean-variance ends further from real images than CA + DM.',
                  'log frechet', 'ca_mv', BASE, frechet),
            apart(r, 'GAN holds the variance of CA.', 'contrast to that at the start', 'ca_only',
                  'ca_gan', std_ratio)),
        ('ca_mv', 'ca_gan', BASE, 'ca_only'), 'x_std')


def levels(r: Results) -> Claim:
    noisy, clean, everywhere = 'one_step_noisy', 'one_step_clean', 'one_step_all'
    return Claim(
        4, 'Where CA looks is what it shapes',
        'CA at noisy tau shapes low frequencies (composition, colour); at clean tau, high '
        'frequencies; CA at the clean end only ([0.7, 1]) collapses.', (
            apart(r, 'At the noisy end more of the change is in low frequencies.',
                  'share of low frequencies', noisy, clean, low_share),
            apart(r, 'CA at the clean end only ends further from real images.', 'log frechet',
                  clean, everywhere, frechet)),
        (noisy, 'one_step_middle', clean, everywhere), 'x_std')


def observer(r: Results) -> Claim:
    return Claim(
        5, 'An observer sees what DM would cancel',
        'A critic that is trained beside a CA-only run, and never used, keeps the artefacts that '
        'the teacher\'s prediction removes: Delta_DM would cancel them.', (
            alone(r, 'The unused DM direction points back along what CA has changed.',
                  'cosine of Delta_DM with the change of the samples', 'ca_only', observer_cos,
                  under=0.0),),
        ('ca_only',), 'dm_rel_gap')


def schedules(r: Results) -> Claim:
    return Claim(
        6, 'Two levels rather than one, and CA at the cleaner',
        'decoupled_full is about coupled_shared; constrained and hybrid are clearly better; hybrid '
        'is best (Table 1).', (
            alike(r, 'decoupled_full is about coupled_shared.', 'log frechet', 'decoupled_full',
                  'coupled_shared', frechet, EQUAL_FRECHET),
            apart(r, 'hybrid is nearer to real images than coupled_shared.', 'log frechet',
                  'coupled_shared', BASE, frechet),
            apart(r, 'constrained is nearer to real images than full.', 'log frechet',
                  'decoupled_full', 'decoupled_constrained', frechet),
            apart(r, 'hybrid is nearer to real images than full.', 'log frechet', 'decoupled_full',
                  BASE, frechet),
            apart(r, 'hybrid is nearer to real images than constrained.', 'log frechet',
                  'decoupled_constrained', BASE, frechet)),
        ('coupled_shared', 'decoupled_full', 'decoupled_constrained', BASE, 'dmd2'), 'x_std')


# --- What the suite of steps is asked ---


def difference(row: str, column: str, times: float = 1.0) -> Figure:
    """A column of the evaluation: the student's value less that of another row, or `times` it."""
    return lambda result: result['student'][column] - times * result[row][column]


def ratio(row: str, column: str) -> Figure:
    """Likewise, divided by what is never 0."""
    return lambda result: result['student'][column] / result[row][column]


def like_guided(r: Results) -> Claim:
    four = lambda sentence, words, figure, **bound: alone(
        r, sentence, words, 'hybrid_4', figure, **bound)
    return Claim(
        1, 'Four steps draw what fifty guided ones draw',
        'The student of four evaluations is compared with its teacher of a hundred.', (
            four('Captions: at most 5 points fewer are right.', 'share right less guided\'s',
                 difference('guided', 'all_match'), over=-0.05),
            four('Held-out captions: likewise.', 'share right less guided\'s',
                 difference('guided', 'all_match_held_out'), over=-0.05),
            four('Colours are as true.', 'colour error less guided\'s',
                 difference('guided', 'colour_error'), under=0.0),
            four('Contrast is not above that of real images by 5 %.', 'std over real\'s',
                 ratio('real', 'std'), under=1.05),
            four('Nor below by 5 %.', 'std over real\'s', ratio('real', 'std'), over=0.95)),
        ('hybrid_4',), 'ema_image_std')


def few_steps(r: Results) -> Claim:
    return Claim(
        2, 'Without distillation few steps fail',
        'The same weights in as few steps, before distillation.', (
            alone(r, 'In four steps, 15 points fewer captions are right.',
                  'share right less theirs', 'hybrid_4', difference('few_step', 'all_match'),
                  over=0.15),
            alone(r, 'Their Frechet distance is at least twice the student\'s.',
                  'log frechet less theirs', 'hybrid_4', frechet_grown, under=-math.log(2)),
            alone(r, 'In one step, at most half as many captions are right.',
                  'share right less twice theirs', 'hybrid_1',
                  difference('few_step', 'all_match', 2.0), over=0.0)),
        ('hybrid_1', 'hybrid_2', 'hybrid_4', 'hybrid_8'), 'ema_match')


def beside_dmd2(r: Results) -> Claim:
    return Claim(
        3, 'Decoupled is nearer to real images than coupled, at every number of steps',
        'CA + DM with schedules of their own beat DMD2\'s common one (Table 1).', tuple(
            apart(r, f'In {k} step{"s" * (k > 1)}.', 'log frechet', f'dmd2_{k}', f'hybrid_{k}',
                  frechet) for k in (1, 2, 4, 8)),
        ('hybrid_4', 'dmd2_4', 'hybrid_1', 'dmd2_1'), 'ema_match')


def low_rank(r: Results) -> Claim:
    parts = []
    for name in ('lora16_4', 'lora32_4'):
        parts += [
            apart(r, f'{name}: at most 5 points fewer captions are right.',
                  'share right', name, 'hybrid_4', lambda x: x['student']['all_match'], -0.05),
            apart(r, f'{name}: its Frechet distance is at most a quarter larger.',
                  'log frechet', 'hybrid_4', name, frechet, -EQUAL_FRECHET)]
    return Claim(
        4, 'LoRA does what full fine-tuning does',
        'Student and critic are low-rank adapters over the teacher, with as many updates.',
        tuple(parts), ('hybrid_4', 'lora16_4', 'lora32_4'), 'ema_std')


def one_rollout(r: Results) -> Claim:
    return Claim(
        5, 'One rollout serves all updates of a step',
        'The critic\'s five updates and the generator\'s learn from one way of the student through '
        'its steps, on one batch of prompts: 14 network evaluations rather than 24.', (
            apart(r, 'At most 5 points fewer captions are right.', 'share right', 'rollout5_4',
                  'apart5_4', lambda x: x['student']['all_match'], -0.05),
            apart(r, 'Its Frechet distance is at most a quarter larger.', 'log frechet',
                  'apart5_4', 'rollout5_4', frechet, -EQUAL_FRECHET)),
        ('apart5_4', 'rollout5_4', 'hybrid_4'), 'ema_std')


CLAIMS = {'paper': (engine, regulariser, others, levels, observer, schedules),
          'steps': (like_guided, few_steps, beside_dmd2, low_rank, one_rollout)}


def judge(results: Results, suite: str = 'paper') -> list[Claim]:
    """All claims that a suite is about, in the paper's order."""
    return [claim(results) for claim in CLAIMS[suite]]
