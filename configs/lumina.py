"""Decoupled DMD on Lumina-Image-2.0 (2.6 B): 50 guided steps into 4 unguided ones, 1024 x 1024.

    python -m ddmd_jax.prepare prompts --input=FILE.txt --teacher=lumina --out=PROMPTS
    python -m ddmd_jax.main --config=configs/lumina.py --workdir=DIR --config.data.path=PROMPTS
    python -m ddmd_jax.main --config=configs/lumina.py:coupled_shared ...

The argument after the colon is one of Table 1's four schedules. `teacher.path` is a hub id, a
folder or a gs:// URL. Prompts are encoded on the pod as they are needed; docs/prompts.md says how
to encode them once instead.

Pod: 16 chips of v5e (16 GiB) and more, in multiples of 16: parameters are split over 16 chips,
and larger pods repeat them (`mesh.data`), so that what a chip sends does not grow with the pod.
By the TPU's own compiler (`python -m ddmd_jax.plan`, docs/scaling.md) 5.5 GiB of each chip are
resident (student, critic, EMA, AdamW's moments of both, teacher: eight fp32 copies of 2.6 B
parameters; text encoder and autoencoder) and the generator's step peaks at 14.3.

From the paper: 4 steps, the schedules, Algorithm 1, full fine-tuning. From its authors' answers:
shift 3 for generator and scores alike, per-term normalisation. From peers' practice: tau <= .98,
5 critic updates a generator update, learning rates of 1e-5 (Adam's b1 .9, b2 .999; clip 10),
EMA .999. Chosen here, unproven at this size: alpha 4 (the published pipeline's guidance), the
floor, batch 64, 2,000 steps with warm-up. Nobody here has run it: the machine that tests this
repository has no accelerator and no weights; what is tested is the same code at toy size.
"""

from ml_collections import ConfigDict, config_dict


def get_config(schedule: str = 'decoupled_hybrid') -> ConfigDict:
    adamw = {'name': 'adamw', 'lr': 1e-5, 'b1': 0.9, 'b2': 0.999, 'eps': 1e-8,
             'weight_decay': 0.0, 'clip': 10.0, 'warmup': 100, 'decay': 0.0,
             'mu_dtype': 'float32', 'chain': ()}
    return ConfigDict({
        'task': 'distill',
        'seed': 0,
        'resume': '', 'init_from': '',
        'teacher': {'name': 'lumina', 'path': 'Alpha-VLLM/Lumina-Image-2.0',
                    'dtype': 'bfloat16', 'param_dtype': 'float32', 'remat': 'full',
                    'attention': 'auto'},
        'student': {'steps': 4, 'ema': 0.999, 'ema_ramp': True, 'sampler': 'renoise'},
        'critic': {'updates': 5, 'warmup': 0, 'weighting': 'velocity', 'tau': (0.0, 0.98),
                   'merge': 1.0},
        'method': {
            'schedule': schedule, 'alpha': 4.0, 'weight_ca': 1.0, 'weight_dm': 1.0,
            'alpha_range': (), 'alpha_ramp': 0,
            'tau_ca': (0.0, 0.98), 'tau_dm': (0.0, 0.98),
            'tau_ca_end': (), 'tau_dm_end': (), 'tau_relax': 0,
            'normaliser': 'per_term', 'floor': 0.02, 'shift': 3.0,
            'mean_variance': {'weight': 0.0, 'mean': config_dict.placeholder(float),
                              'variance': config_dict.placeholder(float)},
            'gan': {'weight': 0.0, 'critic_weight': 1e-2, 'r1': 0.0, 'tau': (0.0, 0.98)},
        },
        'data': {'name': 'prompts', 'path': 'prompts', 'global_batch': 64,
                 'sizes': ((1024, 1024),), 'lengths': ()},
        'optim': {'student': {**adamw}, 'critic': {**adamw}},
        'train': {'steps': 2000, 'accumulate': 1, 'teacher_passes': 'together',
                  'offload': 'none', 'on_nan': 'abort', 'spike': 0.0, 'on_health': 'nothing'},
        'mesh': {'data': -1, 'fsdp': 16, 'tensor': 1},
        'checkpoint': {'every': 100, 'keep': 3, 'keep_every': 0, 'best': '',
                       'best_mode': 'min', 'timeout': 1800},
        'log': {'every': 10, 'images_every': 100, 'probe': 8, 'judge': 0,
                'tracker': '', 'report': True},
        'eval': {'prompts': 8, 'held_out': 1, 'batch': 4, 'teacher_steps': 50,
                 'guidance': 4.0, 'solver': 'euler'},
    })
