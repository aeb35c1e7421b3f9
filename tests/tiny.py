"""A NextDiT small enough to compile in seconds, and what several test files need around it.

Imported by `conftest.py`, and by test code that runs in a process of its own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddmd_jax.families.emoji import teacher as emoji
from ddmd_jax.method.recipe import Method
from ddmd_jax.models import discriminator
from ddmd_jax.parallel import sharding
from ddmd_jax.train import state as st
from ddmd_jax.train.step import make_steps

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

    shapes = jax.eval_shape(lambda: emoji.init_params(model, jax.random.key(0)))
    return jax.tree_util.tree_map_with_path(fill, shapes)


def make_params() -> list[Any]:
    """Denoisers of teacher, student and critic: near one another, as they are in a run."""
    teacher, one, two = (random_params(MODEL, seed)['denoiser'] for seed in range(3))
    near = lambda a, b: jax.tree.map(lambda x, y: x + 0.1 * (y - x), a, b)
    return [teacher, near(teacher, one), near(teacher, two)]


def make_cond(batch: int, seed: int = 0) -> dict[str, jax.Array]:
    """Random captions of `CAPTION` tokens; the last one of every second caption is padding."""
    embeds = jax.random.normal(jax.random.key(seed), (batch, CAPTION, 16))
    mask = jnp.ones((batch, CAPTION), bool).at[::2, -1].set(False)
    return {'embeds': embeds, 'mask': mask}


def make_null() -> dict[str, jax.Array]:
    """One row, a single real token: the shape that the encoded empty caption has."""
    return {'embeds': jax.random.normal(jax.random.key(99), (1, CAPTION, 16)),
            'mask': jnp.zeros((1, CAPTION), bool).at[:, 0].set(True)}


def make_method(**changes: Any) -> Method:
    """The recipe of `configs/emoji.py`, in two steps so that one program simulates one."""
    recipe = {
        'schedule': 'decoupled_hybrid', 'alpha': 4.0, 'weight_ca': 1.0, 'weight_dm': 1.0,
        'tau_ca': (0.0, 0.98), 'tau_dm': (0.0, 0.98), 'tau_critic': (0.0, 0.98),
        'normaliser': 'per_term', 'floor': 0.02, 'critic_weighting': 'velocity',
        'num_steps': 2, 'shift': 1.0, 'ema': 0.9, 'ema_ramp': True, 'accumulate': 1}
    return Method(**(recipe | changes))


def build_run(predict, params, tx, mesh, offload=(), head=None, **changes):
    """``(make_state, steps, frozen)`` of a toy run; `params` are teacher, student, critic.

    `offload` names what stays in host memory, of 'ema' and 'teacher'; `head` is a GAN's.
    """
    teacher, student, critic = params
    frozen = {'teacher': teacher, 'null': make_null()}
    frozen_shardings = {
        'teacher': sharding.shard_tree(teacher, emoji.RULES, mesh),
        'null': jax.tree.map(lambda _: sharding.replicated(mesh), frozen['null'])}
    if 'teacher' in offload:
        frozen_shardings['teacher'] = sharding.in_host_memory(frozen_shardings['teacher'])
    host = [name for name in offload if name == 'ema']
    fill = lambda s, c: st.fresh(s, tx, c, tx, head)
    rules = (*discriminator.RULES, *emoji.RULES)
    _, shardings = st.abstract_and_shardings(
        fill, rules, mesh, student, critic, host=host)
    make_state = lambda: st.create(fill, rules, mesh, student, critic, host=host)
    steps = make_steps(predict, tx, tx, make_method(**changes), SHAPE, 0, mesh, shardings,
                       frozen_shardings)
    return make_state, steps, jax.device_put(frozen, frozen_shardings)


def xla_flags(devices: int) -> str:
    """``XLA_FLAGS`` of this process and so many host devices (the last of two flags counts)."""
    return f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count={devices}'


def run_on_devices(script: str | Path, devices: int = 8, *args: str) -> str:
    """Output of a Python file run with `args` on `devices` host devices, in its own process.

    The number of host devices is fixed when JAX starts, so that no test can change it for
    itself, and setting it for all of them would slow down every other test.
    """
    env = os.environ | {
        'XLA_FLAGS': xla_flags(devices),
        'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])}
    done = subprocess.run([sys.executable, str(script), *args], env=env, cwd=ROOT, text=True,
                          capture_output=True, timeout=600, check=False)
    assert done.returncode == 0, f'{done.stdout}\n{done.stderr}'
    return done.stdout + done.stderr


def unshift(t, shift):
    """Uniform time of a shifted one: the inverse of `time.Shift`, in numpy."""
    t = np.asarray(t, np.float64)
    return shift * t / (1 + (shift - 1) * t)


def load_config(name: str, *args: str) -> Any:
    """`get_config(*args)` of ``configs/<name>.py``."""
    spec = importlib.util.spec_from_file_location(name, ROOT / 'configs' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*args)
