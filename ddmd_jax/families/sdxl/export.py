"""SDXL's students: the teacher's pipeline with another UNet and scheduler.

Two schedulers of diffusers take a student's steps as they are (`StepTable.steps`), without being
told them: with N steps from step 999 down,

  * `renoise`: `LCMScheduler` whose ``original_inference_steps`` are N. Its steps are multiples of
    1000 / N less 1, it draws new noise between them and keeps of a sample 4e-8 of itself;
  * `deterministic`: `DDIMScheduler` with `trailing` spacing and nothing clipped.

Students that start elsewhere (DMD2's single step at 399) get a table that ends there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from ddmd_jax.diffusion.time import StepTable
from ddmd_jax.families.family import Export, Exported, Source
from ddmd_jax.families.published_export import (
    ABSENT,
    SUFFIXES,
    USE_ADAPTERS,
    Pipeline,
    copied,
    is_bare,
)
from ddmd_jax.families.sdxl import names, teacher as sdxl, text
from ddmd_jax.models.layers import abstract_params, maker
from ddmd_jax.models.unet import UNet
from ddmd_jax.util import files
from ddmd_jax.weights import diffusers, fetch, scheduler
from ddmd_jax.weights.flat import WeightsError
from ddmd_jax.weights.lora import KOHYA, Names

COPIED = ('vae', 'text_encoder', 'text_encoder_2', 'tokenizer', 'tokenizer_2')  # as they are
FILES = (*sdxl.FILES, *(f'{part}/*{suffix}' for part in COPIED for suffix in SUFFIXES))
SCHEDULERS = {'renoise': 'LCMScheduler', 'deterministic': 'DDIMScheduler'}
USE = """import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained('{folder}', torch_dtype=torch.{dtype}).to('cuda')
image = pipe('a red fox', num_inference_steps={steps}, guidance_scale=1.0).images[0]
"""
ALONE = """from diffusers import UNet2DConditionModel

unet = UNet2DConditionModel.from_pretrained('{folder}/unet')
"""


def open_source(path: str, variant: str = '') -> Source:
    """Raises `WeightsError`: no such folder, or no config of such a UNet in it."""
    folder = fetch.local_folder(path, FILES)
    opened = sdxl.open_folder(folder)
    cfg = sdxl.model_config(opened.published)
    identity = None  # for a student's shape the config is enough
    if list(opened.unet.glob('*.safetensors')):
        identity = diffusers.identity(diffusers.open_folder(opened.unet, sdxl.UNET, variant))
    return Source(identity, abstract_params(maker(UNet, cfg)), sdxl.RULES,
                  opened.time, opened.published, Pipeline(folder, variant))


def write_weights(student: Exported, out: Path) -> None:
    """``OUT/unet``, as diffusers writes it."""
    sdxl.export(student.params, student.source.config, out / 'unet', jnp.dtype(student.dtype))


def scheduler_config(student: Exported) -> dict[str, Any]:
    """``scheduler_config.json`` of a scheduler that takes the student's steps.

    Raises:
      WeightsError: it has none, as the student's time is no table of steps, or they do not divide.
    """
    table = student.time
    if not isinstance(table, StepTable):
        raise WeightsError(f'{table} is no table of steps, which a pipeline of this family needs; '
                           'give --format=safetensors')
    count = table.first + 1
    if count % student.steps:
        raise WeightsError(f'{student.steps} steps do not divide the {count} of the table, and no '
                           'scheduler of diffusers takes them by itself; give '
                           '--format=safetensors, and name the timesteps where you draw')
    # The betas alone are the table; where it ends early they have to be written out.
    early = count < table.count
    config = {'_class_name': SCHEDULERS[student.sampler], '_diffusers_version': scheduler.STATED,
              'beta_start': table.beta_start, 'beta_end': table.beta_end,
              'beta_schedule': table.beta_schedule, 'num_train_timesteps': count,
              'trained_betas': table.betas[:count].tolist() if early else None,
              'prediction_type': 'epsilon', 'clip_sample': False, 'set_alpha_to_one': True,
              'rescale_betas_zero_snr': False, 'thresholding': False, 'steps_offset': table.offset}
    own = ({'original_inference_steps': student.steps, 'timestep_spacing': 'leading'}
           if student.sampler == 'renoise' else {'timestep_spacing': 'trailing'})
    return config | own


def write_scheduler(student: Exported, out: Path) -> None:
    """``OUT/scheduler``; raises as `scheduler_config`."""
    config = scheduler_config(student)
    (out / 'scheduler').mkdir()
    files.write(out / 'scheduler' / 'scheduler_config.json', json.dumps(config, indent=2) + '\n')


def write_pipeline(student: Exported, out: Path) -> None:
    """The whole pipeline; the UNet alone, with a warning, where the teacher is no more."""
    config = scheduler_config(student)  # may refuse: before anything large is written
    write_weights(student, out)
    source = student.source.own
    if is_bare(source, 'UNet'):
        return
    index = diffusers.read_json(source.folder / 'model_index.json')
    write_scheduler(student, out)
    kept = {name: index[name] for name in ('force_zeros_for_empty_prompt',) if name in index}
    scheduler.write_index(out, text.PIPELINE.class_names[0], {
        'unet': ['diffusers', sdxl.UNET], 'scheduler': ['diffusers', config['_class_name']],
        **copied(source, out, COPIED), 'feature_extractor': ABSENT, 'image_encoder': ABSENT},
        **kept, **{scheduler.STEPS: student.steps})


EXPORT = Export(
    open_source, write_weights, names={
        'diffusers': ('unet', 'scheduler', *COPIED, 'model_index.json'), 'safetensors': ('unet',)},
    alone=ALONE, write_pipeline=write_pipeline, use=USE,
    adapters=Names('unet', names.unet, KOHYA, names.of_sgm), write_scheduler=write_scheduler,
    use_adapters=USE_ADAPTERS.replace('GUIDANCE', '1.0'))
