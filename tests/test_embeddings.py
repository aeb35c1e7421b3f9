"""Encoded prompts on disk: what is read is what was encoded, and only what is whole is read."""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import optax
import pytest
import safetensors.numpy
import tiny

from ddmd_jax import embedding
from ddmd_jax.data import DataFileError, conditioning, embeddings
from ddmd_jax.data.batch import Batch
from ddmd_jax.families.emoji import teacher as emoji
from ddmd_jax.parallel import sharding
from ddmd_jax.train import prompts as sources
from ddmd_jax.util import errors
from ddmd_jax.util.text import in_units

WIDTH = 8
TEXTS = [f'a {w} apple on a {c} background' for w in ('red', 'green', 'small round')
         for c in ('teal', 'white')] + ['apple', 'a cat']


def parts(count, seed=0, pooled=False):
    """Arrays of `count` prompts of unequal lengths."""
    rng = np.random.default_rng(seed)
    one = lambda: {'embeds': rng.standard_normal((rng.integers(1, 9), WIDTH)).astype(
        ml_dtypes.bfloat16)} | ({'pooled': rng.standard_normal(4).astype(ml_dtypes.bfloat16)}
                                if pooled else {})
    return [one() for _ in range(count)]


def write(out, rows):
    embeddings.write(out, {'width': WIDTH, 'length': 8, 'identity': 'a'}, rows[0],
                     [(f'prompt {i}', row) for i, row in enumerate(rows)])
    return np.asarray([len(row['embeds']) for row in rows])


def test_trimming_and_padding_undo_each_other():
    for pooled in (False, True):
        cond = embeddings.padded(parts(5, pooled=pooled), 8)
        back = embeddings.padded(embeddings.trimmed(cond), 8)
        assert cond.keys() == back.keys()
        jax.tree.map(np.testing.assert_array_equal, cond, back)


def test_padding_on_the_left_is_taken_away_too():
    mask = np.asarray([[False, True, True]])
    (row,) = embeddings.trimmed({'embeds': np.arange(3.0).reshape(1, 3, 1), 'mask': mask})
    np.testing.assert_array_equal(row['embeds'].astype(float), [[1], [2]])


@pytest.mark.parametrize('pooled', [False, True])
def test_what_is_written_is_read_at_random(tmp_path, pooled):
    rows = parts(10, pooled=pooled)
    lengths = write(tmp_path / 'e', rows)
    assert [p.name for p in tmp_path.iterdir()] == ['e']
    stored = embeddings.Embeddings(tmp_path / 'e')
    assert len(stored) == 10 and stored.prompt(7) == 'prompt 7'
    np.testing.assert_array_equal(stored.lengths, lengths)
    for i, found in zip((9, 0, 4, 4), stored.__getitems__([9, 0, 4, 4])):
        assert found.keys() == rows[i].keys()
        jax.tree.map(np.testing.assert_array_equal, found, rows[i])


def test_a_run_reads_them_padded_or_cut(tmp_path):
    rows = parts(10)
    write(tmp_path / 'e', rows)
    prompts = conditioning.open_embeddings(str(tmp_path / 'e'), WIDTH)
    assert prompts.identity == 'a' and prompts.caption(3) == 'prompt 3'
    short = np.flatnonzero(prompts.lengths <= 4)[:3]
    cut, full = prompts.lookup(short, 4), prompts.lookup(short, None)
    assert cut['embeds'].shape == (3, 4, WIDTH) and full['embeds'].shape == (3, 8, WIDTH)
    assert cut['embeds'].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(full['embeds'][:, :4], cut['embeds'])
    np.testing.assert_array_equal(cut['mask'].sum(1), prompts.lengths[short])
    jax.tree.map(np.testing.assert_array_equal, prompts.cond(short), full)
    assert prompts.null['embeds'].shape == (1, 8, WIDTH)
    with pytest.raises(DataFileError, match='embeddings 8 wide, the teacher takes 9'):
        conditioning.open_embeddings(str(tmp_path / 'e'), 9)


# --- Whole or not at all ---


def lose_a_file(folder):
    next(folder.glob('*.array_record')).unlink()
    return 'embeddings damaged'


def lose_the_card(folder):
    (folder / 'card.json').unlink()
    return 'is no folder of embeddings'


def truncate_a_file(folder):
    file = next(folder.glob('*.array_record'))
    file.write_bytes(file.read_bytes()[:file.stat().st_size // 2])
    return 'embeddings damaged'


def reach_out(folder):
    card = json.loads((folder / 'card.json').read_text())
    (folder / 'card.json').write_text(json.dumps(card | {'files': ['../elsewhere']}))
    return 'is no folder of embeddings'


def forget_a_length(folder):
    import safetensors.numpy
    safetensors.numpy.save_file({'lengths': np.ones(3, np.int32)}, folder / 'index.safetensors')
    return '10 records of 3'


def delete(folder):
    import shutil
    shutil.rmtree(folder)
    return 'no folder of embeddings at'


@pytest.mark.parametrize('damage', [lose_a_file, lose_the_card, truncate_a_file,
                                    reach_out, forget_a_length, delete])
def test_what_is_not_whole_is_refused_in_one_line(tmp_path, damage):
    write(tmp_path / 'e', parts(10))
    words = damage(tmp_path / 'e')
    (folder,) = [*tmp_path.iterdir()] or [tmp_path / 'e']
    with pytest.raises(DataFileError, match=words) as e:
        embeddings.Embeddings(folder)
    assert len(str(e.value).splitlines()) == 1


# --- Encoded by a teacher's own text side ---


class Texts(list):
    """What a prompt set is to `embedding`."""

    identity, split = 'texts', 'train'

    def __getitems__(self, rows):
        return [self[row] for row in rows]


@pytest.fixture(scope='module')
def text():
    return emoji.text_encoder(tiny.TOY, tiny.random_params(tiny.TOY, 0)['text'], 'tiny')


@pytest.fixture
def mesh():
    return sharding.make_mesh({}, jax.devices()[:1])


@pytest.fixture
def stored(monkeypatch):
    found = Texts(TEXTS)
    monkeypatch.setattr(sources.prompt_sets, 'open_set', lambda *args: found)
    return found


def test_cached_is_online(tmp_path, text, mesh, stored):
    """The same conditioning to bf16's rounding, in any batch, at any cut."""
    embedding.embed(stored, text, mesh, tmp_path / 'e', 3)
    cached = conditioning.open_embeddings(str(tmp_path / 'e'), text.width)
    online = sources.online('prompts', text, mesh, measure=True)
    np.testing.assert_array_equal(cached.lengths, online.lengths)
    assert [cached.caption(i) for i in range(len(TEXTS))] == TEXTS
    assert cached.identity != online.identity  # of the encoder as well
    rows = np.asarray([6, 2, 5])
    longest = int(online.lengths[rows].max())
    a, b = cached.lookup(rows, longest), online.encode(online.lookup(rows, longest))
    np.testing.assert_array_equal(a['mask'], b['mask'])
    real = a['mask'][..., None]
    for x, y in ((a, b), (cached.null, {k: x[:, :cached.null['mask'].shape[1]]
                                        for k, x in online.null.items()})):
        real = np.asarray(x['mask'])[..., None]
        np.testing.assert_allclose(np.asarray(x['embeds'] * real, 'f'),
                                   np.asarray(y['embeds'] * real, 'f'), rtol=2**-7, atol=1e-4)


def test_cached_and_online_give_the_same_step(tmp_path, text, mesh, stored):
    embedding.embed(stored, text, mesh, tmp_path / 'e', 3)
    cached = conditioning.open_embeddings(str(tmp_path / 'e'), text.width)
    online = sources.online('prompts', text, mesh)
    seen = lambda cond: {'embeds': cond['embeds'] * cond['mask'][..., None]}
    network = lambda params, x, t, cond: tiny.small_network(params, x, t, seen(cond))
    spec, program, frozen = tiny.build_run(network, tiny.small_params(), optax.sgd(1.0), mesh)
    rows, moved = np.asarray([6, 2, 5, 0]), []
    length = int(cached.lengths.max())
    for prompts in (cached, online):
        place = sources.placer(prompts, mesh, len(rows))
        batch = place(Batch(prompts.lookup(rows, length), shape=tiny.SHAPE))
        before = spec.create()
        start = jax.tree.map(np.asarray, before.student)
        frozen = dataclasses.replace(frozen, null=prompts.null)
        state, *_ = program.generator(frozen, before, batch)
        moved.append(jax.tree.map(lambda a, b: np.asarray(a) - b, state.student, start))
    apart = jax.tree.map(np.subtract, *moved)
    assert optax.global_norm(apart) <= 2**-7 * optax.global_norm(moved[0]) > 0


def test_the_size_is_said_first_and_a_finished_folder_is_done(tmp_path, text, mesh, stored, capsys):
    args = (stored, text, mesh, tmp_path / 'e', 8)
    _, there = embedding.embed(*args)
    warned, said, *_ = capsys.readouterr().err.splitlines()
    assert not there and embedding.embed(*args)[1]
    assert 'words that emoji never learnt' in warned
    assert said.startswith('8 prompts of ') and ' free' in said
    size = sum(f.stat().st_size for f in (tmp_path / 'e').glob('*.array_record'))
    tokens = embeddings.Embeddings(tmp_path / 'e').lengths.sum() * text.width * 2
    assert in_units(int(tokens)) in said and tokens <= size < tokens + 400 * len(TEXTS) + 2**17


def test_prompts_that_are_cut_are_counted_and_warned_of_once(tmp_path, text, mesh, capsys):
    longest = text.length - 1  # words beside [BOS]
    fits, over = ' '.join(['red'] * longest), ' '.join(['red'] * (longest + 1))
    assert text.cut([fits, over, '']).tolist() == [False, True, False]
    assert text.unknown([fits, 'a zebra', 'A Cat', '']).tolist() == [False, True, False, False]
    for name, texts, count in (('e', [fits, over, 'a cat', over], 2), ('f', [fits, ''], 0)):
        embedding.embed(Texts(texts), text, mesh, tmp_path / name, 8)
        assert embeddings.Embeddings(tmp_path / name).card['cut'] == count
        warned = [x for x in capsys.readouterr().err.splitlines() if 'lose their end' in x]
        assert len(warned) == (count > 0)
    embedding.embed(Texts(['a cat', 'a zebra on ice']), text, mesh, tmp_path / 'h', 8)
    assert ("warning: 1 of 2 prompts have words that emoji never learnt; the first begins 'a zebra "
            "on ice'\n") in capsys.readouterr().err
    embedding.embed(Texts([over]), dataclasses.replace(text, cut=None), mesh, tmp_path / 'g', 8)
    assert embeddings.Embeddings(tmp_path / 'g').card['cut'] is None  # not known


def test_where_there_is_no_room_nothing_is_written(tmp_path, text, mesh, stored, monkeypatch):
    monkeypatch.setattr(embedding.shutil, 'disk_usage', lambda path: type('U', (), {'free': 10}))
    with pytest.raises(DataFileError, match='10 B free: there is no room; choose another --out'):
        embedding.embed(stored, text, mesh, tmp_path / 'e', 8)
    assert not any(tmp_path.iterdir())


def test_a_disk_that_is_full_at_the_end_is_told_by_safetensors_own_error(
        tmp_path, text, mesh, stored, monkeypatch):
    """It is no OSError."""
    def full(*args, **kwargs):
        raise safetensors.SafetensorError('Error while serializing: I/O error: No space left on '
                                          'device (os error 28)')

    monkeypatch.setattr(safetensors.numpy, 'save_file', full)
    with pytest.raises(safetensors.SafetensorError) as e:
        embedding.embed(stored, text, mesh, tmp_path / 'e', 4)
    assert 'there is no room on the disk' in str(errors.environment(e.value))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize('chunk', [3, 1024])
def test_a_full_disk_leaves_nothing_and_chunks_change_nothing(tmp_path, text, mesh, stored,
                                                              monkeypatch, chunk):
    def full(path, rows):
        next(iter(rows))
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(embedding, 'CHUNK', chunk)
    args = (stored, text, mesh, tmp_path / 'e', 4)
    with monkeypatch.context() as m:
        m.setattr(embeddings.records, 'write', full)
        with pytest.raises(DataFileError, match='No space left on device.*make room and run'):
            embedding.embed(*args)
    assert not any(tmp_path.iterdir())
    embedding.embed(*args)
    assert [embeddings.Embeddings(tmp_path / 'e').prompt(i) for i in range(8)] == TEXTS
