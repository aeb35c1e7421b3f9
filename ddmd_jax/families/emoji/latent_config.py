"""Trains the teacher of the embedded world of scenes; it becomes configs/emoji_teacher.py."""

from ddmd_jax.config import defaults


def get_config():
    return defaults('pretrain', {
        'teacher.name': 'ddmd_jax.families.emoji.latent_family',
        'teacher.model': {
            'denoiser': {
                'patch_size': 2, 'in_channels': 8, 'hidden_size': 192, 'num_layers': 6,
                'num_refiner_layers': 1, 'num_attention_heads': 4, 'num_kv_heads': 2,
                'multiple_of': 64, 'ffn_dim_multiplier': 0.6667,
                'axes_dim_rope': (16, 16, 16), 'cap_feat_dim': 128,
                'fold_tokens': True, 'unroll': True,  # faster on a CPU
            },
            'text': {'vocab_size': 64, 'max_length': 16, 'dim': 128, 'num_layers': 2,
                     'num_heads': 4},
        },
        'data.name': 'scenes', 'data.scenes': 131_072,
        # More of the noisy levels, where captions decide, and of both ends.
        'method.time_mean': -0.3, 'method.time_std': 1.3,
        'optim.student.name': 'muon',
        'optim.student.lr': 1e-3, 'optim.student.b2': 0.99, 'optim.student.weight_decay': 0.01,
        'optim.student.warmup': 200, 'optim.student.decay': 0.3,
        'train.steps': 10_000,
        'checkpoint.every': 250, 'log.every': 50, 'log.images_every': 500,
    })
