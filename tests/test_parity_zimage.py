"""Z-Image in and out: folders, sampler and students, against diffusers itself."""

import functools
import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import published_zimage as published
import pytest
import tiny
from flax import nnx
from saved import save
from test_parity_export import drawn, moved, near, ours as our_student

from ddmd_jax import families
from ddmd_jax.diffusion import sampling
from ddmd_jax.diffusion.time import Shift
from ddmd_jax.export import write as export
from ddmd_jax.families.family import Exported
from ddmd_jax.families.zimage import names
from ddmd_jax.models.layers import abstract_params
from ddmd_jax.models.zimage import ZImage, ZImageConfig
from ddmd_jax.weights import flat

pytestmark = pytest.mark.parity
torch = pytest.importorskip('torch')
diffusers = pytest.importorskip('diffusers')

LATENTS = (2, 8, 12, 4)  # non-square, so that an axis taken for the other shows
ZIMAGE = families.get('zimage')


@pytest.fixture(scope='module')
def theirs():
    return published.pipeline(text=True)


@pytest.fixture(scope='module')
def folder(theirs, tmp_path_factory):
    path = tmp_path_factory.mktemp('zimage')
    theirs.save_pretrained(path, max_shard_size='200KB')
    assert len(list((path / 'transformer').glob('*.safetensors'))) > 2  # sharded, as published
    return path


@pytest.fixture(scope='module')
def ours(folder):
    return families.load_teacher(str(folder), size=(16, 24))


@pytest.mark.parametrize('guidance', [0.0, 4.0])  # the pipeline's, which is alpha - 1
def test_sampler_gives_the_pipelines_latents(theirs, ours, guidance):
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(LATENTS).astype(np.float32)
    captions = [rng.standard_normal((n, 24)).astype(np.float32) for n in (32, 45, 9, 9)]
    with torch.no_grad():
        want = theirs(
            prompt_embeds=list(map(torch.tensor, captions[:2])),
            negative_prompt_embeds=list(map(torch.tensor, captions[2:])),
            latents=torch.tensor(noise.transpose(0, 3, 1, 2)), height=16, width=24,
            num_inference_steps=5, guidance_scale=guidance, output_type='latent',
            return_dict=False)[0].numpy().transpose(0, 2, 3, 1)
    cond = published.cond(captions)
    half = lambda rows: {name: jnp.asarray(x[rows]) for name, x in cond.items()}
    with jax.default_matmul_precision('highest'):
        got = sampling.sample_teacher(
            functools.partial(ours.predict_clean, ours.params), half(slice(0, 2)), noise,
            ours.time.grid(5), sampling.Guidance(guidance + 1, half(slice(2, 4)), ours.rescale))
    assert ours.time == Shift(6.0)
    assert near(got, want) <= 1e-3


def test_the_familys_guidance_is_the_pipelines_own():
    """Whose scale is w = alpha - 1."""
    call = inspect.signature(diffusers.ZImagePipeline.__call__).parameters
    assert ZIMAGE.guidance == call['guidance_scale'].default + 1


def test_shift_is_the_schedulers_and_sizes_are_those_of_patches(folder, ours):
    assert ours.latents.shape == LATENTS[1:] and ours.latents.decode is not None
    bare = ZIMAGE.load(families.LoadOptions(str(folder / 'transformer'), size=(64, 96)))
    assert bare.time == Shift(6.0) and bare.latents.shape == LATENTS[1:]
    assert bare.latents.decode is None and bare.identity == ours.identity


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_import_and_export_change_nothing(tmp_path, dtype):
    kind = getattr(torch, dtype)
    before = published.transformer(seed=1).to(kind)
    before.save_pretrained(tmp_path / 'in')
    teacher = families.load_teacher(str(tmp_path / 'in'), size=(16, 16))
    source = ZIMAGE.export.open_source(str(tmp_path / 'in'))
    assert source.identity == teacher.identity
    ZIMAGE.export.write_weights(
        Exported(teacher.params, source, 0, 8, teacher.time, dtype, 'renoise'), tmp_path / 'out')
    after = diffusers.ZImageTransformer2DModel.from_pretrained(
        tmp_path / 'out/transformer', torch_dtype=kind)
    assert before.state_dict().keys() == after.state_dict().keys()
    for name, tensor in before.state_dict().items():
        assert torch.equal(tensor, after.state_dict()[name]), name
    configs = [json.loads((tmp_path / part / 'config.json').read_text())
               for part in ('in', 'out/transformer')]
    assert configs[0] == configs[1]


def test_full_size_every_tensor_has_its_name_and_shape():
    with torch.device('meta'):
        model = diffusers.ZImageTransformer2DModel(axes_lens=[1536, 512, 512])
    theirs = {n: tuple(p.shape) for n, p in model.state_dict().items()}
    shapes = flat.flatten(abstract_params(lambda: ZImage(ZImageConfig(), nnx.Rngs(0))))
    ours = [(name, names.transformer(path).shape(leaf.shape)) for path, leaf in shapes.items()
            for name in names.transformer(path).names(leaf.shape)]
    assert len(ours) == len(dict(ours)) == 521 and dict(ours) == theirs
    assert sum(leaf.size for leaf in shapes.values()) == 6_154_908_736


@pytest.mark.parametrize(('mode', 'shift'), [('renoise', 3.0), ('deterministic', None)])
def test_a_student_draws_the_same_in_its_pipeline(folder, tmp_path, mode, shift):
    """Of prompts of two lengths, through the published text side."""
    teacher = families.load_teacher(str(folder), size=(16, 24))
    params = moved(teacher.params)
    workdir = save(tmp_path / 'run', {
        'student.steps': 4, 'data.name': 'prompts', 'method.alpha': 5.0, 'teacher.name': 'zimage',
        'teacher.path': str(folder), 'method.shift': shift}, params)
    export.export(workdir, tmp_path / 'student', export.Wanted(sampler=mode))
    assert 'guidance_scale=0.0,' in (tmp_path / 'student/README.md').read_text()
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / 'student')
    assert type(pipe).__name__ == 'ZImagePipeline'
    prompts = ['a red fox in the snow, and behind it a forest at night', 'two boats']
    text = ZIMAGE.load_text(families.LoadOptions(str(folder)))
    cond = jax.jit(text.apply)(text.params, text.tokenize(prompts))
    want, noises = our_student(teacher, params, cond, mode, jax.random.key(5), shift)
    with drawn(noises[1:] if mode == 'renoise' else []), torch.no_grad():
        # The pipeline overwrites the list of prompts that it is given.
        got = pipe(list(prompts), latents=torch.tensor(noises[0].transpose(0, 3, 1, 2)), height=16,
                   width=24, num_inference_steps=4, guidance_scale=0.0, output_type='latent',
                   return_dict=False)[0].numpy().transpose(0, 2, 3, 1)
    assert near(got, want) < 1e-3
    # What is written is a teacher's folder again: to draw with, or to distil further.
    again = families.load_teacher(str(tmp_path / 'student'), size=(16, 24))
    assert again.time == Shift(shift or 6.0) and again.latents.decode is not None


def test_a_run_on_eight_devices_of_the_shipped_config(folder, tmp_path):
    """The commands a user gives, from prompts of several lengths to what diffusers loads."""
    (tmp_path / 'p.txt').write_text(''.join(
        f'{"a longer prompt " * (i % 3)}number {i}\n' for i in range(40)))
    tiny.run_on_devices('ddmd_jax.prepare', 1, 'prompts', f'--input={tmp_path / "p.txt"}',
                        f'--out={tmp_path / "prompts"}', '--near_threshold=1')
    fields = {
        'teacher.path': folder, 'teacher.dtype': 'float32', 'teacher.remat': 'none',
        'data.path': tmp_path / 'prompts',
        'data.sizes': '((16, 24),)', 'data.global_batch': 8, 'student.steps': 2,
        'critic.updates': 1, 'mesh.data': 2, 'mesh.fsdp': 2, 'mesh.tensor': 2, 'log.every': 1,
        'log.images_every': 100, 'log.probe': 0, 'eval.prompts': 1, 'eval.teacher_steps': 2,
        'train.steps': 1}
    tiny.run_on_devices('ddmd_jax.main', 8, '--config=configs/zimage.py',
                        f'--workdir={tmp_path / "run"}',
                        *(f'--config.{k}={v}' for k, v in fields.items()))
    (line,) = (tmp_path / 'run/metrics.jsonl').read_text().splitlines()
    assert np.isfinite(json.loads(line)['loss'])
    assert (tmp_path / 'run/samples.png').stat().st_size > 1000

    export.export(tmp_path / 'run', tmp_path / 'student')
    student = diffusers.ZImageTransformer2DModel.from_pretrained(tmp_path / 'student/transformer')
    teacher = diffusers.ZImageTransformer2DModel.from_pretrained(folder / 'transformer')
    moved = [not torch.equal(a, b) for a, b in zip(
        student.state_dict().values(), teacher.state_dict().values(), strict=True)]
    assert sum(moved) > 0.9 * len(moved)
