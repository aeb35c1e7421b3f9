"""The command `evaluate`: what is drawn and kept, what it writes, and what it says is missing."""

import json
import re
import shutil

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from absl import flags
from evaluate_suites import CAPTIONS
from PIL import Image
from saved import save
from test_blind import make
from test_distributed import together, under_slurm
from test_evaluation import noise_sampler, request

from ddmd_jax import evaluate as command_lib, families as teachers
from ddmd_jax.data import records
from ddmd_jax.diffusion import drawing
from ddmd_jax.evaluation import evaluate, kept, options, pictures
from ddmd_jax.evaluation.kept import Held, ImagesError, Kept
from ddmd_jax.export.models import Model
from ddmd_jax.models.adapters import LoRA
from ddmd_jax.parallel.sharding import make_mesh
from ddmd_jax.train.durable import checkpoint
from ddmd_jax.util import commands
from ddmd_jax.util.errors import UserError
from ddmd_jax.weights import flat, scheduler

TOY, SMALL = '--suite=tests.evaluate_suites.TOY', '--suite=tests.evaluate_suites.SMALL'
ABOUT = {'model': 'student', 'steps': 2, 'evaluations': 2, 'guidance': 1.0}


# --- Images on the disk ---


def mesh():
    return make_mesh({}, jax.devices()[:1])


def entry():
    return {'student': evaluate.Entry(noise_sampler(), 0.3)}


class Killed(BaseException):
    """What no handler of errors catches."""


@pytest.mark.parametrize('form', kept.FORMS)
def test_killed_twice_and_resumed_draws_nothing_twice(tmp_path, monkeypatch, form):
    """Whatever the batch; what stands there in the end is what an undisturbed run has."""
    asked = request('abcdefghij')
    whole = {'student': Held(asked.names)}
    evaluate.draw(entry(), whole, asked, 4, mesh())
    added, add = [], Kept.add

    def counted(self, rows, images):
        if len(added) in deadly:
            deadly.clear()
            raise Killed
        add(self, rows, images)
        added.extend(rows)

    monkeypatch.setattr(Kept, 'add', counted)
    for batch, deadly in ((3, {3}), (2, {7}), (4, set())):
        images = {'student': Kept(tmp_path / 'x', asked.names, form)}
        images['student'].claim(ABOUT)
        if deadly:
            with pytest.raises(Killed):
                evaluate.draw(entry(), images, asked, batch, mesh())
        else:
            evaluate.draw(entry(), images, asked, batch, mesh())
    assert sorted(added) == list(range(10))
    rows = np.arange(10)
    np.testing.assert_array_equal(images['student'][rows], whole['student'][rows])
    again = kept.opened(tmp_path / 'x', asked.names)
    assert again.about == ABOUT and len(list(again)) == 10
    there = {file.name for file in (tmp_path / 'x').iterdir()}
    assert there == ({'manifest.json', 'images.arrayrecord'} if form == 'arrayrecord' else
                     {'manifest.json', *drawing.file_names(asked.names, '.png')})


def test_a_kill_between_merging_and_tidying_leaves_nothing_behind(tmp_path):
    asked = request('abc')
    images = Kept(tmp_path, asked.names, 'arrayrecord')
    images.claim(ABOUT)
    images.add([0, 1, 2], np.zeros((3, 4, 4, 3), np.uint8))
    part = next(tmp_path.glob('*-*.arrayrecord'))
    data = part.read_bytes()
    images.finish()
    part.write_bytes(data)  # as if it had not been removed
    assert images.missing() == []
    images.finish()
    assert not part.exists() and len(list(images)) == 3


def test_images_of_something_else_are_refused(tmp_path):
    names = request('abc').names
    Kept(tmp_path, names, 'png').claim(ABOUT)
    for change, words in (({'steps': 4}, 'of steps 2, asked for is 4'),
                          ({'weights': 'x'}, 'of weights None, asked for is x')):
        with pytest.raises(ImagesError, match=words) as e:
            Kept(tmp_path, names, 'png').claim(ABOUT | change)
        assert len(str(e.value).splitlines()) == 1
    with pytest.raises(ImagesError, match='of names'):
        Kept(tmp_path, request('abd').names, 'png').claim(ABOUT)
    with pytest.raises(ImagesError, match='of form png, asked for is arrayrecord'):
        Kept(tmp_path, names, 'arrayrecord').claim(ABOUT)
    with pytest.raises(ImagesError, match='lacks 3 of 3 images'):
        kept.opened(tmp_path, names)
    with pytest.raises(ImagesError, match='no images of an evaluation'):
        kept.opened(tmp_path / 'nowhere', names)


def test_an_image_that_cannot_be_decoded_is_one_line(tmp_path):
    good = pictures.png(np.zeros((4, 4, 3), np.uint8), {})
    for data in (b'', b'no image', good[:40]):
        (tmp_path / 'x.png').write_bytes(data)
        with pytest.raises(ImagesError, match=r'x.png cannot be decoded .*make it again') as e:
            kept.read_file(tmp_path / 'x.png')
        assert len(str(e.value).splitlines()) == 1 and ' at 0x' not in str(e.value)
    with pytest.raises(ImagesError, match='y.png is missing'):
        kept.read_file(tmp_path / 'y.png')
    # One of ours is there and would not be drawn again.
    ours = Kept(tmp_path / 'ours', request('a').names, 'png')
    ours.claim(ABOUT)
    ours.add([0], np.zeros((1, 4, 4, 3), np.uint8))
    file, = (tmp_path / 'ours').glob('*.png')
    file.write_bytes(good[:40])
    with pytest.raises(ImagesError, match='cannot be decoded .*; delete it, then run its'):
        ours.read(0)


# --- The command ---


@pytest.fixture(scope='module')
def command():
    """``command(*args)``: the exit code of the command in this process, on one device."""
    before = set(flags.FLAGS)
    command_lib.define_flags()
    mine = {name: flags.FLAGS[name] for name in set(flags.FLAGS) - before}

    def call(*args):
        for flag in mine.values():
            flag.unparse()
        flags.FLAGS.unparse_flags()
        rest = commands.parser('evaluate')(['evaluate', *map(str, args)])
        try:
            commands.call('evaluate', command_lib.main, rest)
        except SystemExit as e:
            return e.code
        return 0

    call.flags = set(mine)
    yield call
    flags.FLAGS.unparse_flags()
    for name in mine:
        delattr(flags.FLAGS, name)


@pytest.fixture
def prompts(tmp_path):
    """GenEval's file, with three prompts."""
    file = tmp_path / 'evaluation_metadata.jsonl'
    entries = [{'tag': tag, 'include': [{'class': 'dog', 'count': 1}], 'prompt': f'a photo of {x}'}
               for tag, x in (('single_object', 'a dog'), ('counting', 'two cats'),
                              ('counting', 'a red car'))]
    file.write_text(''.join(json.dumps(entry) + '\n' for entry in entries))
    return file


@pytest.fixture(scope='module')
def toy(run, command, tmp_path_factory):
    out = tmp_path_factory.mktemp('toy')
    assert command(f'--checkpoint={run}', TOY, '--count=3,1', '--rows=student,teacher_few_step',
                   f'--out={out}', '--batch=3') == 0
    return out


def test_a_familys_suite_is_drawn_measured_and_written(toy):
    found = json.loads((toy / 'eval.json').read_text())
    assert [(row['name'], row['steps'], row['evaluations'], row['suite']) for row in found[
        'rows']] == [('teacher_few_step', 2, 2, 'toy'), ('student', 2, 2, 'toy')]
    assert [row['step'] for row in found['rows']] == [None, 7] and found['missing'] == []
    table = pq.read_table(toy / 'scores.parquet').to_pydict()
    assert table['prompt'] == CAPTIONS[:4] * 2 and table['number'] == [0, 0, 1, 0] * 2
    assert np.mean(table['brightness'][4:]) == pytest.approx(found['rows'][1]['brightness'])
    assert 'pixels' not in table
    assert Image.open(toy / 'samples.png').size[1] > 4 * 96
    lines = (toy / 'table.md').read_text().splitlines()
    assert lines[0] == '## toy' and lines[4].startswith(
        '| teacher_few_step | 2 | 2 | 1.000 |')


def test_every_row_says_whose_it_is(run, toy, command, tmp_path):
    """Of several checkpoints, of one that is not drawn now, and long after."""
    one, two = (shutil.copytree(run, tmp_path / name) for name in ('one', 'two'))
    (two / 'checkpoints' / '7').rename(two / 'checkpoints' / '9')
    out = shutil.copytree(toy, tmp_path / 'out')
    images = out / 'images' / 'toy'
    for row, step in (('one', 7), ('two', 9)):  # all have been drawn: by the same weights
        shutil.copytree(images / 'student', images / row)
        file = images / row / 'manifest.json'
        file.write_text(json.dumps(json.loads(file.read_text()) | {'step': step}))
    args = [TOY, '--count=3,1', f'--out={out}']
    whose = lambda: {row['name']: (row['step'], row['weights']) for row in json.loads(
        (out / 'eval.json').read_text())['rows']}
    assert command(f'--checkpoint={one}', f'--checkpoint={two}', '--rows=teacher_few_step,student',
                   *args) == 0
    found = whose()
    (_, teacher), (_, student) = found['teacher_few_step'], found['student']
    assert teacher == checkpoint.saved(run).manifest['teacher_identity'] != student
    assert found == {'teacher_few_step': (None, teacher), 'student': (7, student),
                     'one': (7, student), 'two': (9, student)}
    assert command(*args) == 0 and whose() == found
    # Whoever shows images beside figures looks whether they are of one another.
    file = images / 'student' / 'manifest.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | {'weights': 'others'}))
    said = command('--grid', f'{out}:student', f'--out={tmp_path / "x.png"}')
    assert 'holds images of weights others, scores.parquet has figures of' in said


def test_an_evaluation_is_measured_again_without_its_model(toy, command, capsys):
    before = (toy / 'eval.json').read_text(), (toy / 'scores.parquet').read_bytes()
    assert command(TOY, '--count=3,1', f'--out={toy}') == 0
    after = json.loads((toy / 'eval.json').read_text())
    assert after['rows'] == json.loads(before[0])['rows']
    assert (toy / 'scores.parquet').read_bytes() == before[1]


def test_rows_of_an_evaluation_stand_side_by_side(toy, command, capsys, tmp_path):
    rows = [f'{toy}:student', f'{toy}:teacher_few_step']
    assert command('--compare', *rows, f'--out={tmp_path / "x.json"}') == 0
    assert 'brightness' in capsys.readouterr().out
    found, = json.loads((tmp_path / 'x.json').read_text())['rows']
    assert found['figure'] == 'brightness' and found['prompts'] == 3
    assert command('--grid', *rows, '--best=brightness', f'--out={tmp_path / "x.png"}') == 0
    assert Image.open(tmp_path / 'x.png').size[0] > 2 * 256
    assert command('--blind', *rows, '--prompts_shown=2', f'--out={tmp_path / "x.html"}') == 0
    assert (tmp_path / 'x.html').read_text().count('data:image/webp') == 4


def test_a_benchmark_is_drawn_laid_out_and_its_results_are_read(run, command, prompts, tmp_path,
                                                                capfd):
    out = tmp_path / 'out'
    args = [SMALL, f'--prompts=small={prompts}', f'--out={out}']
    assert command(f'--checkpoint={run}', *args, '--official', '--keep=png') == 3
    assert 'geneval is not measured here; run the scorer of its authors' in capfd.readouterr().err
    official = out / 'official' / 'small' / 'student'
    assert sorted(str(f.relative_to(official)) for f in official.rglob('*.*')) == sorted(
        f'0000{i}/{name}' for i in range(3)
        for name in ('metadata.jsonl', 'samples/00000.png', 'samples/00001.png'))
    assert json.loads((official / '00001/metadata.jsonl').read_text())['tag'] == 'counting'
    results = [{'tag': tag, 'correct': right} for tag, right in (
        ('single_object', True), ('single_object', True), ('counting', True), ('counting', False),
        ('counting', False), ('counting', False))]
    file = tmp_path / 'results.jsonl'
    file.write_text('\n'.join(map(json.dumps, results)))
    assert command(*args, f'--results=small={file}') == 0
    row, = json.loads((out / 'eval.json').read_text())['rows']
    assert row['geneval'] == (1 + 0.25) / 2 and row['geneval/counting'] == 0.25
    file.write_text('\n'.join(map(json.dumps, results[:-1])))
    assert command(*args, f'--results=small={file}') == 3
    said = capfd.readouterr().err  # a line, and no second one that its figures are missing
    assert 'has 3 results of counting, there are 4 images' in said
    assert 'is not measured here' not in said
    # Its folder is what --images takes, whatever made it; what is missing there is told.
    (official / '00001/samples/00001.png').unlink()
    (official / '00002/samples/00000.png').write_bytes(b'half of it')
    other = [*args[:2], f'--out={tmp_path / "other"}', f'--images={official}',
             f'--reference={official}', '--metrics=fid,no_such']
    assert command(*other) == 3
    said = capfd.readouterr().err
    for words in ('00001.png is missing', '00000.png cannot be decoded', 'fid wants weights',
                  "no metric 'no_such'; known: clip,"):
        assert words in said, words
    assert json.loads((tmp_path / 'other/eval.json').read_text())['rows'][0]['images'] == 4
    head, _, row = (tmp_path / 'other/table.md').read_text().splitlines()[2:5]
    assert head.split(' | ')[4] == 'images' and row.split(' | ')[4:6] == ['4', '-']


def test_every_gap_is_told_and_seen(run, command, prompts, tmp_path, capfd):
    """Of a suite of groups without a whole; of a metric that is no column; of many images."""
    suite = '--suite=tests.evaluate_suites.GROUPS'
    (tmp_path / 'color_val.txt').write_text('a red apple\n')
    (tmp_path / 'shape_val.txt').write_text('a round car\n')
    groups = [suite, f'--prompts=groups={tmp_path}', f'--out={tmp_path / "groups"}']
    assert command(f'--checkpoint={run}', *groups) == 3
    said = capfd.readouterr().err
    assert 'groups, student: t2i/color is not measured here; run the scorer of its authors' in said
    answers = tmp_path / 'color/annotation_blip/vqa_result.json'
    answers.parent.mkdir(parents=True)
    answers.write_text('[{"answer": "0.5"}]')
    assert command(*groups, f'--results=groups={tmp_path}') == 3
    said = capfd.readouterr().err
    assert 't2i/color' not in said and 't2i/shape is not measured here' in said
    folder = tmp_path / '00000' / 'samples'
    folder.mkdir(parents=True)
    Image.new('RGB', (8, 8)).save(folder / '00000.png')
    assert command('--suite=tests.evaluate_suites.SCORED', f'--prompts=scored={prompts}',
                   f'--images={tmp_path}', '--metrics=pickscore,no_such',
                   '--weights=pickscore=/nowhere', f'--out={tmp_path / "few"}') == 3
    told = [line for line in capfd.readouterr().err.splitlines() if 'evaluate: ' in line]
    assert len(told) == 3 + 1 + 3 and '2 more images are missing or cannot be decoded' in told[3]
    assert 'scored: hps_v2.1 is not measured here; name it in --metrics' in told[6]
    head, _, row = (tmp_path / 'few' / 'table.md').read_text().splitlines()[2:5]
    assert head.split(' | ')[-2:] == ['hps v2.1', 'pickscore |']
    assert row.split(' | ')[-2:] == ['-', '- |']


SCORES = {'suite': 'toy', 'row': 'student', 'group': '', 'prompt': 'a', 'number': 0, 'seed': 0}
of_scores = lambda **changes: lambda file: pq.write_table(
    pa.table({name: [x] for name, x in {**SCORES, **changes}.items() if x != 'none'}), file)
of_text = lambda text: lambda file: file.write_text(text)


def in_its_place(file):
    file.unlink()
    file.mkdir()


def of_two_sizes(file):
    file.unlink()
    records.write(file, (pictures.png(np.zeros((4, 4 + (i == 2), 3), np.uint8), {})
                         for i in range(8)))


@pytest.mark.parametrize('name, damage, words', [
    ('manifest.json', of_text(''), r'is damaged \(Expecting value'),
    ('manifest.json', of_text('[1]'), r'is damaged \(it is \[1\], not an object'),
    ('manifest.json', of_text('{}'), r"has no 'form'\).* move .*/student away, then run"),
    ('manifest.json', of_text('{"form": "gif", "images": 8, "names": ""}'), "form is 'gif', not"),
    ('manifest.json', of_text('{"form": "png", "images": 8, "names": "a\\nb"}'),
     'of names a b, asked for is'),
    ('manifest.json', in_its_place, 'is damaged .*Is a directory'),
    ('manifest.json', lambda file: file.unlink(), 'there is no manifest.json'),
    ('images.arrayrecord', lambda file: file.unlink(), 'lacks 8 of 8 images; run its'),
    ('images.arrayrecord', of_text('x'), 'is damaged .*; delete it, then run its'),
    ('images.arrayrecord', of_two_sizes, 'image 2, is 4 x 5 pixels, another of its row 4 x 4'),
    ('scores.parquet', of_scores(row='none'), "has no 'row'"),
    ('scores.parquet', of_scores(row=None), r'row\[0\] is None, no name'),
    ('scores.parquet', of_scores(number=0.5), r'number\[0\] is 0.5, not a whole number'),
    ('scores.parquet', of_scores(fid='good'), r"fid\[0\] is 'good', not a finite number"),
    ('scores.parquet', of_scores(fid=np.inf), r'fid\[0\] is inf, not a finite number'),
    ('scores.parquet', of_text('PAR1 and more'), 'scores.parquet is damaged'),
    ('scores.parquet', in_its_place, 'scores.parquet is damaged .*Is a directory'),
    ('eval.json', of_text('[]'), 'eval.json is damaged'),
    ('eval.json', of_text('{"scores": "x"}'), 'it is not what eval.json speaks of'),
])
def test_a_folder_of_an_evaluation_is_checked_as_it_is_read(command, tmp_path, name, damage, words):
    folder = make(tmp_path / 'a')
    images = folder / 'images' / 'toy' / 'student'
    if name == 'scores.parquet':
        (folder / 'eval.json').unlink()
    damage((images if (images / name).exists() else folder) / name)
    said = command('--grid', folder, f'--out={tmp_path / "x.png"}', '--prompts_shown=4')
    assert isinstance(said, str) and len(said.splitlines()) == 1
    assert re.search(words, said), said


def test_images_that_were_not_merged_yet_are_shown(command, tmp_path):
    """A kill between the last batch and its merging leaves all of them."""
    folder = make(tmp_path / 'a')
    whole = folder / 'images' / 'toy' / 'student' / 'images.arrayrecord'
    found = records.Records([whole], 8, '', '').read(range(8))
    assert command('--grid', folder, f'--out={tmp_path / "x.png"}') == 0
    whole.unlink()
    for part in ((0, 5), (5, 8)):
        records.write(whole.with_name(f'{part[0]:06d}-{part[1] - 1:06d}.arrayrecord'),
                      found[slice(*part)])
    assert command('--grid', folder, f'--out={tmp_path / "y.png"}') == 0
    assert (tmp_path / 'x.png').read_bytes() == (tmp_path / 'y.png').read_bytes()


def test_images_of_nobody_are_not_taken_for_ours(tmp_path):
    for name in ('0000-a.png', '000000-000001.arrayrecord', 'images.arrayrecord'):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).touch()
        with pytest.raises(ImagesError, match='holds images without the manifest.json'):
            Kept(folder, request('abc').names, 'png').claim(ABOUT)


def test_every_flag_has_a_use(command):
    assert command.flags == {*options.DRAWING, *options.MEASURING, *options.SHOWING,
                             *options.OF_MODE}


@pytest.mark.parametrize('args, words', [
    ([SMALL, '--weights=clpi=P'], '--weights=clpi: not used; here it is of '),
    ([SMALL, '--metrics=clip', '--weights=fid=P'], '--weights=fid: not used; here it is of clip$'),
    ([SMALL, '--results=smal=P'], '--results=smal: not used; here it is of small$'),
    ([SMALL, '--results=small:studnt=P'], '--results=small:studnt: no such row; there are none'),
    ([SMALL, '--results=small=P', '--checkpoint=RUN', '--rows=student,teacher_guided'],
     'there are 2 rows; say whose it is, as --results=small:teacher_guided=PATH'),
    ([SMALL, '--results=small:=P'], '--results=small:: no such row'),
    ([SMALL, '--results=small=P', '--results=small:images=Q', '--images=X'],
     '--results=small is given beside one of its row'),
    ([SMALL, '--prompts=smal=P'], '--prompts=smal: not used'),
    ([SMALL, '--prompts=small=P', '--prompts=small=Q'], '--prompts=small is given twice'),
    ([SMALL, '--python=hps_v3=P'], '--python=hps_v3: not used; here it is of nothing'),
    ([SMALL, '--metrics=hps_v3', *['--python=hps_v3=P'] * 2], '--python=hps_v3 is given twice'),
    ([SMALL, '--count=1,1'], "--count: not used but by a family's own suite"),
    ([SMALL, '--reference=P'], '--reference: not used by any metric'),
    ([SMALL, '--images=P', '--official'], '--official: not used with --images'),
    ([TOY, '--limit=2'], "--limit: not used by a family's own suite"),
    ([TOY, '--metrics=clip', '--weights=clip=P'], '--metrics, --weights: not used by a family'),
    ([TOY, '--step=7', '--model=emoji'], '--step: not used without --checkpoint'),
    ([TOY, '--teacher_path=P', '--model=emoji'], '--teacher_path: not used without --checkpoint'),
    ([TOY, '--rows=student', '--keep=png'], '--keep, --rows: not used where nothing is drawn'),
    ([TOY, '--checkpoint=RUN', '--rows=student', '--solver=heun'],
     '--solver: not used by the rows student'),
    ([TOY, '--checkpoint=RUN', '--rows=teacher_guided', '--steps=3'],
     '--steps: not used by the rows teacher_guided'),
    ([TOY, '--best=fid'], '--best: not used without --blind or --grid'),
    ([TOY + ',evaluate_suites.TOY'], '--suite: two are called toy'),
    (['--compare', '--seed=3'], '--seed: not used of --compare'),
    (['--grid', '--suite=a,b'], '--grid takes rows of one suite'),
])
def test_what_would_not_be_looked_at_is_refused(run, command, tmp_path, args, words):
    said = command(*(arg.replace('RUN', str(run)) for arg in args), f'--out={tmp_path / "out"}')
    assert isinstance(said, str) and len(said.splitlines()) == 1
    assert re.search(words, said), said
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('flag', ['--suite=toy,toy', '--rows=student,student', '--metrics=fid,fid'])
def test_nothing_is_named_twice(command, capsys, flag):
    with pytest.raises(SystemExit, match='2'):
        command(flag)
    assert 'must not name one twice' in capsys.readouterr().err


@pytest.mark.parametrize('args, words', [
    ([], 'no --suite given'), (['--suite=hps_v2'], 'no --out given'),
    (['--suite=hps_v2', '--out=OUT'], r'hps_v2 wants its prompts: .*zhwang/HPDv2.* 3200 in all'),
    (['--suite=hps_v2', '--out=OUT', '--prompts=hps_v2=/nowhere'],
     r'/nowhere/concept-art.json is missing .*comes from the hub, datasets/zhwang/HPDv2'),
    ([SMALL, '--out=OUT', '--prompts=small=FILE'], 'holds 2 prompts, the published file 3'),
    (['--suite=nothing', '--out=OUT'], 'nothing is unknown; known: hps_v2, hps_v3'),
    ([TOY, '--out=OUT', '--count=1,1'], 'holds no images; name a model'),
    (['--suite=a', '--out=OUT', '--checkpoint=x', '--model=y'], 'two ways to name a model'),
    (['--compare', 'A'], '--compare takes 2 folders'), (['--blind', 'A', 'B'], 'A holds no eval'),
    (['--compare', '--blind'], 'are two commands'), (['--grid', 'OUT'], 'no scores.parquet'),
])
def test_bad_input_is_one_line(command, prompts, tmp_path, args, words):
    prompts.write_text(''.join(prompts.read_text().splitlines(keepends=True)[:2]))
    names = {'OUT': tmp_path, 'FILE': prompts}
    said = command(*(args_.replace(name, str(path)) for args_ in args for name, path in [next(
        ((k, v) for k, v in names.items() if k in args_), ('-', '-'))]))
    assert isinstance(said, str) and len(said.splitlines()) == 1
    assert re.search(words, said), said


def test_an_exported_students_folder_says_its_steps(tmp_path):
    assert command_lib.few_steps('') is None and command_lib.few_steps(str(tmp_path)) is None
    scheduler.write_index(tmp_path, 'Pipeline', {}, steps=4)
    assert command_lib.few_steps(str(tmp_path)) is None  # no scheduler: not one of ours
    scheduler.write(tmp_path / 'scheduler', 3.0, 'renoise')
    assert command_lib.few_steps(str(tmp_path)) == (4, 'renoise')
    # Of the published families, by a name that diffusers passes over; SDXL renoises by LCM.
    scheduler.write_index(tmp_path, 'Pipeline', {}, **{scheduler.STEPS: 2})
    assert command_lib.few_steps(str(tmp_path)) == (2, 'renoise')
    (tmp_path / 'scheduler/scheduler_config.json').write_text('{"_class_name": "LCMScheduler"}')
    assert command_lib.few_steps(str(tmp_path)) == (2, 'renoise')
    (tmp_path / 'scheduler/scheduler_config.json').write_text('{"_class_name": "DDIMScheduler"}')
    assert command_lib.few_steps(str(tmp_path)) == (2, 'deterministic')


def test_adapters_over_the_teacher_are_a_student(weights, command, tmp_path):
    """Named by what the run has trained, as in its own table and in what is exported of it."""
    teacher, binding = teachers.load_teacher(str(weights)), LoRA(2, 3.0, ('to_q$', 'linear_2$'))
    trained = jax.tree.map(lambda x: x + 0.1, binding.init(teacher.params, jax.random.key(0)))
    fields = {'kind': 'lora', 'rank': 2, 'alpha': 6.0, 'targets.0': 'to_q$',
              'targets.1': 'linear_2$'}
    manifest = {'task': 'distill', 'teacher.name': 'emoji', 'teacher.path': str(weights),
                'teacher.dtype': 'float32', 'teacher_identity': teacher.identity,
                **{f'student.adapter.{name}': value for name, value in fields.items()}}
    run = save(tmp_path / 'run', manifest, trained)
    assert command(f'--checkpoint={run}', TOY, '--count=1,0', '--rows=student',
                   f'--out={tmp_path}') == 0
    found = json.loads((tmp_path / 'eval.json').read_text())
    assert [(row['name'], row['weights']) for row in found['rows']] == [
        ('student', flat.corner_identity(trained, mesh()))]


def test_the_folder_of_a_run_is_no_out(run, command):
    """Whose eval.json would be written over."""
    before = sorted(run.rglob('*'))
    said = command(f'--checkpoint={run}', TOY, '--count=2,1', f'--out={run}')
    assert f'--out {run} is the folder of a run' in said
    assert sorted(run.rglob('*')) == before


def test_rows_of_several_runs_are_their_folders(tmp_path):
    model = lambda name: Model(None, '', 'float32', None, tmp_path / name)
    assert command_lib.student_rows([model('x/teacher_guided')]) == ['student']
    assert command_lib.student_rows([model('one'), model('x/../two/.')]) == ['one', 'two']
    with pytest.raises(UserError, match='two runs are called one'):
        command_lib.student_rows([model('x/one'), model('y/one')])
    for name in ('teacher_guided', 'student', 'real', 'a:b', 'a\nb'):
        with pytest.raises(UserError, match='a run is called .*, and its row cannot be') as e:
            command_lib.student_rows([model('x/one'), model(name)])
        assert len(str(e.value).splitlines()) == 1


@pytest.mark.slow
def test_nothing_depends_on_devices_processes_or_batch(run, tmp_path, monkeypatch):
    """All files, bit for bit. A CPU's sums depend on its threads: all processes have as many."""
    monkeypatch.setenv('NPROC', '8')
    monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', '')
    args = [f'--checkpoint={run}', TOY, '--count=4,1', '--rows=student']
    for name, devices, batch in (('one', 1, 3), ('eight', 8, 16)):
        tiny.run_on_devices('ddmd_jax.evaluate', devices, *args, f'--batch={batch}',
                            f'--out={tmp_path / name}')
    together([['ddmd_jax.evaluate', *args, f'--out={tmp_path / "two"}']] * 2, **under_slurm())
    for name in ('eight', 'two'):
        for file in ('eval.json', 'scores.parquet', 'table.md', 'samples.png',
                     'images/toy/student/images.arrayrecord'):
            assert (tmp_path / name / file).read_bytes() == (
                tmp_path / 'one' / file).read_bytes(), (name, file)
