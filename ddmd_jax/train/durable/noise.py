"""What libraries say of a save that fails, pages for each array, where one line of ours says it.

Nothing else is held back: neither other words of theirs nor an exception of ours.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

LOOP_GONE = 'Event loop is closed'


def hush() -> None:
    """Drops it from now on; to be called as often as one likes."""
    for name in ('absl', 'asyncio'):
        logging.getLogger(name).addFilter(_worth_saying)  # again and again adds it once
    if not isinstance(sys.unraisablehook, _Hook):
        sys.unraisablehook = _Hook(sys.unraisablehook)


def _worth_saying(record: logging.LogRecord) -> bool:
    text = str(record.msg) + (str(record.exc_info[1]) if record.exc_info else '')
    fault = record.levelno >= logging.ERROR and 'orbax' in record.pathname
    return not fault and 'never retrieved' not in text and LOOP_GONE not in text


class _Hook:
    """`sys.unraisablehook` without what TensorStore has to tell a save that nobody waits for.

    At the first array that fails Orbax closes the event loop which the others are to report to.
    """

    def __init__(self, before: Callable[[Any], object]):
        self._before = before

    def __call__(self, what: Any) -> None:
        theirs = what.exc_type is RuntimeError and str(what.exc_value) == LOOP_GONE
        if not (theirs and _in_loop(what.exc_traceback)):
            self._before(what)


def _in_loop(trace: TracebackType | None) -> bool:
    """Whether all frames are asyncio's: C has called it, and nothing of ours."""
    while trace is not None:
        if trace.tb_frame.f_code.co_filename != asyncio.base_events.__file__:
            return False
        trace = trace.tb_next
    return True
