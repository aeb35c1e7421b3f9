"""``python -m ddmd_jax.study.examine WORKDIR RESULT.json FIELDS``: what a finished run shows.

Beside the evaluation and the curves that the run has written, it looks at the last weights: what
the student's samples have become of those it started with, in which frequencies; and whether the
critic, used or only watching, would move them back. A picture of that goes beside the result.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from ddmd_jax import drawing, sharding
from ddmd_jax.data import conditioning
from ddmd_jax.metrics import pictures
from ddmd_jax.train import checkpoint as ckpt, checksums, distill, prompts as prompt_sources
from ddmd_jax.train.diagnostics import image_std

COUNT, SHOWN = 48, 8  # samples that are compared, and of these in the picture
GUIDED_STEPS = 20  # of the guided teacher they are compared with
# Bounds of low, middle and high frequencies, as shares of the highest one of a row of pixels.
BANDS = (0.0, 0.15, 0.4, 2.0)
CURVES = ('loss', 'fake_loss', 'dm_rel_gap', 'dm_cos', 'dm_to_ca', 'x_std', 'saturation', 'ema_std',
          'ema_cast', 'ema_match', 'ema_background', 'ema_colour_error', 'ema_variance',
          'gan_critic_loss', 'gan_loss', 'mv_kl', 'health')


def band_shares(change: np.ndarray) -> list[float]:
    """Shares of low, middle and high frequencies in the power of ``[N, H, W, C]``."""
    power = np.square(np.abs(np.fft.fft2(change, axes=(1, 2)))).sum((0, 3))
    rows, cols = (np.fft.fftfreq(n) * 2 for n in change.shape[1:3])
    radius = np.hypot(rows[:, None], cols[None])
    total = max(float(power.sum()), 1e-12)
    return [float(power[(radius >= low) & (radius < high)].sum()) / total
            for low, high in zip(BANDS, BANDS[1:])]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over samples of the cosine between ``[N, ...]`` and ``[N, ...]``."""
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (a, b))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(np.mean((a * b).sum(1) / np.maximum(norms, 1e-12)))


def share_of_way(change: np.ndarray, way: np.ndarray) -> float:
    """Length of ``[N, ...]`` along ``[N, ...]``, in lengths of that, mean over samples."""
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (change, way))
    return float(np.mean((a * b).sum(1) / np.maximum((b * b).sum(1), 1e-12)))


def looked_at(config: Any, workdir: Path) -> tuple[dict[str, Any], np.ndarray | None]:
    """(figures, a grid of pictures or None) of a run's last weights, on fixed prompts and noise.

    Figures: `std_ratio`, contrast of the live student's samples to that at the start;
    `bands_live` and `bands_ema`, `band_shares` of what has changed since; `guided_share`, that
    change along the way to the guided teacher's samples from the same noise, as a share of it;
    `observer_cos`, the cosine of Delta_DM at `distill.PANEL_TAU` with the change: below 0, DM
    would move back.
    """
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    teacher = distill.load_teacher(config, mesh)
    prompts = prompt_sources.load(config, teacher, mesh)
    plan = distill.plan(config, teacher, prompts.null, mesh)
    folder = workdir / 'checkpoints' / str(checksums.steps(workdir / 'checkpoints')[-1])
    part = lambda name: ckpt.restore_part(folder, name, getattr(plan.state, name),
                                          getattr(plan.state_shardings, name))
    cond = prompts.cond(distill.shown_rows(prompts, COUNT, 0))
    key = jax.random.key(0)
    draw = distill.make_sampler(config, teacher, plan.method, mesh, COUNT, key)
    student, critic = part('student'), part('critic')
    start, live, ema = (draw(p, cond) for p in (teacher.params, student, part('ema')))

    predict = jax.jit(functools.partial(distill.predict_noised, teacher, plan.method, key))
    real, fake = (predict(p, live, cond) for p in (teacher.params, critic))
    start, live, ema, real, fake = (np.asarray(x) for x in (start, live, ema, real, fake))
    change = live - start
    guide = drawing.of_teacher(teacher, GUIDED_STEPS, config.method.alpha,
                               noises=config.student.steps)
    null = conditioning.null_like(prompts.null, cond)
    guided = np.asarray(jax.jit(guide.draw)(teacher.params, cond, null, key))
    found = {'std_ratio': float(image_std(live) / image_std(start)),
             'bands_live': band_shares(change), 'bands_ema': band_shares(ema - start),
             'guided_share': share_of_way(change, guided - start),
             'observer_cos': cosine(real - fake, change)}
    if teacher.decode is None:
        return found, None
    shown = [np.asarray(teacher.decode(x[:SHOWN])) for x in (start, ema, live, real, fake)]
    return found, pictures.rows_of_images([*shown, shown[3] - shown[4]])


def curves(workdir: Path) -> dict[str, list[Any]]:
    """Columns of ``metrics.jsonl``: `step` and those of CURVES that are there."""
    lines = [json.loads(x) for x in (workdir / 'metrics.jsonl').read_text().splitlines()]
    short = lambda v: round(v, 5) if isinstance(v, float) else v
    return {name: [short(line.get(name)) for line in lines] for name in ('step', *CURVES)
            if any(name in line for line in lines)}


def evaluated(workdir: Path) -> dict[str, Any]:
    """The student and its teacher in as few steps, as the run has judged them; {} if it has not."""
    path = workdir / 'eval.json'
    if not path.is_file():
        return {}
    found = json.loads(path.read_text())
    rows = {row['name']: row for row in found['rows']}
    return {'student': rows['student'], 'few_step': rows['teacher_few_step'],
            'seconds': found['seconds']}


def main(argv: list[str]) -> None:
    workdir, result, fields = Path(argv[1]), Path(argv[2]), json.loads(argv[3])
    config = ConfigDict(json.loads((workdir / 'config.json').read_text()))
    figures, grid = looked_at(config, workdir)
    if grid is not None:
        Image.fromarray(grid).quantize(255).save(result.with_suffix('.png'), optimize=True)
    scratch = result.with_suffix('.tmp')
    scratch.write_text(json.dumps({'fields': fields, 'figures': figures, **evaluated(workdir),
                                   'curves': curves(workdir)}))
    os.replace(scratch, result)


if __name__ == '__main__':
    main(sys.argv)
