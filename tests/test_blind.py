"""Evaluations side by side: paired comparison, sheets, and the page on which people judge."""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from ddmd_jax.diffusion import drawing
from ddmd_jax.evaluation import blind, results, sheets
from ddmd_jax.evaluation.kept import Kept
from ddmd_jax.evaluation.results import Part, ResultsError
from ddmd_jax.evaluation.suites import Suite

PROMPTS = ['a cat on a mat', 'two <b>dogs</b> & a "bird"', 'a house', 'a tree by the sea']
LEVEL = {'a': 40, 'b': 120, 'c': 200}  # of grey in the pictures of each model


def make(folder, scores=(1.0, 2.0, 3.0, 4.0), seed=5, number=2, size=32, prompts=PROMPTS):
    """An evaluation's folder: `number` images of each prompt, grey as its name says."""
    named = drawing.names(prompts, number, seed)
    n = len(named)
    images = Kept(folder / 'images' / 'toy' / 'student', named, 'arrayrecord')
    images.claim({'steps': 4})
    shade = LEVEL.get(folder.name[0], 90) + 10 * np.arange(n)[:, None, None, None] % 50
    images.add(range(n), np.broadcast_to(shade, (n, size, size, 3)).astype(np.uint8))
    images.finish()
    each = {'score': np.repeat(np.asarray(scores, float), number)}
    results.write(folder, [Part(Suite('toy', {'score': '.2f'}), [
        {'name': 'student', 'steps': 4, 'score': float(np.nanmean(each['score']))}],
        {'student': each}, named, [''] * n, [])], {'seed': seed})
    return folder


@pytest.fixture(scope='module')
def three(tmp_path_factory):
    folder = tmp_path_factory.mktemp('evaluations')
    return [make(folder / name, scores) for name, scores in (
        ('a', (1, 2, 3, 4)), ('b', (2, 3, 4, 5.5)), ('c', (1, 2, 3, 4)))]


def test_a_row_is_read_as_it_was_written(three):
    found = results.read(f'{three[0]}:student')
    assert found.named == results.read(str(three[0])).named
    assert [name.prompt for name in found.named] == [p for p in PROMPTS for _ in range(2)]
    np.testing.assert_array_equal(found.scores['score'], np.repeat([1, 2, 3, 4], 2))
    assert found.images().read(3).shape == (32, 32, 3) and found.title == 'a:student'


def test_two_evaluations_are_compared_prompt_by_prompt(three):
    a, b, c = (results.read(str(path)) for path in three)
    row, = results.compare(b, a)
    assert row['figure'] == 'score' and row['prompts'] == 4 and row['wins'] == 1
    assert row['difference'] == pytest.approx(1.125) and row['p_value'] == 2 / 16
    assert row['low'] <= 1.125 <= row['high'] and (row['first'], row['second']) == (3.625, 2.5)
    same, = results.compare(a, c)
    assert same['difference'] == 0 and same['p_value'] == 1 and same['wins'] == 0.5
    shown = results.terminal_comparison(*results.comparison(b, a, [row]))
    assert '+1.125' in shown and '100.0%' in shown


def test_an_image_without_a_figure_counts_in_neither(three, tmp_path):
    holed = results.read(str(make(tmp_path / 'holed', (np.nan, 2, 3, 5))))
    row, = results.compare(holed, results.read(str(three[0])))
    assert row['prompts'] == 3 and row['difference'] == pytest.approx(1 / 3)


def test_other_prompts_or_seeds_are_refused(three, tmp_path):
    other = results.read(str(make(tmp_path / 'other', seed=6)))
    with pytest.raises(ResultsError, match='not of the same prompts and seeds'):
        results.compare(results.read(str(three[0])), other)
    for place, words in (('/nowhere', 'holds no evaluation'), (f'{three[0]}:x', 'names 0 rows')):
        with pytest.raises(ResultsError, match=words) as e:
            results.read(place)
        assert len(str(e.value).splitlines()) == 1
    (tmp_path / 'scores.parquet').write_bytes(b'half of it')
    with pytest.raises(ResultsError, match='scores.parquet is damaged'):
        results.read(str(tmp_path))


def test_sheets_show_models_seeds_best_and_worst(three, tmp_path):
    rows = [results.read(str(path)) for path in three]
    assert sheets.chosen(rows[0], 2) == [0, 6]
    assert sheets.chosen(rows[0], 2, best='score') == [6, 4]
    assert sheets.chosen(rows[0], 2, worst='score') == [0, 2]
    with pytest.raises(ResultsError, match="has no figure 'x' of each image; it has score"):
        sheets.chosen(rows[0], 2, best='x')
    sheets.write(tmp_path / 'models.png', rows, [0, 4], 'score')
    sheets.write(tmp_path / 'seeds.png', rows[:1], [0, 4], seeds=True)
    sizes = [Image.open(tmp_path / f'{name}.png').size for name in ('models', 'seeds')]
    assert sizes[0][0] > sizes[1][0] and sizes[0][1] == sizes[1][1]
    pixels = np.asarray(Image.open(tmp_path / 'models.png').convert('RGB'))
    for level in (40, 120, 200):
        assert (pixels == level).all(-1).sum() > 1000  # one picture of each model at least
    with pytest.raises(ResultsError, match='--seeds shows the images of one evaluation'):
        sheets.write(tmp_path / 'x.png', rows, [0], seeds=True)


# --- The blind page ---


@pytest.fixture(scope='module')
def page(three, tmp_path_factory):
    rows = [results.read(str(path)) for path in three]
    return blind.write(tmp_path_factory.mktemp('page') / 'blind.html', rows)


def test_a_page_needs_nothing_and_tells_nothing(page):
    text = page.read_text()
    body = text[:text.index('<script type="application/json"')]
    assert 'student' not in body and not re.search(r'(?:src|href)="(?!data:|#)', text)
    assert '<b>dogs</b>' not in body and text.count('data:image/webp') == 12
    data = json.loads(text.split('id="data">')[1].split('</script>')[0])
    assert data['models'] == ['a:student', 'b:student', 'c:student']
    assert [item['prompt'] for item in data['items']] == PROMPTS


def test_what_cannot_be_judged_is_one_line(three, tmp_path):
    row = results.read(str(three[0]))
    again = results.read(f'{three[0]}/../{three[0].name}')
    for twice in (row, again):
        with pytest.raises(ResultsError, match='named twice'):
            blind.write(tmp_path / 'x.html', [row, twice])
    shutil.rmtree(make(tmp_path / 'gone') / 'images')
    with pytest.raises(Exception, match='no images of an evaluation'):
        blind.write(tmp_path / 'x.html', [row, results.read(str(tmp_path / 'gone'))])


browser = pytest.mark.skipif(not shutil.which('chromium'), reason='no chromium here')

# Ranks by keyboard: c best, except at 'a house', where it is b; a is always the last.
JUDGE = """
const press = key => document.dispatchEvent(new KeyboardEvent('keydown', {key}));
const rank = names => {
  for (const name of names.slice(0, -1)) {
    const place = window.blind.sides().findIndex(m => window.blind.data.models[m].startsWith(name));
    press(String(place + 1));
  }
};
const prompt = () => document.getElementById('prompt').textContent;
"""
ALL = JUDGE + """
const seen = [];
for (let i = 0; i < 4; i++) { seen.push(prompt()); rank(prompt() === 'a house' ? 'bca' : 'cba'); }
const out = document.createElement('pre'); out.id = 'out';
out.textContent = JSON.stringify({seen, exported: window.blind.exported(),
                                  tally: window.blind.tally()});
document.body.append(out);
"""


def opened(path, *flags, profile=None, size='1280,1600'):
    """(the page's final DOM, what its console said)."""
    done = subprocess.run(
        ['chromium', '--headless=new', '--no-sandbox', '--disable-gpu', '--enable-logging=stderr',
         f'--window-size={size}', *([f'--user-data-dir={profile}'] if profile else []), *flags,
         f'file://{path}'], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, re.findall(r'CONSOLE.*', done.stderr)


def scripted(page, path, script):
    path.write_text(page.read_text().replace('</body>', f'<script>{script}</script></body>'))
    return path


@browser
def test_a_page_filled_in_by_keyboard_gives_the_known_tally(page, tmp_path):
    dom, console = opened(scripted(page, tmp_path / 'all.html', ALL), '--dump-dom')
    assert not console
    found = json.loads(html.unescape(re.search(r'<pre id="out">(.*?)</pre>', dom, re.S)[1]))
    assert sorted(found['seen']) == sorted(PROMPTS)
    assert found['tally'] == {
        'n': 4, 'raters': 1, 'ranks': [[0, 0, 4], [1, 3, 0], [3, 1, 0]],
        'wins': [[0, 0, 0], [4, 0, 1], [4, 3, 0]]}
    choices = {one['prompt']: one['ranking'] for one in found['exported']['choices']}
    assert choices['a house'] == ['b:student', 'c:student', 'a:student']
    # Wilson's 95 % interval of 3 of 4: 30.1 % to 95.4 %.
    shown = [html.unescape(x) for x in re.findall(r'<td>(.*?)</td>', dom)]
    assert '75.0 % (30.1 % to 95.4 %)' in shown and '25.0 % (4.6 % to 69.9 %)' in shown
    assert '100.0 % (51.0 % to 100.0 %)' in shown[:5]  # shares of ranks have theirs too
    assert [x for x in shown if re.fullmatch(r'\d\.\d{3}', x)] == ['3.000', '1.750', '1.250']


@browser
def test_choices_stay_in_the_browser_and_exports_of_others_are_added(page, tmp_path):
    profile, file = tmp_path / 'profile', tmp_path / 'page.html'
    scripted(page, file, JUDGE + "rank('cba'); rank('cba'); rank('cba'); press('Backspace');")
    opened(file, '--dump-dom', profile=profile)
    again = JUDGE + """
    const mine = window.blind.exported(), other = {...mine, rater: mine.rater + 1};
    const told = [window.blind.add(mine), window.blind.add({...other, page: 'x'}),
                  window.blind.add(other), window.blind.add(other)];
    document.title = JSON.stringify([mine.choices.length, told, window.blind.tally().n,
                                     window.blind.tally().raters]);
    """
    dom, _ = opened(scripted(page, file, again), '--dump-dom', profile=profile)
    title = html.unescape(re.search(r'<title>(.*?)</title>', dom)[1])
    assert json.loads(title) == [2, [False, False, True, False], 4, 2]


@browser
def test_an_export_that_is_damaged_is_not_added(page, tmp_path):
    script = """
    const mine = window.blind.exported(), ranking = mine.models;
    const choices = [undefined, {}, [null], [{item: 4, ranking}], [{item: 0}],
                     [{item: 0, ranking: ranking.slice(1)}], [{item: 0, ranking: ['x', 'y', 'z']}],
                     [{item: 0, ranking}, {item: 0, ranking}], [{item: 0, ranking}]];
    const told = choices.map((found, i) => window.blind.add({...mine, rater: i, choices: found}));
    document.title = JSON.stringify([told, window.blind.add(null), window.blind.tally().n]);
    """
    dom, console = opened(scripted(page, tmp_path / 'x.html', script), '--dump-dom')
    assert not console
    title = html.unescape(re.search(r'<title>(.*?)</title>', dom)[1])
    assert json.loads(title) == [[False] * 8 + [True], False, 1]


@browser
def test_prompts_and_names_that_a_page_could_stumble_over(tmp_path):
    """What begins a comment in a script; folders of one name in folders of one name."""
    rows = [results.read(str(make(tmp_path / name / 'x' / 'e', prompts=[
        '<!-- <script>', *PROMPTS[1:]]))) for name in ('p', 'q')]
    page = blind.write(tmp_path / 'page.html', rows)
    held = """
    const press = repeat => document.dispatchEvent(new KeyboardEvent('keydown', {
      key: String(1 + window.blind.sides().indexOf(1)), repeat}));
    press(false); press(true); press(true);
    document.title = JSON.stringify(window.blind.exported().choices.map(one => one.ranking));
    """
    dom, console = opened(scripted(page, tmp_path / 'x.html', held), '--dump-dom')
    title = html.unescape(re.search(r'<title>(.*?)</title>', dom)[1])
    assert not console and json.loads(title) == [['q/x/e:student', 'p/x/e:student']]
    heads, _ = results.comparison(*rows, [])
    assert heads[0] == 'p/x/e:student less q/x/e:student'


@browser
def test_it_is_dark_where_one_wants_it_dark_and_fits_a_phone(page, tmp_path):
    seen = {}
    for name, flags in {'light': (), 'dark': ('--blink-settings=preferredColorScheme=0',)}.items():
        opened(page, f'--screenshot={tmp_path / name}.png', *flags)
        seen[name] = np.asarray(Image.open(tmp_path / f'{name}.png').convert('L'))
    assert np.median(seen['light']) > 200 and np.median(seen['dark']) < 90
    wide = 'document.title = `${innerWidth} ${document.documentElement.scrollWidth}`;'
    frame = tmp_path / 'frame.html'
    scripted(page, tmp_path / 'inner.html', wide + 'parent.postMessage(document.title, "*");')
    frame.write_text('<iframe src="inner.html" width="390" height="800"></iframe><script>'
                     'onmessage = e => { document.title = e.data; };</script>')
    dom, _ = opened(frame, '--dump-dom', '--virtual-time-budget=3000',
                    '--allow-file-access-from-files')
    inner, scroll = map(int, re.search(r'<title>(\d+) (\d+)</title>', dom).groups())
    assert inner == 390 and scroll <= 390
