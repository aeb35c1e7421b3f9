"""Scorers against transformers' CLIP, its tokens and its pixels; files against ``torch.save``."""

import dataclasses

import numpy as np
import pytest
import score_reference as reference
from flax import nnx

from ddmd_jax.evaluation.scores import preprocess, scorers, tokens
from ddmd_jax.models.layers import abstract_params
from ddmd_jax.models.text import clip
from ddmd_jax.weights import clip as clip_names, states, torch_files
from ddmd_jax.weights.flat import WeightsError

pytestmark = pytest.mark.parity
torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

BOUND = 1e-4


def theirs(cfg, **changes):
    """transformers' config of one of our architectures."""
    text, image = (dataclasses.asdict(x) for x in (cfg.text, cfg.image))
    for x in (text, image):
        del x['dtype']
    del text['penultimate']
    return transformers.CLIPConfig(text_config=text | changes, vision_config=image,
                                   projection_dim=cfg.image.projection_dim)


@pytest.mark.parametrize('act', ['gelu', 'quick_gelu'])
@pytest.mark.parametrize('eos', [2, 199])
def test_scores_are_transformers(tmp_path, act, eos):
    """PickScore: the folder as it was saved, ``exp(logit_scale)`` times the cosine."""
    cfg = clip.TwoTowers(
        clip.ClipConfig(200, 24, 96, 2, 3, hidden_act=act, projection_dim=16, penultimate=False),
        clip.ClipImageConfig(28, 14, 32, 139, 2, 4, act, projection_dim=16))
    torch.manual_seed(0)
    model = transformers.CLIPModel(theirs(cfg, eos_token_id=eos)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(tmp_path)
    pixels, ids = reference.clip_inputs()
    scorer = scorers.clip_scorer(
        'pick', cfg, scorers.Source('some/where'), scaled=True,
        pixels=lambda picture, size: pixels[int(picture[0, 0, 0])], tokenize=lambda prompts: ids)
    numbered = [np.full((2, 2, 3), i, np.uint8) for i in range(3)]
    got = scorers.run(scorer, scorers.load(scorer, [str(tmp_path)]), numbered, ['', '', ''], 3)
    with torch.no_grad():
        out = model(torch.tensor(ids), torch.tensor(pixels).permute(0, 3, 1, 2))
    want = out.logits_per_image.diagonal().numpy()
    print(f'{act}: {np.abs(got - want).max():.2e}')  # shown by pytest -rP
    assert np.abs(got - want).max() <= BOUND * np.sqrt(np.mean(want**2))


@pytest.mark.parametrize('name', clip.ARCHITECTURES)
def test_full_size_every_tensor_has_transformers_name_and_shape(name):
    cfg = clip.ARCHITECTURES[name]
    with torch.device('meta'):
        model = transformers.CLIPModel(theirs(cfg))
    hollow = {k: np.broadcast_to(np.float32(0), x.shape) for k, x in model.state_dict().items()}
    states.check(abstract_params(lambda: clip.Clip(cfg, nnx.Rngs(0))),
                 clip_names.to_transformers(hollow, name), clip_names.entry, name)


def test_pixels_are_transformers_to_the_last_bit():
    pil = pytest.importorskip('transformers.models.clip.image_processing_pil_clip')
    from PIL import Image

    make = pil.CLIPImageProcessorPil()
    for size in reference.SIZES:
        picture = reference.picture(size)
        want = make(Image.fromarray(picture), return_tensors='np')['pixel_values'][0]
        np.testing.assert_array_equal(
            preprocess.clip_transformers(picture), want.transpose(1, 2, 0), err_msg=str(size))


def test_tokens_are_transformers():
    merges = [tuple(line.split()) for line in tokens._vocabulary().split('\n')[1:tokens.MERGES + 1]]
    letters = tokens._letters()
    words = [*letters, *(x + '</w>' for x in letters), *map(''.join, merges),
             *tokens.SPECIAL['transformers']]
    assert len(words) == 49408
    make = transformers.CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=merges)
    want = make(list(reference.PROMPTS), padding='max_length', max_length=tokens.LENGTH,
                truncation=True, return_tensors='np')['input_ids']
    got = tokens.tokenize(reference.PROMPTS, 'transformers')
    for prompt, ours, row in zip(reference.PROMPTS, got, want):
        end = int(np.argmax(row)) + 1  # theirs pads with the end token
        assert ours[:end].tolist() == row[:end].tolist() and not ours[end:].any(), prompt


def test_image_rewards_tokens_are_berts(tmp_path):
    """Of a vocabulary of letters, their continuations, and some words."""
    letters = sorted({c for prompt in reference.PROMPTS for c in prompt.lower() if c.isalpha()})
    words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *letters, *('##' + c for c in letters),
             'red', 'apple', 'photo', '##to', 'resume', '##ve', '!', '.', "'", '&', ';']
    (tmp_path / 'vocab.txt').write_text('\n'.join(dict.fromkeys(words)) + '\n')
    theirs = transformers.BertTokenizer(vocab=str(tmp_path / 'vocab.txt'))
    theirs.add_special_tokens({'bos_token': '[DEC]'})
    want = theirs(list(reference.PROMPTS), padding='max_length', truncation=True, max_length=35,
                  return_tensors='np')
    ids, mask = tokens.tokenize_bert(reference.PROMPTS, tmp_path / 'vocab.txt')
    np.testing.assert_array_equal(ids, want['input_ids'])
    np.testing.assert_array_equal(mask, want['attention_mask'].astype(bool))
    assert len(np.unique(ids)) > 60


@pytest.mark.parametrize('zipped', [True, False], ids=['archive', 'stream'])
def test_what_torch_saved_is_read_without_it(tmp_path, zipped):
    """Views, types, parameters, wrappers; equal to the last bit."""
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    state = {'whole': base, 'turned': base.T, 'part': base[1:3, ::2], 'scalar': torch.tensor(2.5),
             'half': base.half(), 'double': base.double(), 'ids': torch.arange(5),
             'flags': torch.tensor([True, False]), 'none': torch.zeros(0, 3),
             'parameter': torch.nn.Parameter(base + 1), 'short': base.bfloat16()}
    file = tmp_path / 'x.pt'
    torch.save({'epoch': 3, 'state_dict': state}, file, _use_new_zipfile_serialization=zipped)
    got = states.read(file)
    assert got.keys() == state.keys()
    for name, x in state.items():
        assert got[name].shape == tuple(x.shape)
        np.testing.assert_array_equal(got[name].astype(np.float64), x.detach().double().numpy())
    assert got['half'].dtype == np.float16 and got['ids'].dtype == np.int64
    whole = file.read_bytes()
    for share in (0.2, 0.6, 0.95):
        file.write_bytes(whole[:int(share * len(whole))])
        with pytest.raises(WeightsError, match='weights damaged: .*fetch it again'):
            torch_files.load(file)


class Nested(torch.nn.Module):
    sizes: list[int]

    def __init__(self):
        super().__init__()
        self.sizes = [1, 2]
        self.inner = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
        self.text_projection = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
        self.register_buffer('input_resolution', torch.tensor(224))

    def forward(self, x):
        return self.inner(x) + self.text_projection[0]


def test_torchscript_is_read_without_its_code(tmp_path):
    """As OpenAI's CLIP is published."""
    model = Nested().half().eval()
    torch.jit.script(model).save(str(tmp_path / 'x.pt'))
    got = states.read(tmp_path / 'x.pt')
    assert got.keys() == model.state_dict().keys()
    for name, x in model.state_dict().items():
        np.testing.assert_array_equal(got[name], x.numpy())
        assert got[name].dtype == x.numpy().dtype


def test_a_saved_module_is_refused(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / 'x.pt')
    with pytest.raises(WeightsError, match='names torch.nn.modules.linear.Linear, which is no'):
        states.read(tmp_path / 'x.pt')
