"""Text encoders of the published families, from the folders of their diffusers pipelines.

What is encoded, and what of it is used, is the pipelines' own (diffusers 0.42, under
``diffusers/pipelines``):

  * lumina (``lumina2/pipeline_lumina2.py``). Gemma-2's last but one state of at most 256 tokens,
    padded on the right. The tokenizer puts its [BOS] in front and nothing behind. Prompts stand
    behind the system prompt; the null prompt is the empty text without it, [BOS] alone.
  * zimage (``z_image/pipeline_z_image.py``). Qwen3's last but one state of at most 512 tokens of
    the chat template with a generation prompt, thinking enabled. The null prompt goes through the
    template too. The pipeline leaves the side of the padding to the tokenizer and keeps the real
    tokens alone; here padding is on the right always, which leaves their states as they are.
  * sdxl (``stable_diffusion_xl/pipeline_stable_diffusion_xl.py``). Last but one states of CLIP-L
    and OpenCLIP's bigG side by side, and bigG's projected state at the end token as ``pooled``.
    Always 77 tokens, which its U-Net reads all, padding too: the mask is True everywhere.
    Where ``model_index.json`` sets ``force_zeros_for_empty_prompt``, the pipeline guides away
    from *zeros*; the null prompt here is the encoded empty text all the same, as CA wants a row
    that an encoder gave. `null_is_zeros` says what a folder's pipeline does.

A text of more tokens loses its end, behind which the tokenizer still puts what it always puts.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from ddmd_jax.families.base import Cond, TextEncoder
from ddmd_jax.families.lumina.teacher import PIPELINES, TOKENS, full_prompt
from ddmd_jax.models import flops
from ddmd_jax.models.layers import abstract_params, functional
from ddmd_jax.models.text import clip, gemma2, qwen3
from ddmd_jax.models.text.clip import ClipConfig, ClipText
from ddmd_jax.models.text.gemma2 import Gemma2, Gemma2Config
from ddmd_jax.models.text.qwen3 import Qwen3, Qwen3Config
from ddmd_jax.parallel import sharding
from ddmd_jax.util.text import first_line
from ddmd_jax.weights import diffusers, fetch, transformers as folders
from ddmd_jax.weights.flat import WeightsError
from ddmd_jax.weights.names import (
    clip as clip_names,
    gemma2 as gemma2_names,
    qwen3 as qwen3_names,
)
from ddmd_jax.weights.transformers import Published

CURE = 'fetch the folder again'
# Fields of a published config that must have these values, or be absent: ours knows no other.
FIXED = {
    Gemma2Config: {'hidden_activation': 'gelu_pytorch_tanh', 'attention_bias': False,
                   'use_bidirectional_attention': False},
    Qwen3Config: {'hidden_act': 'silu', 'attention_bias': False, 'use_sliding_window': False},
    ClipConfig: {},
}
DEFAULTS = {Gemma2: Gemma2Config, Qwen3: Qwen3Config}
OPTIONAL = {'layer_types', 'projection_dim', 'rope_theta'}


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
class Family:
    """How a family's pipeline makes conditioning of prompts."""

    pipelines: tuple[str, ...]
    components: tuple[Component, ...]
    length: int
    text: Callable[[Any, str], str]  # (tokenizer, prompt) -> what is tokenised
    rules: sharding.Rules
    cuts: bool


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

    def network(self, mesh: Mesh) -> Callable:
        return functional(lambda: self.component.module(self.config, nnx.Rngs(0), mesh))


# --- Configs ---


def gemma2_config(published: dict[str, Any], dtype: str = 'float32') -> Gemma2Config:
    """Our architecture from a published ``text_encoder/config.json``.

    Raises:
      ValueError, KeyError, TypeError: a field is missing or not to be had here.
    """
    kinds = published.get('layer_types')
    return _config(Gemma2Config, published, dtype=dtype, rope_theta=_rope_theta(published),
                   layer_types=None if kinds is None else tuple(kinds))


def qwen3_config(published: dict[str, Any], dtype: str = 'float32') -> Qwen3Config:
    """As `gemma2_config`, of Qwen3."""
    return _config(Qwen3Config, published, dtype=dtype, rope_theta=_rope_theta(published))


def clip_config(published: dict[str, Any], dtype: str = 'float32', *,
                projected: bool) -> ClipConfig:
    """As `gemma2_config`, of CLIP. Only where `projected` is the last layer of use, for pooling."""
    width = published['projection_dim'] if projected else None
    return _config(ClipConfig, published, dtype=dtype, projection_dim=width,
                   penultimate=not projected)


def _config(kind: type, published: dict[str, Any], **own: Any) -> Any:
    for name, value in FIXED[kind].items():
        if (published.get(name) or value) != value:
            raise ValueError(f'{name} is {published[name]}, supported is {value}')
    fields = {f.name for f in dataclasses.fields(kind)} - {'dtype', 'penultimate'} - OPTIONAL
    return kind(**{name: published[name] for name in fields}, **own)


def _rope_theta(published: dict[str, Any]) -> float:
    """Base of the rotary frequencies, where transformers 5 writes it or where 4 did."""
    rope = published.get('rope_parameters') or published.get('rope_scaling') or {}
    kind = rope.get('rope_type', rope.get('type', 'default'))
    if kind != 'default':
        raise ValueError(f'rope_type is {kind}, supported is default')
    return float(rope['rope_theta'] if 'rope_theta' in rope else published['rope_theta'])


# --- Families ---


def _chat(tokenizer: Any, prompt: str) -> str:
    return tokenizer.apply_chat_template(
        [{'role': 'user', 'content': prompt}], tokenize=False, add_generation_prompt=True,
        enable_thinking=True)


_FIRST = functools.partial(Component, 'text_encoder', 'tokenizer')
FAMILIES = {
    'lumina': Family(
        PIPELINES, (_FIRST(gemma2_names.PUBLISHED, gemma2_config, Gemma2, gemma2_names.entry),),
        TOKENS, lambda tokenizer, prompt: full_prompt(prompt), gemma2.RULES, cuts=True),
    'sdxl': Family(
        ('StableDiffusionXLPipeline', 'StableDiffusionXLImg2ImgPipeline',
         'StableDiffusionXLInpaintPipeline'),
        (_FIRST(clip_names.PUBLISHED, functools.partial(clip_config, projected=False), ClipText,
                clip_names.entry),
         Component('text_encoder_2', 'tokenizer_2', clip_names.PROJECTED,
                   functools.partial(clip_config, projected=True), ClipText, clip_names.entry)),
        77, lambda tokenizer, prompt: prompt, clip.RULES, cuts=False),
    'zimage': Family(
        ('ZImagePipeline', 'ZImageImg2ImgPipeline'),
        (_FIRST(qwen3_names.PUBLISHED, qwen3_config, Qwen3, qwen3_names.entry),),
        512, _chat, qwen3.RULES, cuts=True),
}
IDS = ('ids', 'ids_2')  # of the first and the second tokenizer


def load(family: str, path: str, mesh: Mesh | None = None,
         dtype: str = 'float32') -> TextEncoder:
    """The text encoder of a pipeline, its weights read straight into the mesh's layout.

    Args:
      family: a key of `FAMILIES`.
      path: the pipeline's folder, its ``gs://`` URL or hub id; of it only text encoders and
        tokenizers are fetched.
      mesh: where the weights go; None is one device.
      dtype: of matrices, activations and the states that come out; norms are fp32.

    Raises:
      ValueError: unknown family.
      WeightsError: another pipeline, or missing, damaged, misshapen or quantised.
      ShardingError: a parameter does not divide over the mesh.
    """
    mesh = sharding.make_mesh({}, jax.devices()[:1]) if mesh is None else mesh
    return _encoder(family, fetch.local_folder(path, _files(_family(family), True)), mesh, dtype)


def lumina(folder: str | Path, mesh: Mesh, dtype: str = 'float32') -> TextEncoder:
    """Gemma-2 of Lumina-Image-2.0's folder: embeds ``[B, L, 2304]``, L <= 256; see `load`."""
    return _encoder('lumina', Path(folder), mesh, dtype)


def sdxl(folder: str | Path, mesh: Mesh, dtype: str = 'float32') -> TextEncoder:
    """Both CLIPs of SDXL's folder: embeds ``[B, 77, 2048]``, pooled ``[B, 1280]``; see `load`."""
    return _encoder('sdxl', Path(folder), mesh, dtype)


def zimage(folder: str | Path, mesh: Mesh, dtype: str = 'float32') -> TextEncoder:
    """Qwen3 of Z-Image's folder: embeds ``[B, L, 2560]``, L <= 512; see `load`."""
    return _encoder('zimage', Path(folder), mesh, dtype)


def abstract(family: str, mesh: Mesh, dtype: str = 'float32') -> TextEncoder:
    """The published text side with shapes in place of weights: to compile for, not to run.

    Raises:
      ValueError: a family of several encoders, or unknown.
    """
    how = _family(family)
    if len(how.components) > 1:
        raise ValueError(f'{family} has {len(how.components)} text encoders')
    (component,) = how.components
    cfg = DEFAULTS[component.module](dtype=dtype)
    shapes = _abstract(component, cfg, dtype)
    opened = [_Opened(component, None, cfg, shapes, sharding.shard_tree(shapes, how.rules, mesh))]
    return TextEncoder(
        family, {component.folder: shapes}, _no_tokenizer, _apply(how, opened, mesh), how.length,
        cfg.hidden_size, how.rules, 'abstract', how.cuts,
        flops=functools.partial(flops.causal_forward, cfg))


def _no_tokenizer(prompts: Sequence[str]) -> dict[str, np.ndarray]:
    raise ValueError('shapes alone tokenise nothing')


def tokenizer(family: str, path: str) -> Callable[[Sequence[str]], list[int]]:
    """Counts the tokens of prompts, without any weights: ``prompts -> [tokens of each]``.

    Counted is what the encoder would read if it were long enough, system prompt, template and
    special tokens included: a prompt is cut where its count exceeds the family's `length`. Of
    two tokenizers the greater count is given.

    Raises:
      ValueError: unknown family.
      WeightsError: another pipeline, or a tokenizer is missing or damaged.
    """
    how = _family(family)
    folder = fetch.local_folder(path, _files(how, False))
    _check_pipeline(folder, how)
    tokenizers = _tokenizers(folder, how)

    def count(prompts: Sequence[str]) -> list[int]:
        if not prompts:
            return []  # which a tokenizer of transformers does not take
        ids = [t([how.text(t, p) for p in prompts], verbose=False)['input_ids']
               for t in tokenizers]
        return [max(map(len, row)) for row in zip(*ids)]

    return count


def null_is_zeros(folder: str | Path) -> bool:
    """Whether SDXL's pipeline guides away from zeros instead of the encoded empty text.

    Raises:
      WeightsError: there is no ``model_index.json``.
    """
    index = diffusers.read_json(Path(folder) / 'model_index.json')
    return bool(index.get('force_zeros_for_empty_prompt', True))  # the pipeline's own default


def _family(name: str) -> Family:
    if name not in FAMILIES:
        raise ValueError(f'no text encoder for {name!r}; known: {", ".join(FAMILIES)}')
    return FAMILIES[name]


def _files(how: Family, weights: bool) -> list[str]:
    """Patterns of the files that are read; no variants (``model.fp16.safetensors``)."""
    files = ['model_index.json', *(f'{c.tokenizer}/*' for c in how.components)]
    for c in how.components if weights else ():
        files += [f'{c.folder}/{name}' for name in (
            '*.json', f'{folders.STEM}.safetensors', f'{folders.STEM}-*.safetensors')]
    return files


def _check_pipeline(folder: Path, how: Family) -> None:
    found = diffusers.read_json(folder / 'model_index.json').get('_class_name')
    if found not in how.pipelines:
        raise WeightsError(f'{folder} is a {found}, not {how.pipelines[0]}; give the folder of a '
                           'pipeline of this family')


# --- Encoders ---


def _encoder(name: str, folder: Path, mesh: Mesh, dtype: str) -> TextEncoder:
    how = _family(name)
    _check_pipeline(folder, how)
    tokenizers = _tokenizers(folder, how)
    # Everything is checked before the first byte of weights goes to a device.
    opened = [_open(folder / c.folder, c, how.rules, mesh, dtype) for c in how.components]
    return TextEncoder(
        name, {o.component.folder: o.read() for o in opened},
        functools.partial(_tokenize, how, tokenizers), _apply(how, opened, mesh), how.length,
        sum(o.config.hidden_size for o in opened), how.rules,
        _joined([diffusers.identity(o.checkpoint) for o in opened]), how.cuts)


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


def _apply(how: Family, opened: Sequence[_Opened],
           mesh: Mesh) -> Callable[[Any, dict[str, Any]], Cond]:
    """`TextEncoder.apply` of a family."""
    names = [o.component.folder for o in opened]
    networks = [o.network(mesh) for o in opened]

    def states(params: Any, tokens: dict[str, Any]) -> Cond:
        found = networks[0](params[names[0]], tokens['ids'], tokens['mask'])
        return {'embeds': found, 'mask': tokens['mask']}

    def both(params: Any, tokens: dict[str, Any]) -> Cond:
        found, pooled = zip(*(network(params[name], tokens[ids])
                              for name, network, ids in zip(names, networks, IDS)))
        return {'embeds': jnp.concatenate(found, axis=-1), 'mask': tokens['mask'],
                'pooled': pooled[-1]}

    return both if len(how.components) > 1 else states


def _joined(identities: Sequence[str]) -> str:
    if len(identities) == 1:
        return identities[0]
    return hashlib.sha256(''.join(identities).encode()).hexdigest()[:16]


# --- Tokens ---


def _tokenizers(folder: Path, how: Family) -> list[Any]:
    return [_tokenizer(folder / c.tokenizer, how) for c in how.components]


def _tokenizer(folder: Path, how: Family) -> Any:
    """The tokenizer of transformers that lies in `folder`; no code of the folder's own is run."""
    from transformers import AutoTokenizer

    if not (folder / 'tokenizer_config.json').is_file():
        raise WeightsError(f'{folder} has no tokenizer_config.json; {CURE}')
    try:
        found = AutoTokenizer.from_pretrained(
            folder, use_fast=True, trust_remote_code=False, local_files_only=True)
        found.padding_side = 'right'
        # What is asked of it later must not fail only then: a pad token, a chat template.
        found([how.text(found, '')], padding='max_length', max_length=how.length, truncation=True)
    except Exception as e:  # no common ancestor: of JSON, of files, of templates, of Rust
        reason = first_line(e)
        raise WeightsError(f'no tokenizer can be made of {folder} ({reason}); {CURE}') from e
    return found


def _tokenize(how: Family, tokenizers: Sequence[Any],
              prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """`TextEncoder.tokenize` of a family."""
    found = [t([how.text(t, p) for p in prompts], padding='max_length', max_length=how.length,
               truncation=True, return_tensors='np') for t in tokenizers]
    tokens = {name: f['input_ids'].astype(np.int32) for name, f in zip(IDS, found)}
    mask = found[0]['attention_mask'].astype(bool)
    return tokens | {'mask': mask if how.cuts else np.ones_like(mask)}
