"""Trains the embedded world's latent codec that ships with the package.

    python -m ddmd_jax.main --config=emoji_codec --workdir=DIR

The `AutoencoderKL` of FLUX and Lumina-Image-2.0 at 0.84 M parameters: 64 x 64 pixels are 16 x 16
latents of 8 channels. Resumes from DIR; writes DIR/codec.safetensors.
"""

from ddmd_jax.config import defaults


def get_config():
    return defaults('codec', {
        'teacher.name': 'emoji', 'data.name': 'emoji', 'data.global_batch': 32,
        'codec.widths': (16, 40, 72), 'codec.sides': (32, 32, 32, 32, 32, 64),
        'optim.student.lr': 2e-3, 'optim.student.b2': 0.99,
        'optim.student.warmup': 100, 'optim.student.decay': 0.4,
        'student.ema': 0.995,
        'train.steps': 4000,
        'checkpoint.every': 250, 'log.every': 50, 'log.images_every': 500,
    })
