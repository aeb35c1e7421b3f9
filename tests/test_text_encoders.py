"""Text encoders of the published teachers without PyTorch: states, tokens, folders, refusals."""

import dataclasses
import json
import re
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import published_text as published
import pytest
import safetensors.numpy
import tiny
from flax import nnx

from ddmd_jax import families
from ddmd_jax.families import LoadOptions
from ddmd_jax.families.lumina import text as lumina
from ddmd_jax.families.published_text import IDS
from ddmd_jax.families.sdxl import text as sdxl
from ddmd_jax.families.zimage import text as zimage
from ddmd_jax.models.layers import abstract_params, functional
from ddmd_jax.models.text import causal, clip, gemma2, qwen3
from ddmd_jax.parallel import sharding
from ddmd_jax.weights import flat
from ddmd_jax.weights.flat import WeightsError


def load(family, folder, dtype='float32', mesh=None):
    return families.get(family).load_text(LoadOptions(str(folder), mesh, dtype))


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    """(folder, its parameters) of every family."""
    root = tmp_path_factory.mktemp('pipelines')
    return {family: (root / family, published.write(family, root / family))
            for family in published.PIPELINES}


@pytest.fixture(scope='module')
def encoders(written):
    return {family: load(family, folder) for family, (folder, _) in written.items()}


@pytest.fixture
def folder(written, tmp_path):
    """A copy of Lumina's, to be damaged."""
    return shutil.copytree(written['lumina'][0], tmp_path / 'lumina')


def run(encoder, tokens):
    return jax.device_get(jax.jit(encoder.apply)(encoder.params, tokens))


def random_tokens(length, rows=2, seed=0):
    ids = np.random.default_rng(seed).integers(3, published.VOCAB, (rows, length))
    return {'ids': ids.astype(np.int32), 'ids_2': ids.astype(np.int32),
            'mask': np.ones((rows, length), bool)}


def close(a, b, share=2e-5):
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    assert a.shape == b.shape and np.abs(a - b).max() <= share * np.sqrt(np.mean(b**2))


# --- What comes out ---


@pytest.mark.parametrize('family, length, width', [
    ('lumina', 256, 24), ('sdxl', 77, 24 + 32), ('zimage', 512, 24)])
def test_shapes_and_what_the_encoder_says_of_itself(encoders, family, length, width):
    encoder = encoders[family]
    assert (encoder.name, encoder.length, encoder.width) == (family, length, width)
    assert encoder.cuts == (family != 'sdxl') and re.fullmatch('[0-9a-f]{16}', encoder.identity)
    tokens = encoder.tokenize(published.PROMPTS)
    names = {'ids', 'mask'} | ({'ids_2'} if family == 'sdxl' else set())
    assert tokens.keys() == names and tokens['mask'].dtype == bool
    assert all(tokens[n].dtype == np.int32 for n in names - {'mask'})
    assert all(x.shape == (3, length) for x in tokens.values())
    cond = jax.eval_shape(encoder.apply, encoder.params, tokens)
    assert cond['embeds'].shape == (3, length, width) and cond['mask'].shape == (3, length)
    assert ('pooled' in cond) == (family == 'sdxl')
    assert family != 'sdxl' or cond['pooled'].shape == (3, 20)


@pytest.mark.parametrize('family', ['lumina', 'zimage'])
def test_real_tokens_do_not_see_padding(encoders, family):
    """Neither how much of it there is, nor what it is: rows may be cut to a batch's longest."""
    tokens = encoders[family].tokenize(published.PROMPTS)
    longest = tokens['mask'].sum(1).max()
    assert 12 < longest < 60
    want = run(encoders[family], {k: x[:, :60] for k, x in tokens.items()})
    cut = {k: x[:, :longest] for k, x in tokens.items()}
    got = run(encoders[family], cut)
    assert np.isfinite(want['embeds']).all()
    close(got['embeds'][cut['mask']], want['embeds'][:, :longest][cut['mask']])
    other = cut | {'ids': np.where(cut['mask'], cut['ids'], 9)}
    assert (other['ids'] != cut['ids']).any()
    close(run(encoders[family], other)['embeds'][cut['mask']], got['embeds'][cut['mask']])


@pytest.mark.parametrize('family', published.PIPELINES)
def test_tokens_see_only_what_is_before_them(encoders, family):
    tokens = random_tokens(20)
    later = jax.tree.map(np.copy, tokens)
    for name in IDS:
        later[name][:, 12] += 1 - 2 * (later[name][:, 12] == published.VOCAB - 1)
    a, b = (run(encoders[family], t)['embeds'] for t in (tokens, later))
    np.testing.assert_array_equal(a[:, :12], b[:, :12])
    assert np.abs(a[:, 12:] - b[:, 12:]).max(-1).min() > 1e-3


@pytest.mark.parametrize('family', ['lumina', 'zimage'])
def test_the_states_are_those_before_the_last_layer(written, encoders, family):
    """The last layer and the norm, put by hand behind them, give what the whole model gives."""
    params = written[family][1]['text_encoder']
    component, = published.PIPELINES[family].components
    cfg = component.config(published.COMPONENTS[family]['text_encoder'][1], 'float32')
    tokens = random_tokens(9)
    before = run(encoders[family], tokens)['embeds']
    assert jax.tree.leaves(encoders[family].params['text_encoder']['layers'])[0].shape[0] == 3

    module = {'lumina': gemma2.Gemma2Layer, 'zimage': qwen3.Qwen3Layer}[family]
    # All four layers count, so that the last is looked up as the fourth.
    every = dataclasses.replace(cfg, penultimate=False)
    layer = functional(lambda: module(every, nnx.Rngs(0)))
    last = jax.tree.map(lambda x: x[-1], params['layers'])
    mask, angles = causal.causal_mask(tokens['mask'], 9), causal.positions(cfg, 9)
    if family == 'lumina':  # its fourth layer does not slide
        x, number = layer(last, (before, jnp.int32(3)), mask, jnp.zeros_like(mask), angles)
        assert number == 4
    else:
        x = layer(last, before, mask, angles)
    weight = params['norm']['weight'] + (family == 'lumina')
    got = x / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + 1e-6) * weight
    want = functional(lambda: component.module(every, nnx.Rngs(0)))(
        params, tokens['ids'], tokens['mask'])
    close(got, want)


def test_clips_states_are_those_before_the_last_layer_too(written, encoders):
    """Whether it is run, as in bigG, or not, as in CLIP-L: layer by layer, and then pooled."""
    tokens, width = random_tokens(9), published.CLIP['hidden_size']
    ids, mask = tokens['ids'], causal.causal_mask(None, 9)
    got = run(encoders['sdxl'], tokens)
    parts = got['embeds'][..., :width], got['embeds'][..., width:]
    for c, part in zip(published.PIPELINES['sdxl'].components, parts):
        params = written['sdxl'][1][c.folder]
        cfg = c.config(published.COMPONENTS['sdxl'][c.folder][1], 'float32')
        layer = jax.jit(functional(lambda cfg=cfg: clip.ClipLayer(cfg, nnx.Rngs(0))))
        x = params['token']['embedding'][ids] + params['position']['embedding'][:9]
        for i in range(cfg.num_hidden_layers):
            x, before = layer(jax.tree.map(lambda p, i=i: p[i], params['layers']), (x, x), mask)
        close(part, before)
    at_end = np.asarray(x)[np.arange(2), ids.argmax(1)]
    centred = at_end - at_end.mean(-1, keepdims=True)
    normed = centred / np.sqrt(np.mean(centred**2, -1, keepdims=True) + 1e-5)
    normed = normed * params['norm']['scale'] + params['norm']['bias']
    close(got['pooled'], normed @ params['projection']['kernel'])


def test_a_window_hides_what_is_far_behind():
    """One sliding layer: a token `window` places back is out of sight, the next one is not."""
    cfg = gemma2.Gemma2Config(**{k: v for k, v in published.GEMMA2.items() if
                                 k != 'hidden_activation'} | {
        'num_hidden_layers': 2, 'sliding_window': 5})
    make = lambda: gemma2.Gemma2(cfg, nnx.Rngs(0))
    params = published.random_params(abstract_params(make), 0)
    tokens = random_tokens(12, rows=1)
    one = jax.jit(functional(make))
    a = one(params, tokens['ids'], tokens['mask'])
    ids = tokens['ids'].copy()  # the first call may not have read its own yet
    ids[0, 2] = 3 if ids[0, 2] != 3 else 4
    moved = np.abs(one(params, ids, tokens['mask']) - a).max(-1)[0]
    assert (moved[2:7] > 1e-4).all() and (moved[7:] == 0).all() and (moved[:2] == 0).all()


def test_the_kinds_of_gemmas_layers():
    assert gemma2.Gemma2Config().slides == (True, False) * 12 + (True,)
    kinds = (gemma2.FULL, gemma2.SLIDING, gemma2.FULL)
    assert gemma2.Gemma2Config(num_hidden_layers=3, layer_types=kinds).slides == (False, True)
    with pytest.raises(ValueError, match='layer_types must be 26'):
        gemma2.Gemma2Config(layer_types=kinds)


@pytest.mark.parametrize('eos, want', [(2, [3, 0]), (7, [1, 2]), (99, [0, 0])])
def test_the_end_token(eos, want):
    ids = jnp.asarray([[5, 7, 7, 9], [9, 2, 7, 9]])
    assert clip.end_of_text(ids, eos).tolist() == want


def test_clip_has_so_many_places():
    cfg = clip.ClipConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=2)
    make = lambda: clip.ClipText(cfg, nnx.Rngs(0))
    with pytest.raises(ValueError, match='78 tokens, but CLIP has 77 places'):
        jax.eval_shape(functional(make), abstract_params(make), jnp.zeros((1, 78), int))


@pytest.mark.parametrize('family', published.PIPELINES)
def test_bfloat16_is_near(written, encoders, family):
    low = load(family, written[family][0], 'bfloat16')
    large = {x.dtype for path, x in flat.flatten(low.params).items()
             if path.endswith(('kernel', 'embedding'))}
    assert large == {jnp.dtype(jnp.bfloat16)} and low.identity == encoders[family].identity
    tokens = random_tokens(20)
    got, want = run(low, tokens), run(encoders[family], tokens)
    for name in want.keys() - {'mask'}:
        assert got[name].dtype == jnp.bfloat16
        error = np.asarray(got[name], np.float32) - want[name]
        assert np.sqrt(np.mean(error**2)) < 0.03 * np.sqrt(np.mean(want[name]**2))


# --- Tokens ---


def test_lumina_reads_the_system_prompt_but_for_the_null_prompt(encoders):
    tokenizer = published.tokenizer('lumina')
    tokens = encoders['lumina'].tokenize(['a red apple', ''])
    own = [row[mask].tolist() for row, mask in zip(tokens['ids'], tokens['mask'])]
    assert own[1] == [tokenizer.bos_token_id]
    assert tokenizer.decode(own[0][1:]) == lumina.full_prompt('a red apple')
    assert own[0][0] == tokenizer.bos_token_id and tokenizer.eos_token_id not in own[0]
    assert tokens['mask'][:, 0].all()  # on the right, though the tokenizer itself says left


def test_zimage_reads_the_chat_template(encoders):
    tokens = encoders['zimage'].tokenize(['a taco', ''])
    words = [published.tokenizer('zimage').decode(row[mask])
             for row, mask in zip(tokens['ids'], tokens['mask'])]
    frame = '<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n'
    assert words == [frame.format('a taco'), frame.format('')]


@pytest.mark.parametrize('family', published.PIPELINES)
def test_who_loses_an_end_is_who_has_more_tokens_than_the_encoder_takes(encoders, family):
    """Whatever stands around the prompt counts; one more letter than fits is a token too many."""
    encoder, prompt = encoders[family], 'x'
    while not encoder.cut([prompt + ' x'])[0]:
        prompt += ' x'
    whole, cut = (encoder.tokenize([text]) for text in (prompt, prompt + ' x'))
    assert encoder.cut(['', prompt, prompt + ' x', prompt * 9]).tolist() == [False] * 2 + [True] * 2
    assert whole['mask'].shape == (1, encoder.length)
    if encoder.cuts:  # else the mask does not tell
        assert whole['mask'].sum() in (encoder.length, encoder.length - 1)
        assert cut['mask'].all()


def test_sdxl_reads_all_places_of_both_tokenizers(encoders):
    tokens = encoders['sdxl'].tokenize(['a taco', ''])
    assert tokens['mask'].all()
    one, two = published.tokenizer('sdxl'), published.tokenizer('sdxl', second=True)
    assert one.pad_token_id == one.eos_token_id != two.pad_token_id
    start, end = one.bos_token_id, one.eos_token_id
    assert tokens['ids'][1].tolist() == [start] + [end] * 76
    assert tokens['ids_2'][1].tolist() == [start, end] + [two.pad_token_id] * 75


@pytest.mark.parametrize('index, want', [
    ({'force_zeros_for_empty_prompt': True}, True),
    ({'force_zeros_for_empty_prompt': False}, False), ({}, True)])
def test_what_sdxls_pipeline_guides_away_from(index, want):
    assert sdxl.null_is_zeros(index) == want


# --- Names and shapes at full size ---

GEMMA2_LAYER = {
    'input_layernorm': (2304,), 'post_attention_layernorm': (2304,),
    'pre_feedforward_layernorm': (2304,), 'post_feedforward_layernorm': (2304,),
    'self_attn.q_proj': (2048, 2304), 'self_attn.k_proj': (1024, 2304),
    'self_attn.v_proj': (1024, 2304), 'self_attn.o_proj': (2304, 2048),
    'mlp.gate_proj': (9216, 2304), 'mlp.up_proj': (9216, 2304), 'mlp.down_proj': (2304, 9216)}
QWEN3_LAYER = {
    'input_layernorm': (2560,), 'post_attention_layernorm': (2560,),
    'self_attn.q_proj': (4096, 2560), 'self_attn.k_proj': (1024, 2560),
    'self_attn.v_proj': (1024, 2560), 'self_attn.o_proj': (2560, 4096),
    'self_attn.q_norm': (128,), 'self_attn.k_norm': (128,),
    'mlp.gate_proj': (9728, 2560), 'mlp.up_proj': (9728, 2560), 'mlp.down_proj': (2560, 9728)}


def decoder(layer, count, vocab, width):
    return {'embed_tokens.weight': (vocab, width), 'norm.weight': (width,)} | {
        f'layers.{i}.{name}.weight': shape for i in range(count) for name, shape in layer.items()}


def tower(width, inner, count, projected):
    parts = {'self_attn.q_proj': (width, width), 'self_attn.k_proj': (width, width),
             'self_attn.v_proj': (width, width), 'self_attn.out_proj': (width, width),
             'mlp.fc1': (inner, width), 'mlp.fc2': (width, inner), 'layer_norm1': (width,),
             'layer_norm2': (width,)}
    layer = {f'{name}.weight': shape for name, shape in parts.items()} | {
        f'{name}.bias': shape[:1] for name, shape in parts.items()}
    return {'embeddings.token_embedding.weight': (49408, width),
            'embeddings.position_embedding.weight': (77, width),
            'final_layer_norm.weight': (width,), 'final_layer_norm.bias': (width,),
            **({'text_projection.weight': (width, width)} if projected else {})} | {
        f'encoder.layers.{i}.{n}': s for i in range(count) for n, s in layer.items()}


@pytest.mark.parametrize('module, cfg, entry, want, size', [
    (gemma2.Gemma2, gemma2.Gemma2Config(), lumina.entry,
     decoder(GEMMA2_LAYER, 26, 256000, 2304), 2_614_341_888),
    (qwen3.Qwen3, qwen3.Qwen3Config(), zimage.entry,
     decoder(QWEN3_LAYER, 36, 151936, 2560), 4_022_468_096),
    (clip.ClipText, clip.ClipConfig(), sdxl.entry, tower(768, 3072, 12, False), 123_060_480),
    (clip.ClipText, clip.BIG_G, sdxl.entry, tower(1280, 5120, 32, True), 694_659_840),
], ids=['gemma-2-2b', 'qwen3-4b', 'clip-l', 'bigG'])
def test_full_size(module, cfg, entry, want, size):
    whole = dataclasses.replace(cfg, penultimate=False)
    abstract = flat.flatten(abstract_params(lambda: module(whole, nnx.Rngs(0))))
    found = [(name, entry(path).shape(leaf.shape)) for path, leaf in abstract.items()
             for name in entry(path).names(leaf.shape)]
    assert len(found) == len(dict(found)) and dict(found) == want
    assert sum(leaf.size for leaf in abstract.values()) == size
    # And every matrix and table of it is split, on a mesh of a pod's size.
    mesh = jax.sharding.AbstractMesh((4, 16, 4), sharding.AXES)
    rules = sys.modules[module.__module__].RULES
    for path, leaf in abstract.items():
        split = set(sharding.spec_for(path, leaf.shape, rules, mesh)) - {None}
        large = path.endswith(('kernel', 'token/embedding'))
        assert split == ({'fsdp', 'tensor'} if path.endswith('kernel') else
                         {'fsdp'} if large else set()), path


def test_unknown_parameters_have_no_name():
    for names in (lumina, zimage, sdxl):
        for path in ('layers/attn/to_x/kernel', 'odd/weight', 'layers/norm9/scale'):
            with pytest.raises(KeyError):
                names.entry(path)


# --- Folders ---


def rewrite(folder, change):
    """Applies `change` to all tensors of a component, which becomes one file."""
    tensors = {}
    for file in folder.glob('*.safetensors'):
        tensors |= safetensors.numpy.load_file(file)
        file.unlink()
    (folder / 'model.safetensors.index.json').unlink(missing_ok=True)
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / 'model.safetensors', metadata={'format': 'pt'})


def reconfigure(folder, **changes):
    file = folder / 'config.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize('family', published.PIPELINES)
def test_every_value_comes_back_but_what_is_not_run(written, encoders, family):
    for component, params in written[family][1].items():
        got, want = (flat.flatten(x) for x in (encoders[family].params[component], params))
        extra = want.keys() - got.keys()
        run_all = component == 'text_encoder_2'  # for pooling
        assert extra == (set() if run_all else
                         {'norm/scale', 'norm/bias'} if family == 'sdxl' else {'norm/weight'})
        for path, leaf in got.items():
            short = path.startswith('layers/') and not run_all
            np.testing.assert_array_equal(leaf, want[path][:-1] if short else want[path])


@pytest.mark.parametrize('family, prefix, extras', [
    ('lumina', 'model.', {'lm_head.weight': np.zeros((4, 4), np.float32)}),
    ('zimage', 'model.', {'model.rotary_emb.inv_freq': np.zeros(4, np.float32)}),
    ('sdxl', 'text_model.', {'text_model.embeddings.position_ids': np.arange(77)[None]}),
])
def test_prefixes_and_known_extras_change_nothing(written, encoders, family, prefix, extras,
                                                  tmp_path):
    copy = shutil.copytree(written[family][0], tmp_path / family)

    def change(tensors):
        for name in [n for n in tensors if n != 'text_projection.weight']:
            tensors[prefix + name] = tensors.pop(name)
        tensors.update(extras)

    for component in written[family][1]:
        rewrite(copy / component, change)
    if family == 'lumina':
        reconfigure(copy / 'text_encoder', architectures=['Gemma2ForCausalLM'])
    got = load(family, copy)
    jax.tree.map(np.testing.assert_array_equal, got.params, encoders[family].params)
    assert got.identity == encoders[family].identity


def test_code_that_comes_with_a_tokenizer_is_not_run(written, tmp_path):
    """An `auto_map` names a class in a file of the folder: `trust_remote_code` would import it."""
    folder = tmp_path / 'folder'
    shutil.copytree(written['lumina'][0], folder)
    file = folder / 'tokenizer/tokenizer_config.json'
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {
        'tokenizer_class': 'Trap', 'auto_map': {'AutoTokenizer': ['trap.Trap', 'trap.Trap']}}))
    (folder / 'tokenizer/trap.py').write_text(
        f'open({str(tmp_path / "sprung")!r}, "w").close()\nclass Trap: pass\n')
    try:
        load('lumina', folder)
    except WeightsError as e:  # refused or read without it: either will do
        assert len(str(e).splitlines()) == 1
    assert not (tmp_path / 'sprung').exists()


def test_rotary_bases_of_old_and_new_configs(written):
    old = json.loads((written['lumina'][0] / 'text_encoder/config.json').read_text())
    assert old['rope_theta'] == lumina.model_config(old).rope_theta == 10000.0
    new = json.loads((written['zimage'][0] / 'text_encoder/config.json').read_text())
    assert 'rope_theta' not in new and zimage.model_config(new).rope_theta == 1e6


# --- Refusals: one line, naming what and where ---


def no_pipeline(folder):
    (folder / 'model_index.json').unlink()
    return 'model_index.json is missing'


def another_pipeline(folder):
    (folder / 'model_index.json').write_text('{"_class_name": "FluxPipeline"}')
    return 'is a FluxPipeline, not Lumina2Pipeline'


def no_encoder(folder):
    shutil.rmtree(folder / 'text_encoder')
    return r'text_encoder/config.json is missing'


def no_tokenizer(folder):
    shutil.rmtree(folder / 'tokenizer')
    return r'/tokenizer has no tokenizer_config.json; fetch the folder again'


def no_vocabulary(folder):
    (folder / 'tokenizer/tokenizer.json').unlink()
    return r'no tokenizer can be made of .*/tokenizer \(.*fetch the folder again'


def broken_tokenizer(folder):
    (folder / 'tokenizer/tokenizer.json').write_text('{"version": ')
    return r'no tokenizer can be made of .*/tokenizer \('


def no_pad_token(folder):
    file = folder / 'tokenizer/tokenizer_config.json'
    config = json.loads(file.read_text())
    del config['pad_token']
    file.write_text(json.dumps(config))
    return r'no tokenizer can be made of .*pad'


def another_class(folder):
    reconfigure(folder / 'text_encoder', architectures=['T5EncoderModel'])
    return 'is T5EncoderModel, not Gemma2Model'


def no_class(folder):
    reconfigure(folder / 'text_encoder', architectures=None)
    return 'is something without a class name, not Gemma2Model'


def another_activation(folder):
    reconfigure(folder / 'text_encoder', hidden_activation='relu')
    return r'config.json is not one of Gemma2Model \(hidden_activation is relu, supported'


def both_directions(folder):
    reconfigure(folder / 'text_encoder', use_bidirectional_attention=True)
    return 'use_bidirectional_attention is True'


def scaled_positions(folder):
    reconfigure(folder / 'text_encoder', rope_scaling={'rope_type': 'yarn', 'factor': 4.0})
    return 'rope_type is yarn, supported is default'


def without_a_field(folder):
    file = folder / 'text_encoder/config.json'
    config = json.loads(file.read_text())
    del config['head_dim']
    file.write_text(json.dumps(config))
    return "not one of Gemma2Model \\('head_dim'\\)"


def drop_file(folder):
    min((folder / 'text_encoder').glob('*.safetensors')).unlink()
    return 'names model-00001.*, not in that folder'


def truncate(folder):
    file = min((folder / 'text_encoder').glob('*.safetensors'))
    file.write_bytes(file.read_bytes()[:-100])
    return f'weights damaged: .*{file.name}'


def without_the_last_layer(folder):
    """Which is not run; but then the folder is of another model, or not all of it."""
    rewrite(folder / 'text_encoder', lambda t: [t.pop(n) for n in [*t] if 'layers.3.' in n])
    return r'lacks the tensor layers\.3\.'


def misshape(folder):
    rewrite(folder / 'text_encoder', lambda t: t.update(
        {'layers.2.mlp.up_proj.weight': np.zeros((3, 5), np.float32)}))
    return r'layers.2.mlp.up_proj.weight has shape \(3, 5\), expected \(40, 24\)'


def add(folder):
    rewrite(folder / 'text_encoder', lambda t: t.update(
        {'model.lora.weight': np.zeros(3, np.float32)}))
    return 'holds 1 tensors that this architecture does not have, model.lora.weight first'


def twice(folder):
    rewrite(folder / 'text_encoder', lambda t: t.update(
        {'model.norm.weight': t['norm.weight']}))
    return 'holds both (model.)?norm.weight and (model.)?norm.weight'


def quantise(folder):
    rewrite(folder / 'text_encoder', lambda t: t.update(
        {'norm.weight': np.zeros(24, np.int8)}))
    return r'I8 \(norm.weight\); quantised'


def pickle_only(folder):
    for file in (folder / 'text_encoder').glob('*safetensors*'):
        file.unlink()
    (folder / 'text_encoder/pytorch_model.bin').write_bytes(b'anything')
    return 'holds only pytorch_model.bin, a pickle: loading one runs whatever code'


@pytest.mark.parametrize('damage', [
    no_pipeline, another_pipeline, no_encoder, no_tokenizer, no_vocabulary, broken_tokenizer,
    no_pad_token, another_class, no_class, another_activation, both_directions, scaled_positions,
    without_a_field, drop_file, truncate, without_the_last_layer, misshape, add, twice, quantise,
    pickle_only])
def test_a_bad_folder_is_refused_in_one_line_before_memory_is_used(folder, damage, monkeypatch):
    words = damage(folder)
    monkeypatch.setattr(jax, 'device_put', lambda *a, **k: pytest.fail('device memory was used'))
    with pytest.raises(WeightsError, match=words) as e:
        load('lumina', folder)
    assert len(str(e.value).splitlines()) == 1


def test_a_chat_template_is_needed(written, tmp_path):
    copy = shutil.copytree(written['zimage'][0], tmp_path / 'zimage')
    for file in (copy / 'tokenizer').glob('chat_template*'):
        file.unlink()
    with pytest.raises(WeightsError, match='no tokenizer can be made of .*chat_template') as e:
        load('zimage', copy)
    assert len(str(e.value).splitlines()) == 1


def test_a_folder_may_run_no_code(folder):
    """A tokenizer that wants its own Python is refused, not run."""
    file = folder / 'tokenizer/tokenizer_config.json'
    config = json.loads(file.read_text()) | {
        'auto_map': {'AutoTokenizer': ['evil.Evil', 'evil.Evil']}, 'tokenizer_class': 'Evil'}
    file.write_text(json.dumps(config))
    (folder / 'tokenizer/evil.py').write_text('raise SystemExit("code of the folder was run")')
    with pytest.raises(WeightsError, match='no tokenizer can be made of'):
        load('lumina', folder)


def test_paths_that_are_no_folder(tmp_path):
    with pytest.raises(WeightsError, match='no folder'):
        load('lumina', tmp_path / 'gone')


# --- Eight devices ---


def test_eight_devices_give_what_one_gives(written):
    root = written['lumina'][0].parent
    assert 'all checks passed' in tiny.run_on_devices(__file__, 8, str(root))


def check_layout(params, rules, mesh):
    """Matrices are split fsdp x tensor ways, tables over fsdp."""
    for path, leaf in flat.flatten(params).items():
        (size,) = {shard.data.size for shard in leaf.addressable_shards}
        ways = 4 if path.endswith('kernel') else 2 if path.endswith('token/embedding') else 1
        assert ways * size == leaf.size, path
    want = jax.tree.leaves(sharding.shard_tree(params, rules, mesh))
    assert [x.sharding for x in jax.tree.leaves(params)] == want


def check_program(encoder, tokens):
    """No table of token vectors is gathered to look tokens up in it."""
    code = jax.jit(encoder.apply).lower(encoder.params, tokens).compile().as_text()
    sizes = re.findall(r'= \w+\[([\d,]+)\]\S* (?:all-gather|all-reduce)\(', code)
    assert sizes and not any(s.startswith(str(published.VOCAB)) for s in sizes), sizes


def main(root):
    mesh = sharding.make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2})
    for family in published.PIPELINES:
        one, eight = (load(family, f'{root}/{family}', mesh=m) for m in (None, mesh))
        check_layout(eight.params, eight.rules, mesh)
        tokens = random_tokens(20, rows=8)
        tokens['mask'][::2, 13:] = False
        split = sharding.put_batch(tokens, mesh, 8)
        check_program(eight, split)
        got = jax.jit(eight.apply)(eight.params, split)
        assert got['embeds'].sharding.spec == sharding.BATCH, got['embeds'].sharding
        want = run(one, tokens)
        for name in want:
            close(got[name], want[name])
        # A batch that does not divide is whole on every device, and right.
        few = jax.tree.map(lambda x: x[:3], tokens)
        close(jax.jit(eight.apply)(eight.params, few)['embeds'], want['embeds'][:3])
    print('all checks passed')


if __name__ == '__main__':
    jax.config.update('jax_default_matmul_precision', 'highest')
    main(*sys.argv[1:])
