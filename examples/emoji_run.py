# %% [markdown]
# # A distillation, step by step
#
# The embedded default, text to emoji, cut short: a tenth of a real run, some minutes on two cores.
# `docs/emoji_run.ipynb` is this file, executed (`python docs/make_notebook.py`).

# %%
import json
import os
import tempfile
from pathlib import Path

import jax
import numpy as np
from ml_collections import config_flags
from PIL import Image

from ddmd_jax import config as config_lib
from ddmd_jax.diffusion import drawing
from ddmd_jax.evaluation import pictures
from ddmd_jax.losses.decoupled import Predictions, decoupled_loss, decoupled_update
from ddmd_jax.parallel import sharding
from ddmd_jax.train import distill, loop

workdir = Path(os.environ.get('DDMD_WORKDIR') or tempfile.mkdtemp())
print(jax.devices())

# %% [markdown]
# A config is a file; any field can be changed. `check` names every wrong one at once.

# %%
config = config_flags.config_flags.ConfigFileFlagParser('config').parse('configs/emoji.py')
config.update_from_flattened_dict({
    'train.steps': 12, 'data.global_batch': 16, 'log.every': 2, 'log.images_every': 100,
    'optim.student.lr': 3e-5, 'optim.critic.lr': 1.5e-4, 'method.alpha': 3.0})
config_lib.check(config)
print(config.method.schedule, config.method.alpha, config.optim.critic.lr)

# %% [markdown]
# The teacher, in the one convention everything here has: t = 0 is noise, t = 1 is clean, and it
# predicts the clean picture.

# %%
mesh = sharding.make_mesh(config.mesh)
teacher, task = distill.prepare(config, mesh)
prompts = ['red heart on blue', 'ship', 'pie on purple', 'cherries on orange']
cond, null = teacher.encode(prompts), teacher.encode([''])


def drawn(sampler, params):
    """Images of the prompts, the same noise whatever they are drawn with."""
    named = drawing.words(drawing.names(prompts, 1, seed=0))
    batches = drawing.generate(sampler, teacher, params, cond, null, named, len(prompts), mesh,
                               drawing.Times())
    return np.concatenate(list(batches))


guided = drawn(drawing.of_teacher(teacher, steps=20, guidance=3.0), teacher.params)
few = drawn(drawing.of_student(teacher, steps=4), teacher.params)
Image.fromarray(pictures.rows_of_images([guided, few]))

# %% [markdown]
# Above: 20 guided steps (40 evaluations of the network); below: the same network in 4, unguided.
#
# The update is a function of clean predictions. With a critic that agrees with the teacher DM is
# nothing, and what is left is CA.

# %%
x, real, blank = np.float32(np.random.default_rng(0).normal(size=(3, 4, 24, 24, 3)))
update = decoupled_update(x, Predictions(real, blank, real, real), alpha=3.0,
                          normaliser='none', floor=0.02)
print('DM', float(np.abs(update.dm).max()), 'CA is', np.allclose(update.ca, 2 * (real - blank)))
print('loss', float(decoupled_loss(x, update, weight_ca=1.0, weight_dm=1.0)))

# %% [markdown]
# The loop: critic updates, then one of the student, figures, checkpoints.

# %%
state, seconds = loop.run(task, config, workdir, mesh, teacher.identity)
lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
for line in lines:
    print(line['step'], f'{line["x_std"]:.3f} {line["dm_rel_gap"]:.3f}', line['health'])

# %% [markdown]
# The averaged student, in 4 steps, below the teacher as above.

# %%
student = drawn(drawing.of_student(teacher, steps=4), state.ema)
Image.fromarray(pictures.rows_of_images([guided, few, student]))
