"""Joins the processes of one run: found in the environment, or said by flags.

A TPU pod (also under GKE), Slurm and Open MPI tell JAX all it needs; anywhere else three
flags do. One process alone is left alone.
"""

from __future__ import annotations

import atexit
import contextlib
import glob
import os
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from typing import Any

import jax

# What libraries say when a process they work with does not answer any more.
PEER_LOST = ('Gloo', 'gloo', 'Connection closed by peer', 'Connection reset by peer', 'heartbeat',
             'Barrier', 'barrier', 'coordination service', 'CoordinationService')


class DistributedError(RuntimeError):
    """The processes of a run cannot find one another."""


def found_in(environ: Mapping[str, str]) -> str | None:
    """What says that this is one process of several, or None; looks only, starts nothing."""
    several = lambda name: environ.get(name, '1').isdigit() and int(environ.get(name, '1')) > 1
    if environ.get('JAX_COORDINATOR_ADDRESS'):
        return 'JAX_COORDINATOR_ADDRESS'
    if several('SLURM_NTASKS') and 'SLURM_PROCID' in environ:
        return 'Slurm'
    if several('OMPI_COMM_WORLD_SIZE'):
        return 'Open MPI'
    # An interactive machine of a pod is a TPU host like any other: JAX asks its metadata.
    wanted = environ.get('JAX_PLATFORMS', '')
    chips = glob.glob('/dev/accel*') or glob.glob('/dev/vfio/[0-9]*')
    if chips and (wanted == '' or 'tpu' in wanted):
        return 'TPU'
    return None


def start(coordinator: str | None, num_processes: int | None, process_id: int | None,
          environ: Mapping[str, str], peer_timeout: int = 100) -> None:
    """Initialises `jax.distributed` if this process is one of several; before any other JAX call.

    Args:
      coordinator: ``host:port`` of process 0, or None to look in the environment.
      num_processes, process_id: how many there are and which this is; go with `coordinator`.
      environ: `os.environ`.
      peer_timeout: seconds after which a process that is not heard of counts as dead.

    Raises:
      DistributedError: flags that do not go together, or nobody answers.
    """
    given = {'--coordinator': coordinator, '--num_processes': num_processes,
             '--process_id': process_id}
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise DistributedError(f'{", ".join(missing)} not given; the three of '
                               f'{", ".join(given)} go together')
    if not missing and not 0 <= process_id < num_processes:
        raise DistributedError(f'--process_id {process_id} must lie in 0..{num_processes - 1}')
    source = 'the flags' if not missing else found_in(environ)
    if source is None:
        return
    if environ.get('JAX_PLATFORMS') == 'cpu':
        jax.config.update('jax_cpu_collectives_implementation', 'gloo')
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id,
                                   heartbeat_timeout_seconds=2 * peer_timeout + 20)
    except Exception as e:  # grpc, sockets and cluster detection have no common ancestor
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise DistributedError(f'the processes could not be joined as {source} says ({reason}); '
                               'check that all of them were started with one coordinator') from e
    from jax._src import distributed as joined  # where JAX's own multihost code finds its client

    global _peers
    _peers = Peers(joined.global_state.client, jax.process_index(), jax.process_count(),
                   peer_timeout)
    _peers.start()


class Peers:
    """A thread that ends this process with code 1 and one line when another one is gone.

    Every process writes a count that grows, and a word when it leaves, where JAX's coordinator
    keeps such things; each looks at all the others'. JAX notices by itself, but aborts with pages
    of stack traces, or hangs in a collective: it is told to wait longer, and only steps in
    should this thread not get to run.
    """

    FOLDER, DONE, FAILED = 'ddmd_jax/alive/', 'done', 'failed'

    def __init__(self, client: Any, me: int, count: int, timeout: float):
        self._client, self._me, self._timeout = client, me, timeout
        self._beat = min(2.0, timeout / 4)
        self._seen = {i: ('', time.monotonic()) for i in range(count) if i != me}
        self._over = threading.Event()

    def start(self) -> None:
        """Begins to watch, until the interpreter exits."""
        threading.Thread(target=self._watch, name='peers', daemon=True).start()
        atexit.register(self.leave, self.DONE)  # before JAX's own farewell, which waits for all

    def leave(self, word: str) -> None:
        """This process's last word; from here on nobody is watched."""
        self._over.set()
        with contextlib.suppress(Exception):
            self._say(word)

    def fail(self) -> None:
        """Says that this process has failed, and waits a moment for others that have likewise."""
        self.leave(self.FAILED)
        with contextlib.suppress(Exception):
            end = time.monotonic() + 2 * self._beat
            while time.monotonic() < end and not all(
                    word in (self.DONE, self.FAILED) for word in self._words().values()):
                time.sleep(0.1)

    def _say(self, word: str) -> None:
        self._client.key_value_set(f'{self.FOLDER}{self._me}', word, allow_overwrite=True)

    def _words(self) -> dict[int, str]:
        found = self._client.key_value_dir_get(self.FOLDER)
        return {int(key.rpartition('/')[2]): word for key, word in found}

    def _watch(self) -> None:
        beat = 0
        while not self._over.wait(self._beat):
            beat += 1
            try:
                self._say(str(beat))
                reason = self._missing(self._words())
            except Exception as e:  # grpc has no exceptions of its own
                reason = f'process 0 does not answer ({(str(e).splitlines() or [""])[0][:120]})'
            if reason and not self._over.is_set():
                self.leave(self.FAILED)
                end_now(f'{reason}; start all processes again, they go on from the last '
                        'checkpoint')

    def _missing(self, words: dict[int, str]) -> str:
        """Which process is not there any more, or ''."""
        now = time.monotonic()
        for i, (before, since) in self._seen.items():
            word = words.get(i, '')
            if word == self.FAILED:
                return f'process {i} has failed (its own output says why)'
            if word != before:
                self._seen[i] = word, now
            elif word != self.DONE and now - since > self._timeout:
                return f'process {i} has not been heard of for {self._timeout:g} s'
        return ''


_peers: Peers | None = None


def end_now(reason: str) -> None:
    """Ends this process with code 1 and one line, without the farewells that wait for others."""
    # On a line of its own: a progress bar may stand on this one, and is not asked.
    print(f'\nmain: process {jax.process_index()}: {reason}', file=sys.stderr, flush=True)
    os._exit(1)


def fail(reason: str) -> None:
    """One line and exit code 1; in a run of several processes the others are told."""
    if _peers is None:
        sys.exit(f'main: {reason}')
    print(f'main: {reason}', file=sys.stderr, flush=True)
    _peers.fail()
    os._exit(1)


def end_if_several(error: Exception) -> None:
    """Ends a process that is not alone: with one line if `error` is of another one's making."""
    if _peers is None:
        return
    text = (str(error).splitlines() or [''])[0]
    lost = any(words in str(error) for words in PEER_LOST)
    if not lost:
        traceback.print_exception(error)
    _peers.fail()
    end_now(f'another process is gone ({text[:200]}); start all processes again, they go on from '
            'the last checkpoint' if lost else f'{type(error).__name__}: {text[:200]}')
