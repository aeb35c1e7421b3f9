"""Students as diffusers loads and draws with them: the same noise, the same pictures."""

import contextlib
import json

import jax
import numpy as np
import published
import published_text
import pytest
from saved import save

from ddmd_jax import families as teachers
from ddmd_jax.diffusion import drawing, sampling
from ddmd_jax.diffusion.time import Shift, chosen
from ddmd_jax.evaluation import pictures
from ddmd_jax.export import write as export
from ddmd_jax.families.lumina import teacher as lumina

pytestmark = pytest.mark.parity
torch = pytest.importorskip('torch')
diffusers = pytest.importorskip('diffusers')

STEPS = 4
RUN = {'student.steps': STEPS, 'data.name': 'emoji', 'method.alpha': 4.0}


def moved(params, seed=0):
    """`params`, each leaf moved by a tenth of its size: a student that is not its teacher."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.asarray(x, np.float32) + (
        0.1 * np.std(x) * rng.standard_normal(x.shape)).astype(np.float32), params)


@contextlib.contextmanager
def drawn(noises):
    """diffusers' scheduler draws `noises` ``[N, B, H, W, C]``, one after another."""
    from diffusers.schedulers import scheduling_flow_match_euler_discrete as module

    left, own = [torch.tensor(np.array(x.transpose(0, 3, 1, 2))) for x in noises], (
        module.randn_tensor)
    # The last step adds noise at a level of 0: which does not matter, but it is drawn.
    module.randn_tensor = lambda shape, **_: left.pop(0) if left else torch.zeros(shape)
    try:
        yield
    finally:
        module.randn_tensor = own
    assert not left


def ours(teacher, params, cond, mode, key, shift=None):
    """(our latents, the noises they were drawn with)."""
    sampler = drawing.of_student(teacher, STEPS, chosen(teacher.time, shift), mode)
    shape = (len(cond['mask']), *teacher.latents.shape)
    with jax.default_matmul_precision('highest'):
        latents = jax.jit(sampler.draw)(params, cond, None, key)
    return np.asarray(latents), np.asarray(sampling.step_noise(key, STEPS, shape))


def near(got, want):
    """Largest difference, in units of the rms of what is wanted."""
    return np.abs(got - want).max() / np.sqrt(np.mean(want**2))


# --- The embedded teacher ---


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    """(teacher, its student's parameters, the folder of the run)."""
    teacher = teachers.load_teacher('emoji')
    params = moved(teacher.params)
    folder = tmp_path_factory.mktemp('run')
    (folder / 'eval.json').write_text(json.dumps({'rows': [
        {'name': 'student', 'steps': 4, 'frechet': 0.5}], 'seconds': {}}))
    return teacher, params, save(folder, {'teacher.name': 'emoji', **RUN}, params)


@pytest.mark.parametrize('mode', sampling.STUDENT_MODES)
def test_an_emoji_student_draws_the_same_in_diffusers(small, tmp_path, mode):
    teacher, params, workdir = small
    export.export(workdir, tmp_path / 'student', export.Wanted(sampler=mode))
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / 'student',
                                                       trust_remote_code=True)
    prompts = ['a red apple on blue', 'a cat', '', 'words that nobody knows, and too many of them '
               'for a caption to be read to its end by this encoder']
    want, noises = ours(teacher, params, teacher.encode(prompts), mode, jax.random.key(3))
    with drawn(noises[1:] if mode == 'renoise' else []):
        got = pipe(prompts, latents=torch.tensor(noises[0].transpose(0, 3, 1, 2)),
                   output_type='latent').images.numpy().transpose(0, 2, 3, 1)
    assert pipe.config.steps == STEPS
    assert near(got, want) < 1e-3
    with drawn(noises[1:] if mode == 'renoise' else []):
        images = pipe(prompts, latents=torch.tensor(noises[0].transpose(0, 3, 1, 2))).images
    levels = pictures.to_uint8(teacher.latents.decode(want)).astype(int) - np.stack(images)
    assert np.abs(levels).max() <= 1  # of 255: where the last digit rounds the other way
    image = pipe('a red apple', generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (64, 64) and np.asarray(image).std() > 10


def test_code_of_the_folder_is_not_run_unasked(small, tmp_path):
    export.export(small[2], tmp_path / 'student')
    with pytest.raises(Exception, match='trust_remote_code'):
        diffusers.DiffusionPipeline.from_pretrained(tmp_path / 'student')


# --- Lumina-Image-2.0, tiny ---


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A whole pipeline as diffusers writes it, text side and all."""
    bare, parts = published.pipeline(), published_text.models('lumina')
    whole = diffusers.Lumina2Pipeline(
        transformer=bare.transformer, vae=bare.vae, scheduler=bare.scheduler,
        tokenizer=published_text.tokenizer('lumina'), **parts)
    path = tmp_path_factory.mktemp('lumina')
    whole.save_pretrained(path)
    return path


@pytest.mark.parametrize(('mode', 'shift'), [('renoise', None), ('deterministic', 3.0)])
def test_a_lumina_student_draws_the_same_in_its_pipeline(folder, tmp_path, mode, shift):
    teacher = teachers.load_teacher(str(folder), size=(16, 24))
    params = moved(teacher.params)
    workdir = save(tmp_path / 'run', RUN | {
        'teacher.name': 'lumina', 'teacher.path': str(folder), 'method.shift': shift}, params)
    export.export(workdir, tmp_path / 'student', export.Wanted(sampler=mode))
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / 'student')
    assert type(pipe).__name__ == 'Lumina2Pipeline'
    prompts = ['a red fox in the snow', 'two boats']
    text = teachers.get('lumina').load_text(teachers.LoadOptions(str(folder)))
    cond = jax.jit(text.apply)(text.params, text.tokenize(prompts))
    want, noises = ours(teacher, params, cond, mode, jax.random.key(5), shift)
    with drawn(noises[1:] if mode == 'renoise' else []), torch.no_grad():
        got = pipe(prompts, latents=torch.tensor(noises[0].transpose(0, 3, 1, 2)), height=64,
                   width=96, num_inference_steps=STEPS, guidance_scale=1.0, output_type='latent',
                   return_dict=False)[0].numpy().transpose(0, 2, 3, 1)
    assert near(got, want) < 1e-3
    with torch.no_grad():  # and its own codec is there
        image = pipe('a fox', height=64, width=96, num_inference_steps=STEPS, guidance_scale=1.0)
    assert image.images[0].size == (24, 16)  # its codec is of two pixels a latent


def test_a_pipeline_that_was_exported_is_a_teachers_folder(folder, tmp_path):
    """What is written is read again: to distil further, or to draw with."""
    teacher = teachers.load_teacher(str(folder), size=(16, 16))
    workdir = save(tmp_path / 'run', RUN | {
        'teacher.name': 'lumina', 'teacher.path': str(folder)}, moved(teacher.params))
    (folder / 'vae' / 'diffusion_pytorch_model.bin').write_bytes(b'a pickle')
    written = export.export(workdir, tmp_path / 'out', export.Wanted(dtype='bfloat16'))
    assert [p.name for p in written] == ['transformer', 'scheduler', 'vae', 'text_encoder',
                                         'tokenizer', 'model_index.json', 'README.md']
    assert not list((tmp_path / 'out').rglob('*.bin')) + list((tmp_path / 'out').rglob('*.tmp'))
    again = teachers.load_teacher(str(tmp_path / 'out'), size=(16, 16))
    assert again.time == teacher.time == Shift(lumina.SHIFT) and again.latents.decode is not None
    assert teachers.get('lumina').load_text(teachers.LoadOptions(str(tmp_path / 'out'))).width == 24
