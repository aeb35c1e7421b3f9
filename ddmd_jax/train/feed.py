"""Batches on the device before they are asked for."""

import collections
import time
from collections.abc import Callable
from typing import Any

import grain


class Feed:
    """An iterator over ``place(batch)``, one batch ahead of whoever takes them.

    `place` starts what brings a batch to the devices, by way of a text encoder if there is one,
    and does not wait for it: devices work on it behind the step that is running. Its state is
    that of `data` after the last batch handed out: what is ready but not taken does not count.

    Batches whose number is in `skip` are read and dropped.

    Attributes:
      skip: may be set anew before `set_state`.
      waited: seconds that `data` was not ready when a batch was wanted; the first batch, which
        nothing can precede, is left out.
    """

    def __init__(self, data: grain.DatasetIterator, place: Callable[[Any], Any],
                 skip: frozenset[int] = frozenset()):
        self._data, self._place, self.skip = data, place, skip
        self._ready: collections.deque[tuple[Any, Any]] = collections.deque()
        self._state = data.get_state()
        self._first = True
        self.waited = 0.0

    def __next__(self) -> Any:
        if not self._ready:
            self._fill()
        batch, self._state = self._ready.popleft()
        self._fill()
        return batch

    def _fill(self) -> None:
        start = time.monotonic()
        while self.skip and self._data.get_state()['next_index'] in self.skip:
            next(self._data)
        batch = next(self._data)
        if not self._first:
            self.waited += time.monotonic() - start
        self._first = False
        self._ready.append((self._place(batch), self._data.get_state()))

    def start_prefetch(self) -> None:
        self._data.start_prefetch()

    def get_state(self) -> Any:
        return self._state

    def set_state(self, state: Any) -> None:
        self._ready.clear()
        self._data.set_state(state)
        self._state = state
