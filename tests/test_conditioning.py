"""What a run asks of its prompts, whatever they come from."""

import numpy as np
import pytest

from ddmd_jax.data import DataFileError, conditioning
from ddmd_jax.data.batch import NULLS, CondField, CondSpec, null_like
from ddmd_jax.data.order import Planned
from ddmd_jax.families.lumina import text as lumina


def test_the_null_prompt_stands_without_the_system_prompt():
    assert lumina.full_prompt('') == ''
    assert lumina.full_prompt('a cat') == f'{lumina.SYSTEM_PROMPT} <Prompt Start> a cat'


@pytest.mark.parametrize('buckets, words', [
    ((4, 6), 'end below the longest prompt, of 8 tokens; raise the last'),
    ((2, 8), 'begin below the null prompt, of 3 tokens')])
def test_buckets_hold_every_prompt_and_the_null_one(buckets, words):
    mask = np.arange(8)[None] < 3
    prompts = conditioning.Prompts(np.arange(2), None, None, null={'mask': mask}, caption=str,
                                   identity='', lengths=np.asarray([1, 8]))
    with pytest.raises(DataFileError, match=words):
        conditioning.check_buckets(buckets, prompts)
    conditioning.check_buckets((3, 8), prompts)
    conditioning.check_buckets((), prompts)


@pytest.mark.parametrize('length', [3, 5, 9])
def test_the_null_prompt_has_as_many_tokens_as_the_batch(length):
    rng = np.random.default_rng(0)
    null = {'embeds': rng.standard_normal((1, 5, 2)), 'mask': np.arange(5)[None] < 2,
            'pooled': rng.standard_normal((1, 4))}
    cond = {'embeds': np.zeros((6, length, 2)), 'mask': np.ones((6, length), bool),
            'pooled': np.zeros((6, 4))}
    found = null_like(null, cond)
    assert {k: x.shape for k, x in found.items()} == {k: x.shape for k, x in cond.items()}
    for row in range(6):
        # One token alone would be broadcast over all of them, where it has to be padded.
        padded = np.pad(null['embeds'][0], [(0, 4), (0, 0)])[:length]
        np.testing.assert_array_equal(found['embeds'][row], padded.astype('f'))
        np.testing.assert_array_equal(found['mask'][row], np.arange(length) < 2)
        np.testing.assert_array_equal(found['pooled'][row], null['pooled'][0].astype('f'))


def test_a_null_prompt_of_one_token_is_padded_not_repeated():
    null = {'embeds': np.full((1, 1, 2), 3.0), 'mask': np.ones((1, 1), bool)}
    cond = {'embeds': np.zeros((2, 4, 2)), 'mask': np.ones((2, 4), bool)}
    found = null_like(null, cond)
    np.testing.assert_array_equal(found['embeds'][:, :, 0], [[3, 0, 0, 0]] * 2)
    np.testing.assert_array_equal(found['mask'], [[True, False, False, False]] * 2)


def test_null_prompts_by_name():
    """Encoded as it is; or zeros of it, read as far as the encoded one is."""
    null = {'embeds': np.ones((1, 3, 2), 'f'), 'mask': np.ones((1, 3), bool),
            'pooled': np.ones((1, 4), 'f'), 'time_ids': np.full((1, 6), 8)}
    assert NULLS['encoded'](null) is null
    found = NULLS['zeros'](null)
    assert not found['embeds'].any() and not found['pooled'].any()
    assert found['mask'].all() and (found['time_ids'] == 8).all()
    assert {k: x.dtype for k, x in found.items()} == {k: x.dtype for k, x in null.items()}


def test_what_is_no_text_stays_an_examples_own():
    """SDXL's sizes: the null prompt's row is of the same image."""
    null = {'embeds': np.zeros((1, 3, 2)), 'mask': np.ones((1, 3), bool)}
    cond = {'embeds': np.ones((2, 3, 2)), 'mask': np.ones((2, 3), bool),
            'time_ids': np.arange(12).reshape(2, 6)}
    np.testing.assert_array_equal(null_like(null, cond)['time_ids'], cond['time_ids'])


def test_what_follows_from_a_batchs_size_goes_with_it():
    """Anew for every bucket; what the data says itself stands."""
    spec = CondSpec.text(2, size=CondField((2,), np.int32, per_token=False,
                                           of_shape=lambda shape: (8 * shape[0], 8 * shape[1])))
    rows = np.arange(3)
    prompts = conditioning.Prompts(rows, lambda rows, length: {'embeds': np.zeros((len(rows), 1))},
                                   None, {}, str, '', of_shape=spec.of_shape)
    for shape, want in (((2, 3, 4), (16, 24)), ((3, 2, 4), (24, 16))):
        size = prompts.read(Planned(rows, None, shape)).cond['size']
        assert size.dtype == np.int32 and size.tolist() == [list(want)] * 3
    own = conditioning.Prompts(rows, lambda rows, length: {'size': rows}, None, {}, str, '',
                               of_shape=spec.of_shape)
    assert own.read(Planned(rows, None, (2, 3, 4))).cond['size'] is rows
    assert spec.shapes(2, 5, 'bfloat16')['size'].dtype == np.int32
    assert CondSpec.text(2).of_shape(3, (2, 3, 4)) == {}
