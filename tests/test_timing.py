"""``python -m benchmarks``: parts of a distillation, timed in turns."""

import json
import sys

import forked
import pytest
import tiny

sys.path.insert(0, str(tiny.ROOT))  # for benchmarks

from benchmarks import __main__ as benchmarks


def call(*args):
    return forked.run('benchmarks', *args)


@pytest.mark.parametrize('args, line', [
    (['generater', '--config=emoji'], "no part 'generater'; known: generator, critic, rollout,"),
    (['generator'], 'no --config given; try --config=emoji'),
    (['generator', '--config=emoji', '--beside=x'], "--beside 'x' is not field=value"),
    (['rollout', '--config=emoji'], 'rollout is a program of --config.critic.order=one_rollout'),
    (['step', '--config=emoji', '--beside=student.steps=0'], 'student.steps')])
def test_what_cannot_be_timed_is_one_line(args, line):
    told = call(*args)
    assert told.returncode != 0 and line in told.stderr and 'Traceback' not in told.stderr


def test_sides_run_in_turns():
    """Once unseen, then in turns until the time is over; the ratio is of one turn each."""
    ran = []
    found = benchmarks.timed([lambda: ran.append('a'), lambda: ran.append('b')], 0.0)
    assert ran == ['a', 'b', 'a', 'b'] and [len(times) for times in found] == [1, 1]
    line = benchmarks.figures('x', [[2.0, 4.0, 9.0], [1.0, 2.0, 3.0]])
    assert (line['seconds'], line['beside'], line['runs']) == (4.0, 2.0, 3)
    assert line['ratio'] == pytest.approx(12 ** (1 / 3))
    # Student's t of three logarithms: far wider than the least and the largest of them.
    low, high = line['ratio_interval']
    assert low < 2.0 and high > 3.0 and low * high == pytest.approx(line['ratio'] ** 2)
    assert 'ratio_interval' not in benchmarks.figures('x', [[2.0], [1.0]])


@pytest.mark.slow
def test_parts_of_a_run_are_timed(weights):
    """By its real programs; the generator's of two orders beside one another."""
    flags = ['--config=emoji', f'--config.teacher.path={weights}', '--config.data.global_batch=4',
             '--seconds=0', '--json']
    parts = ['generator', 'first_step', 'sample', 'decode', 'input', 'checkpoint']
    told = call(*parts[1:], *flags)
    assert told.returncode == 0, told.stderr[-2000:]
    found = json.loads(told.stdout)
    assert [part['name'] for part in found['parts']] == parts[1:]
    assert all(part['seconds'] > 0 for part in found['parts'])
    assert found['device']['platform'] == 'cpu' and found['versions']['jax']
    told = call(parts[0], *flags, '--beside=critic.order=one_rollout')
    assert told.returncode == 0, told.stderr[-2000:]
    part, = json.loads(told.stdout)['parts']
    assert part['ratio'] > 0 and part['beside'] > 0
