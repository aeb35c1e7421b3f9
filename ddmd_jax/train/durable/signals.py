"""SIGTERM and SIGINT: the run finishes its step, saves, and ends with code 0.

In a run of several processes JAX's preemption service handles SIGTERM: all processes agree on the
step after which to stop.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

WATCHED = (signal.SIGTERM, signal.SIGINT)
SAVED = '{}: stopped; every step that was taken is saved; run the same command to go on'


class Stopped(BaseException):
    """A signal has ended the run; no training is lost.

    Like `KeyboardInterrupt` it is no error: who catches those of a library at work, and would take
    a checkpoint that is being read for a damaged one, does not catch this.
    """


class Watch:
    """The signals of this process; there is one such object."""

    received = ''  # name of the first; further ones change nothing
    deferred = False  # whether a signal is only noted, because there is something to save


_watch = Watch()


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Inside, a signal raises `Stopped` in the main thread, or is noted while `deferred`.

    Does nothing in another thread: Python gives signals to the main one only.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    joined = jax.distributed.is_initialized()
    before = {s: signal.signal(s, _forward if joined else _handle)
              # JAX's own handler of SIGTERM is not Python's to hand back: it is left where it is.
              for s in (WATCHED[1:] if joined else WATCHED)}
    _watch.received = ''
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _watch.received = ''  # it does not concern the next run in this process


def _handle(number: int, frame: object) -> None:
    if _watch.received:
        return
    _watch.received = signal.Signals(number).name
    if not _watch.deferred:
        raise Stopped(SAVED.format(_watch.received))


def _forward(number: int, frame: object) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Inside, a signal waits for a call of `asked_to_stop`; without one it raises at the end.

    Raises:
      Stopped: a signal came after that.
    """
    _watch.deferred = True
    try:
        yield
    finally:
        _watch.deferred = False
    if _watch.received:
        raise Stopped(SAVED.format(_watch.received))


def asked_to_stop(step: int) -> str:
    """The signal after which to stop at `step`, the same in every process, or ''.

    To be called once after each step: JAX lets processes that are a step apart meet.
    """
    if jax.distributed.is_initialized():
        return 'SIGTERM' if multihost_utils.reached_preemption_sync_point(step) else ''
    return _watch.received
