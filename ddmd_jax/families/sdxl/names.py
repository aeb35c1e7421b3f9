"""Published names of SDXL's parameters (diffusers), by our paths."""

from ddmd_jax.weights.names import Entry

_STACK = 'transformer_blocks'
# Behind the stack's name, ours and theirs; what is not here is spelt alike.
_BLOCK = {'ff/proj': 'ff.net.0.proj', 'ff/out': 'ff.net.2',
          'attn1/to_out': 'attn1.to_out.0', 'attn2/to_out': 'attn2.to_out.0'}


def unet(path: str) -> Entry:
    """Of `UNet2DConditionModel`: ``down_blocks/1/attentions/0/transformer_blocks/ff/out/kernel``.

    Raises:
      ValueError: `path` names no parameter of a module.
    """
    module, leaf = path.rsplit('/', 1)
    name = module.rsplit('/', 1)[-1]
    layout = 'same' if leaf != 'kernel' else 'conv' if name.startswith('conv') else 'linear'
    leaf = 'bias' if leaf == 'bias' else 'weight'
    before, stack, inner = module.partition(f'/{_STACK}/')
    if stack:
        inner = f'.{_STACK}.{{}}.' + _BLOCK.get(inner, inner.replace('/', '.'))
    return Entry(f'{before.replace("/", ".")}{inner}.{leaf}', layout)
