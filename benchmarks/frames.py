"""``python benchmarks/frames.py``: our own frames between `main` and the critic's forward pass.

Traces the critic's objective of the demo's config and stops where it asks for the critic's network.
Printed are the frames of the package on the way: those of the main thread at the moment the
programs' thread was started, then those of that thread. JAX's own are left out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import tempfile
import traceback
from pathlib import Path

import jax

from ddmd_jax import config, families
from ddmd_jax.method import algorithm
from ddmd_jax.train import startup, train, update

PACKAGE = Path(algorithm.__file__).parents[1]


class Reached(BaseException):
    """The critic's forward pass."""


def own(stack: traceback.StackSummary) -> list[str]:
    """A line for each frame of the package, outermost first."""
    return [f'{Path(frame.filename).relative_to(PACKAGE)}:{frame.lineno} {frame.name}'
            for frame in stack if PACKAGE in Path(frame.filename).parents]


def frames() -> tuple[list[str], list[str]]:
    """(frames of the main thread, of the thread that compiles)."""
    found: list[list[str]] = []
    c = config.load('emoji')
    config.check(c)
    objective, start = algorithm.critic_objective, startup.Compiling.start

    def watched(critic, student, models, batch, recipe, key):
        def predict(params, *inputs):
            if params is critic:
                found.append(own(traceback.extract_stack()[:-1]))
                raise Reached
            return models.predict(params, *inputs)

        return objective(critic, student, dataclasses.replace(models, predict=predict), batch,
                         recipe, key)

    def started(self):
        if not found:
            found.append(own(traceback.extract_stack()[:-1]))
        start(self)

    update.critic_objective, startup.Compiling.start = watched, started
    # Whatever the run makes of a program that could not be traced.
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(BaseException):
        train.distill(c, Path(folder))
    return found[0], found[1]


if __name__ == '__main__':
    jax.config.update('jax_platforms', 'cpu')
    families.get('emoji')
    main_thread, thread = frames()
    # `main.main` and `main.run` stand before `distill`: they parse flags, which is not done here.
    lines = ['main.py main', 'main.py run', *main_thread, *thread]
    closures = [line for line in lines if '<' in line.rsplit(' ', 1)[1]]
    print('\n'.join(lines))
    print(f'{len(lines)} frames, {len(closures)} of them lambdas or comprehensions')
    sys.exit(len(lines) > 10)
