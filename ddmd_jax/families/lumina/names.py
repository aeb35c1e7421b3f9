"""Published names of Lumina-Image-2.0's parameters (diffusers), by our paths."""

from ddmd_jax.families import published_vae
from ddmd_jax.weights.names import Entry

_TOP = {
    'x_embedder': 'x_embedder',
    'time_1': 'time_caption_embed.timestep_embedder.linear_1',
    'time_2': 'time_caption_embed.timestep_embedder.linear_2',
    'caption_norm': 'time_caption_embed.caption_embedder.0',
    'caption_proj': 'time_caption_embed.caption_embedder.1',
    'out_scale': 'norm_out.linear_1',
    'out_proj': 'norm_out.linear_2',
}
_BLOCK = {'attn/to_out': 'attn.to_out.0', 'modulation': 'norm1.linear'}
STACKS = ('context_refiner', 'noise_refiner', 'layers')


def transformer(path: str) -> Entry:
    """Of `Lumina2Transformer2DModel`, e.g. ``layers/attn/to_q/kernel``.

    Raises:
      KeyError: `path` is not a parameter of `NextDiT`.
    """
    module, leaf = path.rsplit('/', 1)
    layout = 'linear' if leaf == 'kernel' else 'same'
    leaf = 'weight' if leaf == 'kernel' else leaf
    stack, _, inner = module.partition('/')
    if stack not in STACKS:
        return Entry(f'{_TOP[module]}.{leaf}', layout)
    theirs = _BLOCK.get(inner, inner.replace('/', '.'))
    # Where time modulates, the norm shares a module with the modulation.
    if inner == 'norm1' and stack != 'context_refiner':
        theirs = 'norm1.norm'
    return Entry(f'{stack}.{{}}.{theirs}.{leaf}', layout)


autoencoder = published_vae.entry
