"""The others' counts, last words and silence, and what a process does about them.

First with a dictionary in place of JAX's coordinator, then in real processes that are killed and
halted while they wait for one another.
"""

import random
import signal
import time
from pathlib import Path

import forked
import pytest
import runs

from ddmd_jax.parallel import distributed

SCRIPT = Path(__file__).with_name('collective.py')
AGAIN = '; start all processes again, they go on from the last checkpoint'
JAX_ABORTS = 'Terminating process because the JAX distributed service detected fatal errors'


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
        assert me._lost(me._words()) == ''
        time.sleep(0.03)


def test_who_stops_counting_is_gone_unless_it_has_said_so():
    client, me = peers()
    client[f'{me.FOLDER}1'] = me.DONE
    assert me._lost(me._words()) == ''
    client[f'{me.FOLDER}2'] = '7'
    me._lost(me._words())
    time.sleep(0.06)
    assert me._lost(me._words()) == 'process 2 has not been heard of for 0.05 s'


def test_who_never_came_is_gone_too():
    _, me = peers()
    time.sleep(0.06)
    assert me._lost(me._words()).startswith('process 1 has not been heard of')


def test_who_has_failed_says_so_and_does_not_wait_for_ever():
    client, me = peers(timeout=1)
    me.start()
    client[f'{me.FOLDER}1'] = '1'
    me.leave(me.FAILED)
    assert client[f'{me.FOLDER}0'] == me.FAILED
    other = distributed.Peers(client, 1, 2, 100)
    assert other._lost(other._words()) == 'process 0 has failed (its own output says why)'


def test_a_clock_that_is_put_back_changes_nothing(monkeypatch):
    client, me = peers()
    monkeypatch.setattr(time, 'time', lambda: -time.monotonic())
    for beat in range(3):
        for other in (1, 2):
            client[f'{me.FOLDER}{other}'] = str(beat)
        assert me._lost(me._words()) == ''
        time.sleep(0.03)
    time.sleep(0.03)
    assert me._lost(me._words()) == 'process 1 has not been heard of for 0.05 s'


# --- Real processes


def together(count, timeout=6, started=None, **environ):
    """So many processes that wait for one another; they have begun."""
    port = runs.free_port()
    processes = [forked.start(SCRIPT, port, count, i, timeout, **environ)
                 for i in range(started or count)]
    for p in processes:
        while not started and '0\n' not in p.out.read_text():
            assert p.poll() is None, p.communicate()
            time.sleep(0.02)
    return processes


def said_by(process):
    """The only line on stderr of a process that ends with 1."""
    _, err = runs.ended(process, code=1, timeout=60)
    (line,) = [x for x in err.splitlines() if x]
    return line


def aborted(process):
    """Whether a process ends, not with code 0, in its own line or in JAX's words."""
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert JAX_ABORTS in err or ': process 0 does not answer' in err, err  # what it said instead
    return True


@pytest.mark.faults
@pytest.mark.parametrize('seed', range(3))
def test_a_coordinator_that_is_killed_ends_the_others_at_once(seed):
    victim, *others = together(2 + seed % 2, timeout=600)
    time.sleep(random.Random(seed).uniform(0, 0.3))
    victim.kill()
    assert all(aborted(p) for p in others)  # not after 600 s of silence
    victim.communicate()


@pytest.mark.faults
@pytest.mark.parametrize('which', [0, 1])
def test_a_process_that_halts_ends_the_others_within_the_time_out(which):
    """As a host that loses its power: connections stay, and nobody answers."""
    processes = together(3)
    victim = processes.pop(which)
    victim.send_signal(signal.SIGSTOP)
    start = time.monotonic()
    if which == 0:
        assert all(aborted(p) for p in processes)
    else:
        lines = ''.join(map(said_by, processes))  # the second may read the first one's last word
        assert f': process 1 has not been heard of for 6 s{AGAIN}' in lines
    assert time.monotonic() - start > 3
    victim.kill()
    victim.communicate()


@pytest.mark.faults
def test_a_process_that_never_comes_is_not_waited_for_for_ever():
    for p in together(3, started=2, JOINING='6'):
        assert said_by(p) == (
            'main: the processes could not be joined as said by the flags (not all of them came '
            'within 6 s); check that all of them were started with one coordinator')
