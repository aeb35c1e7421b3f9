"""The end of a run: real, teacher and student on the same prompts and seeds, side by side."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ddmd_jax.data import conditioning
from ddmd_jax.diffusion import drawing, time as time_maps
from ddmd_jax.diffusion.drawing import Sampler
from ddmd_jax.evaluation import measures, pictures
from ddmd_jax.families import Teacher
from ddmd_jax.families.emoji import data as emoji, judge as classifier
from ddmd_jax.parallel import sharding
from ddmd_jax.util import files, text

SHEET_ROWS = 10
SETTINGS = ('steps', 'evaluations', 'guidance')  # of a sampler
COLUMNS = (*SETTINGS, 'glyph_match', 'glyph_match_held_out', 'background_match', 'frechet',
           'colour_error', 'variance')


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self):
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start


def evaluation_rows(pairs: emoji.Pairs, seen: int, held_out: int, seed: int) -> np.ndarray:
    """Indices of `seen` training pairs, then `held_out` held-out ones, drawn evenly."""
    rng = np.random.default_rng(seed)
    def draw(mask: np.ndarray, n: int) -> np.ndarray:
        rows = np.flatnonzero(mask)
        return rng.permutation(np.resize(rng.permutation(rows), n))
    return np.concatenate([draw(~pairs.held_out, seen), draw(pairs.held_out, held_out)])


def samplers(config: Any, teacher: Teacher) -> dict[str, Sampler]:
    """Rows of the table to generate, by name."""
    e, n = config.eval, config.student.steps
    return {'teacher_guided': drawing.of_teacher(teacher, e.teacher_steps, e.guidance, e.solver,
                                                 noises=n),
            'teacher_few_step': drawing.of_teacher(teacher, n, noises=n),
            'student': drawing.of_student(
                teacher, n, time_maps.chosen(teacher.time, config.method.shift),
                config.student.sampler)}


def generate(draw: Any, params: Any, cond: Any, null: Any, total: int, batch: int,
             seed: int, mesh: Mesh) -> np.ndarray:
    """`total` images in batches of one compiled shape; batch i always gets the same noise.

    Every process of a run draws them together, and every one has them all.
    """
    def batch_at(params: Any, cond: Any, blank: Any, i: int) -> jax.Array:
        params = sharding.on_device(params)
        return draw(params, cond, blank, jax.random.fold_in(jax.random.key(seed), i))

    batch_at = jax.jit(batch_at, out_shardings=sharding.replicated(mesh))
    index = np.resize(np.arange(total), -(-total // batch) * batch)
    out = []
    for i in range(0, len(index), batch):
        # Host arrays: what one process has on its own devices the others could not read.
        part = jax.tree.map(lambda x, rows=index[i:i + batch]: np.asarray(x[rows]), cond)
        blank = jax.tree.map(lambda n, c: np.broadcast_to(n, c.shape), null, part)
        out.append(np.asarray(batch_at(params, part, blank, i)))
    return np.concatenate(out)[:total]


def measure(images: np.ndarray, pairs: emoji.Pairs, rows: np.ndarray, judge: Any,
            reference: np.ndarray) -> dict[str, float]:
    """Every figure of one row of the table; `reference` are features of the same real pairs."""
    glyph, colour, features = classifier.judge_all(judge, images)
    held = pairs.held_out[rows]
    right = glyph == pairs.glyph[rows]
    scale = reference.std(axis=0)  # units in which every feature of real images varies by 1
    asked = np.asarray(list(emoji.COLOURS.values()))[pairs.colour[rows]]
    return {
        'glyph_match': float(right[~held].mean()),
        'glyph_match_held_out': float(right[held].mean()),
        'background_match': float((colour == pairs.colour[rows]).mean()),
        'frechet': measures.frechet_distance(features / scale, reference / scale),
        'colour_error': measures.colour_error(images, asked),
        'variance': measures.image_variance(images),
    }


def make_judge(seen: int, held_out: int, seed: int) -> tuple[Any, list[str]]:
    """(``images [n, H, W, 3] -> figures``, the captions of those images).

    The figures are for `metrics.jsonl`: ema_match, share of glyphs that are the caption's, over
    all prompts; ema_background; ema_colour_error; ema_variance. See docs/metrics.md.
    """
    pairs, judge = emoji.load_pairs(), classifier.load()
    rows = evaluation_rows(pairs, seen, held_out, seed)
    asked = np.asarray(list(emoji.COLOURS.values()))[pairs.colour[rows]]

    def judged(images: np.ndarray) -> dict[str, float]:
        glyph, colour, _ = classifier.judge_all(judge, images, len(images))
        return {'ema_match': float((glyph == pairs.glyph[rows]).mean()),
                'ema_background': float((colour == pairs.colour[rows]).mean()),
                'ema_colour_error': measures.colour_error(images, asked),
                'ema_variance': measures.image_variance(images)}

    return judged, [pairs.caption(i) for i in rows]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as aligned plain text."""
    heads = ('', *(c.replace('_', ' ') for c in COLUMNS))
    show = lambda v: '-' if v is None else f'{v:.3f}' if isinstance(v, float) else str(v)
    cells = [heads, *((r['name'], *(show(r[c]) for c in COLUMNS)) for r in rows)]
    return text.aligned(cells, numbers=len(COLUMNS))


def _sheet_rows(held: np.ndarray) -> np.ndarray:
    """Rows of the picture: mostly seen pairs, the last few held out."""
    seen, unseen = np.flatnonzero(~held), np.flatnonzero(held)
    few = min(len(unseen), SHEET_ROWS // 3)
    return np.concatenate([seen[:SHEET_ROWS - few], unseen[:few]])


def evaluate(config: Any, teacher: Teacher, student: Any,
             mesh: Mesh) -> tuple[list[dict[str, Any]], Any]:
    """``(rows of the table, {name: images} with the pairs they show)``."""
    pairs, judge = emoji.load_pairs(), classifier.load()
    e = config.eval
    rows = evaluation_rows(pairs, e.prompts, e.held_out, config.seed)
    cond, null = teacher.encode([pairs.caption(i) for i in rows]), teacher.encode([''])
    images = {'real': pairs.images(rows)}
    _, _, reference = classifier.judge_all(judge, images['real'])
    settings = {'real': dict.fromkeys(SETTINGS)}
    for name, sampler in samplers(config, teacher).items():
        params = student if name == 'student' else teacher.params
        latents = generate(sampler.draw, params, cond, null, len(rows), e.batch, config.seed, mesh)
        # What is judged is what would be shown: clipped to the range of a screen.
        images[name] = np.clip(teacher.latents.decode(latents), -1, 1)
        settings[name] = {what: getattr(sampler, what) for what in SETTINGS}
    result = [{'name': name, **settings[name], **measure(x, pairs, rows, judge, reference)}
              for name, x in images.items()]
    return result, (images, pairs, rows)


def final(config: Any, teacher: Teacher, student: Any, mesh: Mesh, workdir: Path,
          seconds: Mapping[str, float], total: Stopwatch) -> None:
    """Evaluates and writes ``eval.json`` and ``samples.png``; prints the table."""
    rows, (images, pairs, index) = evaluate(config, teacher, student, mesh)
    shown = _sheet_rows(pairs.held_out[index])
    n, w = config.student.steps, config.eval.guidance
    titles = ('real', f'teacher\n{config.eval.teacher_steps} steps, w={w:g}',
              f'teacher\n{n} steps', f'student\n{n} steps')
    captions = [pairs.caption(i) + (' *' if pairs.held_out[i] else '') for i in index[shown]]
    if jax.process_index() == 0:
        pictures.captioned_sheet(captions, titles, [x[shown] for x in images.values()],
                                 workdir / 'samples.png')
        result = {'rows': rows, 'seconds': {**seconds, 'total': total.seconds},
                  'seed': config.seed, 'config': config.to_dict()}
        files.write_json(workdir / 'eval.json', result)
        print(f'{table(rows)}\n\n{workdir / "eval.json"}\n{workdir / "samples.png"}  '
              '(* pair held out of all training)')


def sheet(config: Any, teacher: Teacher, student: Any, prompts: conditioning.Prompts,
          mesh: Mesh, workdir: Path) -> None:
    """Writes ``samples.png``: teacher and student on the same prompts and seeds, unjudged."""
    rows = np.resize(np.random.default_rng(config.seed).permutation(np.unique(prompts.rows)),
                     min(SHEET_ROWS, config.eval.prompts))
    n, w = config.student.steps, config.eval.guidance
    titles = (f'teacher\n{config.eval.teacher_steps} steps, w={w:g}', f'teacher\n{n} steps',
              f'student\n{n} steps')
    images = []
    for name, sampler in samplers(config, teacher).items():
        params = student if name == 'student' else teacher.params
        latents = generate(sampler.draw, params, prompts.cond(rows), prompts.null, len(rows),
                           config.eval.batch, config.seed, mesh)
        images.append(np.clip(np.asarray(teacher.latents.decode(latents)), -1, 1))
    if jax.process_index() == 0:
        captions = [prompts.caption(int(i)) for i in rows]
        pictures.captioned_sheet(captions, titles, images, workdir / 'samples.png')
        print(workdir / 'samples.png')
