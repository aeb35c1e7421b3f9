"""Runs and exports in buckets: what they leave there is what they leave on a disk."""

import json

import jax
import numpy as np
import published
import pytest
import small
import stores
from flax import nnx
from PIL import Image
from saved import save
from test_buckets import bucket, names, root  # noqa: F401  (fixtures)

from ddmd_jax.evaluation import pictures
from ddmd_jax.export.write import Wanted, export
from ddmd_jax.families import LoadOptions
from ddmd_jax.families.lumina import teacher as lumina
from ddmd_jax.models.layers import abstract_params
from ddmd_jax.models.nextdit import NextDiT
from ddmd_jax.report import page, read
from ddmd_jax.train import train
from ddmd_jax.train.durable import checkpoint as ckpt, checksums, lock
from ddmd_jax.util import buckets, files, jsonl, places

CONFIG = {'_class_name': lumina.TRANSFORMER, **published.TRANSFORMER}


@pytest.fixture(scope='module')
def gs():
    with stores.serving('gs', 'runs') as url:
        yield url


def trained(workdir, steps):
    config = small.config_of(**{'train.steps': steps, 'log.images_every': 2})
    options = train.Options(profile=(3, 3), report=page.write, about={})
    return train.fit(small.task_of(config), config, workdir, options)[0]


def damage(place):
    """Other bytes, as many."""
    place.write_bytes(bytes(len(place.read_bytes())))


def test_a_run_in_a_bucket_is_the_one_on_disk(gs, tmp_path):
    workdir, checkpoints = places.of(f'{gs}/P'), places.of(f'{gs}/P/checkpoints')
    with lock.held(workdir), pytest.raises(lock.LockError, match='is in use by process'), \
            lock.held(workdir):
        pass
    trained(workdir, 2)
    assert checksums.steps(checkpoints) == [2]
    parts, whole = trained(workdir, 4), trained(tmp_path / 'whole', 4)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert jsonl.read(workdir / 'metrics.jsonl') == jsonl.read(tmp_path / 'whole/metrics.jsonl')
    top = lambda found: {name.partition('/')[0] for name in found} - {'damaged', 'lock'}
    assert top(names(workdir)) == top(files.sizes(tmp_path / 'whole'))
    assert top(names(workdir)) >= {'checkpoints', 'config.json', 'profile', 'report.html',
                                   'run.json', 'tensorboard', 'times.jsonl'}
    assert read.read(workdir).step == 4

    # A checkpoint that is damaged, and one that a save has not brought to its end.
    assert [checksums.fault(checkpoints / str(step)) for step in (2, 4)] == ['', '']
    largest = max(checksums.sizes(checkpoints / '4').items(), key=lambda item: item[1])[0]
    damage(checkpoints / '4' / largest)
    assert checksums.fault(checkpoints / '4') == f'{largest} is not what was written'
    ckpt.set_aside(checkpoints)
    assert checksums.steps(checkpoints) == [2] and (workdir / 'damaged' / '4').is_dir()
    assert int(trained(workdir, 4).step) == 4 and checksums.steps(checkpoints) == [2, 4]
    buckets.remove(checkpoints / '4' / checksums.COMMITTED)
    assert checksums.steps(checkpoints) == [2]
    assert int(trained(workdir, 4).step) == 4 and checksums.steps(checkpoints) == [2, 4]


@pytest.fixture
def ema():
    cfg, rng = lumina.model_config(CONFIG, 'float32', 'none'), np.random.default_rng(0)
    return jax.tree.map(lambda a: rng.standard_normal(a.shape).astype(a.dtype),
                        abstract_params(lambda: NextDiT(cfg, nnx.Rngs(0))))


def test_a_student_is_exported_from_a_bucket_to_a_bucket(root, ema, tmp_path):  # noqa: F811
    files.write_json(root / 'teacher' / 'config.json', CONFIG)
    manifest = {'teacher.name': 'lumina', 'teacher.path': str(root / 'teacher')}
    buckets.put(save(tmp_path / 'run', manifest, ema), root / 'run')
    if places.scheme(root) == 'gs':  # Orbax's mark, which one written there has
        files.remove(root / 'run')
        save(root / 'run', manifest, ema)
    folder, card = export(root / 'run', root / 'out')
    assert (str(folder), str(card)) == (f'{root}/out/transformer', f'{root}/out/README.md')
    back = lumina.load(LoadOptions(str(folder), size=(16, 16))).params
    jax.tree.map(np.testing.assert_array_equal, back, ema)
    with pytest.raises(Exception, match='out/transformer exists already'):
        export(root / 'run', root / 'out')


def test_orbax_opens_what_was_exported_to_a_bucket(gs, ema):
    import orbax.checkpoint as ocp

    place = places.of(f'{gs}/orbax')
    files.write_json(place / 'teacher' / 'config.json', CONFIG)
    save(place / 'run', {'teacher.name': 'lumina', 'teacher.path': str(place / 'teacher')}, ema)
    params, _ = export(place / 'run', place / 'out', Wanted(format='orbax'))
    with ocp.StandardCheckpointer() as reader:
        jax.tree.map(np.testing.assert_array_equal, reader.restore(params), ema)


def test_a_picture_says_in_a_bucket_what_it_is(root):  # noqa: F811
    for suffix in pictures.SUFFIXES:
        pictures.save(Image.new('RGB', (2, 2)), root / f'a{suffix}', {'prompt': 'a cat'})
        with Image.open(buckets.local(root / f'a{suffix}')) as image:
            said = image.info.get('prompt') or json.loads(image.getexif()[0x010e])['prompt']
        assert said == 'a cat'
