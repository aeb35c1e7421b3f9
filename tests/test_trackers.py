"""Trackers: what they are told, that a run goes on in them, that none ends it; profiles."""

import json
import sys
import time
import types

import jax
import numpy as np
import pytest
import tiny
from jax._src import profiler
from ml_collections import ConfigDict

from ddmd_jax import config as config_lib, main
from ddmd_jax.train.watch import logs, profiling, trackers

PICTURE = np.full((4, 6, 3), 200, np.uint8)


def configured(name):
    return ConfigDict({'log': {'tracker': name}, 'seed': 3})


def two_goes(workdir, name):
    """A run that is logged, stopped, and goes on."""
    said = []
    for start, steps in ((0, (5, 10)), (10, (15,))):
        log = logs.RunLog(workdir, start, 20, 'toy', configured(name))
        log.say = said.append
        for step in steps:
            log.scalars(step, {'loss': step / 10, 'health': 'healthy'})
        log.image(steps[-1], 'panels/x', PICTURE)
        log.close()
    assert not said
    return json.loads((workdir / trackers.FILE).read_text())[name]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    for name in ('WANDB_DIR', 'HOME', 'TRACKIO_DIR', 'XDG_CACHE_HOME', 'HF_HOME'):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('MLFLOW_TRACKING_URI', f'sqlite:///{tmp_path / "mlflow.db"}')
    return tmp_path / 'run'


@pytest.mark.extras
def test_mlflow_has_one_run_of_both_goes(elsewhere, tmp_path, monkeypatch):
    mlflow = pytest.importorskip('mlflow')
    # The store of the small package: files.
    monkeypatch.setenv('MLFLOW_TRACKING_URI', (tmp_path / 'mlruns').as_uri())
    monkeypatch.setenv('MLFLOW_ALLOW_FILE_STORE', 'true')
    elsewhere.mkdir()
    identity = two_goes(elsewhere, 'mlflow')
    client = mlflow.MlflowClient()
    experiment = mlflow.get_experiment_by_name(trackers.PROJECT).experiment_id
    (run,) = client.search_runs([experiment], f"tags.identity = '{identity}'")
    history = client.get_metric_history(run.info.run_id, 'loss')
    assert [(m.step, m.value) for m in history] == [(5, 0.5), (10, 1.0), (15, 1.5)]
    assert 'health' not in run.data.metrics and run.info.status == 'FINISHED'
    assert {a.path for a in client.list_artifacts(run.info.run_id)} >= {'config.json', 'panels'}


@pytest.mark.extras
def test_trackio_has_one_run_of_both_goes(elsewhere):
    pytest.importorskip('trackio')
    elsewhere.mkdir()
    identity = two_goes(elsewhere, 'trackio')
    from trackio.sqlite_storage import SQLiteStorage

    lines = SQLiteStorage.get_logs(trackers.PROJECT, f'run-{identity}')
    assert [(x['step'], x['loss']) for x in lines if 'loss' in x] == [
        (5, 0.5), (10, 1.0), (15, 1.5)]


@pytest.mark.extras
def test_wandb_offline_writes_its_run(elsewhere):
    pytest.importorskip('wandb')
    elsewhere.mkdir()
    identity = two_goes(elsewhere, 'wandb')
    # A second go within one second has a number behind it.
    folders = sorted((elsewhere / 'wandb').glob(f'offline-run-*-{identity}*'))
    assert folders == sorted((elsewhere / 'wandb').glob('offline-run-*')) != []
    size = lambda: sum(f.stat().st_size for folder in folders for f in folder.glob('*.wandb'))
    until = time.monotonic() + 20  # its own process writes them
    while size() < 200 and time.monotonic() < until:
        time.sleep(0.1)
    assert size() > 200


class Broken:
    """A tracker whose server goes away after the first line."""

    def __init__(self, config, workdir, identity):
        self.told = []

    def scalars(self, step, values):
        if self.told:
            raise ConnectionError('no route to host\nand much more')
        self.told.append((step, values))

    def image(self, step, name, image):
        assert step == 1

    def close(self):
        raise AssertionError('is asked no more')


def test_a_tracker_that_fails_is_told_once_and_ends_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(trackers.KINDS, 'wandb', Broken)
    log = logs.RunLog(tmp_path, 0, 9, 'toy', configured('wandb'))
    for step in range(1, 4):
        log.scalars(step, {'loss': 1.0})
        log.image(step, 'x', PICTURE)
    log.close()
    err = capfd.readouterr().err
    assert err.count("warning: log.tracker 'wandb' has failed (no route to host) and is left "
                     'out') == 1
    assert len((tmp_path / 'metrics.jsonl').read_text().splitlines()) == 3


def test_one_that_cannot_begin_is_told_too(tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, 'trackio', types.ModuleType('trackio'))  # has no `init`
    log = logs.RunLog(tmp_path, 0, 9, 'toy', configured('trackio'))
    log.scalars(1, {'loss': 1.0})
    log.close()
    assert "log.tracker 'trackio' has failed (" in capfd.readouterr().err


def test_one_that_is_not_installed_is_a_wrong_config(monkeypatch):
    config = tiny.load_config('emoji')
    config.log.tracker = 'mlflow'
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    (error,) = config_lib.validate(config)
    assert "log.tracker: 'mlflow', which is not installed here: pip install mlflow" in str(error)


# --- Profiles ---


@pytest.mark.parametrize(('text', 'window'), [(None, None), ('10:20', (10, 20)), ('3:3', (3, 3))])
def test_windows(text, window):
    assert main.profiled(text) == window


@pytest.mark.parametrize('text', ['', '5', '20:10', '0:4', 'a:b', '1:2:3', '-1:4'])
def test_what_is_no_window_is_one_line(text, capsys):
    with pytest.raises(SystemExit) as e:
        main.profiled(text)
    assert e.value.code == 2
    assert capsys.readouterr().err == (
        f'main: --profile={text} is not FIRST:LAST, two steps such as 10:20\n')


@pytest.mark.parametrize(('steps', 'begins', 'written'), [
    ((2, 3), 1, True), ((2, 9), 1, True),  # the run ends before
    ((1, 9), 4, True), ((2, 3), 5, False), (None, 1, False)])
def test_a_profile_is_of_its_steps(tmp_path, steps, begins, written):
    said = []
    window = profiling.Window(steps, tmp_path / 'profile', said.append)
    double = jax.jit(lambda x: 2 * x)
    x = double(np.ones(3))
    for step in range(begins, 6):
        window.before(step)
        x = double(x)
        window.after(step, x)
    window.close()
    found = list(tmp_path.rglob('*.xplane.pb'))
    assert bool(found) == written == bool(said)
    if written:  # what TensorBoard's profiler and xprof open
        assert found[0].match('profile/plugins/profile/*/*.pb') and found[0].stat().st_size > 1000


def test_a_profile_that_cannot_be_written_ends_nothing(tmp_path):
    said = []
    (tmp_path / 'profile').write_text('a file in its place')
    window = profiling.Window((1, 2), tmp_path / 'profile', said.append)
    for step in (1, 2, 3):
        window.before(step)
        window.after(step, np.ones(3))
    window.close()
    profiler._profile_state.reset()  # JAX holds on to a trace that it could not write
    assert len(said) == 1 and said[0].startswith('warning: no profile in ')
