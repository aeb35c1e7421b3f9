"""A teacher of one's own, from nothing to a distilled student in a minute on a laptop.

``python examples/own_teacher.py DIR``: eight by eight pixels, captions such as 'red left'. A
perceptron is taught to draw them by flow matching, wrapped as a `Teacher`, and distilled into two
steps by the package's own loop. What a family has to bring is `load_teacher`;
docs/extending.md goes through it.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from ml_collections import config_flags

from ddmd_jax.data.batch import CondSpec
from ddmd_jax.diffusion import drawing, process
from ddmd_jax.diffusion.time import Shift
from ddmd_jax.evaluation import pictures
from ddmd_jax.families import Teacher, TextEncoder
from ddmd_jax.families.base import Latents
from ddmd_jax.models.layers import functional
from ddmd_jax.parallel import sharding
from ddmd_jax.train import distill, loop
from ddmd_jax.weights import flat

SIZE, WIDTH, TOKENS = 8, 32, 2
COLOURS = {'red': (1, -1, -1), 'green': (-1, 1, -1), 'blue': (-1, -1, 1), 'white': (1, 1, 1)}
PLACES = {'left': np.s_[1:7, 0:4], 'right': np.s_[1:7, 4:8], 'top': np.s_[0:4, 1:7],
          'bottom': np.s_[4:8, 1:7]}
CAPTIONS = [f'{colour} {place}' for colour in COLOURS for place in PLACES]
WORDS = {word: i + 1 for i, word in enumerate((*COLOURS, *PLACES))}  # 0 is no word
RULES = ((r'.', ()),)  # every parameter whole on every device: they are few


def draw(caption: str) -> np.ndarray:
    """What a caption shows, ``[8, 8, 3]`` in [-1, 1]."""
    colour, place = caption.split()
    image = np.full((SIZE, SIZE, 3), -0.6, np.float32)
    image[PLACES[place]] = COLOURS[colour]
    return image


class Denoiser(nnx.Module):
    """``(x_t [B, 8, 8, 3], t [B], embeds [B, 2, D]) -> velocity``."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(SIZE * SIZE * 3 + TOKENS * WIDTH + 16, 256, rngs=rngs)
        self.second = nnx.Linear(256, 256, rngs=rngs)
        self.last = nnx.Linear(256, SIZE * SIZE * 3, rngs=rngs)

    def __call__(self, x, t, embeds):
        waves = t[:, None] * 2.0 ** jnp.arange(8)
        parts = (x.reshape(len(x), -1), embeds.reshape(len(x), -1), jnp.sin(waves), jnp.cos(waves))
        h = jax.nn.silu(self.first(jnp.concatenate(parts, axis=-1)))
        return self.last(jax.nn.silu(self.second(h))).reshape(x.shape)


def tokenize(prompts) -> dict[str, np.ndarray]:
    """Word numbers ``[n, 2]`` int32 and which of them are words; '' has none but keeps a place."""
    rows = [[WORDS.get(word, 0) for word in prompt.split()][:TOKENS] for prompt in prompts]
    ids = np.asarray([row + [0] * (TOKENS - len(row)) for row in rows], np.int32)
    return {'ids': ids, 'mask': (ids > 0) | (np.arange(TOKENS) == 0)}


def embed(params, tokens):
    """The text side: a table. The null prompt is a row of it, never zeros."""
    return {'embeds': params['table'][tokens['ids']], 'mask': tokens['mask']}


def load_teacher(params) -> Teacher:
    """What a family brings: everything in the paper's time, t = 0 noise, as a clean prediction."""
    network = functional(lambda: Denoiser(nnx.Rngs(0)))

    def predict_clean(params, x_t, t, cond):
        t = jnp.broadcast_to(jnp.asarray(t, jnp.float32), x_t.shape[:1])
        return process.to_clean(x_t, network(params, x_t, t, cond['embeds']), t)

    identity = flat.identity(params)
    text = TextEncoder('shapes', params['text'], tokenize, embed, TOKENS, WIDTH, RULES, identity)
    latents = Latents((SIZE, SIZE, 3), decode=lambda x: x,
                      std=float(np.mean([draw(c).std() for c in CAPTIONS])))
    return Teacher('shapes', params['denoiser'], predict_clean, latents, CondSpec.text(WIDTH),
                   Shift(), identity, RULES, text)


def pretrain(steps: int = 3000, batch: int = 128):
    """Flow matching with a tenth of the captions left out, so that there is guidance."""
    images = jnp.stack([draw(c) for c in CAPTIONS])
    tokens = jnp.asarray(tokenize(CAPTIONS)['ids'])
    params = {'denoiser': nnx.to_pure_dict(nnx.state(Denoiser(nnx.Rngs(0)), nnx.Param)),
              'text': {'table': jax.random.normal(jax.random.key(1), (len(WORDS) + 1, WIDTH))}}
    tx = optax.adam(optax.cosine_decay_schedule(2e-3, steps))

    def loss_fn(params, key):
        k_row, k_null, k_t, k_noise = jax.random.split(key, 4)
        row = jax.random.randint(k_row, (batch,), 0, len(CAPTIONS))
        x, t = images[row], jax.random.uniform(k_t, (batch,))
        ids = jnp.where(jax.random.bernoulli(k_null, 0.1, (batch, 1)), 0, tokens[row])
        noise = jax.random.normal(k_noise, x.shape)
        cond = embed(params['text'], {'ids': ids, 'mask': ids > 0})
        network = functional(lambda: Denoiser(nnx.Rngs(0)))
        v = network(params['denoiser'], process.renoise(x, t, noise), t, cond['embeds'])
        return jnp.mean(jnp.square(v - (x - noise)))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, key):
        grads = jax.grad(loss_fn)(params, key)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for i in range(steps):
        params, state = step(params, state, jax.random.key(i))
    return jax.device_get(params)


def main(folder: Path) -> None:
    run = folder / 'run'
    run.mkdir(parents=True, exist_ok=True)
    (folder / 'captions.txt').write_text('\n'.join(CAPTIONS))
    subprocess.run([sys.executable, '-m', 'ddmd_jax.prepare', 'prompts', '--near_threshold=1',
                    f'--input={folder}/captions.txt', f'--out={folder}/prompts'], check=True)
    teacher, mesh = load_teacher(pretrain()), sharding.make_mesh({'data': -1})
    parser = config_flags.config_flags.ConfigFileFlagParser('config')
    config = parser.parse('configs/emoji_prompts.py')
    config.update_from_flattened_dict({
        'data.path': str(folder / 'prompts'), 'student.steps': 2, 'data.global_batch': 32,
        'train.steps': 100, 'method.alpha': 1.3, 'optim.student.lr': 1e-4,
        'optim.critic.lr': 5e-4, 'log.every': 20, 'log.probe': 16})
    task = distill.make_task(config, teacher, mesh)
    state, _ = loop.run(task, config, run, mesh, teacher.identity)
    request = drawing.Request(drawing.names(CAPTIONS[::3], 1, 0), teacher.encode(CAPTIONS[::3]),
                              teacher.encode(['']))
    rows = [np.stack([draw(c) for c in CAPTIONS[::3]])]
    for sampler, params in ((drawing.of_teacher(teacher, 20, 2.0), teacher.params),
                            (drawing.of_student(teacher, 2), state.ema)):
        rows.append(np.concatenate(list(drawing.generate(sampler, params, request, 8, mesh))))
    print('error of 20 guided steps {:.3f}, of the student in 2 {:.3f}'.format(
        *(float(np.sqrt(np.mean((row - rows[0]) ** 2))) for row in rows[1:])))
    pictures.captioned_sheet(CAPTIONS[::3], ('real', 'teacher\n20 steps', 'student\n2 steps'), rows,
                             folder / 'samples.png')


if __name__ == '__main__':
    main(Path(sys.argv[1]))
