"""NextDiT against diffusers' own `Lumina2Transformer2DModel`, random weights, fp32.

Needs the `parity` extra. The name map lives here until the import of published checkpoints
lands under `weights/`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ddmd_jax.models.nextdit import NextDiT, NextDiTConfig

pytestmark = pytest.mark.parity

DIFFUSERS = {'patch_size': 2, 'in_channels': 4, 'hidden_size': 48, 'num_layers': 2,
             'num_refiner_layers': 2, 'num_attention_heads': 4, 'num_kv_heads': 2,
             'multiple_of': 16, 'norm_eps': 1e-5, 'axes_dim_rope': (4, 4, 4),
             'axes_lens': (64, 32, 32), 'cap_feat_dim': 24}
BLOCK = {'attn.to_q': 'attn/to_q', 'attn.to_k': 'attn/to_k', 'attn.to_v': 'attn/to_v',
         'attn.to_out.0': 'attn/to_out', 'attn.norm_q': 'attn/norm_q', 'attn.norm_k': 'attn/norm_k',
         'feed_forward.linear_1': 'feed_forward/linear_1',
         'feed_forward.linear_2': 'feed_forward/linear_2',
         'feed_forward.linear_3': 'feed_forward/linear_3', 'norm2': 'norm2',
         'ffn_norm1': 'ffn_norm1', 'ffn_norm2': 'ffn_norm2'}
TOP = {'x_embedder': 'x_embedder', 'time_caption_embed.timestep_embedder.linear_1': 'time_1',
       'time_caption_embed.timestep_embedder.linear_2': 'time_2',
       'time_caption_embed.caption_embedder.0': 'caption_norm',
       'time_caption_embed.caption_embedder.1': 'caption_proj',
       'norm_out.linear_1': 'out_scale', 'norm_out.linear_2': 'out_proj'}


def _put(tree, path, value):
    *parents, last = path.split('/')
    for parent in parents:
        tree = tree[parent]
    assert tree[last].shape == value.shape, path
    tree[last] = jnp.asarray(value)


def _module(prefix):
    """Torch module name -> (our path, layer index or None)."""
    if prefix in TOP:
        return TOP[prefix], None
    stack, index, rest = prefix.split('.', 2)
    if stack == 'context_refiner':
        names = BLOCK | {'norm1': 'norm1'}
    else:
        names = BLOCK | {'norm1.norm': 'norm1', 'norm1.linear': 'modulation'}
    return f'{stack}/{names[rest]}', int(index)


def convert(state_dict, params):
    """Fills our parameter tree from a torch state dict; every tensor must find its place."""
    stacks = {}
    for name, tensor in state_dict.items():
        prefix, kind = name.rsplit('.', 1)
        path, index = _module(prefix)
        value = tensor.numpy()
        leaf = kind
        if kind == 'weight' and value.ndim == 2:
            leaf, value = 'kernel', value.T
        if index is None:
            _put(params, f'{path}/{leaf}', value)
        else:
            stacks.setdefault(f'{path}/{leaf}', {})[index] = value
    for path, layers in stacks.items():
        _put(params, path, np.stack([layers[i] for i in range(len(layers))]))
    return params


@pytest.fixture(scope='module')
def pair():
    torch = pytest.importorskip('torch')
    diffusers = pytest.importorskip('diffusers')
    torch.manual_seed(0)
    theirs = diffusers.Lumina2Transformer2DModel(**DIFFUSERS).eval()
    with torch.no_grad():
        for p in theirs.parameters():  # norms and biases at other values than 1 and 0
            p.add_(0.1 * torch.randn_like(p))
    fields = {k: v for k, v in DIFFUSERS.items() if k != 'axes_lens'}
    ours = NextDiT(NextDiTConfig(**fields), nnx.Rngs(0))
    graphdef, state = nnx.split(ours)
    nnx.replace_by_pure_dict(state, convert(theirs.state_dict(), nnx.to_pure_dict(state)))
    return theirs, nnx.merge(graphdef, state)


@pytest.mark.parametrize('height, width, lengths', [
    (8, 8, (5, 5)), (8, 12, (7, 3)), (16, 4, (1, 9))])
def test_forward_and_input_gradient(pair, height, width, lengths):
    torch = pytest.importorskip('torch')
    theirs, ours = pair
    rng = np.random.default_rng(height + width)
    x = rng.standard_normal((2, height, width, 4)).astype(np.float32)
    caption = rng.standard_normal((2, 9, 24)).astype(np.float32)
    mask = np.arange(9)[None] < np.asarray(lengths)[:, None]
    t = np.asarray([0.3, 0.9], np.float32)

    tx = torch.tensor(x.transpose(0, 3, 1, 2)).requires_grad_()
    want = theirs(tx, torch.tensor(t), torch.tensor(caption), torch.tensor(mask)).sample
    want.square().sum().backward()
    want_grad = tx.grad.numpy().transpose(0, 2, 3, 1)
    want = want.detach().numpy().transpose(0, 2, 3, 1)
    with jax.default_matmul_precision('highest'):
        got = ours(x, t, caption, mask)
        got_grad = jax.grad(lambda x: jnp.sum(jnp.square(ours(x, t, caption, mask))))(x)
    for ours_, theirs_ in ((got, want), (got_grad, want_grad)):
        scale = np.sqrt(np.mean(theirs_**2))
        assert np.abs(np.asarray(ours_) - theirs_).max() <= 1e-4 * scale
