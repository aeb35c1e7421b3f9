"""Reports of runs: what is in them, that they need nothing else, what a browser makes of them."""

import html
import io
import json
import math
import re
import shutil
import subprocess

import forked
import numpy as np
import pytest
import tiny
from PIL import Image

from ddmd_jax.method import health as diagnostics
from ddmd_jax.report import figures, page, read
from ddmd_jax.util.errors import UserError

LINE = {'loss': 1.0, 'fake_loss': 0.1, 'dm_rel_gap': 0.1, 'dm_cos': 0.99, 'dm_to_ca': 0.2,
        'x_std': 0.47, 'ema_std': 1.01, 'ema_cast': 0.01, 'grad_norm': 2.0, 'finite': 1.0}


def make_run(folder, lines=40, every=5, pictures=3, **changed):
    """A run's folder without the run."""
    folder.mkdir(parents=True)
    config = tiny.load_config('emoji')
    config.update_from_flattened_dict(changed)
    write = lambda name, value: (folder / name).write_text(json.dumps(value))
    write('config.json', config.to_dict())
    write('run.json', {
        'command': 'python -m ddmd_jax.main --config=<x>', 'config_file': 'configs/emoji.py',
        'changed': {name: [None, value] for name, value in changed.items()},
        'devices': {'count': 4, 'kind': 'TPU v5e', 'platform': 'tpu', 'processes': 1},
        'versions': {'jax': '0.10'}})
    entry = lambda i: {'step': every * (i + 1), **LINE, 'loss': math.sin(i / 9), 'health': (
        'healthy' if i < lines - 4 else 'over-baked'), 'health_reason': 'x_std <b>x1.2</b>'}
    (folder / 'metrics.jsonl').write_text(''.join(
        json.dumps(entry(i)) + '\n' for i in range(lines)))
    at = lambda i: 1000 + 10 * i + (50_000 if i > lines // 2 else 0)  # it lay for half a day
    (folder / 'times.jsonl').write_text(''.join(
        json.dumps({'step': every * (i + 1), 'time': at(i)}) + '\n' for i in range(lines)))
    (folder / 'pictures').mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (392, 800, 3), np.uint8)
    Image.fromarray(noise).save(encoded := io.BytesIO(), 'png')
    for i in range(pictures):
        (folder / 'pictures' / f'panels_x-{i * 20:08d}.png').write_bytes(encoded.getvalue())
    write('eval.json', {'rows': [{'name': 'real', 'steps': None, 'frechet': 0.0},
                                 {'name': 'student', 'steps': 4, 'frechet': 0.4567}],
                        'seconds': {'input_wait': 0.5}})
    return folder


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / 'a')


def test_a_users_own_figure_has_a_curve(run):
    lines = [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]
    (run / 'metrics.jsonl').write_text(''.join(
        json.dumps(line | {'drift': 0.5}) + '\n' for line in lines))
    shown = [curve.key for curve in figures.present([read.read(run)])]
    assert shown[-1] == 'drift' and not {'step', 'finite', 'health'} & set(shown)


def test_a_run_of_one_logged_line_shows_its_points(tmp_path):
    of = lambda lines: {trace.mode for trace in figures.curves(
        [read.read(make_run(tmp_path / str(lines), lines=lines))]).data}
    assert of(1) == {'markers'} and of(2) == {'lines'}


@pytest.mark.parametrize('figures_, cells', [
    ([3.9e-12, 1.695], ['0.000', '1.695']), ([0.2234, 0.2466], ['0.2234', '0.2466']),
    ([1.0, 4.0], ['1', '4']), ([123.4, math.nan], ['123.4', 'nan']), ([None, 4], ['', '4']),
    ([0.0, 1.35e-6], ['0.000000000', '0.000001350'])])
def test_figures_of_a_column_have_equal_decimals(figures_, cells):
    assert page.table([{'name': 'a', 'x': x} for x in figures_])['x'] == cells


def test_a_page_has_everything_and_needs_nothing(run):
    path = page.write(run)
    text = path.read_text()
    assert path == run / 'report.html' and not path.with_name('report.html.tmp').exists()
    own = re.sub(r'<script>.*?</script>', '', text, flags=re.DOTALL)
    assert not re.search(r'(?:src|href)="(?!data:|#)', own) and '@import' not in own
    steps = tiny.load_config('emoji').train.steps
    for words in ('over-baked', f'step 200 of {steps}', '0.4567', 'TPU v5e', 'seconds a step',
                  'Skip to the curves', '<html lang="en">'):
        assert words in own, words
    assert own.count('<img src="data:image/webp') == 3
    assert 'panels_x at step 40' in own.replace('panels x at', 'panels_x at')
    # What a run says of itself is text, not markup.
    assert 'x_std <b>x1.2</b>' not in text and '--config=&lt;x&gt;' in own


def test_a_collapse_stays_in_the_report_of_a_run_that_looks_better_since(run):
    file = run / 'metrics.jsonl'
    lines = [json.loads(x) for x in file.read_text().splitlines()]
    for line in lines[2:6]:
        line['health'] = diagnostics.COLLAPSING
    file.write_text(''.join(json.dumps(x) + '\n' for x in lines))
    assert read.read(run).health == ('over-baked', 'x_std <b>x1.2</b>; collapsing before, from '
                                     'update 15 to 30')


def test_time_between_two_goes_is_not_counted(run):
    found = read.read(run)
    assert found.seconds == 10 * 38 and found.seconds_per_step == 2.0
    facts = dict(page.facts(found))
    assert facts['time'] == '6 min 20 s' and float(facts['chip-hours']) == pytest.approx(
        4 * 380 / 3600, rel=1e-3)


def test_fields_that_were_changed_or_differ_are_told(tmp_path):
    runs = [read.read(make_run(tmp_path / 'a', **{'method.alpha': 2.5})),
            read.read(make_run(tmp_path / 'b', **{'train.steps': 80}))]
    told = {name: values for name, _, values in page.differences(runs)['changed']}
    shipped = tiny.load_config('emoji')
    assert told == {'method.alpha': [2.5, shipped.method.alpha],
                    'train.steps': [shipped.train.steps, 80]}


def test_two_runs_share_panels_and_axes(tmp_path):
    runs = [read.read(make_run(tmp_path / name)) for name in 'ab']
    figure = figures.curves(runs)
    loss = [t for t in figure.data if t.xaxis == 'x']
    assert [t.name for t in loss] == ['a', 'b'] and list(loss[0].x) == list(range(5, 205, 5))
    axes = [figure.layout[axis].matches for axis in figure.layout if axis.startswith('xaxis')]
    assert len(axes) == 10 and axes.count(None) == 1 and len(set(axes)) == 2  # one leads
    bands = {shape.yref for shape in figure.layout.shapes}
    assert len(bands) == 3  # dm_rel_gap, ema_std, ema_cast
    assert {t.name for t in figures.verdicts(runs).data} == {'healthy', 'over-baked'}


def test_every_verdict_has_a_colour_that_stands_out_on_both_pages():
    assert set(figures.VERDICTS) == set(diagnostics.WORDS)
    for colour in figures.VERDICTS.values():
        for page_colour in ('#ffffff', '#16181c'):
            assert contrast(colour, page_colour) > 2.2, (colour, page_colour)


def contrast(a, b):
    """WCAG's contrast ratio of two colours."""
    def luminance(colour):
        c = np.asarray([int(colour[i:i + 2], 16) for i in (1, 3, 5)]) / 255
        return float(np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
                     @ [0.2126, 0.7152, 0.0722])
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_long_runs_are_thinned_and_light(tmp_path):
    folder = make_run(tmp_path / 'long', lines=1000, every=1, pictures=50)
    text = page.write(folder).read_text()
    assert len(text.encode()) < 8e6
    assert text.count('<tr><td class="n">') == page.ROWS
    assert text.count('<img ') == page.STRIPS
    assert read.thinned(range(1000), 3) == [0, 500, 999]


def test_a_run_that_has_just_begun_has_a_page(tmp_path):
    folder = tmp_path / 'new'
    folder.mkdir()
    (folder / 'config.json').write_text('{"train": {"steps": 9}}')
    (folder / 'metrics.jsonl').write_text('{"step": 1, "lo')  # a line being written
    text = page.write(folder).read_text()
    assert 'Nothing has been logged yet' in text and 'step 0 of 9' in text


def test_a_run_beside_one_that_has_just_begun_is_drawn(run, tmp_path):
    new = tmp_path / 'new'
    new.mkdir()
    (new / 'config.json').write_text('{}')
    for runs in ([new, run], [run, new]):
        text = page.render(read.read_all(runs))
        assert '<div id="curves"' in text and 'Nothing has been logged' not in text
    assert '<div id="curves"' not in page.render([read.read(new)])
    assert '"curves": {' not in page.render([read.read(new)])


def test_runs_of_one_name_are_told_apart(tmp_path):
    runs = read.read_all([make_run(tmp_path / x / 'run') for x in 'ab'])
    assert [r.name for r in runs] == ['a/run', 'b/run']
    assert [r.name for r in read.read_all([tmp_path / 'a/run'])] == ['run']


def test_a_picture_that_cannot_be_read_is_left_out(run):
    (run / 'pictures/panels_x-00000020.png').write_bytes(b'half of it')
    assert page.render([read.read(run)]).count('<img ') == 2


def test_long_curves_keep_their_end_and_every_change_of_verdict(tmp_path):
    found = read.read(make_run(tmp_path / 'long', lines=4001, every=1))
    assert figures.series(found, 'loss')[0][-1] == 4001
    told = figures.changes(found.lines)
    assert len(told) < 450 and told[-1]['step'] == 4001
    assert [x['step'] for x in told if x['health'] != 'healthy'][0] == 3998


@pytest.mark.parametrize(('name', 'content', 'words'), [
    ('config.json', None, 'holds no run: there is no config.json'),
    ('run.json', '{', 'run.json is damaged'),
    ('metrics.jsonl', 'x\n', 'metrics.jsonl, line 1 is no JSON object')])
def test_what_is_no_run_is_one_line(run, name, content, words):
    (run / name).unlink() if content is None else (run / name).write_text(content)
    with pytest.raises(UserError, match=words) as e:
        page.write(run)
    assert len(str(e.value).splitlines()) == 1


def command(*args, cwd=tiny.ROOT):
    return forked.run('ddmd_jax.report', *args, cwd=cwd)


def test_the_command(tmp_path):
    a, b = make_run(tmp_path / 'a'), make_run(tmp_path / 'b')
    done = command(a, b, f'--out={tmp_path / "both.html"}')
    assert done.returncode == 0 and done.stdout.strip() == str(tmp_path / 'both.html'), done.stderr
    assert '<h1>a | b</h1>' in (tmp_path / 'both.html').read_text()
    for args, words in (((), 'report: no run given'), ((tmp_path,), 'holds no run')):
        done = command(*args)
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
        assert words in done.stderr


# --- In a browser ---

browser = pytest.mark.skipif(not shutil.which('chromium'), reason='no chromium here')


def opened(path, *flags):
    """(the page's final DOM, what its console said)."""
    done = subprocess.run(
        ['chromium', '--headless=new', '--no-sandbox', '--disable-gpu', '--enable-logging=stderr',
         '--window-size=1280,2000', *flags, f'file://{path}'],
        capture_output=True, text=True, timeout=60, check=True)
    return done.stdout, re.findall(r'CONSOLE.*', done.stderr)


@browser
def test_it_draws_its_figures_and_says_nothing_to_the_console(tmp_path):
    path = page.write(make_run(tmp_path / 'long', lines=1000, every=1, pictures=30))
    dom, console = opened(path, '--dump-dom')
    assert not console and 'data-painted=' in dom
    assert dom.count('class="main-svg"') >= 4  # two figures were drawn
    assert 'over-baked' in html.unescape(dom)


@browser
def test_it_is_dark_where_one_wants_it_dark(run, tmp_path):
    path = page.write(run)
    seen = {}
    for name, flags in {'light': (), 'dark': ('--blink-settings=preferredColorScheme=0',)}.items():
        opened(path, f'--screenshot={tmp_path / name}.png', *flags)
        seen[name] = np.asarray(Image.open(tmp_path / f'{name}.png').convert('L')).mean()
    assert seen['light'] > 200 and seen['dark'] < 90
