"""Runs a study's experiments in processes of their own, as many at a time as there are cores for.

A run is done when its result is there, ``results/NAME-seedN.json``; what was begun goes on from
its own checkpoint, and a run that ends in an error has a result that says so.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ddmd_jax.study import results
from ddmd_jax.study.suites import Experiment
from ddmd_jax.util.files import write_json

DIVERGED = 'NaN or Inf'  # in what `main` says of such a run
ENDS = ('eval.json', 'samples.png')  # what a run writes last, by its teacher


@dataclasses.dataclass(frozen=True)
class Trial:
    """One experiment with one seed, in a study's folder; `looked_at`: see `suites.Suite`."""

    experiment: Experiment
    seed: int
    folder: Path
    fields: Mapping[str, Any]
    looked_at: bool = True

    @property
    def name(self) -> str:
        return f'{self.experiment.name}-seed{self.seed}'

    @property
    def workdir(self) -> Path:
        return self.folder / 'runs' / self.name

    @property
    def result(self) -> Path:
        return self.folder / 'results' / f'{self.name}.json'

    @property
    def done(self) -> bool:
        """Whether there is a result, of a run with these very fields.

        A run that diverged is a result; one that could not go on for another reason is tried again.
        """
        if not self.result.is_file():
            return False
        found = results.read_one(self.result)
        return found['fields'] == plain(self.fields) and DIVERGED in found.get('failed', DIVERGED)


def plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    """`fields` as JSON gives them back."""
    return json.loads(json.dumps(dict(fields)))


def train_command(trial: Trial, config: str, cache: Path) -> list[str]:
    """The command that trains and evaluates `trial` with the config in the file `config`."""
    return [sys.executable, '-m', 'ddmd_jax.main', f'--config={config}',
            f'--workdir={trial.workdir}', f'--compile_cache={cache}',
            *(f'--config.{name}={value}' for name, value in trial.fields.items())]


def examine_command(trial: Trial) -> list[str]:
    """The command that reads the finished run and writes its result."""
    return [sys.executable, '-m', 'ddmd_jax.study.examine', str(trial.workdir), str(trial.result),
            json.dumps(plain(trial.fields)), *([] if trial.looked_at else ['curves'])]


def failed(trial: Trial, text: str) -> None:
    """Writes the result of a run that ended in an error: its curves, and the last line it said."""
    lines = [x.strip() for x in text.replace('\r', '\n').splitlines() if x.strip()]
    results.write(trial.result, {
        'fields': plain(trial.fields), 'curves': results.curves(trial.workdir),
        'failed': lines[-1] if lines else 'no output'})


class Stopped(RuntimeError):
    """A run was ended from outside; nothing is lost."""


class _Going:
    """A run under way: the command that is running, and those that follow it."""

    def __init__(self, trial: Trial, commands: Sequence[list[str]]):
        self.trial, self._left, self.since = trial, list(commands), time.monotonic()
        of = trial.workdir / 'trial.json'
        if of.is_file() and results.read_one(of)['fields'] != plain(trial.fields):
            shutil.rmtree(trial.workdir)  # another run's, which this one could not go on from
        trial.workdir.mkdir(parents=True, exist_ok=True)
        write_json(of, {'fields': plain(trial.fields)})
        self._next()

    def _next(self) -> None:
        with (self.trial.workdir / 'output.txt').open('w', encoding='utf-8') as out:
            self.process = subprocess.Popen(self._left.pop(0), stdout=out,
                                            stderr=subprocess.STDOUT, env=os.environ)

    def code(self) -> int | None:
        """The exit code, once a command has failed or the last one is through.

        Raises:
          Stopped: the run was stopped by a signal, which is no failure and no end.
        """
        code = self.process.poll()
        if code == 0 and self._left:
            if not any((self.trial.workdir / name).is_file() for name in ENDS):
                raise Stopped(f'{self.trial.name} was stopped; run the same command to go on')
            self._next()
            return None
        return code

    def output(self) -> str:
        return (self.trial.workdir / 'output.txt').read_text('utf-8', 'replace')


def perform(trials: Sequence[Trial], config: str, processes: int, say: Callable[[str], None],
            keep: bool = False) -> None:
    """Runs what is not done, `processes` at a time; `say` gets a line for each that is through.

    Workdirs of runs that are done are deleted unless `keep`.

    Raises:
      Stopped: a run was stopped by a signal.
    """
    waiting = [trial for trial in trials if not trial.done]
    going: list[Any] = []
    for folder in {trial.folder for trial in trials}:
        (folder / 'results').mkdir(parents=True, exist_ok=True)
    say(f'{len(waiting)} of {len(trials)} runs to do')
    try:
        while waiting or going:
            while waiting and len(going) < processes:
                trial = waiting.pop(0)
                going.append(_Going(trial, [
                    train_command(trial, config, trial.folder / 'compile_cache'),
                    examine_command(trial)]))
            time.sleep(0.5)
            ended = [(one, code) for one in going if (code := one.code()) is not None]
            for one, code in ended:
                going.remove(one)
                _finish(one, code, keep)
                say(f'{one.trial.name}: {f"ended with code {code}" if code else "done"} after '
                    f'{time.monotonic() - one.since:.0f} s; {len(waiting) + len(going)} to go')
    finally:
        for one in going:
            one.process.terminate()  # it saves, and the same command goes on from there
        for one in going:
            one.process.wait()


def _finish(one: _Going, code: int, keep: bool) -> None:
    if code:
        failed(one.trial, one.output())
    if not keep and one.trial.done:  # what ended for the machine's sake goes on from there
        shutil.rmtree(one.trial.workdir)
