"""A tiny SDXL in a folder, as diffusers writes it."""

from __future__ import annotations

from typing import Any

import published_text

DOWN = ('DownBlock2D', 'CrossAttnDownBlock2D')
# Fields that are the same in every SDXL.
FIXED = {'use_linear_projection': True, 'addition_embed_type': 'text_time'}
# As wide as the texts of `published_text`: 24 + 32, pooled 20.
UNET = FIXED | {
    'block_out_channels': (16, 32), 'down_block_types': DOWN,
    'up_block_types': ('CrossAttnUpBlock2D', 'UpBlock2D'), 'layers_per_block': 1,
    'transformer_layers_per_block': (1, 2), 'attention_head_dim': (2, 4),
    'cross_attention_dim': 56, 'addition_time_embed_dim': 8,
    'projection_class_embeddings_input_dim': 20 + 6 * 8, 'norm_num_groups': 4, 'sample_size': 8}
# A UNet of one level, which compiles sooner.
ONE_LEVEL = {
    'block_out_channels': (16,), 'down_block_types': ('CrossAttnDownBlock2D',),
    'up_block_types': ('CrossAttnUpBlock2D',), 'transformer_layers_per_block': (1,),
    'attention_head_dim': (2,)}
VAE = {
    'block_out_channels': (8, 16), 'layers_per_block': 1, 'norm_num_groups': 4,
    'latent_channels': 4, 'scaling_factor': 0.13025, 'sample_size': 16, 'force_upcast': True,
    'down_block_types': ('DownEncoderBlock2D',) * 2, 'up_block_types': ('UpDecoderBlock2D',) * 2}
SCHEDULER = {
    'beta_start': 0.00085, 'beta_end': 0.012, 'beta_schedule': 'scaled_linear',
    'num_train_timesteps': 1000, 'timestep_spacing': 'leading', 'steps_offset': 1,
    'prediction_type': 'epsilon', 'interpolation_type': 'linear', 'use_karras_sigmas': False}
TOKENS = 77


def stirred(model: Any) -> Any:
    """A model of random weights, its norms and biases at other values than 1 and 0."""
    import torch

    with torch.no_grad():
        for p in model.eval().parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def unet(seed: int = 0, **changes: Any) -> Any:
    """diffusers' `UNet2DConditionModel` with random weights."""
    import diffusers
    import torch

    torch.manual_seed(seed)
    return stirred(diffusers.UNet2DConditionModel(**{**UNET, **changes}))


def pipeline(seed: int = 0, text: bool = False, zeros: bool = True, **changes: Any) -> Any:
    """diffusers' `StableDiffusionXLPipeline` with the published scheduler, and its text side.

    `zeros` is ``force_zeros_for_empty_prompt``; `changes` are the UNet's.
    """
    import diffusers

    parts = {'unet': unet(seed, **changes), 'vae': stirred(diffusers.AutoencoderKL(**VAE)),
             'scheduler': diffusers.EulerDiscreteScheduler(**SCHEDULER)}
    names = ('text_encoder', 'text_encoder_2', 'tokenizer', 'tokenizer_2')
    parts |= dict.fromkeys(names)
    if text:
        parts |= published_text.models('sdxl') | {
            'tokenizer': published_text.tokenizer('sdxl'),
            'tokenizer_2': published_text.tokenizer('sdxl', second=True)}
    return diffusers.StableDiffusionXLPipeline(
        **parts, force_zeros_for_empty_prompt=zeros, add_watermarker=False)
