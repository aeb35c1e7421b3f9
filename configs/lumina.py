"""Decoupled DMD on Lumina-Image-2.0 (2.6 B): 50 guided steps into 4 unguided ones, 1024 x 1024.

    python -m ddmd_jax.prepare prompts --input=FILE.txt --out=PROMPTS
    python -m ddmd_jax.main --config=lumina --workdir=DIR --config.data.path=PROMPTS
    python -m ddmd_jax.main --config=lumina:coupled_shared ...

The argument after the colon is one of Table 1's four schedules. `teacher.path` is a hub id, a
folder or a gs:// URL. Prompts are encoded on the pod as they are needed; docs/prompts.md says how
to encode them once instead.

Pod: 16 chips of v5e (16 GiB) and more, in multiples of 16: parameters are split over 16 chips,
and larger pods repeat them (`mesh.data`), so that what a chip sends does not grow with the pod.
By the TPU's own compiler (`python -m ddmd_jax.plan`, docs/scaling.md) 5.5 GiB of each chip are
resident (student, critic, EMA, AdamW's moments of both, teacher: eight fp32 copies of 2.6 B
parameters; text encoder and autoencoder) and the generator's step peaks at 14.3.

4 steps, the schedules, Algorithm 1 and full fine-tuning are the paper's; per-term normalisation is
its authors' answer; tau <= .98, 5 critic updates a generator update, Adam's b1 .9 and b2 .999, and
an EMA of .999 are peers' practice: all of them are defaults (docs/config.md), and batch 64 and the
floor, chosen here, are too. Nobody here has run this config: the machine that tests this repository
has no accelerator and no weights; what is tested is the same code at toy size.
"""

from ddmd_jax.config import defaults


def get_config(schedule: str = 'decoupled_hybrid'):
    return defaults('distill', {
        'teacher.name': 'lumina', 'teacher.path': 'Alpha-VLLM/Lumina-Image-2.0',
        'teacher.dtype': 'bfloat16', 'teacher.remat': 'full',
        'data.name': 'prompts', 'data.sizes': ((1024, 1024),),
        'method.schedule': schedule,
        'method.alpha': 4.0,  # the published pipeline's guidance; unproven here
        'method.shift': 3.0,  # the authors' answer: the same for generator and scores
        # Peers' practice; the warm-up and the length are chosen here, unproven at this size.
        'optim.student.lr': 1e-5, 'optim.critic.lr': 1e-5,
        'optim.student.clip': 10.0, 'optim.critic.clip': 10.0,
        'optim.student.warmup': 100, 'optim.critic.warmup': 100,
        'train.steps': 2000, 'checkpoint.keep': 3,
        'mesh.fsdp': 16,
    })
