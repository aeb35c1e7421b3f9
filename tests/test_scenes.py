"""The embedded world: captions say what images show, and what is held out stays so."""

import json
import shutil
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from ddmd_jax.data import DataFileError
from ddmd_jax.families.emoji import drawings, make_drawings, scenes, words
from ddmd_jax.families.emoji.scenes import BESIDE, ONE, RELATIONS, SIDE, STACKED, Scene
from ddmd_jax.util.errors import UserError


@pytest.fixture(scope='module')
def world():
    return scenes.load()


def rng(seed=0):
    return np.random.default_rng(seed)


def changed(image):
    """Pixels that differ from the background, which at least two corners show."""
    background = np.median(image[::SIDE - 1, ::SIDE - 1].reshape(-1, 3), axis=0)
    return np.abs(image.astype(int) - background).max(-1) > 8


def test_every_object_is_drawn_by_every_set(world):
    assert len(world.names) == 32 and {len(d) for d in world.drawings} == {len(drawings.SETS)}
    assert all(max(p.shape[:2]) == drawings.EDGE for d in world.drawings for p in d)


def test_captions(world):
    cat, apple, dog = map(world.names.index, ('cat', 'red apple', 'dog'))
    teal, orange = map(scenes.COLOUR_NAMES.index, ('teal', 'orange'))
    assert world.caption(Scene(cat, None, 0, teal)) == 'a small cat on a teal background'
    assert world.caption(Scene(cat, None, 1, teal)) == 'a cat on a teal background'
    assert world.caption(Scene(apple, dog, 0, orange, 'left of')) == (
        'a red apple left of a dog on an orange background')


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_a_caption_is_tokenized_without_a_word_lost(seed):
    world = scenes.load()
    caption = world.caption(world.draw_scene(rng(seed)))
    ids, mask = words.encode([caption], 16)
    assert words.load().token_to_id(words.UNK) not in ids[mask]
    assert words.load().decode(ids[0, :mask.sum()].tolist()[1:]) == caption


def test_the_empty_caption_is_one_token():
    ids, mask = words.encode(['', 'a dragon'], 4)
    assert mask.sum(1).tolist() == [1, 3]
    assert ids[1, 2] == words.load().token_to_id(words.UNK)


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 2**40), min_size=1, max_size=6))
@settings(max_examples=25, deadline=None)
def test_a_scene_depends_on_seed_and_number_alone(seed, numbers):
    world = scenes.load()
    found, images = world.batch(seed, numbers)
    again, same = world.batch(seed, numbers[::-1])
    assert found == again[::-1] and np.array_equal(images, same[::-1])
    assert images.shape == (len(numbers), SIDE, SIDE, 3) and images.dtype == np.uint8


def test_other_processes_compose_the_same(world):
    parts = [[5, 3], [9]]
    for numbers, (found, images) in zip(parts, world.batches(1, parts, 1), strict=True):
        here, same = world.batch(1, numbers)
        assert found == here and np.array_equal(images, same)


def test_training_holds_nothing_that_is_held_out(world):
    found, _ = world.batch(3, range(1500))
    assert not any(map(world.held_out, found))
    together = {(i, s.colour) for s in found for i in s.places}
    pairs = {frozenset(s.places) for s in found if s.second is not None}
    for _ in range(200):
        scene = world.scene(rng(_), held_out=True)
        assert ({(i, scene.colour) for i in scene.places} - together
                or frozenset(scene.places) not in pairs)


def test_one_in_ten_is_held_out(world):
    singles = [Scene(i, None, 1, c) for i in range(32) for c in range(len(scenes.COLOURS))]
    assert .06 < np.mean([world.held_out(s) for s in singles]) < .14
    seen = {frozenset((a, b)) for a in range(32) for b in range(a)
            for c in range(8) if not world.held_out(Scene(a, b, 0, c, 'above'))}
    assert .06 < 1 - len(seen) / (32 * 31 / 2) < .14


@pytest.mark.parametrize('relation', RELATIONS)
def test_two_objects_lie_as_the_caption_says(world, relation):
    first, second = world.names.index('panda'), world.names.index('carrot')
    scene = Scene(first, second, 0, 4, relation)
    assert scene.layout == (BESIDE if relation in ('left of', 'right of') else STACKED)
    for seed in range(8):
        image = world.image(scene, rng(seed)).astype(int)
        orange = (image[..., 0] > 200) & (image[..., 2] < 120)  # of the carrot alone
        axis = 1 if scene.layout == BESIDE else 0
        middle = np.mean(np.nonzero(orange)[axis])
        assert (middle > SIDE / 2) == (relation in ('left of', 'above'))


@pytest.mark.parametrize('size', range(3))
def test_sizes(world, size):
    for number in (0, 9, 24):
        scene = Scene(number, None, size, 5)
        assert scene.layout == ONE
        rows, columns = np.nonzero(changed(world.image(scene, rng(number))))
        longest = max(np.ptp(rows), np.ptp(columns)) + 1
        assert min(scenes.EDGES[size]) - 3 <= longest <= max(scenes.EDGES[size]) + 1


def test_one_caption_has_many_images(world):
    scene, many = Scene(1, None, 1, 2), rng()
    images = {world.image(scene, many).tobytes() for _ in range(300)}
    assert len(images) > 290
    shades = [world.image(scene, many)[0, 0, 0] for _ in range(200)]
    assert np.ptp(shades) > .15 * scenes.COLOURS['orange'][0]


# ------------------------------------------------------------------------------------------- files


def test_every_set_is_attributed_and_its_licence_is_there():
    notice = (drawings.DRAWINGS / make_drawings.NOTICE).read_text()
    for icons in drawings.SETS:
        row = next(line for line in notice.splitlines() if f'{icons.package} ' in line)
        assert icons.version in row and icons.licence.replace('CC-BY-', 'CC BY ') in row
    assert 'Copyright (c) Microsoft Corporation' in notice and 'NONINFRINGEMENT' in notice


@pytest.fixture
def copied(tmp_path):
    return shutil.copytree(drawings.DRAWINGS, tmp_path / 'drawings')


def test_absent_drawings(tmp_path):
    with pytest.raises(DataFileError, match='missing'):
        drawings.load(tmp_path)


def test_truncated_drawings(copied):
    file = next(copied.glob('*array_record*'))
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(DataFileError, match='damaged'):
        drawings.load(copied)


def test_drawings_of_another_version(copied):
    info = copied / 'dataset_info.json'
    info.write_text(json.dumps(json.loads(info.read_text()) | {'version': '2.0.0'}))
    with pytest.raises(DataFileError, match=r'is of version 2\.0\.0, this package reads 1\.0\.0'):
        drawings.load(copied)


@pytest.mark.parametrize('size, fill', [((1, 1), 255), ((500, 500), 255), ((112, 112), 0)])
def test_drawings_of_other_sizes_or_of_nothing(monkeypatch, size, fill):
    other = Image.new('RGBA', size, (fill,) * 4)
    monkeypatch.setattr(drawings.Image, 'open', lambda file: other)
    with pytest.raises(DataFileError, match='damaged: .*is not one drawing of 112 pixels'):
        drawings.load()


def packed(folder, name, version, icons):
    """A package of an icon set as npm packs it; `icons` are a file's text, or its icons."""
    inside = folder / 'package'
    inside.mkdir()
    (inside / 'package.json').write_text(json.dumps({'version': version}))
    (inside / 'icons.json').write_text(
        icons if isinstance(icons, str) else json.dumps({'icons': icons}))
    with tarfile.open(folder / f'iconify-json-{name}.tgz', 'w:gz') as tar:
        tar.add(inside, 'package')


@pytest.mark.extras
@pytest.mark.parametrize('name, version, line', [
    ('noto-1.2.8', '1.2.8', r'noto-1\.2\.9\.tgz is missing; there is iconify-json-noto-1\.2\.8'),
    ('noto-1.2.9', '1.3.0', r'is of version 1\.3\.0, not 1\.2\.9'),
    ('noto-1.2.9', '1.2.9', r"noto 1\.2\.9 has no icon 'dog-face'"),
    ('noto-1.2.9', 1, r'cannot be read \(package\.json: version is 1, not a text\)'),
])
def test_packages_that_will_not_do(tmp_path, name, version, line):
    pytest.importorskip('resvg_py')
    packed(tmp_path, name, version, {})
    with pytest.raises(UserError, match=line):
        make_drawings.make(tmp_path, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


@pytest.mark.extras
@pytest.mark.parametrize('icons, line', [
    ('{}', "icons.json: has no 'icons'"), ('[' * 10**5, 'icons.json: it is nested more than'),
    ({'dog-face': 'x'}, "icons.json: icons.dog-face is 'x', not an object"),
    ({'dog-face': {'body': '', 'width': 0}}, 'icons.dog-face.width is 0, not a number above 0'),
    ({'dog-face': {'body': '<path'}}, "icon 'dog-face' .* cannot be drawn"),
    ({'dog-face': {'body': ''}}, "icon 'dog-face' .* shows nothing: remove")])
def test_icons_that_will_not_do(tmp_path, icons, line):
    pytest.importorskip('resvg_py')
    packed(tmp_path, 'noto-1.2.9', '1.2.9', icons)
    with pytest.raises(UserError, match=line):
        make_drawings.make(tmp_path, tmp_path / 'out')


@pytest.mark.extras
def test_drawings_are_made_of_the_packages(tmp_path):
    """Four packages of rectangles: what is read is what was drawn, the same bytes each time."""
    pytest.importorskip('resvg_py')
    for number, icons in enumerate(drawings.SETS):
        inside = tmp_path / icons.package
        inside.mkdir()
        packed(inside, f'{icons.package}-{icons.version}', icons.version, {
            icon: {'body': f'<rect x="1" y="2" width="{14 - number}" height="7" '
                           f'fill="rgb({8 * n}, {60 * number}, 9)"/>'}
            for n, icon in enumerate(drawings.OBJECTS.values())})
        next(inside.glob('*.tgz')).rename(tmp_path / f'iconify-json-{icons.package}-'
                                          f'{icons.version}.tgz')
    for out in ('one', 'two'):
        assert make_drawings.make(tmp_path, tmp_path / out) == 4 * len(drawings.OBJECTS)
    names, pictures = drawings.load(tmp_path / 'one')
    assert set(names) == {*drawings.OBJECTS}
    for n, name in enumerate(drawings.OBJECTS):
        for number, picture in enumerate(pictures[names.index(name)]):
            assert picture.shape == (round(112 * 7 / (14 - number)), 112, 4)
            assert picture[20, 20].tolist() == [8 * n, 60 * number, 9, 255]
    assert (tmp_path / 'one' / make_drawings.NOTICE).is_file()
    one, two = (next((tmp_path / out).glob('*array_record*')).read_bytes()
                for out in ('one', 'two'))
    assert one == two


def test_nothing_that_is_there_is_replaced(tmp_path):
    (tmp_path / 'precious').write_text('a thesis')
    with pytest.raises(UserError, match='exists already'):
        make_drawings.make(tmp_path, tmp_path)
    assert (tmp_path / 'precious').read_text() == 'a thesis'


@pytest.mark.extras
def test_a_damaged_package(tmp_path):
    pytest.importorskip('resvg_py')
    (tmp_path / 'iconify-json-noto-1.2.9.tgz').write_bytes(b'half a download')
    with pytest.raises(UserError, match='cannot be read'):
        make_drawings.make(tmp_path, tmp_path / 'out')
