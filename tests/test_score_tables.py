"""Metrics of suites: what is measured of each picture and of sets, and how a gap is told."""

import functools

import jax
import numpy as np
import pytest
import safetensors.numpy
import score_reference as reference
from flax import nnx
from test_scores import PICTURES, TEXTS, TINY, tiny_state, towers

from ddmd_jax.evaluation import distances, kept, metrics, statistics
from ddmd_jax.evaluation.kept import ImagesError
from ddmd_jax.evaluation.metrics import Given
from ddmd_jax.evaluation.moments import Moments, frechet
from ddmd_jax.evaluation.scores import outside, preprocess, scorers, tokens
from ddmd_jax.evaluation.scores.scorers import Source
from ddmd_jax.models.layers import abstract_params
from ddmd_jax.models.text import clip

FEATURES = scorers.clip_features('features', towers(), Source('some/where'), pixels=preprocess.cmmd)
TABLE = {'clip_dmd2': TINY, 'hps_v2.1': TINY, 'cmmd_features': FEATURES,
         'fid_features_dmd2': FEATURES, 'fid_features': FEATURES}
REAL = [reference.picture((40 + i, 44)) for i in range(9)]


@pytest.fixture(scope='module')
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp('weights') / 'clip.safetensors'
    safetensors.numpy.save_file(tiny_state(), path)
    return str(path)


@pytest.fixture(scope='module')
def given(file):
    return functools.partial(Given, {name: [file] for name in metrics.METRICS}, table=TABLE,
                             mesh=metrics.local_mesh())


def test_every_metric_has_a_scorer():
    for name, metric in metrics.METRICS.items():
        assert metric.scorer in {**scorers.SCORERS, **outside.OUTSIDE, 'image_reward': None}, name


@pytest.mark.parametrize('name, factor, pixels, ids', [
    ('clip', 100, preprocess.clip_dmd2,
     functools.partial(tokens.tokenize, prefix='A photo depicts ')),
    ('clip_l14', 100, preprocess.clip, tokens.tokenize),
    ('clip_h14', 100, preprocess.clip, tokens.tokenize),
    ('hps_v2', 100, preprocess.hps, tokens.tokenize),
    ('hps_v2.1', 100, preprocess.hps, tokens.tokenize),
    ('pickscore', 1, preprocess.clip_transformers,
     functools.partial(tokens.tokenize, style='transformers')),
    ('aesthetic', 1, preprocess.clip, None), ('cmmd', 1, preprocess.cmmd, None),
    ('fid', 1, preprocess.inception_dmd2, None), ('patch_fid', 1, preprocess.inception_patch, None),
    *((name, 1, preprocess.inception_clean, None) for name in (
        'fid_clean', 'kid', 'precision', 'recall', 'density', 'coverage'))])
def test_metrics_are_of_their_protocols(name, factor, pixels, ids):
    """What the networks are given: pixels and tokens of the protocol, and the table's unit."""
    pytest.importorskip('ftfy')
    metric, picture, text = metrics.METRICS[name], reference.picture((700, 600)), 'cafe\u0301 &lt;'
    given = scorers.SCORERS[metric.scorer].inputs([picture], [text])
    assert metric.factor == factor and set(given) == {'pixels'} | ({'ids'} if ids else set())
    np.testing.assert_array_equal(given['pixels'], [pixels(picture)])
    if ids:
        np.testing.assert_array_equal(given['ids'], ids([text]))


def test_metrics_are_of_their_weights_and_units():
    sources = {name: [source.hub or source.file for source in scorers.SCORERS[
        metrics.METRICS[name].scorer].sources] for name in (
            'clip', 'clip_l14', 'clip_h14', 'pickscore', 'aesthetic', 'cmmd', 'fid')}
    openai = 'openai/clip-vit-large-patch14'
    assert sources == {
        'clip': ['laion/CLIP-ViT-g-14-laion2B-s12B-b42K'], 'clip_l14': [openai],
        'clip_h14': ['laion/CLIP-ViT-H-14-laion2B-s32B-b79K'],
        'pickscore': ['yuvalkirstain/PickScore_v1'],
        'aesthetic': [openai, 'sac+logos+ava1-l14-linearMSE.pth'], 'cmmd': [f'{openai}-336'],
        'fid': ['weights-inception-2015-12-05-6726825d.pth']}
    for name in ('hps_v2', 'hps_v2.1'):
        source, = scorers.SCORERS[metrics.METRICS[name].scorer].sources
        assert source.file == f'HPS_v{name[5:]}_compressed.pt'
    assert metrics.METRICS['image_reward'].factor == 100 and metrics.METRICS['hps_v3'].factor == 1


@pytest.mark.parametrize('name, tower', [('clip_l14', clip.Clip), ('aesthetic', clip.ClipImage)])
def test_openais_networks_have_the_quick_gelu(name, tower):
    """LAION's have the same shapes, so that no weights would tell."""
    scorer, cfg = scorers.SCORERS[metrics.METRICS[name].scorer], clip.ARCHITECTURES['ViT-L-14']
    tree = abstract_params(lambda: tower(cfg if tower is clip.Clip else cfg.image, nnx.Rngs(0)))
    head = {str(layer): {'kernel': np.zeros(dims, 'f'), 'bias': np.zeros(dims[1], 'f')}
            for layer, dims in zip(scorers.HEAD_LAYERS, zip((768, *scorers.HEAD), scorers.HEAD))}
    made = jax.make_jaxpr(scorer.apply)(
        tree if tower is clip.Clip else {'clip': tree, 'head': head},
        {'pixels': np.zeros((1, 224, 224, 3), np.float32), 'ids': np.zeros((1, 77), np.int32)})
    assert 'logistic' in str(made) and 'erf' not in str(made)


def test_pickscore_alone_is_times_its_networks_factor():
    tree = abstract_params(lambda: clip.Clip(clip.ARCHITECTURES['ViT-H-14'], nnx.Rngs(0)))
    given = {'pixels': np.zeros((1, 224, 224, 3), 'f'), 'ids': np.zeros((1, 77), np.int32)}
    last = {name: [str(eqn.primitive) for eqn in jax.make_jaxpr(scorers.SCORERS[name].apply)(
        tree, given).eqns[-2:]] for name in ('pickscore', 'hps_v2.1')}
    assert last['pickscore'] == ['exp', 'mul'] and last['hps_v2.1'][-1] == 'reduce_sum'


def test_metrics_are_those_of_their_scorers(given, file, monkeypatch):
    """Figures of pictures in the table's unit; distances of features, which are made once."""
    made, run = [], scorers.run
    monkeypatch.setattr(scorers, 'run', lambda scorer, *rest: (
        made.append(scorer.title), run(scorer, *rest))[1])
    each, whole, gaps = metrics.measure(['clip', 'cmmd', 'kid', 'precision'],
                                        given(reference=REAL), PICTURES, TEXTS)
    assert not gaps and set(each) == {'clip'} and set(whole) == {'cmmd', 'kid', 'precision'}
    params = scorers.load(TINY, [file])
    np.testing.assert_allclose(each['clip'], 100 * run(TINY, params, PICTURES, TEXTS, batch=8),
                               rtol=1e-5)
    params = scorers.load(FEATURES, [file])
    drawn, real = (run(FEATURES, params, x, batch=8) for x in (PICTURES, REAL))
    assert whole['cmmd'] == pytest.approx(distances.cmmd(real, drawn), rel=1e-4)
    random = np.random.default_rng(0)
    real, drawn = random.standard_normal((9, 4)), 1.5 * random.standard_normal((12, 4))
    found = {name: metric.between(real, drawn) for name, metric in metrics.METRICS.items()
             if metric.between}
    assert found == {
        **dict.fromkeys(('fid', 'fid_clean', 'patch_fid'), frechet(
            Moments.of(real), Moments.of(drawn))),
        'kid': distances.kid(real, drawn)[0], 'cmmd': distances.cmmd(real, drawn),
        **distances.neighbours(real, drawn)}
    assert found['precision'] != found['recall']
    assert made == ['tiny', *['features'] * 4]  # `kid` and `precision` share theirs


def test_a_gap_stops_no_other(given, file, tmp_path):
    """Wrong hash, wrong shape, absent weights, a score that is NaN, too few pictures."""
    state = tiny_state()
    spoilt = {**state, 'visual.proj': np.full_like(state['visual.proj'], np.nan)}
    safetensors.numpy.save_file(spoilt, tmp_path / 'nan.safetensors')
    other = {**state, 'visual.proj': np.zeros((32, 99), np.float32)}
    safetensors.numpy.save_file(other, tmp_path / 'shape.safetensors')
    source = Source(None, 'nan.safetensors', '0123456789')
    hashed = scorers.clip_scorer('hashed', towers(), source)
    table = {**TABLE, 'hps_v2': hashed, 'pickscore': TINY, 'clip_l14': TINY, 'clip_h14': hashed}
    weights = {'clip': [file], 'hps_v2': [str(tmp_path / 'nan.safetensors')],
               'pickscore': [str(tmp_path / 'shape.safetensors')],
               'clip_l14': [str(tmp_path / 'nan.safetensors')],
               'hps_v2.1': [str(tmp_path / 'absent.safetensors')], 'precision': [file]}
    names = ['hps_v2', 'pickscore', 'clip_l14', 'hps_v2.1', 'clip_h14', 'precision', 'cmmd', 'x',
             'clip']
    each, whole, gaps = metrics.measure(
        names, Given(weights, REAL[:4], metrics.local_mesh(), table), PICTURES, TEXTS)
    assert list(each) == ['clip'] and not whole
    words = {'hps_v2': 'its sha256 begins', 'pickscore': 'has shape', 'clip_l14': 'is not finite',
             'hps_v2.1': 'no weights at', 'clip_h14': '--weights=clip_h14=PATH',
             'precision': '5 neighbours want more', 'x': 'no metric', 'cmmd': 'some/where'}
    assert set(gaps) == set(words)
    for name, said in gaps.items():
        assert words[name] in said and len(said.splitlines()) == 1, said


def test_what_needs_real_pictures_says_so(given):
    _, whole, gaps = metrics.measure(['fid'], given(), PICTURES, TEXTS)
    assert not whole and 'give their folder with --reference' in gaps['fid']


def test_scores_do_not_depend_on_the_devices(given, file):
    """A device scores as many at a time as one alone does: the mesh only deals them out."""
    apart = [metrics.measure(['clip'], given(), PICTURES[a:b], TEXTS[a:b])[0]['clip']
             for a, b in ((0, 7), (0, 3))]
    np.testing.assert_allclose(apart[0][:3], apart[1], rtol=1e-6)
    assert metrics.ROWS == 8 and len(jax.local_devices()) == 1


def test_groups_are_means_over_prompts_with_intervals():
    found = metrics.by_group(np.asarray([1.0, 3, 5, 7]), ['p', 'p', 'q', 'r'], ['a', 'a', 'a', 'b'])
    assert list(found) == ['a', 'b', '']
    assert found['a'] == statistics.bootstrap([2.0, 5.0]) and found['b'].mean == 7
    assert found[''].mean == pytest.approx((2 + 5 + 7) / 3)


def test_a_plain_folder_is_read_by_name(tmp_path):
    from PIL import Image

    (tmp_path / 'sub').mkdir()
    for name, level in (('b.png', 2), ('a.jpg', 1), ('sub/c.webp', 3)):
        Image.new('RGB', (4, 5), (level,) * 3).save(tmp_path / name)
    (tmp_path / 'notes.txt').write_text('x')
    found = list(kept.Plain(tmp_path))
    assert [x.shape for x in found] == [(5, 4, 3)] * 3
    with pytest.raises(ImagesError, match='holds no images'):
        kept.Plain(tmp_path / 'nowhere')
