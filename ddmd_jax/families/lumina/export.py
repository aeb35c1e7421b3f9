"""Lumina's students: the teacher's pipeline with another transformer and scheduler."""

import shutil
import sys
from pathlib import Path

import jax.numpy as jnp
from flax import nnx

from ddmd_jax.diffusion.time import Shift
from ddmd_jax.families.family import Export, Exported, Source
from ddmd_jax.families.lumina import teacher as lumina, text
from ddmd_jax.models.layers import abstract_params
from ddmd_jax.models.nextdit import NextDiT
from ddmd_jax.util import files
from ddmd_jax.weights import diffusers, fetch, scheduler

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
    return Source(_identity(folder), abstract, lumina.RULES, Shift(lumina.shift_of(folder)),
                  published, own=folder)


def _identity(folder: Path) -> str | None:
    """The weights', if they are there: for a student's shape their config is enough."""
    component = lumina.transformer_folder(folder)
    if not list(component.glob('*.safetensors')):
        return None
    return diffusers.identity(diffusers.open_folder(component, lumina.TRANSFORMER))


def write_weights(student: Exported, out: Path) -> None:
    """``OUT/transformer``, as diffusers writes it."""
    lumina.export(student.params, student.source.config, out / 'transformer',
                  jnp.dtype(student.dtype))


def write_pipeline(student: Exported, out: Path) -> None:
    """The whole pipeline; the transformer alone, with a warning, where the teacher is no more."""
    write_weights(student, out)
    source = student.source.own
    if not (source / 'model_index.json').is_file():
        print(f'warning: {source} is a bare transformer, and so is the student written; give the '
              "whole pipeline's folder with --teacher for one that draws", file=sys.stderr)
        return
    index = diffusers.read_json(source / 'model_index.json')
    copied = [name for name in COPIED if (source / name).is_dir()]
    for name in copied:
        _copy(source / name, out / name)
    base = source / 'scheduler' / 'scheduler_config.json'
    scheduler.write(out / 'scheduler', student.shift, student.sampler,
                    diffusers.read_json(base))
    empty = [None, None]
    scheduler.write_index(out, text.CLASSES[0], {
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


EXPORT = Export(
    open_source, write_weights, names={
        'diffusers': ('transformer', 'scheduler', 'vae', 'text_encoder', 'tokenizer',
                      'model_index.json'),
        'safetensors': ('transformer',)},
    alone=ALONE, write_pipeline=write_pipeline, use=USE)
