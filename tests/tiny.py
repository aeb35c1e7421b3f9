"""A NextDiT small enough to compile in seconds, and what several test files need around it.

Imported by `conftest.py`, and by test code that runs in a process of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from pathlib import Path
from typing import Any

import forked
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ddmd_jax import config as config_lib
from ddmd_jax.data.batch import Batch, CondSpec
from ddmd_jax.diffusion.time import FewSteps, Shift
from ddmd_jax.families.base import Latents, Teacher
from ddmd_jax.families.emoji import teacher as emoji, words
from ddmd_jax.method import schedules
from ddmd_jax.method.losses import Normaliser
from ddmd_jax.method.recipe import Recipe
from ddmd_jax.method.regularisers.gan import Gan
from ddmd_jax.method.regularisers.mean_variance import MeanVariance
from ddmd_jax.method.schedules import Alpha, Ranges
from ddmd_jax.models import discriminator
from ddmd_jax.parallel import sharding
from ddmd_jax.train import state as st
from ddmd_jax.train.update import Frozen, Mechanics, Updates

ROOT = Path(__file__).resolve().parent.parent
SHAPE = (8, 8, 3)
CAPTION = 4  # tokens of a caption
MODEL = {
    'denoiser': {
        'hidden_size': 32, 'num_layers': 1, 'num_refiner_layers': 1, 'num_attention_heads': 2,
        'num_kv_heads': 1, 'axes_dim_rope': (4, 6, 6), 'patch_size': 4, 'in_channels': 3,
        'cap_feat_dim': 16, 'multiple_of': 16},
    'text': {'vocab_size': 32, 'max_length': 6, 'dim': 16, 'num_layers': 1, 'num_heads': 2},
}

# A teacher for `main`, on the latents of the shipped codec: it knows every word of the captions.
TOY = {'denoiser': MODEL['denoiser'] | {'in_channels': 8},
       'text': MODEL['text'] | {'vocab_size': words.load().get_vocab_size(), 'max_length': 16}}


def random_params(model: dict[str, Any], seed: int) -> dict[str, Any]:
    """Parameters of denoiser and text encoder, none of them zero or one.

    Drawn by numpy into the shapes of `init_params`: init zeroes gates and head, which would
    hide any mistake behind them, and compiling its many draws takes longer than a test.
    """
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        name = path[-1].key
        if name == 'kernel':
            return jnp.asarray(noise / np.sqrt(leaf.shape[-2]))
        return jnp.asarray(0.1 * noise + (1.0 if name == 'weight' else 0.0))

    return jax.tree_util.tree_map_with_path(fill, _shapes(json.dumps(model)))


@functools.cache
def _shapes(model: str) -> Any:
    return jax.eval_shape(lambda: emoji.init_params(json.loads(model), jax.random.key(0)))


def save_toy(folder: Path) -> Path:
    """The file of a teacher of `TOY`."""
    path = folder / 'toy.safetensors'
    emoji.save(path, TOY, random_params(TOY, 0), steps=0)
    return path


def make_params() -> list[Any]:
    """Denoisers of teacher, student and critic: near one another, as they are in a run."""
    teacher, one, two = (random_params(MODEL, seed)['denoiser'] for seed in range(3))
    near = lambda a, b: jax.tree.map(lambda x, y: x + 0.1 * (y - x), a, b)
    return [teacher, near(teacher, one), near(teacher, two)]


def small_network(params: Any, x_t: Any, t: Any, cond: Any) -> Any:
    """A network of a matrix and a bias, for what is the same with any: it compiles at once."""
    p, at = params['x_embedder'], lambda v: v[:, None, None, None]
    seen = jnp.tanh(x_t @ p['kernel']) + at(t) * p['bias']
    return seen + at(jnp.mean(cond['embeds'], (1, 2)))


def small_params() -> list[Any]:
    """Of `small_network`: teacher, student and critic, near one another."""
    rng = np.random.default_rng(0)
    draw = lambda: {'kernel': rng.normal(size=(3, 3)), 'bias': rng.normal(size=3)}
    teacher, one, two = ({'x_embedder': jax.tree.map(jnp.float32, draw())} for _ in range(3))
    near = lambda a, b: jax.tree.map(lambda x, y: x + 0.1 * (y - x), a, b)
    return [teacher, near(teacher, one), near(teacher, two)]


def small_tokens(params: Any, x_t: Any, t: Any, cond: Any) -> Any:
    """The tokens of `small_network`, one a pixel: what a GAN's head judges."""
    return (x_t @ params['x_embedder']['kernel']).reshape(x_t.shape[0], -1, 3)


def make_cond(batch: int, seed: int = 0) -> dict[str, jax.Array]:
    """Random captions of `CAPTION` tokens; the last one of every second caption is padding."""
    embeds = jax.random.normal(jax.random.key(seed), (batch, CAPTION, 16))
    mask = jnp.ones((batch, CAPTION), bool).at[::2, -1].set(False)
    return {'embeds': embeds, 'mask': mask}


def make_null() -> dict[str, jax.Array]:
    """One row, a single real token: the shape that the encoded empty caption has."""
    return {'embeds': jax.random.normal(jax.random.key(99), (1, CAPTION, 16)),
            'mask': jnp.zeros((1, CAPTION), bool).at[:, 0].set(True)}


def make_batch(rows: int, seed: int = 0, real: Any = None) -> Batch:
    """Prompts of `make_cond`, as the updates take them."""
    return Batch(make_cond(rows, seed), real, SHAPE)


def make_recipe(schedule='decoupled_hybrid', steps=2, shift=1.0, alpha=4.0, alpha_range=(),
                alpha_ramp=0, normaliser='per_term', floor=0.02, tau_ca=(0.0, 0.98),
                tau_dm=(0.0, 0.98), tau_ca_end=(), tau_dm_end=(), tau_relax=0,
                **changes: Any) -> Recipe:
    """The recipe of `configs/emoji.py`, in two steps so that one program simulates one."""
    return Recipe(
        FewSteps(Shift(shift), steps), schedules.get(schedule),
        Ranges(tau_ca, tau_dm, tau_ca_end, tau_dm_end, tau_relax),
        Alpha(alpha, alpha_range, alpha_ramp), normaliser=Normaliser(normaliser, floor), **changes)


def make_gan(features: Any = None, params: Any = None, **section: Any) -> Gan:
    """The GAN on the tiny NextDiT's tokens, or on those of ``features(params, x_t, t, cond)``."""
    teacher = Teacher(
        'tiny', params or make_params()[0], None, Latents(SHAPE), CondSpec.text(16), Shift(),
        'tiny', emoji.RULES, features=features or emoji.make_features(MODEL))
    default = {'weight': 0.3, 'critic_weight': 0.2, 'r1': 0.0, 'tau': (0.0, 0.98)}
    return Gan(ConfigDict(default | section), teacher)


def make_mean_variance(weight: float, mean: float, variance: float) -> MeanVariance:
    section = ConfigDict({'weight': weight, 'mean': mean, 'variance': variance})
    return MeanVariance(section, Teacher(
        'tiny', None, None, Latents(SHAPE), CondSpec.text(16), Shift(), 'tiny', ()))


def build_run(predict, params, tx, mesh, offload=(), recipe=None, extra=None, **mechanics):
    """``(spec of the state, program, frozen)`` of a toy run; `params` are teacher, student, critic.

    `offload` names what stays in host memory, of 'ema' and 'teacher'; `extra` are parameters of
    regularisers.
    """
    teacher, student, critic = params
    frozen = Frozen(teacher, make_null())
    layout = Frozen(sharding.shard_tree(teacher, emoji.RULES, mesh),
                    jax.tree.map(lambda _: sharding.replicated(mesh), frozen.null))
    if 'teacher' in offload:
        layout = dataclasses.replace(layout, teacher=sharding.in_host_memory(layout.teacher))
    fill = lambda s, c: st.fresh(s, tx, c, tx, extra)
    spec = st.StateSpec(fill, (*discriminator.RULES, *emoji.RULES), mesh, (student, critic),
                        tuple(name for name in offload if name == 'ema'))
    updates = Updates(predict, recipe or make_recipe(),
                      Mechanics(tx, tx, **({'ema': 0.9} | mechanics)))
    return spec, updates.jitted(mesh, spec.shardings, layout), jax.device_put(frozen, layout)


def xla_flags(devices: int) -> str:
    """``XLA_FLAGS`` of this process and so many host devices (the last of two flags counts)."""
    return f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count={devices}'


def run_on_devices(what: str | Path, devices: int = 8, *args: Any) -> str:
    """Output of a module or file run with `args` on `devices` host devices, in its own process.

    The number of host devices is fixed when JAX starts, so that no test can change it for
    itself, and setting it for all of them would slow down every other test.
    """
    process = forked.start(what, *args, XLA_FLAGS=xla_flags(devices))
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, f'{out}\n{err}'
    return out + err


def unshift(t, shift):
    """Uniform time of a shifted one: the inverse of `time.Shift`, in numpy."""
    t = np.asarray(t, np.float64)
    return shift * t / (1 + (shift - 1) * t)


def load_config(name: str, *args: str) -> Any:
    """`get_config(*args)` of ``configs/<name>.py``."""
    return config_lib.load(':'.join([name, *args])).unlock()
