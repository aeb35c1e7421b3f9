"""What the folder of a published model says of how its weights were made."""

import re
from collections.abc import Sequence
from pathlib import Path

from ddmd_jax.weights import diffusers, fetch

CONFIGS = ('model_index.json', 'config.json', 'transformer/config.json', 'unet/config.json',
           'scheduler/scheduler_config.json')
_LOADED = re.compile(r"""from_pretrained\(\s*["']([^"']+)""")


def pipeline(folder: Path) -> Path:
    """The folder of the pipeline whose network lies in `folder`; that itself if it is in none."""
    inside = not (folder / CONFIGS[0]).is_file() and (folder.parent / CONFIGS[0]).is_file()
    return folder.parent if inside else folder


def few_step(path: str, called: Sequence[str]) -> str:
    """What says that the weights at `path` are a few-step student already; '' if nothing does.

    Asked are the name that configs were saved under, the model that the card's own program loads
    (a base model's card may speak of its students as well), and the card's tags as `export` writes
    them; of a pipeline's network the pipeline is asked. One that lies by itself and says none of it
    cannot be told from its base.

    Args:
      path: of the folder, or a hub id.
      called: parts of such students' names, in lower case.

    Raises:
      WeightsError: there is no such folder, or its configs cannot be read.
    """
    folder = pipeline(fetch.local_folder(path, (*CONFIGS, 'README.md')))
    student = lambda name: any(word in name.lower() for word in called)
    for name in CONFIGS:
        if (folder / name).is_file():
            own = str(diffusers.read_json(folder / name).get('_name_or_path', ''))
            if student(own):
                return f'its {name} calls it {own}'
    if (folder / 'README.md').is_file():
        card = (folder / 'README.md').read_text('utf-8', 'replace')
        loaded = _LOADED.search(card)
        if loaded and student(loaded[1]):
            return f'its card loads {loaded[1]}'
        if re.search(r'^tags: .*\bfew-step\b', card, re.MULTILINE):
            return "its card is a few-step student's"
    return ''
