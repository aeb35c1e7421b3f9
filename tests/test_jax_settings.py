"""A user's global settings of JAX: a run goes as it does without them."""

import contextlib

import jax
import numpy as np
import pytest
import small

from ddmd_jax.parallel import sharding
from ddmd_jax.train import train as trains
from ddmd_jax.util.errors import EnvironmentFault

SETTINGS = {
    'nothing': contextlib.nullcontext, 'x64': lambda: jax.enable_x64(True),
    'debug_nans': lambda: jax.debug_nans(True),
    'matmul precision': lambda: jax.default_matmul_precision('highest'),
    'rank promotion': lambda: jax.numpy_rank_promotion('warn')}


@pytest.fixture(scope='module')
def ended(tmp_path_factory):
    """``ended(name)``: the state that two steps end in under a setting."""
    found = {}

    def of(name):
        if name not in found:
            config = small.config_of()
            with SETTINGS[name]():
                found[name] = jax.device_get(trains.fit(
                    small.task_of(config), config, tmp_path_factory.mktemp('run'))[0])
        return found[name]

    return of


@pytest.mark.parametrize('name', [name for name in SETTINGS if name != 'nothing'])
def test_a_setting_changes_no_run(ended, name):
    mine, plain = ended(name), ended('nothing')
    for path, leaf in jax.tree_util.tree_leaves_with_path(mine):
        like = dict(jax.tree_util.tree_leaves_with_path(plain))[path]
        assert leaf.dtype == like.dtype, jax.tree_util.keystr(path)
        np.testing.assert_allclose(leaf, like, rtol=1e-4, atol=1e-6)


def test_without_jit_there_is_a_line():
    """Steps and samplers are compiled ahead, which JAX then does not do."""
    with jax.disable_jit(), pytest.raises(EnvironmentFault, match='JAX_DISABLE_JIT is set; unset'):
        sharding.all_devices()
