"""The judge of scenes, and the suite that it measures."""

import json

import numpy as np
import pytest

from ddmd_jax.evaluation import measures
from ddmd_jax.families.emoji import judge, make_judge, scenes, suite
from ddmd_jax.families.emoji.scenes import Scene
from ddmd_jax.weights import flat

PARTS = ('layout', 'objects', 'size', 'colour')


@pytest.fixture(scope='module')
def world():
    return scenes.load()


@pytest.fixture(scope='module')
def look(world):
    shipped = judge.load(world)
    return lambda images: judge.read(shipped, judge.to_unit(images))


@pytest.fixture(scope='module')
def real(world):
    """Scenes that training never saw, and an image of each."""
    return world.batch(make_judge.UNSEEN + 1, range(600))


def test_it_reads_unseen_scenes(look, real):
    asked, images = real
    right = judge.matches(look(images)[0], asked)
    assert all(right[part].mean() >= 0.98 for part in PARTS) and right['all'].mean() >= 0.95


def test_it_reads_pairs_that_no_training_saw(world, look):
    rng = np.random.default_rng(7)
    asked = [world.scene(rng, held_out=True) for _ in range(400)]
    right = judge.matches(look(np.stack([world.image(s, rng) for s in asked]))[0], asked)
    assert all(right[part].mean() >= 0.98 for part in PARTS) and right['all'].mean() >= 0.95


def test_it_calls_spoilt_scenes_wrong(world, look):
    """Nothing, a third object, two in one, half of one: none of them is right for any caption."""
    for kind in make_judge.KINDS:
        rng, spoilt = np.random.default_rng(3), []
        for _ in range(60):
            canvas = make_judge.Canvas(world, rng)
            kind(canvas)
            spoilt.append(np.round(canvas.pixels).astype(np.uint8))
        share = (look(np.stack(spoilt))[0][:, 0] == judge.WRONG).mean()
        assert share >= 0.6, (kind.__name__, share)  # blended are the most like real ones: .73


def quarters(world, rng):
    """Scenes of two objects: (scene, fp32 image, background, share of each quarter they fill)."""
    while True:
        scene = world.scene(rng)
        image = world.image(scene, rng).astype(np.float32)
        ground = np.median(image[::63, ::63].reshape(-1, 3), axis=0)
        full = (np.abs(image - ground).max(-1) > 8).reshape(2, 32, 2, 32).mean((1, 3))
        if scene.second is not None and full.min() < 0.01:
            yield scene, image, ground, full


def test_a_missing_object_is_right_for_no_caption(world, look):
    asked, images = [], []
    for scene, image, ground, full in quarters(world, np.random.default_rng(6)):
        if (full >= 0.01).sum() == 2:  # each of its objects is in a quarter of its own
            row, column = np.unravel_index(full.argmax(), (2, 2))
            image.reshape(2, 32, 2, 32, 3)[row, :, column] = ground
            asked.append(scene)
            images.append(np.round(image).astype(np.uint8))
        if len(asked) == 300:
            break
    assert judge.matches(look(np.stack(images))[0], asked)['all'].mean() <= 0.02


def test_a_third_object_is_right_for_no_caption(world, look):
    """A whole one in the quarter that a pair leaves empty, as the training does not place it."""
    rng, asked, images = np.random.default_rng(5), [], []
    for scene, image, _, full in quarters(world, rng):
        more = int(rng.integers(len(world.names)))
        if more in scene.places:
            continue
        if len(asked) == 300:
            break
        sprite = world.sprite(more, 0, int(rng.choice(scenes.PAIR_EDGES)), False)
        corner = 32 * np.array(np.unravel_index(full.argmin(), (2, 2)))
        top, left = corner + (32 - np.array(sprite.shape[:2])) // 2
        under = image[top:top + sprite.shape[0], left:left + sprite.shape[1]]
        under *= 1 - sprite[..., 3:] / 255
        under += sprite[..., :3]
        asked.append(scene)
        images.append(np.round(image).astype(np.uint8))
    assert judge.matches(look(np.stack(images))[0], asked)['all'].mean() <= 0.02


def test_an_image_of_another_scene_does_not_match(look, real):
    asked, images = real
    assert judge.matches(look(np.roll(images, 1, axis=0))[0], asked)['all'].mean() < 0.01


def test_a_diagonal_is_right_for_either_caption():
    upper_left, lower_left = (judge.FALLING, 4, 9, 3, 0), (judge.RISING, 4, 9, 3, 0)
    right = lambda reading, *scene: bool(
        judge.matches(np.asarray([reading]), [Scene(scene[0], scene[2], 0, 0, scene[1])])['all'][0])
    for reading in (upper_left, lower_left):
        assert right(reading, 4, 'left of', 9) and right(reading, 9, 'right of', 4)
        assert not right(reading, 9, 'left of', 4)
    assert right(upper_left, 4, 'above', 9) and not right(upper_left, 9, 'above', 4)
    assert right(lower_left, 9, 'above', 4) and right(lower_left, 4, 'below', 9)
    assert not right((judge.BESIDE, 4, 9, 3, 0), 4, 'above', 9)
    assert not right((judge.WRONG, 4, 9, 3, 0), 4, 'left of', 9)


def test_training_holds_out_and_knows_where_things_are(world):
    images, answers = make_judge.examples(world, 0, 0)
    assert images.shape == (make_judge.BATCH, 64, 64, 3) and images.dtype == np.uint8
    pairs = [answer[1:3] for answer in answers if 0 <= answer[2] < len(world.names)]
    assert len(pairs) > 10 and all(make_judge._may_meet(world, *pair) for pair in pairs)
    assert (answers[:, 0] == judge.WRONG).mean() == pytest.approx(make_judge.SPOILT, abs=0.01)
    rng = np.random.default_rng(0)
    asked = [Scene(5, 6, 0, 0, 'below')] * 40
    truths = make_judge.truths(world, asked, np.stack([world.image(s, rng) for s in asked]))
    assert set(truths[:, 0]) >= {judge.STACKED, judge.RISING}
    readings = np.concatenate([truths, np.zeros((40, 1), int)], axis=1)
    assert judge.matches(readings, asked)['all'].all()


def test_spoilt_scenes_hold_out_too(world):
    for seed in range(200):
        canvas = make_judge.Canvas(world, np.random.default_rng(seed))
        found = canvas.objects(4)
        assert len(set(found)) == 4
        # On a colour without a name, held-out pairs count on any; see `_may_meet`.
        assert not any(world.held_out(Scene(a, b, 0, canvas.colour, 'left of'))
                       if canvas.colour >= 0 else not make_judge._may_meet(world, a, b)
                       for a in found for b in found if a != b)


def test_no_background_of_training_is_like_one_that_is_held_out(world):
    palette = np.asarray(list(scenes.COLOURS.values()))
    for seed, number in enumerate(range(len(world.names))):
        held = [i for i in range(len(palette)) if world.held_out(Scene(number, None, 0, i))]
        rgb = make_judge.foreign_colour(world, [number], np.random.default_rng(seed))
        for shade in (0.9, 1.0, 1.1):
            assert (np.abs(palette[held] * shade - rgb).max(-1) > 2).all()


def test_backgrounds_are_named_whatever_their_shade(world, real):
    asked, images = real
    wanted = [scene.colour for scene in asked]
    unit = judge.to_unit(images)
    for changed in (unit, np.clip(1.2 * unit, -1, 1), 0.9 * unit):
        assert (judge.nearest_colour(changed) == wanted).mean() > 0.99


@pytest.mark.slow
def test_training_writes_a_judge_of_this_world(world, tmp_path, monkeypatch):
    monkeypatch.setattr(make_judge, 'BATCH', 8)
    file = tmp_path / 'judge.safetensors'
    make_judge.train(2, 0, file)
    assert set(make_judge.accuracies(file, 1, 10)) == {*PARTS, 'all', 'all_held_out', 'spoilt'}
    other = scenes.World(world.names, world.drawings[::-1])
    with pytest.raises(flat.WeightsError, match=f'scenes {world.identity}, the package has '
                                                f'{other.identity}'):
        judge.load(other, file)
    assert judge.WEIGHTS.stat().st_size <= 1e6


@pytest.mark.parametrize('change', [
    lambda params: params.pop('stem'), lambda params: params.update(more=params['stem']),
    lambda params: params['dense'].update(bias=params['dense']['bias'][:1])])
def test_another_networks_file_is_no_judge(world, tmp_path, change):
    params, about = flat.load(judge.WEIGHTS, '')
    change(params)
    flat.save(tmp_path / 'judge', params, about)
    with pytest.raises(flat.WeightsError, match='not a judge: .*judge .its tensors are not'):
        judge.load(world, tmp_path / 'judge')


@pytest.fixture(scope='module')
def found():
    return suite.SUITE.examples(128, 64, 5)


def test_the_suite_asks_for_seen_and_held_out_and_repeats_some(world, found):
    asked = suite.prompts(world, 128, 64, 5)
    held = [world.held_out(scene) for scene in asked]
    assert held == [False] * 128 + [True] * 64 == found.held_out.tolist()
    for start, captions in ((0, 16), (128, 8)):
        for i in range(start, start + captions * suite.IMAGES, suite.IMAGES):
            assert len(set(found.captions[i:i + suite.IMAGES])) == 1
    assert asked == suite.prompts(world, 128, 64, 5) != suite.prompts(world, 128, 64, 6)
    assert found.captions == [world.caption(scene) for scene in asked]
    assert [len(suite.prompts(world, *n, 0)) for n in ((1, 1), (3, 2), (9, 4))] == [2, 5, 13]


def test_real_scenes_are_faultless_by_every_figure(found):
    figures = found.measure(found.real)
    assert list(figures)[:6] == list(suite.SUITE.columns)
    assert figures['all_match'] > 0.93 and figures['all_match_held_out'] > 0.9
    assert figures['colour_error'] < 0.8 and figures['diversity'] == pytest.approx(1, abs=0.1)
    json.dumps(figures, allow_nan=False)


def test_what_fails_is_seen(found):
    """Over-saturation, one image of each caption, blur, images of other captions."""
    real, good = found.real, found.measure(found.real)
    loud = found.measure(np.clip(1.4 * real, -1, 1))
    assert loud['colour_error'] > 2 * good['colour_error'] and loud['std'] > 1.1 * good['std']
    once = real.copy()
    for i in range(len(once) - 1):
        if found.captions[i] == found.captions[i + 1]:
            once[i + 1] = once[i]
    assert found.measure(once)['diversity'] < 0.1
    assert found.measure(np.repeat(real[:1], len(real), 0))['diversity'] == 0  # no gap: a collapse
    soft = sum(np.roll(real, (i, j), (1, 2)) for i in range(3) for j in range(3)) / 9
    assert found.measure(soft)['frechet'] > 1.25 * good['frechet']
    assert found.measure(np.roll(real, suite.IMAGES, axis=0))['all_match'] < 0.1


def test_what_a_run_watches(found):
    watched = suite.SUITE.watched(8, 4, 5)
    assert len(watched.captions) == 12
    figures = watched.measure(found.real[:12])
    assert list(figures) == ['ema_match', 'ema_objects', 'ema_background', 'ema_image_std']
    assert figures['ema_image_std'] == pytest.approx(measures.per_sample_std(found.real[:12]))
