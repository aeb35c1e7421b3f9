"""SIGTERM and SIGINT: a run that is asked to stop saves between two steps and ends well.

In a run of several processes SIGTERM is JAX's: its preemption service tells every process, and
all of them agree on the step after which to stop.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

WATCHED = (signal.SIGTERM, signal.SIGINT)
SAVED = '{}: stopped between steps; what was trained is saved, run the same command to go on'


class Stopped(RuntimeError):
    """A signal has ended the run; nothing that it trained is lost."""


class Watch:
    """What is known of signals in this process, of which there can only be one."""

    received = ''  # the first one's name; further ones change nothing
    deferred = False  # whether it is only noted: there is something to save


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
        _watch.received = ''  # whoever trains next in this process is not meant


def _handle(number: int, frame: object) -> None:
    if _watch.received:
        return  # it is being seen to
    _watch.received = signal.Signals(number).name
    if not _watch.deferred:
        raise Stopped(SAVED.format(_watch.received))


def _forward(number: int, frame: object) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Inside, a signal waits until `asked_to_stop` is asked; if nobody did, it raises at the end.

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
