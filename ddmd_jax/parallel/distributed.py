"""Joins the processes of one run: found in the environment, or said by flags.

A TPU pod (also under GKE), Slurm and Open MPI tell JAX all it needs; anywhere else three
flags do. One process alone is left alone.
"""

from __future__ import annotations

import atexit
import contextlib
import glob
import itertools
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from ddmd_jax.util.text import first_line

# What libraries say when a process they work with does not answer any more.
PEER_LOST = ('Gloo', 'gloo', 'Connection closed by peer', 'Connection reset by peer', 'heartbeat',
             'Barrier', 'barrier', 'coordination service', 'CoordinationService')
JOINING = 300  # seconds that a run waits for all of its processes
RESTART = 'start all processes again, they go on from the last checkpoint'


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
    from jax._src import distributed as joined  # where JAX's own multihost code finds its client

    cannot = (f'the processes could not be joined as said by {source} ({{}}); check that all of '
              'them were started with one coordinator')
    # JAX, too, would give up, but by aborting.
    late = threading.Timer(JOINING, lambda: _end(
        'main: ' + cannot.format(f'not all of them came within {JOINING} s'), tell=False))
    late.daemon = True
    late.start()
    try:
        with _relayed(joined):
            jax.distributed.initialize(
                coordinator, num_processes, process_id, initialization_timeout=JOINING + 60,
                heartbeat_timeout_seconds=2 * peer_timeout + 20)
    except Exception as e:  # grpc, sockets and cluster detection have no common ancestor
        raise DistributedError(cannot.format(first_line(e))) from e
    finally:
        late.cancel()
    global _peers
    # Before anybody asks for a device: that waits for the others as well.
    _peers = Peers(joined.global_state.client, joined.global_state.process_id,
                   joined.global_state.num_processes, peer_timeout)
    _peers.start()


class Relay:
    """A door on this host to process 0's coordinator, which stays open when that one dies.

    JAX's client aborts the moment its connection breaks, with pages of stack traces, and nobody
    else gets to say a word. It is given `address` in place of the coordinator's; should the far
    side hang up, `lost` is called, and the client is not told before that returns.
    """

    def __init__(self, coordinator: str, lost: Callable[[], None]):
        host, _, port = coordinator.rpartition(':')
        self._far, self._lost = (host.strip('[]'), int(port)), lost
        self._door = socket.create_server(('127.0.0.1', 0))
        self.address = f'127.0.0.1:{self._door.getsockname()[1]}'
        _in_thread('relay', self._serve)

    def _serve(self) -> None:
        while True:
            near, _ = self._door.accept()
            try:
                far = socket.create_connection(self._far, timeout=10)
            except OSError:
                near.close()  # it is not there yet: the client will come again
                continue
            far.settimeout(None)
            for side in (near, far):
                side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            left = threading.Event()  # whether it was the client that hung up
            _in_thread('relay out', self._out, near, far, left)
            _in_thread('relay in', self._in, near, far, left)

    def _out(self, near: socket.socket, far: socket.socket, left: threading.Event) -> None:
        if _hand_on(near, far):
            left.set()
            _shut(far)

    def _in(self, near: socket.socket, far: socket.socket, left: threading.Event) -> None:
        if _hand_on(far, near) and not left.is_set():
            self._lost()
        for side in (near, far):
            _shut(side)
            side.close()


def _hand_on(source: socket.socket, sink: socket.socket) -> bool:
    """Copies what comes; True when the source has hung up in the end, False when the sink has."""
    while True:
        try:
            data = source.recv(1 << 16)
        except OSError:
            return True
        if not data:
            return True
        try:
            sink.sendall(data)
        except OSError:
            return False


def _shut(side: socket.socket) -> None:
    with contextlib.suppress(OSError):
        side.shutdown(socket.SHUT_RDWR)


def _in_thread(name: str, work: Callable[..., None], *args: Any) -> None:
    threading.Thread(target=work, args=args, name=name, daemon=True).start()


@contextlib.contextmanager
def _relayed(joined: Any) -> Iterator[None]:
    """Inside, clients that JAX makes are given a `Relay`, but for process 0's own.

    Which address and process there are is only known by then where the environment says it.
    """
    make = joined._jax.get_distributed_runtime_client

    def made(address: str, process: int, **options: Any) -> Any:
        if process:
            address = Relay(address, _coordinator_lost).address
            direct = ('no_grpc_proxy', 'no_proxy', 'NO_PROXY')  # gRPC takes the first it finds
            known = next((os.environ[name] for name in direct if name in os.environ), '')
            os.environ[direct[0]] = ','.join(filter(None, [known, '127.0.0.1']))
        return make(address, process, **options)

    joined._jax.get_distributed_runtime_client = made
    try:
        yield
    finally:
        joined._jax.get_distributed_runtime_client = make


def _coordinator_lost() -> None:
    if _peers is not None and not (_peers.left and not _ending.locked()):
        end_now(f'process 0 is gone; {RESTART}', tell=False)


class Peers:
    """Threads that end this process with code 1 and one line when another one is gone.

    Every process writes a count that grows, and a word when it leaves, where JAX's coordinator
    keeps such things; each looks at all the others'. JAX notices by itself, but aborts, or hangs
    in a collective: it is told to wait longer, and only steps in should these threads not get
    to run. What is asked of a coordinator that hangs is never answered, so that one thread
    asks and another has an eye on the clock, the monotonic one.
    """

    FOLDER, DONE, FAILED = 'ddmd_jax/alive/', 'done', 'failed'

    def __init__(self, client: Any, me: int, count: int, timeout: float):
        self._client, self.me, self._timeout = client, me, timeout
        self._beat = min(2.0, timeout / 4)
        self._seen = {i: ('', time.monotonic()) for i in range(count) if i != me}
        self._heard: tuple[dict[int, str], float] = {}, time.monotonic()
        self._over, self._told = threading.Event(), threading.Event()
        self._last = self.DONE

    def start(self) -> None:
        """Begins to watch, until the interpreter exits."""
        _in_thread('peers', self._talk)
        _in_thread('peers watched', self._watch)
        atexit.register(self.leave, self.DONE)  # before JAX's own farewell, which waits for all

    @property
    def left(self) -> bool:
        """Whether this process has said its last word, be it `DONE` or `FAILED`."""
        return self._over.is_set()

    def leave(self, word: str) -> None:
        """Has this process's last word said; from here on nobody is watched.

        After `FAILED`, others are given a moment to find out, or to say that they have likewise.
        A coordinator that hangs is waited for no longer than would make it count as dead.
        """
        self._last = word
        self._over.set()
        self._told.wait(self._timeout)

    def listen(self) -> None:
        """Waits for as long as another thread may need to find out who is gone, and say so."""
        time.sleep(1.25 * self._beat)

    def _say(self, word: str) -> None:
        self._client.key_value_set(f'{self.FOLDER}{self.me}', word, allow_overwrite=True)

    def _words(self) -> dict[int, str]:
        found = self._client.key_value_dir_get(self.FOLDER)
        return {int(key.rpartition('/')[2]): word for key, word in found}

    def _others_stay(self) -> bool:
        words = self._words()
        return any(words.get(i) not in (self.DONE, self.FAILED) for i in self._seen)

    def _talk(self) -> None:
        """In a thread: all that is asked of the coordinator."""
        for beat in itertools.count(1):
            if self._over.wait(self._beat):
                break
            try:
                self._say(str(beat))
                self._heard = self._words(), time.monotonic()
            except Exception as e:  # grpc has no exceptions of its own
                if not self.left:
                    end_now(f'process 0 does not answer ({first_line(e)[:120]}); {RESTART}',
                            tell=False)
        with contextlib.suppress(Exception):
            self._say(self._last)
            end = time.monotonic() + 2 * self._beat
            while self._last == self.FAILED and time.monotonic() < end and self._others_stay():
                time.sleep(0.1)
        self._told.set()

    def _watch(self) -> None:
        while not self._over.wait(self._beat):
            words, since = self._heard
            if time.monotonic() - since > self._timeout:
                end_now(f'process 0 has not answered for {self._timeout:g} s; {RESTART}',
                        tell=False)
            reason = self._missing(words)
            if reason and not self.left:
                end_now(f'{reason}; {RESTART}')

    def _missing(self, words: Mapping[int, str]) -> str:
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
_ending, _said = threading.Lock(), threading.Event()


def _end(line: str, tell: bool) -> None:
    """Ends this process with code 1 and `line`, without the farewells that wait for others.

    Several threads may find out at once: the first has its say. `tell` is False if the others
    cannot be told: then this is not waited for, not even where another thread is trying.
    """
    first = _ending.acquire(blocking=False)
    if first:
        print(line, file=sys.stderr, flush=True)
        _said.set()
        if tell:
            _peers.leave(_peers.FAILED)
    elif tell:
        threading.Event().wait()  # for the other thread to end it all
    _said.wait()
    os._exit(1)


def end_now(reason: str, tell: bool = True) -> None:
    """Ends this process of several with code 1 and one line that names it; see `_end`."""
    # On a line of its own: a progress bar may stand on this one, and is not asked.
    _end(f'\nmain: process {_peers.me}: {reason}', tell)


def fail(reason: str, at_once: bool = False) -> None:
    """One line and exit code 1; in a run of several processes the others are told.

    `at_once` leaves threads that hang where they are, which a proper exit would wait for.
    """
    if _peers is None and not at_once:
        sys.exit(f'main: {reason}')
    sys.stdout.flush()
    _end(f'main: {reason}', tell=_peers is not None)


def end_if_several(error: Exception) -> None:
    """Ends a process that is not alone: with one line if `error` is of another one's making."""
    if _peers is None:
        return
    text = first_line(error)[:200]
    if any(words in str(error) for words in PEER_LOST):
        _peers.listen()
        end_now(f'another process is gone ({text}); {RESTART}')
    traceback.print_exception(error)
    end_now(f'{type(error).__name__}: {text}')

