"""Lumina-Image-2.0 in and out: folders, sampler and a whole run, against diffusers itself."""

import functools
import json
import shutil

import forked
import jax
import jax.numpy as jnp
import numpy as np
import published
import published_text
import pytest
import tiny
from runs import DRIVER

from ddmd_jax import families as teachers
from ddmd_jax.diffusion import sampling
from ddmd_jax.diffusion.time import Shift
from ddmd_jax.families import published_vae
from ddmd_jax.families.lumina import names, teacher as lumina, text
from ddmd_jax.models import autoencoder_kl
from ddmd_jax.models.layers import abstract_params
from ddmd_jax.models.nextdit import NextDiT, NextDiTConfig
from ddmd_jax.weights import flat

pytestmark = pytest.mark.parity
torch = pytest.importorskip('torch')
diffusers = pytest.importorskip('diffusers')

LATENTS = (2, 8, 12, 4)  # non-square, so that an axis taken for the other shows


@pytest.fixture(scope='module')
def theirs():
    return published.pipeline()


@pytest.fixture(scope='module')
def folder(theirs, tmp_path_factory):
    path = tmp_path_factory.mktemp('lumina')
    theirs.save_pretrained(path, max_shard_size='200KB')
    assert len(list((path / 'transformer').glob('*.safetensors'))) > 2  # sharded, as published
    return path


@pytest.fixture(scope='module')
def ours(folder):
    return teachers.load_teacher(str(folder), size=(16, 24))


@pytest.mark.parametrize('guidance, normalise', [(1.0, True), (4.0, True), (4.0, False)])
def test_sampler_gives_the_pipelines_latents(theirs, ours, guidance, normalise):
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(LATENTS).astype(np.float32)
    embeds = rng.standard_normal((4, published.TOKENS, 24)).astype(np.float32)
    mask = np.arange(published.TOKENS)[None] < np.asarray([9, 5, 1, 1])[:, None]
    t = lambda x: torch.tensor(np.asarray(x))
    with torch.no_grad():
        want = theirs(
            prompt_embeds=t(embeds[:2]), prompt_attention_mask=t(mask[:2]).long(),
            negative_prompt_embeds=t(embeds[2:]), negative_prompt_attention_mask=t(mask[2:]).long(),
            latents=t(noise.transpose(0, 3, 1, 2)), height=64, width=96, num_inference_steps=5,
            guidance_scale=guidance, cfg_normalization=normalise, output_type='latent',
            return_dict=False)[0].numpy().transpose(0, 2, 3, 1)
    half = lambda rows: {'embeds': jnp.asarray(embeds[rows]), 'mask': jnp.asarray(mask[rows])}
    with jax.default_matmul_precision('highest'):
        got = sampling.sample_teacher(
            functools.partial(ours.predict_clean, ours.params), half(slice(0, 2)), noise,
            ours.time.grid(5), sampling.Guidance(
                guidance, half(slice(2, 4)), ours.rescale if normalise else None))
    assert ours.time == Shift(6.0)
    assert np.abs(got - want).max() <= 1e-3 * np.sqrt(np.mean(want**2))


@pytest.mark.parametrize('tiled', [False, True])
def test_decode_gives_the_pipelines_images(theirs, ours, folder, tiled, monkeypatch):
    """In one piece up to 1024 x 1024, whatever size the codec was saved at; beyond in its tiles."""
    latents = np.random.default_rng(1).standard_normal((2, 8, 12, 4)).astype(np.float32)
    getattr(theirs.vae, 'enable_tiling' if tiled else 'disable_tiling')()
    if tiled:
        monkeypatch.setattr(published_vae, 'WHOLE', 16)
        ours = teachers.load_teacher(str(folder), size=(16, 24))
    z = torch.tensor(latents.transpose(0, 3, 1, 2))
    with torch.no_grad():
        z = z / theirs.vae.config.scaling_factor + theirs.vae.config.shift_factor
        want = theirs.vae.decode(z).sample.numpy().transpose(0, 2, 3, 1)
    with jax.default_matmul_precision('highest'):
        got = np.asarray(ours.latents.decode(latents))
    assert np.abs(got - want).max() <= 1e-4 * np.sqrt(np.mean(want**2))


def test_the_system_prompt_is_the_pipelines(theirs):
    assert theirs.system_prompt == text.SYSTEM_PROMPT
    seen = []
    theirs._get_gemma_prompt_embeds = lambda prompt, **kwargs: (
        seen.append(prompt) or (torch.zeros(1, 2, 3), torch.ones(1, 2)))
    theirs.encode_prompt('a red apple', device='cpu')
    assert seen == [[text.full_prompt('a red apple')], [text.full_prompt('')]]


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_import_and_export_change_nothing(theirs, tmp_path, dtype):
    kind = getattr(torch, dtype)
    before = published.pipeline(seed=1).transformer.to(kind)
    before.save_pretrained(tmp_path / 'in')
    teacher = teachers.load_teacher(str(tmp_path / 'in'), size=(16, 16))
    config = json.loads((tmp_path / 'in' / 'config.json').read_text())
    lumina.export(teacher.params, config, tmp_path / 'out', jnp.dtype(dtype))
    after = diffusers.Lumina2Transformer2DModel.from_pretrained(tmp_path / 'out', torch_dtype=kind)
    assert before.state_dict().keys() == after.state_dict().keys()
    for name, tensor in before.state_dict().items():
        assert torch.equal(tensor, after.state_dict()[name]), name
    rng = np.random.default_rng(0)
    x, embeds = (torch.tensor(rng.standard_normal(s)).to(kind) for s in ((1, 4, 8, 8), (1, 5, 24)))
    run = lambda model: model(x, torch.tensor([0.3]).to(kind), embeds, torch.ones(1, 5).bool())
    with torch.no_grad():
        assert torch.equal(run(before.eval()).sample, run(after.eval()).sample)


@pytest.mark.parametrize('cls, config, make, entry', [
    ('Lumina2Transformer2DModel', {'cap_feat_dim': 2304},
     lambda: abstract_params(lambda: NextDiT(NextDiTConfig(), nnx_rngs())), names.transformer),
    ('AutoencoderKL',
     {'block_out_channels': (128, 256, 512, 512), 'layers_per_block': 2, 'latent_channels': 16,
      'down_block_types': ('DownEncoderBlock2D',) * 4, 'up_block_types': ('UpDecoderBlock2D',) * 4,
      'use_quant_conv': False, 'use_post_quant_conv': False},
     lambda: autoencoder_kl.abstract_params(autoencoder_kl.AutoencoderKLConfig()),
     names.autoencoder)])
def test_full_size_every_tensor_has_its_name_and_shape(cls, config, make, entry):
    with torch.device('meta'):
        published_model = getattr(diffusers, cls)(**config)
    theirs = {n: tuple(p.shape) for n, p in published_model.state_dict().items()}
    ours = [(name, entry(path).shape(leaf.shape)) for path, leaf in flat.flatten(make()).items()
            for name in entry(path).names(leaf.shape)]
    assert len(ours) == len(dict(ours)) and dict(ours) == theirs


def nnx_rngs():
    from flax import nnx

    return nnx.Rngs(0)


def test_a_run_on_eight_devices_resumes_and_exports(folder, tmp_path, monkeypatch):
    """The commands a user gives, from prompts and a pipeline's folder to one diffusers loads.

    Prompts are encoded on the mesh by its Gemma-2; batches come in two sizes.
    """
    published_text.write('lumina', tmp_path / 'text')
    pipe = tmp_path / 'pipe'
    shutil.copytree(folder, pipe)
    for part in ('text_encoder', 'tokenizer'):
        shutil.copytree(tmp_path / 'text' / part, pipe / part, dirs_exist_ok=True)
    (tmp_path / 'p.txt').write_text(''.join(f'prompt number {i}\n' for i in range(40)))
    tiny.run_on_devices('ddmd_jax.prepare', 1, 'prompts', f'--input={tmp_path / "p.txt"}',
                        f'--out={tmp_path / "prompts"}', '--near_threshold=1')
    monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(tmp_path / 'cache'))
    fields = {
        'teacher.path': pipe, 'teacher.dtype': 'float32', 'teacher.remat': 'none',
        'data.path': tmp_path / 'prompts', 'log.probe': 0,
        'data.sizes': '((16, 24), (24, 16))', 'data.global_batch': 8, 'student.steps': 2,
        'critic.updates': 1, 'mesh.data': 2, 'mesh.fsdp': 2, 'mesh.tensor': 2,
        'checkpoint.every': 1, 'log.every': 1, 'log.images_every': 1, 'eval.prompts': 3,
        'eval.teacher_steps': 2}
    flags = lambda steps: ['--config=configs/lumina.py', f'--workdir={tmp_path / "run"}', *(
        f'--config.{k}={v}' for k, v in (fields | {'train.steps': steps}).items())]
    tiny.run_on_devices(DRIVER, 8, *flags(1))  # which leaves the evaluation out
    out = tiny.run_on_devices('ddmd_jax.main', 8, *flags(2))
    assert 'resumed' in out
    lines = [json.loads(x) for x in (tmp_path / 'run/metrics.jsonl').read_text().splitlines()]
    assert [x['step'] for x in lines] == [1, 2] and all(np.isfinite(x['loss']) for x in lines)
    assert (tmp_path / 'run/samples.png').stat().st_size > 1000

    done = forked.run('ddmd_jax.export', f'--checkpoint={tmp_path / "run"}',
                      f'--out={tmp_path / "student"}', '--format=diffusers')
    assert done.returncode == 0, done.stderr
    student = diffusers.Lumina2Transformer2DModel.from_pretrained(tmp_path / 'student/transformer')
    teacher = diffusers.Lumina2Transformer2DModel.from_pretrained(folder / 'transformer')
    moved = [not torch.equal(a, b) for a, b in zip(
        student.state_dict().values(), teacher.state_dict().values(), strict=True)]
    assert sum(moved) > 0.9 * len(moved)
