"""What every teacher family boils down to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from ddmd_jax.sharding import Rules

Array = jax.Array
Cond = dict[str, Any]  # {'embeds': [B, L, D], 'mask': [B, L] bool}


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A frozen text-to-image model in the project's one convention.

    `predict_clean(params, x_t, t, cond)` takes latents ``[B, H, W, C]``, the paper's times
    ``[B]`` (0 noise, 1 clean, after any shift) and a `Cond`; it returns x_hat in fp32.
    `encode(prompts)` gives the `Cond` of a list of prompts; the empty string is the null
    prompt. `decode(latents)` gives images in [-1, 1]; it is None where no decoder came with
    the weights. `data_std` is the mean standard deviation of one real latent, where it is
    known: what health measures contrast against. `rescale(v, v_cond)` is what the family's own
    sampler does to a guided velocity; it belongs to sampling and never enters CA. `cond_width`
    is D of the `Cond`, `limit` the magnitude beyond which a value of a latent is saturated.
    """

    name: str
    params: Any
    predict_clean: Callable[[Any, Array, Array, Cond], Array]
    encode: Callable[[Sequence[str]], Cond]
    decode: Callable[[Array], Array] | None
    sample_shape: tuple[int, int, int]
    shift: float
    identity: str
    rules: Rules
    data_std: float | None = None
    rescale: Callable[[Array, Array], Array] | None = None
    cond_width: int | None = None
    limit: float = 1.0
