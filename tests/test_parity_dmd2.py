"""One update of DMD2's SDXL recipe, and of the paper's, against its formulas in plain PyTorch.

The formulas are those that DMD2's paper and published settings state (`configs/sdxl.py`): eps in,
eps out, integer steps, discrete betas, guidance in eps, no flow in sight. Drawn here are only the
noises and levels, which are handed to both. Weights are random: student, teacher and critic differ.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import published_sdxl
import pytest
import tiny

from ddmd_jax import families as teachers
from ddmd_jax.data.batch import NULLS, Batch
from ddmd_jax.method import recipe as recipes
from ddmd_jax.method.algorithm import critic_objective, generator_objective
from ddmd_jax.method.inputs import CriticKeys, GeneratorKeys, Models
from ddmd_jax.method.schedules import draw_between
from ddmd_jax.weights import flat

pytestmark = pytest.mark.parity
torch = pytest.importorskip('torch')
diffusers = pytest.importorskip('diffusers')

ROWS, TOKENS, SIDE, WIDTH = 4, 3, 8, 16
SHAPE = (ROWS, SIDE, SIDE, 4)
STEPS = (999, 749, 499, 249)
F = torch.nn.functional


def to_torch(x):
    return torch.tensor(np.asarray(x).transpose(0, 3, 1, 2))


def near(got, want):
    """Largest difference of two trees, in units of the rms of its own leaf, or of all that is
    wanted where that is larger: gradients that cancel but for rounding have no scale of their own.
    """
    got, want = flat.flatten(got), flat.flatten(want)
    assert got.keys() == want.keys()
    rms = lambda x: np.sqrt(np.mean(np.square(np.asarray(x, np.float64))))
    everything = rms(np.concatenate([np.ravel(x) for x in want.values()]))
    apart = {k: np.abs(np.asarray(got[k]) - want[k]).max() / max(rms(want[k]), everything)
             for k in want}
    return max(apart.values())


# --- The formulas, in PyTorch ---


class Formulas:
    """DMD2's losses of three U-Nets and a head; noises and steps are given."""

    def __init__(self, unets, head, cond):
        self.teacher, self.student, self.critic = unets
        self.head, self.cond = head, {k: torch.tensor(np.asarray(x)) for k, x in cond.items()}
        self.abar = diffusers.DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule='scaled_linear').alphas_cumprod

    def at(self, k):
        abar = self.abar[torch.as_tensor(np.asarray(k))].double().reshape(-1, 1, 1, 1)
        return abar.sqrt(), (1 - abar).sqrt()

    def add_noise(self, x, noise, k):
        a, s = self.at(k)
        return (a * x + s * noise).float()

    def clean(self, x_vp, eps, k):
        a, s = self.at(k)
        return ((x_vp.double() - s * eps.double()) / a).float()

    def given(self, rows, null=False):
        """What conditions a U-Net: zeros for the null prompt, the same sizes for all."""
        text = {k: x[rows] * (0 if null else 1) for k, x in self.cond.items()}
        sizes = torch.tensor([[8. * SIDE, 8. * SIDE, 0, 0, 8. * SIDE, 8. * SIDE]])
        return text['embeds'], {'text_embeds': text['pooled'],
                                'time_ids': sizes.expand(len(text['pooled']), 6)}

    def eps(self, unet, x_vp, k, rows=slice(None), null=False):
        embeds, added = self.given(rows, null)
        k = torch.as_tensor(np.asarray(k))
        return unet(x_vp, k, embeds, added_cond_kwargs=added).sample

    def x0(self, unet, x_vp, k, rows=slice(None), null=False):
        return self.clean(x_vp, self.eps(unet, x_vp, k, rows, null), k)

    def images(self, noises):
        """Row b is made at the b-th of the four steps, from the student's own earlier ones."""
        found = []
        for b, last in enumerate(STEPS):
            z = noises[0][b:b + 1]  # exactly unit noise at step 999
            with torch.no_grad():
                for i in range(b):
                    x = self.x0(self.student, z, [STEPS[i]], [b])
                    z = self.add_noise(x, noises[i + 1][b:b + 1], [STEPS[i + 1]])
            found.append(self.x0(self.student, z, [last], [b]))
        return torch.cat(found)

    def logits(self, x, noise, k):
        """The head on the output of the critic's mid block, of an image diffused to step k."""
        outputs = []
        hook = self.critic.mid_block.register_forward_hook(lambda *a: outputs.append(a[2]))
        self.eps(self.critic, self.add_noise(x, noise, k), k)
        hook.remove()
        return self.head(outputs[0]).reshape(-1)

    def generator(self, d):
        x = self.images(d['noises'])
        per_row = lambda g: g.abs().mean((1, 2, 3), keepdim=True)
        with torch.no_grad():
            x_dm = self.add_noise(x, d['noise_dm'], d['k_dm'])
            fake = self.x0(self.critic, x_dm, d['k_dm'])
            if d['shared']:  # DMD2: guided in eps, both terms at once
                cond, uncond = (self.eps(self.teacher, x_dm, d['k_dm'], null=n) for n in (0, 1))
                real = self.clean(x_dm, uncond + 8 * (cond - uncond), d['k_dm'])
                gradient = (fake - real) / per_row(x - real)
            else:  # the paper: CA cleaner than the student's step, DM anywhere, each normalised
                x_ca = self.add_noise(x, d['noise_ca'], d['k_ca'])
                cond, uncond = (self.x0(self.teacher, x_ca, d['k_ca'], null=n) for n in (0, 1))
                real = self.x0(self.teacher, x_dm, d['k_dm'])
                gradient = -(7 * (cond - uncond) / per_row(x - cond)
                             + (real - fake) / per_row(x - real))
        loss = 0.5 * F.mse_loss(x, x.detach() - torch.nan_to_num(gradient))
        return loss + 5e-3 * F.softplus(-self.logits(x, d['noise_gan'], d['k_gan'])).mean()

    def judge(self, d):
        x = self.images(d['noises']).detach()
        x_k = self.add_noise(x, d['noise'], d['k'])
        loss = F.mse_loss(self.eps(self.critic, x_k, d['k']), d['noise'])
        fake = self.logits(x, d['noise_fake'], d['k_fake'])
        real = self.logits(d['real'], d['noise_real'], d['k_real'])
        return loss + 1e-2 * (F.softplus(fake).mean() + F.softplus(-real).mean())


def make_head():
    """As published, but for its size: maps of 8 x 8 x 16 are halved once, not 32 x 32 x 1280 three
    times, and there are 4 groups of 4 channels."""
    conv = lambda out, *how: torch.nn.Conv2d(WIDTH, out, *how)
    layers = []
    for how in ((4, 2, 1), (4, 4, 0)):
        layers += [conv(WIDTH, *how), torch.nn.GroupNorm(4, WIDTH), torch.nn.SiLU()]
    return torch.nn.Sequential(*layers, conv(1, 1))


def head_tree(head, of=lambda p: p):
    """Parameters of the head, or what `of` makes of them, by our names."""
    tree = {}
    places = {0: 'convs/0', 1: 'norms/0', 3: 'convs/1', 4: 'norms/1', 6: 'verdict'}
    for place, name in places.items():
        weight, bias = (of(p).detach().numpy().copy() for p in head[place].parameters())
        kind = 'scale' if weight.ndim == 1 else 'kernel'
        tree[f'{name}/{kind}'] = weight if weight.ndim == 1 else weight.transpose(2, 3, 1, 0)
        tree[f'{name}/bias'] = bias
    return flat.unflatten(tree)


def gradient_tree(unet, folder):
    """A U-Net's gradients by our names: written as weights, and read as such."""
    with torch.no_grad():
        for p in unet.parameters():
            p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
    unet.save_pretrained(folder)
    return teachers.load_teacher(str(folder), size=(8 * SIDE, 8 * SIDE)).params


# --- Both sides ---


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """Folders of three U-Nets that are near one another, as in a run: teacher, student, critic."""
    path = tmp_path_factory.mktemp('unets')
    first, *others = (published_sdxl.unet(seed, **published_sdxl.ONE_LEVEL) for seed in range(3))
    with torch.no_grad():
        for other in others:
            for p, q in zip(first.parameters(), other.parameters(), strict=True):
                q.copy_(p + 0.1 * (q - p))
    for name, unet in zip('tsc', (first, *others)):
        unet.save_pretrained(path / name)
    return path


@pytest.fixture(scope='module')
def networks(folders):
    """Of all three: predictions and features, each a program of its own, which every objective of
    every recipe calls. The objectives around them run op by op: they are compiled for nobody."""
    teacher = teachers.load_teacher(str(folders / 't'), size=(8 * SIDE, 8 * SIDE))
    return jax.jit(teacher.predict_clean), jax.jit(teacher.features)


@pytest.fixture(scope='module')
def cond():
    rng = np.random.default_rng(5)
    draw = lambda *shape: rng.standard_normal((ROWS, *shape)).astype(np.float32)
    return {'embeds': draw(TOKENS, 56), 'pooled': draw(20)}


@pytest.fixture(scope='module')
def real():
    return np.random.default_rng(6).standard_normal(SHAPE).astype(np.float32)


def draws(recipe, schedule, g_key, c_key):
    """What the objectives draw from their keys, as noises and steps of the table."""
    g = GeneratorKeys.of(g_key)
    c = CriticKeys.of(c_key)
    few, (gan,) = recipe.steps, recipe.regularisers.values()
    normal = lambda key: to_torch(jax.random.normal(key, SHAPE))
    steps = lambda t: np.asarray(few.time.step_of(t))
    assert steps(few.times).tolist() == list(STEPS)
    tau = recipe.schedule.levels(g.levels, few.uniform[np.arange(ROWS) % 4], recipe.ranges,
                                 few.time)
    gan_at = lambda key: steps(few.time(draw_between(key, *gan.tau, (ROWS,))))
    real, fake = (jax.random.split(key) for key in c.regularisers(0))
    student = g.regularisers(0)
    noises = [normal(key) for key in jax.random.split(g.simulation, 4)]
    shared = schedule == 'dmd2'
    generator = {
        'noises': noises, 'shared': shared, 'k_ca': steps(tau.ca), 'k_dm': steps(tau.dm),
        'noise_ca': normal(g.noise_ca), 'noise_dm': normal(g.noise_ca if shared else g.noise_dm),
        'k_gan': gan_at(student[0]), 'noise_gan': normal(student[1])}
    critic = {
        'noises': noises, 'noise': normal(c.noise),
        'k': steps(few.time(draw_between(c.level, *recipe.critic_range, (ROWS,)))),
        'k_real': gan_at(real[0]), 'noise_real': normal(real[1]),
        'k_fake': gan_at(fake[0]), 'noise_fake': normal(fake[1])}
    return generator, critic


@pytest.mark.parametrize('name', ['dmd2', 'decoupled_hybrid'])
def test_losses_and_gradients_are_the_formulas(folders, networks, cond, real, tmp_path, name):
    load = lambda which: teachers.load_teacher(str(folders / which), size=(8 * SIDE, 8 * SIDE))
    teacher, student, critic = map(load, 'tsc')
    teacher = dataclasses.replace(teacher, predict_clean=networks[0], features=networks[1])
    recipe = recipes.from_config(tiny.load_config('sdxl', name), teacher)
    torch.manual_seed(3)
    head = make_head()
    unets = [diffusers.UNet2DConditionModel.from_pretrained(folders / which) for which in 'tsc']
    g_key, c_key = jax.random.key(1), jax.random.key(2)
    for_g, for_c = draws(recipe, name, g_key, c_key)
    if name == 'decoupled_hybrid':
        assert (for_g['k_ca'] < np.asarray(STEPS)).all() and (for_g['k_dm'] != for_g['k_ca']).any()

    ours = {k: jnp.asarray(x) for k, x in cond.items()} | {'mask': jnp.ones((ROWS, TOKENS), bool)}
    null = NULLS['zeros']({k: x[:1] for k, x in ours.items()})
    batch = Batch(ours, jnp.asarray(real), SHAPE[1:])
    own = head_tree(head)

    def generator(params, critic, teacher_params, extra):
        models = Models(teacher.predict_clean, teacher_params, null, {'gan': extra})
        loss, _, x = generator_objective(params, critic, models, batch, recipe, g_key)
        return loss, x

    def judge(trained, params, x):
        models = Models(teacher.predict_clean, None, null, {'gan': trained[1]})
        same_images = dataclasses.replace(batch, x=x)
        return critic_objective(trained[0], params, models, same_images, recipe, c_key)[0]

    with jax.default_matmul_precision('highest'):
        (loss, x), grads = jax.value_and_grad(generator, has_aux=True)(
            student.params, critic.params, teacher.params, own)
        c_loss, (c_grads, h_grads) = jax.value_and_grad(judge)(
            (critic.params, own), student.params, x)

    formulas = Formulas(unets, head, cond)
    want = formulas.generator(for_g)
    want.backward()
    assert abs(float(loss) / want.item() - 1) <= 1e-4
    assert near(grads, gradient_tree(unets[1], tmp_path / 'student')) <= 1e-4
    for module in (unets[2], head):
        module.zero_grad()

    unets[1] = diffusers.UNet2DConditionModel.from_pretrained(folders / 's')
    formulas = Formulas(unets, head, cond)
    want = formulas.judge(for_c | {'real': to_torch(real)})
    want.backward()
    assert abs(float(c_loss) / want.item() - 1) <= 1e-4
    assert near(h_grads, head_tree(head, lambda p: p.grad)) <= 1e-4
    assert near(c_grads, gradient_tree(unets[2], tmp_path / 'critic')) <= 1e-4

