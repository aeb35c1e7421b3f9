"""Sheets of evaluations that stand on the disk: models, steps or seeds beside one another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ddmd_jax.evaluation import pictures
from ddmd_jax.evaluation.results import Evaluated, ResultsError, check_alike, titles

PROMPTS = 8  # of a sheet, unless a flag says otherwise
SEEDS = 8  # images of one prompt beside one another, at most


def chosen(of: Evaluated, count: int, best: str = '', worst: str = '') -> list[int]:
    """Numbers of the first images of `count` prompts: the best or worst by a figure, or any.

    Any are evenly spaced in the suite's order. A prompt's figure is the mean of its images'; a
    prompt without one does not come.

    Raises:
      ResultsError: there is no such figure, or no prompt has it.
    """
    first: dict[tuple[str, str], list[int]] = {}
    for i, (group, name) in enumerate(zip(of.groups, of.named)):
        first.setdefault((group, name.prompt), []).append(i)
    rows = list(first.values())
    if figure := best or worst:
        if figure not in of.scores:
            known = ', '.join(of.scores) or 'none'
            raise ResultsError(f'{of.title} has no figure {figure!r} of each image; it has {known}')
        scores = [float(np.mean(of.scores[figure][found])) for found in rows]
        order = sorted((i for i, x in enumerate(scores) if np.isfinite(x)),
                       key=lambda i: -scores[i] if best else scores[i])
        if not order:
            raise ResultsError(f'{of.title}: no prompt has {figure!r} of all its images')
        return [rows[i][0] for i in order[:count]]
    at = np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int))
    return [rows[i][0] for i in at]


def write(path: Path, of: Sequence[Evaluated], shown: Sequence[int], figure: str = '',
          seeds: bool = False) -> None:
    """A prompt a row; a column is an evaluation, or with `seeds` an image of the only one.

    Captions say `figure` of the first column, if one is named.

    Raises:
      ResultsError: several evaluations with `seeds`, or of other prompts.
      ImagesError: images are missing.
    """
    if seeds and len(of) > 1:
        raise ResultsError('--seeds shows the images of one evaluation; name one')
    check_alike(of)
    images, first = [one.images() for one in of], of[0]
    if seeds:
        rows = [[i for i, name in enumerate(first.named)
                 if (first.groups[i], name.prompt) == (first.groups[at], first.named[at].prompt)]
                for at in shown]
        width = min(SEEDS, min(map(len, rows)))
        columns = [images[0][np.asarray([found[k] for found in rows])] for k in range(width)]
        heads = [f'image {k + 1}' for k in range(width)]
    else:
        columns = [found[np.asarray(shown)] for found in images]
        heads = [title.replace(':', '\n') for title in titles(of)]
    if len({x.shape for x in columns}) > 1:
        raise ResultsError('the evaluations have images of other sizes; a sheet has one')
    score = lambda i: f' ({figure} {first.scores[figure][i]:.4g})' if figure else ''
    pictures.captioned_sheet([first.named[i].prompt + score(i) for i in shown], heads, columns,
                             path)
