"""Reads the files of a run's folder for the report; nothing is computed anew."""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddmd_jax.method import health as diagnostics

PICTURE = re.compile(r'(.+)-(\d+)\.png')


class ReportError(RuntimeError):
    """There is nothing to report of."""


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """A run's folder.

    Attributes:
      lines: of ``metrics.jsonl``, oldest first.
      about: ``run.json``: command, versions, devices, fields that differ from the config's file.
      times: ``times.jsonl``: when each line was written, seconds since 1970.
      pictures: files by name and step, in order of steps.
    """

    name: str
    folder: Path
    lines: list[dict[str, Any]]
    config: dict[str, Any]
    about: dict[str, Any]
    times: list[dict[str, Any]]
    evaluation: dict[str, Any] | None
    pictures: dict[str, list[tuple[int, Path]]]

    @property
    def step(self) -> int:
        """The last that was logged; 0 before the first."""
        return self.lines[-1]['step'] if self.lines else 0

    @property
    def total(self) -> int:
        return self.config.get('train', {}).get('steps', self.step)

    @property
    def health(self) -> tuple[str, str]:
        """The last verdict and its reason, with any collapse before it."""
        last = self.lines[-1] if self.lines else {}
        reasons = (last.get('health_reason', ''), diagnostics.before(self.lines))
        return last.get('health', 'no verdict'), '; '.join(filter(None, reasons))

    @property
    def seconds(self) -> float | None:
        """From the first line to the last, without what lay between two goes of the run.

        A pause is a gap more than ten times as long as the median one.
        """
        at = [entry['time'] for entry in self.times]
        gaps = sorted(b - a for a, b in zip(at, at[1:]))
        if not gaps:
            return None
        longest = 10 * gaps[len(gaps) // 2]
        return sum(gap for gap in gaps if gap <= longest)

    @property
    def seconds_per_step(self) -> float | None:
        """The median over logged intervals."""
        pace = sorted((b['time'] - a['time']) / (b['step'] - a['step'])
                      for a, b in zip(self.times, self.times[1:]) if b['step'] > a['step'])
        return pace[len(pace) // 2] if pace else None


def read_all(folders: Sequence[Path]) -> list[RunFiles]:
    """Several, by names that tell them apart; see `read`."""
    depth = 1
    deepest = max(len(folder.parts) for folder in folders)
    name = lambda folder: '/'.join(folder.parts[-depth:])
    while depth < deepest and len(set(map(name, folders))) < len(set(folders)):
        depth += 1
    return [dataclasses.replace(read(folder), name=name(folder)) for folder in folders]


def read(folder: Path) -> RunFiles:
    """The run in `folder`, finished or not.

    Raises:
      ReportError: it holds no run, or one of its files is damaged.
    """
    if not (folder / 'config.json').is_file():
        raise ReportError(f'{folder} holds no run: there is no config.json; give a --workdir')
    pictures: dict[str, list[tuple[int, Path]]] = {}
    for file in sorted((folder / 'pictures').glob('*.png')):
        if found := PICTURE.fullmatch(file.name):
            pictures.setdefault(found[1], []).append((int(found[2]), file))
    load = lambda name: _json(folder / name)
    return RunFiles(folder.name, folder, _lines(folder / 'metrics.jsonl'), load('config.json'),
               load('run.json') or {}, _lines(folder / 'times.jsonl'), load('eval.json'),
                    pictures)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text()) if path.is_file() else None
    except ValueError as e:
        raise ReportError(f'{path} is damaged ({e}); delete it') from e


def _lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines only: a run that goes on may be writing one."""
    if not path.is_file():
        return []
    try:
        return [json.loads(line) for line in path.read_text().splitlines(True)
                if line.endswith('\n')]
    except ValueError as e:
        raise ReportError(f'{path} is damaged ({e}); start the run again, which mends it') from e
