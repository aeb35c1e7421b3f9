"""The embedded default, distilled on prompts of your own rather than on its own captions.

    python -m ddmd_jax.prepare prompts --input=FILE.txt --out=PROMPTS
    python -m ddmd_jax.main --config=emoji_prompts --workdir=DIR --config.data.path=PROMPTS

Everything else is as in `configs/emoji.py`, the evaluation included. Prompts are encoded as
they are needed (online). To encode them once and train from the files, write them with
`python -m ddmd_jax.prepare embed` and give `--config.data.name=embeddings` and their folder.
"""

import runpy
from pathlib import Path

EMOJI = Path(__file__).with_name('emoji.py')


def get_config(schedule: str = 'decoupled_hybrid'):
    return runpy.run_path(str(EMOJI))['get_config'](schedule, data='prompts')
