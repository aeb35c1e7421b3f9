"""What a run asks of its prompts, whatever they come from."""

import numpy as np
import pytest

from ddmd_jax.data import DataFileError, conditioning
from ddmd_jax.data.batch import null_like
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
