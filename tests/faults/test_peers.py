"""What a process makes of the others' last words, and of their silence.

First with a dictionary in place of JAX's coordinator, then in real processes that are killed and
halted while they wait for one another.
"""

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import runs
import tiny

from ddmd_jax.parallel import distributed

SCRIPT = Path(__file__).with_name('collective.py')
AGAIN = '; start all processes again, they go on from the last checkpoint'


class Client(dict):
    def key_value_set(self, key, value, allow_overwrite):
        self[key] = value

    def key_value_dir_get(self, folder):
        return [(key, value) for key, value in self.items() if key.startswith(folder)]


def peers(timeout=0.05):
    client = Client()
    return client, distributed.Peers(client, 0, 3, timeout)


def test_who_counts_is_there():
    client, me = peers()
    for beat in range(3):
        for other in (1, 2):
            client[f'{me.FOLDER}{other}'] = str(beat)
        assert me._missing(me._words()) == ''
        time.sleep(0.03)


def test_who_stops_counting_is_gone_unless_it_has_said_so():
    client, me = peers()
    client[f'{me.FOLDER}1'] = me.DONE
    assert me._missing(me._words()) == ''
    client[f'{me.FOLDER}2'] = '7'
    me._missing(me._words())
    time.sleep(0.06)
    assert me._missing(me._words()) == 'process 2 has not been heard of for 0.05 s'


def test_who_never_came_is_gone_too():
    _, me = peers()
    time.sleep(0.06)
    assert me._missing(me._words()).startswith('process 1 has not been heard of')


def test_who_has_failed_says_so_and_does_not_wait_for_ever():
    client, me = peers(timeout=1)
    me.start()
    client[f'{me.FOLDER}1'] = '1'
    me.leave(me.FAILED)
    assert client[f'{me.FOLDER}0'] == me.FAILED
    other = distributed.Peers(client, 1, 2, 100)
    assert other._missing(other._words()) == 'process 0 has failed (its own output says why)'


def test_a_last_word_is_not_waited_for_longer_than_would_make_the_coordinator_dead():
    client, me = peers(timeout=0.2)
    client.key_value_set = lambda *args, **kwargs: threading.Event().wait()
    me.start()
    start = time.monotonic()
    me.leave(me.DONE)
    assert time.monotonic() - start < 2


def test_a_clock_that_is_put_back_changes_nothing(monkeypatch):
    client, me = peers()
    monkeypatch.setattr(time, 'time', lambda: -time.monotonic())
    for beat in range(3):
        for other in (1, 2):
            client[f'{me.FOLDER}{other}'] = str(beat)
        assert me._missing(me._words()) == ''
        time.sleep(0.03)
    time.sleep(0.03)
    assert me._missing(me._words()) == 'process 1 has not been heard of for 0.05 s'


def test_a_coordinator_that_never_answers_is_not_waited_for(monkeypatch):
    told, over = [], threading.Event()
    monkeypatch.setattr(distributed, 'end_now', lambda *args, **kwargs: (
        told.append((args, kwargs)), over.set(), me._over.set()))
    client, me = peers()
    client.key_value_set = lambda *args, **kwargs: threading.Event().wait()
    me.start()
    assert over.wait(5)
    assert told[0] == ((f'process 0 has not answered for 0.05 s{AGAIN}',), {'tell': False})


# --- The door to the coordinator


def relayed():
    """(a server, a client's socket, the server's, what is set when the server is lost)."""
    lost = threading.Event()
    server = socket.create_server(('127.0.0.1', 0))
    relay = distributed.Relay(f'localhost:{server.getsockname()[1]}', lost.set)
    host, port = relay.address.split(':')
    near = socket.create_connection((host, int(port)), timeout=5)
    return server, near, server.accept()[0], lost


def test_a_relay_hands_on_both_ways():
    _, near, far, lost = relayed()
    sent = random.Random(0).randbytes(1 << 20)
    for one, two in ((near, far), (far, near)):
        threading.Thread(target=one.sendall, args=(sent,)).start()
        got = b''
        while len(got) < len(sent):
            got += two.recv(1 << 16)
        assert got == sent
    assert not lost.is_set()


def test_a_relay_tells_of_a_far_side_that_hangs_up_before_the_near_one_notices():
    _, near, far, lost = relayed()
    far.close()
    assert near.recv(1) == b'' and lost.is_set()


def test_a_relay_does_not_tell_of_a_near_side_that_does():
    _, near, far, lost = relayed()
    near.close()
    far.settimeout(5)
    assert far.recv(1) == b''
    time.sleep(0.1)
    assert not lost.is_set()


def test_a_relay_says_no_while_nobody_is_there():
    with socket.create_server(('127.0.0.1', 0)) as server:
        port = server.getsockname()[1]
    relay = distributed.Relay(f'[::ffff:127.0.0.1]:{port}', lambda: None)
    host, door = relay.address.split(':')
    near = socket.create_connection((host, int(door)), timeout=15)
    assert near.recv(1) == b''
    with socket.create_server(('127.0.0.1', port)) as server:
        near = socket.create_connection((host, int(door)), timeout=5)
        near.sendall(b'now')
        assert server.accept()[0].recv(3) == b'now'


# --- Real processes


def together(count, timeout=6, started=None, **environ):
    """So many processes that wait for one another; they have begun."""
    port = runs.free_port()
    env = os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(tiny.ROOT)} | environ
    processes = [subprocess.Popen(
        [sys.executable, str(SCRIPT), *map(str, (port, count, i, timeout))], env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE) for i in range(started or count)]
    if not started:
        for p in processes:
            assert '0\n' in iter(p.stdout.readline, ''), p.communicate()  # Gloo speaks first
    return processes


def said_by(process):
    """The only line on stderr of a process that ends with 1."""
    _, err = runs.ended(process, code=1, timeout=60)
    (line,) = [x for x in err.splitlines() if x]
    return line


@pytest.mark.faults
@pytest.mark.parametrize('seed', range(6))
def test_a_coordinator_that_is_killed_ends_the_others_at_once_in_one_line(seed):
    victim, *others = together(2 + seed % 2)
    time.sleep(random.Random(seed).uniform(0, 0.3))
    victim.kill()
    start = time.monotonic()
    for i, p in enumerate(others, 1):
        assert said_by(p) == f'main: process {i}: process 0 is gone{AGAIN}'
    assert time.monotonic() - start < 5  # not after the 6 s that silence takes
    victim.communicate()


@pytest.mark.faults
@pytest.mark.parametrize('which, words', [(0, 'process 0 has not answered for 6 s'),
                                          (1, 'process 1 has not been heard of for 6 s')])
def test_a_process_that_halts_ends_the_others_within_the_time_out(which, words):
    """As a host does that loses its power: connections stay, and nobody answers."""
    processes = together(3)
    victim = processes.pop(which)
    victim.send_signal(signal.SIGSTOP)
    start = time.monotonic()
    for p in processes:
        line = said_by(p)
        assert line.startswith('main: process ') and line.endswith(f': {words}{AGAIN}')
    assert 3 < time.monotonic() - start < 15
    victim.kill()
    victim.communicate()


@pytest.mark.faults
def test_a_process_that_never_comes_is_not_waited_for_for_ever():
    for p in together(3, started=2, JOINING='6'):
        assert said_by(p) == (
            'main: the processes could not be joined as said by the flags (not all of them came '
            'within 6 s); check that all of them were started with one coordinator')
