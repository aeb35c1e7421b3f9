"""`ZImage` against diffusers' own `ZImageTransformer2DModel`, random weights, fp32.

Needs the `parity` extra. Weights go from one to the other as users' do: through a folder.
"""

import jax
import jax.numpy as jnp
import numpy as np
import published_zimage as published
import pytest

from ddmd_jax import families
from ddmd_jax.diffusion import process

pytestmark = pytest.mark.parity
torch = pytest.importorskip('torch')
diffusers = pytest.importorskip('diffusers')

DEEP = {'n_layers': 3, 'n_refiner_layers': 1, 'dim': 60, 'n_heads': 3, 'n_kv_heads': 1,
        'axes_dims': (4, 6, 10), 'norm_eps': 1e-3, 't_scale': 500.0}
WIDE = {'dim': 288, 'n_heads': 2, 'axes_dims': (48, 48, 48), 'cap_feat_dim': 16,
        'rope_theta': 100.0, 'in_channels': 8}  # wider than the time embedding's 256


@pytest.fixture(scope='module')
def pair(request, tmp_path_factory):
    """(theirs, our teacher) of a tiny architecture with the changes given."""
    theirs = published.transformer(**request.param)
    folder = tmp_path_factory.mktemp('published')
    theirs.save_pretrained(folder)
    options = families.LoadOptions(str(folder), size=(64, 64))
    return theirs, families.get('zimage').load(options)


def of_theirs(model, x, t, captions):
    """(velocities ``[B, H, W, C]``, gradients of their squares), each row computed alone."""
    rows = []
    for row in zip(x, t, captions, strict=True):
        latent, time, caption = map(torch.tensor, row)
        latent = latent.permute(2, 0, 1)[:, None].requires_grad_()
        (out,) = model([latent], time[None], [caption], return_dict=False)[0]
        out.square().sum().backward()
        rows.append((out.detach(), latent.grad))
    return (np.stack([y[:, 0].permute(1, 2, 0).numpy() for y in part]) for part in zip(*rows))


def of_ours(teacher, x, t, cond):
    """The same, of all rows at once."""
    def loss(x):
        v = process.to_velocity(x, teacher.predict_clean(teacher.params, x, t, cond), t)
        return jnp.sum(jnp.square(v)), v

    with jax.default_matmul_precision('highest'):
        grad, v = jax.jit(jax.grad(loss, has_aux=True))(x)
    return np.asarray(v), np.asarray(grad)


def near(got, want):
    return np.abs(got - want).max() / np.sqrt(np.mean(want**2))


# Captions are filled up to multiples of 32, as images are: 16 x 16 latents have 64 tokens, and two
# captions here fit exactly. `places` is the batch's longest or more, as a bucket has it.
@pytest.mark.parametrize('pair, height, width, lengths, places', [
    ({}, 8, 8, (5,), 5), ({}, 8, 12, (32, 7), 32), ({}, 16, 16, (64, 64), 64),
    ({}, 16, 4, (1, 33, 64), 70), (DEEP, 8, 12, (9, 40), 40), (WIDE, 4, 20, (31, 65), 128),
], indirect=['pair'])
def test_forward_and_input_gradient(pair, height, width, lengths, places):
    theirs, ours = pair
    rng = np.random.default_rng(height + width)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    x = normal(len(lengths), height, width, theirs.config.in_channels)
    t = np.linspace(0.1, 0.9, len(lengths), dtype=np.float32)
    captions = [normal(n, theirs.config.cap_feat_dim) for n in lengths]
    want, want_grad = of_theirs(theirs, x, t, captions)
    got, grad = of_ours(ours, x, jnp.asarray(t), published.cond(captions, places))
    assert near(got, want) <= 1e-4 and near(grad, want_grad) <= 1e-4
