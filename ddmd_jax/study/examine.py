"""``python -m ddmd_jax.study.examine WORKDIR RESULT.json FIELDS [curves]``: what a run shows.

Beside the evaluation and the curves that the run has written, it looks at the last weights: what
the student's samples have become of those it started with, in which frequencies; and whether the
critic, used or only watching, would move them back. A picture of that goes beside the result.
With `curves` the weights are not looked at.
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from PIL import Image

from ddmd_jax.diffusion import drawing
from ddmd_jax.evaluation import pictures
from ddmd_jax.families import Teacher
from ddmd_jax.method.health import image_std
from ddmd_jax.parallel import sharding
from ddmd_jax.study import results
from ddmd_jax.train import distillation, prompts as prompt_sources
from ddmd_jax.train.durable import checkpoint as ckpt, checksums
from ddmd_jax.train.watch import student as watch

COUNT, SHOWN = 48, 8  # samples that are compared, and of these in the picture
GUIDED_STEPS = 20  # of the guided teacher they are compared with
# Bounds of low, middle and high frequencies, as shares of the highest one of a row of pixels.
BANDS = (0.0, 0.15, 0.4, 2.0)


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


def looked_at(config: Any, teacher: Teacher, mesh: Mesh,
              workdir: Path) -> tuple[dict[str, Any], np.ndarray | None]:
    """(figures, a grid of images or None) of a run's last weights, on fixed prompts and noise.

    Figures: `std_ratio`, contrast of the raw student's samples to that at the start; `bands_live`
    and `bands_ema`, `band_shares` of the change since; `guided_share`, that change along the way
    to the guided teacher's samples from the same noise, as a share of it; `observer_cos`, the
    cosine of Delta_DM at `watch.PANEL_TAU` with the change: below 0, DM would move back.
    """
    prompts = prompt_sources.load(config, teacher, mesh)
    plan = distillation.plan(config, teacher, prompts.null, mesh)
    folder = workdir / 'checkpoints' / str(checksums.steps(workdir / 'checkpoints')[-1])
    part = lambda name: ckpt.restore_part(folder, name, getattr(plan.spec.shapes, name),
                                          getattr(plan.spec.shardings, name))
    frozen = jax.device_put(teacher.params, plan.frozen_shardings.teacher)
    student = lambda name: plan.student.bind(frozen, part(name))

    request = watch.request_of(prompts, COUNT, 0)
    draw = drawing.drawer(drawing.of_student(
        teacher, config.student.steps, plan.recipe.steps.time, config.student.sampler), request,
        mesh)
    guide = drawing.drawer(
        drawing.of_teacher(teacher, GUIDED_STEPS, config.method.alpha), request, mesh)
    predict = watch.noised_predictor(teacher, plan.recipe, request, mesh)
    live_x = draw(student('student'))
    start, live, ema, guided, real, fake = map(np.asarray, (
        draw(frozen), live_x, draw(student('ema')), guide(frozen), predict(frozen, live_x),
        predict(plan.critic.bind(frozen, part('critic')), live_x)))

    change = live - start
    found = {'std_ratio': float(image_std(live) / image_std(start)),
             'bands_live': band_shares(change), 'bands_ema': band_shares(ema - start),
             'guided_share': share_of_way(change, guided - start),
             'observer_cos': cosine(real - fake, change)}
    if teacher.latents.decode is None:
        return found, None
    shown = [np.asarray(teacher.latents.decode(x[:SHOWN])) for x in (start, ema, live, real, fake)]
    return found, pictures.rows_of_images([*shown, shown[3] - shown[4]])


def main(argv: list[str]) -> None:
    workdir, result, fields = Path(argv[1]), Path(argv[2]), json.loads(argv[3])
    config = ConfigDict(json.loads((workdir / 'config.json').read_bytes()))
    mesh = sharding.make_mesh(config.mesh)
    teacher = distillation.load_teacher(config, mesh)
    found, grid = {'fields': fields, 'data_std': teacher.latents.std}, None
    if argv[4:] != ['curves']:
        found['figures'], grid = looked_at(config, teacher, mesh, workdir)
    if grid is not None:
        Image.fromarray(grid).quantize(255).save(result.with_suffix('.png'), optimize=True)
    results.write(result, found | results.evaluated(workdir) | {'curves': results.curves(workdir)})


if __name__ == '__main__':
    main(sys.argv)
