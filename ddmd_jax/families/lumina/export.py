"""Lumina's students: the teacher's pipeline with another transformer and scheduler."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from ddmd_jax.export.student import Source, Student
from ddmd_jax.families.lumina import teacher as lumina
from ddmd_jax.models.layers import abstract_params
from ddmd_jax.models.nextdit import NextDiT
from ddmd_jax.train.durable.checkpoint import warn
from ddmd_jax.util import files
from ddmd_jax.weights import diffusers, fetch, scheduler

NAMES = {'diffusers': ('transformer', 'scheduler', 'vae', 'text_encoder', 'tokenizer',
                       'model_index.json'),
         'safetensors': ('transformer',), 'orbax': ('params',)}
COPIED = ('vae', 'text_encoder', 'tokenizer')  # as they are
SUFFIXES = ('.json', '.safetensors', '.model', '.txt', '.jinja')  # no pickles, no code
FILES = (*lumina.FILES, *(f'{part}/*{suffix}' for part in COPIED for suffix in SUFFIXES))
USE = """import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained('{folder}', torch_dtype=torch.{dtype}).to('cuda')
image = pipe('a red fox', num_inference_steps={steps}, guidance_scale=1.0).images[0]
"""
ALONE = """from diffusers import Lumina2Transformer2DModel

transformer = Lumina2Transformer2DModel.from_pretrained('{folder}/transformer')
"""


def open_source(path: str) -> Source:
    """Raises `WeightsError`: no such folder, or no config of such a transformer in it."""
    folder = fetch.local_folder(path, FILES)
    published = diffusers.read_json(lumina.transformer_folder(folder) / 'config.json')
    cfg = lumina.model_config(published)
    abstract = abstract_params(lambda: NextDiT(cfg, nnx.Rngs(0)))
    return Source(_identity(folder), folder, abstract, lumina.RULES, published,
                  lumina.shift_of(folder))


def _identity(folder: Path) -> str | None:
    """The weights', if they are there: for a student's shape their config is enough."""
    component = lumina.transformer_folder(folder)
    if not list(component.glob('*.safetensors')):
        return None
    return diffusers.identity(diffusers.open_folder(component, lumina.TRANSFORMER))


def write_weights(student: Student, params: Any, out: Path, dtype: str) -> None:
    """``OUT/transformer``, as diffusers writes it."""
    lumina.export(params, student.source.config, out / 'transformer', jnp.dtype(dtype))


def write_pipeline(student: Student, params: Any, out: Path, dtype: str, sampler: str) -> None:
    """The whole pipeline; the transformer alone, with a warning, where the teacher is no more."""
    write_weights(student, params, out, dtype)
    source = student.source.folder
    if not (source / 'model_index.json').is_file():
        warn(f'{source} is a bare transformer, and so is what is written; give the whole '
             "pipeline's folder with --teacher for one that draws")
        return
    index = diffusers.read_json(source / 'model_index.json')
    copied = [name for name in COPIED if (source / name).is_dir()]
    for name in copied:
        _copy(source / name, out / name)
    base = source / 'scheduler' / 'scheduler_config.json'
    scheduler.write(out / 'scheduler', student.shift, sampler, diffusers.read_json(base))
    empty = [None, None]
    scheduler.write_index(out, lumina.PIPELINES[0], {
        'transformer': ['diffusers', lumina.TRANSFORMER],
        'scheduler': ['diffusers', scheduler.CLASS],
        **{name: index.get(name, empty) if name in copied else empty for name in COPIED}})


def _copy(source: Path, target: Path) -> None:
    """A component's files, all of them or none; links become files."""
    with files.replacing(target) as scratch:
        scratch.mkdir(parents=True)
        for file in sorted(source.iterdir()):
            if file.suffix in SUFFIXES and file.is_file():
                shutil.copyfile(file, scratch / file.name)
