"""Tiny text encoders in the folders of pipelines, as our exporter or diffusers writes them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from ddmd_jax.families.lumina import text as lumina
from ddmd_jax.families.published_text import Component
from ddmd_jax.families.sdxl import text as sdxl
from ddmd_jax.families.zimage import text as zimage
from ddmd_jax.models.layers import abstract_params
from ddmd_jax.weights import diffusers, transformers as folders

PIPELINES = {'lumina': lumina.PIPELINE, 'sdxl': sdxl.PIPELINE, 'zimage': zimage.PIPELINE}
VOCAB = 512
_SIZES = {'vocab_size': VOCAB, 'hidden_size': 24, 'intermediate_size': 40, 'num_hidden_layers': 4,
          'num_attention_heads': 4}
_DECODER = _SIZES | {'num_key_value_heads': 2, 'head_dim': 8, 'rms_norm_eps': 1e-6}
GEMMA2 = _DECODER | {
    'query_pre_attn_scalar': 12, 'attn_logit_softcapping': 2.0, 'sliding_window': 5,
    'hidden_activation': 'gelu_pytorch_tanh'}
QWEN3 = _DECODER | {'hidden_act': 'silu', 'rope_parameters': {
    'rope_type': 'default', 'rope_theta': 1e6}}
# The end token is the last of the vocabulary, and the config names 2: as SDXL's do.
CLIP = _SIZES | {'max_position_embeddings': 77, 'hidden_act': 'quick_gelu', 'layer_norm_eps': 1e-5,
                 'projection_dim': 24, 'bos_token_id': 0, 'eos_token_id': 2}
BIG = CLIP | {'hidden_size': 32, 'num_hidden_layers': 3, 'hidden_act': 'gelu',
              'projection_dim': 20}
# (transformers' class, its config) by folder; rotary base as transformers 4 wrote it, or 5.
COMPONENTS = {
    'lumina': {'text_encoder': ('Gemma2Model', GEMMA2 | {'rope_theta': 10000.0})},
    'sdxl': {'text_encoder': ('CLIPTextModel', CLIP),
             'text_encoder_2': ('CLIPTextModelWithProjection', BIG)},
    'zimage': {'text_encoder': ('Qwen3ForCausalLM', QWEN3)},
}
PROMPTS = ['a red apple', 'a taco on an orange background, painted by hand with a wide brush', '']
TEMPLATE = (
    "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content"
    " + '<|im_end|>\n' }}{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n'"
    " }}{%- if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}")


# --- Tokenizers ---


def tokenizer(family: str, second: bool = False) -> Any:
    """A byte-level tokenizer with the special tokens, and their places, of a family's own."""
    from transformers import PreTrainedTokenizerFast

    if family == 'lumina':
        raw = _trained('<pad>', '<eos>', '<bos>')
        _surround(raw, '<bos> $A', '<bos>')
        return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token='<pad>', eos_token='<eos>',
                                       bos_token='<bos>', padding_side='left')  # as Gemma's says
    raw = _trained()
    if family == 'sdxl':
        raw.add_special_tokens(['<|startoftext|>', '<|endoftext|>'])
        _surround(raw, '<|startoftext|> $A <|endoftext|>', '<|startoftext|>', '<|endoftext|>')
        return PreTrainedTokenizerFast(
            tokenizer_object=raw, pad_token='!' if second else '<|endoftext|>',
            eos_token='<|endoftext|>', bos_token='<|startoftext|>', model_max_length=77)
    raw.add_special_tokens(['<|endoftext|>', '<|im_start|>', '<|im_end|>'])
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token='<|endoftext|>',
                                   eos_token='<|im_end|>', chat_template=TEMPLATE)


def _trained(*special: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        [*PROMPTS, lumina.full_prompt('apple')], trainers.BpeTrainer(
            vocab_size=VOCAB - 8, special_tokens=list(special), show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return raw


def _surround(raw: Any, template: str, *special: str) -> None:
    from tokenizers import processors

    raw.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(s, raw.token_to_id(s)) for s in special])


# --- Folders without PyTorch ---


def random_params(abstract: Any, seed: int) -> Any:
    """Parameters none of which is zero or one; RMS norms are near zero, as Gemma-2's are."""
    rng = np.random.default_rng(seed)

    def fill(path: Any, leaf: Any) -> np.ndarray:
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        name = path[-1].key
        if name == 'kernel':
            noise /= np.sqrt(leaf.shape[-2])
        elif name != 'embedding':
            noise = 0.1 * noise + (name == 'scale')
        return noise.astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, abstract)


def whole(component: Component, published: dict[str, Any]) -> Any:
    """Shapes of all parameters of a published architecture, the last layer's too."""
    cfg = dataclasses.replace(component.config(published, 'float32'), penultimate=False)
    return abstract_params(lambda: component.module(cfg, nnx.Rngs(0)))


def write(family: str, folder: Path, seed: int = 0, dtype: Any = np.float32) -> dict[str, Any]:
    """A pipeline's folder of random weights; returns all of them, by component."""
    folder.mkdir(parents=True)
    how = PIPELINES[family]
    (folder / 'model_index.json').write_text(json.dumps(
        {'_class_name': how.class_names[0], 'force_zeros_for_empty_prompt': True}))
    params = {}
    for number, c in enumerate(how.components):
        kind, published = COMPONENTS[family][c.folder]
        params[c.folder] = random_params(whole(c, published), seed + number)
        diffusers.export_tree(
            params[c.folder], c.entry, folder / c.folder, published | {'architectures': [kind]},
            dtype, file_bytes=30_000, stem=folders.STEM)
        tokenizer(family, number == 1).save_pretrained(folder / c.tokenizer)
    return params


# --- Folders with it ---


def models(family: str, seed: int = 0, **changes: Any) -> dict[str, Any]:
    """transformers' own models of a family with random weights, by component."""
    import torch
    import transformers

    torch.manual_seed(seed)
    found = {}
    for folder, (kind, published) in COMPONENTS[family].items():
        cls = getattr(transformers, kind)
        found[folder] = cls(cls.config_class(**{**published, **changes})).eval()
        with torch.no_grad():
            for p in found[folder].parameters():
                # Matrices so large that attention is sharp, norms at other values than 0 and 1.
                p.add_(torch.randn_like(p) * (0.3 if p.ndim > 1 else 0.1))
    return found


def pipeline(family: str, seed: int = 0, **changes: Any) -> Any:
    """diffusers' pipeline of a family, with its text side only."""
    import diffusers as theirs

    how = PIPELINES[family]
    parts = models(family, seed, **changes)
    parts |= {c.tokenizer: tokenizer(family, number == 1)
              for number, c in enumerate(how.components)}
    rest = {'vae': None, 'scheduler': None}
    rest['unet' if family == 'sdxl' else 'transformer'] = None
    return getattr(theirs, how.class_names[0])(**parts, **rest)
