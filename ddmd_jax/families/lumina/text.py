"""Lumina-Image-2.0's text side, as diffusers has it (``lumina2/pipeline_lumina2.py``).

Gemma-2's last but one state of at most 256 tokens, padded on the right. The tokenizer puts its
[BOS] in front and nothing behind. Prompts stand behind the system prompt; the null prompt is the
empty text without it, [BOS] alone.
"""

from typing import Any

from ddmd_jax.families import published_text
from ddmd_jax.families.base import LoadOptions, TextEncoder
from ddmd_jax.families.published_text import Component, Pipeline
from ddmd_jax.models.text import gemma2
from ddmd_jax.models.text.gemma2 import Gemma2, Gemma2Config
from ddmd_jax.weights.names import Entry
from ddmd_jax.weights.transformers import DECODER_UNUSED, Published, decoder_entry

CLASSES = ('Lumina2Pipeline', 'Lumina2Text2ImgPipeline')
SYSTEM_PROMPT = ('You are an assistant designed to generate superior images with the superior '
                 'degree of image-text alignment based on textual prompts or user prompts.')
FIXED = {'hidden_activation': 'gelu_pytorch_tanh', 'attention_bias': False,
         'use_bidirectional_attention': False}
PUBLISHED = Published(('Gemma2Model', 'Gemma2ForCausalLM'), 'model.', DECODER_UNUSED)
# What is called "post attention" stands behind the attention here; in Qwen3 before the network.
_NORMS = {
    'norm1': 'input_layernorm', 'norm2': 'post_attention_layernorm',
    'ffn_norm1': 'pre_feedforward_layernorm', 'ffn_norm2': 'post_feedforward_layernorm',
}


def full_prompt(prompt: str) -> str:
    """The text that is encoded for `prompt`; the null prompt '' stays as it is."""
    return f'{SYSTEM_PROMPT} <Prompt Start> {prompt}' if prompt else ''


def model_config(published: dict[str, Any], dtype: str = 'float32') -> Gemma2Config:
    """Our Gemma-2 from a published ``text_encoder/config.json``; see `config_of`."""
    kinds = published.get('layer_types')
    return published_text.config_of(
        Gemma2Config, published, FIXED, dtype=dtype,
        rope_theta=published_text.rope_theta(published),
        layer_types=None if kinds is None else tuple(kinds))


def entry(path: str) -> Entry:
    """Published counterpart of our parameter at `path`, e.g. ``layers/attn/to_q/kernel``.

    Raises:
      KeyError: `path` is not a parameter of `Gemma2`.
    """
    return decoder_entry(path, _NORMS)


PIPELINE = Pipeline(
    'lumina', CLASSES,
    (Component('text_encoder', 'tokenizer', PUBLISHED, model_config, Gemma2, entry),),
    length=256, rules=gemma2.RULES, text=lambda tokenizer, prompt: full_prompt(prompt))


def load(options: LoadOptions) -> TextEncoder:
    """Gemma-2 of a pipeline's folder: embeds ``[B, L, 2304]``, L <= 256.

    Raises:
      WeightsError, ShardingError: as `published_text.load`.
    """
    return published_text.load(PIPELINE, options)


def identity(path: str, variant: str = '') -> str | None:
    """Raises `WeightsError`: see `published_text.identity`."""
    return published_text.identity(PIPELINE, path, variant)
