"""Joins the processes of one run, and ends them all when one of them is lost.

On a TPU pod (also under GKE), Slurm and Open MPI, JAX finds the other processes by itself;
anywhere else three flags name them. A run of one process needs none of this.

A run never hangs and never ends with code 0 when a process is lost: `Peers` ends the others with
one line that names it. If the lost one is process 0, which holds JAX's coordinator, JAX aborts
the others, in its own words.
"""

import atexit
import contextlib
import glob
import importlib.util
import itertools
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from ddmd_jax.util import errors, places
from ddmd_jax.util.errors import UserError
from ddmd_jax.util.places import Place
from ddmd_jax.util.text import first_line

# In the messages of libraries when another process does not answer any more.
PEER_LOST = ('Gloo', 'gloo', 'Connection closed by peer', 'Connection reset by peer', 'heartbeat',
             'Barrier', 'barrier', 'coordination service', 'CoordinationService')
JOINING = 300  # seconds that a run waits for all of its processes
SEEN = 60  # seconds within which a file of another host is there: NFS keeps what it has seen
LONG = 7 * 86400  # seconds that processes wait for the one that measures
RESTART = 'start all processes again, they go on from the last checkpoint'


class DistributedError(UserError):
    """The processes of a run cannot find one another."""


def launcher_in(environ: Mapping[str, str]) -> str | None:
    """Name of the launcher that started this process as one of several; None if none did."""
    several = lambda name: environ.get(name, '1').isdecimal() and int(environ.get(name, '1')) > 1
    if environ.get('JAX_COORDINATOR_ADDRESS'):
        return 'JAX_COORDINATOR_ADDRESS'
    if several('SLURM_NTASKS') and 'SLURM_PROCID' in environ:
        return 'Slurm'
    if several('OMPI_COMM_WORLD_SIZE'):
        return 'Open MPI'
    # An interactive machine of a pod is a TPU host like any other: JAX asks its metadata.
    wanted = environ.get('JAX_PLATFORMS', '')
    # Any device that is passed through has a VFIO group; only TPUs' hosts have libtpu.
    chips = glob.glob('/dev/accel*') or glob.glob('/dev/vfio/[0-9]*')
    driver = environ.get('TPU_LIBRARY_PATH') or importlib.util.find_spec('libtpu')
    if chips and (wanted == '' or 'tpu' in wanted) and driver:
        return 'TPU'
    return None


def start(coordinator: str | None, num_processes: int | None, process_id: int | None,
          environ: Mapping[str, str], peer_timeout: int = 100, command: str = 'main') -> None:
    """Initialises `jax.distributed` if this process is one of several; before any other JAX call.

    Args:
      coordinator: ``host:port`` of process 0, or None to look in the environment.
      num_processes, process_id: how many there are and which this is; go with `coordinator`.
      environ: `os.environ`.
      peer_timeout: seconds after which a process that is not heard of counts as dead.
      command: begins the line in which a process ends.

    Raises:
      DistributedError: flags that do not go together, or nobody answers.
    """
    given = {'--coordinator': coordinator, '--num_processes': num_processes,
             '--process_id': process_id}
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise DistributedError(f'{", ".join(missing)} not given; the three of '
                               f'{", ".join(given)} go together')
    if process_id is not None and num_processes is not None and (
            not 0 <= process_id < num_processes):
        raise DistributedError(f'--process_id {process_id} must lie in 0..{num_processes - 1}')
    source = 'the flags' if not missing else launcher_in(environ)
    if source is None:
        return
    if environ.get('JAX_PLATFORMS') == 'cpu':
        jax.config.update('jax_cpu_collectives_implementation', 'gloo')
    from jax._src import distributed as joined  # the only way to JAX's key-value store

    cannot = (f'the processes could not be joined as said by {source} ({{}}); check that all of '
              'them were started with one coordinator')
    # JAX, too, would give up, but by aborting.
    late = threading.Timer(JOINING, lambda: _exit(
        f'{command}: ' + cannot.format(f'not all of them came within {JOINING} s')))
    late.daemon = True
    late.start()
    try:
        # JAX's own heartbeats come second: they abort, `Peers` names the process in one line.
        jax.distributed.initialize(
            coordinator, num_processes, process_id, initialization_timeout=JOINING + 60,
            heartbeat_timeout_seconds=peer_timeout + max(10, peer_timeout // 4))
    except Exception as e:  # grpc, sockets and cluster detection have no common ancestor
        raise DistributedError(cannot.format(first_line(e))) from e
    finally:
        late.cancel()
    global _peers
    # Before anybody asks for a device: that waits for the others as well.
    _peers = Peers(joined.global_state.client, joined.global_state.process_id,
                   joined.global_state.num_processes, peer_timeout, command)
    _peers.start()


class Peers:
    """A thread that ends this process, with code 1 and one line, when another one is lost.

    Every process keeps writing a growing count to the key-value store of JAX's coordinator, and
    a last word when it leaves; each reads the counts of all the others. JAX notices a lost process
    by itself, but later, and aborts with pages of stack traces.
    """

    FOLDER, DONE, FAILED = 'ddmd_jax/alive/', 'done', 'failed'

    def __init__(self, client: Any, me: int, count: int, timeout: float, command: str = 'main'):
        self._client, self.me, self._timeout, self._asked = client, me, timeout, 0
        self.command = command
        self.beat = min(2.0, timeout / 4)  # seconds between two counts
        self._seen = {i: ('', time.monotonic()) for i in range(count) if i != me}
        self._leaving, self._writing = threading.Event(), threading.Lock()

    def of_first(self, mine: str) -> str:
        """Process 0's text, which every process asks for with its own."""
        self._asked += 1
        key = f'ddmd_jax/shared/{self._asked}'
        if self.me == 0:
            self._client.key_value_set(key, mine, allow_overwrite=True)
            return mine
        return self._client.blocking_key_value_get(key, JOINING * 1000)

    def wait(self, name: str) -> None:
        """Waits for all processes; those that watch end it if one is lost."""
        self._client.wait_at_barrier(f'ddmd_jax/{name}', LONG * 1000)

    def start(self) -> None:
        """Begins to watch, until the interpreter exits."""
        threading.Thread(target=self._watch, name='peers', daemon=True).start()
        atexit.register(self.leave, self.DONE)  # before JAX's own shutdown, which waits for all

    def leave(self, word: str) -> None:
        """Writes this process's last word, `DONE` or `FAILED`; nobody is watched any more.

        Process 0 takes the coordinator with it, and JAX aborts the rest. After `FAILED` it
        gives the others two beats to find the reason, and one more to end.
        """
        self._leaving.set()
        with self._writing, contextlib.suppress(Exception):  # the coordinator may be the lost one
            self._write(word)
            if self.me == 0 and word == self.FAILED:
                end = time.monotonic() + 2 * self.beat
                while time.monotonic() < end and self._others_stay():
                    time.sleep(0.1)
                time.sleep(self.beat)

    def _write(self, word: str) -> None:
        self._client.key_value_set(f'{self.FOLDER}{self.me}', word, allow_overwrite=True)

    def _words(self) -> dict[int, str]:
        entries = self._client.key_value_dir_get(self.FOLDER)
        return {int(key.rpartition('/')[2]): word for key, word in entries}

    def _others_stay(self) -> bool:
        words = self._words()
        return any(words.get(i) not in (self.DONE, self.FAILED) for i in self._seen)

    def _watch(self) -> None:
        for count in itertools.count(1):
            time.sleep(self.beat)
            try:
                with self._writing:
                    if self._leaving.is_set():
                        return
                    self._write(str(count))
                lost = self._lost(self._words())
            except Exception as e:  # grpc has no exceptions of its own
                lost = f'process 0 does not answer ({first_line(e)[:120]})'
            if lost and not self._leaving.is_set():
                exit_now(f'{lost}; {RESTART}')

    def _lost(self, words: Mapping[int, str]) -> str:
        """Which process is lost and how one knows, or ''."""
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


def agree(what: str, mine: Mapping[str, Any]) -> None:
    """Compares what all processes must share with process 0's; each calls it in the same order.

    Args:
      what: names it, as 'config'.
      mine: JSON values by name.

    Raises:
      DistributedError: this process has other values; names it and each of them.
    """
    if _peers is None:
        return
    theirs = _peers.of_first(json.dumps(dict(mine)))
    zero, here = json.loads(theirs), json.loads(json.dumps(dict(mine)))
    show = lambda found, name: repr(found[name]) if name in found else 'absent'
    unlike = [f'{name}: {show(zero, name)}, here {show(here, name)}'
              for name in sorted({*zero, *here}) if zero.get(name) != here.get(name)]
    if unlike:
        raise DistributedError(f'process {_peers.me} has another {what} than process 0: '
                               f'{"; ".join(unlike)}; start all processes with one command, of '
                               'one version')


def same_folder(file: Place, flag: str = '--workdir') -> None:
    """Waits until this process sees the `file` that process 0 has just written, in the folder that
    `flag` names.

    Raises:
      DistributedError: it does not, within `SEEN` seconds, or at a URL that is another: its
        folder is another.
    """
    if _peers is None:
        return
    if places.is_url(file):  # of one name for all; a lock there changes as it is renewed
        agree('folder', {flag: str(file.parent)})
        return
    end = time.monotonic() + SEEN
    wanted = _peers.of_first(file.read_text('utf-8') if _peers.me == 0 else '')
    while not file.is_file() or file.read_text('utf-8') != wanted:
        if time.monotonic() > end:
            raise DistributedError(f'process {_peers.me} sees another {file.parent} than process '
                                   f'0; {flag} must be one folder that all of them share')
        time.sleep(0.2)


def together(name: str) -> None:
    """Waits until every process has come here, however long the first is still at work."""
    if _peers is not None:
        _peers.wait(name)


_peers: Peers | None = None
_exiting = threading.RLock()


def exit_now(reason: str) -> None:
    """Ends this process of several with code 1 and one line that names it; tells the others."""
    # On a line of its own: a progress bar may stand on this one.
    _exit(f'\n{_command()}: process {_peers.me if _peers else 0}: {reason}')


def _exit(line: str) -> None:
    """Ends this process with code 1 and `line`, without Python's own exit, which would wait.

    Two threads may get here: the second waits for the first to end the process, and is not heard.
    """
    with _exiting:
        print(line, file=sys.stderr, flush=True)
        if _peers is not None:
            _peers.leave(Peers.FAILED)
        os._exit(1)


def fail(reason: str, at_once: bool = False) -> None:
    """Ends the run with one line and exit code 1, in its other processes too.

    `at_once` leaves hanging threads where they are; a proper exit would wait for them.
    """
    if _peers is None and not at_once:
        sys.exit(f'main: {reason}')
    sys.stdout.flush()
    _exit(f'{_command()}: {reason}')


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Inside, what goes wrong in one process of several ends them all, in a line each.

    A process alone raises what it raises.
    """
    try:
        yield
    except Exception as e:
        if _peers is None:
            raise
        if isinstance(e, UserError):
            fail(str(e))
        exit_if_lost(e)
        if fault := errors.environment(e):
            fail(str(fault))
        exit_if_distributed(e)


def _command() -> str:
    return _peers.command if _peers else 'main'


def exit_if_lost(error: Exception) -> None:
    """Ends a process of several with one line if `error` comes from the loss of another one."""
    if _peers is not None and any(words in str(error) for words in PEER_LOST):
        time.sleep(1.25 * _peers.beat)  # the watching thread may know which one, and says so
        exit_now(f'another process is gone ({first_line(error)[:200]}); {RESTART}')


def exit_if_distributed(error: Exception) -> None:
    """Ends a process of several with the traceback of `error`, and tells the others."""
    if _peers is not None:
        with _exiting:
            traceback.print_exception(error)
            exit_now(f'{type(error).__name__}: {first_line(error)[:200]}')
