"""Prompts encoded beforehand: what a file of them gives, and what is refused."""

import json

import jax.numpy as jnp
import numpy as np
import published
import pytest
import safetensors
import safetensors.numpy

from ddmd_jax.data import DataFileError, conditioning, loader
from ddmd_jax.data.order import Order
from ddmd_jax.teachers import lumina
from ddmd_jax.train import distill

COUNT, WIDTH = 5, published.TRANSFORMER['cap_feat_dim']


@pytest.fixture
def path(tmp_path):
    return published.write_embeddings(tmp_path / 'e.safetensors', COUNT)


def tensors(path):
    return safetensors.numpy.load_file(path)


def rewrite(path, metadata=None, **changes):
    """The file with some tensors replaced, or left out where None."""
    parts = {name: x for name, x in (tensors(path) | changes).items() if x is not None}
    safetensors.numpy.save_file(parts, path, metadata)


def read(path):
    return conditioning.from_file(str(path), WIDTH)


# --- What a file gives ---


def test_every_row_is_what_was_written(path):
    want, prompts = tensors(path), read(path)
    np.testing.assert_array_equal(prompts.rows, np.arange(COUNT))
    asked = np.asarray([3, 0, 3, 4])  # in this order, and as often as asked
    got = prompts.lookup(asked, None)
    np.testing.assert_array_equal(got['embeds'], want['embeds'][asked])
    assert got['embeds'].dtype == np.float32


def test_the_mask_tells_tokens_from_padding(path):
    lengths = np.asarray([1, 2, 8, 9, 5], np.int32)
    rewrite(path, lengths=lengths)
    mask = read(path).lookup(np.arange(COUNT)[::-1], None)['mask']
    assert mask.dtype == bool and mask.shape == (COUNT, published.TOKENS)
    np.testing.assert_array_equal(mask.sum(1), lengths[::-1])
    assert (np.diff(mask.astype(int), axis=1) <= 0).all()  # padding stands on the right


@pytest.mark.parametrize('length', [1, 4, published.TOKENS])
def test_the_null_prompt_is_one_row_as_long_as_the_others(path, length):
    null = np.random.default_rng(1).standard_normal((length, WIDTH)).astype(np.float32)
    rewrite(path, null=null)
    prompts = read(path)
    like = prompts.lookup(np.arange(1), None)
    assert {k: x.shape for k, x in prompts.null.items()} == {k: x.shape for k, x in like.items()}
    np.testing.assert_array_equal(prompts.null['mask'][0], np.arange(published.TOKENS) < length)
    np.testing.assert_array_equal(prompts.null['embeds'][0, :length], null)
    assert not prompts.null['embeds'][0, length:].any()


@pytest.mark.parametrize('dtype', [np.float16, jnp.bfloat16])
def test_half_precision_stays_as_it_is(path, dtype):
    embeds = tensors(path)['embeds'].astype(dtype)
    rewrite(path, embeds=embeds)
    got = read(path).lookup(np.asarray([2]), None)['embeds']
    assert got.dtype == dtype
    np.testing.assert_array_equal(got[0], embeds[2])


def test_captions_are_in_the_metadata_or_counted(path):
    assert [read(path).caption(i) for i in (0, 4)] == ['prompt number 0', 'prompt number 4']
    rewrite(path)  # no metadata at all
    assert read(path).caption(3) == 'prompt 3'
    rewrite(path, metadata={'prompts': json.dumps(['a cat'])})  # fewer than there are
    assert [read(path).caption(i) for i in (0, 1)] == ['a cat', 'prompt 1']


def test_only_the_rows_of_a_batch_are_read(path, monkeypatch):
    """The file may be far larger than memory; nothing asks for all of it."""
    seen, opened = [], safetensors.safe_open

    class Rows:
        def __init__(self, part):
            self.part, self.get_shape, self.get_dtype = part, part.get_shape, part.get_dtype

        def __getitem__(self, index):
            seen.append(index)
            return self.part[index]

    class Spy:
        def __init__(self, *args, **kwargs):
            file = opened(*args, **kwargs)
            self.keys, self.metadata = file.keys, file.metadata
            self.get_slice = lambda name: Rows(file.get_slice(name))
            self.get_tensor = lambda name: (
                pytest.fail('every row was read') if name == 'embeds' else file.get_tensor(name))

    monkeypatch.setattr(safetensors, 'safe_open', Spy)
    prompts = read(path)
    seen.clear()  # eight of them name the file
    prompts.lookup(np.asarray([4, 1]), None)
    assert [rows for rows, *_ in seen] == [slice(4, 5), slice(1, 2)]


def test_grain_serves_every_prompt_of_an_epoch(path):
    prompts, want = read(path), tensors(path)
    batches = loader.batches(Order(prompts.rows, COUNT, 0), prompts.lookup, COUNT)
    for _ in range(2):
        batch = next(batches).rows
        order = (batch['embeds'][:, None, 0, 0] == want['embeds'][None, :, 0, 0]).argmax(1)
        assert sorted(order) == list(range(COUNT))
        np.testing.assert_array_equal(batch['embeds'], want['embeds'][order])
        np.testing.assert_array_equal(batch['mask'].sum(1), want['lengths'][order])


def test_the_null_prompt_stands_without_the_system_prompt():
    assert lumina.full_prompt('') == ''
    assert lumina.full_prompt('a cat') == f'{lumina.SYSTEM_PROMPT} <Prompt Start> a cat'


def test_prompts_that_are_shown_are_different_ones_as_long_as_there_are():
    prompts = conditioning.encoded(np.asarray([2, 5, 5, 5, 7]), None, null=None, caption=str,
                                   identity='')
    assert sorted(distill.shown_rows(prompts, 3, seed=0)) == [2, 5, 7]
    more = distill.shown_rows(prompts, 7, seed=0)
    assert len(more) == 7 and set(more) == {2, 5, 7}
    np.testing.assert_array_equal(more, distill.shown_rows(prompts, 7, seed=0))


# --- Refusals: one line, with what was found and the cure ---


def delete(path):
    path.unlink()
    return 'no file of embeddings at .*e.safetensors; set config.data.path'


def put_a_folder_there(path):
    path.unlink()
    path.mkdir()
    return 'no file of embeddings'


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])
    return 'embeddings damaged: .*e.safetensors .*; write the file again'


def overwrite(path):
    path.write_bytes(b'not a safetensors file at all')
    return 'embeddings damaged: .*; write the file again'


def spoil_the_captions(path):
    rewrite(path, metadata={'prompts': '["a cat'})
    return 'embeddings damaged: .*; write the file again'


def leave_two_out(path):
    rewrite(path, null=None, lengths=None)
    return 'lacks lengths, null: not a file of embeddings; see docs/teachers.md'


def flatten_the_prompts(path):
    rewrite(path, embeds=np.zeros((COUNT, WIDTH), np.float32))
    return r'must be floats \[N, L, D\] and null .*found \(5, 24\) .*docs/teachers.md'


def give_the_null_prompt_a_batch(path):
    rewrite(path, null=np.zeros((1, 1, WIDTH), np.float32))
    return r'null \[L0, D\], found .* and \(1, 1, 24\) F32; see docs/teachers.md'


def store_token_ids(path):
    rewrite(path, embeds=np.zeros((COUNT, published.TOKENS, WIDTH), np.int32))
    return 'embeds must be floats .*docs/teachers.md'


def forget_a_length(path):
    rewrite(path, lengths=np.ones(COUNT - 1, np.int32))
    return r'5 prompts of 9 tokens do not go with lengths \(4,\) .*docs/teachers.md'


def lengthen_the_null_prompt(path):
    rewrite(path, null=np.zeros((published.TOKENS + 1, WIDTH), np.float32))
    return r'do not go with .* null \(10, 24\); see docs/teachers.md'


def empty_the_null_prompt(path):
    rewrite(path, null=np.zeros((0, WIDTH), np.float32))
    return r'do not go with .* null \(0, 24\); see docs/teachers.md'


def widen(path):
    rewrite(path, embeds=np.zeros((COUNT, published.TOKENS, 32), np.float32))
    return 'embeddings 32 wide .* takes 24; encode the prompts with its own text encoder'


def widen_the_null_prompt(path):
    rewrite(path, null=np.zeros((1, 32), np.float32))
    return r'null: 32\), the teacher takes 24; encode the prompts'


def count_too_far(path):
    rewrite(path, lengths=np.asarray([1, 2, 3, 4, 10], np.int32))
    return r'lengths must lie in 1..9, found 1..10; write the file again'


def empty_a_prompt(path):
    rewrite(path, lengths=np.asarray([0, 2, 3, 4, 5], np.int32))
    return r'lengths must lie in 1..9, found 0..5; write the file again'


def store_null_as_ids(path):
    rewrite(path, null=np.zeros((1, WIDTH), np.int32))
    return r'null \[L0, D\], found .* I32; see docs/teachers.md'


def measure_lengths(path):
    rewrite(path, lengths=np.full(COUNT, np.nan, np.float32))
    return 'whole lengths, found 5 and float32; see docs/teachers.md'


def leave_no_prompt(path):
    rewrite(path, embeds=np.zeros((0, published.TOKENS, WIDTH), np.float32),
            lengths=np.zeros(0, np.int32))
    return 'at least one prompt .*found 0'


def write_captions_as_a_table(path):
    rewrite(path, metadata={'prompts': '{"0": "a cat"}'})
    return 'embeddings damaged: .*not a list'


@pytest.mark.parametrize('damage', [
    store_null_as_ids, measure_lengths, leave_no_prompt, write_captions_as_a_table,
    delete, put_a_folder_there, truncate, overwrite, spoil_the_captions, leave_two_out,
    flatten_the_prompts, give_the_null_prompt_a_batch, store_token_ids, forget_a_length,
    lengthen_the_null_prompt, empty_the_null_prompt, widen, widen_the_null_prompt, count_too_far,
    empty_a_prompt])
def test_a_bad_file_is_refused_in_one_line_with_the_cure(path, damage):
    words = damage(path)
    with pytest.raises(DataFileError, match=words) as e:
        read(path)
    assert len(str(e.value).splitlines()) == 1
