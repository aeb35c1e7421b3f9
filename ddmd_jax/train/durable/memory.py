"""What saving leaves behind in memory, so that a run's does not grow with its checkpoints.

Two things did, as measured (docs/resuming.md, "What it costs"):

- TensorStore (0.1.86 and before) never lets go of the keys and values of what it hands to Python
  from JSON. Orbax has it resolve the same folder for each array, and count all bytes written for
  a log. `ask_once` has the one asked once a folder, and the other not at all.
- Orbax starts new threads for each save, which glibc spreads over up to eight heaps a core. Each
  of them keeps what was freed in it. `give_back` returns that to the system.
"""

from __future__ import annotations

import copy
import ctypes
import functools
from typing import Any

from orbax.checkpoint._src.serialization import tensorstore_utils

BUILD, COUNT = '_build_ocdbt_kvstore_tspec', 'get_tensorstore_raw_bytes'


def ask_once() -> None:
    """Keeps Orbax from asking TensorStore for JSON again and again; once is enough.

    Another Orbax that lacks these functions is left as it is: `tests/faults/test_saves.py` tells.
    """
    build = getattr(tensorstore_utils, BUILD, None)
    if build is not None and not hasattr(build, '__wrapped__'):
        setattr(tensorstore_utils, BUILD, _once_a_folder(build))
    if hasattr(tensorstore_utils, COUNT):
        setattr(tensorstore_utils, COUNT, lambda direction=None: 0)  # 0 is: nothing to log


def _once_a_folder(build: Any) -> Any:
    """`build(directory, name, ...)`, whose result but for the name depends on the rest alone."""
    known = functools.lru_cache(maxsize=8)(build)

    @functools.wraps(build)
    def built(directory: str, name: str | None = None, **options: Any) -> dict[str, Any]:
        spec = copy.deepcopy(known(directory, None, **options))
        return spec if name is None else spec | {'path': name}

    return built


def give_back() -> None:
    """Returns to the system what glibc holds and nobody uses; with another libc, nothing."""
    trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)
    if trim is not None:
        trim(0)
