"""Published folders without PyTorch: what is read, where it lands, what is refused."""

import json
import shutil
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest
import safetensors.numpy
import tiny
from flax import nnx

from ddmd_jax import families as teachers
from ddmd_jax.families import LoadOptions
from ddmd_jax.families.lumina import names, teacher as lumina
from ddmd_jax.models.layers import abstract_params
from ddmd_jax.models.nextdit import NextDiT
from ddmd_jax.parallel import sharding
from ddmd_jax.util import buckets
from ddmd_jax.weights import diffusers, fetch, flat
from ddmd_jax.weights.flat import WeightsError

CONFIG = {'_class_name': lumina.TRANSFORMER, **published.TRANSFORMER}
STEM = 'diffusion_pytorch_model'


@pytest.fixture(scope='module')
def abstract():
    cfg = lumina.model_config(CONFIG)
    return abstract_params(lambda: NextDiT(cfg, nnx.Rngs(0)))


@pytest.fixture(scope='module')
def params(abstract):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: rng.standard_normal(a.shape).astype(a.dtype), abstract)


@pytest.fixture(scope='module')
def exported(params, tmp_path_factory):
    folder = tmp_path_factory.mktemp('published') / 'transformer'
    diffusers.export_tree(params, names.transformer, folder, CONFIG, np.float32, file_bytes=100_000)
    return folder


@pytest.fixture
def folder(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / 'transformer')


def load(folder):
    return lumina.load(LoadOptions(str(folder), size=(16, 16)))


def rewrite(folder, change):
    """Applies `change` to the tensors of the folder's first file."""
    file = min(folder.glob('*.safetensors'))
    tensors = safetensors.numpy.load_file(file)
    change(tensors)
    safetensors.numpy.save_file(tensors, file, metadata={'format': 'pt'})


def test_export_and_import_give_back_every_value(exported, params):
    assert len(list(exported.glob('*.safetensors'))) > 2
    back = load(exported).params
    assert flat.flatten(back).keys() == flat.flatten(params).keys()
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_every_name_is_the_published_one(exported):
    index = json.loads((exported / f'{STEM}.safetensors.index.json').read_text())
    found = set(index['weight_map'])
    assert {'x_embedder.weight', 'layers.1.norm1.linear.bias', 'layers.0.norm1.norm.weight',
            'context_refiner.1.norm1.weight', 'noise_refiner.0.attn.to_out.0.weight',
            'time_caption_embed.caption_embedder.0.weight', 'norm_out.linear_2.bias'} <= found
    assert index['metadata']['total_size'] == sum(
        x.nbytes for f in exported.glob('*.safetensors')
        for x in safetensors.numpy.load_file(f).values())
    entry = names.autoencoder('decoder/mid_block/attentions/0/to_out/kernel')
    assert entry.name == 'decoder.mid_block.attentions.0.to_out.0.weight'
    assert entry.layout == 'linear'
    assert names.autoencoder('encoder/conv_in/kernel').shape((3, 3, 4, 8)) == (8, 4, 3, 3)


def test_a_published_matrix_is_stored_out_by_in(exported, params):
    tensors = {}
    for file in exported.glob('*.safetensors'):
        tensors |= safetensors.numpy.load_file(file)
    np.testing.assert_array_equal(
        tensors['layers.1.feed_forward.linear_2.weight'],
        params['layers']['feed_forward']['linear_2']['kernel'][1].T)


def test_half_precision_is_read_into_fp32(params, tmp_path):
    diffusers.export_tree(params, names.transformer, tmp_path / 't', CONFIG, jnp.bfloat16)
    back = load(tmp_path / 't').params
    same = lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16).astype(np.float32))
    jax.tree.map(same, back, params)
    assert {x.dtype for x in jax.tree.leaves(back)} == {np.dtype(np.float32)}


def test_identity_follows_the_values(folder):
    open_ = lambda: diffusers.open_folder(folder, lumina.TRANSFORMER)
    before = diffusers.identity(open_())
    assert diffusers.identity(open_()) == before

    def change(tensors):
        tensors[min(tensors)].flat[0] += 1e-6

    rewrite(folder, change)
    assert diffusers.identity(open_()) != before


def test_a_url_is_read_like_a_folder(exported, tmp_path, monkeypatch):
    import fsspec

    monkeypatch.setenv(buckets.CACHE, str(tmp_path / 'cache'))
    memory = fsspec.filesystem('memory')
    memory.put(str(exported), '/bucket/lumina', recursive=True)
    try:
        local = fetch.local_folder('memory://bucket/lumina', ('*.json', '*.safetensors'))
        again = fetch.local_folder('memory://bucket/lumina/', ('*.json', '*.safetensors'))
        assert local == again
        jax.tree.map(np.testing.assert_array_equal, load(local).params, load(exported).params)
        with pytest.raises(WeightsError, match='holds none of'):
            fetch.local_folder('memory://bucket/nothing', ('*.json',))
    finally:
        memory.rm('/bucket', recursive=True)


# --- Refusals: one line, naming what and where ---


def drop_file(folder):
    min(folder.glob('*.safetensors')).unlink()
    return 'names diffusion_pytorch_model-00001.*, not in that folder'


def reach_outside(folder):
    """An index whose file is a good one, but not of this folder."""
    for file in folder.glob('*.safetensors'):
        file.rename(folder.parent / file.name)
        name = f'../{file.name}'
    (folder / f'{STEM}.safetensors.index.json').write_text(json.dumps({'weight_map': {'a': name}}))
    return r"index.json names \.\./.*safetensors, not in that folder"


def truncate(folder):
    file = min(folder.glob('*.safetensors'))
    file.write_bytes(file.read_bytes()[:-1000])
    return f'weights damaged: .*{file.name}'


def misshape(folder):
    rewrite(folder, lambda t: t.update({min(t): np.zeros((3, 5), np.float32)}))
    return r'has shape \(3, 5\), expected \('


def leave_out(folder):
    rewrite(folder, lambda t: t.pop(min(t)))
    return 'lacks the tensor'


def add(folder):
    rewrite(folder, lambda t: t.update({'lora.weight': np.zeros(3, np.float32)}))
    return 'holds 1 tensors that this architecture does not have, lora.weight first'


def quantise(folder):
    rewrite(folder, lambda t: t.update({min(t): np.zeros((3, 5), np.int8)}))
    return 'I8 .*quantised weights cannot be distilled'


def quantise_fp8(folder):
    rewrite(folder, lambda t: t.update({min(t): np.zeros((3, 5), jnp.float8_e4m3fn)}))
    return 'F8_E4M3 .*quantised'


def pickle_only(folder):
    for file in folder.glob('*safetensors*'):
        file.unlink()
    (folder / f'{STEM}.bin').write_bytes(b'anything')
    return 'a pickle: loading one runs whatever code'


def another_class(folder):
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps(config | {'_class_name': 'FluxTransformer'}))
    return 'is FluxTransformer, not Lumina2Transformer2DModel'


def another_pipeline(folder):
    (folder / 'model_index.json').write_text(json.dumps({'_class_name': 'FluxPipeline'}))
    return 'is a FluxPipeline, not Lumina2Pipeline'


def broken_config(folder):
    (folder / 'config.json').write_text('{')
    return 'config.json cannot be read'


def no_config(folder):
    (folder / 'config.json').unlink()
    return 'config.json is missing; is .* a diffusers folder'


def without_a_field(folder):
    config = json.loads((folder / 'config.json').read_text())
    del config['num_kv_heads']
    (folder / 'config.json').write_text(json.dumps(config))
    return "is not one of Lumina2Transformer2DModel.*'num_kv_heads'"


@pytest.mark.parametrize('damage', [
    drop_file, reach_outside, truncate, misshape, leave_out, add, quantise, quantise_fp8,
    pickle_only, another_class, another_pipeline, broken_config, no_config, without_a_field])
def test_a_bad_folder_is_refused_in_one_line_before_memory_is_used(folder, damage, monkeypatch):
    words = damage(folder)
    monkeypatch.setattr(jax, 'device_put', lambda *a, **k: pytest.fail('device memory was used'))
    with pytest.raises(WeightsError, match=words) as e:
        load(folder)
    assert len(str(e.value).splitlines()) == 1


def test_paths_that_are_no_folder(tmp_path):
    for path in (str(tmp_path / 'gone'), './gone', 'a/b/c', 'word'):
        with pytest.raises(WeightsError, match='no folder'):
            fetch.local_folder(path, ('*',))


def test_sizes_must_fit_the_patches(exported):
    with pytest.raises(WeightsError, match='multiples of 16 pixels'):
        lumina.load(LoadOptions(str(exported), size=(16, 20)))


def test_export_never_overwrites(exported, params):
    with pytest.raises(WeightsError, match='exists already'):
        diffusers.export_tree(params, names.transformer, exported, CONFIG, np.float32)


def test_load_tells_families_apart(exported):
    assert teachers.load_teacher(str(exported), size=(16, 16)).family == 'lumina'
    assert teachers.load_teacher('emoji').family == 'emoji'


# --- Eight devices: straight into the layout, never a full copy ---


def test_import_on_eight_devices_keeps_host_memory_low(tmp_path):
    assert 'all checks passed' in tiny.run_on_devices(__file__, 8, str(tmp_path))


def resident() -> int:
    """Anonymous memory of this process, without the pages of mapped files."""
    with open('/proc/self/status') as f:
        return next(int(line.split()[1]) for line in f if line.startswith('RssAnon')) * 1024


def check_import(workdir):
    from pathlib import Path

    wide = {**CONFIG, 'hidden_size': 768, 'num_layers': 12, 'axes_dim_rope': (64, 64, 64),
            'multiple_of': 256}
    cfg = lumina.model_config(wide)
    abstract = abstract_params(lambda: NextDiT(cfg, nnx.Rngs(0)))
    zeros = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), abstract)  # no pages of their own
    zeros['layers']['attn']['to_q']['kernel'] = np.random.default_rng(0).standard_normal(
        zeros['layers']['attn']['to_q']['kernel'].shape).astype(np.float32)
    diffusers.export_tree(zeros, names.transformer, Path(workdir) / 't', wide, np.float32, 2**24)

    mesh = sharding.make_mesh({'data': 2, 'fsdp': 4})
    layout = sharding.shard_tree(abstract, lumina.RULES, mesh)
    checkpoint = diffusers.open_folder(Path(workdir) / 't', lumina.TRANSFORMER)
    before, peak, done = resident(), [0], threading.Event()

    def watch():
        while not done.is_set():
            peak[0] = max(peak[0], resident())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    params = jax.block_until_ready(
        diffusers.import_tree(checkpoint, abstract, layout, names.transformer))
    done.set()
    watcher.join()

    leaves = jax.tree.leaves(params)
    kept = sum(s.data.nbytes for x in leaves for s in x.addressable_shards)
    largest = max(x.nbytes for x in leaves) // 12  # of the published tensors, not of the stacks
    shard = max(s.data.nbytes for x in leaves for s in x.addressable_shards)
    extra, total = peak[0] - before - kept, sum(x.nbytes for x in leaves)
    allowance = 2 * largest + shard + 2**25  # the allocator's slack
    print(f'kept {kept >> 20} MB, beyond it {extra >> 20} MB, allowed {allowance >> 20} MB')
    assert total > 3 * allowance, 'the model is too small to show a full copy'
    assert extra < allowance
    q = params['layers']['attn']['to_q']['kernel']
    np.testing.assert_array_equal(q, zeros['layers']['attn']['to_q']['kernel'])
    assert q.addressable_shards[0].data.size * 4 == q.size
    print('all checks passed')


if __name__ == '__main__':
    import sys

    check_import(sys.argv[1])
