"""Keeps Orbax from logging pages, array by array, about a save that fails: one line of ours does.

Nothing else is held back: no other message, and no exception.
"""

import asyncio
import logging
import sys
from typing import Any

LOOP_GONE = 'Event loop is closed'


def quiet_orbax() -> None:
    """From now on; calling it again changes nothing."""
    for name in ('absl', 'asyncio'):
        logging.getLogger(name).addFilter(_worth_logging)
    if sys.unraisablehook is not _unraisable:
        before = sys.unraisablehook
        _unraisable.before, sys.unraisablehook = before, _unraisable  # type: ignore[attr-defined]


def _worth_logging(record: logging.LogRecord) -> bool:
    text = str(record.msg) + (str(record.exc_info[1]) if record.exc_info else '')
    fault = record.levelno >= logging.ERROR and 'orbax' in record.pathname
    return not fault and 'never retrieved' not in text and LOOP_GONE not in text


def _unraisable(unraisable: Any) -> None:
    """`sys.unraisablehook` without TensorStore's reports to an event loop that Orbax has closed.

    Orbax closes it at the first array that fails. The innermost and only frames are asyncio's,
    as C has called it.
    """
    trace, ours = unraisable.exc_traceback, False
    while trace is not None:
        ours |= trace.tb_frame.f_code.co_filename != asyncio.base_events.__file__
        trace = trace.tb_next
    gone = unraisable.exc_type is RuntimeError and str(unraisable.exc_value) == LOOP_GONE
    if ours or not gone:
        _unraisable.before(unraisable)  # type: ignore[attr-defined]
