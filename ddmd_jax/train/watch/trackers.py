"""Where else a run's figures and pictures go: Weights & Biases, MLflow or trackio.

One of them, by `log.tracker`, if it is installed; each is set up by its own environment variables
(WANDB_MODE, MLFLOW_TRACKING_URI, TRACKIO_SPACE_ID, ...). No run ends for it: what a tracker cannot
do is told once, and it is asked no more.
"""

import json
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ddmd_jax.util.text import first_line

PROJECT = 'ddmd_jax'  # WANDB_PROJECT names another
FILE = 'tracker.json'  # in the workdir: which run of the tracker this is, for one that goes on


class Tracker(Protocol):
    """What a run tells: numbers by name, pictures ``[H, W, 3]`` uint8."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...
    def image(self, step: int, name: str, image: np.ndarray) -> None: ...
    def close(self) -> None: ...


class WandB:
    """https://docs.wandb.ai"""

    def __init__(self, config: Mapping[str, Any], workdir: Path, identity: str):
        import wandb

        self._wandb = wandb
        self._run = wandb.init(
            project=wandb.env.get_project() or PROJECT, name=workdir.name, id=identity,
            resume='allow', dir=workdir, config=dict(config),
            settings=wandb.Settings(silent=True))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        self._run.log({name: self._wandb.Image(image)}, step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """https://mlflow.org/docs"""

    def __init__(self, config: Mapping[str, Any], workdir: Path, identity: str):
        import mlflow

        self._client = mlflow.MlflowClient()
        if not mlflow.get_experiment_by_name(PROJECT):
            self._client.create_experiment(PROJECT)
        experiment = mlflow.get_experiment_by_name(PROJECT).experiment_id
        # It names its runs itself: ours is a tag.
        known = self._client.search_runs([experiment], f"tags.identity = '{identity}'")
        self._run = known[0] if known else self._client.create_run(
            experiment, tags={'identity': identity}, run_name=workdir.name)
        self._id = self._run.info.run_id
        if not known:
            self._client.log_dict(self._id, dict(config), 'config.json')

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._client.log_metric(self._id, name, value, step=step)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        from PIL import Image

        self._client.log_image(self._id, Image.fromarray(image), f'{name}-{step:08d}.png')

    def close(self) -> None:
        self._client.set_terminated(self._id)


class Trackio:
    """https://huggingface.co/docs/trackio"""

    def __init__(self, config: Mapping[str, Any], workdir: Path, identity: str):
        import trackio

        self._trackio = trackio
        self._run = trackio.init(project=PROJECT, name=f'{workdir.name}-{identity}',
                                 config=dict(config), resume='allow', embed=False)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        self._run.log({name: self._trackio.Image(image)}, step=step)

    def close(self) -> None:
        self._run.finish()


KINDS: dict[str, type] = {'wandb': WandB, 'mlflow': MLflow, 'trackio': Trackio}
NAMES = ('', *KINDS)


class Told:
    """A tracker that has leave to fail, or none: then every method does nothing."""

    def __init__(self, name: str, config: Any, workdir: Path, say: Callable[[str], None]):
        self._name, self._say = name, say
        self._tracker: Tracker | None = None
        if name:
            self._try(lambda: setattr(self, '_tracker', KINDS[name](
                config.to_dict(), workdir, _identity(workdir, name))))

    def _try(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except Exception as e:  # of whatever the tracker is made of
            self._tracker = None
            self._say(f'warning: log.tracker {self._name!r} has failed ({first_line(e)}) and is '
                      'asked no more; figures are in metrics.jsonl and TensorBoard')

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        if self._tracker:
            numbers = {k: v for k, v in values.items() if not isinstance(v, str)}
            self._try(lambda: self._tracker.scalars(step, numbers))

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        if self._tracker:
            self._try(lambda: self._tracker.image(step, name, image))

    def close(self) -> None:
        if self._tracker:
            self._try(lambda: self._tracker.close())


def _identity(workdir: Path, name: str) -> str:
    """This run's name with that tracker: made once, and found again when the run goes on."""
    path = workdir / FILE
    known = json.loads(path.read_text()) if path.is_file() else {}
    if name not in known:
        known[name] = secrets.token_hex(4)
        path.write_text(json.dumps(known) + '\n')
    return known[name]
