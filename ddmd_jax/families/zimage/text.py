"""Z-Image's text side, as diffusers has it (``z_image/pipeline_z_image.py``).

Qwen3's last but one state of at most 512 tokens of the chat template with a generation prompt,
thinking enabled. The null prompt goes through the template too. The pipeline leaves the side of the
padding to the tokenizer and keeps the real tokens alone; here padding is on the right always, which
leaves their states as they are.
"""

from typing import Any

from ddmd_jax.families import published_text
from ddmd_jax.families.base import LoadOptions, TextEncoder
from ddmd_jax.families.published_text import Component, Pipeline
from ddmd_jax.models.text import qwen3
from ddmd_jax.models.text.qwen3 import Qwen3, Qwen3Config
from ddmd_jax.weights.names import Entry
from ddmd_jax.weights.transformers import DECODER_UNUSED, Published, decoder_entry

FIXED = {'hidden_act': 'silu', 'attention_bias': False, 'use_sliding_window': False}
PUBLISHED = Published(('Qwen3ForCausalLM', 'Qwen3Model'), 'model.', DECODER_UNUSED)
_NORMS = {
    'norm_attn': 'input_layernorm', 'norm_ffn': 'post_attention_layernorm',
    'attn/norm_q': 'self_attn.q_norm', 'attn/norm_k': 'self_attn.k_norm',
}


def full_prompt(tokenizer: Any, prompt: str) -> str:
    """The text that is encoded for `prompt`, by the tokenizer's own chat template."""
    return tokenizer.apply_chat_template(
        [{'role': 'user', 'content': prompt}], tokenize=False, add_generation_prompt=True,
        enable_thinking=True)


def model_config(published: dict[str, Any], dtype: str = 'float32') -> Qwen3Config:
    """Our Qwen3 from a published ``text_encoder/config.json``; see `config_of`."""
    return published_text.config_of(Qwen3Config, published, FIXED, dtype=dtype,
                                    rope_theta=published_text.rope_theta(published))


def entry(path: str) -> Entry:
    """Published counterpart of our parameter at `path`, e.g. ``layers/attn/norm_q/weight``.

    Raises:
      KeyError: `path` is not a parameter of `Qwen3`.
    """
    return decoder_entry(path, _NORMS)


PIPELINE = Pipeline(
    'zimage', ('ZImagePipeline', 'ZImageImg2ImgPipeline'),
    (Component('text_encoder', 'tokenizer', PUBLISHED, model_config, Qwen3, entry),),
    length=512, rules=qwen3.RULES, text=full_prompt)


def load(options: LoadOptions) -> TextEncoder:
    """Qwen3 of a pipeline's folder: embeds ``[B, L, 2560]``, L <= 512.

    Raises:
      WeightsError, ShardingError: as `published_text.load`.
    """
    return published_text.load(PIPELINE, options)


def identity(path: str, variant: str = '') -> str | None:
    """Raises `WeightsError`: see `published_text.identity`."""
    return published_text.identity(PIPELINE, path, variant)
