"""A tiny Lumina-Image-2.0 in a folder, as diffusers or our own exporter writes it."""

from __future__ import annotations

TRANSFORMER = {
    'patch_size': 2, 'in_channels': 4, 'hidden_size': 48, 'num_layers': 2,
    'num_refiner_layers': 2, 'num_attention_heads': 4, 'num_kv_heads': 2, 'multiple_of': 16,
    'ffn_dim_multiplier': None, 'norm_eps': 1e-5, 'axes_dim_rope': (4, 4, 4),
    'axes_lens': (64, 32, 32), 'cap_feat_dim': 24, 'sample_size': 8}
VAE = {
    'block_out_channels': (8, 16), 'layers_per_block': 1, 'norm_num_groups': 4,
    'latent_channels': 4, 'scaling_factor': 0.3611, 'shift_factor': 0.1159, 'sample_size': 16,
    'down_block_types': ('DownEncoderBlock2D',) * 2, 'up_block_types': ('UpDecoderBlock2D',) * 2,
    'use_quant_conv': False, 'use_post_quant_conv': False}
TOKENS = 9


def pipeline(seed: int = 0):
    """diffusers' `Lumina2Pipeline` with random weights and the published scheduler."""
    import diffusers
    import torch

    torch.manual_seed(seed)
    parts = (diffusers.Lumina2Transformer2DModel(**TRANSFORMER), diffusers.AutoencoderKL(**VAE))
    with torch.no_grad():
        for part in parts:  # norms, gates and biases at other values than 1 and 0
            for p in part.eval().parameters():
                p.add_(0.1 * torch.randn_like(p))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0)
    return diffusers.Lumina2Pipeline(
        transformer=parts[0], vae=parts[1], scheduler=scheduler, text_encoder=None,
        tokenizer=None)
