"""What every teacher family boils down to."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from ddmd_jax.parallel.sharding import Rules

Array = jax.Array
Cond = dict[str, Any]  # {'embeds': [B, L, D], 'mask': [B, L] bool}


@dataclasses.dataclass(frozen=True)
class Decoder:
    """The jitted program behind `Teacher.decode`, as shapes: ``run(params, latents) -> images``.

    `latents` is what it takes at a time, `flops` what that costs, on every device alike.
    """

    run: Callable[[Any, Any], Any]
    params: Any
    shardings: Any
    latents: Any
    flops: int


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """A frozen text side: prompts to tokens on the host, tokens to a `Cond` on the mesh.

    `tokenize(prompts)` gives a dict of numpy arrays, a row for each prompt: ``mask [n, length]``
    bool, True for what is real, and the ids (``ids [n, length]`` int32; a family with two
    encoders has ids for each). Rows are padded on the right, or on whichever side the published
    model pads; longer texts are cut. The empty string is the null prompt. `apply(params, tokens)`
    is pure and can be jitted; the `Cond` it gives has as many places as the tokens. It is fit to
    be cut to the longest prompt of a batch where `cuts` is True: no token sees padding behind it.
    `width` is D of the embeds, `rules` lay `params` out over a mesh, `identity` names the weights.
    `flops(tokens)` is what a row of so many costs; it is the planner's.
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


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A frozen text-to-image model in the project's one convention.

    `predict_clean(params, x_t, t, cond)` takes latents ``[B, H, W, C]``, the paper's times
    ``[B]`` (0 noise, 1 clean, after any shift) and a `Cond`; it returns x_hat in fp32. `text` is
    the text side where it comes with the weights, and None where it is loaded apart (`load_text`).
    `sample_shape` is of one latent, `shape_of((height, width))` that of another size in pixels,
    None where there is but one. `decode(latents)` gives images in [-1, 1]; it is None where no
    decoder came with the weights. `data_std` is the mean standard deviation of one real latent,
    where it is known: what health measures contrast against. `rescale(v, v_cond)` is what the
    family's own sampler does to a guided velocity; it belongs to sampling and never enters CA.
    `features(params, x_t, t, cond)` are the trunk's tokens ``[B, S, D]``, for a GAN's head; None
    where there are none to be had. `data_moments` are the mean over real latents of their means and
    of their variances, where they are known.
    `cond_width` is D of the `Cond`, `limit` the magnitude beyond which a value of a latent is
    saturated. `flops(tokens)` is what one row of `predict_clean` costs with captions of so many,
    `decoder` what `decode` runs; both are the planner's.
    """

    name: str
    params: Any
    predict_clean: Callable[[Any, Array, Array, Cond], Array]
    text: TextEncoder | None
    decode: Callable[[Array], Array] | None
    sample_shape: tuple[int, int, int]
    shift: float
    identity: str
    rules: Rules
    data_std: float | None = None
    data_moments: tuple[float, float] | None = None
    features: Callable[[Any, Array, Array, Cond], Array] | None = None
    rescale: Callable[[Array, Array], Array] | None = None
    cond_width: int | None = None
    limit: float = 1.0
    flops: Callable[[int], int] | None = None
    decoder: Decoder | None = None
    shape_of: Callable[[Sequence[int]], tuple[int, int, int]] | None = None

    def encode(self, prompts: Sequence[str]) -> Cond:
        """Numpy `Cond` of a list of prompts by the text side that came with the weights."""
        if self.text is None:
            raise ValueError(f'{self.name} has its text side apart: load_text')
        return encode(self.text, prompts)


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
