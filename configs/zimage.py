"""Decoupled DMD on Z-Image (6.2 B): 50 guided steps into 8 unguided ones, 1024 x 1024.

    python -m ddmd_jax.prepare prompts --input=FILE.txt --out=PROMPTS
    python -m ddmd_jax.main --config=zimage --workdir=DIR --config.data.path=PROMPTS
    python -m ddmd_jax.main --config=zimage:coupled_shared ...
    python -m ddmd_jax.main --config=zimage:lora ...

The argument after the colon is one of Table 1's four schedules, or `lora`: then student, critic and
EMA are adapters over the one copy of the teacher. The teacher is the base model. Z-Image-Turbo,
which was distilled from it, has no guidance left to distil and is refused.

Pod: by the TPU's own compiler (docs/plans.md) full fine-tuning fits 16 chips of v5p at a batch of
up to 384, and 256 of v5e at 1024 with `mesh.fsdp=256` and `critic.order='one_rollout'`; `lora` fits
16 of v5e at 64 on one rollout.

8 steps are those of Z-Image-Turbo, which its authors made by Decoupled DMD; its learning rates,
batch, length and alpha are not published. The schedules, Algorithm 1 and full fine-tuning are the
paper's; per-term normalisation and a shift of 3 its authors' answer for Lumina; the defaults of
docs/config.md are peers' practice. Rates, clipping, batch and length are Lumina's here, unproven.
Nobody here has run this config: the machine that tests this repository has no accelerator and no
weights; what is tested is the same code at toy size.
"""

from ddmd_jax.config import defaults

# Rank, alpha and rates of adapters are common practice for networks of this size, unproven here.
LORA = {
    'student.adapter.kind': 'lora', 'student.adapter.rank': 64,
    'critic.adapter.kind': 'lora', 'critic.adapter.rank': 64,
    'optim.student.lr': 1e-4, 'optim.critic.lr': 1e-4,
}


def get_config(schedule: str = 'decoupled_hybrid'):
    lora = schedule == 'lora'
    return defaults('distill', {
        'teacher.name': 'zimage', 'teacher.path': 'Tongyi-MAI/Z-Image',
        'teacher.dtype': 'bfloat16', 'teacher.param_dtype': 'bfloat16', 'teacher.remat': 'full',
        'student.steps': 8,
        'data.name': 'prompts', 'data.sizes': ((1024, 1024),), 'data.global_batch': 128,
        'method.schedule': 'decoupled_hybrid' if lora else schedule,
        # The pipeline's guidance_scale is alpha - 1: its card recommends 3 to 5 and draws with 4.
        'method.alpha': 5.0, 'eval.guidance': 5.0,
        'method.shift': 3.0,  # Turbo's own, too
        'optim.student.lr': 1e-5, 'optim.critic.lr': 1e-5,
        'optim.student.clip': 10.0, 'optim.critic.clip': 10.0,
        'optim.student.warmup': 100, 'optim.critic.warmup': 100,
        'train.steps': 2000, 'checkpoint.keep': 3,
        'mesh.fsdp': 16,
        **(LORA if lora else {}),
    })
