"""Published benchmarks: their prompt files, their layouts, what their scorers write."""

import dataclasses
import json
import pickle

import numpy as np
import pytest

from ddmd_jax.data import DataFileError
from ddmd_jax.evaluation import benchmarks, kept, suites, tables
from ddmd_jax.evaluation.suites import SUITES
from ddmd_jax.util.errors import UserError


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def files(name, folder, counts):
    """Writes prompt files as they are published, of that many prompts."""
    text = lambda group, i: f'{group or "prompt"} {i}'
    for group, n in counts.items():
        texts = [text(group, i) for i in range(n)]
        if name == 'hps_v2':
            write(folder / f'{group}.json', json.dumps(texts))
        elif name == 'hps_v3':
            write(folder / f'benchmark_{group}.json', json.dumps(
                [{'id': i, 'caption': x, 'category': group} for i, x in enumerate(texts)]))
        elif name == 'dpg':
            for i, x in enumerate(texts):
                write(folder / 'prompts' / f'item{i}.txt', x + '\n')
        elif name == 'geneval':
            write(folder / 'evaluation_metadata.jsonl', ''.join(
                json.dumps({'tag': 'counting', 'prompt': x}) + '\n' for x in texts))
        elif name == 't2i_compbench':
            write(folder / f'{group}_val.txt', '\n'.join(texts) + '\n')
        else:
            write(folder / 'all_prompts.pkl', pickle.dumps(texts))


def small(name, n=2):
    """A suite and its counts, of n prompts a group."""
    counts = dict.fromkeys(SUITES[name].counts, n)
    return dataclasses.replace(SUITES[name], counts=counts), counts


@pytest.mark.parametrize('name', SUITES)
def test_prompts_are_read_and_a_changed_number_is_one_line(tmp_path, name):
    suite, counts = small(name)
    files(name, tmp_path, counts)
    found = suite.prompts(tmp_path)
    assert len(found) == 2 * len(counts) and len({prompt.text for prompt in found}) == len(found)
    keys = [(prompt.group, prompt.key) for prompt in found]
    assert len(set(keys)) == len(keys)
    places = [place for each in kept.places(suite, found, suite.images) for place in each]
    assert len(set(places)) == len(found) * (1 if suite.tiled else suite.images)
    files(name, tmp_path, dict.fromkeys(counts, 3))
    with pytest.raises(DataFileError, match='3 prompts, the published file 2; fetch it') as e:
        suite.prompts(tmp_path)
    assert len(str(e.value).splitlines()) == 1
    with pytest.raises(DataFileError, match=r'co?mes? from (the hub|github.com).*, (and is to hold '
                                            r'2 prompts|2 in all)$') as e:
        suite.prompts(tmp_path / 'nowhere')
    assert ('sha256 5c48e0813e81' in str(e.value)) == (name == 'geneval')


def test_the_published_numbers_of_prompts():
    """As the benchmarks' papers and repositories say."""
    assert {name: sum(suite.counts.values()) for name, suite in SUITES.items()} == {
        'hps_v2': 3200, 'hps_v3': 12_000, 'dpg': 1065, 'geneval': 553, 't2i_compbench': 2400,
        'coco10k': 10_000}
    for suite in SUITES.values():
        for figures in suite.paper.values():
            assert set(figures) <= set(suite.columns)
    assert SUITES['hps_v2'].paper['paper: decoupled hybrid']['hps_v2.1/anime'] == 33.61
    sums = {name: round(sum(x for row in suite.paper.values() for x in row.values()), 3)
            for name, suite in SUITES.items() if suite.paper}  # one wrong digit shows
    assert sums == {'hps_v2': 777.48, 'hps_v3': 688.324, 'dpg': 2677.7, 'coco10k': 1029.67}
    for suite, figure in (('hps_v2', 'hps_v2.1'), ('hps_v3', 'hps_v3')):
        for figures in SUITES[suite].paper.values():  # the mean of the groups is the paper's own
            groups = [x for name, x in figures.items() if '/' in name]
            assert np.mean(groups) == pytest.approx(figures[figure], abs=0.011)


def test_genevals_file_is_known_by_its_hash(tmp_path):
    files('geneval', tmp_path, {'': 553})
    with pytest.raises(DataFileError, match='its sha256 begins .* expected 5c48e0813e81'):
        SUITES['geneval'].prompts(tmp_path)


@pytest.mark.parametrize('name, spoil, words', [
    ('hps_v2', ('anime.json', '[1, 2]'), 'an entry is no text'),
    ('hps_v2', ('anime.json', '[1,'), 'anime.json is no list of prompts'),
    ('hps_v2', ('anime.json', '{"0": "a", "1": "b"}'), 'anime.json is no list .*of type dict'),
    ('hps_v2', ('anime.json', '"ab"'), 'anime.json is no list .*of type str'),
    ('hps_v2', ('anime.json', r'["a cat \ud83d", "b"]'), 'anime.json is no list .*surrogates'),
    ('hps_v3', ('benchmark_Arts.json', '[{"text": "x"}]'), "no list of prompts .*caption"),
    ('geneval', ('evaluation_metadata.jsonl', '{"tag": 1}'), "none of GenEval's files"),
    ('coco10k', ('all_prompts.pkl', pickle.dumps(print)), 'asks for builtins.print'),
    ('coco10k', ('all_prompts.pkl', b'\x80'), 'no list of prompts')])
def test_a_damaged_prompt_file_is_one_line(tmp_path, name, spoil, words):
    suite, counts = small(name)
    files(name, tmp_path, counts)
    write(tmp_path / spoil[0], spoil[1])
    with pytest.raises(DataFileError, match=words) as e:
        suite.prompts(tmp_path)
    assert len(str(e.value).splitlines()) == 1


def prompts_of(name, folder, n=2):
    suite, counts = small(name, n)
    files(name, folder, counts)
    return suite.prompts(folder)


@pytest.mark.parametrize('raw', [
    b'{"prompt": 5, "tag": "a"}', b'{"prompt": "x", "tag": ["a"]}', b'{"prompt": null, "tag": "a"}',
    b'[]', b'[' * 10**5, b'{"prompt": "caf\xe9", "tag": "a"}'])
def test_genevals_entries_are_what_they_should_be(tmp_path, raw):
    (tmp_path / 'evaluation_metadata.jsonl').write_bytes(raw)
    with pytest.raises(DataFileError, match='is none of GenEval') as e:
        benchmarks.read_geneval(tmp_path, {'': 1}, 'x')
    assert len(str(e.value).splitlines()) == 1


@pytest.mark.parametrize('correct', ['"false"', '0', 'null', '[]', '[' * 10**5])
def test_what_is_right_is_true_or_false(tmp_path, correct):
    (tmp_path / 'results.jsonl').write_text(f'{{"tag": "a", "correct": {correct}}}\n')
    with pytest.raises(UserError, match='results.jsonl is damaged'):
        benchmarks.import_geneval(tmp_path, [benchmarks.Prompt('x', 'a')], 1)


@pytest.mark.parametrize('raw, found', [
    ('caf\u00e9'.encode('utf-8-sig'), 'caf\u00e9'), ('a\u2028b\r\n'.encode('utf-16'), 'a\u2028b'),
    (b'caf\xe9', None), (b'a\0b\0', None)])
def test_texts_are_read_as_prompts_are(tmp_path, raw, found):
    """Whatever their mark and their line ends, of which there are three; else they are refused."""
    for read, name, counts in ((benchmarks.read_dpg, 'a.txt', {'': 1}),
                               (benchmarks.read_t2i_compbench, 'color_val.txt', {'color': 1})):
        folder = tmp_path / name.partition('.')[0]
        folder.mkdir()
        (folder / name).write_bytes(raw)
        if found:
            assert [prompt.text for prompt in read(folder, counts, 'x')] == [found]
        else:
            with pytest.raises(DataFileError, match='is no list of prompts'):
                read(folder, counts, 'x')


def test_geneval_is_the_mean_of_its_tasks(tmp_path):
    found = [benchmarks.Prompt('a', 'counting'), benchmarks.Prompt('b', 'colors')]
    lines = [{'tag': 'counting', 'correct': True}] * 3 + [{'tag': 'counting', 'correct': False}]
    lines += [{'tag': 'colors', 'correct': False}] * 4
    write(tmp_path / 'results.jsonl', '\n'.join(map(json.dumps, lines)))
    assert benchmarks.import_geneval(tmp_path, found, 4) == {
        'geneval': 0.375, 'geneval/colors': 0.0, 'geneval/counting': 0.75}
    write(tmp_path / 'results.jsonl', '\n'.join(map(json.dumps, [
        *lines, {'tag': 'position', 'correct': True}])))  # which would count as a sixth of all
    with pytest.raises(UserError, match='has 1 results of position, there are 0 images; was it'):
        benchmarks.import_geneval(tmp_path, found, 4)
    write(tmp_path / 'results.jsonl', 'x')
    with pytest.raises(UserError, match='results.jsonl is damaged'):
        benchmarks.import_geneval(tmp_path, found, 4)


DPG = """/a, b/item0.png, 1.0, 1.0, 0.5, 1.0, 0.875
/a, b/item1.png, 0.0, 0.5, 0.5, 0.0, 0.25
Model: x
L1 category scores:
\tentity: 91.62
\tglobal: 91.4
L2 category scores:
\tentity - whole: 90.0
Image path: /a, b, c, d, e, f
DPG-Bench score: 56.25
"""


def test_dpg_is_the_mean_over_prompts(tmp_path):
    found = prompts_of('dpg', tmp_path)
    write(tmp_path / 'dpg-bench_20260101-000000_results.txt', DPG)
    assert benchmarks.import_dpg(tmp_path, found, 4) == {
        'dpg': 56.25, 'dpg/entity': 91.62, 'dpg/global': 91.4}
    found += [benchmarks.Prompt('another', '', 'item2')]
    with pytest.raises(UserError, match='no score of item2 and 0 more of 3 prompts'):
        benchmarks.import_dpg(tmp_path, found, 4)


def test_t2i_compbench_is_read_category_by_category(tmp_path):
    found = prompts_of('t2i_compbench', tmp_path)
    with pytest.raises(UserError, match='holds no results of T2I-CompBench'):
        benchmarks.import_t2i_compbench(tmp_path, found, 2)
    answers = [{'question_id': i, 'answer': f'{i / 4:.4f}'} for i in range(4)]
    for category, folder in (('color', 'annotation_blip'),
                             ('spatial', 'labels/annotation_obj_detection_2d')):
        write(tmp_path / category / folder / 'vqa_result.json', json.dumps(answers))
    assert benchmarks.import_t2i_compbench(tmp_path, found, 2) == {
        't2i/color': 0.375, 't2i/spatial': 0.375}
    for i, (category, folder) in enumerate((
            ('shape', 'annotation_blip'), ('texture', 'annotation_blip'),
            ('3d_spatial', 'labels/annotation_obj_detection_3d'), ('numeracy', 'annotation_num'),
            ('non_spatial', 'annotation_clip'), ('complex', 'annotation_3_in_1'))):
        write(tmp_path / 'all' / category / folder / 'vqa_result.json', json.dumps(
            [{'answer': i}] * 4))
    assert list(benchmarks.import_t2i_compbench(tmp_path / 'all', found, 2).items()) == [
        (f't2i/{name}', float(i)) for name, i in (
            ('shape', 0), ('texture', 1), ('3d_spatial', 2), ('numeracy', 3), ('non_spatial', 4),
            ('complex', 5))]
    with pytest.raises(UserError, match='has 4 answers, there are 6 images'):
        benchmarks.import_t2i_compbench(tmp_path, found, 3)


def test_hps_v3_is_read_from_a_table(tmp_path):
    found = prompts_of('hps_v3', tmp_path)
    rows = [f'{prompt.text},{i}' for i, prompt in enumerate(found)]
    write(tmp_path / 'x.csv', '\n'.join(['prompt,score', *rows]))
    figures = benchmarks.import_hps_v3(tmp_path / 'x.csv', found, 1)
    assert figures['hps_v3'] == 11.5 and figures['hps_v3/Animals'] == 0.5
    write(tmp_path / 'x.csv', '\r\n'.join(['prompt,score', *rows]).encode('utf-8-sig'))
    assert benchmarks.import_hps_v3(tmp_path / 'x.csv', found, 1) == figures  # of a spreadsheet
    write(tmp_path / 'x.csv', 'prompt,score\n"' + 'a' * 200_000)  # a quote that is not closed
    with pytest.raises(UserError, match='x.csv is damaged .field larger'):
        benchmarks.import_hps_v3(tmp_path / 'x.csv', found, 1)
    write(tmp_path / 'x.csv', '\n'.join(['prompt,score', *rows[1:]]))
    with pytest.raises(UserError, match="no score of 1 prompts, 'Animals 0' first"):
        benchmarks.import_hps_v3(tmp_path / 'x.csv', found, 1)
    write(tmp_path / 'x.csv', '\n'.join(['prompt,score', *rows, f'{found[0].text},nan']))
    with pytest.raises(UserError, match='hps_v3 is nan, no figure'):
        benchmarks.import_hps_v3(tmp_path / 'x.csv', found, 1)


@pytest.mark.parametrize('name', ['hps_v2', 'dpg', 'geneval', 't2i_compbench', 'coco10k'])
def test_what_is_laid_out_for_a_scorer_is_read_back(tmp_path, name):
    """Lossless but for HPS v2, whose images are JPEG."""
    found, (suite, _) = prompts_of(name, tmp_path, 1), small(name, 1)
    random, n = np.random.default_rng(0), len(found) * suite.images
    images = np.repeat(random.integers(0, 256, (n, 1, 1, 3), np.uint8), 12, 1).repeat(10, 2)

    class Drawn:
        read = staticmethod(lambda row: images[row])

    kept.write_official(tmp_path / 'out', suite, found, Drawn)
    back = kept.Folder(tmp_path / 'out', suite, found)
    assert len(back) == n and not back.faults
    np.testing.assert_allclose(np.stack(list(back)).astype(int), images,
                               atol=3 * (name == 'hps_v2'))
    place = {'hps_v2': 'anime/00000.jpg', 'dpg': 'item0.png', 'geneval': '00000/metadata.jsonl',
             't2i_compbench': 'color/samples/color 0_000009.png', 'coco10k': '00000.png'}[name]
    assert (tmp_path / 'out' / place).is_file()


def test_a_table_has_the_papers_rows_beside_ours():
    suite = SUITES['hps_v2']
    rows = [{'name': 'student', 'steps': 4, 'hps_v2.1': 30.0, 'intervals': {
        'hps_v2.1': [29.75, 30.25]}}, *({'name': k, **v} for k, v in suite.paper.items())]
    shown = tables.terminal(rows, suite.columns).splitlines()
    assert shown[1].split() == ['student', '4', '-', '-', '-', '-', '-', '-', '30.00', '±0.25']
    assert shown[-1].split()[-1] == '32.29' and len(shown) == 7
    page = tables.page('x', [('hps <v2>', rows, suite.columns, ['a & b'])])
    assert page.count('<tr class="paper">') == 5
    assert 'hps &lt;v2&gt;' in page and 'a &amp; b' in page


def test_suites_are_found_by_name():
    assert suites.find('geneval') is SUITES['geneval']
