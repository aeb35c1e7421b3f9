"""Students of `published_flow` teachers: the teacher's pipeline, another transformer, scheduler."""

import dataclasses
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from ddmd_jax.diffusion.time import Shift
from ddmd_jax.families import published_flow
from ddmd_jax.families.family import Export, Exported, Source
from ddmd_jax.families.published_flow import Flow
from ddmd_jax.util import files
from ddmd_jax.weights import diffusers, fetch, scheduler, transformers
from ddmd_jax.weights.lora import Names

ABSENT = [None, None]  # a component that a pipeline does without
COPIED = ('vae', 'text_encoder', 'tokenizer')  # as they are
SUFFIXES = ('.json', '.safetensors', '.model', '.txt', '.jinja')  # no pickles, no code
FILES = (*published_flow.FILES, *(f'{part}/*{suffix}' for part in COPIED for suffix in SUFFIXES))
USE = """import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained('{folder}', torch_dtype=torch.{dtype}).to('cuda')
image = pipe('a red fox', num_inference_steps={steps}, guidance_scale=GUIDANCE).images[0]
"""
USE_ADAPTERS = """import torch
from diffusers import DiffusionPipeline, {scheduler}

pipe = DiffusionPipeline.from_pretrained('{base}', torch_dtype=torch.{dtype}).to('cuda')
pipe.load_lora_weights('{folder}')
pipe.scheduler = {scheduler}.from_pretrained('{folder}', subfolder='scheduler')
image = pipe('a red fox', num_inference_steps={steps}, guidance_scale=GUIDANCE).images[0]
"""
ALONE = """from diffusers import TRANSFORMER

transformer = TRANSFORMER.from_pretrained('{folder}/transformer')
"""


def export_of(flow: Flow, no_guidance: float, more: str = '', **naming: Any) -> Export:
    """How students of a family are written.

    `no_guidance` is its pipeline's scale for none, `more` what a call of it is given beside;
    `naming` is more of `lora.Names`.
    """
    call = lambda use: use.replace('GUIDANCE', f'{no_guidance}{more}')
    return Export(
        functools.partial(open_source, flow), functools.partial(write_weights, flow),
        names={
            'diffusers': ('transformer', 'scheduler', 'vae', 'text_encoder', 'tokenizer',
                          'model_index.json'),
            'safetensors': ('transformer',)},
        alone=ALONE.replace('TRANSFORMER', flow.transformer),
        write_pipeline=functools.partial(write_pipeline, flow),
        use=call(USE),
        adapters=Names('transformer', flow.entry, **naming), write_scheduler=write_scheduler,
        use_adapters=call(USE_ADAPTERS))


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A teacher's folder, and the variant of its weights ('' for files without one)."""

    folder: Path
    variant: str = ''


def open_source(flow: Flow, path: str, variant: str = '') -> Source:
    """Raises `WeightsError`: no such folder, or no config of such a transformer in it."""
    folder = fetch.local_folder(path, FILES)
    component = published_flow.transformer_folder(folder)
    published = diffusers.read_json(component / 'config.json')
    abstract = published_flow.abstract_network(flow, published_flow.model_config(flow, published))
    return Source(_identity(flow, component, variant), abstract, flow.rules,
                  Shift(published_flow.shift_of(flow, folder)), published,
                  Pipeline(folder, variant))


def _identity(flow: Flow, component: Path, variant: str) -> str | None:
    """The weights', if they are there: for a student's shape their config is enough."""
    if not list(component.glob('*.safetensors')):
        return None
    return diffusers.identity(diffusers.open_folder(component, flow.transformer, variant))


def write_weights(flow: Flow, student: Exported, out: Path) -> None:
    """``OUT/transformer``, as diffusers writes it."""
    published_flow.export(flow, student.params, student.source.config, out / 'transformer',
                          jnp.dtype(student.dtype))


def write_pipeline(flow: Flow, student: Exported, out: Path) -> None:
    """The whole pipeline; the transformer alone, with a warning, where the teacher is no more."""
    write_weights(flow, student, out)
    source = student.source.own
    if is_bare(source, 'transformer'):
        return
    write_scheduler(student, out)
    scheduler.write_index(out, flow.class_names[0], {
        'transformer': ['diffusers', flow.transformer],
        'scheduler': ['diffusers', scheduler.CLASS], **copied(source, out, COPIED)},
        **{scheduler.STEPS: student.steps})


def write_scheduler(student: Exported, out: Path) -> None:
    """``OUT/scheduler``, the teacher's but for what the student's steps need."""
    base = student.source.own.folder / 'scheduler' / 'scheduler_config.json'
    scheduler.write(out / 'scheduler', student.shift, student.sampler,
                    diffusers.read_json(base) if base.is_file() else None)


def is_bare(source: Pipeline, network: str) -> bool:
    """Whether a teacher's folder is its `network` alone; then a line says what is not written."""
    if (source.folder / 'model_index.json').is_file():
        return False
    print(f'warning: {source.folder} is a bare {network}, and so is the student written; give the '
          "whole pipeline's folder with --teacher for one that draws", file=sys.stderr)
    return True


def copied(source: Pipeline, out: Path, names: Sequence[str]) -> dict[str, list[Any]]:
    """Copies those components of a pipeline's folder that it has; the index's line of each name.

    Of a component's weights come those that the teacher's were read from, called as files without
    a variant are: what is exported needs none to be named.
    """
    index = diffusers.read_json(source.folder / 'model_index.json')
    found = {}
    for name in names:
        there = (source.folder / name).is_dir()
        if there:
            called = functools.partial(_called, source.folder / name, source.variant)
            files.copy_folder(source.folder / name, out / name, called)
        found[name] = index.get(name, ABSENT) if there else ABSENT
    return found


def _called(folder: Path, variant: str, name: str) -> str:
    """How a component's file is called in a student's pipeline; '' if it is not copied."""
    if not name.endswith(SUFFIXES):
        return ''
    for stem in (diffusers.STEM, transformers.STEM):
        found = diffusers.variants(folder, stem)
        if found and name.startswith((f'{stem}.', f'{stem}-')):
            return diffusers.plain_name(name, stem, variant if variant in found else '')
    return name
