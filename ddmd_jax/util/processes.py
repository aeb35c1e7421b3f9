"""Whether a process that left its name somewhere still runs."""

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def machine() -> str:
    """Names the kernel that runs, and whose processes this one sees: hosts may share a name."""
    try:
        boot = Path('/proc/sys/kernel/random/boot_id').read_text('utf-8').strip()
        return f'{boot} {os.readlink("/proc/self/ns/pid")}'
    except OSError:
        return secrets.token_hex(8)  # another each time: nobody is known to be dead


def name() -> dict[str, Any]:
    """What `running` asks for."""
    return {'machine': machine(), 'process': os.getpid()}


def running(found: Mapping[str, Any]) -> bool | None:
    """Whether the process of that `name` runs; None of another machine, where it is not known."""
    if found.get('machine') != machine() or not isinstance(found.get('process'), int):
        return None
    try:
        os.kill(found['process'], 0)
    except (ProcessLookupError, OverflowError):  # no system counts so far
        return False
    except OSError:
        pass  # it is another user's
    return True
