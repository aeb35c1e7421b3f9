"""Trains the embedded text-to-emoji teacher that ships with the package.

    python -m ddmd_jax.main --config=configs/emoji_teacher.py --workdir=DIR

Lumina-Image-2.0's architecture at 4.46 M parameters (and 0.60 M of text encoder) on
24 x 24 pixels, flow matching, 10 % caption dropout. Resumes
from DIR; writes DIR/teacher.safetensors.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict({
        'task': 'pretrain',
        'seed': 0,
        'resume': '', 'init_from': '',
        'teacher': {
            'name': 'emoji',
            'model': {
                'denoiser': {
                    'patch_size': 4, 'in_channels': 3, 'hidden_size': 192, 'num_layers': 6,
                    'num_refiner_layers': 1, 'num_attention_heads': 4, 'num_kv_heads': 2,
                    'multiple_of': 64, 'ffn_dim_multiplier': 0.6667,
                    'axes_dim_rope': (16, 16, 16), 'cap_feat_dim': 128,
                    'fold_tokens': True, 'unroll': True,
                },
                'text': {'vocab_size': 1600, 'max_length': 10, 'dim': 128, 'num_layers': 2,
                         'num_heads': 4},
            },
        },
        'student': {'ema': 0.999, 'ema_ramp': True},
        'method': {'dropout': 0.1, 'time_mean': -0.3, 'time_std': 1.3},
        'data': {'name': 'emoji', 'global_batch': 64, 'white_repeat': 3},
        'optim': {'student': {
            'name': 'adamw', 'lr': 1e-3, 'b1': 0.9, 'b2': 0.99, 'eps': 1e-8,
            'weight_decay': 0.01, 'clip': 1.0, 'warmup': 200, 'decay': 0.3,
            'mu_dtype': 'float32', 'chain': ()}},
        'train': {'steps': 5500, 'on_nan': 'abort', 'spike': 0.0},
        'mesh': {'data': -1, 'fsdp': 1, 'tensor': 1},
        'checkpoint': {'every': 500, 'keep': 2, 'keep_every': 0, 'best': '',
                       'best_mode': 'min', 'timeout': 1800},
        'log': {'every': 50, 'images_every': 1000, 'tracker': '', 'report': True},
    })
