"""The figures of the tables by name: which scorer, in which unit, of each image or of a whole set.

One metric that cannot be measured leaves a gap and stops no other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from ddmd_jax.evaluation import distances, statistics
from ddmd_jax.evaluation.moments import Moments, frechet
from ddmd_jax.evaluation.scores import outside, scorers
from ddmd_jax.parallel import sharding
from ddmd_jax.util.errors import UserError

ROWS = 8  # pictures that a device scores at a time, whatever the batch and the devices


class MetricError(UserError):
    """A figure that cannot be measured."""


class Pictures(Protocol):
    """n pictures ``[H, W, 3] uint8`` of any sizes, read when they are asked for."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[np.ndarray]: ...


@dataclasses.dataclass(frozen=True)
class Metric:
    """A figure.

    Attributes:
      scorer: key of `scorers.SCORERS` or `outside.OUTSIDE`, or 'image_reward'.
      factor: of the scorer's unit, for the table.
      between: ``(features of real pictures, of drawn ones) -> figure``; None: the mean of a
        figure that every picture has.
    """

    scorer: str
    factor: float = 1.0
    between: Callable[[np.ndarray, np.ndarray], float] | None = None


def _frechet(real: np.ndarray, drawn: np.ndarray) -> float:
    return frechet(Moments.of(real), Moments.of(drawn))


def _neighbour(name: str) -> Callable[[np.ndarray, np.ndarray], float]:
    return lambda real, drawn: distances.neighbours(real, drawn)[name]


METRICS = {
    'clip': Metric('clip_dmd2', 100), 'clip_l14': Metric('clip_l14', 100),
    'clip_h14': Metric('clip_h14', 100), 'hps_v2': Metric('hps_v2', 100),
    'hps_v2.1': Metric('hps_v2.1', 100), 'pickscore': Metric('pickscore'),
    'aesthetic': Metric('aesthetic'), 'image_reward': Metric('image_reward', 100),
    'hps_v3': Metric('hps_v3'),
    'fid': Metric('fid_features_dmd2', between=_frechet),
    'fid_clean': Metric('fid_features', between=_frechet),
    'patch_fid': Metric('fid_features_patch', between=_frechet),
    'kid': Metric('fid_features', between=lambda real, drawn: distances.kid(real, drawn)[0]),
    'cmmd': Metric('cmmd_features', between=distances.cmmd),
    **{name: Metric('fid_features', between=_neighbour(name))
       for name in ('precision', 'recall', 'density', 'coverage')}}


OUTSIDE = [name for name, metric in METRICS.items() if metric.scorer in outside.OUTSIDE]


@dataclasses.dataclass(frozen=True)
class Given:
    """What is measured with.

    Attributes:
      weights: paths of a metric's weights by its name, in the order of its scorer's sources; of
        ImageReward the vocabulary first. What is not named is asked of the hub.
      reference: real pictures, for what is measured between two sets; or None.
      mesh: of this process's own devices.
      table: the scorers by name; tests put small ones there.
      pythons: by the name of a metric of `outside.OUTSIDE`, the Python that measures it.
    """

    weights: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    reference: Pictures | None = None
    mesh: Mesh | None = None
    table: Mapping[str, scorers.Scorer] = dataclasses.field(
        default_factory=lambda: scorers.SCORERS)
    pythons: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def scorer(self, name: str) -> tuple[scorers.Scorer, list[str]]:
        """(the scorer of the metric `name`, paths of its weights)."""
        paths, key = list(self.weights.get(name, ())), METRICS[name].scorer
        if key == 'image_reward' and key not in self.table:
            found = scorers.image_reward(paths[0] if paths else str(scorers.BERT.hub))
            paths = paths[1:]
        else:
            found = self.table[key]
        for source in found.sources[len(paths):]:
            if source.hub is None:
                raise MetricError(f'{name} wants {source.file} ({source.remark}); give its path: '
                                  f'--weights={name}=PATH')
            paths.append(source.hub)
        return found, paths


def measure(names: Sequence[str], given: Given, pictures: Pictures, prompts: Sequence[str],
            ) -> tuple[dict[str, np.ndarray], dict[str, float], dict[str, str]]:
    """What can be measured of pictures and their prompts.

    Returns:
      (figures of each picture ``[n]``, figures of all of them, why a metric has none), by name.
    """
    each: dict[str, np.ndarray] = {}
    whole: dict[str, float] = {}
    gaps: dict[str, str] = {}
    seen: dict[tuple[str, ...], tuple[np.ndarray, np.ndarray]] = {}  # features: (drawn, real)
    for name in names:
        metric = METRICS.get(name)
        try:
            if metric is None:
                raise MetricError(f'no metric {name!r}; known: {", ".join(METRICS)}')
            if metric.between and given.reference is None:
                raise MetricError(f'{name} compares with real pictures; give their folder with '
                                  '--reference')
            if other := outside.OUTSIDE.get(metric.scorer):
                if name not in given.pythons:
                    raise MetricError(f'{name} is measured by the package {other.package} in an '
                                      f'environment of its own; name its Python: --python={name}='
                                      'PATH')
                each[name] = metric.factor * outside.run(
                    other, given.pythons[name], given.weights.get(name, ()), pictures, prompts)
                continue
            scorer, paths = given.scorer(name)
            key = (metric.scorer, *paths)
            if key not in seen:
                params = scorers.load(scorer, paths, given.mesh)
                run = lambda x, texts=(), s=scorer, p=params: _run(s, p, x, texts, given.mesh)
                drawn = run(pictures, prompts if scorer.prompted else ())
                real = run(given.reference) if metric.between else drawn
                if not metric.between:
                    each[name] = metric.factor * drawn.astype(np.float64)
                    continue
                seen[key] = drawn, real
            drawn, real = seen[key]
            assert metric.between is not None
            whole[name] = metric.between(real, drawn)
            if not np.isfinite(whole[name]):
                raise MetricError(f'{name} is {whole.pop(name)}, no figure')
        except (UserError, ValueError) as e:  # ValueError: too few pictures for a distance
            gaps[name] = ' '.join(str(e).split())
    return each, whole, gaps


def _run(scorer: scorers.Scorer, params: object, pictures: Pictures | None,
         texts: Sequence[str], mesh: Mesh | None) -> np.ndarray:
    ways = 1 if mesh is None else sharding.batch_ways(mesh)
    assert pictures is not None
    return scorers.run(scorer, params, pictures, texts, ROWS * ways, mesh)


def by_group(scores: np.ndarray, prompts: Sequence[str],
             groups: Sequence[str]) -> dict[str, statistics.Interval]:
    """Means over prompts with their intervals, of every group, and of all under ''."""
    scores = np.asarray(scores)
    found = {group: [i for i, g in enumerate(groups) if g == group]
             for group in dict.fromkeys(groups) if group}
    return {group: statistics.bootstrap(list(statistics.by_prompt(
        scores[rows].tolist(), [f'{groups[i]}\n{prompts[i]}' for i in rows]).values()))
        for group, rows in {**found, '': list(range(len(scores)))}.items()}


def local_mesh() -> Mesh:
    """This process's own devices, each with all of a scorer's parameters."""
    return sharding.make_mesh({'data': -1}, jax.local_devices())
