"""SDXL in and out: folders, process, codec and sampler, against diffusers itself."""

import contextlib
import dataclasses
import functools
import json
import signal

import forked
import jax
import jax.numpy as jnp
import numpy as np
import published_sdxl
import pytest
import runs
import tiny
from runs import DRIVER
from saved import save
from test_images import picture

from ddmd_jax import families as teachers
from ddmd_jax.data.batch import NULLS
from ddmd_jax.diffusion import drawing, process, sampling
from ddmd_jax.diffusion.time import FewSteps, Shift, StepTable
from ddmd_jax.export import write
from ddmd_jax.export.models import find_model, load
from ddmd_jax.families.family import Exported
from ddmd_jax.families.sdxl import export, teacher as sdxl
from ddmd_jax.parallel import sharding
from ddmd_jax.weights.flat import WeightsError

pytestmark = pytest.mark.parity
torch = pytest.importorskip('torch')
diffusers = pytest.importorskip('diffusers')

LATENTS = (2, 8, 4, 4)  # non-square, so that an axis taken for the other shows
PIXELS = (16, 8)
PROMPTS = ['a red apple', 'a taco on an orange background']


@pytest.fixture(scope='module')
def theirs():
    return published_sdxl.pipeline(text=True)


@pytest.fixture(scope='module')
def folder(theirs, tmp_path_factory):
    path = tmp_path_factory.mktemp('sdxl')
    theirs.save_pretrained(path, max_shard_size='100KB')
    assert len(list((path / 'unet').glob('*.safetensors'))) > 2
    return path


@pytest.fixture(scope='module')
def ours(folder):
    return teachers.load_teacher(str(folder), size=PIXELS)


@pytest.fixture(scope='module')
def cond(folder):
    """Of the prompts and the empty text, in fp32."""
    text = teachers.get('sdxl').load_text(teachers.LoadOptions(str(folder)))
    with jax.default_matmul_precision('highest'):
        found = jax.jit(text.apply)(text.params, text.tokenize([*PROMPTS, '']))
    return {k: np.asarray(x) for k, x in found.items()}


@pytest.fixture(scope='module')
def solve(ours):
    """``guidance -> (params, cond, null, noise) -> latents``: the teacher's four steps."""
    def run(guidance, params, cond, null, noise):
        with jax.default_matmul_precision('highest'):
            return sampling.sample_teacher(
                functools.partial(ours.predict_clean, params), cond,
                ours.time.grid_input(noise, 4), ours.time.grid(4),
                sampling.Guidance(guidance, null, ours.rescale))

    return functools.cache(lambda guidance: jax.jit(functools.partial(run, guidance)))


def near(got, want):
    """Largest difference, in units of the rms of what is wanted."""
    return np.abs(np.asarray(got) - want).max() / np.sqrt(np.mean(want**2))


def to_torch(x):
    return torch.tensor(np.asarray(x).transpose(0, 3, 1, 2))


def from_torch(x):
    return x.detach().numpy().transpose(0, 2, 3, 1)


# --- The process ---


def test_every_step_is_a_rescaled_step_of_the_flow():
    """`add_noise` and the noise to x_hat, over all 1000 steps."""
    table = StepTable()
    scheduler = diffusers.DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule='scaled_linear')
    rng = np.random.default_rng(0)
    x, noise, predicted = rng.standard_normal((3, 1000, 2, 2, 4)).astype(np.float32)
    k, t = torch.arange(1000), jnp.asarray(table.times)
    want = scheduler.add_noise(torch.tensor(x), torch.tensor(noise), k).numpy()
    x_t = process.renoise(x, t, noise)
    assert near(x_t / process.preserved(t, x), want) <= 1e-5

    abar = scheduler.alphas_cumprod.double().reshape(-1, 1, 1, 1)
    clean = (torch.tensor(want) - (1 - abar).sqrt() * torch.tensor(predicted)) / abar.sqrt()
    got = process.noise_to_clean(x_t, predicted, t)
    for step in range(1000):
        assert near(got[step], clean[step].numpy()) <= 1e-5, step


@pytest.mark.parametrize('spacing, offset', [('leading', 1), ('leading', 0), ('trailing', 0)])
@pytest.mark.parametrize('n', [1, 7, 50])
def test_a_solver_starts_where_the_pipelines_does(spacing, offset, n):
    """The steps of its grid, and how large unit noise is made at the first of them."""
    scheduler = diffusers.EulerDiscreteScheduler(**published_sdxl.SCHEDULER | {
        'timestep_spacing': spacing, 'steps_offset': offset})
    scheduler.set_timesteps(n)
    table = StepTable(spacing=spacing, offset=offset)
    np.testing.assert_array_equal(table.step_of(table.grid(n)[:-1]), scheduler.timesteps.numpy())
    noise = np.random.default_rng(n).standard_normal((1, 3, 3, 4)).astype(np.float32)
    # Theirs is x + sigma noise, which is the flow's but for the factor 1 + sigma.
    want = noise * float(scheduler.init_noise_sigma / (1 + scheduler.sigmas[0]))
    np.testing.assert_allclose(table.grid_input(noise, n), want, rtol=1e-5)


# --- The network and the codec ---


def test_a_prediction_is_the_pipelines(theirs, ours, cond):
    """Rows at different steps, and of different original sizes and crops."""
    rng = np.random.default_rng(1)
    x_vp = rng.standard_normal(LATENTS).astype(np.float32)
    ids = np.asarray([[1000, 720, 0, 31, 16, 8], [16, 8, 5, 0, 300, 1023]], np.int32)
    steps = np.asarray([999, 20])
    rows = {k: x[:2] for k, x in cond.items()} | {'time_ids': ids}
    with torch.no_grad():
        noise = theirs.unet(
            to_torch(x_vp), torch.tensor(steps), torch.tensor(rows['embeds']),
            added_cond_kwargs={'text_embeds': torch.tensor(rows['pooled']),
                               'time_ids': torch.tensor(ids)}).sample
    abar = theirs.scheduler.alphas_cumprod[torch.tensor(steps)].reshape(-1, 1, 1, 1)
    want = from_torch((to_torch(x_vp) - (1 - abar).sqrt() * noise) / abar.sqrt())
    t = jnp.asarray(ours.time.times)[steps]
    with jax.default_matmul_precision('highest'):
        got = jax.jit(ours.predict_clean)(
            ours.params, x_vp * process.preserved(t, x_vp), t, rows)
    assert got.dtype == jnp.float32
    for row in range(2):
        assert near(got[row], want[row]) <= 1e-4


def test_the_codecs_images_and_latents(theirs, ours):
    """Decoded in fp32, by the published factor and without a shift."""
    z = np.random.default_rng(2).standard_normal(LATENTS).astype(np.float32)
    with torch.no_grad():
        want = from_torch(theirs.vae.decode(to_torch(z) / 0.13025).sample)
    with jax.default_matmul_precision('highest'):
        got = ours.latents.decode(z)
    assert got.dtype == np.float32 and near(got, want) <= 1e-4


def test_latents_of_real_images_are_the_codecs(theirs, folder, ours):
    """Samples of its posterior by the published factor, and its means; the noise is by number."""
    images = np.random.default_rng(4).integers(0, 255, (2, *PIXELS, 3), np.uint8)
    with torch.no_grad():
        posterior = theirs.vae.encode(to_torch(images / np.float32(127.5) - 1)).latent_dist
    key, numbers = jax.random.key(5), np.uint32([7, 3])
    noise = np.stack([jax.random.normal(jax.random.fold_in(key, n), (8, 4, 4)) for n in numbers])
    encoder = teachers.get('sdxl').load_images(teachers.LoadOptions(str(folder)))
    assert encoder.identity == ours.latents.encoder and (encoder.factor, encoder.channels) == (2, 4)
    with jax.default_matmul_precision('highest'):
        run = lambda mean: encoder.run(encoder.params, images, numbers, key, mean)
        sampled, mean = run(False), run(True)
    assert near(mean, 0.13025 * from_torch(posterior.mean)) <= 1e-4
    assert near(sampled, 0.13025 * from_torch(posterior.mean + posterior.std * to_torch(noise))
                ) <= 1e-4


@pytest.mark.parametrize('guidance, null', [
    (1.0, 'zeros'), (5.0, 'zeros'), (5.0, 'encoded'), (8.0, 'zeros'), (8.0, 'encoded')])
def test_sampler_gives_the_pipelines_latents(theirs, ours, solve, cond, guidance, null):
    noise = np.random.default_rng(3).standard_normal(LATENTS).astype(np.float32)
    theirs.register_to_config(force_zeros_for_empty_prompt=null == 'zeros')
    with torch.no_grad():
        want = from_torch(theirs(
            PROMPTS, latents=to_torch(noise), height=PIXELS[0], width=PIXELS[1],
            num_inference_steps=4, guidance_scale=guidance, output_type='latent',
            return_dict=False)[0])
    only = lambda rows: {k: jnp.asarray(x[rows]) for k, x in cond.items()}
    got = solve(guidance)(ours.params, only([0, 1]), NULLS[null](only([2, 2])), noise)
    assert near(got, want) <= 1e-3


def test_the_teachers_own_null_prompt_is_the_pipelines(ours, folder, tmp_path):
    """Drawn as by `sample`: the encoded empty text goes in, zeros are guided away from."""
    assert ours.null == 'zeros' and teachers.load_teacher(str(folder / 'unet')).null == 'zeros'
    index = json.loads((folder / 'model_index.json').read_text())
    assert index['force_zeros_for_empty_prompt'] is True
    sampler = drawing.of_teacher(ours, 2, 3.0)
    assert sampler.evaluations == 4


# --- In and out ---


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_import_and_export_change_nothing(tmp_path, dtype):
    kind = getattr(torch, dtype)
    before = published_sdxl.unet(seed=1).to(kind)
    before.save_pretrained(tmp_path / 'in')
    teacher = teachers.load_teacher(str(tmp_path / 'in'), size=(64, 64))
    assert teacher.time == StepTable() and teacher.latents.decode is None
    config = json.loads((tmp_path / 'in' / 'config.json').read_text())
    sdxl.export(teacher.params, config, tmp_path / 'out', jnp.dtype(dtype))
    after = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / 'out', torch_dtype=kind)
    assert before.state_dict().keys() == after.state_dict().keys()
    for name, tensor in before.state_dict().items():
        assert torch.equal(tensor, after.state_dict()[name]), name
    draw = lambda *shape: torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(kind)
    run = lambda model: model(
        draw(1, 4, 8, 8), 7, draw(1, 5, 56), added_cond_kwargs={
            'text_embeds': draw(1, 20), 'time_ids': torch.ones(1, 6)}).sample
    with torch.no_grad():
        assert torch.equal(run(before.eval()), run(after.eval()))


# --- Students ---


def moved(params):
    """`params`, each leaf moved by a tenth of its size: a student that is not its teacher."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: np.asarray(x, np.float32) + (
        0.1 * np.std(x) * rng.standard_normal(x.shape)).astype(np.float32), params)


@contextlib.contextmanager
def drawn(module, noises):
    """A scheduler of diffusers draws `noises` ``[N, B, H, W, C]``, one after another."""
    left, own = [to_torch(x) for x in noises], module.randn_tensor
    module.randn_tensor = lambda shape, **_: left.pop(0)
    try:
        yield
    finally:
        module.randn_tensor = own
    assert not left


def draws_the_same(folder, teacher, params, cond, mode, few, size):
    """The pipeline of a folder draws PROMPTS as `params` do."""
    from diffusers.schedulers import scheduling_lcm

    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    assert type(pipe) is diffusers.StableDiffusionXLPipeline
    key, steps = jax.random.key(4), len(few.times)
    with jax.default_matmul_precision('highest'):
        want = np.asarray(jax.jit(drawing.of_student(teacher, steps, few.time, mode).draw)(
            params, cond, None, key))
    noises = np.asarray(sampling.step_noise(key, steps, want.shape))
    with drawn(scheduling_lcm, noises[1:] if mode == 'renoise' else []), torch.no_grad():
        got = from_torch(pipe(
            PROMPTS, latents=to_torch(noises[0]), height=size[0], width=size[1],
            num_inference_steps=steps, guidance_scale=1.0, output_type='latent',
            return_dict=False)[0])
    assert pipe.scheduler.timesteps.tolist() == few.time.step_of(few.times).tolist()
    assert near(got, want) <= 1e-3
    assert pipe.config.force_zeros_for_empty_prompt is True


@pytest.mark.parametrize(('mode', 'steps', 'first'), [
    ('renoise', 4, 999), ('deterministic', 4, 999), ('renoise', 1, 399)])
def test_a_student_draws_the_same_in_its_pipeline(folder, cond, tmp_path, mode, steps, first):
    """By itself: the scheduler of the folder takes the student's steps, whatever starts them."""
    teacher = teachers.load_teacher(str(folder), size=PIXELS)
    params = moved(teacher.params)
    source = export.EXPORT.open_source(str(folder))
    table = dataclasses.replace(source.time, first=first)
    export.EXPORT.write_pipeline(
        Exported(params, source, 1, steps, table, 'float32', mode), tmp_path)
    rows = {k: x[:2] for k, x in cond.items()}
    draws_the_same(tmp_path, teacher, params, rows, mode, FewSteps(table, steps), PIXELS)


def test_a_whole_run_exports_what_is_a_teachers_folder(folder, tmp_path):
    """By the command's own way; what is written is read again, to distil further."""
    teacher = teachers.load_teacher(str(folder), size=PIXELS)
    workdir = save(tmp_path / 'run', {
        'student.steps': 4, 'data.name': 'prompts', 'method.alpha': 8.0, 'teacher.name': 'sdxl',
        'teacher.path': str(folder), 'method.shift': None}, moved(teacher.params))
    written = write.export(workdir, tmp_path / 'out', write.Wanted(dtype='bfloat16'))
    assert [p.name for p in written] == [
        'unet', 'scheduler', *export.COPIED, 'model_index.json', 'README.md']
    again = teachers.load_teacher(str(tmp_path / 'out'), size=PIXELS)
    assert again.time == teacher.time == StepTable() and again.latents.decode is not None
    assert teachers.get('sdxl').load_text(teachers.LoadOptions(str(tmp_path / 'out'))).width == 56
    alone = write.export(workdir, tmp_path / 'alone', write.Wanted('safetensors'))
    assert diffusers.UNet2DConditionModel.from_pretrained(alone[0])


@pytest.mark.parametrize(('time', 'steps', 'words'), [
    (Shift(3.0), 4, 'is no table of steps'), (StepTable(), 3, '3 steps do not divide the 1000')])
def test_what_no_scheduler_takes_is_one_line(folder, tmp_path, time, steps, words):
    source = export.EXPORT.open_source(str(folder))
    with pytest.raises(WeightsError, match=words):
        export.EXPORT.write_pipeline(
            Exported(None, source, 1, steps, time, 'float32', 'renoise'), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_run_on_eight_devices_is_killed_resumed_and_exported(tmp_path, monkeypatch):
    """The commands a user gives, from images and a pipeline's folder to one diffusers draws with.

    The paper's recipe at a tiny size, GAN and real images included: captions are encoded on the
    mesh by both CLIPs, the size of the images goes with them, and CA leads away from zeros.
    """
    pipe, images = tmp_path / 'pipe', tmp_path / 'images'
    published_sdxl.pipeline(text=True, **published_sdxl.ONE_LEVEL).save_pretrained(pipe)
    (tmp_path / 'in').mkdir()
    for i in range(24):
        (tmp_path / 'in' / f'{i}.png').write_bytes(picture(i, width=30))
        (tmp_path / 'in' / f'{i}.txt').write_text(f'image number {i}')
    made = forked.run('ddmd_jax.prepare', 'images', f'--input={tmp_path / "in"}', '--teacher=sdxl',
                      f'--path={pipe}', f'--out={images}', '--sizes=16x24')
    assert made.returncode == 0, made.stderr
    monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(tmp_path / 'cache'))
    fields = {
        'teacher.path': pipe, 'teacher.dtype': 'float32', 'teacher.param_dtype': 'float32',
        'teacher.remat': 'none',  # fewer programs' lines to compile
        'data.path': images, 'data.sizes': '((16, 24),)', 'data.global_batch': 8,
        'student.steps': 2, 'critic.updates': 1, 'train.accumulate': 1, 'train.steps': 4,
        'optim.student.lr': 1e-3, 'optim.critic.lr': 1e-3, 'optim.student.warmup': 0,
        'optim.critic.warmup': 0, 'mesh.data': 2, 'mesh.fsdp': 2, 'mesh.tensor': 2,
        'checkpoint.every': 2, 'log.every': 1, 'log.images_every': 100, 'log.probe': 0,
        'eval.prompts': 3, 'eval.teacher_steps': 2}
    workdir = tmp_path / 'run'
    args = ['--config=configs/sdxl.py:decoupled_hybrid', f'--workdir={workdir}',
            *(f'--config.{k}={v}' for k, v in fields.items())]
    process = forked.start(DRIVER, *args, XLA_FLAGS=tiny.xla_flags(8), KILL='saved:2:0')
    _, err = process.communicate(timeout=600)
    assert process.returncode == -signal.SIGKILL, err
    untouched = runs.lines(workdir)  # of four steps, two of which were saved
    out = tiny.run_on_devices('ddmd_jax.main', 8, *args)
    assert f'resumed {workdir} at step 2' in out
    assert (workdir / 'samples.png').stat().st_size > 1000
    # The fourth line is of the state that the third step, done again, has led to.
    lines = runs.lines(workdir)
    assert [x['step'] for x in lines] == [1, 2, 3, 4] and lines == untouched
    assert all(np.isfinite([x['loss'], x['gan_loss']]).all() for x in lines)

    write.export(workdir, tmp_path / 'student')
    size = (16, 24)
    model = find_model(workdir, '', size)
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    teacher, params = load(model, ['student', 'teacher'], mesh)
    moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a - b)).max(), params['student'],
                         params['teacher'])
    assert min(jax.tree.leaves(moved)) > 0
    text = teachers.get('sdxl').load_text(teachers.LoadOptions(str(pipe)))
    with jax.default_matmul_precision('highest'):
        cond = jax.jit(text.apply)(text.params, text.tokenize(PROMPTS))
    draws_the_same(tmp_path / 'student', teacher, params['student'], cond, 'renoise',
                   FewSteps(model.time(teacher.time), 2), size)
