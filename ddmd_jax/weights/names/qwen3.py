"""Names of Qwen3 (transformers: `Qwen3Model`)."""

from __future__ import annotations

from ddmd_jax.weights.names import Entry
from ddmd_jax.weights.transformers import Published, decoder_entry

# Logits' matrix; frequencies that early versions saved.
UNUSED = (r'lm_head\.weight', r'(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq')
PUBLISHED = Published(('Qwen3ForCausalLM', 'Qwen3Model'), 'model.', UNUSED)
_NORMS = {
    'norm_attn': 'input_layernorm', 'norm_ffn': 'post_attention_layernorm',
    'attn/norm_q': 'self_attn.q_norm', 'attn/norm_k': 'self_attn.k_norm',
}


def entry(path: str) -> Entry:
    """Published counterpart of our parameter at `path`, e.g. ``layers/attn/norm_q/weight``.

    Raises:
      KeyError: `path` is not a parameter of `Qwen3`.
    """
    return decoder_entry(path, _NORMS)
