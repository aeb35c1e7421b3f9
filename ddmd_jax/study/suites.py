"""What is run: experiments as fields of a config, and the suites that are made of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

BASE = 'hybrid'  # what others are compared with: CA + DM, the paper's schedule, 4 steps


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A recipe: what it is in words, and the fields in which it differs from the config.

    `quick` ones are those of a shortened suite.
    """

    name: str
    words: str
    fields: Mapping[str, Any]
    quick: bool = False


def _one_step(name: str, words: str, low: float, high: float) -> Experiment:
    return Experiment(f'one_step_{name}', f'one step, tau_CA in [{low:g}, {high:g}]: {words}',
                      {'student.steps': 1, 'method.tau_ca': (low, high)}, quick=name != 'middle')


PAPER = (
    Experiment(BASE, 'CA + DM, decoupled_hybrid, 4 steps: the paper\'s method', {}, quick=True),
    # DM has no weight, so that the critic, which is trained all the same, is an observer.
    Experiment('ca_only', 'CA alone, beside a critic that only watches',
               {'method.weight_dm': 0.0}, quick=True),
    Experiment('dm_only', 'DM alone', {'method.weight_ca': 0.0}, quick=True),
    Experiment('ca_mv', 'CA + mean-variance', {
        'method.weight_dm': 0.0, 'method.mean_variance.weight': 1.0}, quick=True),
    Experiment('ca_gan', 'CA + GAN, with DMD2\'s weights', {
        'method.weight_dm': 0.0, 'method.gan.weight': 5e-3, 'method.gan.critic_weight': 1e-2}),
    Experiment('coupled_shared', 'one tau and one noise for both terms',
               {'method.schedule': 'coupled_shared'}, quick=True),
    Experiment('dmd2', 'classic DMD2: coupled_shared with its normaliser',
               {'method.schedule': 'coupled_shared', 'method.normaliser': 'dmd2'}),
    Experiment('decoupled_full', 'both tau in [0, 1]', {'method.schedule': 'decoupled_full'}),
    Experiment('decoupled_constrained', 'both tau in [t, 1]',
               {'method.schedule': 'decoupled_constrained'}),
    _one_step('all', 'everywhere', 0.0, 0.98),
    _one_step('noisy', 'the noisy end', 0.0, 0.3),
    _one_step('middle', 'between', 0.3, 0.7),
    _one_step('clean', 'the clean end', 0.7, 0.98),
    Experiment('two_steps', 'CA + DM, 2 steps', {'student.steps': 2}),
    Experiment('eight_steps', 'CA + DM, 8 steps', {'student.steps': 8}),
)
SUITES = {'paper': PAPER}

# What every run of a study measures, whatever it trains: a line of figures and the judge every few
# updates; the evaluation without the guided teacher, which is the same in all of them.
MEASURED = {'log.every': 5, 'log.images_every': 1_000_000, 'checkpoint.every': 20,
            'checkpoint.keep': 1, 'eval.teacher_steps': 1, 'eval.guidance': 1.0}
# The embedded teacher needs larger steps than its shipped recipe takes, which was tuned until
# nothing goes wrong: here it is wanted to.
SCALES: dict[str, dict[str, dict[str, Any]]] = {
    'emoji': {
        'full': {'train.steps': 80, 'data.global_batch': 32, 'method.alpha': 3.0,
                 'optim.student.lr': 1e-4, 'optim.critic.lr': 2e-4, 'optim.student.decay': 0.0,
                 'optim.critic.decay': 0.0, 'log.judge': 96},
        'quick': {'train.steps': 15, 'data.global_batch': 16, 'method.alpha': 3.0,
                  'optim.student.lr': 2e-4, 'optim.critic.lr': 4e-4, 'optim.student.decay': 0.0,
                  'optim.critic.decay': 0.0, 'log.judge': 48, 'eval.prompts': 64,
                  'eval.held_out': 32, 'eval.batch': 96},
    },
}


def fields(experiment: Experiment, teacher: str, quick: bool, seed: int,
           own: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Fields of one run, dotted, over those of the config; `own` are the caller's and win.

    Another teacher than the embedded one keeps the config's own scale.
    """
    scale = SCALES.get(teacher, {}).get('quick' if quick else 'full', {})
    return {**MEASURED, **scale, **(own or {}), **experiment.fields, 'seed': seed}


def chosen(suite: str, quick: bool, only: tuple[str, ...] = ()) -> tuple[Experiment, ...]:
    """Experiments of a suite; of its shortened form with `quick`; those named with `only`.

    Raises:
      ValueError: an unknown suite or name.
    """
    if suite not in SUITES:
        raise ValueError(f'no suite {suite!r}; known: {", ".join(SUITES)}')
    known = {e.name: e for e in SUITES[suite]}
    unknown = [name for name in only if name not in known]
    if unknown:
        raise ValueError(f'no experiment {unknown[0]!r}; known: {", ".join(known)}')
    if only:
        return tuple(known[name] for name in only)
    return tuple(e for e in known.values() if e.quick or not quick)
