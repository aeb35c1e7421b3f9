"""SDXL (2.6 B) distilled by DMD2's published recipe, and by Decoupled DMD's schedules in its place.

    python -m ddmd_jax.prepare images --input=FOLDER --teacher=sdxl --path=PIPELINE --out=IMAGES
    python -m ddmd_jax.main --config=sdxl:dmd2 --workdir=DIR --config.data.path=IMAGES
    python -m ddmd_jax.main --config=sdxl:decoupled_hybrid ...

After the colon stands one of

  * `dmd2`: 50 guided steps into 4 unguided ones, GAN and real images included (DMD2's script
    `sdxl_cond999_8node_lr5e-7_denoising4step_diffusion1000_gan5e-3_guidance8_noinit_noode_...`);
  * `decoupled_hybrid`: the paper's second table. The same, its re-noising schedule replaced; also
    `decoupled_full` and `decoupled_constrained`, Table 1's other two (its first is `dmd2`);
  * `1step`: DMD2's single step, at step 399 of the table.

Published with DMD2 (its scripts, `main/train_sd.py`, appendix F.4): steps 999, 749, 499 and 249;
rate 5e-7, AdamW (.9, .999), decay .01, clipping at 10, batch 128; 500 calls of warm-up, of which
its 64 processes make 8; a student's update every fifth iteration, 19,000 iterations (24,000 for
one step); guidance 8 away from zeros; tau of DM on steps 20 to 980; the weights of the GAN, no R1,
its head; the critic's loss on the noise; no EMA; 1024 x 1024, conditioned on as a whole image;
seed 10.

What is not as published:

  * the GAN and the critic draw steps 1 to 999, not 0 to 999: a level of .999 is the cleanest here;
  * a batch holds every step of the student equally often, where DMD2 draws one for all of it;
  * its real latents are those of its own captions, where DMD2 takes another shuffle's;
  * weight decay is on kernels alone, and critic and head are clipped each by its own norm;
  * passes without gradient of student and critic, and the text encoders, are in bfloat16 like the
    rest, there in fp32;
  * one step starts at the teacher's weights, where DMD2 has regressed 10,000 pairs before
    (`init_from` takes weights that were).

Not published for the decoupled schedules: that terms are normalised one by one is the paper's
authors' answer for Lumina; alpha is DMD2's guidance. Chosen here: the floors of the normalisers
(DMD2 has none), and what is logged, saved and evaluated.

Pod: 16 chips and more, in multiples of 16. A batch is two micro-batches (`train.accumulate`), so
that each of 16 chips has four images at a time. 5.0 GiB of each chip are resident (student, critic,
EMA, AdamW's moments of both, the head and its own, in fp32; teacher and text encoders in bf16). By
the TPU's compiler (docs/plans.md) the student's step peaks at 17.2 GiB and the critic's at 15.8 of
v6e's 31.3; v5e has 15.75, in which the batch fits on one rollout (`critic.order='one_rollout'`:
14.9 GiB), not in DMD2's order. Nobody here has run this config: the machine that tests this
repository has no accelerator and no weights; what is tested is the same code at toy size.
"""

from ddmd_jax.config import defaults

SCHEDULES = {
    'dmd2': 'coupled_shared', '1step': 'coupled_shared', 'decoupled_full': 'decoupled_full',
    'decoupled_constrained': 'decoupled_constrained', 'decoupled_hybrid': 'decoupled_hybrid'}


def get_config(recipe: str = 'dmd2'):
    if recipe not in SCHEDULES:
        raise ValueError(f'no recipe {recipe!r} of sdxl; known: {", ".join(SCHEDULES)}')
    # Uniform time is whole steps: .019 is step 980, below .98 is step 20, and .999 ends at step 1.
    dm, all_steps = (0.019, 0.98), (0.0, 0.999)
    published = recipe in ('dmd2', '1step')
    adamw = {'lr': 5e-7, 'b1': 0.9, 'b2': 0.999, 'weight_decay': 0.01, 'clip': 10.0, 'warmup': 8}
    return defaults('distill', {
        'seed': 10,
        'teacher.name': 'sdxl', 'teacher.path': 'stabilityai/stable-diffusion-xl-base-1.0',
        'teacher.dtype': 'bfloat16', 'teacher.param_dtype': 'bfloat16', 'teacher.remat': 'full',
        'data.name': 'images', 'data.sizes': ((1024, 1024),), 'data.global_batch': 128,
        'student.steps': 1 if recipe == '1step' else 4,
        'student.first_step': 399 if recipe == '1step' else 999,
        'student.ema': 0.0,
        'method.schedule': SCHEDULES[recipe],
        'method.alpha': 8.0, 'method.null': 'zeros',
        'method.normaliser': 'dmd2' if published else 'per_term',
        'method.floor': 1e-6 if published else 0.02,
        'method.tau_ca': dm, 'method.tau_dm': dm,
        'critic.updates': 5, 'critic.order': 'same_images',
        'critic.weighting': 'noise', 'critic.tau': all_steps,
        'method.regularisers': ('gan',),
        'method.gan.weight': 5e-3, 'method.gan.critic_weight': 1e-2, 'method.gan.r1': 0.0,
        'method.gan.tau': all_steps, 'method.gan.head': 'convolutions',
        **{f'optim.{network}.{name}': value for network in ('student', 'critic')
           for name, value in adamw.items()},
        'train.steps': 4_800 if recipe == '1step' else 3_800, 'train.accumulate': 2,
        'eval.guidance': 8.0,
        'checkpoint.keep': 3, 'mesh.fsdp': 16,
    })
