"""A run of Lumina that starts from what another's student was exported as, at toy size."""

import jax
import numpy as np
import published
import published_text
import pytest
import tiny
from flax import nnx

from ddmd_jax.config import check
from ddmd_jax.data import embeddings
from ddmd_jax.export.write import export
from ddmd_jax.families.lumina import teacher as lumina
from ddmd_jax.models.layers import abstract_params
from ddmd_jax.models.nextdit import NextDiT
from ddmd_jax.train import train
from ddmd_jax.train.durable import resume
from ddmd_jax.train.durable.checkpoint import CheckpointError

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """A folder with a teacher's transformer and the embeddings of eight prompts."""
    folder = tmp_path_factory.mktemp('lumina')
    config = {'_class_name': lumina.TRANSFORMER, **published.TRANSFORMER}
    cfg = lumina.model_config(config)
    weights = published_text.random_params(abstract_params(lambda: NextDiT(cfg, nnx.Rngs(0))), 1)
    lumina.export(weights, config, folder / 'teacher', np.float32)
    rng, width = np.random.default_rng(0), published.TRANSFORMER['cap_feat_dim']
    rows = [{'embeds': rng.standard_normal((n, width)).astype(embeddings.FLOAT)}
            for n in (5, 6) * 4]
    embeddings.write(folder / 'embeddings', {'width': width, 'length': 6, 'identity': 'a'}, rows[0],
                     [('x', row) for row in rows])
    return folder


def config_of(files, steps=1, init_from='', offload='none', param_dtype='float32'):
    config = tiny.load_config('lumina')
    config.teacher.update({'path': str(files / 'teacher'), 'dtype': 'float32', 'remat': 'none',
                           'param_dtype': param_dtype})
    config.data.update({'name': 'embeddings', 'path': str(files / 'embeddings'),
                        'global_batch': 2, 'sizes': ((16, 16),)})
    config.student.steps, config.critic.updates, config.mesh.fsdp = 2, 1, 1
    config.train.steps, config.train.offload = steps, offload
    config.log.probe, config.init_from = 0, str(init_from)
    for optim in (config.optim.student, config.optim.critic):
        optim.lr, optim.warmup = 1e-2, 0
    check(config)
    return config


def trained(config, workdir):
    """The state at the end."""
    return train.fit(train.prepare(config), config, workdir)[0]


def begun(config):
    """(the task, the state it begins with, metrics that were not logged)."""
    task = train.prepare(config)
    return task, *resume.begin(resume.origin(config), {}, task, task.feed(frozenset()))


@pytest.fixture(scope='module')
def first(files, tmp_path_factory):
    """A run of one step, and where its student was exported to."""
    workdir = tmp_path_factory.mktemp('first')
    state = trained(config_of(files), workdir)
    export(workdir, workdir / 'out')
    return workdir, jax.device_get(state)


def kinds(tree):
    return {x.sharding.memory_kind for x in jax.tree.leaves(tree)}


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


@pytest.mark.parametrize('offload, param_dtype', [
    ('none', 'bfloat16'), ('ema', 'float32'), ('ema+teacher', 'float32')])
@pytest.mark.parametrize('what', ['exported', 'transformer', 'run'])
def test_a_state_begins_at_what_was_exported(files, first, what, offload, param_dtype):
    workdir, before = first
    named = {'exported': workdir / 'out', 'transformer': workdir / 'out' / 'transformer',
             'run': workdir}[what]
    config = config_of(files, 1, named, offload, param_dtype)
    task, state, interval = begun(config)
    assert interval == [] and int(state.step) == int(state.critic_step) == 0
    same(state.ema, before.ema)  # to the last bit, whatever the teacher is kept in
    if what == 'run':
        same(state.student, before.student)
        same(state.critic, before.critic)
    else:
        same(state.student, before.ema)
        widened = jax.tree.map(lambda x: np.asarray(x, np.float32), task.teacher.params)
        same(state.critic, widened)
    assert kinds(state.ema) == {'device' if offload == 'none' else 'pinned_host'}
    assert kinds(state.student) == kinds(state.critic) == {'device'}
    assert all(not np.any(x) for x in jax.tree.leaves(jax.device_get(state.student_opt)))


def test_a_run_goes_on_from_what_was_exported_with_weights_offloaded(files, first, tmp_path):
    workdir, before = first
    config = config_of(files, 1, workdir / 'out', 'ema+teacher')
    state = trained(config, tmp_path)
    assert int(state.step) == 1 and kinds(state.ema) == {'pinned_host'}
    moved = [not np.array_equal(x, y) for x, y in zip(
        jax.tree.leaves(jax.device_get(state.student)), jax.tree.leaves(before.ema), strict=True)]
    assert sum(moved) > 0.9 * len(moved)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(state.student)))
    # And from its own folder when it is started again, whatever became of the other.
    config = config_of(files, 2, tmp_path / 'gone', 'ema+teacher')
    assert int(trained(config, tmp_path).step) == 2


def test_weights_of_another_shape_are_refused_in_one_line(files, tmp_path):
    config = {'_class_name': lumina.TRANSFORMER, **published.TRANSFORMER, 'num_layers': 1}
    cfg = lumina.model_config(config)
    weights = published_text.random_params(abstract_params(lambda: NextDiT(cfg, nnx.Rngs(0))), 1)
    lumina.export(weights, config, tmp_path / 'other', np.float32)
    config = config_of(files, 1, tmp_path / 'other')
    with pytest.raises(CheckpointError, match='holds no student of this shape') as e:
        begun(config)
    assert len(str(e.value).splitlines()) == 1
