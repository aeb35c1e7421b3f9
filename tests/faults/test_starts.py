"""The four ways to start, in real runs; see docs/resuming.md."""

import jax
import numpy as np
import pytest
import runs

pytestmark = [pytest.mark.slow, pytest.mark.faults]


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b),
                                                    strict=True))


def test_a_run_goes_on_from_another(tmp_path):
    toy = runs.Runs(tmp_path, TOY='1')
    whole, half, other = (tmp_path / name for name in ('whole', 'half', 'other'))
    toy.finish(whole, {'train.steps': 6})
    toy.finish(half, {'train.steps': 4})
    _, err = toy.finish(other, {'train.steps': 6, 'resume': half / 'checkpoints' / '2'})
    assert f'resumed {half}/checkpoints/2 at step 2, in {other} from here on' in err
    runs.assert_same(whole, other, 6)  # the first line also, of which two steps are the other's


def test_a_run_starts_from_weights(tmp_path):
    networks = runs.Runs(tmp_path)
    scratch = tmp_path / 'scratch'
    networks.finish(scratch, {'train.steps': 2})
    # The teacher's own weights are what a run from scratch begins with.
    networks.finish(tmp_path / 'teacher', {'train.steps': 2, 'init_from': networks.weights})
    runs.assert_same(scratch, tmp_path / 'teacher', 2)
    _, err = networks.finish(tmp_path / 'weights', {'train.steps': 1, 'init_from': scratch})
    assert f'weights from {scratch}/checkpoints/2, everything else fresh' in err
    early, fresh = runs.state_of(tmp_path / 'weights', 1), runs.state_of(scratch, 2)
    assert int(early['step']) == 1 and not equal(early['student'], fresh['student'])
