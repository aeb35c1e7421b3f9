"""The part of a family that trains a latent codec of its own (task `codec`)."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ddmd_jax.models.autoencoder_kl import AutoencoderKLConfig


@dataclasses.dataclass(frozen=True)
class CodecTraining:
    """Images to be encoded and decoded again.

    Attributes:
      identity: names the images.
      rows: indices of one epoch.
      lookup: ``rows [B], side -> [B, side, side, 3]`` uint8, crops of the rows' images.
      unseen: ``[N, H, W, 3]`` uint8, images that no row has; the PSNR is theirs.
      read: of a path that `save` wrote, (config, parameters); raises `WeightsError`.
      save: ``(file, config, parameters, metadata)`` writes weights that `read` reads.
    """

    identity: str
    rows: np.ndarray
    lookup: Callable[[np.ndarray, int], np.ndarray]
    unseen: np.ndarray
    read: Callable[[str], tuple[AutoencoderKLConfig, Any]]
    save: Callable[[Path, AutoencoderKLConfig, Any, dict[str, Any]], None]
