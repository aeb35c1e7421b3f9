"""The embedded default, distilled on prompts of your own rather than on the emoji captions.

    python -m ddmd_jax.prepare prompts --input=FILE.txt --teacher=emoji --out=PROMPTS
    python -m ddmd_jax.main --config=configs/emoji_prompts.py --workdir=DIR \\
        --config.data.path=PROMPTS

Everything else is as in `configs/emoji.py`, the evaluation included. Prompts are encoded as
they are needed (online). To encode them once and train from the files, write them with
`python -m ddmd_jax.prepare embed` and give `--config.data.name=embeddings` and their folder.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

EMOJI = Path(__file__).with_name('emoji.py')


def get_config(schedule: str = 'decoupled_hybrid') -> ConfigDict:
    config = runpy.run_path(str(EMOJI))['get_config'](schedule)
    config.data = ConfigDict({'name': 'prompts', 'path': 'prompts', 'global_batch': 64,
                              'sizes': (), 'lengths': ()})
    return config
