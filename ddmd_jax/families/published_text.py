"""Text encoders of published pipelines: their folders, tokenizers and networks, family by family.

Which state is used of which prompt is each family's own: `families/*/text.py`. A text of more
tokens loses its end, behind which the tokenizer still puts what it always puts. A network that is
given a published config refuses fields that it does not know.
"""

import dataclasses
import functools
import hashlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from ddmd_jax.families import published_config
from ddmd_jax.families.base import Cond, LoadOptions, TextEncoder
from ddmd_jax.models import flops
from ddmd_jax.models.layers import abstract_params, functional, maker
from ddmd_jax.parallel import sharding
from ddmd_jax.util import errors, places, shape
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
    flops: Callable[[Any, int], int] = flops.causal_forward  # of a row, by (our config, tokens)


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """How a family's pipeline makes conditioning of prompts."""

    family: str
    class_names: tuple[str, ...]  # of pipelines whose folders are read
    components: tuple[Component, ...]  # its text encoders, one or two
    length: int  # tokens of a prompt, at most
    rules: sharding.Rules  # lay the encoders out over a mesh
    text: Callable[[Any, str], str] = lambda tokenizer, prompt: prompt  # the text to tokenise
    cuts: bool = True  # a batch may be cut to its longest prompt; see `TextEncoder`


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
    values = {name: published[name] for name in fields} | own
    return kind(**published_config.checked(kind, values))


def rope_theta(published: Mapping[str, Any]) -> float:
    """Base of the rotary frequencies, where transformers 5 writes it or where 4 did."""
    rope = published.get('rope_parameters') or published.get('rope_scaling') or {}
    if fault := shape.fault(rope, {'rope_theta?': shape.positive}, 'rope_parameters'):
        raise ValueError(fault)
    kind = rope.get('rope_type', rope.get('type', 'default'))
    if kind != 'default':
        raise ValueError(f'rope_type is {kind}, supported is default')
    theta = rope['rope_theta'] if 'rope_theta' in rope else published['rope_theta']
    if words := shape.positive(theta):
        raise ValueError(f'rope_theta is {words}')
    return float(theta)


# --- Encoders ---


def load(pipeline: Pipeline, options: LoadOptions) -> TextEncoder:
    """The text encoder of a pipeline's folder, its weights read straight into the mesh's layout.

    Of the folder only text encoders and tokenizers are fetched. ``options.dtype`` is that of
    matrices, activations and the states that come out; norms are fp32.

    Raises:
      WeightsError: another pipeline, or missing, damaged, misshapen or quantised.
      ShardingError: a parameter does not divide over the mesh.
    """
    mesh, parts = options.devices, pipeline.components
    # Of the variants (``model.fp16.safetensors``) the one that is asked for, or none.
    files = ('*.json', *diffusers.patterns(folders.STEM, options.variant))
    folder = fetch.local_folder(options.path, [
        'model_index.json', *(f'{c.tokenizer}/*' for c in parts),
        *(f'{c.folder}/{name}' for c in parts for name in files)])
    absent = [c for c in parts if options.variant
              and options.variant not in diffusers.variants(folder / c.folder, folders.STEM)]
    if absent:  # an encoder that comes without, as diffusers reads it then
        folder = fetch.local_folder(options.path, [
            f'{c.folder}/{name}' for c in absent for name in diffusers.patterns(folders.STEM)])
    found = diffusers.read_json(folder / 'model_index.json').get('_class_name')
    if found not in pipeline.class_names:
        raise WeightsError(f'{folder} is a {found}, not {pipeline.class_names[0]}; give the folder '
                           'of a pipeline of this family')
    tokenizers = [_tokenizer(folder / c.tokenizer, pipeline) for c in parts]
    # Everything is checked before the first byte of weights goes to a device.
    opened = [_open(folder / c.folder, c, options) for c in parts]
    for c, tokenizer, (_, cfg) in zip(parts, tokenizers, opened):
        if (last := max(tokenizer.get_vocab().values())) >= cfg.vocab_size:
            raise WeightsError(
                f'{folder / c.tokenizer} has tokens up to number {last}, {folder / c.folder} a '
                f'table of {cfg.vocab_size}; they do not belong together: {CURE}')
    shapes = [_abstract(c, cfg, options.dtype) for c, (_, cfg) in zip(parts, opened)]
    layouts = [sharding.shard_tree(tree, pipeline.rules, mesh) for tree in shapes]
    params = {}
    for c, (checkpoint, _), tree, layout in zip(parts, opened, shapes, layouts):
        params[c.folder] = diffusers.import_tree(checkpoint, tree, layout, c.entry)
    configs = [cfg for _, cfg in opened]
    return TextEncoder(
        pipeline.family, params, functools.partial(_tokenize, pipeline, tokenizers),
        _apply(parts, configs, mesh), pipeline.length, sum(cfg.hidden_size for cfg in configs),
        pipeline.rules, _identity([checkpoint for checkpoint, _ in opened]), pipeline.cuts,
        ids=IDS[:len(parts)], cut=functools.partial(_cut, pipeline, tokenizers))


def identity(pipeline: Pipeline, path: str, variant: str = '') -> str | None:
    """`TextEncoder.identity` of the pipeline in a folder, loading nothing; None where its encoders
    are not on this disk: embeddings are there to do without them.

    Raises:
      WeightsError: an encoder is another's, or damaged.
    """
    named = places.filled(path)
    components = [Path(named) / c.folder for c in pipeline.components]
    if places.is_url(named) or not all(list(x.glob('*.safetensors')) for x in components):
        return None
    return _identity([_checkpoint(folder, c, variant)
                      for folder, c in zip(components, pipeline.components)])


def _checkpoint(folder: Path, component: Component, variant: str) -> diffusers.Checkpoint:
    return folders.open_folder(folder, component.published,
                               diffusers.variant_in(folder, folders.STEM, variant))


def _identity(opened: Sequence[diffusers.Checkpoint]) -> str:
    found = [diffusers.identity(checkpoint) for checkpoint in opened]
    return hashlib.sha256(''.join(found).encode()).hexdigest()[:16] if found[1:] else found[0]


def abstract(pipeline: Pipeline, configs: Sequence[Any], options: LoadOptions) -> TextEncoder:
    """A pipeline's text encoders with shapes in place of weights: to compile for, not to run.

    `configs` are their architectures.
    """
    def no_tokens(prompts: Sequence[str]) -> dict[str, np.ndarray]:
        raise ValueError('shapes alone tokenise nothing')

    parts = pipeline.components
    configs = [dataclasses.replace(cfg, dtype=options.dtype) for cfg in configs]
    shapes = {c.folder: _abstract(c, cfg, options.dtype) for c, cfg in zip(parts, configs)}
    return TextEncoder(
        pipeline.family, shapes, no_tokens, _apply(parts, configs, options.devices),
        pipeline.length, sum(cfg.hidden_size for cfg in configs), pipeline.rules, 'abstract',
        pipeline.cuts, lambda tokens: sum(c.flops(cfg, tokens) for c, cfg in zip(parts, configs)),
        IDS[:len(parts)])


def _open(folder: Path, component: Component,
          options: LoadOptions) -> tuple[diffusers.Checkpoint, Any]:
    """(the checked folder of an encoder, our config of it); reads no weights."""
    checkpoint, dtype = _checkpoint(folder, component, options.variant), options.dtype
    try:
        cfg = component.config(checkpoint.config, dtype)
    except (KeyError, TypeError, ValueError) as e:
        raise WeightsError(f'{folder}/config.json is not one of {component.published.classes[0]} '
                           f'({e}); {CURE}') from e
    # The last layer may not be run, but a folder without it is not complete.
    whole = _abstract(component, dataclasses.replace(cfg, penultimate=False), dtype)
    diffusers.check(checkpoint, whole, component.entry)
    return checkpoint, cfg


def _abstract(component: Component, cfg: Any, dtype: str) -> Any:
    """Shapes of the parameters, matrices and tables in `dtype`: frozen, they need no more."""
    def stored(path: Any, leaf: Any) -> Any:
        large = path[-1].key in ('kernel', 'embedding')
        return jax.ShapeDtypeStruct(leaf.shape, dtype if large else leaf.dtype)

    params = abstract_params(maker(component.module, cfg))
    return jax.tree_util.tree_map_with_path(stored, params)


def _apply(parts: Sequence[Component], configs: Sequence[Any],
           mesh: Mesh) -> Callable[[Any, dict[str, Any]], Cond]:
    """`TextEncoder.apply` of one encoder, or of two side by side.

    What comes with the tokens and is none goes through, as the `Cond`'s own (`CondSpec.of_shape`).
    """
    def network(component: Component, config: Any) -> Callable:
        return functional(maker(component.module, config, mesh))

    names, networks = [c.folder for c in parts], list(map(network, parts, configs))
    others = lambda tokens: {k: x for k, x in tokens.items() if k not in (*IDS, 'mask')}

    def one(params: Any, tokens: dict[str, Any]) -> Cond:
        found = networks[0](params[names[0]], tokens['ids'], tokens['mask'])
        return {'embeds': found, 'mask': tokens['mask'], **others(tokens)}

    def both(params: Any, tokens: dict[str, Any]) -> Cond:
        found, pooled = zip(*(network(params[name], tokens[ids])
                              for name, network, ids in zip(names, networks, IDS)))
        return {'embeds': jnp.concatenate(found, axis=-1), 'mask': tokens['mask'],
                'pooled': pooled[-1], **others(tokens)}

    return both if parts[1:] else one


# --- Tokens ---


def _tokenizer(folder: Path, pipeline: Pipeline) -> Any:
    """The tokenizer of transformers in `folder`; no code of the folder's own is run."""
    from transformers import AutoTokenizer

    if not (folder / 'tokenizer_config.json').is_file():
        raise WeightsError(f'{folder} has no tokenizer_config.json; {CURE}')
    try:
        found = AutoTokenizer.from_pretrained(
            folder, use_fast=True, trust_remote_code=False, local_files_only=True)
        found.padding_side = 'right'
        _tokenize(pipeline, [found], [''])  # a missing pad token or chat template fails here
    except Exception as e:  # no common ancestor: of JSON, of files, of templates, of Rust
        errors.raise_environment(e, folder)
        models = sorted(folder.glob('*.model'))
        if (models and not (folder / 'tokenizer.json').exists()
                and importlib.util.find_spec('sentencepiece') is None):
            raise WeightsError(f'{models[0]} is read by sentencepiece, which is not installed: pip '
                               'install sentencepiece protobuf, or give a folder with a '
                               'tokenizer.json') from e
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


def _cut(pipeline: Pipeline, tokenizers: Sequence[Any], prompts: Sequence[str]) -> np.ndarray:
    """`TextEncoder.cut` of a pipeline: of two tokenizers either may cut."""
    whole = [t([pipeline.text(t, p) for p in prompts], verbose=False)['input_ids']
             for t in tokenizers]
    return np.any([[len(ids) > pipeline.length for ids in rows] for rows in whole], axis=0)
