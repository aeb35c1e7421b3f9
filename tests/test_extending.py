"""A schedule, a regulariser and a suite of a user's own, through `main`: examples/extensions."""

import json
import sys

import forked
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny
from flax import nnx

from ddmd_jax.diffusion.time import Shift
from ddmd_jax.method import regularisers, schedules
from ddmd_jax.method.schedules import Ranges
from ddmd_jax.util import jsonl
from ddmd_jax.weights import flat

EXAMPLES = tiny.ROOT / 'examples'


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """Folder of a run of examples/extensions/config.py, on a teacher that nobody has trained."""
    folder = tmp_path_factory.mktemp('extending')
    sys.path.insert(0, str(EXAMPLES))
    try:
        from own_teacher import teacher
    finally:
        sys.path.remove(str(EXAMPLES))
    denoiser = nnx.to_pure_dict(nnx.state(teacher.Denoiser(nnx.Rngs(0)), nnx.Param))
    table = jax.random.normal(jax.random.key(1), (len(teacher.WORDS) + 1, teacher.WIDTH))
    weights = folder / 'teacher.safetensors'
    flat.save(weights, {'denoiser': denoiser, 'text': {'table': table}},
              {'architecture': 'own_teacher'})
    done = forked.run(
        'ddmd_jax.main', f'--config={EXAMPLES}/extensions/config.py', f'--workdir={folder}/run',
        f'--config.teacher.path={weights}', PYTHONPATH=str(EXAMPLES))
    assert done.returncode == 0, done.stderr
    return folder / 'run'


def test_the_regulariser_is_logged_and_its_weights_are_trained_and_saved(run):
    lines = jsonl.read(run / 'metrics.jsonl')
    assert [line['step'] for line in lines] == [2, 4, 6]
    assert all(np.isfinite(line['drift']) for line in lines)
    state = ocp.PyTreeCheckpointer().restore(run / 'checkpoints' / '6' / 'state')
    assert np.abs(state['extra']['drift']['colour']).min() > 0  # it began at 0


def test_the_suite_has_the_table(run):
    rows = json.loads((run / 'eval.json').read_text())['rows']
    assert {row['name']: row['colour_match'] for row in rows}['real'] == 1
    assert all(0 <= row['colour_match'] <= 1 for row in rows)


def test_the_schedule_is_the_runs_and_draws_within_its_window(run, monkeypatch):
    assert json.loads((run / 'config.json').read_text())['method']['schedule'] == (
        'extensions.schedule.WINDOW')
    monkeypatch.syspath_prepend(EXAMPLES)
    schedule = schedules.get('extensions.schedule.WINDOW')
    t = np.repeat([0.0, 0.25, 0.5, 0.75], 500).astype(np.float32)
    keys = tuple(jax.random.split(jax.random.key(0)))
    ca, dm = schedule.levels(keys, t, Ranges((0.0, 0.98), (0.0, 0.98)), Shift())
    assert (ca >= t).all() and (ca <= np.minimum(t + 0.3, 0.98) + 1e-6).all()
    assert dm.min() < 0.02 and dm.max() > 0.95


@pytest.mark.parametrize('get, name, words', [
    (schedules.get, 'hybrid', "unknown schedule 'hybrid'"),
    (schedules.get, 'ddmd_jax.method.schedules.Alpha', 'not a Schedule'),
    (schedules.get, 'nowhere.WINDOW', 'cannot be imported'),
    (regularisers.get, 'nowhere', 'cannot be imported'),
    (regularisers.get, 'json', 'REGULARISER')])
def test_what_is_not_there_is_refused_in_one_line(get, name, words):
    with pytest.raises(ValueError, match=words) as e:
        get(name)
    assert '\n' not in str(e.value)
