"""The four ways to start, in real runs; see docs/resuming.md."""

import jax
import numpy as np
import pytest
import runs

pytestmark = [pytest.mark.slow, pytest.mark.faults]


@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    return runs.Runs(tmp_path_factory.mktemp('starts'))


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b),
                                                    strict=True))


def test_a_run_goes_on_from_another_and_starts_from_weights(toy):
    whole, half, other = (toy.root / name for name in ('whole', 'half', 'other'))
    toy.finish(whole, {'train.steps': 6})
    toy.finish(half, {'train.steps': 4})
    _, err = toy.finish(other, {'train.steps': 6, 'resume': half / 'checkpoints' / '2'})
    assert f'resumed {half}/checkpoints/2 at step 2, in {other} from here on' in err
    runs.assert_same(whole, other, 6)  # the first line also, of which two steps are the other's
    # The teacher's own weights are what a run from scratch begins with.
    toy.finish(toy.root / 'teacher', {'train.steps': 6, 'init_from': toy.weights})
    runs.assert_same(whole, toy.root / 'teacher', 6)
    _, err = toy.finish(toy.root / 'weights', {'train.steps': 2, 'init_from': half})
    assert f'weights from {half}/checkpoints/4, everything else fresh' in err
    early, fresh = runs.state_of(toy.root / 'weights', 2), runs.state_of(half, 2)
    assert int(early['step']) == 2 and not equal(early['student'], fresh['student'])
