"""Shared fixtures: a tiny NextDiT, its parameters, and settings for properties."""

from __future__ import annotations

import os

# Tolerances are those of CPU arithmetic; say JAX_PLATFORMS=tpu to try them elsewhere.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import hypothesis
import jax
import pytest
import tiny

from ddmd_jax.families.emoji import teacher as emoji

# No deadline: an example that compiles is slow once. The same examples every run: a gate must
# not fail for reasons that the change under test did not bring.
hypothesis.settings.register_profile(
    'gate', deadline=None, derandomize=True, max_examples=40, database=None)
hypothesis.settings.load_profile('gate')


@pytest.fixture(scope='session', autouse=True)
def compile_cache(tmp_path_factory):
    """Programs that several tests build alike are compiled once a session, never across."""
    jax.config.update('jax_compilation_cache_dir', str(tmp_path_factory.mktemp('xla')))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)


@pytest.fixture(scope='module')
def quick_compile():
    """Halves compile times by leaving XLA's optimisations out: toy programs run once or twice."""
    before = jax.config.read('jax_disable_most_optimizations')
    jax.config.update('jax_disable_most_optimizations', True)
    yield
    jax.config.update('jax_disable_most_optimizations', before)


@pytest.fixture(scope='session')
def model():
    return tiny.MODEL


@pytest.fixture(scope='session')
def predict(model):
    """``predict(params, x_t, t, cond) -> x_hat`` of the tiny NextDiT."""
    return emoji.make_denoiser(model)


@pytest.fixture(scope='session')
def params():
    """Parameters of teacher, student and critic: near one another, none of them zero."""
    return tiny.make_params()


@pytest.fixture(scope='session')
def cond():
    """Conditioning of four prompts, one padded token in every second."""
    return tiny.make_cond(4)
