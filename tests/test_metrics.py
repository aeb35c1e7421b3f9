"""The figures of the table against closed forms; tables and sheets."""

import numpy as np
import pytest

from ddmd_jax.evaluation import measures, pictures, tables
from ddmd_jax.study import summarise
from ddmd_jax.util.errors import UserError


def test_frechet_distance_has_the_closed_form_of_gaussians():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4000, 3))
    a, b = x * [1, 2, 3], x * [2, 2, 1] + [1, 0, -2]
    std = x.std(0, ddof=1)
    # Both share eigenvectors up to sampling, so the distance is that of their standard deviations.
    assert measures.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    want = ((a.mean(0) - b.mean(0)) ** 2).sum() + ((std * [1, 0, 2]) ** 2).sum()
    assert measures.frechet_distance(a, b) == pytest.approx(want, rel=0.01)


def test_per_sample_std_is_that_of_each_image():
    x = np.concatenate([np.full((1, 4, 4, 3), 0.7), np.tile([[[[1.0], [-1.0]]]], (1, 4, 2, 3))])
    assert measures.per_sample_std(x) == pytest.approx(0.5)


def test_a_background_is_found_beside_what_touches_the_edge():
    x = np.full((2, 64, 64, 3), 0.25)
    x[:, :40, :30] = [1.0, -1.0, 0.0]
    x[1, 20:] = 0.2  # mottled, not another colour
    got = measures.background(x)
    np.testing.assert_allclose(got[0], 0.625, atol=1e-6)
    assert got[1].min() > 0.6 and got[1].max() < 0.625


def test_the_colour_error_is_of_averages():
    """Published pairs of CIELAB colours (Sharma, Wu, Dalal 2005, rows 1, 7, 17); spread is free."""
    lab = lambda *rows: {i: np.asarray(row) for i, row in enumerate(rows)}
    a = lab((50, 2.6772, -79.7751), (50, 0, 0), (50, 2.5, 0))
    b = lab((50, 0, -82.7485), (50, -1, 2), (73, 25, -18))
    assert measures.average_colour_error(a, b) == pytest.approx(
        (2.0425 + 2.3669 + 27.1492) / 3, abs=1e-4)
    shades = np.asarray([[0.4, 0.5, 0.6], [0.5, 0.6, 0.7], [0.45, 0.55, 0.65]])
    spread, mean = (measures.average_colours(x, ['sky'] * len(x)) for x in (shades[:2], shades[2:]))
    assert measures.average_colour_error(spread, mean) < 0.2


def test_pairwise_distance_is_within_groups():
    x = np.asarray([[0.0, 0], [3, 4], [9, 9], [0, 1], [0, 2], [0, 4]])
    assert measures.pairwise_distance(x, 'aabccc') == pytest.approx((5 + (1 + 3 + 2) / 3) / 2)
    assert measures.pairwise_distance(x, range(6)) is None


def test_a_table_shows_the_columns_of_the_suite():
    rows = [{'name': 'real', 'steps': None, 'evaluations': None, 'guidance': None, 'fid': 0.5},
            {'name': 'student', 'steps': 4, 'evaluations': 4, 'guidance': 1.0}]
    assert tables.terminal(rows, {'fid': '.1f'}).splitlines() == [
        '         steps  evaluations  guidance  fid',
        'real         -            -         -  0.5',
        'student      4            4     1.000    -']


def test_a_sheet(tmp_path):
    assert pictures.rows_of_images([np.zeros((3, 4, 4, 3))] * 2).shape == (40, 60, 3)
    pictures.captioned_sheet(['red apple'], ['a', 'b'], [np.zeros((1, 8, 8, 3))] * 2,
                             tmp_path / 's.png')
    assert pictures.Image.open(tmp_path / 's.png').size[1] > 32


@pytest.mark.parametrize('shape, width, height', [
    ((24, 24, 3), 96, 96),  # small ones are magnified, so that pixels show
    ((8, 64, 3), 256, 32),
    ((64, 65, 3), 256, 252),  # from here on the longer side is as long as a tile
    ((1024, 1024, 3), 256, 256),
    ((1024, 512, 3), 128, 256),
    ((512, 2048, 3), 256, 64),
])
def test_a_tile_keeps_the_shape_of_its_image(shape, width, height):
    assert pictures._tile_size(shape) == (width, height)


@pytest.mark.parametrize('side, tile', [(64, 128), (1024, 128)])
def test_a_sheet_shows_blocks_of_images(side, tile, tmp_path):
    """Four of each caption, the last one bright: it stands at the lower right of its block."""
    images = -np.ones((2, 4, side, side, 3))
    images[:, 3] = 1.0
    pictures.captioned_sheet(['a', 'b'], ['x', 'y'], [images] * 2, tmp_path / 's.png')
    sheet = np.asarray(pictures.Image.open(tmp_path / 's.png'))
    block, left, top, gap = 2 * tile + pictures.RIM, pictures.LEFT, 56, 10
    assert sheet.shape[:2] == (top + 2 * (block + gap) + gap, left + 2 * (block + gap) + gap)
    last = sheet[top + block + gap:, left + block + gap:][:block, :block]
    assert last[-tile:, -tile:].min() == 255 and last[:tile, :tile].max() == 0


def test_a_sheet_of_large_images_shows_each_whole(tmp_path):
    """Wide images, their left third bright: an axis taken for the other would show."""
    images = -np.ones((2, 100, 300, 3))
    images[:, :, :100] = 1.0
    pictures.captioned_sheet(['a', 'b'], ['x', 'y', 'z'], [images] * 3, tmp_path / 's.png')
    sheet = np.asarray(pictures.Image.open(tmp_path / 's.png'))
    (width, height), left, top, gap = pictures._tile_size(images.shape[1:]), pictures.LEFT, 56, 10
    assert (width, height) == (256, 85)
    assert sheet.shape[:2] == (top + 2 * (height + gap) + gap, left + 3 * (width + gap) + gap)
    x, y = left + 2 * (width + gap), top + height + gap  # the last tile
    tile = sheet[y:y + height, x:x + width]
    assert (tile[:, :80] > 250).all() and (tile[:, 90:] < 5).all()
    assert (sheet[y + height + 1:y + height + gap - 1, x:x + width] == 255).all()


def test_rows_of_large_images_are_not_magnified():
    assert pictures.rows_of_images([np.zeros((2, 65, 40, 3))]).shape == (66, 82, 3)
    assert pictures.rows_of_images([np.zeros((2, 64, 40, 3))]).shape == (260, 328, 3)


def test_values_beyond_the_range_are_clipped_not_wrapped():
    assert pictures.to_uint8(np.asarray([-3.0, -1.0, 1.0, 3.0])).tolist() == [0, 0, 255, 255]


def test_summary_over_seeds(tmp_path):
    runs = [[{'name': 'real', 'steps': None, 'evaluations': None, 'guidance': None, 'fid': v},
             {'name': 'student', 'steps': 4, 'evaluations': 4, 'guidance': 1.0, 'fid': v}]
            for v in (0.5, 0.7)]
    assert summarise.over_runs(runs).splitlines() == [
        '|  | steps | evaluations | fid |', '|---|---|---|---|',
        '| real |  |  | 0.600 ± 0.141 |', '| student | 4 | 4 | 0.600 ± 0.141 |']
    with pytest.raises(KeyError):
        summarise.over_runs([runs[0], runs[1][:1]])
    with pytest.raises(UserError, match='not the result of a finished run'):
        summarise.load(str(tmp_path))


def test_long_captions_are_wrapped_and_then_cut():
    short = 'a red apple left of a dog'
    assert pictures.wrapped(short, 1) == short
    long = 'a red apple lying on a wooden table in the evening light, ' * 5
    lines = pictures.wrapped(long, 3).splitlines()
    assert len(lines) == 3 and lines[-1].endswith('...')
    assert all(len(line) <= pictures.COLUMN for line in lines)
    assert pictures.wrapped('', 1) == ''
