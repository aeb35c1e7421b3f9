"""Trains the embedded text-to-scene teacher that ships with the package.

    python -m ddmd_jax.main --config=emoji_teacher --workdir=DIR

Lumina-Image-2.0's architecture at 4.4 M parameters (and 0.4 M of text encoder) on the latents of
the shipped codec, flow matching, 10 % caption dropout. Resumes from DIR; writes
DIR/teacher.safetensors. About two hours on two CPU cores (1.35 updates of 64 a second); what ships
took 170 minutes beside other work.
"""

from ddmd_jax.config import defaults


def get_config():
    return defaults('pretrain', {
        'teacher.name': 'emoji',
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
        # Latents of an epoch's scenes are kept: 4 KB each.
        'data.name': 'emoji', 'data.scenes': 65_536, 'data.global_batch': 64,
        # More of the noisy levels, where captions decide, and of both ends.
        'method.time_mean': -0.3, 'method.time_std': 1.3,
        # Muon learns as much of half the images that Adam takes.
        'optim.student.name': 'muon',
        'optim.student.lr': 1e-3, 'optim.student.b2': 0.99, 'optim.student.weight_decay': 0.01,
        'optim.student.warmup': 200, 'optim.student.decay': 0.3,
        'train.steps': 10_000,
        'checkpoint.every': 500, 'log.every': 50, 'log.images_every': 500,
    })
