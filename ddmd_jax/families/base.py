"""A teacher, and its text side, in the one convention of the package."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ddmd_jax.data.batch import Cond, CondSpec
from ddmd_jax.diffusion.time import TimeMap
from ddmd_jax.parallel import sharding
from ddmd_jax.parallel.sharding import Rules

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Decoder:
    """The jitted program behind `Latents.decode`, as shapes: ``run(params, latents) -> images``.

    `latents` is what it takes at a time, `flops` what that costs, on every device alike.
    """

    run: jax.stages.Wrapped
    params: Any
    shardings: Any
    latents: Any
    flops: int


@dataclasses.dataclass(frozen=True)
class ImageEncoder:
    """The encoder of a teacher's codec: what its latents of real images are made by.

    `run` is jitted, ``(params, images [B, H, W, 3] uint8, numbers [B] uint32, key, mean) ->
    latents [B, h, w, C]`` fp32, as the teacher knows them: samples of the posterior, an image's by
    `key` and its number alone, or where `mean` (static) is True the posterior's means. `identity`
    names the encoder with scale and shift; a latent stands for `factor` x `factor` pixels.
    """

    family: str
    run: Callable[..., Array]
    params: Any
    factor: int
    channels: int
    identity: str


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """A frozen text side: prompts to tokens on the host, tokens to a `Cond` on the mesh.

    `tokenize(prompts)` gives a dict of numpy arrays, a row for each prompt: ``mask [n, length]``
    bool, True for what is real, and the ids (``ids [n, length]`` int32; a family with two
    encoders has ids for each). Rows are padded on the right, which NextDiT and Z-Image ask for, or
    on whichever side the published model pads; longer texts are cut. The empty string is the null
    prompt. `apply(params, tokens)` is pure and can be jitted; the `Cond` it gives has as many
    places as the tokens. It is fit to be cut to the longest prompt of a batch where `cuts` is
    True: no token sees padding behind it.
    `width` is D of the embeds, `rules` lay `params` out over a mesh, `identity` names the weights.
    `flops(tokens)` is what a row of so many costs, `ids` are the names of its ids: the planner's.
    `cut(prompts)` says which lose their end, ``[n]`` bool; None of an encoder that does not tell.
    `unknown(prompts)`, likewise, which have words outside its vocabulary; None where none are.
    """

    name: str
    params: Any
    tokenize: Callable[[Sequence[str]], dict[str, np.ndarray]]
    apply: Callable[[Any, dict[str, Array]], Cond]
    length: int
    width: int
    rules: Rules
    identity: str
    cuts: bool = True
    flops: Callable[[int], int] | None = None
    ids: tuple[str, ...] = ('ids',)
    cut: Callable[[Sequence[str]], np.ndarray] | None = None
    unknown: Callable[[Sequence[str]], np.ndarray] | None = None


@dataclasses.dataclass(frozen=True)
class Latents:
    """The space a teacher draws in.

    Attributes:
      shape: of one latent, ``(H, W, C)``.
      decode: ``latents [B, H, W, C] -> images [B, H', W', 3]`` in [-1, 1]; None without a decoder.
      limit: magnitude beyond which a value of a latent counts as saturated.
      shape_of: ``(height, width) in pixels -> shape``; None where there is but one size.
      std: mean per-sample standard deviation of real latents, where it is known: health measures
        contrast against it.
      moments: means over real latents of their means and of their variances, where known.
      decoder: the program that `decode` runs, for the planner.
      encoder: `ImageEncoder.identity` of the codec; None where it is not known.
      codec: names all of its weights, by which `decode` makes pixels; None likewise.
    """

    shape: tuple[int, int, int]
    decode: Callable[[Array], Array] | None = None
    limit: float = 1.0
    shape_of: Callable[[Sequence[int]], tuple[int, int, int]] | None = None
    std: float | None = None
    moments: tuple[float, float] | None = None
    decoder: Decoder | None = None
    encoder: str | None = None
    codec: str | None = None


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A frozen text-to-image model in the project's one convention.

    Attributes:
      family: name of the family it belongs to; checkpoints record it.
      params: of the denoiser, a nested dict of arrays.
      predict_clean: ``(params, x_t [B, H, W, C], t [B], cond) -> x_hat`` in fp32, t the paper's
        (0 noise, 1 clean).
      latents: the space it draws in.
      cond: names and shapes of what conditions it.
      time: its map from uniform time to t.
      identity: names the weights.
      rules: lay `params`, and trees of their shape, out over a mesh.
      text: the text side where it comes with the weights; None where it is loaded apart.
      features: ``(params, x_t, t, cond) -> tokens [B, S, D]``, or maps ``[B, h, w, D]``, of the
        trunk, for a GAN's head.
      rescale: ``(v, v_cond) -> v``, a habit of the family's own sampler with guided velocities; it
        belongs to sampling and never enters CA.
      flops: of one row of `predict_clean` with captions of so many tokens, for the planner.
      feature_flops: of `features`, likewise.
      null: which null prompt its own sampler guides away from, of `batch.NULLS`; what CA is made
        of is the config's (`method.null`).
    """

    family: str
    params: Any
    predict_clean: Callable[[Any, Array, Array, Cond], Array]
    latents: Latents
    cond: CondSpec
    time: TimeMap
    identity: str
    rules: Rules
    text: TextEncoder | None = None
    features: Callable[[Any, Array, Array, Cond], Array] | None = None
    rescale: Callable[[Array, Array], Array] | None = None
    flops: Callable[[int], int] | None = None
    feature_flops: Callable[[int], int] | None = None
    null: str = 'encoded'

    def encode(self, prompts: Sequence[str]) -> Cond:
        """Numpy `Cond` of a list of prompts by the text side that came with the weights.

        Raises:
          ValueError: there is none.
        """
        if self.text is None:
            raise ValueError(f'{self.family} loads its text side apart: load_text')
        return encode(self.text, prompts)


@dataclasses.dataclass(frozen=True)
class LoadOptions:
    """How a family loads a teacher or its text side.

    Attributes:
      path: a folder, file, URL or hub id; '' is the family's own shipped weights.
      mesh: where the weights go, in the family's layout; None is one device.
      dtype: of activations and matrix products.
      size: pixels, height first; None takes the family's own.
      remat: what the network's gradient recomputes, a key of `layers.REMAT_POLICIES` or 'none'.
      attention: one of `attention.KINDS`; 'auto' takes the kernel where the mesh has one.
      param_dtype: of the stored kernels. A student of them starts as their fp32 copy.
      variant: of the files, as diffusers has it: 'fp16' reads ``*.fp16.safetensors``.
    """

    path: str = ''
    mesh: Mesh | None = None
    dtype: str = 'float32'
    size: Sequence[int] | None = None
    remat: str = 'none'
    attention: str = 'auto'
    param_dtype: str = 'float32'
    variant: str = ''

    @property
    def devices(self) -> Mesh:
        """`mesh`, or one device."""
        return self.mesh or sharding.make_mesh({}, sharding.all_devices()[:1])


@functools.lru_cache(maxsize=8)
def _jitted(apply: Callable[[Any, Any], Cond]) -> Callable[[Any, Any], Cond]:
    return jax.jit(apply)


def encode(text: TextEncoder, prompts: Sequence[str], chunk: int = 512) -> Cond:
    """Numpy `Cond` of many prompts, by chunks of one compiled shape."""
    tokens = text.tokenize(prompts)
    pad = -len(prompts) % chunk if len(prompts) > chunk else 0
    tokens = {k: np.pad(x, ((0, pad), (0, 0))) for k, x in tokens.items()}
    parts = [jax.device_get(_jitted(text.apply)(
        text.params, {k: x[i:i + chunk] for k, x in tokens.items()}))
        for i in range(0, len(prompts) + pad, chunk)]
    return {k: np.concatenate([part[k] for part in parts])[:len(prompts)] for k in parts[0]}


def kernels_in(params: Any, dtype: str) -> Any:
    """`params` with its kernels stored as `dtype`; biases and norms, which are few, as they are.

    Where products are bf16 anyway, predictions of bf16 kernels are those of fp32 ones.
    """
    def one(path: Any, leaf: Any) -> Any:
        return leaf.astype(dtype) if path[-1].key == 'kernel' else leaf
    return jax.tree_util.tree_map_with_path(one, params)
