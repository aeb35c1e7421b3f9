"""A profile of a few steps."""

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from ddmd_jax.util import buckets, places
from ddmd_jax.util.places import Place
from ddmd_jax.util.text import first_line


class Window:
    """Profiles the steps from the first to the last of `steps` into `folder`; None: nothing. What
    TensorBoard's profiler and xprof open.

    Every process writes its own part. A run that goes on within the window profiles what is left.
    """

    def __init__(self, steps: tuple[int, int] | None, folder: Place, say: Callable[[str], None]):
        self._steps, self._folder, self._say = steps, folder, say
        self._made, self._scratch = str(folder), contextlib.ExitStack()
        self._on = False

    def before(self, step: int) -> None:
        """Called before every step; begins where it is due."""
        if self._steps and not self._on and self._steps[0] <= step <= self._steps[1]:
            if places.is_url(self._folder):  # XLA writes it, on this machine's disk
                self._made = self._scratch.enter_context(tempfile.TemporaryDirectory())
            self._on = self._try(lambda: jax.profiler.start_trace(self._made))

    def after(self, step: int, state: Any) -> None:
        """Called after every step, with what it has made."""
        if self._on and step >= self._steps[1]:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Ends it, wherever it is."""
        if self._on:
            self._on, written = False, self._try(self._stop)
            self._steps = None
            if written:
                self._say(f'profile in {self._folder}: tensorboard --logdir={self._folder.parent}')

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        if places.is_url(self._folder):
            buckets.put(Path(self._made), self._folder)
            self._scratch.close()

    def _try(self, act: Callable[[], None]) -> bool:
        """Whether `act` went well; if not, it is logged, and there is no profile."""
        try:
            act()
        except Exception as e:  # of the profiler, or a disk
            self._steps = None
            self._say(f'warning: no profile in {self._folder} ({first_line(e)})')
            return False
        return True
