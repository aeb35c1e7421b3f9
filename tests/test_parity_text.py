"""Text encoders against transformers' own models and diffusers' own pipelines, random weights.

Needs the `parity` extra. Weights go from one to the other as users' do: through a folder.
"""

import copy
import dataclasses
import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import published_text as published
import pytest
from flax import nnx

from ddmd_jax import families
from ddmd_jax.families import LoadOptions
from ddmd_jax.families.lumina import text as lumina
from ddmd_jax.families.published_text import IDS
from ddmd_jax.families.sdxl import text as sdxl
from ddmd_jax.families.zimage import text as zimage
from ddmd_jax.models.layers import abstract_params, functional
from ddmd_jax.models.text import clip, gemma2, qwen3
from ddmd_jax.weights import diffusers as folder_reader, flat, transformers as folders

pytestmark = pytest.mark.parity
torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
pytest.importorskip('diffusers')

BOUND = 1e-4  # of rms
LENGTHS = (13, 7, 1, 20)  # unequal, some beyond Gemma-2's window of 5


def load(family, folder, dtype='float32'):
    return families.get(family).load_text(LoadOptions(str(folder), dtype=dtype))


@pytest.fixture(scope='module', params=published.PIPELINES)
def case(request, tmp_path_factory):
    """(family, their pipeline, our encoder of the folder that theirs was saved to)."""
    pipe = published.pipeline(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    pipe.save_pretrained(folder, max_shard_size='30KB')
    assert len(list((folder / 'text_encoder').glob('*.safetensors'))) > 2  # sharded, as published
    return request.param, pipe, load(request.param, folder)


def error(got, want, what):
    """Largest error as a share of the rms of what is wanted."""
    got, want = (np.asarray(x, np.float32) for x in (got, want))
    assert got.shape == want.shape
    found = np.abs(got - want).max() / np.sqrt(np.mean(want**2))
    print(f'{what}: {found:.2e}')  # shown by pytest -rP
    return found


def apply(encoder, tokens):
    with jax.default_matmul_precision('highest'):
        return jax.device_get(encoder.apply(encoder.params, tokens))


def batch(side, seed=0):
    """(ids, mask) of `LENGTHS`, padded on a side with an id that is a token elsewhere."""
    length = max(LENGTHS) + 3
    ids = np.random.default_rng(seed).integers(3, published.VOCAB, (len(LENGTHS), length))
    mask = np.arange(length)[None] < np.asarray(LENGTHS)[:, None]
    mask = mask if side == 'right' else mask[:, ::-1]
    return np.where(mask, ids, 7).astype(np.int32), np.ascontiguousarray(mask)


def theirs(model, ids, mask=None):
    with torch.no_grad():
        return model(torch.tensor(ids), output_hidden_states=True,
                     attention_mask=None if mask is None else torch.tensor(mask).long())


# --- States ---


@pytest.mark.parametrize('side', ['right', 'left'])
def test_the_states_that_are_used(case, side):
    family, pipe, ours = case
    ids, mask = batch(side)
    if family == 'sdxl':  # which is given no mask
        got = apply(ours, {'ids': ids, 'ids_2': ids[::-1], 'mask': np.ones_like(mask)})
        found = [theirs(pipe.text_encoder, ids), theirs(pipe.text_encoder_2, ids[::-1].copy())]
        width = found[0].hidden_states[-2].shape[-1]
        parts = got['embeds'][..., :width], got['embeds'][..., width:]
        for name, part, want in zip(('CLIP-L', 'bigG'), parts, found):
            assert error(part, want.hidden_states[-2], f'{name} {side}') <= BOUND
        assert error(got['pooled'], found[1].text_embeds, f'pooled {side}') <= BOUND
        return
    got = apply(ours, {'ids': ids, 'mask': mask})
    want = theirs(pipe.text_encoder, ids, mask).hidden_states[-2].numpy()
    assert error(got['embeds'][mask], want[mask], f'{family} {side}') <= BOUND
    np.testing.assert_array_equal(got['mask'], mask)


def test_prompts_as_the_pipeline_encodes_them(case):
    """From words to conditioning, the null prompt too, by `encode_prompt` itself."""
    family, pipe, ours = case
    tokens = ours.tokenize(published.PROMPTS)
    got = apply(ours, tokens)
    real = lambda row: got['embeds'][row][tokens['mask'][row]]
    encode = lambda prompts, **kwargs: pipe.encode_prompt(list(prompts), device='cpu', **kwargs)
    with torch.no_grad():
        if family == 'sdxl':
            embeds, _, pooled, _ = encode(
                published.PROMPTS, num_images_per_prompt=1, do_classifier_free_guidance=False)
            assert error(got['embeds'], embeds, 'sdxl prompts') <= BOUND
            assert error(got['pooled'], pooled, 'sdxl prompts pooled') <= BOUND
            return
        if family == 'zimage':
            want, null = encode(published.PROMPTS)  # lists of the real tokens alone
            want[-1] = null[0]
        else:
            embeds, mask, null, null_mask = encode(published.PROMPTS)
            want = [e[m.bool()] for e, m in zip(embeds, mask)]
            want[-1] = null[0][null_mask[0].bool()]
    for row, states in enumerate(want):
        assert error(real(row), states, f'{family} prompt {row}') <= BOUND


def test_long_prompts_are_cut_as_the_pipeline_cuts_them(case):
    family, pipe, ours = case
    prompt = ' '.join(published.PROMPTS) * 60
    tokens = ours.tokenize([prompt])
    assert tokens['mask'].all() and tokens['mask'].shape == (1, ours.length)
    how = published.PIPELINES[family]
    for name, tokenizer in zip(IDS, (pipe.tokenizer, getattr(pipe, 'tokenizer_2', None))):
        if tokenizer is not None:
            want = tokenizer(how.text(tokenizer, prompt), max_length=ours.length,
                             truncation=True)['input_ids']
            assert tokens[name][0].tolist() == want


@pytest.mark.parametrize('kinds', [
    ['full_attention'] * 4,
    ['full_attention', 'sliding_attention', 'sliding_attention', 'full_attention'],
], ids=['full', 'mixed'])
def test_gemma2_with_layer_types_of_its_own(tmp_path, kinds):
    pipe = published.pipeline('lumina', seed=1, layer_types=kinds)
    pipe.save_pretrained(tmp_path / 'f')
    ids, mask = batch('left')
    got = apply(load('lumina', tmp_path / 'f'), {'ids': ids, 'mask': mask})['embeds'][mask]
    want = theirs(pipe.text_encoder, ids, mask).hidden_states[-2].numpy()[mask]
    assert error(got, want, 'Gemma-2') <= BOUND


@pytest.mark.parametrize('cap, scalar', [(None, 8), (0.5, 3)])
def test_gemma2_caps_and_scales(tmp_path, cap, scalar):
    pipe = published.pipeline('lumina', seed=2, attn_logit_softcapping=cap,
                              query_pre_attn_scalar=scalar)
    pipe.save_pretrained(tmp_path / 'f')
    ids, mask = batch('right')
    got = apply(load('lumina', tmp_path / 'f'), {'ids': ids, 'mask': mask})['embeds'][mask]
    want = theirs(pipe.text_encoder, ids, mask).hidden_states[-2].numpy()[mask]
    assert error(got, want, f'Gemma-2 cap {cap}') <= BOUND


@pytest.mark.parametrize('eos', [2, published.VOCAB - 100])
def test_pooled_at_the_end_token(tmp_path, eos):
    """Old configs name 2 and mean the largest id; new ones name it, and padding may be it too."""
    pipe = published.pipeline('sdxl', seed=3, eos_token_id=eos)
    pipe.save_pretrained(tmp_path / 'f')
    ids, mask = batch('right', seed=4)
    ids[1, 4:] = ids[2, 0] = ids[3, -2:] = published.VOCAB - 100
    tokens = {'ids': ids, 'ids_2': ids, 'mask': np.ones_like(mask)}
    got = apply(load('sdxl', tmp_path / 'f'), tokens)['pooled']
    want = theirs(pipe.text_encoder_2, ids).text_embeds
    assert error(got, want, f'pooled, eos {eos}') <= BOUND


def test_in_bfloat16_as_near_to_fp32_as_theirs(case):
    """Same weights, same rounding of products: no coarser than transformers' own."""
    family, pipe, _ = case
    models = {c.folder: getattr(pipe, c.folder) for c in published.PIPELINES[family].components}
    ids, mask = batch('right')
    mask = np.ones_like(mask) if family == 'sdxl' else mask
    for component in published.PIPELINES[family].components:
        model = models[component.folder]
        cfg = component.config(published.COMPONENTS[family][component.folder][1], 'bfloat16')
        run = functional(lambda c=component, cfg=cfg: c.module(cfg, nnx.Rngs(0)))
        params = read(component, model, penultimate=cfg.penultimate)
        got = run(params, ids)[0] if family == 'sdxl' else run(params, ids, mask)
        assert got.dtype == jnp.bfloat16
        given = None if family == 'sdxl' else mask
        want = theirs(model, ids, given).hidden_states[-2].numpy()[mask]
        low = theirs(copy.deepcopy(model).to(torch.bfloat16), ids, given).hidden_states[-2]
        rms = lambda x, want=want: float(np.sqrt(np.mean((x - want)**2) / np.mean(want**2)))
        ours, coarse = rms(np.asarray(got, np.float32)[mask]), rms(low.float().numpy()[mask])
        print(f'{family} {component.folder} bf16, rms: ours {ours:.1e}, theirs {coarse:.1e}')
        assert ours <= 1.5 * coarse < 0.1


def read(component, model, penultimate=False):
    """A model of theirs as our parameters in fp32, by way of a folder."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        opened = folders.open_folder(Path(folder), component.published)
        cfg = dataclasses.replace(component.config(opened.config, 'float32'),
                                  penultimate=penultimate)
        abstract = abstract_params(lambda: component.module(cfg, nnx.Rngs(0)))
        layout = jax.tree.map(
            lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), abstract)
        return folder_reader.import_tree(opened, abstract, layout, component.entry)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_gemma2_scales_its_tokens_as_theirs(dtype):
    """sqrt(24) is rounded to the type of the products before it multiplies."""
    model = published.models('lumina')['text_encoder'].to(getattr(torch, dtype))
    ids = np.arange(5, 40)[None]
    with torch.no_grad():
        want = model.embed_tokens(torch.tensor(ids)).float().numpy()
    table = jnp.asarray(model.embed_tokens.weight.detach().float().numpy(), dtype)
    got = table[ids] * jnp.asarray(24**0.5, dtype)
    np.testing.assert_array_equal(np.asarray(got, np.float32), want)


# --- Names ---

FULL = {
    'Gemma2Model': (gemma2.Gemma2, gemma2.Gemma2Config(), lumina.entry,
                    lumina.PUBLISHED, {}),
    'Gemma2ForCausalLM': (gemma2.Gemma2, gemma2.Gemma2Config(), lumina.entry,
                          lumina.PUBLISHED, {}),
    'Qwen3ForCausalLM': (
        qwen3.Qwen3, qwen3.Qwen3Config(), zimage.entry, zimage.PUBLISHED,
        {'hidden_size': 2560, 'intermediate_size': 9728, 'num_hidden_layers': 36,
         'num_attention_heads': 32, 'num_key_value_heads': 8, 'tie_word_embeddings': True}),
    'CLIPTextModel': (
        clip.ClipText, clip.ClipConfig(), sdxl.entry, sdxl.PUBLISHED,
        {'hidden_size': 768, 'intermediate_size': 3072, 'num_attention_heads': 12}),
    'CLIPTextModelWithProjection': (
        clip.ClipText, clip.BIG_G, sdxl.entry, sdxl.PROJECTED,
        {'hidden_size': 1280, 'intermediate_size': 5120, 'num_hidden_layers': 32,
         'num_attention_heads': 20, 'hidden_act': 'gelu', 'projection_dim': 1280}),
}


def write_hollow(folder, model):
    """The folder of a model on no device: its config, and a file of holes under a true header."""
    header, end = {}, 0
    for name, p in model.state_dict().items():
        begin, end = end, end + 4 * p.numel()
        header[name] = {'dtype': 'F32', 'shape': p.shape, 'data_offsets': [begin, end]}
    text = json.dumps(header).encode()
    with open(folder / 'model.safetensors', 'wb') as file:
        file.write(len(text).to_bytes(8, 'little') + text)
        file.truncate(8 + len(text) + end)
    (folder / 'config.json').write_text(json.dumps({'architectures': [type(model).__name__]}))


@pytest.mark.parametrize('kind', FULL)
def test_full_size_every_tensor_has_its_name_and_shape(kind, tmp_path):
    module, cfg, entry, names, changes = FULL[kind]
    cls = getattr(transformers, kind)
    with torch.device('meta'):
        model = cls(cls.config_class(**changes))
    write_hollow(tmp_path, model)
    found = folders.open_folder(tmp_path, names).tensors
    dropped = set(model.state_dict()) - {t.name for t in found.values()}
    assert dropped <= {'lm_head.weight'} and ('CausalLM' in kind) == bool(dropped)
    cfg = dataclasses.replace(cfg, penultimate=False)
    abstract = abstract_params(lambda: module(cfg, nnx.Rngs(0)))
    ours = [(name, entry(path).shape(leaf.shape)) for path, leaf in flat.flatten(abstract).items()
            for name in entry(path).names(leaf.shape)]
    assert len(ours) == len(dict(ours))
    assert dict(ours) == {n: t.shape for n, t in found.items()}


@pytest.mark.parametrize('kind', ['Gemma2Model', 'Qwen3ForCausalLM', 'CLIPTextModel',
                                  'CLIPTextModelWithProjection'])
def test_our_config_of_theirs_is_the_published_one(kind):
    """Their full-size config, read as a folder's would be, gives our defaults."""
    _, cfg, _, _, changes = FULL[kind]
    cls = getattr(transformers, kind)
    extra = {'eos_token_id': 2} if 'CLIP' in kind else {}
    if 'Qwen3' in kind:
        extra = {'rope_parameters': {'rope_type': 'default', 'rope_theta': 1e6}}
    config = json.loads(cls.config_class(**changes, **extra).to_json_string(use_diff=False))
    read = {'Gemma2Model': lumina.model_config, 'Qwen3ForCausalLM': zimage.model_config}.get(
        kind, lambda c: sdxl.model_config(c, projected='Projection' in kind))
    got = read(config)
    if kind == 'Gemma2Model':  # transformers spells the alternation out
        assert got.slides == cfg.slides
        got = dataclasses.replace(got, layer_types=None)
    assert got == cfg


@pytest.mark.parametrize('family', published.PIPELINES)
def test_what_we_export_their_classes_load(family, tmp_path):
    """Out by the same map that reads: every tensor of theirs comes back bit for bit.

    But for the matrix of logits, which no encoder has.
    """
    for c in published.PIPELINES[family].components:
        model = published.models(family, seed=5)[c.folder]
        out = tmp_path / c.folder
        folder_reader.export_tree(read(c, model), c.entry, out, model.config.to_dict(), np.float32,
                                  stem=folders.STEM)
        back = type(model).from_pretrained(out).state_dict()
        assert back.keys() == model.state_dict().keys()
        same = {name: torch.equal(x, back[name]) for name, x in model.state_dict().items()}
        assert {n for n, equal in same.items() if not equal} <= {'lm_head.weight'}


@pytest.mark.parametrize('family', ['lumina', 'zimage'])
def test_all_layers_and_the_norm_give_the_last_state(family):
    """What is not run is mapped right all the same."""
    model = published.models(family, seed=6)['text_encoder']
    component, = published.PIPELINES[family].components
    cfg = component.config(published.COMPONENTS[family]['text_encoder'][1], 'float32')
    cfg = dataclasses.replace(cfg, penultimate=False)
    ids, mask = batch('left')
    with jax.default_matmul_precision('highest'):
        got = functional(lambda: component.module(cfg, nnx.Rngs(0)))(
            read(component, model), ids, mask)
    want = theirs(model, ids, mask).hidden_states[-1].numpy()
    assert error(np.asarray(got)[mask], want[mask], f'{family} last state') <= BOUND
