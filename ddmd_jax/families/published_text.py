"""Text encoders of published pipelines: their folders, tokenizers and networks, family by family.

Which state is used of which prompt is each family's own: `families/*/text.py`. A text of more
tokens loses its end, behind which the tokenizer still puts what it always puts. A network that is
given a published config refuses fields that it does not know.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from ddmd_jax.families.base import Cond, LoadOptions, TextEncoder
from ddmd_jax.models import flops
from ddmd_jax.models.layers import abstract_params, functional
from ddmd_jax.parallel import sharding
from ddmd_jax.util.text import first_line
from ddmd_jax.weights import diffusers, fetch, transformers as folders
from ddmd_jax.weights.flat import WeightsError
from ddmd_jax.weights.transformers import Published

CURE = 'fetch the folder again'
OPTIONAL = {'layer_types', 'projection_dim', 'rope_theta'}
IDS = ('ids', 'ids_2')  # of the first and the second tokenizer


@dataclasses.dataclass(frozen=True)
class Component:
    """One text encoder of a family: its folders, its class, its names."""

    folder: str
    tokenizer: str
    published: Published
    config: Callable[[dict[str, Any], str], Any]  # (config.json, dtype) -> ours
    module: Callable[..., nnx.Module]
    entry: diffusers.EntryOf


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """How a family's pipeline makes conditioning of prompts.

    Attributes:
      family: its name.
      class_names: of pipelines whose folders are read.
      components: its text encoders, one or two.
      length: tokens of a prompt, at most.
      rules: lay the encoders out over a mesh.
      text: ``(tokenizer, prompt) -> the text that is tokenised``.
      cuts: a batch may be cut to its longest prompt; see `TextEncoder`.
    """

    family: str
    class_names: tuple[str, ...]
    components: tuple[Component, ...]
    length: int
    rules: sharding.Rules
    text: Callable[[Any, str], str] = lambda tokenizer, prompt: prompt
    cuts: bool = True


@dataclasses.dataclass(frozen=True)
class _Opened:
    """A component whose folder was checked; nothing of it is in memory yet."""

    component: Component
    checkpoint: diffusers.Checkpoint
    config: Any
    abstract: Any
    layout: Any

    def read(self) -> Any:
        names = self.component.entry
        kept = folders.part(self.checkpoint, self.abstract, names)
        return diffusers.import_tree(kept, self.abstract, self.layout, names)


# --- Configs ---


def config_of(kind: type, published: Mapping[str, Any], fixed: Mapping[str, Any],
              **own: Any) -> Any:
    """Our architecture `kind` from a published ``text_encoder/config.json``.

    `fixed` are fields that must have these values, or be absent: our network knows no other.
    `own` are those that are not read as they are.

    Raises:
      ValueError, KeyError, TypeError: a field is missing or not to be had here.
    """
    for name, value in fixed.items():
        if (published.get(name) or value) != value:
            raise ValueError(f'{name} is {published[name]}, supported is {value}')
    fields = {f.name for f in dataclasses.fields(kind)} - {'dtype', 'penultimate'} - OPTIONAL
    return kind(**{name: published[name] for name in fields}, **own)


def rope_theta(published: Mapping[str, Any]) -> float:
    """Base of the rotary frequencies, where transformers 5 writes it or where 4 did."""
    rope = published.get('rope_parameters') or published.get('rope_scaling') or {}
    kind = rope.get('rope_type', rope.get('type', 'default'))
    if kind != 'default':
        raise ValueError(f'rope_type is {kind}, supported is default')
    return float(rope['rope_theta'] if 'rope_theta' in rope else published['rope_theta'])


# --- Encoders ---


def load(pipeline: Pipeline, options: LoadOptions) -> TextEncoder:
    """The text encoder of a pipeline's folder, its weights read straight into the mesh's layout.

    Of the folder only text encoders and tokenizers are fetched. ``options.dtype`` is that of
    matrices, activations and the states that come out; norms are fp32.

    Raises:
      WeightsError: another pipeline, or missing, damaged, misshapen or quantised.
      ShardingError: a parameter does not divide over the mesh.
    """
    mesh = options.devices
    folder = fetch.local_folder(options.path, _files(pipeline))
    _check_pipeline(folder, pipeline)
    tokenizers = _tokenizers(folder, pipeline)
    # Everything is checked before the first byte of weights goes to a device.
    opened = [_open(folder / c.folder, c, pipeline.rules, mesh, options.dtype)
              for c in pipeline.components]
    return TextEncoder(
        pipeline.family, {o.component.folder: o.read() for o in opened},
        functools.partial(_tokenize, pipeline, tokenizers), _apply(
            [(o.component, o.config) for o in opened], mesh), pipeline.length,
        sum(o.config.hidden_size for o in opened), pipeline.rules,
        _joined([diffusers.identity(o.checkpoint) for o in opened]), pipeline.cuts)


def abstract(pipeline: Pipeline, config: Any, options: LoadOptions) -> TextEncoder:
    """A pipeline's one text encoder with shapes in place of weights: to compile for, not to run.

    `config` is its architecture.
    """
    (component,) = pipeline.components
    cfg = dataclasses.replace(config, dtype=options.dtype)
    shapes = _abstract(component, cfg, options.dtype)
    return TextEncoder(
        pipeline.family, {component.folder: shapes}, _no_tokenizer,
        _apply([(component, cfg)], options.devices), pipeline.length,
        cfg.hidden_size, pipeline.rules, 'abstract', pipeline.cuts,
        flops=functools.partial(flops.causal_forward, cfg))


def _no_tokenizer(prompts: Sequence[str]) -> dict[str, np.ndarray]:
    raise ValueError('shapes alone tokenise nothing')


def _files(pipeline: Pipeline) -> list[str]:
    """Patterns of the files that are read; no variants (``model.fp16.safetensors``)."""
    files = ['model_index.json', *(f'{c.tokenizer}/*' for c in pipeline.components)]
    for c in pipeline.components:
        files += [f'{c.folder}/{name}' for name in (
            '*.json', f'{folders.STEM}.safetensors', f'{folders.STEM}-*.safetensors')]
    return files


def _check_pipeline(folder: Path, pipeline: Pipeline) -> None:
    found = diffusers.read_json(folder / 'model_index.json').get('_class_name')
    if found not in pipeline.class_names:
        raise WeightsError(f'{folder} is a {found}, not {pipeline.class_names[0]}; give the folder '
                           'of a pipeline of this family')


def _open(folder: Path, component: Component, rules: sharding.Rules, mesh: Mesh,
          dtype: str) -> _Opened:
    checkpoint = folders.open_folder(folder, component.published)
    try:
        cfg = component.config(checkpoint.config, dtype)
    except (KeyError, TypeError, ValueError) as e:
        raise WeightsError(f'{folder}/config.json is not one of {component.published.classes[0]} '
                           f'({e}); {CURE}') from e
    # The last layer may not be run, but a folder without it is not complete.
    whole = _abstract(component, dataclasses.replace(cfg, penultimate=False), dtype)
    diffusers.check(checkpoint, whole, component.entry)
    abstract = _abstract(component, cfg, dtype)
    return _Opened(component, checkpoint, cfg, abstract,
                   sharding.shard_tree(abstract, rules, mesh))


def _abstract(component: Component, cfg: Any, dtype: str) -> Any:
    """Shapes of the parameters, matrices and tables in `dtype`: frozen, they need no more."""
    def stored(path: Any, leaf: Any) -> Any:
        large = path[-1].key in ('kernel', 'embedding')
        return jax.ShapeDtypeStruct(leaf.shape, dtype if large else leaf.dtype)

    params = abstract_params(lambda: component.module(cfg, nnx.Rngs(0)))
    return jax.tree_util.tree_map_with_path(stored, params)


def _apply(parts: Sequence[tuple[Component, Any]],
           mesh: Mesh) -> Callable[[Any, dict[str, Any]], Cond]:
    """`TextEncoder.apply` of one encoder with its config, or of two side by side."""
    names = [component.folder for component, _ in parts]

    def network(component: Component, config: Any) -> Callable:
        return functional(lambda: component.module(config, nnx.Rngs(0), mesh))

    networks = [network(*part) for part in parts]

    def states(params: Any, tokens: dict[str, Any]) -> Cond:
        found = networks[0](params[names[0]], tokens['ids'], tokens['mask'])
        return {'embeds': found, 'mask': tokens['mask']}

    def both(params: Any, tokens: dict[str, Any]) -> Cond:
        found, pooled = zip(*(network(params[name], tokens[ids])
                              for name, network, ids in zip(names, networks, IDS)))
        return {'embeds': jnp.concatenate(found, axis=-1), 'mask': tokens['mask'],
                'pooled': pooled[-1]}

    return both if len(parts) > 1 else states


def _joined(identities: Sequence[str]) -> str:
    if len(identities) == 1:
        return identities[0]
    return hashlib.sha256(''.join(identities).encode()).hexdigest()[:16]


# --- Tokens ---


def _tokenizers(folder: Path, pipeline: Pipeline) -> list[Any]:
    return [_tokenizer(folder / c.tokenizer, pipeline) for c in pipeline.components]


def _tokenizer(folder: Path, pipeline: Pipeline) -> Any:
    """The tokenizer of transformers that lies in `folder`; no code of the folder's own is run."""
    from transformers import AutoTokenizer

    if not (folder / 'tokenizer_config.json').is_file():
        raise WeightsError(f'{folder} has no tokenizer_config.json; {CURE}')
    try:
        found = AutoTokenizer.from_pretrained(
            folder, use_fast=True, trust_remote_code=False, local_files_only=True)
        found.padding_side = 'right'
        # What is asked of it later must not fail only then: a pad token, a chat template.
        found([pipeline.text(found, '')], padding='max_length', max_length=pipeline.length,
              truncation=True)
    except Exception as e:  # no common ancestor: of JSON, of files, of templates, of Rust
        raise WeightsError(f'no tokenizer can be made of {folder} ({first_line(e)}); {CURE}') from e
    return found


def _tokenize(pipeline: Pipeline, tokenizers: Sequence[Any],
              prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """`TextEncoder.tokenize` of a pipeline."""
    found = [t([pipeline.text(t, p) for p in prompts], padding='max_length',
               max_length=pipeline.length, truncation=True, return_tensors='np')
             for t in tokenizers]
    tokens = {name: f['input_ids'].astype(np.int32) for name, f in zip(IDS, found)}
    mask = found[0]['attention_mask'].astype(bool)
    return tokens | {'mask': mask if pipeline.cuts else np.ones_like(mask)}
