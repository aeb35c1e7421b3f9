"""What the folder of a published model says of how its weights were made."""

import re
from collections.abc import Sequence

from ddmd_jax.weights import diffusers, fetch

CONFIGS = ('model_index.json', 'config.json', 'transformer/config.json', 'unet/config.json',
           'scheduler/scheduler_config.json')
_LOADED = re.compile(r"""from_pretrained\(\s*["']([^"']+)""")


def few_step(path: str, called: Sequence[str]) -> str:
    """What says that the weights at `path` are a few-step student already; '' if nothing does.

    Asked are the name that configs were saved under, the model that the card's own program loads
    (a base model's card may speak of its students as well), and the card's tags as `export` writes
    them. A network whose folder says none of it cannot be told from its base.

    Args:
      path: of the folder, or a hub id.
      called: parts of such students' names, in lower case.

    Raises:
      WeightsError: there is no such folder, or its configs cannot be read.
    """
    folder = fetch.local_folder(path, (*CONFIGS, 'README.md'))
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
