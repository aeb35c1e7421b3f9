"""Experiments as fields of a config, and the suites made of them."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

from ddmd_jax.config import field

BASE = 'hybrid'  # what others are compared with: CA + DM, the paper's schedule, 4 steps


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A recipe: what it is in words, and the fields in which it differs from the config.

    `quick` ones are those of a shortened suite. A field that is `Times` something is that many
    times what the run would have without the experiment.
    """

    name: str
    words: str
    fields: Mapping[str, Any]
    quick: bool = False


@dataclasses.dataclass(frozen=True)
class Times:
    """A factor of a number in the config."""

    factor: float


@dataclasses.dataclass(frozen=True)
class Suite:
    """Experiments, how many seeds each has, and whether the last weights are looked at.

    `scales` are fields of every run, by teacher, then `full` or `quick`: a teacher that is not
    there keeps the config's own. `needs` are fields that may not be 0. Recipe and scales were
    chosen at seed 0, which is why a suite that tells how good something is begins with another.
    """

    name: str
    title: str  # of its page, before ` on TEACHER`
    experiments: tuple[Experiment, ...]
    seeds: int
    looked_at: bool
    scales: Mapping[str, Mapping[str, Mapping[str, Any]]]
    needs: tuple[str, ...] = ()
    first_seed: int = 0


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

# The config's own recipe at every number of steps, beside two others with as many updates. One
# experiment draws the guided teacher too: it is the same in all that have its seed.
GUIDED = {'eval.teacher_steps': 50, 'eval.guidance': 2.0}
RECIPES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    'hybrid': ('CA + DM, decoupled_hybrid', {}),
    'dmd2': ('classic DMD2: one tau, one noise, its normaliser',
             {'method.schedule': 'coupled_shared', 'method.normaliser': 'dmd2'}),
    'ca_only': ('CA alone', {'method.weight_dm': 0.0}),
}
STEPS = tuple(
    Experiment(f'{name}_{steps}', f'{words}; {steps} step{"s" * (steps > 1)}',
               {**fields, **(GUIDED if (name, steps) == ('hybrid', 4) else {}),
                'student.steps': steps},
               quick=steps in (1, 4))
    for name, (words, fields) in RECIPES.items() for steps in (4, 1, 2, 8)) + tuple(
    Experiment(f'lora{rank}_4', f'CA + DM by LoRA of rank {rank}; 4 steps',
               {f'{network}.adapter.{name}': value for network in ('student', 'critic')
                for name, value in (('kind', 'lora'), ('rank', rank))}
               # Ten times the rates of full fine-tuning: a factor that begins at 0 moves little.
               | {'optim.student.lr': 3e-4, 'optim.critic.lr': 1e-3, 'student.steps': 4})
    for rank in (16, 32)) + tuple(
    # 24 network evaluations of a row for an update of the student, and 14; half as many updates.
    Experiment(f'{name}_4', f'five updates of the critic, {words}; 4 steps',
               {'critic.updates': 5, 'critic.order': order, 'student.steps': 4,
                'train.steps': 80})
    for name, words, order in (
        ('apart5', 'each on samples of its own', 'critic_first'),
        ('rollout5', 'all on one rollout of the student', 'one_rollout')))

# Steps of the map below: learning rates and alpha as factors of the config's.
STUDENT_LR, CRITIC_LR = (0.5, 1.0, 2.0, 3.0), (0.03, 0.3, 3.0)
UPDATES, ALPHA = (1, 3), (0.5, 1.5, 4.5)


def _robustness() -> tuple[Experiment, ...]:
    return tuple(
        Experiment(f's{s:g}_c{c:g}_u{u}_a{a:g}',
                   f'student lr x{s:g}, critic lr x{c:g}, {u} critic updates, alpha x{a:g}',
                   {'optim.student.lr': Times(s), 'optim.critic.lr': Times(c),
                    'critic.updates': u, 'method.alpha': Times(a)},
                   quick=u == 1 and s in (0.5, 3.0) and c != 0.3 and a != 1.5)
        for a, u, s, c in itertools.product(ALPHA, UPDATES, STUDENT_LR, CRITIC_LR))


# What every run of a study measures, whatever it trains: a line of figures and the judge every few
# updates; the evaluation without the guided teacher, which is the same in all of them.
MEASURED = {'log.every': 5, 'log.images_every': 1_000_000, 'checkpoint.every': 20,
            'checkpoint.keep': 1, 'eval.teacher_steps': 1, 'eval.guidance': 1.0}
CONSTANT = {'optim.student.decay': 0.0, 'optim.critic.decay': 0.0}
FEW = {'eval.prompts': 64, 'eval.held_out': 32, 'eval.batch': 96}
# Scales of the embedded teacher. It needs larger steps than its shipped recipe takes, which was
# tuned until nothing goes wrong: in the claims and on the map it is wanted to.
_PAPER = {'method.alpha': 3.0, **CONSTANT}
# One step: the student that has no second one to mend what the first has spoilt.
_MAP = {'data.global_batch': 8, 'student.steps': 1, 'method.alpha': 4.0, **CONSTANT, **FEW}
SUITES = {suite.name: suite for suite in (
    Suite('paper', 'The claims of Decoupled DMD', PAPER, 3, True, {'emoji': {
        'full': {**_PAPER, 'train.steps': 80, 'data.global_batch': 16, 'log.judge': 96,
                 'optim.student.lr': 1.5e-4, 'optim.critic.lr': 6e-4},
        'quick': {**_PAPER, **FEW, 'train.steps': 20, 'data.global_batch': 8, 'log.judge': 48,
                  'optim.student.lr': 6e-5, 'optim.critic.lr': 3e-4}}}, first_seed=1),
    Suite('steps', 'Students of few steps', STEPS, 3, False, {'emoji': {
        'full': {}, 'quick': {**FEW, 'train.steps': 20, 'data.global_batch': 8}}}, first_seed=1),
    Suite('robustness', 'Where the recipe stays healthy', _robustness(), 1, False, {'emoji': {
        'full': {**_MAP, 'train.steps': 240, 'log.judge': 192, 'log.every': 10,
                 'checkpoint.every': 80, 'optim.student.lr': 2e-5, 'optim.critic.lr': 1e-4},
        'quick': {**_MAP, 'train.steps': 60, 'log.judge': 96,
                  'optim.student.lr': 6e-5, 'optim.critic.lr': 3e-4}}},
        ('log.judge', 'log.probe')),
)}


def fields(suite: Suite, experiment: Experiment, config: Any, quick: bool, seed: int,
           own: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Fields of one run, dotted, over those of `config`; `own` are the caller's.

    The experiment's go over the caller's, and those over the suite's scale for that teacher.
    """
    scale = suite.scales.get(config.teacher.name, {}).get('quick' if quick else 'full', {})
    base = {**MEASURED, **scale, **(own or {})}
    times = lambda name, factor: float(f'{factor * base.get(name, field(config, name)):.6g}')
    changed = {name: times(name, value.factor) if isinstance(value, Times) else value
               for name, value in experiment.fields.items()}
    return {**base, **changed, 'seed': seed}


def lacking(suite: Suite, run: Mapping[str, Any], config: Any) -> list[str]:
    """Fields that the suite needs and that are 0 in a run with the fields `run`."""
    return [name for name in suite.needs if not run.get(name, field(config, name))]


def find(name: str) -> Suite:
    """A suite by its name.

    Raises:
      ValueError: an unknown one.
    """
    if name not in SUITES:
        raise ValueError(f'no suite {name!r}; known: {", ".join(SUITES)}')
    return SUITES[name]


def chosen(suite: Suite, quick: bool, only: tuple[str, ...] = ()) -> tuple[Experiment, ...]:
    """Experiments of a suite; of its shortened form with `quick`; those named with `only`.

    Raises:
      ValueError: an unknown name.
    """
    known = {e.name: e for e in suite.experiments}
    unknown = [name for name in only if name not in known]
    if unknown:
        raise ValueError(f'no experiment {unknown[0]!r}; known: {", ".join(known)}')
    if only:
        return tuple(known[name] for name in only)
    return tuple(e for e in known.values() if e.quick or not quick)
