"""The time before a run's first step: programs compiled in a thread, and seconds counted."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Hashable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any


class Compiling:
    """Named programs, compiled one after another in a thread beside whatever else is to be done.

    `programs` are jitted functions and the shapes of their arguments, by name; their order is the
    same in every process of a run. Handed out are compiled programs: a jitted function would be
    compiled anew when it is called.
    """

    def __init__(self, programs: Mapping[Hashable, tuple[Any, tuple[Any, ...]]]):
        self._programs = programs
        self._futures: dict[Hashable, Future] = {name: Future() for name in programs}
        self._thread = threading.Thread(target=self._compile_all, name='compile')
        self._lock = threading.Lock()
        self.seconds = 0.0  # spent compiling
        self.waited = 0.0  # of which the main thread had nothing else to do
        self.finished: float | None = None  # of the monotonic clock

    def start(self) -> None:
        """Compiling begins; a second call does nothing."""
        with self._lock:
            if self._thread.ident is None:
                self._thread.start()

    def wait(self) -> None:
        """Until all are compiled, or one could not be."""
        self.start()
        self._thread.join()

    def __contains__(self, name: Hashable) -> bool:
        return name in self._futures

    def __getitem__(self, name: Hashable) -> Any:
        """The compiled program, waited for; raises whatever compiling it, or one before, raised."""
        future = self._futures[name]
        if not future.done():
            self.start()
            start = time.monotonic()
            try:
                return future.result()
            finally:
                self.waited += time.monotonic() - start
        return future.result()

    def _compile_all(self) -> None:
        start, error = time.monotonic(), None
        for name, (program, shapes) in self._programs.items():
            # Once the main thread has ended nobody wants the programs that are left.
            if error is None and not threading.main_thread().is_alive():
                error = RuntimeError('the run ended before its programs were compiled')
            compiled = None
            try:
                compiled = program.lower(*shapes).compile() if error is None else None
            except BaseException as e:  # raised where the program is asked for
                error = e
            self.finished = time.monotonic()
            self.seconds = self.finished - start
            if error is None:
                self._futures[name].set_result(compiled)
            else:
                self._futures[name].set_exception(error)


class Startup:
    """Seconds from the making of this object until a run's first step, by what took them."""

    def __init__(self):
        self.compiling = Compiling({})
        self._start = time.monotonic()
        self._seconds: dict[str, float] = {}
        self._ready = self._start

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Counts what is done inside as `name`, the first time only: the rest is the run."""
        start = time.monotonic()
        yield
        if name not in self._seconds:
            self._ready = time.monotonic()
            self._seconds[name] = self._ready - start

    def summary(self) -> str:
        """One line; call it when the first step has been taken."""
        c, took = self.compiling, self._seconds
        parts = [f'{name} {seconds:.1f} s' for name, seconds in took.items()]
        if c.finished:
            parts.append(f'compilation {c.seconds:.1f} s ({c.waited:.1f} s of it waited for)')
        ready = max(self._ready, c.finished or self._ready) - self._start
        return f'ready in {ready:.1f} s: {", ".join(parts)}'
