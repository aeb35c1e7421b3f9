"""Names of the FLUX autoencoder (diffusers: `AutoencoderKL`); ours are spelt alike."""

from __future__ import annotations

from ddmd_jax.weights.names import Entry


def entry(path: str) -> Entry:
    """Published counterpart of e.g. ``decoder/mid_block/attentions/0/to_q/kernel``."""
    *modules, leaf = path.split('/')
    layout = 'same' if leaf != 'kernel' else 'linear' if modules[-1].startswith('to_') else 'conv'
    leaf = 'bias' if leaf == 'bias' else 'weight'
    return Entry('.'.join(['to_out.0' if m == 'to_out' else m for m in modules] + [leaf]), layout)
