"""Decoupled DMD on the embedded teacher: text to emoji, 50 guided steps into 4 unguided ones.

    python -m ddmd_jax.main --config=configs/emoji.py --workdir=DIR
    python -m ddmd_jax.main --config=configs/emoji.py:coupled_shared --workdir=DIR

The argument after the colon is one of the paper's four schedules (its Table 1). Sources: the
schedule, Algorithm 1 and per-term normalisation are the paper's and its authors' answers;
the two-time-scale ratio is common practice. Chosen here, at this size: alpha is small because
each prompt has one right picture, so that conditional and unconditional prediction lie far
apart and CA is strong as it is (larger values over-saturated); learning
rates are low and beta1 = .9 because this teacher is nearly right in 4 steps already, and a
noisier update costs it more than guidance gains (at 2e-4 and beta1 = 0 backgrounds washed out).
"""

from ml_collections import ConfigDict, config_dict


def get_config(schedule: str = 'decoupled_hybrid') -> ConfigDict:
    adamw = {'name': 'adamw', 'b1': 0.9, 'b2': 0.99, 'eps': 1e-8, 'weight_decay': 0.0,
             'clip': 1.0, 'warmup': 0, 'decay': 0.5,
             'mu_dtype': 'float32', 'chain': ()}
    return ConfigDict({
        'task': 'distill',
        'seed': 0,
        'resume': '', 'init_from': '',
        'teacher': {'name': 'emoji', 'path': '', 'dtype': 'float32',
                    'param_dtype': 'float32', 'remat': 'none', 'attention': 'xla'},
        'student': {'steps': 4, 'ema': 0.98, 'ema_ramp': True, 'sampler': 'renoise'},
        'critic': {'updates': 2, 'warmup': 0, 'weighting': 'velocity', 'tau': (0.0, 0.98),
                   'merge': 1.0},
        'method': {
            'schedule': schedule, 'alpha': 1.5, 'weight_ca': 1.0, 'weight_dm': 1.0,
            'alpha_range': (), 'alpha_ramp': 0,
            'tau_ca': (0.0, 0.98), 'tau_dm': (0.0, 0.98),
            'tau_ca_end': (), 'tau_dm_end': (), 'tau_relax': 0,
            'normaliser': 'per_term', 'floor': 0.02, 'shift': config_dict.placeholder(float),
            'mean_variance': {'weight': 0.0, 'mean': config_dict.placeholder(float),
                              'variance': config_dict.placeholder(float)},
            'gan': {'weight': 0.0, 'critic_weight': 1e-2, 'r1': 0.0, 'tau': (0.0, 0.98)},
        },
        'data': {'name': 'emoji', 'global_batch': 64, 'white_repeat': 2},
        'optim': {'student': {**adamw, 'lr': 6e-6}, 'critic': {**adamw, 'lr': 2e-5}},
        'train': {'steps': 40, 'accumulate': 1, 'teacher_passes': 'together', 'offload': 'none',
                  'on_nan': 'abort', 'spike': 0.0, 'on_health': 'nothing'},
        'mesh': {'data': -1, 'fsdp': 1, 'tensor': 1},
        'checkpoint': {'every': 20, 'keep': 2, 'keep_every': 0, 'best': '',
                       'best_mode': 'min', 'timeout': 1800},
        'log': {'every': 5, 'images_every': 20, 'probe': 32, 'judge': 0,
                'tracker': '', 'report': True},
        'eval': {'prompts': 256, 'held_out': 128, 'batch': 128, 'teacher_steps': 50,
                 'guidance': 4.0, 'solver': 'euler'},
    })
