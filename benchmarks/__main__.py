"""Seconds of the parts of a distillation, on whatever devices there are.

    python -m benchmarks [NAME ...] --config=emoji [--config.x=y] [--beside=x=y] [--json]

NAME is one of `PARTS`; without, all of them (`first_step` on a CPU alone). A part runs once unseen,
then again and again for `--seconds`. `--beside` sets a field of a second distillation: its parts
and the first one's then run in turns, so that a machine that slows down slows both, and the ratio
is given with its interval. The programs are those that `main` runs, on the config's own prompts and
weights; for a published teacher without weights there is `benchmarks.accelerator.first_light`.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags

from ddmd_jax import config as config_lib
from ddmd_jax.util import commands, places
from ddmd_jax.util.errors import UserError
from ddmd_jax.util.text import first_line

FLAGS = flags.FLAGS
Go = Callable[[], Any]  # one run of a part, to its end


def define_flags() -> None:
    config_lib.define_flag()
    flags.DEFINE_multi_string('beside', [], 'field=value of a second distillation, to be compared.')
    flags.DEFINE_float('seconds', 10, 'For each part.', 0)
    flags.DEFINE_boolean('json', False, 'Print JSON rather than a table.')


class Subject:
    """A config's distillation, made ready as `main` makes it; parts change its `state`."""

    def __init__(self, config: Any):
        import jax

        from ddmd_jax.train import distillation, train

        self.config = config
        self.task = train.prepare(config)
        self.feed = self.task.feed(frozenset())
        self.batch = next(self.feed)
        self.planned = distillation.plan(
            config, self.task.teacher, self.task.prompts.null, self.task.spec.mesh)
        self.state = jax.block_until_ready(self.task.spec.create())

    def lower(self, kind: str, batch: Any) -> Any:
        """A program of `update.Program`, traced."""
        return getattr(self.planned.program, kind).lower(self.task.frozen, self.state, batch)

    def batch_of(self, kind: str) -> Any:
        """A batch as that program takes it."""
        if self.config.critic.get('order') != 'one_rollout' or kind == 'rollout':
            return self.batch
        z, samples = self.planned.program.rollout(self.task.frozen, self.state, self.batch)
        given = {'z': z} if kind == 'generator' else {'x': samples[0]}
        return dataclasses.replace(self.batch, **given)

    def latents(self) -> Callable[[], Any]:
        """Draws the pictures that a run logs."""
        params = self.task.network(self.state.ema)
        return lambda: self.task.watch.draw(params)


# --- The parts: each makes a `Go` of a subject ---


def update(kind: str) -> Callable[[Subject, Path], Go]:
    """One run of one program of a step."""
    def made(subject: Subject, scratch: Path) -> Go:
        batch = subject.batch_of(kind)
        program = subject.lower(kind, batch).compile()

        def go() -> None:
            import jax

            result = jax.block_until_ready(program(subject.task.frozen, subject.state, batch))
            if kind != 'rollout':
                subject.state = result[0]

        return go

    return made


def step(subject: Subject, scratch: Path) -> Go:
    """A whole step of the loop: all updates of critic and student, on batches as they come."""
    subject.task.startup.compiling.wait()  # for batches of every shape

    def go() -> None:
        import jax

        subject.state, _ = jax.block_until_ready(
            subject.task.step(subject.state, lambda: next(subject.feed), False))

    return go


def compiling(subject: Subject, scratch: Path) -> Go:
    """The generator's update, traced and compiled anew, whatever cache of programs there is."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    from ddmd_jax.train import distillation

    batch = subject.batch_of('generator')

    def go() -> None:
        again = distillation.plan(subject.config, subject.task.teacher, subject.task.prompts.null,
                                  subject.task.spec.mesh)
        jax.config.update('jax_enable_compilation_cache', False)
        compilation_cache.reset_cache()  # it has looked at that switch once, for good
        try:
            again.program.generator.lower(subject.task.frozen, subject.state, batch).compile()
        finally:
            jax.config.update('jax_enable_compilation_cache', True)
            compilation_cache.reset_cache()

    return go


def sample(subject: Subject, scratch: Path) -> Go:
    """The latents of the pictures that are logged."""
    import jax

    draw = subject.latents()
    return lambda: jax.block_until_ready(draw())


def decode(subject: Subject, scratch: Path) -> Go:
    """Their pixels."""
    import numpy as np

    found, latents = subject.task.teacher.latents.decode, subject.latents()()
    if found is None:
        raise UserError(f'decode: {subject.config.teacher.name} has no autoencoder here')
    return lambda: np.asarray(found(latents))


def read(subject: Subject, scratch: Path) -> Go:
    """A batch of prompts, on the devices."""
    import jax

    return lambda: jax.block_until_ready(next(subject.feed))


def checkpoint(subject: Subject, scratch: Path) -> Go:
    """The whole state saved, with its checksums, and restored."""
    import jax

    from ddmd_jax.train.durable import resume, saving

    manifest = resume.manifest_of(subject.config, subject.task.identities)
    count = iter(range(1, 1_000_000))

    def go() -> None:
        path = scratch / str(next(count))
        folder = places.of(str(path), places.LOCAL)
        kept = saving.Checkpoints.of(subject.config, folder, manifest)
        try:
            number = int(subject.state.step)
            kept.save(number, subject.state, subject.feed)
            kept.settle(number, subject.state, subject.feed, [])
            source = resume.choose(subject.config, kept)
            subject.state = jax.block_until_ready(
                resume.start(source, subject.task, kept, subject.feed))
        finally:
            kept.close()
            shutil.rmtree(path)

    return go


def first_step(subject: Subject, scratch: Path) -> Go:
    """`main` from its start to the end of its first step, nothing cached."""
    count = iter(range(1_000_000))

    def go() -> None:
        workdir = scratch / f'first{next(count)}'
        config = scratch / f'{workdir.name}.py'
        fields = subject.config.to_dict()
        fields['log'] |= {'every': 1, 'images_every': 1_000_000, 'probe': 0}
        config.write_text('import ml_collections\n\n\ndef get_config():\n'
                          f'    return ml_collections.ConfigDict({fields!r})\n')
        run = subprocess.Popen(
            [sys.executable, '-m', 'ddmd_jax.main', f'--config={config}', f'--workdir={workdir}',
             '--compile_cache='], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            while not (workdir / 'times.jsonl').exists():
                if run.poll() is not None:
                    raise UserError(f'first_step: main ended: {run.communicate()[1][-500:]}')
                time.sleep(0.05)
        finally:
            run.kill()
            run.communicate()

    return go


PARTS: dict[str, Callable[[Subject, Path], Go]] = {
    'generator': update('generator'), 'critic': update('critic'),
    'rollout': update('rollout'), 'step': step, 'sample': sample, 'decode': decode, 'input': read,
    'checkpoint': checkpoint, 'compile': compiling, 'first_step': first_step}
OF_AN_ORDER = {'rollout': 'one_rollout'}  # the others are of every order


# --- Measuring ---


def timed(goes: list[Go], seconds: float) -> list[list[float]]:
    """Seconds of each run of each, in turns: once unseen, then until `seconds` are over."""
    for go in goes:
        go()
    found: list[list[float]] = [[] for _ in goes]
    end = time.monotonic() + seconds
    while time.monotonic() < end or not found[-1]:
        for go, times in zip(goes, found, strict=True):
            begun = time.monotonic()
            go()
            times.append(time.monotonic() - begun)
    return found


def figures(name: str, found: list[list[float]]) -> dict[str, Any]:
    """Medians, and of two sides the ratio of the first to the second, turn by turn.

    Its interval is Student's t of its logarithm; a single turn has none.
    """
    from ddmd_jax.study.statistics import interval

    line: dict[str, Any] = {'name': name, 'seconds': statistics.median(found[0]),
                            'runs': len(found[0])}
    if len(found) > 1:
        ratio = interval([math.log(a / b) for a, b in zip(*found, strict=True)])
        line |= {'beside': statistics.median(found[1]), 'ratio': math.exp(ratio.mean)}
        if ratio.count > 1:
            line['ratio_interval'] = [math.exp(ratio.low), math.exp(ratio.high)]
    return line


def second(config: Any, given: list[str]) -> Any:
    """`config` with fields of `--beside`; raises `UserError`."""
    other = copy.deepcopy(config)
    with other.unlocked():
        for text in given:
            field, equals, value = text.partition('=')
            if not equals:
                raise UserError(f'--beside {text!r} is not field=value')
            try:
                found = json.loads(value)
            except ValueError:
                found = value
            try:
                other.update_from_flattened_dict({field: found})
            except (AttributeError, KeyError, TypeError, ValueError) as e:
                raise UserError(f'--beside {text!r} cannot be set in this config '
                                f'({first_line(e)})') from e
    return other


def main(arguments: list[str]) -> None:
    names = arguments
    if unknown := [name for name in names if name not in PARTS]:
        raise UserError(f'no part {unknown[0]!r}; known: {", ".join(PARTS)}')
    commands.need(config='try --config=emoji')
    configs = [FLAGS.config] + ([second(FLAGS.config, FLAGS.beside)] if FLAGS.beside else [])
    try:
        for config in configs:
            config_lib.check(config)
    except config_lib.ConfigError as e:
        raise UserError(str(e)) from e
    if FLAGS.config.task != 'distill':
        raise UserError(f'--config trains a {FLAGS.config.task}; what is measured are parts of a '
                        'distillation, such as --config=emoji')
    orders = {c.critic.get('order', 'critic_first') for c in configs}
    from ddmd_jax.parallel import sharding

    # `first_step` starts a process of its own, to which no accelerator would be left.
    alone = sharding.all_devices()[0].platform == 'cpu'
    names = names or [x for x in PARTS if x not in OF_AN_ORDER or orders == {OF_AN_ORDER[x]}
                      if x != 'first_step' or alone]
    for name in names:
        if (order := OF_AN_ORDER.get(name)) and orders != {order}:
            raise UserError(f'{name} is a program of --config.critic.order={order}')
    from benchmarks.accelerator import record
    from ddmd_jax.train.durable import checkpoint as ckpt

    subjects = [Subject(config) for config in configs]
    lines = []
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch) / str(i) for i, _ in enumerate(subjects)]
        for folder in folders:
            folder.mkdir()
        for name in names:
            sides = [PARTS[name](s, folder) for s, folder in zip(subjects, folders, strict=True)]
            lines.append(figures(name, timed(sides, FLAGS.seconds)))
            if not FLAGS.json:
                print(line_of(lines[-1]), flush=True)
    if FLAGS.json:
        versions = {name.removeprefix(ckpt.VERSION): x for name, x in ckpt.versions().items()}
        print(json.dumps({
            'device': record.device(), 'load': os.getloadavg()[0],
            'environment': record.environment(),
            'versions': versions | {'python': platform.python_version()},
            'command': shlex.join(['python', '-m', 'benchmarks', *sys.argv[1:]]),
            'parts': lines}, indent=1))


def line_of(line: dict[str, Any]) -> str:
    """Of the table."""
    text = f'{line["name"]:<11}{line["seconds"]:9.4f} s'
    if 'ratio' in line:
        text += f'   beside {line["beside"]:.4f} s, ratio {line["ratio"]:.3f}'
    if 'ratio_interval' in line:
        low, high = line['ratio_interval']
        text += f' ({low:.3f} to {high:.3f})'
    return f'{text}   {line["runs"]} runs'


if __name__ == '__main__':
    commands.run('benchmarks', main, define_flags, config_lib.parser('benchmarks'))
