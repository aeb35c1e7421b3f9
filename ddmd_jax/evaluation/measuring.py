"""Figures of a suite's images: those that an evaluation has drawn, or a folder of another's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddmd_jax.evaluation import evaluate, kept, metrics
from ddmd_jax.evaluation.asked import Asked
from ddmd_jax.evaluation.kept import Kept
from ddmd_jax.evaluation.results import Part
from ddmd_jax.util.errors import UserError

FAULTS = 3  # images of a folder whose fault is told, one by one
WHOSE = ('step', 'weights')  # of a row: the checkpoint it was drawn with, and its weights' identity


@dataclasses.dataclass(frozen=True)
class Measures:
    """What images are measured by.

    Attributes:
      metrics: their names; None are the suite's.
      weights: paths of a metric's weights, by its name.
      reference: real images, for distances.
      results: by SUITE or SUITE:ROW, what the suite's own scorer has written.
      pythons: see `metrics.Given`.
    """

    metrics: Sequence[str] | None = None
    weights: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    reference: Path | None = None
    results: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    pythons: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def known(self) -> list[str]:
        """Those of the metrics named here that there are."""
        return [name for name in self.metrics or () if name in metrics.METRICS]


def rows_in(place: Path) -> list[str]:
    """Names of the rows whose images are in an evaluation's folder of a suite."""
    return [p.name for p in sorted(place.iterdir()) if p.is_dir()] if place.is_dir() else []


def stored(folder: Path, asked: Asked, rows: Sequence[str]) -> dict[str, Kept]:
    """The suite's images in an evaluation's ``images`` by row: those of `rows` first, in order.

    Raises:
      UserError: there are none.
    """
    place = folder / asked.suite.name
    there = rows_in(place)
    if not there:
        raise UserError(f'{place} holds no images; name a model with --checkpoint or --model')
    order = [row for row in rows if row in there] + [row for row in there if row not in rows]
    return {row: kept.opened(place / row, asked.named) for row in order}


def part(asked: Asked, images: Mapping[str, Kept], by: Measures, sheet: Path) -> Part:
    """A suite's part of the results; of a family's own suite also the sheet of its images."""
    settings = {row: {name: found.about.get(name) for name in evaluate.settings_of(None)}
                for row, found in images.items()}
    if asked.examples is not None:
        rows, each, notes = evaluate.measured(asked.examples, images, settings)
        titles = {row: f'{row}\n{found.about["steps"]} step' + 's' * (found.about['steps'] != 1)
                  for row, found in images.items()}
        evaluate.samples(asked.examples, images, titles, sheet)
    else:
        rows, each, notes = [], {}, []
        for name, found in images.items():
            line, each[name], missing = _row(asked, name, found, range(len(asked.named)), by)
            rows.append({'name': name, **settings[name], **line})
            notes += missing
    for row in rows:  # whoever measures says of each row whose it is, also long after it was drawn
        about = images[row['name']].about if row['name'] in images else {}
        row |= {name: about.get(name) for name in WHOSE}
    return Part(asked.suite, rows, each, asked.named, asked.groups, notes, by.known())


def part_of_folder(asked: Asked, folder: Path, by: Measures) -> Part:
    """A published suite's part, of images that others have made and laid out as it says.

    Raises:
      UserError: the suite is a family's own.
    """
    if asked.examples is not None:
        raise UserError(f"--images: {asked.suite.name} is a family's own; draw it")
    images = kept.Folder(folder, asked.suite, asked.prompts)
    faults = images.faults[:FAULTS]
    if more := len(images.faults) - len(faults):
        faults.append(f'{folder}: {more} more images are missing or cannot be decoded')
    line, each, missing = _row(asked, 'images', images, images.rows, by)
    row = {'name': 'images', **evaluate.settings_of(None), **line, **dict.fromkeys(WHOSE)}
    return Part(asked.suite, [row], {'images': each}, asked.named, asked.groups,
                [*faults, *missing], by.known())


def _row(asked: Asked, row: str, images: Any, there: Sequence[int],
         by: Measures) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """(figures of a row, those of each image, what is missing); `there` are the images it has."""
    suite = asked.suite
    title = f'{suite.name}, {row}' if isinstance(images, Kept) else suite.name
    given = metrics.Given(by.weights, kept.Plain(by.reference) if by.reference else None,
                          metrics.local_mesh(), pythons=by.pythons)
    prompts, groups = ([x[i] for i in there] for x in (
        [name.prompt for name in asked.named], asked.groups))
    names = suite.metrics if by.metrics is None else by.metrics
    each, line, gaps = metrics.measure(names, given, images, prompts)
    notes = [f'{title}: {name}: {why}' for name, why in gaps.items()]
    found: dict[str, Any] = {'images': len(there), **line}
    bounds = {}
    for name, scores in each.items():
        for group, interval in metrics.by_group(scores, prompts, groups).items():
            key = f'{name}/{group}' if group else name
            found[key], bounds[key] = interval.mean, [interval.low, interval.high]
    path = by.results.get(f'{suite.name}:{row}') or by.results.get(suite.name)
    try:
        if path and suite.results is not None:
            found |= suite.results(path, asked.prompts, suite.images)
    except UserError as e:  # which is why its figures are not there
        notes.append(f'{title}: {e}')
    else:
        for name in suite.columns:  # a group's is there with its whole, if that has a column
            head, slash, _ = name.partition('/')
            if name in found or name in gaps or slash and head in suite.columns:
                continue
            notes.append(f'{title}: {name} is not measured here; ' + (
                'name it in --metrics' if name in metrics.METRICS and name not in metrics.OUTSIDE
                else 'run the scorer of its authors on the images (--official), then give '
                f'--results={suite.name}=PATH'
                + f', or --metrics={name} --python={name}=PATH' * (name in metrics.OUTSIDE)))
    full = {name: np.full(len(asked.named), np.nan) for name in each}
    for name, scores in each.items():
        full[name][list(there)] = scores
    if bounds:
        found['intervals'] = bounds
    return found, full, notes
