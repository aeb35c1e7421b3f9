"""A diffusers scheduler that takes our student's steps.

Ours (`time.FewSteps`) are equally far apart before the shift, from t = 0: sigma = 1, 1 -
1/n, ..., 1/n, which is what `Lumina2Pipeline` hands its scheduler for n steps. From the prediction
x at sigma, `deterministic` goes along the line from it to the noisy sample, an Euler step;
`renoise` draws new noise, ``(1 - sigma') x + sigma' noise``: `stochastic_sampling` there.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddmd_jax.util import files

CLASS = 'FlowMatchEulerDiscreteScheduler'
STEPS = '_ddmd_jax_steps'  # of the student, in model_index.json: private names are nobody's there
# By these a sampler would take other steps than the student was trained for.
RESPACED = ('use_karras_sigmas', 'use_exponential_sigmas', 'use_beta_sigmas', 'invert_sigmas',
            'shift_terminal')
STATED = '0.36.0'  # the oldest diffusers that what is written has been loaded with is as old


def write(folder: Path, shift: float, sampler: str, base: Mapping[str, Any] | None = None) -> None:
    """``FOLDER/scheduler_config.json``; `base` is the teacher's, kept but for its steps."""
    kept = {name: value for name, value in (base or {}).items() if name not in RESPACED}
    config = {**kept, '_class_name': CLASS, 'num_train_timesteps': 1000,
              'shift': float(shift), 'use_dynamic_shifting': False,
              'stochastic_sampling': sampler == 'renoise'}
    config.setdefault('_diffusers_version', STATED)
    folder.mkdir()
    files.write(folder / 'scheduler_config.json', json.dumps(config, indent=2) + '\n')


def write_index(folder: Path, name: Any, components: Mapping[str, Any], **more: Any) -> None:
    """``model_index.json``, which makes the folder a pipeline: what has to be written last."""
    index = {'_class_name': name, '_diffusers_version': STATED, **components, **more}
    files.write(folder / 'model_index.json', json.dumps(index, indent=2) + '\n')
