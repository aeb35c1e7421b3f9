"""A tiny Z-Image as diffusers builds it, and what its pipeline is given."""

from __future__ import annotations

from typing import Any

import numpy as np

TRANSFORMER = {
    'all_patch_size': (2,), 'all_f_patch_size': (1,), 'in_channels': 4, 'dim': 48, 'n_layers': 2,
    'n_refiner_layers': 2, 'n_heads': 2, 'n_kv_heads': 2, 'norm_eps': 1e-5, 'qk_norm': True,
    'cap_feat_dim': 24, 'rope_theta': 256.0, 't_scale': 1000.0, 'axes_dims': (8, 8, 8),
    'axes_lens': (1024, 32, 32)}


def transformer(seed: int = 0, **changes: Any) -> Any:
    """diffusers' `ZImageTransformer2DModel` with random weights."""
    import diffusers
    import torch

    torch.manual_seed(seed)
    found = diffusers.ZImageTransformer2DModel(**{**TRANSFORMER, **changes}).eval()
    with torch.no_grad():  # norms, biases and learnt tokens at other values than 1 and 0
        for name, p in found.named_parameters():
            if p.ndim < 2 or 'pad_token' in name:
                p.add_((1.0 if 'pad_token' in name else 0.2) * torch.randn_like(p))
    return found


def cond(captions: list[np.ndarray], places: int | None = None) -> dict[str, np.ndarray]:
    """Captions ``[n, D]`` side by side, padded with what nobody may see."""
    places = places or max(map(len, captions))
    pad = lambda c: np.pad(c, ((0, places - len(c)), (0, 0)), constant_values=7.0)
    lengths = np.asarray([len(c) for c in captions])
    return {'embeds': np.stack(list(map(pad, captions))),
            'mask': np.arange(places) < lengths[:, None]}


def pipeline(shift: float = 6.0, text: bool = False) -> Any:
    """diffusers' `ZImagePipeline` with random weights; with its text side if `text`."""
    import diffusers
    import published
    import published_text

    parts = {'text_encoder': None, 'tokenizer': None}
    if text:
        parts = published_text.models('zimage') | {
            'tokenizer': published_text.tokenizer('zimage')}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    return diffusers.ZImagePipeline(transformer=transformer(), vae=published.pipeline().vae,
                                    scheduler=scheduler, **parts)
