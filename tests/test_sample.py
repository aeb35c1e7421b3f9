"""Images for prompts: what is drawn, what the files say of themselves, what is refused."""

import json
import re
import shutil
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import published
import published_text
import pytest
import safetensors.numpy
import tiny
from absl import flags
from flax import nnx
from PIL import Image
from test_distributed import together, under_slurm
from test_export import save

from ddmd_jax import families as teachers, sample
from ddmd_jax.data.prompts import build as prompts
from ddmd_jax.diffusion import drawing, sampling
from ddmd_jax.diffusion.time import Shift
from ddmd_jax.evaluation import pictures
from ddmd_jax.export.models import find_model
from ddmd_jax.families import LoadOptions, published_vae
from ddmd_jax.families.lumina import names, teacher as lumina
from ddmd_jax.models import autoencoder_kl
from ddmd_jax.models.layers import abstract_params
from ddmd_jax.models.nextdit import NextDiT
from ddmd_jax.parallel import distributed, sharding
from ddmd_jax.util import commands
from ddmd_jax.util.errors import UserError
from ddmd_jax.weights import diffusers

PROMPTS = ['a red apple', 'a dog on a blue background', '']


@pytest.fixture(scope='module')
def command():
    """``command(*args)``: the command in this process, one device, its flags as if at start."""
    before = set(flags.FLAGS)
    sample.define_flags()
    mine = {name: flags.FLAGS[name] for name in set(flags.FLAGS) - before}

    def call(*args):
        for flag in mine.values():
            flag.unparse()
        flags.FLAGS.unparse_flags()
        commands.call('sample', sample.main,
                      commands.parser('sample')(['sample', *map(str, args)]))

    yield call
    flags.FLAGS.unparse_flags()  # tests after these find no command line, as at start
    for name in mine:
        delattr(flags.FLAGS, name)


def asking(*prompts):
    return [f'--prompt={p}' for p in prompts]


def pixels(file):
    return np.asarray(Image.open(file)).astype(int)


def text_of(file):
    """What a file says of itself."""
    image = Image.open(file)
    return json.loads(image.getexif()[0x010e]) if file.suffix == '.webp' else image.text


# --- What is drawn ---


@pytest.fixture(scope='module')
def three(run, command, tmp_path_factory):
    """Folder of two images each of `PROMPTS`, and their sheet."""
    out = tmp_path_factory.mktemp('out')
    command(f'--checkpoint={run}', *asking(*PROMPTS), '--count=2', '--grid', f'--out={out}')
    return out


def test_a_file_for_each_image_named_by_place_and_prompt(three):
    assert sorted(f.name for f in three.iterdir()) == [
        '0000-a-red-apple.png', '0001-a-red-apple.png', '0002-a-dog-on-a-blue-background.png',
        '0003-a-dog-on-a-blue-background.png', '0004.png', '0005.png', 'grid.png']
    found = [pixels(f) for f in sorted(three.glob('0*'))]
    assert {x.shape for x in found} == {(64, 64, 3)}
    for i, a in enumerate(found):  # every image has its own noise
        assert all(np.abs(a - b).max() > 20 for b in found[:i])


def close(a, b):
    """Equal up to how parameters that are split over devices round."""
    assert np.abs(pixels(a) - pixels(b)).max() <= 1


def same(a, b):
    np.testing.assert_array_equal(pixels(a), pixels(b))


def test_an_image_is_the_same_alone_in_another_batch_and_among_others(run, command, three,
                                                                      tmp_path):
    command(f'--checkpoint={run}', *asking(PROMPTS[1]), '--count=2', '--batch=1',
            f'--out={tmp_path}')
    command(f'--checkpoint={run}', *asking('a cat', PROMPTS[1]), '--count=1', '--batch=2',
            f'--out={tmp_path / "among"}')
    dog = three / '0002-a-dog-on-a-blue-background.png'
    same(tmp_path / '0000-a-dog-on-a-blue-background.png', dog)
    same(tmp_path / '0001-a-dog-on-a-blue-background.png', three / dog.name.replace('2', '3'))
    same(tmp_path / 'among' / '0001-a-dog-on-a-blue-background.png', dog)


def test_the_command_draws_the_same_images_on_eight_devices(run, three, tmp_path, monkeypatch):
    """The one test that starts the command itself; parameters and batch are split."""
    monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', '')
    out = tiny.run_on_devices('ddmd_jax.sample', 8, f'--checkpoint={run}',
                              *asking(*PROMPTS), '--count=2', f'--out={tmp_path}')
    assert re.search(r': 6 images, in batches of 8\nstudent, 2 steps: 2 network evaluations and '
                     r'[\d.]+ s an image, [\d.]+ s more to decode it; compiled before in', out)
    for file in three.glob('0*'):
        close(tmp_path / file.name, file)


@pytest.mark.slow
def test_two_processes_draw_the_same_images_and_one_writes_them(run, three, tmp_path):
    """As under Slurm, whose variables are set by hand."""
    args = [f'--checkpoint={run}', *asking(*PROMPTS), '--count=2', f'--out={tmp_path}']
    outputs = together([['ddmd_jax.sample', *args]] * 2, **under_slurm())
    assert [output.count('student, 2 steps: 2 network') for output in outputs] == [1, 0]
    for file in three.glob('0*'):
        close(tmp_path / file.name, file)


@pytest.mark.slow
@pytest.mark.parametrize('other, words', [
    ('--checkpoint=/nowhere', '/nowhere holds no checkpoints'),  # a place is each process's own
    ('--seed=5', 'process 1 has another command than process 0: --seed: absent, here 5')])
def test_what_one_of_two_processes_refuses_ends_both(run, tmp_path, other, words):
    args = [f'--checkpoint={run}', '--prompt=a cat', f'--out={tmp_path / "out"}']
    said = together([['ddmd_jax.sample', *args, *more] for more in ([], [other])], code=1,
                    **under_slurm())
    assert 'Traceback' not in ''.join(said), said
    lines = [[x for x in text.splitlines() if x.startswith('sample: ')] for text in said]
    assert words in lines[1][0], said
    assert 'process 1 has failed (its own output says why)' in lines[0][-1], said
    assert not list((tmp_path / 'out').glob('*.png'))


def test_what_is_drawn_with_is_compared_among_processes(run, tmp_path, monkeypatch):
    """In one process, which is told what another would say: flags, prompts, weights."""
    asked = []

    def of_first(mine):
        asked.append(json.loads(mine))
        return mine

    monkeypatch.setattr(distributed, '_peers', types.SimpleNamespace(me=1, of_first=of_first))
    other = Path(shutil.copytree(run, tmp_path / 'run'))
    (other / 'checkpoints' / '7').rename(other / 'checkpoints' / '8')
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    for workdir in (run, other):
        model = sample.find_model(workdir, '', None)
        sample.encoded(drawing.names(['a cat'], 1, int(workdir == other)), model, mesh)
        sample.load(model, ['teacher'], mesh)
    prompts, weights, others, moved = asked
    assert prompts['encoder'] == others['encoder'] and prompts['prompts'] != others['prompts']
    assert weights['step'] == 7 and moved == weights | {'step': 8} and all(weights.values())


def test_a_teacher_at_the_runs_path_that_is_another_is_refused(run, weights, tmp_path,
                                                               command):
    """Also where no student is drawn with: its pictures would be taken for the run's teacher's."""
    tensors = safetensors.numpy.load_file(weights)
    with safetensors.safe_open(weights, 'np') as opened:
        about = opened.metadata()
    moved = tmp_path / 'toy.safetensors'
    name = min(name for name in tensors if name.startswith('denoiser/'))
    safetensors.numpy.save_file(tensors | {name: tensors[name] + 1}, moved, about)
    with pytest.raises(SystemExit, match='distils another teacher .* with --teacher_path'):
        command(f'--checkpoint={run}', '--teacher', f'--teacher_path={moved}', '--steps=2',
                '--prompt=a cat', f'--out={tmp_path / "out"}')


def test_another_seed_is_another_image(run, command, three, tmp_path):
    command(f'--checkpoint={run}', *asking(PROMPTS[0]), '--seed=1', f'--out={tmp_path}')
    name = '0000-a-red-apple.png'
    assert np.abs(pixels(tmp_path / name) - pixels(three / name)).max() > 20


def test_the_prompt_matters_and_the_student_is_not_its_teacher(run, command, weights, three,
                                                               tmp_path):
    teacher = teachers.load_teacher(str(weights))
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    model = sample.find_model(run, '', None)
    assert (model.steps, model.saved.step, model.shift, model.dtype) == (2, 7, None, 'float32')
    asked = sample.encoded(drawing.names(PROMPTS[:2], 1, 0), model, mesh)
    assert asked.cond['embeds'].shape == (2, 16, 16) and asked.null['mask'].sum() == 1
    swapped = jax.tree.map(lambda x: x[::-1], asked.cond)

    def draw(params, cond):
        request = drawing.Request(asked.names, cond, asked.null)
        images = next(drawing.generate(drawing.of_student(teacher, 2), params, request, 2, mesh))
        return pictures.to_uint8(images).astype(int)

    _, params = sample.load(model, ['student', 'teacher'], mesh)
    got = draw(params['student'], asked.cond)
    want = pixels(three / '0000-a-red-apple.png')
    assert np.abs(got[0] - want).max() <= 1
    assert np.abs(draw(params['student'], swapped)[0] - want).max() > 2
    assert np.abs(draw(params['teacher'], asked.cond)[0] - want).max() > 2


def test_names_tell_images_apart_and_nothing_else_matters():
    assert drawing.names(['a', 'b', 'a'], 2, 3) == [
        drawing.ImageName(3, *rest) for rest in [('a', 0), ('a', 1), ('b', 0), ('b', 1), ('a', 2),
                                                 ('a', 3)]]
    rows = drawing.name_words(drawing.names(['a', 'b'], 2, 2**32 - 1))
    assert rows.dtype == np.uint32 and rows[0, 0] == 2**32 - 1
    data = jax.random.key_data(drawing.keys(jnp.asarray(rows)))
    assert len({tuple(row) for row in data.tolist()}) == 4
    again = drawing.keys(jnp.asarray(rows[::-1]))
    np.testing.assert_array_equal(data[::-1], jax.random.key_data(again))


def test_noise_of_a_key_for_each_row_is_each_rows_own():
    keys = jax.random.split(jax.random.key(0), 3)
    got = sampling.step_noise(keys, 2, (3, 4, 5))
    for row in range(3):
        np.testing.assert_array_equal(got[:, row], sampling.step_noise(keys[row], 2, (4, 5)))
    assert got.shape == (2, 3, 4, 5) and float(jnp.abs(got[0] - got[1]).min()) > 0


@pytest.mark.parametrize('guidance', [1.0, 3.0])
@pytest.mark.parametrize('solver', sampling.SOLVERS)
def test_evaluations_are_counted_right(guidance, solver):
    rows = []

    def denoise(x, t, cond):
        jax.debug.callback(lambda _: rows.append(x.shape[0]), x[0, 0])
        return x * 0.5

    sampling.sample_teacher(denoise, {'c': jnp.ones(2)}, jnp.ones((2, 3)), Shift().grid(3),
                            sampling.Guidance(guidance, {'c': jnp.zeros(2)}), solver)
    jax.effects_barrier()
    assert sum(rows) == 2 * sampling.evaluations(3, guidance, solver)


# --- The teacher, beside the student or alone ---


def test_the_sheet_compares_on_the_same_noise(run, command, tmp_path, monkeypatch):
    """A student that is its teacher would be its teacher's few steps if it re-noised nothing."""
    monkeypatch.setattr(sample, 'TEACHER_STEPS', 3)
    columns = []
    monkeypatch.setattr(pictures, 'captioned_sheet', lambda captions, titles, images, *rest:
                        columns.append((captions, titles, images, *rest)))
    load = sample.load
    monkeypatch.setattr(sample, 'load', lambda model, whose, mesh: (
        lambda found: (found[0], found[1] | {'student': found[1]['teacher']}))(
            load(model, whose, mesh)))
    command(f'--checkpoint={run}', *asking(*PROMPTS[1:]), '--compare_teacher', '--guidance=2',
            '--sampler=deterministic', f'--out={tmp_path / "sheet.webp"}')
    (captions, titles, (guided, few, student), file, about), = columns
    assert captions == [PROMPTS[1], '(empty)'] and file == tmp_path / 'sheet.webp'
    assert titles == ['teacher\n3 steps, w=2', 'teacher\n2 steps', 'student\n2 steps']
    np.testing.assert_allclose(few, student, atol=1e-4)
    assert np.abs(guided - few)[0].max() > 1e-2
    np.testing.assert_array_equal([about[k] for k in ('model', 'sampler', 'prompt')], [
        'student', 'deterministic', json.dumps(PROMPTS[1:])])


def test_a_trajectory_is_what_every_step_predicts(run, command, three, tmp_path, monkeypatch):
    """Its columns say step and t; the last of the student is its image, bit for bit."""
    monkeypatch.setattr(sample, 'TEACHER_STEPS', 11)
    sheets, own = [], pictures.captioned_sheet
    monkeypatch.setattr(pictures, 'captioned_sheet', lambda *given: (
        sheets.append(given), own(*given)))
    command(f'--checkpoint={run}', *asking(PROMPTS[0]), '--count=2', '--trajectory',
            '--compare_teacher', '--guidance=2', f'--out={tmp_path}')
    (captions, titles, columns, *_), = sheets
    assert captions == [PROMPTS[0]] * 2 and len(titles) == len(columns) == 8 + 2 + 2
    assert titles[0] == 'teacher, w=2\nstep 1 of 11, t = 0.00'
    assert titles[7] == 'teacher, w=2\nstep 11 of 11, t = 0.91'
    assert titles[8:] == [f'{whose}\nstep {i + 1} of 2, t = {t}' for whose in (
        'teacher', 'student') for i, t in enumerate(('0.00', '0.50'))]
    # Of one noise: guidance makes a difference from the first step on, and so does training.
    assert np.abs(columns[0] - columns[8]).max() > 1e-2 < np.abs(columns[10] - columns[8]).max()
    for i, file in enumerate(sorted(tmp_path.glob('0*.png'))):
        np.testing.assert_array_equal(pixels(file), pixels(three / file.name))
        np.testing.assert_array_equal(pictures.to_uint8(columns[-1][i]), pixels(file))
    assert Image.open(tmp_path / 'grid.png').size[0] > 12 * 256


def test_the_teacher_is_guided_as_at_its_runs_end(run, tmp_path):
    """Compared at its family's scale, it would not be the teacher of the run's own table."""
    other = shutil.copytree(run, tmp_path / 'run')
    (other / 'config.json').write_text(json.dumps({'eval': {'guidance': 2.75}}))
    assert find_model(other, '', None).guidance == 2.75
    assert find_model('', 'emoji', None).guidance == teachers.get('emoji').guidance


def test_a_teacher_alone_needs_no_run(command, weights, tmp_path, capfd):
    command('--teacher', f'--teacher_path={weights}', '--prompt=a cat', '--steps=3', '--guidance=2',
            '--solver=heun', '--format=webp', f'--out={tmp_path}')
    said = capfd.readouterr().out
    assert f'{tmp_path}: 1 image, in batches of 1\nteacher, 3 steps: 10 network' in said
    about = text_of(tmp_path / '0000-a-cat.webp')
    assert about['teacher'] == str(weights) and about['guidance'] == '2'
    assert about['sampler'] == 'heun' and 'checkpoint' not in about


# --- What the files say ---


def test_an_image_says_how_it_was_made(run, three, weights):
    about = text_of(three / '0003-a-dog-on-a-blue-background.png')
    assert about == about | {
        'prompt': PROMPTS[1], 'image': '1', 'seed': '0', 'steps': '2', 'evaluations': '2',
        'guidance': '1', 'model': 'student', 'sampler': 'renoise', 'checkpoint': str(run),
        'step': '7', 'teacher': str(weights)}
    assert about['Software'].startswith('ddmd_jax ')
    assert json.loads(text_of(three / 'grid.png')['prompt']) == PROMPTS


@pytest.mark.parametrize('suffix', pictures.SUFFIXES)
def test_any_text_survives_in_the_file_and_so_do_the_pixels(tmp_path, suffix):
    file, text = tmp_path / f'a{suffix}', 'ein Käfer, 甲虫 🐞 "quoted" <b> \\n'
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 3)).astype(np.uint8)
    pictures.save(Image.fromarray(image), file, {'prompt': text, 'seed': '3'})
    assert text_of(file) == {'prompt': text, 'seed': '3'}
    np.testing.assert_array_equal(pixels(file), image)


@pytest.mark.parametrize('prompt, slug', [
    ('A Red, red  heart!', 'a-red-red-heart'), ('../../etc/passwd', 'etc-passwd'), ('', ''),
    ('甲虫', ''), ('Käfer & Öl', 'kafer-ol'), ('x' * 60, 'x' * 48), ('-' * 9 + '.png', 'png'),
    ('word ' * 20, ('word-' * 10)[:48].strip('-'))])
def test_names_of_files_are_safe(prompt, slug):
    assert drawing.slug(prompt) == slug
    assert drawing.file_names([drawing.ImageName(0, prompt, 0)], '.png') == [
        f'0000-{slug}.png' if slug else '0000.png']


def test_prompts_come_from_flags_and_files(tmp_path):
    (tmp_path / 'p.txt').write_text('a  cat\n\n a dog \n')
    (tmp_path / 'p.jsonl').write_text('{"prompt": "a bird"}\n')
    (tmp_path / 'p.csv').write_text('caption\na fish\n')
    read = lambda *given, name='': sample.read_prompts(
        given, name and str(tmp_path / name), 'train')
    assert read('', ' a\tb ') == ['', 'a b']
    assert read('one', name='p.txt') == ['one', 'a cat', 'a dog']
    assert read(name='p.jsonl') == ['a bird']
    assert sample.read_prompts([], str(tmp_path / 'p.csv'), 'train', 'caption') == ['a fish']
    prompts.prepare(prompts.Settings((str(tmp_path / 'p.txt'),), near_threshold=1.0,
                                     validation=0.0), tmp_path / 'set')
    assert sorted(read(name='set')) == ['a cat', 'a dog']


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(run, command, tmp_path, monkeypatch):
    out, own = tmp_path / 'out', pictures.save
    out.mkdir()
    args = [f'--checkpoint={run}', *asking('a red apple', 'a dog'), f'--out={out}']

    def full(image, file, about):
        if '0001' in file.name:
            raise OSError(28, 'No space left on device')
        own(image, file, about)

    with monkeypatch.context() as m:
        m.setattr(pictures, 'save', full)
        with pytest.raises(SystemExit, match='there is no room on the disk; make some, then run'):
            command(*args)
    assert sorted(p.name for p in out.iterdir()) == [sample.MARK, '0000-a-red-apple.png']
    command(*args)
    assert sorted(p.name for p in out.iterdir()) == ['0000-a-red-apple.png', '0001-a-dog.png']
    with pytest.raises(SystemExit, match='exists already and 1 more'):
        command(*args)


def test_a_file_that_was_there_is_not_taken_for_a_half_of_ours(tmp_path):
    mine, new = tmp_path / 'mine.png', tmp_path / 'new.png'
    mine.touch()
    with pytest.raises(KeyboardInterrupt), sample.marked([mine, new]):
        raise KeyboardInterrupt
    assert sample.begun(tmp_path) == {'new.png'}
    new.touch()
    with pytest.raises(KeyboardInterrupt), sample.marked([mine, new]):  # again, and not the last
        raise KeyboardInterrupt
    assert sample.begun(tmp_path) == {'new.png'}
    with sample.marked([mine, new]):
        pass
    assert not sample.begun(tmp_path) and sample.begun(tmp_path / 'nowhere') == set()
    (tmp_path / sample.MARK).write_text('7')
    assert sample.begun(tmp_path) == set()


def test_prompts_that_are_cut_are_warned_of_once(run, capsys):
    named = drawing.names(['red ' * 200, 'a red apple', 'blue ' * 200], 2, 0)
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    sample.encoded(named, sample.find_model(run, '', None), mesh)
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith('warning:')]
    assert line.startswith('warning: 2 of 3 prompts are longer than the ')
    assert "lose their end; the first begins 'red red" in line


# --- Lumina ---


@pytest.fixture(scope='module')
def pipeline(tmp_path_factory):
    """A pipeline's folder, with random weights and everything that is read."""
    folder = tmp_path_factory.mktemp('lumina') / 'pipe'
    published_text.write('lumina', folder)
    config = {'_class_name': lumina.TRANSFORMER, **published.TRANSFORMER}
    cfg = lumina.model_config(config)
    abstract = abstract_params(lambda: NextDiT(cfg, nnx.Rngs(0)))
    lumina.export(published_text.random_params(abstract, 1), config, folder / 'transformer',
                  np.float32)
    config = {'_class_name': published_vae.AUTOENCODER, **published.VAE}
    abstract = autoencoder_kl.abstract_params(published_vae.vae_config(config, 'float32'))
    diffusers.export_tree(published_text.random_params(abstract, 2), names.autoencoder,
                          folder / 'vae', config, np.float32)
    (folder / 'scheduler').mkdir()
    (folder / 'scheduler/scheduler_config.json').write_text('{"shift": 6.0}')
    return folder


def test_lumina_is_encoded_drawn_and_decoded(command, pipeline, tmp_path):
    teacher = lumina.load(LoadOptions(str(pipeline), size=(16, 16)))
    manifest = {'task': 'distill', 'teacher.name': 'lumina', 'teacher.path': '/gone',
                'teacher.dtype': 'float32', 'student.steps': 1, 'method.shift': 3.0,
                'data.sizes.0.0': 16, 'data.sizes.0.1': 24, 'teacher_identity': teacher.identity}
    run = save(tmp_path / 'run', manifest, jax.tree.map(np.asarray, teacher.params))
    common = [f'--checkpoint={run}', f'--teacher_path={pipeline}', '--prompt=a red apple']
    command(*common, f'--out={tmp_path / "a.png"}')
    image = pixels(tmp_path / 'a.png')
    assert image.shape == (16, 24, 3) and image.std() > 1
    command('--teacher', f'--teacher_path={pipeline}', '--prompt=', '--steps=1', '--size=16,16',
            f'--out={tmp_path / "t.png"}')  # in bf16, guided away from the null prompt
    assert pixels(tmp_path / 't.png').shape == (16, 16, 3)
    with pytest.raises(SystemExit, match=r'size \(16, 25\) must be positive multiples of 4') as e:
        command(*common, '--size=16,25', f'--out={tmp_path / "b.png"}')
    assert len(str(e.value).splitlines()) == 1


# --- What is refused, in one line ---


def files(folder):
    (folder / 'empty.txt').write_text('\n \n')
    (folder / 'bytes.txt').write_bytes(b'\xff\xfe')
    (folder / 'file').write_text('')
    (folder / 'out').mkdir()
    (folder / 'out' / '0001-a-cat.png').write_text('mine')
    return {'DIR': str(folder), 'OUT': str(folder / 'new')}


REFUSED = [
    (['--prompt=a'], 'no --checkpoint given'),
    (['--teacher', '--prompt=a'], 'no --checkpoint given'),
    (['--checkpoint=RUN'], 'no --prompt given'),
    (['--checkpoint=RUN', '--prompt=a', '--out='], 'no --out given'),
    (['--checkpoint=RUN', '--prompt=a', 'apple'], "unexpected argument 'apple'"),
    (['--checkpoint=RUN', '--prompt=a', '--out=x.jpg'], 'only .png and .webp are written'),
    (['--checkpoint=RUN', '--prompt=a', '--guidance=3'], "--guidance is the teacher's"),
    (['--checkpoint=RUN', '--prompt=a', '--teacher', '--compare_teacher'], 'leave out --teacher'),
    (['--checkpoint=RUN', '--prompt=a', '--grid', '--count=61'],
     'a sheet has at most 60 rows and 60 columns, not 1 and 61'),
    (['--checkpoint=DIR/nowhere', '--prompt=a'], 'nowhere holds no checkpoints'),
    (['--checkpoint=RUN', '--prompts=DIR/none.txt'], 'no file DIR/none.txt'),
    (['--checkpoint=RUN', '--prompts=DIR'], 'DIR is not a set of prompts'),
    (['--checkpoint=RUN', '--prompts=DIR/empty.txt'], 'holds no prompt'),
    (['--checkpoint=RUN', '--prompts=DIR/bytes.txt'], 'bytes.txt line 1: not UTF-8'),
    (['--checkpoint=RUN', '--prompt=a', '--size=32,32'], 'emoji has one size, 64,64'),
    (['--checkpoint=RUN', '--prompt=a', '--prompt=b', '--out=DIR/x.png'], 'is one file for 2'),
    (['--checkpoint=RUN', '--prompt=a', '--prompt=a cat', '--out=DIR/out'],
     'out/0001-a-cat.png exists already; choose another --out, or replace with --overwrite'),
    (['--checkpoint=RUN', '--prompt=a', '--out=DIR/file'], 'file cannot be made'),
    (['--checkpoint=RUN', '--prompt=a', '--out=/proc/nowhere'], 'cannot be made'),
    (['--checkpoint=RUN', '--prompt=a', '--teacher_path=/nowhere.safetensors'],
     'weights missing: /nowhere.safetensors'),
]


@pytest.mark.parametrize('args, words', REFUSED)
def test_bad_input(run, command, tmp_path, args, words):
    names = files(tmp_path) | {'RUN': str(run)}
    if not any(a.startswith('--out') for a in args):
        args = [*args, '--out=OUT']
    for name, path in names.items():
        args, words = [a.replace(name, path) for a in args], words.replace(name, path)
    with pytest.raises(SystemExit) as e:
        command(*args)
    said = str(e.value.code)
    assert said.startswith('sample: ') and words in said and len(said.splitlines()) == 1
    assert (tmp_path / 'out' / '0001-a-cat.png').read_text() == 'mine'


@pytest.mark.parametrize('args, words', [
    (['--stepp=3'], "Unknown command line flag 'stepp'"), (['--step=0'], 'step'),
    (['--teacher', '--guidance=nan'], 'must be a finite number'), (['--steps=few'], '--steps=few'),
    (['--steps=0'], 'steps'), (['--sampler=ddim'], 'renoise|deterministic'),
    (['--size=32'], 'must be HEIGHT,WIDTH'), (['--size=a,b'], 'must be HEIGHT,WIDTH'),
    (['--seed=-1'], 'seed'), (['--count=0'], 'count'), (['--format=jpg'], 'png|webp')])
def test_wrong_flags(command, capfd, args, words):
    with pytest.raises(SystemExit) as e:
        command('--checkpoint=c', '--prompt=a', '--out=o', *args)
    said = capfd.readouterr().err
    assert e.value.code == 2 and said.startswith('sample: ') and words in said
    assert len(said.splitlines()) == 1


TREE = {'bias': np.ones(3, np.float32)}


@pytest.mark.parametrize('changes, words', [
    ({'task': 'pretrain'}, 'trains a teacher; its result is'),
    ({'teacher.name': 'flux'}, "unknown here: no teacher family 'flux'; known: emoji"),
])
def test_runs_that_have_no_student_to_draw_with(tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        sample.find_model(save(tmp_path, {'teacher.name': 'emoji'} | changes, TREE), '', None)


def test_a_student_is_drawn_with_its_runs_sampler(tmp_path):
    run = save(tmp_path, {'teacher.name': 'emoji'}, TREE)
    assert sample.find_model(run, '', None).sampler == 'renoise'
    (run / 'config.json').write_text('{"student": {"sampler": "deterministic"}}')
    assert sample.find_model(run, '', None).sampler == 'deterministic'


def test_files_are_replaced_only_when_told_and_other_steps_warn(run, command, tmp_path, capfd):
    mine = tmp_path / 'mine.png'
    mine.write_text('mine')
    command(f'--checkpoint={run}', '--prompt=a cat', '--steps=1', f'--out={mine}', '--overwrite')
    assert 'warning: the student was trained for 2 steps, not for 1' in capfd.readouterr().err
    assert pixels(mine).shape == (64, 64, 3) and text_of(mine)['steps'] == '1'
    assert [f.name for f in tmp_path.iterdir()] == ['mine.png']


