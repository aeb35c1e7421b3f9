"""Shared fixtures: a tiny NextDiT, its parameters, and settings for properties."""

from __future__ import annotations

import atexit
import importlib.metadata
import os
import shutil
import tempfile

# Before jax is imported, and inherited by every process that a test or pytest-xdist starts.
# Tolerances are those of CPU arithmetic; say JAX_PLATFORMS=tpu to try them elsewhere.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Toy programs run once or twice, so that compiling them is most of a test: XLA leaves its
# optimisations out and emits loops the old way (together 15.8 -> 2.9 s for the generator's step).
os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
# There is a worker for each core. PyTorch's OpenMP threads wait for one another by spinning: two
# workers of two threads each took twice the seconds of two workers of one.
os.environ.setdefault('OMP_NUM_THREADS', '1')
if importlib.metadata.version('jaxlib').startswith('0.10.'):  # 0.11 ends at a flag it has not
    os.environ['XLA_FLAGS'] = ' '.join(
        ['--xla_cpu_use_fusion_emitters=false', *os.environ.get('XLA_FLAGS', '').split()])
# A program that several tests or processes build alike is compiled once. .ci/run names a folder
# for all its stages; otherwise it lasts as long as this run, so that no run sees another's.
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.1')
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    os.environ['JAX_COMPILATION_CACHE_DIR'] = tempfile.mkdtemp(prefix='ddmd_xla_')
    atexit.register(shutil.rmtree, os.environ['JAX_COMPILATION_CACHE_DIR'], ignore_errors=True)

import hypothesis
import jax
import numpy as np
import pytest
import tiny
from saved import save

from ddmd_jax import families
from ddmd_jax.families.emoji import teacher as emoji

# No deadline: an example that compiles is slow once. The same examples every run: a gate must
# not fail for reasons that the change under test did not bring.
hypothesis.settings.register_profile(
    'gate', deadline=None, derandomize=True, max_examples=40, database=None)
hypothesis.settings.load_profile('gate')


LONG = ('test_parity_sdxl.py::test_a_run', 'test_parity_lumina.py::test_a_run',
        'test_parity_zimage.py::test_a_run', 'test_plan.py::test_both_steps_are_compiled',
        'test_distributed.py::test_two_processes_are_one_run')


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """What takes minutes begins first, at the head of either worker's half: at the end the other
    one would wait for it."""
    long = [item for item in items if any(name in item.nodeid for name in LONG)]
    rest = [item for item in items if item not in long]
    half = len(rest) // 2
    items[:] = [*long[0::2], *rest[:half], *long[1::2], *rest[half:]]


@pytest.fixture(scope='session')
def weights(tmp_path_factory):
    """File of an emoji teacher."""
    return tiny.save_toy(tmp_path_factory.mktemp('teacher'))


@pytest.fixture(scope='module')
def run(weights, tmp_path_factory):
    """Folder of a run whose student, of two steps, is near its teacher."""
    teacher = families.load_teacher(str(weights))
    manifest = {'task': 'distill', 'teacher.name': 'emoji', 'teacher.path': str(weights),
                'teacher.dtype': 'float32', 'student.steps': 2,
                'teacher_identity': teacher.identity}
    other = tiny.random_params(tiny.TOY, 1)['denoiser']
    ema = jax.tree.map(lambda a, b: np.asarray(a + 0.1 * (b - a)), teacher.params, other)
    return save(tmp_path_factory.mktemp('run'), manifest, ema, step=7)


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
