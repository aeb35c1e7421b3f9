"""The results of a study's runs: one JSON file each, ``results/NAME-seedN.json``."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddmd_jax.util.files import write_json

CURVES = ('loss', 'fake_loss', 'dm_rel_gap', 'dm_cos', 'dm_to_ca', 'x_std', 'saturation', 'ema_std',
          'ema_cast', 'ema_match', 'ema_objects', 'ema_background', 'ema_image_std',
          'gan_critic_loss', 'gan_loss', 'mv_kl', 'health')


def curves(workdir: Path) -> dict[str, list[Any]]:
    """Columns of ``metrics.jsonl``: `step` and those of CURVES that are there."""
    path = workdir / 'metrics.jsonl'
    if not path.is_file():
        return {}
    lines = [json.loads(x) for x in path.read_text().splitlines()]
    short = lambda v: round(v, 5) if isinstance(v, float) else v
    return {name: [short(line.get(name)) for line in lines] for name in ('step', *CURVES)
            if any(name in line for line in lines)}


def evaluated(workdir: Path) -> dict[str, Any]:
    """Rows of the run's evaluation; {} if it has none.

    `student`; `few_step`, its teacher in as few steps; `guided`, the teacher with the run's
    ``eval.teacher_steps`` and ``eval.guidance``; `real` images.
    """
    path = workdir / 'eval.json'
    if not path.is_file():
        return {}
    found = json.loads(path.read_text())
    rows = {row['name']: row for row in found['rows']}
    return {'student': rows['student'], 'few_step': rows['teacher_few_step'],
            'guided': rows['teacher_guided'], 'real': rows['real'], 'seconds': found['seconds']}


def write(path: Path, result: Mapping[str, Any]) -> None:
    """Writes a run's result whole or not at all."""
    write_json(path, dict(result), indent=None)


def read(folder: Path, names: Sequence[str]) -> dict[str, dict[int, dict[str, Any]]]:
    """``{experiment: {seed: result}}`` of what stands in `folder`, seeds in order."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for name in names:
        files = {int(p.stem.rpartition('-seed')[2]): p for p in folder.glob(f'{name}-seed*.json')}
        if files:
            found[name] = {seed: json.loads(files[seed].read_text()) for seed in sorted(files)}
    return found
