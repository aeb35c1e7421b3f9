"""Reads the files of a run's folder for the report; nothing is computed anew."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from ddmd_jax.method import health
from ddmd_jax.util import run_files
from ddmd_jax.util.errors import UserError
from ddmd_jax.util.places import Place

PICTURE = re.compile(r'(.+)-(\d+)\.png')


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """A run's folder."""

    name: str
    folder: Place
    lines: list[dict[str, Any]]  # of ``metrics.jsonl``, oldest first
    config: dict[str, Any]
    about: dict[str, Any]  # ``run.json``: command, versions, devices, fields that flags changed
    times: list[dict[str, Any]]  # ``times.jsonl``: when each line was written, seconds since 1970
    evaluation: dict[str, Any] | None  # ``eval.json``
    pictures: dict[str, list[tuple[int, Place]]]  # by name: (step, file), in order of steps

    @property
    def step(self) -> int:
        """The last logged step; 0 before the first."""
        return self.lines[-1]['step'] if self.lines else 0

    @property
    def total(self) -> int:
        return self.config.get('train', {}).get('steps', self.step)

    @property
    def health(self) -> tuple[str, str]:
        """The last verdict and its reason, with any collapse before it."""
        last = self.lines[-1] if self.lines else {}
        reasons = (last.get('health_reason', ''), health.before(self.lines))
        return last.get('health', 'no verdict'), '; '.join(filter(None, reasons))

    @property
    def seconds(self) -> float | None:
        """From the first line to the last, without pauses: gaps over ten times the median one."""
        gaps = sorted(b['time'] - a['time'] for a, b in zip(self.times, self.times[1:]))
        return sum(gap for gap in gaps if gap <= 10 * gaps[len(gaps) // 2]) if gaps else None

    @property
    def seconds_per_step(self) -> float | None:
        """The median over logged intervals."""
        pace = sorted((b['time'] - a['time']) / (b['step'] - a['step'])
                      for a, b in zip(self.times, self.times[1:]) if b['step'] > a['step'])
        return pace[len(pace) // 2] if pace else None


def thinned(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of them, evenly spread, first and last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def read_all(folders: Sequence[Place]) -> list[RunFiles]:
    """Several, by names that tell them apart; see `read`."""
    depth = 1
    deepest = max(len(folder.parts) for folder in folders)
    name = lambda folder: '/'.join(folder.parts[-depth:])
    while depth < deepest and len(set(map(name, folders))) < len(set(folders)):
        depth += 1
    return [dataclasses.replace(read(folder), name=name(folder)) for folder in folders]


def read(folder: Place) -> RunFiles:
    """The run in `folder`, finished or not; `UserError` if there is none, or a file is damaged."""
    if not (folder / 'config.json').is_file():
        raise UserError(f'{folder} holds no run: there is no config.json; give a --workdir')
    pictures: dict[str, list[tuple[int, Place]]] = {}
    for file in sorted((folder / 'pictures').glob('*.png')):
        if found := PICTURE.fullmatch(file.name):
            pictures.setdefault(found[1], []).append((int(found[2]), file))

    load = lambda name: run_files.read(folder, name)
    return RunFiles(folder.name, folder, load('metrics.jsonl'), load('config.json'),
                    load('run.json') or {}, load('times.jsonl'), load('eval.json'), pictures)
