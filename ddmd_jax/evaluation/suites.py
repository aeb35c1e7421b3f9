"""Suites: which prompts, how many images of each, which figures, which columns, which rows beside.

All that is known is in this file: `SUITES` are the published benchmarks; a family names the suite
of its runs; and `eval.suite`, or ``evaluate --suite``, names another at a dotted path in any
module::

    # my_module.py, run with --config.eval.suite=my_module.SUITE
    def examples(seen, held_out, seed):
        brightness = lambda images: {'brightness': float(images.mean())}
        return Examples(['a red apple'] * (seen + held_out), brightness)

    SUITE = Suite('brightness', {'brightness': '.3f'}, examples)
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from ddmd_jax.data import DataFileError
from ddmd_jax.evaluation import benchmarks
from ddmd_jax.evaluation.benchmarks import Layout, Prompt

BLOCK = 256  # images that are looked at together

Figures = Mapping[str, float | None]
Columns = Mapping[str, np.ndarray]


class Images(Protocol):
    """Images of one size ``[n, H, W, 3] uint8``: an array, or files that are read when asked."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: np.ndarray, /) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Examples:
    """n prompts, and what is measured of the images drawn of them.

    Attributes:
      captions: the prompts; one that comes twice is drawn with two noises.
      measure: ``images [n, H, W, 3] in [-1, 1], in the order of captions -> {figure: value}``;
        None is a figure that these prompts do not have.
      held_out: ``[n]`` bool, the prompts that no training has seen; None where that is not known.
      real: ``[n, H, W, 3]`` real images of the prompts, the first row of the table; or None.
      each: ``(images [b, H, W, 3] in [-1, 1], their rows [b]) -> {name: [b, ...]}``, what
        `figures` wants to know of each image. With it no more than `BLOCK` images stand in memory.
      figures: ``{name: [n, ...]} -> {figure: value}``, in place of `measure`.
    """

    captions: Sequence[str]
    measure: Callable[[np.ndarray], Figures]
    held_out: np.ndarray | None = None
    real: np.ndarray | None = None
    each: Callable[[np.ndarray, np.ndarray], Columns] | None = None
    figures: Callable[[Columns], Figures] | None = None

    def look(self, images: Images) -> tuple[dict[str, float | None], dict[str, np.ndarray]]:
        """(figures of all images, numbers of each by name ``[n]``)."""
        rows = np.arange(len(self.captions))
        if self.each is None or self.figures is None:
            return dict(self.measure(in_units(images[rows]))), {}
        parts = [self.each(in_units(images[block]), block)
                 for block in np.split(rows, range(BLOCK, len(rows), BLOCK))]
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return dict(self.figures(columns)), {name: x for name, x in columns.items() if x.ndim == 1}


def in_units(images: np.ndarray) -> np.ndarray:
    """uint8 -> fp32 in [-1, 1]."""
    return images.astype(np.float32) / 127.5 - 1


@dataclasses.dataclass(frozen=True)
class Suite:
    """Where an evaluation is described: a family's own, by `examples`; a published one, by `read`.

    Attributes:
      name: for messages, folders and ``evaluate --suite``.
      columns: the figures of the table in their order, with the format of each: ``{'fid': '.2f'}``.
      examples: ``(seen, held_out, seed) -> Examples`` of `eval.prompts` prompts that training may
        have seen and `eval.held_out` that it has not; a suite without such a split takes the sum.
      watched: likewise of the prompts that `log.judge` draws at every logged interval; its figures
        go into ``metrics.jsonl`` under their names. None watches nothing.
      read: ``(folder or file, counts, origin) -> prompts``; raises `DataFileError`.
      counts: how many prompts the published files have, by group.
      origin: where they come from.
      images: of each prompt.
      metrics: keys of `metrics.METRICS`, measured of the images.
      place: where the official scorer looks for an image, below its folder.
      tiled: it looks for all images of a prompt in one file, in rows of two.
      beside: (place, content) of a text file of a prompt that it wants as well.
      results: ``(file or folder, prompts, images) -> figures`` that it has written.
      paper: rows of the paper's table, by name: figures under their columns.
    """

    name: str
    columns: Mapping[str, str]
    examples: Callable[[int, int, int], Examples] | None = None
    watched: Callable[[int, int, int], Examples] | None = None
    read: Callable[[Path, Mapping[str, int], str], list[Prompt]] | None = None
    counts: Mapping[str, int] = dataclasses.field(default_factory=dict)
    origin: str = ''
    images: int = 1
    metrics: Sequence[str] = ()
    place: Layout = benchmarks.place_numbered
    tiled: bool = False
    beside: Callable[[Prompt], tuple[str, str]] | None = None
    results: Callable[[Path, Sequence[Prompt], int], Mapping[str, float]] | None = None
    paper: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)

    def prompts(self, path: Path) -> list[Prompt]:
        """The prompts of the user's copy at `path`; raises `DataFileError`."""
        assert self.read is not None
        return self.read(path, self.counts, self.origin)


def find(path: str) -> Suite:
    """The suite of that name, or at a dotted path, ``my_module.SUITE``.

    Raises:
      DataFileError: there is no such module, or what it has under that name is no suite.
    """
    if path in SUITES:
        return SUITES[path]
    module, _, name = path.rpartition('.')
    try:
        suite = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as e:
        raise DataFileError(f'eval.suite={path} cannot be imported ({e}); name a suite as '
                            'my_module.SUITE, its module on PYTHONPATH') from e
    if not isinstance(suite, Suite):
        raise DataFileError(f'eval.suite={path} is of type {type(suite).__name__}, not '
                            'ddmd_jax.evaluation.suites.Suite')
    return suite


# --- Published ones ---

STYLES = ('concept-art', 'photo', 'anime', 'paintings')
CATEGORIES = ('Animals', 'Architecture', 'Arts', 'Characters', 'Design', 'Food', 'Natural Scenery',
              'Others', 'Plants', 'Products', 'Science', 'Transportation')
TASKS = ('single_object', 'two_object', 'counting', 'colors', 'position', 'color_attr')
DPG = ('global', 'entity', 'attribute', 'relation', 'other')
# The four schedules of the paper's Tables 1, 6 and 7, and their teacher.
SCHEDULES = ('paper: teacher, 50 steps', 'paper: coupled shared', 'paper: decoupled full',
             'paper: decoupled constrained', 'paper: decoupled hybrid')


def _paper(names: Sequence[str], heads: Sequence[str],
           *rows: Sequence[float]) -> dict[str, dict[str, float]]:
    return {name: dict(zip(heads, row, strict=True)) for name, row in zip(names, rows, strict=True)}


def _columns(figure: str, groups: Sequence[str], form: str) -> dict[str, str]:
    return dict.fromkeys((*(f'{figure}/{group}' for group in groups), figure), form)


_HPS, _HPS3, _DPG = (tuple(_columns(figure, groups, '')) for figure, groups in (
    ('hps_v2.1', STYLES), ('hps_v3', CATEGORIES), ('dpg', DPG)))

SUITES = {suite.name: suite for suite in (
    Suite('hps_v2', _columns('hps_v2.1', STYLES, '.2f'), read=benchmarks.read_hps_v2,
          counts=dict.fromkeys(STYLES, 800), metrics=('hps_v2.1',), place=benchmarks.place_styles,
          origin='the hub, datasets/zhwang/HPDv2, benchmark/<style>.json',
          paper=_paper(SCHEDULES, _HPS,  # arXiv 2511.22677, Table 6
                       (30.35, 28.24, 31.74, 30.47, 30.20), (30.31, 29.95, 31.72, 30.45, 30.61),
                       (30.31, 30.25, 31.85, 30.34, 30.69), (31.48, 30.87, 32.98, 31.51, 31.71),
                       (32.37, 30.87, 33.61, 32.31, 32.29))),
    Suite('hps_v3', _columns('hps_v3', CATEGORIES, '.2f'), read=benchmarks.read_hps_v3,
          counts=dict.fromkeys(CATEGORIES, 1000), place=benchmarks.place_categories,
          origin='the hub, datasets/MizzenAI/HPDv3, benchmark/benchmark_<Category>.json',
          results=benchmarks.import_hps_v3,
          paper=_paper(SCHEDULES, _HPS3,  # Table 7, and the last column of Table 1
                       (9.562, 10.418, 9.292, 10.822, 8.358, 10.160, 9.781, 9.623, 9.881, 9.409,
                        8.477, 9.659, 9.62),
                       (10.377, 11.537, 9.077, 11.061, 8.112, 11.520, 10.138, 10.797, 10.528,
                        10.994, 8.417, 11.503, 10.34),
                       (10.338, 11.539, 8.929, 11.101, 8.059, 11.572, 10.046, 10.787, 10.600,
                        11.049, 8.358, 11.484, 10.32),
                       (11.309, 12.388, 9.690, 11.975, 8.694, 12.096, 11.177, 11.553, 11.390,
                        11.508, 8.905, 12.256, 11.08),
                       (11.873, 12.899, 10.351, 12.562, 9.308, 12.425, 11.592, 12.138, 11.846,
                        11.841, 9.451, 12.782, 11.59))),
    Suite('dpg', _columns('dpg', DPG, '.2f'), read=benchmarks.read_dpg, counts={'': 1065},
          images=4, place=benchmarks.place_dpg, tiled=True, results=benchmarks.import_dpg,
          origin='github.com/TencentQQGYLab/ELLA, dpg_bench/prompts',
          paper=_paper(SCHEDULES, _DPG,  # Table 1
                       (84.50, 90.89, 91.20, 94.42, 86.34, 87.20),
                       (80.22, 90.45, 90.47, 89.36, 91.36, 83.90),
                       (91.88, 89.03, 90.08, 89.51, 88.85, 83.77),
                       (93.47, 90.18, 90.94, 89.37, 90.71, 85.64),
                       (91.40, 91.62, 91.18, 91.93, 91.98, 85.85))),
    Suite('geneval', _columns('geneval', TASKS, '.3f'), read=benchmarks.read_geneval,
          counts={'': 553}, images=4, place=benchmarks.place_geneval,
          beside=benchmarks.geneval_metadata, results=benchmarks.import_geneval,
          origin='github.com/djghosh13/geneval, prompts/evaluation_metadata.jsonl (sha256 '
                 f'{benchmarks.GENEVAL_SHA256[:12]})'),
    Suite('t2i_compbench', {f't2i/{name}': '.4f' for name in benchmarks.T2I_FILES},
          read=benchmarks.read_t2i_compbench, counts=dict.fromkeys(benchmarks.T2I_FILES, 300),
          images=10, place=benchmarks.place_t2i_compbench,
          results=benchmarks.import_t2i_compbench,
          origin='github.com/Karine-Huang/T2I-CompBench, examples/dataset/<category>_val.txt'),
    Suite('coco10k', {'fid': '.2f', 'patch_fid': '.2f', 'clip': '.2f', 'image_reward': '.2f',
                      'hps_v2.1': '.2f', 'hps_v3': '.2f'},
          read=benchmarks.read_coco, counts={'': 10_000},
          metrics=('fid', 'patch_fid', 'clip', 'image_reward', 'hps_v2.1'),
          origin='the hub, tianweiy/DMD2, data/coco/coco10k.zip: all_prompts.pkl',
          results=benchmarks.import_hps_v3,
          paper=_paper([f'paper: {name}' for name in (  # Table 2, SDXL in four steps
              'LCM', 'Turbo', 'Lightning', 'Flash', 'PCM', 'DMD2', 'decoupled hybrid')],
              ('fid', 'clip', 'image_reward', 'hps_v2.1', 'hps_v3'),
              (22.27, 31.71, 39.56, 28.00, 6.45), (27.27, 32.16, 46.09, 29.83, 9.09),
              (24.49, 32.31, 57.48, 30.30, 9.48), (22.96, 31.84, 19.04, 27.71, 6.49),
              (24.13, 32.52, 64.73, 30.76, 9.46), (18.95, 33.14, 71.01, 30.64, 9.64),
              (17.80, 33.62, 78.61, 30.34, 9.79))))}
