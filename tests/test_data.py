"""The embedded data set: prompts and latents of scenes by number; what ships, what is refused."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import tiny

from ddmd_jax.families.base import LoadOptions
from ddmd_jax.families.emoji import codec, drawings, prompts, scenes, teacher, words
from ddmd_jax.families.emoji.pretraining import EncodedScenes
from ddmd_jax.method.regularisers.mean_variance import moments
from ddmd_jax.parallel.sharding import ShardingError, check_batch, make_mesh
from ddmd_jax.weights import flat

ROWS = np.asarray([5, 0, 77])


@pytest.fixture(scope='module')
def toy():
    return teacher.teacher_from(tiny.TOY, tiny.random_params(tiny.TOY, 0), codec.load().latents)


def load(toy, seed=0):
    config = tiny.load_config('emoji')
    config.seed, config.data.scenes = seed, 100
    return prompts.load(config, toy, None)


def test_what_ships_is_small():
    size = {f.relative_to(drawings.FILES).parts[0]: 0 for f in drawings.FILES.rglob('*')}
    for file in filter(Path.is_file, drawings.FILES.rglob('*')):
        size[file.relative_to(drawings.FILES).parts[0]] += file.stat().st_size
    assert size['codec.safetensors'] <= 2e6 and size['drawings'] <= 4e6
    assert size['codec.safetensors'] + size['teacher.safetensors'] <= 16e6
    assert sum(size.values()) <= 20e6


def test_a_prompt_is_the_caption_of_its_scene_and_no_held_out_one(toy):
    found, world = load(toy, 3), scenes.load()
    assert len(found.rows) == 100 and world.identity in found.identity
    asked, _ = world.batch(3, found.rows)
    assert [found.caption(row) for row in found.rows] == [world.caption(s) for s in asked]
    assert not any(map(world.held_out, asked))
    assert [load(toy, 4).caption(row) for row in ROWS] != [found.caption(row) for row in ROWS]
    cond, want = found.lookup(ROWS, None), toy.encode([found.caption(row) for row in ROWS])
    np.testing.assert_array_equal(cond['embeds'], want['embeds'])
    assert found.null['mask'].sum() == 1


def test_real_latents_are_those_of_the_prompts(toy):
    real = load(toy, 3).real(ROWS)
    assert real.shape == (3, *toy.latents.shape)
    want = scenes.load().batch(3, ROWS)[1] / 127.5 - 1
    drawn = np.asarray(toy.latents.decode(real))
    error = [np.mean((drawn - want[order])**2) for order in ([0, 1, 2], [1, 2, 0])]
    assert error[0] < 0.01 < error[1]


def test_moments_of_real_latents_are_what_health_and_mean_variance_compare_with(toy):
    real = load(toy).real(np.arange(96))
    mean, variance = moments(real)
    assert np.sqrt(np.asarray(variance)).mean() == pytest.approx(toy.latents.std, abs=0.03)
    assert (mean.mean(), variance.mean()) == pytest.approx(toy.latents.moments, abs=0.05)


def test_scenes_of_the_teachers_training_are_encoded_once():
    world, space = scenes.load(), codec.load()
    encoded = EncodedScenes(world, space, 3, 100, 16)
    first, again = encoded(ROWS), encoded(ROWS[::-1])
    for name in ('image', 'ids', 'mask'):
        np.testing.assert_array_equal(first[name], again[name][::-1])
    asked, images = world.batch(3, ROWS)
    np.testing.assert_allclose(first['image'], space.encode(images), atol=5e-3)
    ids, mask = words.encode([world.caption(scene) for scene in asked], 16)
    np.testing.assert_array_equal(first['ids'], ids)
    np.testing.assert_array_equal(first['mask'], mask)
    encoded.codec = None  # nothing is left to encode
    encoded(ROWS[:1])


def test_missing_and_truncated_weights_are_named_with_the_cure(tmp_path):
    path = tmp_path / 'w.safetensors'
    with pytest.raises(flat.WeightsError, match='missing.*mend it'):
        flat.load(path, 'mend it')
    flat.save(path, {'a': {'kernel': np.ones((64, 64), np.float32)}}, {'k': 'v'})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(flat.WeightsError, match='damaged.*mend it'):
        flat.load(path, 'mend it')


@pytest.mark.parametrize('more, line', [
    ({'b': np.full(2, np.nan, 'f')}, 'b holds values that are not finite'),
    ({'a/c': np.ones(2, 'f')}, 'a has others within it')])
def test_weights_that_no_network_has_are_damaged(tmp_path, more, line):
    safetensors.numpy.save_file({'a': np.ones(2, 'f'), **more}, tmp_path / 'w')
    with pytest.raises(flat.WeightsError, match=f'w \\({line}\\); mend it'):
        flat.load(tmp_path / 'w', 'mend it')


@pytest.mark.parametrize('part, changes, line', [
    ('denoiser', {'in_channels': 3}, 'patches of 4 latents of 3 channels, and there are 16 of 8'),
    ('denoiser', {'patch_size': 3}, 'patches of 3 latents'),
    ('denoiser', {'norm_eps': -1.0}, 'norm_eps is -1.0, not a number above 0'),
    ('denoiser', {'num_layers': 10**7}, 'not a whole number from 1 to 200'),
    ('text', {'vocab_size': 32}, 'it knows 32 words of 56')])
def test_a_teacher_that_does_not_fit_the_world_is_refused(tmp_path, part, changes, line):
    model = tiny.TOY | {part: tiny.TOY[part] | changes}
    built = model if model[part].get('num_layers') != 10**7 else tiny.TOY
    path = tmp_path / 'w.safetensors'
    teacher.save(path, model, tiny.random_params(built, 0), steps=0)
    with pytest.raises(flat.WeightsError, match=f'not an emoji teacher: .*{line}'):
        teacher.read(str(path))


@pytest.mark.parametrize('known, line', [
    ('codec', f'on latents of codec 0123, the package has {codec.load().identity}'),
    ('words', f'on the words 0123, the package has {words.identity()}')])
def test_a_teacher_of_another_codec_or_of_other_words_is_refused(tmp_path, known, line):
    """Words of as many other objects would all mean something else, without an error."""
    path = tiny.save_toy(tmp_path)
    params, about = flat.load(path, '')
    assert about[known]
    flat.save(path, params, about | {known: '0123'})
    with pytest.raises(flat.WeightsError, match=f'was trained {line}; correct the path') as e:
        teacher.load(LoadOptions(str(path)))
    assert len(str(e.value).splitlines()) == 1


def test_weights_round_trip_and_identity(tmp_path):
    tree = {'a': {'kernel': np.arange(6, dtype=np.float32).reshape(2, 3)}, 'b': np.ones(2, 'f')}
    flat.save(tmp_path / 'w', tree, {'k': 'v'})
    back, meta = flat.load(tmp_path / 'w', '')
    assert meta == {'k': 'v'} and flat.identity(back) == flat.identity(tree)
    np.testing.assert_array_equal(back['a']['kernel'], tree['a']['kernel'])
    tree['b'][0] += 1e-6
    assert flat.identity(back) != flat.identity(tree)


def test_a_batch_that_does_not_split_over_the_mesh_is_refused():
    check_batch(32, make_mesh({'data': -1}))

    class Mesh:
        shape = {'data': 4, 'fsdp': 2}

    with pytest.raises(ShardingError, match='next that does is 16'):
        check_batch(12, Mesh)
