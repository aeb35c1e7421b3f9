"""The pictures of docs/method.md, by the code that they show: ``python docs/make_pictures.py``.

schedules.png: the levels that the four schedules draw for each of a student's four steps.
directions.png: predictions of the embedded teacher for its own images, re-noised to five levels,
as its decoder shows them.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from PIL import Image

from ddmd_jax import load_teacher
from ddmd_jax.data.batch import null_like
from ddmd_jax.diffusion import drawing, process
from ddmd_jax.diffusion.time import Shift
from ddmd_jax.method import losses, schedules

matplotlib.use('Agg')
from matplotlib import pyplot as plt  # noqa: E402  (after the backend is chosen)

OUT = Path(__file__).with_name('pictures')
STEPS, ALPHA, RANGE = 4, 3.0, (0.0, 0.98)
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
PROMPTS = ('a large penguin on a blue background', 'a car above a gift on a yellow background',
           'a fox left of a carrot on a teal background')


def draw_schedules() -> None:
    """Four columns of histograms: a colour for each step, tau_CA above tau_DM."""
    fig, axes = plt.subplots(2, 4, figsize=(11, 4), sharex=True, layout='constrained')
    time, ranges = Shift(), schedules.Ranges(RANGE, RANGE)
    u = jnp.repeat(time.steps(STEPS), 4000)
    for i, (column, (name, schedule)) in enumerate(zip(axes.T, schedules.SCHEDULES.items())):
        levels = schedule.levels(tuple(jax.random.split(jax.random.key(0))), u, ranges, time)
        for ax, term, tau in zip(column, ('CA', 'DM'), levels):
            for step, drawn in enumerate(np.asarray(tau).reshape(STEPS, -1)):
                ax.hist(drawn, 40, range=(0, 1), histtype='step', density=True, lw=1.5,
                        label=f'u = {step / STEPS:g}')
            ax.set(ylabel='' if i else f'tau_{term}', yticks=[])
        column[0].set_title(name, fontsize=10)
    axes[0, -1].legend(fontsize=8)
    fig.supxlabel('noise level in uniform time: 0 is noise, 1 is clean')
    fig.savefig(OUT / 'schedules.png', dpi=100)
    plt.close(fig)


def draw_directions() -> None:
    """A block for each prompt: re-noised, with and without the prompt, CA; a column a level."""
    teacher = load_teacher('emoji')
    cond = teacher.encode(list(PROMPTS))
    null = null_like(teacher.encode(['']), cond)
    x = drawing.of_teacher(teacher, 50, ALPHA).draw(teacher.params, cond, null, jax.random.key(1))
    noise = jax.random.normal(jax.random.key(2), x.shape)
    predict = jax.jit(teacher.predict_clean)
    decode = lambda z: np.asarray(teacher.latents.decode(z))
    fig, axes = plt.subplots(4, 1 + len(LEVELS) * len(PROMPTS), figsize=(13, 4.2),
                             layout='constrained')
    for ax in axes.ravel():
        ax.axis('off')
    for i, level in enumerate(LEVELS):
        tau = jnp.full(len(PROMPTS), level)
        x_tau = process.renoise(x, tau, noise)
        real, blank = (predict(teacher.params, x_tau, tau, c) for c in (cond, null))
        ca = 0.5 * losses.ca_direction(real, blank, ALPHA)
        # A direction is no latent: what it changes of the picture is shown.
        shown = [decode(z) for z in (x_tau, real, blank, real + ca)]
        rows = (*shown[:3], shown[3] - shown[1])
        for p in range(len(PROMPTS)):
            column = axes[:, 1 + p * len(LEVELS) + i]
            for ax, images in zip(column, rows):
                ax.imshow(np.clip(np.asarray(images[p]) / 2 + 0.5, 0, 1))
            column[0].set_title(f'{level:g}', fontsize=8)
    for ax, words in zip(axes[:, 0], ('re-noised to tau', 'with the prompt', 'without it',
                                      'Delta_CA')):
        ax.text(1, 0.5, words, ha='right', va='center', fontsize=9, transform=ax.transAxes)
    fig.savefig(OUT / 'directions.png', dpi=100)
    plt.close(fig)
    with Image.open(OUT / 'directions.png') as image:
        image.convert('RGB').quantize(255).save(OUT / 'directions.png', optimize=True)


if __name__ == '__main__':
    OUT.mkdir(exist_ok=True)
    draw_schedules()
    draw_directions()
