"""HPS v3 by its authors' package in a Python of its own: the exchange with a real process.

That Python is a virtual environment with two packages written here: `hpsv3`, whose class, methods
and arguments are those of hpsv3 1.0.0 on PyPI (sha256 1a1b3ed1...), and the four names of `torch`
that are used. Shown: the process, the lines that go to and fro, the files it is handed, that
gradients are off, every check of what comes back, and every way to end early. Not shown: the
published package, which pins versions of its own, and its 7B weights. By hand, hpsv3 1.0.0 with a
Qwen2-VL of hidden size 64 and random weights gave through `outside.run`, on a CPU and bit for bit,
what its own `reward` gives of each of four pictures alone (of all at once: to 5e-7, relative).
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import zlib

import numpy as np
import pytest
from evaluate_suites import SMALL as SUITE
from PIL import Image
from test_evaluate import SMALL, command, prompts  # noqa: F401

from ddmd_jax.evaluation import metrics, pictures
from ddmd_jax.evaluation.metrics import Given
from ddmd_jax.evaluation.scores import outside
from ddmd_jax.evaluation.scores.scorers import ScoreError

HPS = outside.OUTSIDE['hps_v3']
IMAGES = [np.full((4 + i, 6, 3), 40 * i, np.uint8) for i in range(3)]
TEXTS = ['a red apple', 'a "quoted" {Käfer} 🐞', '']

TORCH = '''
class no_grad:
    on = False
    def __enter__(self):
        no_grad.on = True
    def __exit__(self, *error):
        no_grad.on = False


class cuda:
    is_available = staticmethod(lambda: False)
'''
PACKAGE = '''
import sys, torch, zlib
print('loading shards')  # as libraries do, on standard output


class Value(float):
    item = lambda self: float(self)


class HPSv3RewardInferencer:
    def __init__(self, config_path=None, checkpoint_path=None, device='cuda', differentiable=False):
        assert device == 'cpu' and config_path is None and not differentiable
        self.added = float(open(checkpoint_path).read()) if checkpoint_path else 0.0
        self.calls, self.model = 0, self
        self.float = lambda: setattr(self, 'wide', True)

    def reward(self, ORDER):
        assert torch.no_grad.on and self.wide and len(image_paths) == len(prompts) == 1
        self.calls += 1
        THEN
        raw = open(image_paths[0], 'rb').read()
        mu = zlib.crc32(raw) / 2**32 + 10 * len(prompts[0]) + self.added
        return [[Value(mu), Value(0.5)]]  # [mu, sigma]
'''


def expected(images=IMAGES, texts=TEXTS, added=0.0):
    return [zlib.crc32(pictures.png(image, {})) / 2**32 + 10 * len(text) + added
            for image, text in zip(images, texts)]


@pytest.fixture(scope='module')
def environment(tmp_path_factory):
    """``environment(then, order)``: the Python of an environment whose package does `then`."""
    folder = tmp_path_factory.mktemp('env') / 'venv'
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', folder], check=True)
    site = next(folder.glob('lib/python*/site-packages'))

    def make(then='pass', order='image_paths, prompts'):
        # Two packages of one size within one second are one to Python's cache.
        shutil.rmtree(site / '__pycache__', ignore_errors=True)
        for name, text in (('torch', TORCH), ('hpsv3', PACKAGE)):
            (site / f'{name}.py').write_text(text.replace('THEN', then).replace('ORDER', order))
        return str(folder / 'bin' / 'python')

    make.site = site
    return make


@pytest.mark.parametrize('order', ['image_paths, prompts', 'prompts, image_paths'])
def test_scores_are_the_packages_own(environment, tmp_path, monkeypatch, order):
    """In our order, whichever arguments come first there; ours is kept from its imports."""
    (tmp_path / 'torch.py').write_text('raise ValueError("of another environment")')
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    got = outside.run(HPS, environment(order=order), [], iter(IMAGES), TEXTS)
    assert got.dtype == np.float64 and got.tolist() == expected()
    (tmp_path / 'weights').write_text('7')
    monkeypatch.chdir(tmp_path)
    python = os.path.relpath(environment(order=order))
    got = outside.run(HPS, python, ['weights'], IMAGES[:1], TEXTS[:1])
    assert got.tolist() == expected(IMAGES[:1], TEXTS[:1], 7)


LATER = 'if self.calls == 2: '


@pytest.mark.parametrize('then, words', [
    (LATER + 'raise ValueError("out of memory")',
     'ended with code 1 after 1 of 3 pictures (ValueError: out of memory)'),
    (LATER + 'sys.exit(3)', 'ended with code 3 after 1 of 3 pictures (loading shards)'),
    (LATER + 'sys.exit()', 'ended with code 0 after 1 of 3 pictures'),
    (LATER + 'import os; os.abort()', 'ended with code -6 after 1 of 3 pictures'),
    (LATER + 'return [[Value("nan"), Value(0)]]',
     'HPS v3 of 000001.png: score is nan, not a finite number'),
    (LATER + 'return [[Value("inf"), Value(0)]]', 'score is inf, not a finite number'),
])
def test_what_goes_wrong_there_is_one_line(environment, then, words):
    with pytest.raises(ScoreError) as e:
        outside.run(HPS, environment(then), [], IMAGES, TEXTS)
    assert words in str(e.value) and len(str(e.value).splitlines()) == 1


def test_a_python_without_the_package_is_one_line(environment, tmp_path):
    python = environment()
    (environment.site / 'hpsv3.py').unlink()
    (tmp_path / 'text').write_text('no program')
    (tmp_path / 'text').chmod(0o755)
    for there, words in ((python, "No module named 'hpsv3'; install hpsv3 there"),
                         (str(tmp_path / 'nowhere'), 'cannot be run (No such file'),
                         (str(tmp_path), 'cannot be run (Permission denied)'),
                         (str(tmp_path / 'text'), 'cannot be run (Exec format error)')):
        with pytest.raises(ScoreError) as e:
            outside.run(HPS, there, [], IMAGES, TEXTS)
        assert words in str(e.value) and len(str(e.value).splitlines()) == 1


ANSWERS = '''
import json, sys
asked = [json.loads(sys.stdin.readline())]
answer = {'file': asked[0]['file'], 'sha256': asked[0]['sha256'], 'score': 1.0}
CHANGE
print(json.dumps(answer), flush=True)
sys.stdin.read()
'''


@pytest.mark.parametrize('change, words', [
    ('answer["file"] = "000001.png"', 'asked for file 000000.png, told a score of 000001.png'),
    ('answer["sha256"] = "0" * 64', 'told a score of 000000000000: of another picture'),
    ('del answer["score"]', "has no 'score'"),
    ('answer["score"] = "good"', "score is 'good', not a finite number"),
    ('answer = [1]', 'it is [1], not an object'),
    ('print("no JSON")', 'Expecting value'),
    ('print(json.dumps(answer))', '1 score more than was asked for'),
])
def test_answers_are_checked(tmp_path, change, words):
    """Of another order, another set of images, another shape, or too many."""
    (tmp_path / 'program.py').write_text(ANSWERS.replace('CHANGE', change))
    scorer = dataclasses.replace(HPS, program=str(tmp_path / 'program.py'))
    with pytest.raises(ScoreError) as e:
        outside.run(scorer, sys.executable, [], IMAGES[:1], TEXTS[:1])
    assert words in str(e.value) and len(str(e.value).splitlines()) == 1


@pytest.mark.parametrize('images, texts, words', [
    (IMAGES, TEXTS[:2], 'there are more pictures than 2 prompts'),
    (IMAGES[:2], TEXTS, 'there are 2 pictures for 3 prompts')])
def test_every_picture_has_its_prompt(environment, images, texts, words):
    with pytest.raises(ScoreError, match=words):
        outside.run(HPS, environment(), [], images, texts)


def test_a_metric_wants_the_name_of_its_python(environment):
    each, _, gaps = metrics.measure(['hps_v3'], Given(), IMAGES, TEXTS)
    assert not each and '--python=hps_v3=PATH' in gaps['hps_v3']
    given = Given(pythons={'hps_v3': environment()})
    each, _, gaps = metrics.measure(['hps_v3'], given, IMAGES, TEXTS)
    assert not gaps and each['hps_v3'].tolist() == expected()


def test_the_command_scores_by_it_beside_what_fails(environment, command, prompts,  # noqa: F811
                                                    tmp_path, capfd):
    """One metric is measured, one has weights of another shape: a gap, a line, and code 3."""
    import safetensors.numpy

    texts = [json.loads(line)['prompt'] for line in prompts.read_text().splitlines()]
    images, folder = {}, tmp_path / 'images'
    for i in range(3):
        for k in range(SUITE.images):
            file = folder / f'0000{i}' / 'samples' / f'0000{k}.png'
            file.parent.mkdir(parents=True, exist_ok=True)
            images[file] = np.full((8, 8, 3), 30 * i + k, np.uint8)
            Image.fromarray(images[file]).save(file)
    weights = tmp_path / 'w.safetensors'
    safetensors.numpy.save_file({'logit_scale': np.zeros(3, np.float32)}, weights)
    args = [SMALL, f'--prompts=small={prompts}', f'--images={folder}', '--metrics=clip,hps_v3',
            f'--weights=clip={weights}', f'--out={tmp_path / "out"}']
    assert command(*args, f'--python=hps_v3={environment()}') == 3
    row, = json.loads((tmp_path / 'out/eval.json').read_text())['rows']
    scores = expected(images.values(), [text for text in texts for _ in range(SUITE.images)])
    assert row['hps_v3'] == pytest.approx(np.mean(scores)) and 'clip' not in row
    assert row['hps_v3/counting'] == pytest.approx(np.mean(scores[2:]))
    said = capfd.readouterr().err
    assert 'evaluate: small: clip: ' in said and 'w.safetensors' in said
    assert '--python=clip: not used; here it is of hps_v3' in command(
        *args, f'--python=clip={environment()}')
