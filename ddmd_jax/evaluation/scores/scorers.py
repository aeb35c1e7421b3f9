"""The scorers of the paper's tables, each a pure function ``(params, inputs) -> figures``.

A scorer is a value: how pictures and prompts become arrays, a function of parameters and arrays,
and where its weights come from. What comes out is in the reference's own unit: CLIP scores and
HPS are cosines (tables print them times 100), PickScore is a cosine times its network's factor.
Features go on to `moments` and `distances`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from ddmd_jax.evaluation.scores import preprocess, tokens
from ddmd_jax.models import blip, inception
from ddmd_jax.models.layers import abstract_params, functional
from ddmd_jax.models.text import clip
from ddmd_jax.models.text.clip import Clip, ClipImage, TwoTowers
from ddmd_jax.parallel import sharding
from ddmd_jax.util.errors import UserError
from ddmd_jax.weights import clip as clip_names, states
from ddmd_jax.weights.names import Entry

Array = jax.Array
Arrays = dict[str, np.ndarray]

HEAD = (1024, 128, 64, 16, 1)  # widths of the head of the aesthetic predictor and of ImageReward
HEAD_LAYERS = (0, 2, 4, 6, 7)  # their numbers in its file: dropout stands between
REWARD_MEAN, REWARD_DEVIATION = 0.16717362830052426, 1.0333394966054072


class ScoreError(UserError):
    """A scorer that cannot say anything of what it was given."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Where weights are published: a hub id, its file, and what the file's sha256 begins with."""

    hub: str | None = None
    file: str | None = None
    sha256: str | None = None
    remark: str = ''


@dataclasses.dataclass(frozen=True)
class Scorer:
    """One figure, or one kind of features, of pictures.

    Attributes:
      title: for tables and messages.
      inputs: ``(pictures, prompts) -> arrays [N, ..]`` of a batch, on the host. Pictures are
        ``[H, W, 3] uint8``, of any sizes; prompts are not looked at where `prompted` is False.
      apply: pure ``(params, arrays) -> [N] figures, or [N, D] features``, fp32.
      read: ``one state of each source -> params``, numpy; raises `WeightsError`.
      sources: the weights that it wants, in the order of `read`.
      rules: how its parameters lie on a mesh.
      prompted: whether the figure depends on the prompt.
    """

    title: str
    inputs: Callable[[Sequence[np.ndarray], Sequence[str]], Arrays]
    apply: Callable[[Any, Any], Array]
    read: Callable[..., Any]
    sources: tuple[Source, ...]
    rules: sharding.Rules
    prompted: bool


def load(scorer: Scorer, paths: Sequence[str], mesh: Mesh | None = None) -> Any:
    """Parameters of a scorer on the devices: of one, or as its rules lay them over `mesh`.

    Args:
      scorer: whose.
      paths: one of each of its sources: a file, a folder, or a hub id.
      mesh: see above.

    Raises:
      WeightsError: missing, damaged, not the published file, or of another architecture.
      ScoreError: another number of paths.
    """
    if len(paths) != len(scorer.sources):
        raise ScoreError(f'{scorer.title} wants {len(scorer.sources)} files of weights, '
                         f'{len(paths)} are given; its sources: '
                         + ', '.join(f'{s.hub or s.remark}' for s in scorer.sources))
    found = []
    for path, source in zip(paths, scorer.sources):
        file = states.find(path, source.file)
        # A file of another name may be the same weights, converted.
        published = file.is_file() and file.name == source.file
        found.append(states.read(file, source.sha256 if published else None))
    params = scorer.read(*found, where=' and '.join(paths))
    return jax.device_put(params, None if mesh is None else sharding.shard_tree(
        params, scorer.rules, mesh))


def run(scorer: Scorer, params: Any, images: Iterable[np.ndarray], prompts: Sequence[str] = (),
        batch: int = 16, mesh: Mesh | None = None) -> np.ndarray:
    """Figures ``[N]`` or features ``[N, D]`` of pictures, fp32, all products in full precision.

    The last batch is filled up, so that one program scores all of them.

    Args:
      scorer: which.
      params: of `load`.
      images: N pictures ``[H, W, 3] uint8``; a batch of them is held at a time.
      prompts: N texts, where the scorer is `prompted`.
      batch: pictures at a time; rounded up to what divides over the mesh.
      mesh: what `load` was given; of this process's own devices.

    Raises:
      ScoreError: another number of prompts than of pictures, or a figure that is not finite.
      ImageError: a picture that the scorer cannot take.
    """
    batch += -batch % (1 if mesh is None else sharding.batch_ways(mesh))
    apply, found, left, start = jax.jit(scorer.apply), [], iter(images), 0
    while rows := list(itertools.islice(left, batch)):
        texts = list(prompts[start:start + len(rows)]) if scorer.prompted else []
        if scorer.prompted and len(texts) < len(rows):
            raise ScoreError(f'{scorer.title}: there are more pictures than {len(prompts)} prompts')
        more = batch - len(rows)
        arrays = scorer.inputs(rows + rows[-1:] * more, texts + texts[-1:] * more)
        placed = arrays if mesh is None else sharding.put_batch(arrays, mesh, batch)
        with jax.default_matmul_precision('highest'):
            out = np.asarray(apply(params, placed))[:len(rows)]
        bad = ~np.isfinite(out.reshape(len(out), -1)).all(1)
        if bad.any():
            raise ScoreError(f'{scorer.title} of picture {start + int(bad.argmax())} is not '
                             'finite; are its weights whole?')
        found.append(out)
        start += len(rows)
    if scorer.prompted and start < len(prompts):
        raise ScoreError(f'{scorer.title}: there are {start} pictures for {len(prompts)} prompts')
    if not found:
        raise ScoreError(f'{scorer.title}: there are no pictures')
    return np.concatenate(found)


# --- CLIP ---


def clip_scorer(title: str, towers: TwoTowers, source: Source, *,
                pixels: Callable[[np.ndarray, int], np.ndarray] = preprocess.clip,
                tokenize: Callable[[Sequence[str]], np.ndarray] = tokens.tokenize,
                scaled: bool = False) -> Scorer:
    """The cosine of a picture's and its prompt's embeddings; `scaled` by the network's factor."""
    size, build = towers.image.image_size, lambda: Clip(towers, nnx.Rngs(0))

    def apply(params: Any, inputs: Arrays) -> Array:
        image = functional(build, 'embed_image')(params, inputs['pixels'])
        text = functional(build, 'embed_text')(params, inputs['ids'])
        cosine = jnp.sum(image * text, axis=-1)
        return cosine * jnp.exp(params['logit_scale']) if scaled else cosine

    def read(state: states.State, where: str) -> Any:
        return states.fill(abstract_params(build), clip_names.to_transformers(state, where),
                           clip_names.entry, where)

    return Scorer(title, lambda images, prompts: {
        'pixels': np.stack([pixels(image, size) for image in images]), 'ids': tokenize(prompts)},
        apply, read, (source,), clip.RULES, prompted=True)


def clip_features(title: str, towers: TwoTowers, source: Source, *,
                  pixels: Callable[[np.ndarray, int], np.ndarray]) -> Scorer:
    """Embeddings of pictures, of length 1; the text tower is not held."""
    size, build = towers.image.image_size, lambda: ClipImage(towers.image, nnx.Rngs(0))

    def apply(params: Any, inputs: Arrays) -> Array:
        return clip.unit(functional(build)(params, inputs['pixels']))

    def read(state: states.State, where: str) -> Any:
        mine = {name: x for name, x in clip_names.to_transformers(state, where).items()
                if name.startswith('vis')}  # vision_model, visual_projection
        return states.fill(abstract_params(build), mine,
                           lambda path: clip_names.entry(f'image/{path}'), where)

    return Scorer(title, lambda images, _: {
        'pixels': np.stack([pixels(image, size) for image in images])},
        apply, read, (source,), clip.RULES, prompted=False)


def aesthetic(title: str, towers: TwoTowers, source: Source, head: Source) -> Scorer:
    """LAION's predictor: a head over CLIP's picture embedding."""
    base = clip_features(title, towers, source, pixels=preprocess.clip)

    def apply(params: Any, inputs: Arrays) -> Array:
        return apply_head(params['head'], base.apply(params['clip'], inputs))

    def read(state: states.State, mlp: states.State, where: str) -> Any:
        return {'clip': base.read(state, where=where),
                'head': read_head(mlp, towers.image.projection_dim, where)}

    return dataclasses.replace(base, apply=apply, read=read, sources=(source, head),
                               rules=(*clip.RULES, (r'^head/', ())))


def apply_head(params: Any, x: Array) -> Array:
    """``[N, D] -> [N]``: matrices in a row, without an activation between them, as published."""
    for layer in HEAD_LAYERS:
        x = x @ params[str(layer)]['kernel'] + params[str(layer)]['bias']
    return x[:, 0]


def read_head(state: states.State, width: int, where: str) -> Any:
    """The head's parameters of a file with ``layers.0.weight`` to ``layers.7.bias``.

    Raises:
      WeightsError: as `states.fill`.
    """
    widths = (width, *HEAD)
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.float32)
    abstract = {str(layer): {'kernel': shape(din, dout), 'bias': shape(dout)}
                for layer, din, dout in zip(HEAD_LAYERS, widths, widths[1:])}

    def entry(path: str) -> Entry:
        layer, leaf = path.split('/')
        return (Entry(f'layers.{layer}.weight', 'linear') if leaf == 'kernel' else
                Entry(f'layers.{layer}.bias'))

    return states.fill(abstract, state, entry, where)


# --- Inception ---


def inception_features(title: str, pixels: Callable[[np.ndarray], np.ndarray]) -> Scorer:
    """The 2048 features of FID, KID and neighbours, by one way to make pixels."""
    build = lambda: inception.Inception(nnx.Rngs(0))

    def read(state: states.State, where: str) -> Any:
        mine = {name: x for name, x in state.items()
                if not any(re.fullmatch(pattern, name) for pattern in inception.UNUSED)}
        return states.fill(abstract_params(build), mine, inception.entry, where)

    return Scorer(title, lambda images, _: {'pixels': np.stack([pixels(x) for x in images])},
                  lambda params, inputs: functional(build)(params, inputs['pixels']), read,
                  (INCEPTION,), inception.RULES, prompted=False)


# --- ImageReward ---


def image_reward(vocabulary: str, cfg: blip.BlipConfig | None = None) -> Scorer:
    """ImageReward (Xu et al., arXiv 2304.05977): BLIP and a head, of mean 0 on its own data.

    Args:
      vocabulary: BERT's (uncased) ``vocab.txt``: the file, its folder, or the hub id of `BERT`.
      cfg: another size of BLIP; None for the published one.

    Raises:
      WeightsError: there is no vocabulary, or it is none of BERT's.
    """
    cfg = cfg or blip.BlipConfig()
    file, size = states.find(vocabulary, BERT.file), cfg.image.image_size
    build = lambda: blip.Blip(cfg, nnx.Rngs(0))

    def inputs(images: Sequence[np.ndarray], prompts: Sequence[str]) -> Arrays:
        ids, mask = tokens.tokenize_bert(prompts, file)
        return {'pixels': np.stack([preprocess.clip(image, size) for image in images]),
                'ids': ids, 'mask': mask}

    def apply(params: Any, given: Arrays) -> Array:
        state = functional(build)(params['blip'], given['pixels'], given['ids'], given['mask'])
        return (apply_head(params['head'], state) - REWARD_MEAN) / REWARD_DEVIATION

    def read(state: states.State, where: str) -> Any:
        head = {name.removeprefix('mlp.'): x for name, x in state.items()
                if name.startswith('mlp.')}
        return {'blip': states.fill(abstract_params(build), blip.separate(state), blip.entry,
                                    where),
                'head': read_head(head, cfg.hidden_size, where)}

    tokens.tokenize_bert([''], file)  # reads it, so that a wrong one is found before the weights
    return Scorer('ImageReward', inputs, apply, read, (
        Source('THUDM/ImageReward', 'ImageReward.pt'),), ((r'.', ()),), prompted=True)


# --- The table ---

_TOWERS = clip.ARCHITECTURES
OPENAI_L = Source('openai/clip-vit-large-patch14')
LAION_H = Source('laion/CLIP-ViT-H-14-laion2B-s32B-b79K')
BERT = Source('google-bert/bert-base-uncased', 'vocab.txt')
INCEPTION = Source(None, 'weights-inception-2015-12-05-6726825d.pth', '6726825d',
                   'torch-fidelity, release v0.2.0')
AESTHETIC_HEAD = Source(
    None, 'sac+logos+ava1-l14-linearMSE.pth',
    '21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0',
    'github.com/christophschuhmann/improved-aesthetic-predictor')
_hps = lambda version, **more: clip_scorer(
    f'HPS {version}', _TOWERS['ViT-H-14'], Source('xswu/HPSv2', {
        'v2': 'HPS_v2_compressed.pt', 'v2.1': 'HPS_v2.1_compressed.pt'}[version]), **more)

# All but ImageReward, whose tokens want a file: `image_reward`.
SCORERS = {
    'clip_dmd2': clip_scorer(
        'CLIP g/14 (DMD2)', _TOWERS['ViT-g-14'], Source('laion/CLIP-ViT-g-14-laion2B-s12B-b42K'),
        pixels=preprocess.clip_dmd2,
        tokenize=functools.partial(tokens.tokenize, prefix=tokens.DMD2_PREFIX)),
    'clip_l14': clip_scorer('CLIP L/14', _TOWERS['ViT-L-14-quickgelu'], OPENAI_L),
    'clip_h14': clip_scorer('CLIP H/14', _TOWERS['ViT-H-14'], LAION_H),
    'hps_v2': _hps('v2', pixels=preprocess.hps),
    'hps_v2.1': _hps('v2.1', pixels=preprocess.hps),
    'hps_v2.1_no_antialias': _hps(
        'v2.1', pixels=functools.partial(preprocess.hps, antialias=False)),
    'pickscore': clip_scorer(
        'PickScore', _TOWERS['ViT-H-14'], Source('yuvalkirstain/PickScore_v1'), scaled=True,
        pixels=preprocess.clip_transformers,
        tokenize=functools.partial(tokens.tokenize, style='transformers')),
    'aesthetic': aesthetic(
        'LAION aesthetic', _TOWERS['ViT-L-14-quickgelu'], OPENAI_L, AESTHETIC_HEAD),
    'cmmd_features': clip_features(
        'CMMD', _TOWERS['ViT-L-14-336-quickgelu'], Source('openai/clip-vit-large-patch14-336'),
        pixels=preprocess.cmmd),
    'fid_features': inception_features('FID (clean)', preprocess.inception_clean),
    'fid_features_dmd2': inception_features('FID (DMD2)', preprocess.inception_dmd2),
    'fid_features_patch': inception_features('patch FID', preprocess.inception_patch),
    'fid_features_tensorflow': inception_features(
        'FID (torch-fidelity)', preprocess.inception_tensorflow),
}
