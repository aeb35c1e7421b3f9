"""NextDiT against diffusers' own `Lumina2Transformer2DModel`, random weights, fp32.

Needs the `parity` extra. Weights go from one to the other as users' do: through a folder.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddmd_jax.diffusion import process
from ddmd_jax.families import LoadOptions
from ddmd_jax.families.lumina import teacher as lumina
from ddmd_jax.parallel import sharding

pytestmark = pytest.mark.parity

DIFFUSERS = {'patch_size': 2, 'in_channels': 4, 'hidden_size': 48, 'num_layers': 2,
             'num_refiner_layers': 2, 'num_attention_heads': 4, 'num_kv_heads': 2,
             'multiple_of': 16, 'norm_eps': 1e-5, 'axes_dim_rope': (4, 4, 4),
             'axes_lens': (64, 32, 32), 'cap_feat_dim': 24}


@pytest.fixture(scope='module')
def pair(tmp_path_factory):
    torch = pytest.importorskip('torch')
    diffusers = pytest.importorskip('diffusers')
    torch.manual_seed(0)
    theirs = diffusers.Lumina2Transformer2DModel(**DIFFUSERS).eval()
    with torch.no_grad():
        for p in theirs.parameters():  # norms and biases at other values than 1 and 0
            p.add_(0.1 * torch.randn_like(p))
    folder = tmp_path_factory.mktemp('published')
    theirs.save_pretrained(folder)
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    return theirs, lumina.load(LoadOptions(str(folder), mesh, size=(64, 64)))


@pytest.mark.parametrize('height, width, lengths', [
    (8, 8, (5, 5)), (8, 12, (7, 3)), (16, 4, (1, 9))])  # odd lengths, unequal ones, non-square
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
    cond = {'embeds': caption, 'mask': mask}

    def velocity(x):
        x_hat = ours.predict_clean(ours.params, x, jnp.asarray(t), cond)
        return process.to_velocity(x, x_hat, jnp.asarray(t))

    with jax.default_matmul_precision('highest'):
        got = velocity(x)
        got_grad = jax.grad(lambda x: jnp.sum(jnp.square(velocity(x))))(x)
    for ours_, theirs_ in ((got, want), (got_grad, want_grad)):
        scale = np.sqrt(np.mean(theirs_**2))
        assert np.abs(np.asarray(ours_) - theirs_).max() <= 1e-4 * scale
