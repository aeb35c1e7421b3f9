"""Scorers against what their references made of the same pictures, prompts and random weights.

`score_reference.py` says of what, and makes ``golden/scores.json`` with the references themselves.
"""

import dataclasses
import functools
import hashlib
import io
import json
import os
import pickle
import sys
import zipfile

import jax
import numpy as np
import PIL
import pytest
import safetensors.numpy
import score_reference as reference
import tiny
from flax import nnx
from PIL import Image
from score_reference import EMBED, SIZES, TEXT, VISION

from ddmd_jax.evaluation.scores import preprocess, scorers, tokens
from ddmd_jax.evaluation.scores.preprocess import ImageError
from ddmd_jax.evaluation.scores.scorers import ScoreError, Source
from ddmd_jax.models import blip, inception
from ddmd_jax.models.layers import abstract_params, functional
from ddmd_jax.models.text import clip
from ddmd_jax.util.errors import UserError
from ddmd_jax.weights import clip as clip_names, flat, states, torch_files
from ddmd_jax.weights.flat import WeightsError

GOLDEN = json.loads(reference.GOLDEN.read_text())
BOUND = 1e-4  # of rms


def towers(act='gelu'):
    """`score_reference`'s tiny CLIP."""
    return clip.TwoTowers(
        clip.ClipConfig(TEXT['vocab_size'], TEXT['width'], 4 * TEXT['width'], TEXT['layers'],
                        TEXT['heads'], hidden_act=act, projection_dim=EMBED, penultimate=False),
        clip.ClipImageConfig(
            VISION['image_size'], VISION['patch_size'], VISION['width'],
            int(VISION['width'] * VISION['mlp_ratio']), VISION['layers'],
            VISION['width'] // VISION['head_width'], act, projection_dim=EMBED))


def unfolded(names):
    """Names and shapes as `score_reference.folded` folded them."""
    return {name.replace('{}', str(i)): tuple(shape)
            for name, (count, shape) in names.items() for i in range(count)}


@functools.cache
def tiny_state():
    """open_clip's weights of the tiny CLIP."""
    return reference.weights(unfolded(GOLDEN['clip']['tiny']))


def ids_of(prompts):
    """Tokens of a vocabulary of 200, the last the end."""
    ids = np.zeros((len(prompts), 77), np.int32)
    for row, prompt in zip(ids, prompts):
        row[:len(prompt)] = [1 + ord(c) % 190 for c in prompt]
        row[len(prompt)] = 199
    return ids


TINY = scorers.clip_scorer('tiny', towers(), Source('some/where'), tokenize=ids_of)


def close(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return np.abs(got - want).max() <= BOUND * np.sqrt(np.mean(want**2))


# --- Pixels and tokens ---


@pytest.mark.parametrize('name', ['clip', 'clip_dmd2', 'inception_tensorflow'])
def test_pixels_are_the_references_to_the_last_bit(name):
    make = getattr(preprocess, name)
    got = {'x'.join(map(str, size)): reference.digest(make(reference.picture(size)))
           for size in SIZES}
    assert got == GOLDEN['pixels'][name]


@pytest.mark.parametrize('name', ['inception_clean', 'inception_dmd2', 'inception_patch'])
def test_pillow_resamples_floats(name):
    """To the last bit where Pillow is the reference's; 12 and 13 differ by 1.5e-5 of 255."""
    make, same = getattr(preprocess, name), PIL.__version__ == GOLDEN['pixels']['pillow']
    for size, want in GOLDEN['pixels'][name].items():
        got = make(reference.picture(tuple(map(int, size.split('x')))))
        np.testing.assert_allclose(reference.sampled(got), want['sampled'], atol=5e-5, rtol=0,
                                   err_msg=size)
        assert not same or reference.digest(got) == want['digest'], size


@pytest.mark.parametrize('name, antialias', [('hps', True), ('hps_narrow', False)])
def test_hps_resamples_floats(name, antialias):
    """To 1e-6 of a channel's range, which is 4e-6 after the division by CLIP's deviation."""
    for size, want in GOLDEN['pixels'][name].items():
        picture = reference.picture(tuple(map(int, size.split('x'))))
        got = reference.sampled(preprocess.hps(picture, antialias=antialias))
        np.testing.assert_allclose(got, want, atol=4e-6, rtol=0, err_msg=size)


def test_the_two_filters_of_hps_tell_large_pictures_apart():
    picture = reference.picture((640, 480))
    wide, narrow = (preprocess.hps(picture, antialias=x) for x in (True, False))
    assert np.abs(wide - narrow).max() > 0.1
    small = reference.picture((100, 64))  # upscaled: the same support, another kernel
    assert preprocess.hps(small).shape == (224, 224, 3)
    exact = preprocess.hps(reference.picture((224, 180)))  # only padded
    assert np.all(exact[:, :22] == -preprocess.MEAN / preprocess.DEVIATION)


def test_crops_begin_where_each_reference_begins():
    rows = np.broadcast_to(np.arange(227, dtype=np.uint8)[:, None, None], (227, 224, 3))
    first = lambda pixels: round(float((pixels[0, 0, 0] * preprocess.DEVIATION[0]
                                        + preprocess.MEAN[0]) * 255))
    assert first(preprocess.clip(rows)) == 2 and first(preprocess.clip_transformers(rows)) == 1


@pytest.mark.parametrize('size', [(343, 336), (300, 401), (100, 64)])
def test_cmmds_pixels_are_cut_before_they_are_resampled(size):
    """cmmd-pytorch: PIL's crop of the middle (rounded down), its bicubic filter, bytes over 255."""
    image = Image.fromarray(reference.picture(size))
    short = min(image.size)
    left, top = ((n - short) // 2 for n in image.size)
    want = np.asarray(image.crop((left, top, left + short, top + short)).resize(
        (336, 336), Image.Resampling.BICUBIC), np.float32) / np.float32(255)
    got = preprocess.cmmd(reference.picture(size))
    np.testing.assert_array_equal(got, (want - preprocess.MEAN) / preprocess.DEVIATION)


@pytest.mark.parametrize('picture', [
    np.zeros((8, 8, 3), np.float32), np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8),
    np.zeros((0, 8, 3), np.uint8)])
@pytest.mark.parametrize('make', [
    preprocess.clip, preprocess.clip_transformers, preprocess.clip_dmd2, preprocess.cmmd,
    preprocess.hps, preprocess.inception_clean, preprocess.inception_dmd2,
    preprocess.inception_patch, preprocess.inception_tensorflow])
def test_what_is_no_picture_is_one_line(make, picture):
    with pytest.raises(ImageError, match=r'expected uint8 .height, width, 3.; convert it') as e:
        make(picture)
    assert len(str(e.value).splitlines()) == 1


def test_a_picture_that_hps_would_make_vanish():
    with pytest.raises(ImageError, match='1000 x 2 is too narrow'):
        preprocess.hps(np.zeros((1000, 2, 3), np.uint8))


def test_tokens_are_open_clips():
    pytest.importorskip('ftfy')
    got = tokens.tokenize(reference.PROMPTS)
    assert got.shape == (len(reference.PROMPTS), 77) and got.dtype == np.int32
    for prompt, row, want in zip(reference.PROMPTS, got, GOLDEN['ids']):
        assert row[:len(want)].tolist() == want and not row[len(want):].any(), prompt


def test_dmd2s_prefix_is_put_in_as_tokens():
    """DMD2: the prompt is cut to 77 first; then three ids go behind its start, and 77 remain."""
    pytest.importorskip('ftfy')
    before, plain = (tokens.tokenize(reference.PROMPTS, prefix=p) for p in (tokens.DMD2_PREFIX, ''))
    assert before[0, :4].tolist() == [49406, 320, 1125, 29340]
    want = np.concatenate([plain[:, :1], before[:, 1:4], plain[:, 1:]], axis=1)[:, :77]
    want[:, 76] = np.where(want[:, 76] > 0, 49407, 0)
    assert any(want[:, 76]) and not all(want[:, 76])
    np.testing.assert_array_equal(before, want)


# --- Networks ---


@pytest.mark.parametrize('act', ['gelu', 'quick_gelu'])
def test_both_towers_are_open_clips(act):
    pixels, ids = reference.clip_inputs()
    scorer = scorers.clip_scorer('tiny', towers(act), Source(), tokenize=ids_of)
    params = scorer.read(tiny_state(), where='here')
    build = lambda: clip.Clip(towers(act), nnx.Rngs(0))

    @jax.jit
    def run(params, pixels, ids):
        return (functional(build, 'embed_image')(params, pixels),
                functional(build, 'embed_text')(params, ids),
                scorer.apply(params, {'pixels': pixels, 'ids': ids}))

    with jax.default_matmul_precision('highest'):
        image, text, cosine = run(params, pixels, ids)
    assert close(reference.sampled(np.asarray(image)), GOLDEN['clip'][act]['image'])
    assert close(reference.sampled(np.asarray(text)), GOLDEN['clip'][act]['text'])
    np.testing.assert_allclose(cosine, np.sum(np.asarray(image) * np.asarray(text), -1), atol=1e-6)


@pytest.mark.parametrize('name', reference.ARCHITECTURES)
def test_full_size_every_tensor_has_open_clips_name_and_shape(name):
    """By the model on the meta device; no weight is held."""
    hollow = {key: np.broadcast_to(np.float32(0), shape)
              for key, shape in unfolded(GOLDEN['clip'][name]).items()}
    cfg = clip.ARCHITECTURES[reference.ARCHITECTURES[name]]
    assert cfg.text.hidden_act == ('quick_gelu' if 'quickgelu' in name else 'gelu')
    abstract = abstract_params(lambda: clip.Clip(cfg, nnx.Rngs(0)))
    states.check(abstract, clip_names.to_transformers(hollow, name), clip_names.entry, name)
    other = clip.ARCHITECTURES['ViT-H-14' if name != 'ViT-H-14' else 'ViT-g-14']
    with pytest.raises(WeightsError, match='of this architecture'):
        states.check(abstract_params(lambda: clip.Clip(other, nnx.Rngs(0))),
                     clip_names.to_transformers(hollow, name), clip_names.entry, name)


def inception_state():
    abstract = abstract_params(lambda: inception.Inception(nnx.Rngs(0)))
    shapes = {inception.entry(path).name: inception.entry(path).shape(leaf.shape)
              for path, leaf in flat.flatten(abstract).items()}
    return {**shapes, 'fc.weight': (1008, 2048), 'fc.bias': (1008,)}


def test_inceptions_names_are_torch_fidelitys():
    assert reference.names(inception_state()) == GOLDEN['inception']['names']


@pytest.mark.slow
def test_inceptions_features_are_torch_fidelitys():
    scorer = scorers.inception_features('FID', lambda picture: picture.astype(np.float32))
    state = reference.weights(inception_state()) | {'x.bn.num_batches_tracked': np.zeros(())}
    picture = reference.picture((reference.SMALL, reference.SMALL))
    got = scorers.run(scorer, scorer.read(state, where='here'), [picture], batch=1)
    assert got.shape == (1, inception.FEATURES)
    assert close(reference.sampled(got), GOLDEN['inception']['features'])


def test_the_aesthetic_head_is_its_matrices_one_after_the_other():
    random = np.random.default_rng(0)
    widths = (EMBED, *scorers.HEAD)
    mlp = {f'layers.{i}.{leaf}': random.standard_normal(
        (dout, din) if leaf == 'weight' else (dout,)).astype(np.float32) / np.sqrt(din)
        for i, din, dout in zip(scorers.HEAD_LAYERS, widths, widths[1:])
        for leaf in ('weight', 'bias')}
    scorer = scorers.aesthetic('aesthetic', towers(), Source(), Source())
    params = scorer.read(tiny_state(), mlp, where='here')
    assert set(params['clip']) == {'class_token', 'layers', 'norm', 'norm_in', 'patch', 'position',
                                   'projection'}  # no text tower
    pictures = [reference.picture(size) for size in ((40, 60), (28, 29))]
    got = scorers.run(scorer, params, pictures, batch=2)
    embeds = scorers.run(scorers.clip_features('e', towers(), Source(), pixels=preprocess.clip),
                         params['clip'], pictures, batch=2)
    np.testing.assert_allclose(np.linalg.norm(embeds, axis=1), 1, atol=1e-6)
    want = embeds
    for i in scorers.HEAD_LAYERS:
        want = want @ mlp[f'layers.{i}.weight'].T + mlp[f'layers.{i}.bias']
    assert close(got, want[:, 0])


# --- ImageReward ---

WORDS = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', 'a', 'red', 'apple', 'cafe', '##s', '!', '猫']


@pytest.fixture(scope='module')
def reward(tmp_path_factory):
    """A tiny ImageReward over a vocabulary of eleven words."""
    file = tmp_path_factory.mktemp('bert') / 'vocab.txt'
    file.write_text('\n'.join(WORDS) + '\n')
    b, v = reference.BERT, reference.VIT
    image = clip.ClipImageConfig(v['img_size'], v['patch_size'], v['embed_dim'], 4 * v['embed_dim'],
                                 v['depth'], v['num_heads'], 'gelu', 1e-6, 0)
    return scorers.image_reward(str(file.parent), blip.BlipConfig(
        image, *(b[name] for name in ('vocab_size', 'hidden_size', 'intermediate_size',
                                      'num_hidden_layers', 'num_attention_heads',
                                      'max_position_embeddings'))))


def test_rewards_are_image_rewards(reward):
    state = reference.weights(unfolded(GOLDEN['reward']['shapes']))
    state['blip.text_encoder.embeddings.position_ids'] = np.zeros((1, 50))
    pixels, ids, mask = reference.reward_inputs()
    params = reward.read(state, where='here')
    with jax.default_matmul_precision('highest'):
        got = jax.jit(reward.apply)(params, {'pixels': pixels, 'ids': ids, 'mask': mask})
    print(np.abs(np.asarray(got) - GOLDEN['reward']['reward']).max())  # shown by pytest -rP
    assert close(got, GOLDEN['reward']['reward'])
    nothing = {**params, 'head': jax.tree.map(np.zeros_like, params['head'])}
    got = jax.jit(reward.apply)(nothing, {'pixels': pixels, 'ids': ids, 'mask': mask})
    np.testing.assert_allclose(got, -0.16717362830052426 / 1.0333394966054072, rtol=1e-6)
    ones = {**nothing, 'head': {**nothing['head'], '7': {
        'kernel': nothing['head']['7']['kernel'], 'bias': np.ones(1, np.float32)}}}
    above = jax.jit(reward.apply)(ones, {'pixels': pixels, 'ids': ids, 'mask': mask})
    np.testing.assert_allclose(above - got, 1 / 1.0333394966054072, rtol=1e-6)
    del state['mlp.layers.7.bias']
    with pytest.raises(WeightsError, match='here lacks the tensor layers.7.bias'):
        reward.read(state, where='here')


def test_full_size_every_tensor_has_image_rewards_name_and_shape():
    hollow = {key: np.broadcast_to(np.float32(0), shape)
              for key, shape in unfolded(GOLDEN['reward']['full']).items()}
    abstract = abstract_params(lambda: blip.Blip(blip.BlipConfig(), nnx.Rngs(0)))
    states.check(abstract, blip.separate(hollow), blip.entry, 'here')
    rest = {name.split('.')[1] for name in hollow if name.startswith('blip.')}
    assert rest == {'visual_encoder', 'text_encoder', 'vision_proj', 'text_proj'}
    scorers.read_head({name.removeprefix('mlp.'): x for name, x in hollow.items()
                       if name.startswith('mlp.')}, 768, 'here')


def test_prompts_are_cut_and_padded_for_bert(reward):
    got = reward.inputs([reference.picture((40, 33))] * 3, ['A red, Cafés!', '猫', 'apple ' * 50])
    assert got['pixels'].shape == (3, 32, 32, 3) and got['ids'].shape == (3, 35)
    assert got['ids'][0, :9].tolist() == [2, 4, 5, 1, 7, 8, 9, 3, 0]
    assert got['ids'][1, :4].tolist() == [2, 10, 3, 0]
    assert got['ids'][2].tolist() == [2, *[6] * 33, 3]
    assert got['mask'].sum(1).tolist() == [8, 3, 35] and got['mask'].dtype == bool


@pytest.mark.parametrize('content, words', [
    (None, 'no weights at'), ('a\nb\n', r"has no \[PAD\]; give bert-base-uncased's vocab.txt"),
    ('\udcff', 'cannot be read .*vocab.txt')])
def test_a_vocabulary_that_is_not_berts(tmp_path, content, words):
    file = tmp_path / 'v.txt'
    if content is not None:
        file.write_bytes(content.encode('utf-8', 'surrogateescape'))
    with pytest.raises(WeightsError, match=words) as e:
        scorers.image_reward(str(file))
    assert len(str(e.value).splitlines()) == 1


# --- Scoring ---


@pytest.fixture(scope='module')
def params():
    return TINY.read(tiny_state(), where='here')


PICTURES = [reference.picture((30 + 3 * i, 50 - 2 * i)) for i in range(7)]
TEXTS = ['abc', 'a longer one', '', 'abc', 'x y z', 'z', 'again']


def test_a_score_depends_on_its_picture_and_prompt_alone(params):
    """Not on the batch, on what stands beside it in one, or on how the last one is filled."""
    whole = scorers.run(TINY, params, PICTURES, TEXTS, batch=4)
    assert whole.shape == (7,) and whole.std() > 0.01
    np.testing.assert_allclose(
        scorers.run(TINY, params, iter(PICTURES), TEXTS, batch=3), whole, atol=1e-6)
    turned = scorers.run(TINY, params, PICTURES[::-1], TEXTS[::-1], batch=4)
    np.testing.assert_array_equal(turned[::-1], whole)
    scaled = scorers.clip_scorer('scaled', towers(), Source(), tokenize=ids_of, scaled=True)
    np.testing.assert_allclose(scorers.run(scaled, params, PICTURES, TEXTS, batch=4),
                               whole * np.exp(3), rtol=1e-5)


def test_scores_on_a_mesh_are_those_of_one_device(params, tmp_path):
    from ddmd_jax.parallel import sharding

    mesh = sharding.make_mesh({'data': 1, 'fsdp': 1, 'tensor': 1}, jax.devices()[:1])
    safetensors.numpy.save_file(tiny_state(), tmp_path / 'open_clip_model.safetensors')
    placed = scorers.load(TINY, [str(tmp_path)], mesh)
    np.testing.assert_array_equal(scorers.run(TINY, placed, PICTURES, TEXTS, batch=4, mesh=mesh),
                                  scorers.run(TINY, params, PICTURES, TEXTS, batch=4))


def test_two_devices_share_a_batch(tmp_path):
    """In a process of its own: here there is one device."""
    safetensors.numpy.save_file(tiny_state(), tmp_path / 'open_clip_model.safetensors')
    assert 'scored by two' in tiny.run_on_devices(__file__, 2, tmp_path)


def by_two(folder):
    from ddmd_jax.parallel import sharding

    rows, inputs = [], TINY.inputs
    counted = dataclasses.replace(TINY, inputs=lambda pictures, texts: (
        rows.append(len(pictures)) or inputs(pictures, texts)))
    mesh = sharding.make_mesh({'data': 2}, jax.devices())
    two = scorers.run(counted, scorers.load(TINY, [folder], mesh), PICTURES, TEXTS, batch=3,
                      mesh=mesh)
    one = scorers.run(TINY, scorers.load(TINY, [folder]), PICTURES, TEXTS, batch=4)
    np.testing.assert_allclose(two, one, atol=1e-6)
    assert set(rows) == {4}  # three do not divide by two
    print('scored by two')


def test_what_cannot_be_scored_is_one_line(params):
    run = functools.partial(scorers.run, TINY, batch=4)
    cases = {
        'more pictures than 6 prompts': lambda: run(params, PICTURES, TEXTS[:6]),
        'more pictures than 4 prompts': lambda: run(params, PICTURES, TEXTS[:4]),
        '6 pictures for 7 prompts': lambda: run(params, PICTURES[:6], TEXTS),
        'there are no pictures': lambda: run(params, [], []),
        'tiny of picture 0 is not finite': lambda: run(
            {**params, 'image': jax.tree.map(lambda x: x * np.nan, params['image'])},
            PICTURES, TEXTS),
        'wants 1 files of weights, 2 are given.*some/where': lambda: scorers.load(
            TINY, ['a', 'b']),
    }
    for words, call in cases.items():
        with pytest.raises(ScoreError, match=words) as e:
            call()
        assert len(str(e.value).splitlines()) == 1


def test_the_table_says_where_every_weight_comes_from():
    for name, scorer in scorers.SCORERS.items():
        for source in scorer.sources:
            assert source.hub or (source.file and source.sha256 and source.remark), name
    titles = [scorer.title for scorer in scorers.SCORERS.values()]
    assert len(titles) == len(scorers.SCORERS) >= 13


# --- Weights ---


def test_weights_are_read_from_files_and_folders(tmp_path, params):
    file = tmp_path / 'some.safetensors'
    safetensors.numpy.save_file(tiny_state(), file)
    folder = tmp_path / 'transformers'
    folder.mkdir()
    both = clip_names.to_transformers(tiny_state(), 'here')
    safetensors.numpy.save_file({k: np.array(x, order='C') for k, x in both.items()},
                                folder / 'model.safetensors')
    for path in (file, folder):
        got = flat.flatten(scorers.load(TINY, [str(path)]))
        for name, want in flat.flatten(params).items():
            np.testing.assert_array_equal(got[name], want)
        assert got['logit_scale'].shape == ()


def test_a_published_file_is_known_by_its_hash(tmp_path, monkeypatch):
    file = tmp_path / 'known.safetensors'
    safetensors.numpy.save_file(tiny_state(), file)
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    source = lambda start: Source(None, 'known.safetensors', start)
    make = lambda start: scorers.clip_scorer('tiny', towers(), source(start), tokenize=ids_of)
    scorers.load(make(sha256[:8]), [str(tmp_path)])  # found in its folder
    with pytest.raises(WeightsError, match=f'its sha256 begins {sha256[:12]}, expected 0123456789'):
        scorers.load(make('0123456789abcdef'), [str(file)])
    renamed = file.rename(tmp_path / 'converted.safetensors')
    scorers.load(make('0123456789abcdef'), [str(renamed)])  # not the published file's name


@pytest.mark.parametrize('spoil, words', [
    (lambda s: s.pop('visual.ln_post.bias'), r'lacks the tensor vision_model.post_layernorm.bias'),
    (lambda s: s.update({'visual.proj': np.zeros((32, 99), np.float32)}),
     r'visual_projection.weight has shape .99, 32., expected .16, 32.'),
    (lambda s: s.update({'visual.attn_pool.query': np.zeros(3, np.float32)}),
     r'holds visual.attn_pool.query, which no CLIP of this kind has'),
    (lambda s: s.update({f'transformer.resblocks.2.{name}': s[f'transformer.resblocks.1.{name}']
                         for name in ('ln_1.weight', 'ln_1.bias')}),
     r'holds 2 tensors that this architecture does not have, text_model.encoder.layers.2'),
    (lambda s: (s.pop('visual.proj'), s.pop('visual.conv1.weight')),
     r'no CLIP of open_clip or transformers'),
])
def test_another_architecture_is_one_line(tmp_path, spoil, words):
    state = dict(tiny_state())
    spoil(state)
    safetensors.numpy.save_file(state, tmp_path / 'x.safetensors')
    with pytest.raises(WeightsError, match=words) as e:
        scorers.load(TINY, [str(tmp_path / 'x.safetensors')])
    assert len(str(e.value).splitlines()) == 1 and 'x.safetensors' in str(e.value)


def archive(path, data, entry='x/data.pkl'):
    with zipfile.ZipFile(path, 'w') as file:
        file.writestr(entry, data)


class Command:
    def __reduce__(self):
        return os.system, ('touch run',)


@pytest.mark.parametrize('write', [
    lambda path: archive(path, pickle.dumps({'a': Command()})),
    lambda path: path.write_bytes(pickle.dumps(torch_files.MAGIC) + pickle.dumps(1001)
                                  + pickle.dumps({}) + pickle.dumps({'a': Command()}))])
def test_a_file_of_tensors_runs_nothing(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / 'x.pt')
    with pytest.raises(WeightsError, match=r'x.pt names posix.system, which is no tensor') as e:
        states.read(tmp_path / 'x.pt')
    assert not (tmp_path / 'run').exists() and len(str(e.value).splitlines()) == 1


@pytest.mark.parametrize('data', [
    b'', b'not a pickle', pickle.dumps(3), pickle.dumps(torch_files.MAGIC)])
def test_a_damaged_file_is_one_line(tmp_path, data):
    (tmp_path / 'x.pt').write_bytes(data)
    with pytest.raises(WeightsError, match=r'weights damaged: .*x.pt .*fetch it again') as e:
        states.read(tmp_path / 'x.pt')
    assert len(str(e.value).splitlines()) == 1


def test_a_file_without_tensors_or_none_at_all(tmp_path):
    archive(tmp_path / 'x.pt', pickle.dumps({'epoch': 3}))
    with pytest.raises(WeightsError, match='holds no tensors by name'):
        states.read(tmp_path / 'x.pt')
    archive(tmp_path / 'y.pt', b'', 'x/other')
    with pytest.raises(WeightsError, match='no data.pkl in it'):
        states.read(tmp_path / 'y.pt')
    with pytest.raises(WeightsError, match='has none of model.safetensors'):
        states.read(tmp_path)
    for path in ('/no/such/file.pt', './x', 'folder/weights.safetensors', 'name'):
        with pytest.raises(WeightsError, match=f'no weights at {path}; give a file, a folder'):
            states.find(path)


def test_a_tensor_cannot_reach_out_of_its_storage():
    storage = np.arange(6, dtype=np.float32)
    np.testing.assert_array_equal(torch_files._tensor(storage, 1, (2, 2), (1, 2)),
                                  [[1, 3], [2, 4]])
    for offset, size, stride in ((0, (7,), (1,)), (-1, (2,), (1,)), (5, (2,), (-1,)),
                                 (0, (2, 3), (4, 1))):
        with pytest.raises(ValueError, match='outside its storage'):
            torch_files._tensor(storage, offset, size, stride)


def test_clip_scores_ask_for_ftfy(monkeypatch):
    import builtins

    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == 'ftfy':
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, '__import__', without)
    with pytest.raises(UserError, match='pip install ftfy'):
        tokens.tokenize(['a'])
    assert tokens.tokenize(['a'], 'transformers')[0, :4].tolist() == [49406, 320, 49407, 0]


def test_a_changed_vocabulary_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, 'VOCABULARY', tmp_path / 'v.gz')
    with pytest.raises(WeightsError, match='v.gz is missing'):
        tokens._vocabulary()
    (tmp_path / 'v.gz').write_bytes(io.BytesIO(b'x').getvalue())
    with pytest.raises(WeightsError, match="v.gz is not CLIP's vocabulary"):
        tokens._vocabulary()


if __name__ == '__main__':
    by_two(sys.argv[1])
