"""What a process makes of the others' last words; a dictionary stands for JAX's coordinator."""

import time

from ddmd_jax import distributed


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
    client, me = peers()
    client[f'{me.FOLDER}1'] = '1'
    me.fail()
    assert client[f'{me.FOLDER}0'] == me.FAILED
    other = distributed.Peers(client, 1, 2, 100)
    assert other._missing(other._words()) == 'process 0 has failed (its own output says why)'
