"""What would fit: the search over batches, and the levers, with made-up peaks."""

import dataclasses
import math

import jax
import pytest
import tiny
from hypothesis import given, strategies as some

from ddmd_jax.parallel import sharding
from ddmd_jax.planner import command, programs, search

LUMINA = tiny.load_config('lumina')


@given(per_row=some.floats(1, 50), fixed=some.floats(0, 400), bend=some.floats(0, 0.05),
       unit=some.sampled_from([1, 4, 64]), start=some.integers(1, 8), limit=some.floats(50, 5000))
def test_the_largest_batch_is_the_largest(per_row, fixed, bend, unit, start, limit):
    """For any growing peak, refused or not beyond the limit, and with few compilations."""
    peak = lambda b: fixed + per_row * b + bend * b * b
    for refuse in (False, True):
        tried = []
        def asked(b, refuse=refuse, tried=tried):
            tried.append(b)
            return math.inf if refuse and peak(b) > limit else peak(b)
        found = search.largest_batch(asked, start * unit, unit, fixed / 2, limit)
        assert found % unit == 0
        assert found == 0 or peak(found) <= limit
        assert peak(found + unit) > limit
        assert len(tried) == len(set(tried)) and all(b % unit == 0 and b for b in tried)


@pytest.mark.parametrize('limit, most', [(15.75, 2), (31.25, 4), (95.7, 4)])
def test_few_batches_are_compiled_where_peaks_are_nearly_linear(limit, most):
    """Each costs the better part of a minute: 4.9 GiB stay, 64 rows take 8.8."""
    tried = []
    def peak(batch):
        tried.append(batch)
        return 5.0 + 8.7 * batch / 64
    found = search.largest_batch(peak, 64, 64, 4.9, limit)
    assert found == (limit - 5.0) // 8.7 * 64 and len(tried) <= most


def test_levers_that_are_pulled_are_not_proposed():
    fields = [field for field, _, _ in search.unused(LUMINA)]
    assert fields == [f for f, _, _ in search.LEVERS if f != 'teacher.remat']  # which is full
    assert [v for f, v, _ in search.unused(LUMINA) if f == 'train.accumulate'] == [2]
    changed = search.with_field(LUMINA, 'train.accumulate', 2)
    assert LUMINA.train.accumulate == 1
    assert [v for f, v, _ in search.unused(changed) if f == 'train.accumulate'] == [4]


def test_every_lever_is_a_field_that_can_have_that_value():
    from ddmd_jax import config
    for field, value, _ in search.LEVERS:
        assert config.validate(search.with_field(LUMINA, field, value)) == []


SAVES = {'train.teacher_passes': 2, 'teacher.param_dtype': 3, 'train.accumulate': 4}


def peak(config):
    """20, less what each pulled lever saves."""
    pulled = [config.train.teacher_passes == 'apart', config.teacher.param_dtype == 'bfloat16',
              config.train.accumulate == 2]
    return 20 - sum(size for size, on in zip(SAVES.values(), pulled) if on)


def test_levers_that_are_enough_alone_are_all_named():
    found = search.advice(LUMINA, peak, 17.5)
    assert [one['fields'] for one in found] == [
        {'teacher.param_dtype': 'bfloat16'}, {'train.accumulate': 2}]
    assert [one['peak_bytes'] for one in found] == [17, 16]


def test_where_none_is_enough_alone_the_first_that_are_enough_together():
    (found,) = search.advice(LUMINA, peak, 15.5)
    assert found['fields'] == {'train.teacher_passes': 'apart', 'teacher.param_dtype': 'bfloat16'}
    assert found['peak_bytes'] == 15


def test_where_all_together_are_not_enough_there_is_no_advice():
    assert search.advice(LUMINA, peak, 10.5) == []


# --- Programs ---


def test_programs_of_a_gan_and_of_a_family_that_counts_no_flops():
    """Traced, not compiled: a GAN's batches have real latents, and counts may be missing."""
    config = tiny.load_config('emoji')
    config.update_from_flattened_dict({'method.gan.weight': 0.1, 'data.global_batch': 4})
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    teacher, _, tokens, _ = command.parts_for(config, mesh)
    for counted in (teacher, dataclasses.replace(teacher, flops=None)):
        found, _ = programs.programs(config, counted, mesh, tokens)
        counts = {name: program.analytic_flops for name, program in found.items()}
        assert counts.pop('decode') > 0  # the codec's, which is not the teacher's to count
        assert set(counts) == {'generator_step', 'critic_step', 'sample'}
        assert all(count is None if counted.flops is None else count > 0
                   for count in counts.values())
    assert found['critic_step'].lower().as_text()


@pytest.mark.parametrize('order, steps, count', [
    ('critic_first', 4, 24), ('same_images', 4, 21.5), ('one_rollout', 4, 14),
    ('critic_first', 1, 15), ('one_rollout', 1, 11), ('one_rollout', 8, 18)])
def test_network_evaluations_of_a_step_are_counted(order, steps, count):
    """At five updates of the critic; of four steps one rollout saves 42 % of Algorithm 1's."""
    config = tiny.load_config('emoji')
    config.update_from_flattened_dict({'critic.updates': 5, 'critic.order': order,
                                       'student.steps': steps})
    asked, runs = programs.evaluations(config), programs.runs(config)
    assert sum(asked[name] * often for name, often in runs.items()) == count
