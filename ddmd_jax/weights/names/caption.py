"""Names of the embedded teacher's caption encoder in PyTorch (`families/emoji/code`)."""

from __future__ import annotations

from ddmd_jax.weights.names import Entry


def entry(path: str) -> Entry:
    """Published counterpart of our parameter at `path`, e.g. ``layers/to_qkv/kernel``."""
    module, _, leaf = path.rpartition('/')
    if not module:
        return Entry(leaf)
    layout = 'linear' if leaf == 'kernel' else 'same'
    stack, _, inner = module.partition('/')
    name = f'layers.{{}}.{inner.replace("/", ".")}' if stack == 'layers' else module
    return Entry(f'{name}.weight', layout)
