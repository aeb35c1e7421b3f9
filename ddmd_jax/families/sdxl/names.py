"""Published names of SDXL's parameters (diffusers), by our paths."""

import re

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


# kohya's scripts call a module as Stability's own code does (SGM): numbers instead of levels.
_SGM_RESNET = {'in_layers_2': 'conv1', 'out_layers_3': 'conv2', 'emb_layers_1': 'time_emb_proj',
               'skip_connection': 'conv_shortcut'}
_SGM_TOP = {'input_blocks_0_0': 'conv_in', 'out_2': 'conv_out',
            'time_embed_0': 'time_embedding_linear_1', 'time_embed_2': 'time_embedding_linear_2',
            'label_emb_0_0': 'add_embedding_linear_1', 'label_emb_0_2': 'add_embedding_linear_2'}
_SGM = re.compile(r'(input_blocks|middle_block|output_blocks)_(\d+)(?:_(\d+))?_(.+)')


def of_sgm(name: str) -> str:
    """The published module, dots as underscores, of one named as by Stability's own code.

    ``input_blocks_4_1_transformer_blocks_0_attn1_to_q`` is `down_blocks_1_attentions_0_...`: three
    levels of two residual blocks on the way down and three on the way up, as SDXL has them. What
    is no such name comes back as it is.
    """
    if name in _SGM_TOP:
        return _SGM_TOP[name]
    if not (matched := _SGM.fullmatch(name)):
        return name
    way, number, part, inner = matched[1], int(matched[2]), matched[3], matched[4]
    if way == 'middle_block':  # residual block, transformer, residual block: no second number
        inner = f'{part}_{inner}' if part else inner
        block, kind = 'mid_block', 'attentions_0' if number == 1 else f'resnets_{number // 2}'
    else:
        level, place = divmod(number - 1, 3) if way == 'input_blocks' else divmod(number, 3)
        block = f'{"down" if way == "input_blocks" else "up"}_blocks_{level}'
        if inner == 'op' or (way == 'input_blocks' and place == 2):
            return f'{block}_downsamplers_0_conv'
        if inner == 'conv':
            return f'{block}_upsamplers_0_conv'
        kind = f'{"attentions" if part == "1" else "resnets"}_{place}'
    if kind.startswith('resnets'):
        inner = _SGM_RESNET.get(inner, inner)
    return f'{block}_{kind}_{inner}'
