"""The embedded data set: what ships, how pairs are held out, how Grain serves them."""

import shutil

import numpy as np
import pytest

from ddmd_jax.families.emoji import data as emoji, teacher, tokenizer
from ddmd_jax.method.regularisers.mean_variance import moments
from ddmd_jax.parallel.sharding import ShardingError, check_batch, make_mesh
from ddmd_jax.weights import flat


@pytest.fixture(scope='module')
def pairs():
    return emoji.load_pairs()


def test_what_ships_is_large_enough_and_a_tenth_is_held_out(pairs):
    assert len(pairs.names) >= 500 and len(set(pairs.names)) == len(pairs.names)
    assert len(emoji.COLOURS) - 1 >= 4
    assert 0.08 < pairs.held_out.mean() < 0.12
    assert sum(f.stat().st_size for f in emoji.FILES.rglob('*') if f.is_file()) <= 16e6


def test_held_out_pairs_never_reach_training_but_their_parts_do(pairs):
    rows = emoji.training_mixture(pairs, 3)
    assert not pairs.held_out[rows].any()
    assert set(pairs.glyph[rows]) == set(range(len(pairs.names)))
    assert set(pairs.colour[rows]) == set(range(len(emoji.COLOURS)))
    white = pairs.colour[rows] == 0
    once = pairs.colour[emoji.training_mixture(pairs, 1)] == 0
    assert white.sum() == 3 * once.sum()


def test_holding_out_is_stable():
    """A golden list: another hash would leak held-out pairs into the shipped teacher's tests."""
    asked = [('red apple', c) for c in emoji.COLOURS] + [('watch', c) for c in emoji.COLOURS]
    assert [emoji.is_held_out(*a) for a in asked] == HELD_OUT


HELD_OUT = [False] * 8 + [True] + [False] * 5  # the watch on teal


def test_glyphs_stand_on_the_colour_that_the_caption_names(pairs):
    rows = np.arange(len(pairs.glyph))[::97]
    corners = pairs.images(rows)[:, 0, 0]
    for row, corner in zip(rows, corners, strict=True):
        name = emoji.COLOUR_NAMES[pairs.colour[row]]
        np.testing.assert_allclose((corner + 1) * 127.5, emoji.COLOURS[name], atol=1e-3)
        assert (name in pairs.caption(row)) == (name != 'white')


def test_captions_read_as_english():
    assert emoji.caption('red apple', 'white') == 'red apple'
    assert emoji.caption('red apple', 'teal') == 'red apple on a teal background'
    assert emoji.caption('taco', 'orange') == 'taco on an orange background'


def test_no_caption_is_cut_and_the_null_prompt_is_one_real_token(pairs):
    captions = [pairs.caption(i) for i in range(len(pairs.glyph))]
    ids, mask = tokenizer.encode([*captions, ''], 10)
    lengths = [len(e.ids) for e in tokenizer.load().encode_batch(captions)]
    assert max(lengths) <= 10
    np.testing.assert_array_equal(mask[:-1].sum(1), lengths)
    assert mask[-1].sum() == 1 and ids[-1, 0] == tokenizer.load().token_to_id(tokenizer.BOS)
    assert len({tuple(i) for i in ids}) == len(captions) + 1


def test_contrast_of_real_data_is_what_health_compares_with(pairs):
    rows = emoji.training_mixture(pairs, 2)
    std = pairs.images(rows).std(axis=(1, 2, 3)).mean()
    assert std == pytest.approx(teacher.DATA_STD, abs=2e-3)


def test_moments_of_real_data_are_what_mean_variance_pulls_to(pairs):
    mean, variance = moments(pairs.images(emoji.training_mixture(pairs, 2)))
    assert (mean.mean(), variance.mean()) == pytest.approx(teacher.DATA_MOMENTS, abs=1e-3)


def test_missing_and_truncated_data_are_named_with_the_cure(tmp_path):
    with pytest.raises(emoji.DataFileError, match='missing.*reinstall'):
        emoji.load_pairs(tmp_path / 'nothing')
    copy = tmp_path / 'glyphs'
    shutil.copytree(emoji.GLYPHS, copy)
    record = next(copy.glob('*.array_record*'))
    record.write_bytes(record.read_bytes()[:10_000])
    with pytest.raises(emoji.DataFileError, match='damaged.*reinstall') as e:
        emoji.load_pairs(copy)
    assert len(str(e.value).splitlines()) == 1


def test_missing_and_truncated_weights_are_named_with_the_cure(tmp_path):
    path = tmp_path / 'w.safetensors'
    with pytest.raises(flat.WeightsError, match='missing.*mend it'):
        flat.load(path, 'mend it')
    flat.save(path, {'a': {'kernel': np.ones((64, 64), np.float32)}}, {'k': 'v'})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(flat.WeightsError, match='damaged.*mend it'):
        flat.load(path, 'mend it')


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
