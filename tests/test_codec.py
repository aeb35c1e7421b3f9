"""The task `codec`, on a codec of two widths and 16-pixel scenes; see also test_parity_vae."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddmd_jax import config as config_lib
from ddmd_jax.config import defaults
from ddmd_jax.families.codec import CodecTraining
from ddmd_jax.families.emoji import codec as emoji, scenes
from ddmd_jax.models import autoencoder_kl
from ddmd_jax.parallel import sharding
from ddmd_jax.train import codec, train
from ddmd_jax.train.durable import checkpoint
from ddmd_jax.weights import diffusers, flat
from ddmd_jax.weights.flat import WeightsError


def config_of(**changes):
    return defaults('codec', {
        'teacher.name': 'emoji', 'data.name': 'emoji', 'data.global_batch': 2,
        'optim.student.lr': 1e-2, 'train.steps': 2, 'checkpoint.every': 1, 'log.every': 1,
        'log.report': False, 'codec.latent_channels': 2, 'codec.widths': (4, 8),
        'codec.groups': 2, 'codec.sides': (8,), 'codec.unseen': 2} | changes)


def images_of(rows, side):
    shades = np.asarray(rows)[:, None, None, None] * 37 % 256
    return np.broadcast_to(shades, (len(rows), side, side, 3)).astype(np.uint8)


def task_of(config, first=0):
    own = CodecTraining('shades', np.arange(first, first + 64), images_of, images_of([70, 71], 16),
                        lambda path: emoji.read(path)[:2], emoji.save)
    return codec.Codec(config, own, sharding.make_mesh({}, jax.devices()[:1]))


def equal(a, b):
    same = jax.tree.map(lambda x, y: bool((np.asarray(x) == np.asarray(y)).all()), a, b)
    return all(jax.tree.leaves(same))


def test_a_run_goes_on_where_it_stopped(tmp_path):
    whole, _ = train.fit(task_of(config_of()), config_of(), tmp_path / 'whole')
    short = config_of(**{'train.steps': 1})
    task = task_of(short)
    train.fit(task, short, tmp_path / 'parts')
    short.train.steps = 2
    parts, _ = train.fit(task, short, tmp_path / 'parts')
    assert equal(whole.ema, parts.ema)
    assert task._update._cache_size() == 1  # a longer run's program is the same
    lines = [json.loads(line) for line in
             (tmp_path / 'whole' / 'metrics.jsonl').read_text().splitlines()]
    assert {'loss', 'l1', 'gradient', 'kl', 'psnr'} <= lines[-1].keys()


def test_the_codec_that_ships_is_crisp():
    """On scenes that no training saw, half of them of captions that are held out."""
    images, shipped = emoji.unseen(scenes.load(), 128), emoji.load()
    found = codec.to_uint8(jnp.concatenate([
        shipped.latents.decode(part) for part in shipped.encode(images)[:, None]]))
    assert codec.psnr(images, np.asarray(found)).mean() >= 32


def test_data_that_has_changed_is_another_run(tmp_path):
    config = config_of(**{'train.steps': 1})
    train.fit(task_of(config), config, tmp_path)
    config.train.steps = 2
    other = task_of(config)
    other.identities = other.identities | {'data_identity': 'tints'}
    with pytest.raises(checkpoint.CheckpointError, match='data_identity.*shades'):
        train.fit(other, config, tmp_path)


@pytest.mark.slow
def test_a_frozen_encoder_is_that_of_the_file(tmp_path):
    first = task_of(config_of())
    state, _ = train.fit(first, config_of(), tmp_path / 'first')
    out = tmp_path / 'codec.safetensors'
    first.write(out, jax.device_get(state.ema), 2)
    cfg, params, about = emoji.read(out)
    assert about['step'] == 2 and cfg.scaling_factor > 0 and cfg.block_out_channels == (4, 8)

    refine = config_of(**{'codec.frozen_encoder': True, 'init_from': str(out)})
    task = task_of(refine, first=100)  # whose latents have another shift and scale
    state, _ = train.fit(task, refine, tmp_path / 'second')
    assert not equal(state.ema['decoder'], params['decoder'])
    task.write(tmp_path / 'refined.safetensors', jax.device_get(state.ema), 4)
    refined, after, _ = emoji.read(tmp_path / 'refined.safetensors')
    # A teacher trained on the latents of the first file takes the second.
    assert refined == cfg and equal(after['encoder'], params['encoder'])


def test_shift_and_scale_make_standard_latents(tmp_path):
    task = task_of(config_of())
    out = tmp_path / 'codec.safetensors'
    task.write(out, jax.device_get(task.spec.create().ema), 0)
    cfg, params, _ = emoji.read(out)
    encode, _ = autoencoder_kl.functional(cfg)
    latents = encode(params, codec.to_unit(images_of(np.arange(64), 16)))
    assert abs(float(latents.mean())) < 1e-3 and abs(float(latents.std()) - 1) < 1e-3


def test_psnr_is_that_of_each_image():
    real = np.zeros((2, 4, 4, 3), np.uint8)
    found = real.copy()
    found[1] += 16
    assert codec.psnr(real, found)[1] == pytest.approx(20 * np.log10(255 / 16))


def test_crops_are_parts_of_scenes_on_the_latents_grid():
    world, rows = scenes.load(), np.arange(4)
    whole = world.batch(emoji.SEED, rows)[1]
    for image, crop in zip(whole, emoji.crops(whole, rows, 32, 4)):
        assert any((image[y:y + 32, x:x + 32] == crop).all()
                   for y in range(0, 33, 4) for x in range(0, 33, 4))
    assert (emoji.crops(whole, rows, 32, 4) == emoji.crops(whole, rows, 32, 4)).all()


def test_another_file_is_refused(tmp_path):
    flat.save(tmp_path / 'x.safetensors', {'a': np.zeros(1, np.float32)}, {'class': 'Other'})
    with pytest.raises(WeightsError, match='is Other, not EmojiCodec'):
        emoji.read(tmp_path / 'x.safetensors')


@pytest.mark.parametrize('part, changes, line', [
    ('config', {'scaling_factor': 0.0}, 'scaling_factor is 0.0, not a number above 0'),
    ('config', {'scaling_factor': None}, 'scaling_factor is None'),
    ('config', {'shift_factor': 'a'}, "shift_factor is 'a', not a finite number"),
    ('config', {'norm_num_groups': True}, 'norm_num_groups is True'),
    ('config', {'layers_per_block': 10**7}, 'not a whole number from 1 to 200'),
    ('config', {'dtype': 'int8'}, "dtype is 'int8', not 'float32' or 'bfloat16'"),
    ('about', {'std': None}, 'std is None, not a number above 0'),
    ('about', {'moments': [0.0]}, r'moments is \[0.0\], not two finite numbers')])
def test_a_file_of_odd_values_is_refused(tmp_path, part, changes, line):
    cfg, params, about = emoji.read()
    values = {'config': dataclasses.asdict(cfg), 'about': about}
    values[part] = values[part] | changes
    flat.save(tmp_path / 'codec.safetensors', params, {
        'class': emoji.ARCHITECTURE, **{name: json.dumps(v) for name, v in values.items()}})
    with pytest.raises(WeightsError, match=f'is no EmojiCodec .*{line}'):
        emoji.read(tmp_path / 'codec.safetensors')


@pytest.mark.parametrize('change', ['config', 'tensors'])
def test_a_file_that_contradicts_itself_is_refused(tmp_path, change):
    cfg, params, about = emoji.read()
    if change == 'tensors':
        params['decoder']['conv_in']['bias'] = np.zeros(3, np.float32)
    emoji.save(tmp_path / 'codec.safetensors', cfg, params, about)
    if change == 'config':
        flat.save(tmp_path / 'codec.safetensors', params, {'class': emoji.ARCHITECTURE})
    with pytest.raises(WeightsError, match='is no EmojiCodec'):
        emoji.read(tmp_path / 'codec.safetensors')


@pytest.mark.parametrize('changes, line', [
    ({'codec.widths': (4, 7)}, 'codec.widths: .*must be multiples of codec.groups = 2'),
    ({'codec.sides': (9,)}, 'codec.sides: .*must be multiples of 2'),
    ({'codec.frozen_encoder': True}, 'codec.frozen_encoder: True, needs init_from'),
    ({'teacher.name': 'lumina'}, "teacher.name: 'lumina', must be of a family whose codec")])
def test_a_wrong_config_is_said_in_a_line(changes, line):
    with pytest.raises(config_lib.ConfigError, match=line):
        config_lib.check(config_of(**changes))


@pytest.mark.parity
def test_diffusers_loads_the_exported_folder(tmp_path):
    theirs = pytest.importorskip('diffusers')
    torch = pytest.importorskip('torch')
    cfg = dataclasses.replace(task_of(config_of()).cfg, scaling_factor=0.7, shift_factor=0.1)
    params = task_of(config_of()).spec.create().ema
    emoji.export(cfg, params, tmp_path / 'vae')
    diffusers.open_folder(tmp_path / 'vae', 'AutoencoderKL')
    model = theirs.AutoencoderKL.from_pretrained(tmp_path / 'vae').eval()
    assert model.config.scaling_factor == 0.7 and model.config.shift_factor == 0.1
    images = np.tanh(np.random.default_rng(0).standard_normal((2, 8, 8, 3))).astype(np.float32)
    encode, decode = autoencoder_kl.functional(cfg)
    latents = encode(params, images)
    with torch.no_grad():
        mean = model.encode(torch.tensor(images.transpose(0, 3, 1, 2))).latent_dist.mean
        image = model.decode(mean).sample.numpy().transpose(0, 2, 3, 1)
    want = (mean.numpy().transpose(0, 2, 3, 1) - 0.1) * 0.7
    np.testing.assert_allclose(latents, want, atol=1e-5)
    np.testing.assert_allclose(decode(params, latents), image, atol=1e-4)
