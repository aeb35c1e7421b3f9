"""Names of Gemma-2 (transformers: `Gemma2Model`)."""

from __future__ import annotations

from ddmd_jax.weights.names import Entry
from ddmd_jax.weights.transformers import Published, decoder_entry

# Logits' matrix; frequencies that early versions saved.
UNUSED = (r'lm_head\.weight', r'(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq')
PUBLISHED = Published(('Gemma2Model', 'Gemma2ForCausalLM'), 'model.', UNUSED)
# What is called "post attention" stands behind the attention here; in Qwen3 before the network.
_NORMS = {
    'norm1': 'input_layernorm', 'norm2': 'post_attention_layernorm',
    'ffn_norm1': 'pre_feedforward_layernorm', 'ffn_norm2': 'post_feedforward_layernorm',
}


def entry(path: str) -> Entry:
    """Published counterpart of our parameter at `path`, e.g. ``layers/attn/to_q/kernel``.

    Raises:
      KeyError: `path` is not a parameter of `Gemma2`.
    """
    return decoder_entry(path, _NORMS)
