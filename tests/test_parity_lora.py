"""Adapters that a run exports, as diffusers loads them: the same noise, the same latents."""

import json

import jax
import numpy as np
import published
import published_sdxl
import published_zimage
import pytest
from saved import save
from test_adapters import TARGETS, stirred
from test_parity_export import near

from ddmd_jax import families
from ddmd_jax.diffusion import drawing, sampling
from ddmd_jax.diffusion.time import chosen
from ddmd_jax.export import write as export
from ddmd_jax.models import adapters
from ddmd_jax.models.adapters import LoRA
from ddmd_jax.weights import flat, lora

pytestmark = pytest.mark.parity
torch = pytest.importorskip('torch')
diffusers = pytest.importorskip('diffusers')
pytest.importorskip('peft')

STEPS, SHIFT, RANK, SIZE = 4, 3.0, 2, (16, 24)  # non-square
CONVS = r'(conv1|conv2|conv_shortcut|proj_in|proj_out|time_emb_proj|/conv)$'
WORDS = np.random.default_rng(7).standard_normal((2, 32, 24)).astype(np.float32)
to_torch = lambda x: torch.tensor(np.array(np.asarray(x).transpose(0, 3, 1, 2)))


def lumina_text():
    mask = np.ones((2, 32), bool)
    return {'embeds': WORDS, 'mask': mask}, {
        'prompt_embeds': torch.tensor(WORDS), 'prompt_attention_mask': torch.tensor(mask).long(),
        'guidance_scale': 1.0, 'height': 64, 'width': 96}  # it takes no less; latents are given


def zimage_text():
    captions = [WORDS[0], WORDS[1, :9]]  # a multiple of 32 tokens, and none
    return published_zimage.cond(captions), {
        'prompt_embeds': list(map(torch.tensor, captions)), 'guidance_scale': 0.0,
        'sigmas': [1 - i / STEPS for i in range(STEPS)]}  # as its card says


def sdxl_text():
    rng = np.random.default_rng(8)
    embeds, pooled = (rng.standard_normal(s).astype(np.float32) for s in ((2, 77, 56), (2, 20)))
    return {'embeds': embeds, 'mask': np.ones((2, 77), bool), 'pooled': pooled,
            'time_ids': np.asarray([[*SIZE, 0, 0, *SIZE]] * 2, np.int32)}, {
        'prompt_embeds': torch.tensor(embeds), 'pooled_prompt_embeds': torch.tensor(pooled),
        'guidance_scale': 1.0}


CASES = {
    'lumina': (published.pipeline, lumina_text, TARGETS, SHIFT, 'diffusers'),
    'zimage': (published_zimage.pipeline, zimage_text, TARGETS, SHIFT, 'diffusers'),
    'zimage_comfyui': (published_zimage.pipeline, zimage_text, TARGETS, SHIFT, 'comfyui'),
    'sdxl': (published_sdxl.pipeline, sdxl_text, (CONVS, *TARGETS), None, 'diffusers'),
    'sdxl_comfyui': (published_sdxl.pipeline, sdxl_text, (CONVS, *TARGETS), None, 'comfyui'),
}


@pytest.mark.parametrize('case', CASES)
def test_adapters_draw_the_same_in_the_teachers_pipeline(tmp_path, case):
    """By `load_lora_weights` of the folder that is exported, and by its scheduler."""
    make, text, targets, shift, naming = CASES[case]
    pipe, family = make(), case.partition('_')[0]
    pipe.save_pretrained(tmp_path / 'teacher')
    teacher = families.load_teacher(str(tmp_path / 'teacher'), size=SIZE)
    binding = LoRA(RANK, 1.5, targets)
    trained = stirred(binding.init(teacher.params, jax.random.key(0)))
    workdir = save(tmp_path / 'run', {
        'teacher.name': family, 'teacher.path': str(tmp_path / 'teacher'), 'student.steps': STEPS,
        'data.name': 'prompts', 'method.alpha': 4.0, 'method.shift': shift,
        'student.adapter.kind': 'lora', 'student.adapter.rank': RANK,
        'student.adapter.alpha': 1.5 * RANK,
        **{f'student.adapter.targets.{i}': pattern for i, pattern in enumerate(targets)}}, trained)
    cond, call = text()
    sampler = drawing.of_student(teacher, STEPS, chosen(teacher.time, shift), 'deterministic')
    draw, key = jax.jit(sampler.draw), jax.random.key(5)
    with jax.default_matmul_precision('highest'):
        want = np.asarray(draw(binding.bind(teacher.params, trained), cond, None, key))
        before = np.asarray(draw(teacher.params, cond, None, key))
    assert near(want, before) > 0.05

    [file, *_] = export.export(workdir, tmp_path / 'lora', export.Wanted(
        'lora', sampler='deterministic', naming=naming))
    pipe.load_lora_weights(str(tmp_path / 'lora'), adapter_name='student')
    name = json.loads((tmp_path / 'lora/scheduler/scheduler_config.json').read_text())
    pipe.scheduler = getattr(diffusers, name['_class_name']).from_pretrained(
        tmp_path / 'lora', subfolder='scheduler')
    noise = sampling.step_noise(key, STEPS, want.shape)[0]
    with torch.no_grad():
        got = pipe(**{'height': SIZE[0], 'width': SIZE[1], **call}, latents=to_torch(noise),
                   num_inference_steps=STEPS, output_type='latent', return_dict=False)[0]
    card = (tmp_path / 'lora' / 'README.md').read_text()
    assert "load_lora_weights('lora')" in card and f'{name["_class_name"]}.from_pretrained' in card
    assert f'guidance_scale={call["guidance_scale"]}' in card
    assert (f'sigmas=[1 - i / {STEPS} for i in range({STEPS})])' in card) == ('sigmas' in call)
    error = near(got.numpy().transpose(0, 2, 3, 1), want)
    print(f'{case}: {error:.1e}')
    assert error <= 1e-3

    # And a file that PEFT writes is read back: the same products.
    network = pipe.unet if family == 'sdxl' else pipe.transformer
    network.save_lora_adapter(tmp_path / 'peft', adapter_name='student')
    kernels = {name: leaf.shape for name, leaf in flat.flatten(teacher.params).items()
               if name.endswith(adapters.KERNEL)}
    found = lora.read(tmp_path / 'peft' / lora.FILE, kernels, families.get(family).export.adapters)
    for path, (a, b) in lora.on_host(trained, 1.5).items():
        np.testing.assert_allclose(found[path][0] @ found[path][1], a @ b, atol=1e-5)
    assert file.name == lora.FILE

