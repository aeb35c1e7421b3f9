"""Drawing and evaluating: which noise an image has, and what a run's end shows of it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict
from PIL import Image
from test_export import save
from test_sample import command  # noqa: F401 - a fixture

from ddmd_jax import families as teachers
from ddmd_jax.data import DataFileError
from ddmd_jax.diffusion import drawing, sampling
from ddmd_jax.evaluation import evaluate, pictures, suites
from ddmd_jax.evaluation.suites import Examples, Suite
from ddmd_jax.parallel.sharding import make_mesh
from ddmd_jax.train.watch import student

PROMPTS = ['a red apple', 'a car', 'a red apple', 'a fox on a purple background']
CONFIG = ConfigDict({
    'seed': 5, 'student': {'steps': 2, 'sampler': 'renoise'}, 'method': {'shift': None},
    'eval': {'prompts': 3, 'held_out': 1, 'batch': 3, 'teacher_steps': 2, 'guidance': 2.0,
             'solver': 'euler'}})
NOISES = """
import sys
import numpy as np
sys.path.insert(0, 'tests')
from test_evaluation import noises
from ddmd_jax.parallel.sharding import make_mesh
np.save(sys.argv[1], noises(make_mesh({'data': 2, 'fsdp': -1}), 'dacb', 16))
"""


def noise_sampler():
    """Draws the noise of two steps beside what conditions it; no network."""
    def trace(params, cond, null, key):
        noise = sampling.step_noise(key, 2, (len(cond['embeds']), 4, 4, 3))
        x = params * noise[0] + noise[1] + cond['embeds'][:, :, None] + null['embeds'][0, 0]
        return x, noise

    return drawing.Sampler('student', 2, 2, 1.0, 'renoise', lambda: jnp.array([0.0, 0.5]), trace,
                           lambda x: 0.1 * x)


def request(letters, dtype=np.float32):
    cond = {'embeds': np.array([[[ord(c) - 100]] for c in letters], dtype)}
    return drawing.Request(drawing.names(letters, 1, 7), cond, {'embeds': np.ones((1, 1, 1))})


def noises(mesh, letters, batch):
    """``[n, 4, 4, 3]`` latents of prompts that are letters, by `generate` and by `drawer`."""
    asked = request(letters)
    drawn = np.concatenate(list(drawing.generate(noise_sampler(), 0.3, asked, batch, mesh)))
    latents = np.asarray(drawing.drawer(noise_sampler(), asked, mesh)(0.3))
    np.testing.assert_array_equal(drawn, np.clip(0.1 * latents, -1, 1))
    return latents


def test_noise_is_of_the_name_alone(tmp_path):
    """Not of the batch, nor of the prompts beside it, nor of the devices: bit for bit."""
    one = make_mesh({}, jax.devices()[:1])
    want = noises(one, 'abcd', 3)
    assert len({x.tobytes() for x in want}) == 4
    np.testing.assert_array_equal(noises(one, 'abcd', 16), want)
    np.testing.assert_array_equal(noises(one, 'cz', 1)[0], want[2])
    (tmp_path / 'noises.py').write_text(NOISES)
    tiny.run_on_devices(tmp_path / 'noises.py', 8, tmp_path / 'x.npy')
    np.testing.assert_array_equal(np.load(tmp_path / 'x.npy'), want[[3, 0, 2, 1]])


def test_a_seed_and_a_number_change_the_noise():
    """And a prompt that comes again is another image of it."""
    words = drawing.name_words([*drawing.names('aa', 1, 7), *drawing.names('a', 1, 8)])
    assert len({tuple(x) for x in jax.random.key_data(drawing.keys(words)).tolist()}) == 3


def test_images_of_one_prompt_share_its_conditioning():
    """It is held once, and each image has that of its own prompt, also among some of them."""
    embeds = lambda texts: {'embeds': np.array([[[ord(t) - 100 if t else 1]] for t in texts])}
    named, mesh = drawing.names('dbd', 2, 7), make_mesh({}, jax.devices()[:1])
    shared = drawing.Request.encoded(named, embeds)
    own = drawing.Request(named, embeds([name.prompt for name in named]), embeds(['']))
    assert len(shared.cond['embeds']) == 2 and len(own.cond['embeds']) == 6
    draw = lambda asked: np.concatenate(list(drawing.generate(
        noise_sampler(), jnp.float32(1), asked, 4, mesh)))
    np.testing.assert_array_equal(draw(shared), draw(own))
    np.testing.assert_array_equal(draw(shared.pick([5, 2])), draw(own)[[5, 2]])


def test_conditioning_is_rounded_as_it_is_stored():
    a, b = (request('ab', dtype) for dtype in (np.float32, 'bfloat16'))
    np.testing.assert_array_equal(a.cond['embeds'], b.cond['embeds'])
    assert a.first(1).names == a.names[:1] and a.first(1).rows.tolist() == [0]


@pytest.fixture(scope='module')
def run(weights, tmp_path_factory):
    """(folder of a run of two steps, its student beside its teacher)."""
    teacher = teachers.load_teacher(str(weights))
    other = tiny.random_params(tiny.TOY, 1)['denoiser']
    student = jax.tree.map(lambda a, b: np.asarray(a + 0.1 * (b - a)), teacher.params, other)
    folder = save(tmp_path_factory.mktemp('run'), {
        'task': 'distill', 'teacher.name': 'emoji', 'teacher.path': str(weights),
        'teacher.dtype': 'float32', 'student.steps': 2,
        'teacher_identity': teacher.identity}, student, step=7)
    return folder, evaluate.Comparison(CONFIG, teacher, student, 7,
                                       make_mesh({}, jax.devices()[:1]))


@pytest.fixture(scope='module')
def evaluated(run, tmp_path_factory):
    """(folder, images measured by row, arguments of the suite) of one without real images."""
    _, compared = run
    seen, asked, workdir = [], [], tmp_path_factory.mktemp('eval')

    def examples(*counts):
        asked.append(counts)
        held = np.array([False, False, False, True])
        return Examples(PROMPTS, lambda x: seen.append(x) or {'mean': float(x.mean())}, held)

    evaluate.evaluate(compared, Suite('toy', {'mean': '.2f'}, examples), compared.teacher.encode,
                      workdir, lambda: {'total': 2.5})
    return workdir, seen, asked


def test_an_evaluation_writes_its_figures_and_a_sheet(evaluated):
    workdir, seen, asked = evaluated
    found = json.loads((workdir / 'eval.json').read_text())
    assert list(found) == ['rows', 'seconds', 'seed', 'step', 'weights', 'config']
    assert [list(row.values())[:4] for row in found['rows']] == [
        ['teacher_guided', 2, 4, 2.0], ['teacher_few_step', 2, 2, 1.0],
        ['teacher_in_student_sampler', 2, 2, 1.0], ['student', 2, 2, 1.0]]
    assert [row['mean'] for row in found['rows']] == [float(x.mean()) for x in seen]
    assert found['seconds'] == {'total': 2.5} and asked == [(3, 1, 5)]
    assert (found['seed'], found['step']) == (5, 7)
    assert found['config'] == CONFIG.to_dict()
    assert Image.open(workdir / 'samples.png').size[1] > 4 * 96
    student = seen[-1]
    assert np.abs(student[0] - student[2]).max() > 0.1  # one prompt, two images
    assert np.abs(student - seen[2]).max() > 0.1  # by one sampler, with other weights


def near(a, b):
    """Equal to one of 255, which is how a batch of another size may round."""
    np.testing.assert_allclose(pictures.to_uint8(a).astype(int), b, atol=1)


def test_table_sheet_and_sample_show_the_same_image(run, evaluated, command, monkeypatch,  # noqa: F811
                                                    tmp_path):
    (folder, compared), (_, measured, _) = run, evaluated
    columns = []
    monkeypatch.setattr(pictures, 'captioned_sheet', lambda *args: columns.append(args))
    request = drawing.Request.encoded(drawing.names(PROMPTS[1:], 1, 5), compared.teacher.encode)
    evaluate.sheet(compared, request, tmp_path)
    (captions, titles, images, _), = columns
    assert captions == PROMPTS[1:]
    assert titles == ['teacher\n2 steps, w=2', 'teacher\n2 steps', 'teacher as student\n2 steps',
                      'student\n2 steps']
    for row, caption in enumerate(captions):
        for name, table in zip(images, measured, strict=True):
            near(name[row], pictures.to_uint8(table[PROMPTS.index(caption)]))
    command(f'--checkpoint={folder}', '--seed=5', *(f'--prompt={p}' for p in PROMPTS),
            f'--out={tmp_path}')
    for i, file in enumerate(sorted(tmp_path.glob('0*.png'))):
        near(measured[-1][i], np.asarray(Image.open(file)))


def test_a_sheet_shows_several_images_of_a_caption_where_there_are():
    held = np.asarray([False] * 9 + [True] * 5)
    blocks = evaluate._shown([*'aaaabbbbcdddde'], held)
    np.testing.assert_array_equal(blocks, [[0, 1, 2, 3], [4, 5, 6, 7], [9, 10, 11, 12]])
    np.testing.assert_array_equal(evaluate._shown([*'abcdefghiaabcd'], held)[:, 0],
                                  [0, 1, 2, 3, 4, 5, 6, 9, 10, 11])


def test_drawing_shows_how_far_it_is(capfd):
    noises(make_mesh({}, jax.devices()[:1]), 'abcd', 2)
    bar = capfd.readouterr().err.split('\r')[-1]
    assert bar.startswith('student, 2 steps: 100%|') and '4/4 [' in bar and ' images/s]' in bar


def test_a_suite_is_found_in_a_users_module(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / 'suite_of_a_user.py').write_text(
        'from ddmd_jax.evaluation.suites import Suite\n'
        "SUITE = Suite('mine', {}, lambda seen, held_out, seed: None)\nOTHER = 3\n")
    assert suites.find('suite_of_a_user.SUITE').name == 'mine'
    for path, why in (('suite_of_a_user.NONE', 'has no attribute'), ('no_such.SUITE', 'No module'),
                      ('suite_of_a_user.OTHER', 'is of type int, not'), ('SUITE', 'Empty module')):
        with pytest.raises(DataFileError, match=f'eval.suite={path} .*{why}'):
            suites.find(path)


def test_a_published_suite_is_not_drawn_at_a_runs_end():
    config = tiny.load_config('emoji')
    assert student.suite_of(config).name == 'emoji'
    config.eval.suite = 'geneval'
    with pytest.raises(DataFileError, match='python -m ddmd_jax.evaluate --suite=geneval'):
        student.suite_of(config)
