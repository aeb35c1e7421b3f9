"""Buckets behind gs:// and s3://, at servers on this machine that speak their protocols."""

import json
import os
import threading

import pytest
import stores

from ddmd_jax.data import embeddings
from ddmd_jax.data.prompts import build
from ddmd_jax.util import buckets, commands as frame, files, jsonl, places
from ddmd_jax.util.errors import UserError


@pytest.fixture(scope='module', params=['gs', 's3'])
def bucket(request):
    with stores.serving(request.param, 'bucket') as url:
        yield url


@pytest.fixture
def root(bucket, request, tmp_path, monkeypatch):
    """A folder of this test alone, in the bucket; what is fetched is kept in a folder of its own,
    and the current one is empty."""
    monkeypatch.setenv(buckets.CACHE, str(tmp_path / 'cache'))
    (tmp_path / 'here').mkdir()
    monkeypatch.chdir(tmp_path / 'here')
    yield places.of(f'{bucket}/{request.node.originalname}')
    assert not os.listdir(tmp_path / 'here')  # no `gs:` or `s3:` of this machine


def names(place):
    return sorted(buckets.listing(place))


def test_a_file_is_replaced_only_by_a_whole_one(root):
    path = root / 'a.json'
    files.write_json(path, {'é': 1})
    with pytest.raises(OSError, match='no space'), files.replacing(path) as scratch:
        scratch.write_text('half')
        raise OSError('no space left')
    assert path.read_text() == '{\n "é": 1\n}' and names(root) == ['a.json']
    files.write(path, b'\x00')
    assert path.read_bytes() == b'\x00'


def test_a_folder_is_there_whole_or_not_at_all(root, monkeypatch):
    def fill():
        with files.replacing(root / 'set') as scratch:
            scratch.mkdir()
            for name in ('card.json', 'z.bin'):
                (scratch / name).write_text(name)

    put, order = buckets.filesystem(root)[0].put_file, []
    with monkeypatch.context() as patch:
        def fail(source, target):
            order.append(target.rpartition('/')[2])
            if len(order) == 2:
                raise OSError('the network is gone')
            put(source, target)

        patch.setattr(buckets.filesystem(root)[0], 'put_file', fail)
        with pytest.raises(OSError, match='network'):
            fill()
    assert order == ['z.bin', 'card.json'] and not names(root)  # the card comes last
    fill()
    assert names(root) == ['set/card.json', 'set/z.bin'] and (root / 'set').is_dir()
    with pytest.raises(FileExistsError):
        fill()
    files.move(root / 'set', root / 'other')
    assert files.sizes(root) == {'other/card.json': 9, 'other/z.bin': 5}
    files.remove(root / 'other')
    assert not names(root)


def test_a_store_that_refuses_is_a_disk_that_does(root, monkeypatch):
    class Refused(Exception):
        __module__ = 'gcsfs.retry'

    def fail(*args):
        raise Refused('quota exceeded\nand more')

    with monkeypatch.context() as patch:
        patch.setattr(buckets.filesystem(root)[0], 'put_file', fail)
        with pytest.raises(OSError, match='Refused: quota exceeded') as e:
            files.write(root / 'a', 'b')
    assert e.value.filename == f'{root}/a' and not names(root)


def test_lines_are_appended_and_trimmed(root):
    path = root / 'lines.jsonl'
    assert jsonl.read(path) == []
    for step in (1, 2, 3):
        jsonl.append(path, {'step': step})
    assert [x['step'] for x in jsonl.read(path)] == [1, 2, 3]
    assert len(jsonl.trim(path, lambda x: x['step'] < 3)) == 2
    assert [x['step'] for x in jsonl.read(path)] == [1, 2]


def test_a_copy_follows_its_original(root):
    path = root / 'folder' / 'a.txt'
    files.write(path, 'one')
    assert (buckets.local(root / 'folder') / 'a.txt').read_text() == 'one'
    files.write(path, 'two')  # of the same size
    assert (buckets.local(root / 'folder') / 'a.txt').read_text() == 'two'
    assert buckets.local(path).read_text() == 'two'
    # What has gone goes: an old index must not be preferred to the one file that replaced it.
    files.write(root / 'folder' / 'sub' / 'b.txt', 'three')
    only_b = lambda name: name.endswith('b.txt')
    assert (buckets.local(root / 'folder', only_b) / 'sub' / 'b.txt').read_text() == 'three'
    path.unlink()
    kept = buckets.local(root / 'folder', only_b)
    assert (kept / 'a.txt').is_file()  # nobody asked for it this time
    assert not (buckets.local(root / 'folder') / 'a.txt').exists()
    assert (kept / 'sub' / 'b.txt').read_text() == 'three'
    for missing in (root / 'nothing', root / 'folder' / 'a.txt'):
        with pytest.raises(UserError, match=f'{missing} is not there'):
            buckets.local(missing)


def test_a_bucket_that_is_not_there_is_one_line(root, capsys):
    nowhere = places.of(f'{places.scheme(root)}://no-such-bucket/P')
    with pytest.raises(UserError, match='P cannot be written .there is no such bucket') as e:
        frame.folder('--out', nowhere, places.BUCKETS)
    assert '\n' not in str(e.value)
    with pytest.raises(UserError, match='no-such-bucket/P'):
        buckets.local(nowhere)


def test_one_process_holds_a_lock(root, monkeypatch):
    monkeypatch.setattr(buckets, 'BEAT', 0.2)
    monkeypatch.setattr(buckets, 'LEASE', 1.5)
    monkeypatch.setattr(buckets, 'SETTLED', 0.05)
    held, holder = files.lock(root / 'lock')
    assert held and not holder
    other, holder = files.lock(root / 'lock')  # its holder is seen to be alive
    assert other is None and f'process {os.getpid()}' in holder
    held.close()
    assert not names(root)
    # One that dies without a word, here, and one on another machine.
    for change in ({'process': 2**22 + 1}, {'machine': 'elsewhere'}):
        held, _ = files.lock(root / 'lock')
        held._over.set()
        held._thread.join()
        files.write(root / 'lock', json.dumps(json.loads((root / 'lock').read_bytes()) | change))
        again, holder = files.lock(root / 'lock')
        assert again and not holder
        held.close()  # the lock is no longer its own
        assert names(root) == ['lock']
        again.close()


def test_a_lock_that_was_taken_over_ends_its_holder(root, monkeypatch):
    monkeypatch.setattr(buckets, 'BEAT', 0.05)
    ended = threading.Event()
    monkeypatch.setattr(buckets.os, 'kill', lambda process, number: ended.set())
    held, _ = files.lock(root / 'lock')
    for _ in range(50):  # a beat that had looked just before writes over it: then it has not moved
        files.write(root / 'lock', '{"token": "another"}')
        if ended.wait(0.2):
            break
    assert ended.is_set()
    held.close()
    assert names(root) == ['lock']


def test_prompts_go_to_a_bucket_and_come_from_there(root):
    files.write(root / 'in.txt', 'a cat\na dog\na fox\n')
    settings = build.Settings((str(root / 'in.txt'),), validation=0)
    card, there = build.prepare(settings, root / 'set')
    assert not there and card['inputs'][0]['input'] == str(root / 'in.txt')
    assert names(root / 'set') == ['card.json', 'train.array_record', 'validation.array_record']
    assert sorted(build.open_set(str(root / 'set'))) == ['a cat', 'a dog', 'a fox']
    assert build.prepare(settings, root / 'set') == (card, True)
    with pytest.raises(UserError, match='is not there'):
        build.open_set(str(root / 'none'))


def test_weights_by_name_come_from_a_bucket(root):
    import numpy as np
    from safetensors.numpy import save

    from ddmd_jax.weights import states

    files.write(root / 'w' / 'model.safetensors', save({'a': np.ones(3, np.float32)}))
    for named in (root / 'w', root / 'w' / 'model.safetensors'):
        np.testing.assert_array_equal(states.read(states.find(str(named)))['a'], np.ones(3))
    assert states.find(str(root / 'w'), 'model.safetensors').is_file()
    for named in (root / 'none', root / 'none.pt'):
        with pytest.raises(UserError, match=str(named)):
            states.find(str(named))


def test_embeddings_go_to_a_bucket_and_come_from_there(root):
    import ml_dtypes
    import numpy as np

    part = {'embeds': np.ones((2, 3), ml_dtypes.bfloat16)}
    embeddings.write(root / 'e', {'width': 3, 'length': 2, 'identity': 'x'}, part,
                     [('a cat', part), ('a dog', part)])
    found = embeddings.Embeddings(root / 'e')
    assert len(found) == 2 and found.prompt(1) == 'a dog'
    np.testing.assert_array_equal(found.__getitems__([0])[0]['embeds'], part['embeds'])
