"""The part of a family that trains a teacher of its own (task `pretrain`)."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ddmd_jax.data.batch import Cond
from ddmd_jax.parallel.sharding import Rules


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """A teacher to be trained by flow matching, its text encoder with it.

    Attributes:
      identity: names the data, its latents included.
      rows: indices of one epoch.
      lookup: ``rows [B] -> arrays [B, ...]`` of a batch; ``image`` is what is learned, in latents.
      init: ``key -> parameters`` of denoiser and text side, one nested dict.
      rules: lay them out over a mesh.
      condition: ``(params, batch, drop [B, 1] bool) -> Cond``, the null prompt's where dropped.
      predict_clean: ``(params, x_t, t, cond) -> x_hat``.
      show: ``params -> [H, W, 3]`` uint8, images of a few prompts beside real ones.
      save: ``(file, params, steps)`` writes weights that `Family.load` reads.
      read: ``path -> params`` of such a file, to go on from; raises `WeightsError`.
    """

    identity: str
    rows: np.ndarray
    lookup: Callable[[np.ndarray], dict[str, np.ndarray]]
    init: Callable[[Any], Any]
    rules: Rules
    condition: Callable[[Any, dict[str, Any], Any], Cond]
    predict_clean: Callable[[Any, Any, Any, Cond], Any]
    show: Callable[[Any], np.ndarray]
    save: Callable[[Path, Any, int], None]
    read: Callable[[str], Any]
