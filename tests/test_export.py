"""A run's averaged student, written for others to load: what is written, what is refused."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import published
import pytest
import tiny
from flax import nnx

from ddmd_jax import sharding
from ddmd_jax.data import loader
from ddmd_jax.data.order import Order
from ddmd_jax.export import export
from ddmd_jax.models.layers import abstract_params
from ddmd_jax.models.nextdit import NextDiT
from ddmd_jax.teachers import lumina
from ddmd_jax.train import checksums, state as st
from ddmd_jax.train.checkpoint import CheckpointError, read_manifest, restore_ema
from ddmd_jax.train.feed import Feed
from ddmd_jax.train.saving import Checkpoints
from ddmd_jax.weights.flat import WeightsError

CONFIG = {'_class_name': lumina.TRANSFORMER, **published.TRANSFORMER}
SMALL = {'layers': {'attn': {'to_q': {'kernel': np.ones((2, 4, 6), np.float32)}}},
         'x_embedder': {'bias': np.arange(4, dtype=np.float32)}}


def save(workdir, manifest, ema, step=3):
    """Leaves the checkpoint of a run in `workdir` whose student is ahead of its average."""
    ahead, tx = jax.tree.map(lambda x: x + 1, ema), optax.adamw(1e-3)
    state = dataclasses.replace(st.fresh(ahead, tx, ahead, tx), ema=jax.tree.map(jnp.asarray, ema))
    checkpoints = Checkpoints(workdir, keep=1, manifest=manifest)
    read = loader.batches(Order(np.arange(4), 2, 0), lambda rows, length: rows, 2)
    checkpoints.save(step, state, Feed(read, lambda batch: batch))
    checkpoints.wait()
    checkpoints.close()
    return workdir


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    """The teacher's folder. A student has its shape: nothing but the config is looked at."""
    folder = tmp_path_factory.mktemp('teacher')
    (folder / 'config.json').write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture(scope='module')
def ema():
    cfg = lumina.model_config(CONFIG, 'float32', 'none')
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: rng.standard_normal(a.shape).astype(a.dtype),
                        abstract_params(lambda: NextDiT(cfg, nnx.Rngs(0))))


@pytest.fixture(scope='module')
def run(teacher, ema, tmp_path_factory):
    """Folder of a finished run of Lumina."""
    manifest = {'teacher.name': 'lumina', 'teacher.path': str(teacher)}
    return save(tmp_path_factory.mktemp('run'), manifest, ema)


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    """Folder of a run of the embedded teacher."""
    return save(tmp_path_factory.mktemp('small'), {'teacher.name': 'emoji'}, SMALL, step=7)


def one_device():
    return sharding.make_mesh({}, jax.devices()[:1])


def like(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.float32), tree)


def restore(workdir, abstract):
    layout = sharding.shard_tree(abstract, lumina.RULES, one_device())
    return restore_ema(workdir, 7, abstract, layout)


# --- What is written ---


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_the_exported_student_reads_back_bitwise(run, ema, tmp_path, dtype):
    folder = export(run, tmp_path / 'deep' / 'out', dtype)
    assert folder == tmp_path / 'deep' / 'out' / 'transformer'
    assert json.loads((folder / 'config.json').read_text()) == json.loads(json.dumps(CONFIG))
    back = lumina.load(str(folder), one_device(), size=(16, 16)).params
    rounded = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)).astype(np.float32), ema)
    jax.tree.map(np.testing.assert_array_equal, back, rounded)


def test_a_teacher_that_moved_is_named_by_hand(ema, tmp_path):
    manifest = {'teacher.name': 'lumina', 'teacher.path': '/gone'}
    workdir = save(tmp_path / 'run', manifest, ema)
    with pytest.raises(WeightsError, match='no folder /gone'):
        export(workdir, tmp_path / 'out', 'float32')
    assert not (tmp_path / 'out').exists()
    pipeline = tmp_path / 'pipeline'  # the whole one will do as well as its transformer
    (pipeline / 'transformer').mkdir(parents=True)
    (pipeline / 'model_index.json').write_text('{}')
    (pipeline / 'transformer' / 'config.json').write_text(json.dumps(CONFIG))
    assert export(workdir, tmp_path / 'out', 'float32', str(pipeline)).is_dir()


def test_the_average_is_read_and_not_the_student(small):
    got = restore(small, like(SMALL))
    jax.tree.map(np.testing.assert_array_equal, got, SMALL)
    assert all(isinstance(x.sharding, jax.sharding.NamedSharding) for x in jax.tree.leaves(got))


def test_the_manifest_comes_with_the_newest_step(small):
    assert read_manifest(small) == (7, {'teacher.name': 'emoji'})


# --- Refusals: one line ---


def no_folder(run, small, tmp_path):
    return tmp_path / 'nothing', 'nothing holds no checkpoints; give the --workdir of a run'


def no_checkpoint(run, small, tmp_path):
    (tmp_path / 'run' / 'checkpoints').mkdir(parents=True)
    return tmp_path / 'run', 'is empty: the run has saved nothing yet'


def damaged_manifest(run, small, tmp_path):
    save(tmp_path / 'run', {'teacher.name': 'lumina'}, SMALL)
    next((tmp_path / 'run/checkpoints/3/manifest').rglob('metadata')).write_text('{')
    return tmp_path / 'run', 'checkpoints/3 has no readable manifest; delete that folder'


def embedded_teacher(run, small, tmp_path):
    return small, "distils the teacher 'emoji'.*only students of lumina can be exported"


def damaged_file(run, small, tmp_path):
    """One bit of the tensors: still readable, and another student."""
    (tmp_path / 'config.json').write_text(json.dumps(CONFIG))
    folder = save(tmp_path / 'run', {'teacher.name': 'lumina', 'teacher.path': str(tmp_path)},
                  SMALL) / 'checkpoints' / '3'
    path = max(checksums.files(folder).values(), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return tmp_path / 'run', r'3 is damaged \(.* is not what was written\); start the run'


def another_shape(run, small, tmp_path):
    config = CONFIG | {'cap_feat_dim': 32}
    (tmp_path / 'config.json').write_text(json.dumps(config))
    manifest = {'teacher.name': 'lumina', 'teacher.path': str(tmp_path)}
    return save(tmp_path / 'run', manifest, SMALL), 'checkpoints/3/state holds no student of this'


@pytest.mark.parametrize('case', [
    no_folder, no_checkpoint, damaged_manifest, damaged_file, embedded_teacher, another_shape])
def test_what_cannot_be_exported_is_refused_in_one_line(run, small, tmp_path, case):
    workdir, words = case(run, small, tmp_path)
    with pytest.raises(CheckpointError, match=words) as e:
        export(workdir, tmp_path / 'out', 'float32')
    assert len(str(e.value).splitlines()) == 1
    assert not (tmp_path / 'out').exists()


def test_export_never_overwrites(run, tmp_path):
    mine = tmp_path / 'transformer' / 'mine.txt'
    mine.parent.mkdir()
    mine.write_text('kept')
    with pytest.raises(WeightsError, match='transformer exists already; choose another place'):
        export(run, tmp_path, 'float32')
    assert mine.read_text() == 'kept' and len(list(tmp_path.rglob('*'))) == 2


@pytest.mark.parametrize('changes, words', [
    # Neither padded nor cut nor made up nor left out.
    ({'x_embedder': {'bias': np.zeros(5)}}, r'x_embedder/bias is \(4,\), not \(5,\)'),
    ({'x_embedder': {'bias': np.zeros(3)}}, r'x_embedder/bias is \(4,\), not \(3,\)'),
    ({'out_proj': {'bias': np.zeros(4)}}, r'out_proj/bias is absent, not \(4,\)'),
    ({'x_embedder': {}}, r'x_embedder/bias is \(4,\), not wanted'),
])
def test_an_average_of_another_shape_is_no_student(small, changes, words):
    abstract = like(SMALL | changes)
    with pytest.raises(CheckpointError, match=rf'7/state holds no student .*\({words}\)') as e:
        restore(small, abstract)
    assert len(str(e.value).splitlines()) == 1


# --- The command ---


def command(*args):
    """``(exit code, lines of export's own on stderr, everything on stderr)``."""
    done = subprocess.run([sys.executable, '-m', 'ddmd_jax.export', *args], cwd=tiny.ROOT,
                          capture_output=True, text=True, env=os.environ | {'JAX_PLATFORMS': 'cpu'})
    own = [x for x in done.stderr.splitlines() if x.startswith('export: ')]
    return done.returncode, own, done.stderr


@pytest.mark.parametrize('args, words', [
    (['--out=o'], 'export: no --checkpoint given'),
    (['--checkpoint=c', '--out='], 'export: no --out given'),
    (['--checkpoint=c', 'o'], "export: unexpected argument 'o'"),
    (['--checkpoint=/nowhere', '--out=o'], 'export: /nowhere holds no checkpoints; give the'),
])
def test_bad_input(args, words):
    code, own, everything = command(*args)
    assert code == 1, everything
    assert len(own) == 1 and own[0].startswith(words)
    assert everything.splitlines() == own


def test_the_command_says_one_line_about_a_run_it_cannot_export(small, tmp_path):
    """Checkpoints are opened here: what Orbax has to say about that is of no use."""
    code, own, everything = command(f'--checkpoint={small}', f'--out={tmp_path / "o"}')
    assert code == 1 and len(own) == 1
    assert everything.splitlines() == own
