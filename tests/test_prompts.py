"""Sets of prompts: what is kept of a file, what is refused, and what a set promises."""

import gzip
import hashlib
import json
import pickle
import resource
import shutil
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import forked
import grain
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from hypothesis import given, strategies as st

from ddmd_jax.data import DataFileError
from ddmd_jax.data.prompts import (
    build as prompts,
    files as prompt_files,
    near,
    set as prompt_set,
)
from ddmd_jax.data.prompts.text import digest, in_validation, normalise

# Every kind of what a keyboard, a web page or a broken file may hold.
TEXT = st.text(st.characters(exclude_categories=()), max_size=40)
COMMAND = [sys.executable, '-m', 'ddmd_jax.prepare', 'prompts']
FIELD = {'.txt': None, '.jsonl': 'caption', '.csv': 'caption', '.tsv': 'caption',
         '.parquet': 'caption'}


def words(count, seed=0):
    """Different prompts of 5 to 20 made-up words, none near another."""
    rng = np.random.default_rng(seed)
    parts = [a + b for a in ('ka', 'lo', 'mi', 'tu', 'bre', 'sho') for b in
             ('n', 'rta', 'lis', 'po', 'gem', 'dua', 'chi', 'vost', 'x', 'ny')]
    bag = [a + b for a in parts for b in parts]
    chosen = rng.integers(len(bag), size=(count, 20)).tolist()
    lengths = rng.integers(5, 20, count).tolist()
    return [' '.join(bag[i] for i in row[:n]) for row, n in zip(chosen, lengths)]


def retyped(texts, count, seed=1):
    """`count` of `texts` with one to three letters exchanged."""
    rng, out = np.random.default_rng(seed), []
    for text in rng.choice(texts, count):
        letters = list(text)
        for at in rng.integers(0, len(letters), rng.integers(1, 4)):
            letters[at] = 'qjzwy'[rng.integers(5)]
        out.append(''.join(letters))
    return out


def put(path, texts):
    """Writes `texts` as the kind of file that `path` names."""
    match path.suffix:
        case '.txt':
            path.write_text(''.join(f'{t}\n' for t in texts), 'utf-8')
        case '.jsonl':
            path.write_text(''.join(json.dumps({'n': 1, 'caption': t}) + '\n' for t in texts))
        case '.csv' | '.tsv':
            gap = ',' if path.suffix == '.csv' else '\t'
            rows = [f'1{gap}"{t.replace(chr(34), chr(34) * 2)}"\n' for t in texts]
            path.write_text(f'n{gap}caption\n' + ''.join(rows), 'utf-8')
        case '.parquet':
            pq.write_table(pa.table({'n': [1] * len(texts), 'caption': texts}), path)
    return path


def make(out, *inputs, **settings):
    settings = {'near_threshold': 1.0, 'validation': 0.2, 'field': 'caption'} | settings
    return prompts.prepare(prompts.Settings(tuple(map(str, inputs)), **settings), Path(out))[0]


def both(path):
    return [list(prompts.open_set(path, split)) for split in prompt_set.SPLITS]


# --- One prompt ---


@given(TEXT)
def test_normalising_twice_changes_nothing_and_leaves_one_clean_line(text):
    once = normalise(text)
    assert normalise(once) == once == unicodedata.normalize('NFC', once)
    assert not any(unicodedata.category(c) in ('Cc', 'Cs', 'Zl', 'Zp') for c in once)
    assert once == ' '.join(once.split())
    once.encode()  # halves of surrogate pairs are gone


def test_normal_form():
    assert normalise(' a\u0301  cat\r\n\ton\x00a\u00a0mat\u2028 \ufeff') == '\u00e1 cat on a mat'
    family = '\U0001f468\u200d\U0001f469\u200d\U0001f467'  # joiners of zero width spell it
    assert normalise(family) == family


@given(TEXT, st.floats(0, 1), st.floats(0, 1))
def test_a_larger_validation_share_moves_no_prompt_back(text, a, b):
    low, high = sorted((a, b))
    found = digest(normalise(text))
    assert in_validation(found, low) <= in_validation(found, high)
    assert not in_validation(found, 0) and in_validation(found, 1)


def test_the_split_is_the_share_asked_for_and_a_golden_one():
    """Another hash would put prompts that a student was trained on into its validation."""
    share = np.mean([in_validation(digest(t), 0.1) for t in words(5000)])
    assert 0.085 < share < 0.115
    asked = ['a red apple', 'a cat', 'a dog', 'the sea at night', '一只猫', 'two cups of tea']
    assert [in_validation(digest(t), 0.3) for t in asked] == GOLDEN


GOLDEN = [False, True, False, False, False, False]

# --- Near-duplicates ---


def exact(texts, threshold):
    """What comparing every pair drops."""
    sets = [near.shingles(t) for t in texts]
    place = {s: i for i, s in enumerate(sorted(set().union(*sets)))}
    holds = np.zeros((len(texts), len(place)), np.float32)
    for row, mine in zip(holds, sets):
        row[[place[s] for s in mine]] = 1
    shared, sizes = holds @ holds.T, holds.sum(1)
    close = shared / (sizes[:, None] + sizes - shared) >= threshold
    dropped = np.zeros(len(texts), bool)
    for i in range(len(texts)):
        dropped[i] = (close[i, :i] & ~dropped[:i]).any()
    return set(np.flatnonzero(dropped).tolist())


@pytest.mark.parametrize('threshold', [0.6, 0.85, 0.9])
def test_near_duplicates_are_those_that_comparing_every_pair_finds(threshold):
    texts = words(700)
    texts += retyped(texts, 400)
    want, got = exact(texts, threshold), set(near.find(texts, threshold))
    recall, precision = len(got & want) / len(want), len(got & want) / len(got)
    print(f'at {threshold}: {len(want)} near-duplicates, recall {recall}, precision {precision}')
    assert len(want) > 20 and recall >= 0.98 and precision >= 0.98


def test_among_prompts_of_one_template_most_are_found():
    bag = words(400, seed=3)
    texts = [f'a detailed studio photograph of {t.split()[0]} and {t.split()[1]}, soft light, 85mm '
             f'lens, award winning, by {t.split()[2]}' for t in bag]
    texts += retyped(texts, 200)
    want, got = exact(texts, 0.85), set(near.find(texts, 0.85))
    recall, precision = len(got & want) / len(want), len(got & want) / len(got)
    print(f'of one template: {len(want)} near-duplicates, {recall=:.3f} {precision=:.3f}')
    assert len(want) > 50 and recall >= 0.9 and precision >= 0.9


@pytest.mark.slow
def test_among_thousands_of_one_template_a_few_stay():
    """The hard case: each of 2,500 is like each of the others to two thirds."""
    bag, rng = ' '.join(words(60, seed=3)).split(), np.random.default_rng(0)
    pick = lambda: bag[rng.integers(len(bag))]
    one = lambda: (f'a highly detailed studio photograph of {pick()} and {pick()}, soft light, '
                   f'85mm lens, award winning, trending on artstation, {pick()}')
    texts = sorted({one() for _ in range(2500)})
    want, got = exact(texts, 0.8), set(near.find(texts, 0.8))
    recall, precision = len(got & want) / len(want), len(got & want) / len(got)
    print(f'of 2,500: {len(want)} near-duplicates, {recall=:.3f} {precision=:.3f}')
    assert recall >= 0.85 and precision >= 0.9


@given(st.lists(st.text('ab c,', min_size=1, max_size=14), max_size=12),
       st.sampled_from([0.5, 0.85]))
def test_what_is_dropped_repeats_what_stays_and_a_second_pass_drops_nothing(texts, threshold):
    twins = near.find(texts, threshold)
    for row, (kept, alike) in twins.items():
        both = [near.shingles(texts[i]) for i in (row, kept)]
        assert kept < row and kept not in twins and near.jaccard(*both) == alike >= threshold
    assert not near.find([t for i, t in enumerate(texts) if i not in twins], threshold)


def test_case_and_punctuation_are_put_aside_but_not_symbols():
    assert set(near.find(['A cat, sleeping.', 'a cat sleeping'], 0.99)) == {1}
    texts = ['\U0001f34e', '\U0001f34c', '?', '!', 'a', 'b', '一只猫', '一只狗']
    assert near.find(texts, 0.5) == {}
    assert near.find(['a cat'] * 3, 1.0) == {}  # off


def test_banding_finds_nearly_all_pairs_at_every_threshold():
    for threshold in np.linspace(0.3, 0.99, 24):
        count, rows = near.bands(threshold)
        assert count * rows <= near.PERMUTATIONS
        assert 1 - (1 - threshold**rows) ** count >= near.RECALL


@pytest.mark.slow
def test_a_hundred_thousand_prompts_fit_in_600_megabytes(tmp_path):
    """``pytest -m slow -s -k hundred`` shows the figures."""
    texts = words(95_000)
    put(tmp_path / 'a.txt', texts + retyped(texts, 5_000))
    code = ('import runpy, sys\ntry:\n    runpy.run_module("ddmd_jax.prepare", None, "__main__")\n'
            'finally:\n    print(open("/proc/self/status").read())')
    args = ['prompts', f'--input={tmp_path}/a.txt', f'--out={tmp_path}/out']
    done = subprocess.run([sys.executable, '-c', code, *args], cwd=tiny.ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.split('VmHWM:')[1].split()[0]) / 1e3
    print(f'\n100,000 prompts: at most {peak:.0f} MB')
    assert peak < 600


# --- Files of prompts ---


@pytest.mark.parametrize('kind', FIELD)
def test_every_kind_of_file_gives_the_same_prompts(tmp_path, kind):
    texts = ['a "red" apple, alone', 'tab\there', '', 'l\u00e9mon \U0001f34b', "it's"]
    if kind == '.txt':
        texts[1] = 'tab here'
    source = prompt_files.read(put(tmp_path / f'p{kind}', texts), 'caption')
    assert [t.removesuffix('\n') for t in source] == texts


def test_what_editors_and_spreadsheets_write_is_read(tmp_path):
    (tmp_path / 'a.csv').write_bytes(b'\xef\xbb\xbfcaption,n\r\n"2\r\nlines",1\r\n\r\na cat,2\r\n')
    (tmp_path / 'b.jsonl').write_bytes(b'\xef\xbb\xbf{"caption": null}\n\n{"caption": "\\ud83d x"}')
    (tmp_path / 'c.txt').write_bytes(b'\xef\xbb\xbfa dog\r\nno end')
    card = make(tmp_path / 'out', *(tmp_path / n for n in ('a.csv', 'b.jsonl', 'c.txt')))
    assert sorted(sum(both(tmp_path / 'out'), [])) == ['2 lines', 'a cat', 'a dog', 'no end', 'x']
    assert card['counts']['read'] == 8 and card['counts']['empty'] == 3


def latin(path):
    (path / 'p.txt').write_bytes(b'a cat\ncaf\xe9\n')
    return 'p.txt', r'p.txt line 2: not UTF-8 \(byte 3 of the line, 0xe9\)'


def nothing(path):
    (path / 'p.txt').touch()
    return 'p.txt', 'p.txt holds no prompts'


def blank_lines(path):
    (path / 'p.txt').write_text('\n \n\t\n')
    return 'p.txt', r'p.txt holds no prompts'


def no_json(path):
    (path / 'p.jsonl').write_text('{"caption": "a"}\n{"caption": \n')
    return 'p.jsonl', 'p.jsonl line 2: not JSON'


def json_of_another_kind(path):
    (path / 'p.jsonl').write_text('["a"]\n')
    return 'p.jsonl', 'line 1: expected a JSON object'


def too_deep_json(path):
    (path / 'p.jsonl').write_text('[' * 100_000 + '\n')
    return 'p.jsonl', 'line 1: not JSON'


def lacking_field(path):
    (path / 'p.jsonl').write_text('{"caption": "a"}\n{"text": "a", "url": ""}\n')
    return 'p.jsonl', "line 2: no field 'caption'; there are 'text', 'url'; name one with --field"


def number_for_text(path):
    (path / 'p.jsonl').write_text('{"caption": 3}\n')
    return 'p.jsonl', "line 1: 'caption' is 3, not a text"


def lacking_column(path):
    (path / 'p.csv').write_text('a,b\n1,2\n')
    return 'p.csv', "p.csv line 1: no field 'caption'; there are 'a', 'b'"


def unquoted_comma(path):
    (path / 'p.csv').write_text('caption\na cat\na cat, asleep\n')
    return 'p.csv', "line 3: 2 columns, 1 in the header; quote prompts that hold a ','"


def open_quote(path):
    (path / 'p.csv').write_text('caption\na cat\n"a dog\n' + 'x\n' * 9)
    return 'p.csv', 'line 3: unexpected end of data; are its quotes closed'


def header_alone(path):
    (path / 'p.tsv').write_text('caption\tn\n')
    return 'p.tsv', 'p.tsv holds no prompts'


def cut_parquet(path):
    put(path / 'p.parquet', words(50))
    (path / 'p.parquet').write_bytes((path / 'p.parquet').read_bytes()[:-40])
    return 'p.parquet', 'p.parquet cannot be read as parquet'


def parquet_without_it(path):
    pq.write_table(pa.table({'text': ['a']}), path / 'p.parquet')
    return 'p.parquet', "p.parquet: no field 'caption'; there are 'text'"


def parquet_of_numbers(path):
    pq.write_table(pa.table({'caption': [1]}), path / 'p.parquet')
    return 'p.parquet', "p.parquet: 'caption' is 1, not a text"


def unknown_kind(path):
    (path / 'p.txt.gz').write_bytes(gzip.compress(b'a cat'))
    return 'p.txt.gz', r"unknown kind '.gz'; known are .txt, .jsonl"


def absent(path):
    return 'nowhere.txt', 'no file .*nowhere.txt'


def a_folder(path):
    (path / 'p.txt').mkdir()
    return 'p.txt', 'no file .*p.txt: it is a folder'


def all_filtered(path):
    put(path / 'p.txt', ['ab', 'x' * 3000, '', 'c'])
    return 'p.txt', 'no prompt is left: 4 read, 1 empty, 2 shorter .*, 1 longer than --max_chars'


@pytest.mark.parametrize('spoil', [
    latin, nothing, blank_lines, no_json, json_of_another_kind, too_deep_json, lacking_field,
    number_for_text, lacking_column, unquoted_comma, open_quote, header_alone, cut_parquet,
    parquet_without_it, parquet_of_numbers, unknown_kind, absent, a_folder, all_filtered])
def test_a_bad_file_is_refused_in_one_line_and_leaves_nothing(tmp_path, spoil):
    name, message = spoil(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DataFileError, match=message) as e:
        make(tmp_path / 'out', tmp_path / name, min_chars=3 if spoil is all_filtered else 1)
    assert len(str(e.value).splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before


# --- What is kept ---


def test_every_stage_is_counted(tmp_path):
    texts = ['a cat asleep on a wooden chair', ' A cat,  asleep on a wooden chair!', '', 'ab',
             'x' * 100_000, 'a cat asleep on a wooden\u00a0chair', 'the sea']
    card = make(tmp_path / 'out', put(tmp_path / 'p.jsonl', texts), min_chars=3,
                near_threshold=0.85)
    assert card['counts'] == {
        'read': 7, 'empty': 1, 'too_short': 1, 'too_long': 1,
        'exact_duplicates': 1, 'near_duplicates': 1}
    (pair,) = card['near_examples']
    assert {pair['dropped'], pair['kept']} == {normalise(t) for t in texts[:2]}
    assert len(prompts.summary(card['counts']).split(', ')) == 6
    assert card == json.loads((tmp_path / 'out/card.json').read_text())
    assert card['inputs'][0]['sha256'] == hashlib.sha256(
        (tmp_path / 'p.jsonl').read_bytes()).hexdigest()


def test_a_file_of_one_prompt_again_and_again_gives_one(tmp_path):
    card = make(tmp_path / 'out', put(tmp_path / 'p.txt', ['a cat'] * 500))
    assert sum(card['splits'].values()) == 1 and card['counts']['exact_duplicates'] == 499
    assert prompts.summary(card['counts']).startswith('500 read, 499 equal')


@pytest.mark.parametrize('validation, empty', [(0.0, 'validation'), (1.0, 'train')])
def test_a_split_without_prompts_can_be_opened_and_is_said(tmp_path, validation, empty):
    card = make(tmp_path / 'out', put(tmp_path / 'p.txt', words(3)), validation=validation)
    assert card['splits'][empty] == 0
    assert len(prompts.open_set(tmp_path / 'out', empty)) == 0
    assert both(tmp_path / 'out')[prompt_set.SPLITS.index(empty)] == []
    with pytest.raises(IndexError, match=f'0 {empty} prompts'):
        prompts.open_set(tmp_path / 'out', empty)[0]


def test_the_set_depends_on_the_prompts_alone(tmp_path):
    texts = words(300)
    texts += retyped(texts, 60)
    one = make(tmp_path / 'one', put(tmp_path / 'p.jsonl', texts), near_threshold=0.85)
    parts = [put(tmp_path / f'q{i}{kind}', texts[::-1][i::3])
             for i, kind in enumerate(['.csv', '.parquet', '.txt'])]
    two = make(tmp_path / 'two', *parts, parts[0], near_threshold=0.85)
    assert one['identity'] == two['identity'] and one['splits'] == two['splits']
    assert one['counts']['near_duplicates'] > 20
    for name in ('train.array_record', 'validation.array_record'):
        assert (tmp_path / 'one' / name).read_bytes() == (tmp_path / 'two' / name).read_bytes()
    assert set(both(tmp_path / 'one')[0]).isdisjoint(both(tmp_path / 'one')[1])


def test_prompts_that_are_added_move_none_to_another_split(tmp_path):
    texts = words(400)
    make(tmp_path / 'one', put(tmp_path / 'p.txt', texts[:150]))
    make(tmp_path / 'two', put(tmp_path / 'q.txt', texts))
    for few, many in zip(both(tmp_path / 'one'), both(tmp_path / 'two')):
        assert few and set(few) <= set(many)


# --- The set ---


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp('made')
    make(folder / 'set', put(folder / 'p.txt', words(120)))
    return folder / 'set'


@pytest.fixture
def copy(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / 'copy'))


def test_prompts_stand_in_the_order_of_their_ids(made):
    for split in prompt_set.SPLITS:
        found = list(prompts.open_set(made, split))
        ids = [digest(p) for p in found]
        assert ids == sorted(ids) and all(in_validation(i, 0.2) == (split != 'train') for i in ids)


def test_prompts_are_read_by_index_and_survive_pickling(made):
    train = prompts.open_set(str(made))
    whole = list(train)
    assert train[0] == whole[0] and train[-1] == whole[-1] and train[np.int64(5)] == whole[5]
    assert train.__getitems__([7, 2, 7]) == [whole[7], whole[2], whole[7]]
    assert train.__getitems__([]) == []
    again = pickle.loads(pickle.dumps(train))
    assert list(again) == whole and again.identity == train.identity
    for index in (len(whole), -len(whole) - 1):
        with pytest.raises(IndexError):
            train[index]


def test_grain_serves_the_prompts(made):
    train = prompts.open_set(made)
    served = grain.MapDataset.source(train).seed(0).shuffle().batch(len(train))[0]
    assert sorted(served) == sorted(train) and list(served) != list(train)


def not_there(path):
    shutil.rmtree(path)
    return 'no set of prompts at'


def without_card(path):
    (path / 'card.json').unlink()
    return 'is not a set of prompts'


def another_set(path):
    shutil.rmtree(path)
    shutil.copytree(tiny.ROOT / 'ddmd_jax/families/emoji/files/drawings', path)
    return 'is not a set of prompts'


def cut_card(path):
    (path / 'card.json').write_text((path / 'card.json').read_text()[:200])
    return 'set of prompts damaged'


def card_of_another_kind(path):
    (path / 'card.json').write_text('[]')
    return 'set of prompts damaged'


def card_of_the_future(path):
    (path / 'card.json').write_text('{"format": "ddmd_jax prompts 9"}')
    return "is 'ddmd_jax prompts 9', not 'ddmd_jax prompts 2'"


def record(path):
    return path / 'train.array_record'


def cut_record(path):
    record(path).write_bytes(record(path).read_bytes()[:-5000])
    return 'set of prompts damaged'


def empty_record(path):
    record(path).write_bytes(b'')
    return 'set of prompts damaged'


def without_record(path):
    record(path).unlink()
    return 'set of prompts damaged'


def fewer_rows(path):
    card = json.loads((path / 'card.json').read_text())
    card['splits']['train'] -= 1
    (path / 'card.json').write_text(json.dumps(card))
    return 'set of prompts damaged: .* records of '


@pytest.mark.parametrize('damage', [
    not_there, without_card, another_set, cut_card, card_of_another_kind, card_of_the_future,
    cut_record, empty_record, without_record, fewer_rows])
def test_what_is_no_whole_set_is_refused_in_one_line(copy, damage):
    message = damage(copy)
    with pytest.raises(DataFileError, match=message) as e:
        prompts.open_set(copy)
    assert len(str(e.value).splitlines()) == 1 and str(copy) in str(e.value)


def test_damage_in_the_middle_is_noticed_when_it_is_read(copy):
    raw = bytearray(record(copy).read_bytes())
    raw[6000:6064] = bytes(64)
    record(copy).write_bytes(raw)
    with pytest.raises(DataFileError, match='set of prompts damaged'):
        list(prompts.open_set(copy))


def test_there_is_no_third_split(made):
    with pytest.raises(DataFileError, match="no split 'test'; there are train, validation"):
        prompts.open_set(made, 'test')


# --- Again, and after a stop ---


def test_the_same_command_again_finds_it_done_and_another_is_refused(tmp_path):
    put(tmp_path / 'p.txt', words(40))
    card = make(tmp_path / 'out', tmp_path / 'p.txt')
    moved = Path(shutil.copy(tmp_path / 'p.txt', tmp_path / 'moved.txt'))
    settings = prompts.Settings((str(moved),), near_threshold=1.0, validation=0.2, field='caption')
    assert prompts.prepare(settings, tmp_path / 'out') == (card, True)
    with pytest.raises(DataFileError, match=r'another set of prompts \(max_chars: 2000 -> 9\)'):
        make(tmp_path / 'out', tmp_path / 'p.txt', max_chars=9)
    moved.write_text('a cat\n')
    with pytest.raises(DataFileError, match='other inputs'):
        make(tmp_path / 'out', moved)
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other/file').touch()
    with pytest.raises(DataFileError, match='exists and is no set of prompts'):
        make(tmp_path / 'other', moved)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['moved.txt', 'other', 'out', 'p.txt']


@pytest.mark.slow
def test_a_run_that_is_killed_at_any_time_leaves_no_half_of_a_set(tmp_path):
    inputs = [put(tmp_path / f'{i}.txt', words(1_200, i)) for i in range(4)]
    want = make(tmp_path / 'want', *inputs, validation=0.01, near_threshold=0.85)
    args = lambda out: ['ddmd_jax.prepare', 'prompts', *(f'--input={i}' for i in inputs),
                        f'--out={tmp_path / out}']
    start = time.monotonic()
    assert forked.run(*args('untouched')).returncode == 0
    whole = time.monotonic() - start
    for seconds in np.linspace(0.05, 0.95, 10) * whole:
        process = forked.start(*args('out'))
        time.sleep(seconds)
        process.kill()
        process.wait()
        if (tmp_path / 'out').exists():  # whole, if it is there at all
            assert prompts.open_set(tmp_path / 'out').identity == want['identity']
    assert forked.run(*args('out')).returncode == 0
    assert prompts.open_set(tmp_path / 'out').identity == want['identity']


# --- A full disk ---

def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    """A limit on the size of files stands for the disk."""
    path = put(tmp_path / 'a.txt', words(3000))
    limit = path.stat().st_size // 2
    args = [*COMMAND, f'--input={path}', f'--out={tmp_path}/out', '--near_threshold=1']
    limited = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    done = subprocess.run(args, cwd=tiny.ROOT, capture_output=True, text=True, preexec_fn=limited)
    lines = [x for x in done.stderr.splitlines() if x.startswith('prepare:')]
    assert done.returncode == 1 and 'Traceback' not in done.stderr, done.stderr
    assert len(lines) == 1 and 'File too large' in lines[0] and 'same command again' in lines[0]
    assert [p.name for p in tmp_path.iterdir()] == ['a.txt']


def test_jax_is_not_needed(tmp_path):
    """It takes seconds to start, and this command runs on machines without one."""
    path = put(tmp_path / 'a.txt', words(5))
    code = ('import sys; from pathlib import Path\n'
            'from ddmd_jax.data.prompts import build as prompts\n'
            f'prompts.prepare(prompts.Settings(({str(path)!r},)), '
            f'Path({str(tmp_path / "out")!r}))\n'
            f'prompts.open_set({str(tmp_path / "out")!r})[0]\n'
            'assert not {"jax", "flax", "tensorflow", "torch"} & set(sys.modules)')
    done = subprocess.run([sys.executable, '-c', code], cwd=tiny.ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
