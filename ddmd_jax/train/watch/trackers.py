"""Where else a run's figures and pictures go: Weights & Biases, MLflow or trackio.

One of them, by `log.tracker`, if it is installed; each is set up by its own environment variables
(WANDB_MODE, MLFLOW_TRACKING_URI, TRACKIO_SPACE_ID, ...). A tracker that fails is named once and
then left out; the run goes on.
"""

import json
import secrets
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ddmd_jax.util import files, places
from ddmd_jax.util.places import Place
from ddmd_jax.util.text import first_line

PROJECT = 'ddmd_jax'  # WANDB_PROJECT names another
FILE = 'tracker.json'  # in the workdir: the tracker's run, for one that is resumed


class WandB:
    """https://docs.wandb.ai"""

    def __init__(self, config: Mapping[str, Any], workdir: Place, identity: str):
        import wandb

        self._image = wandb.Image
        self._run: Any = wandb.init(
            project=wandb.env.get_project() or PROJECT, name=workdir.name, id=identity,
            resume='allow', config=dict(config),
            dir=tempfile.mkdtemp(prefix='ddmd_') if places.is_url(workdir) else workdir,
            settings=wandb.Settings(silent=True))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        self._run.log({name: self._image(image)}, step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio(WandB):
    """https://huggingface.co/docs/trackio, whose runs are W&B's in miniature."""

    def __init__(self, config: Mapping[str, Any], workdir: Place, identity: str):
        import trackio

        self._image = trackio.Image
        self._run = trackio.init(project=PROJECT, name=f'{workdir.name}-{identity}',
                                 config=dict(config), resume='allow', embed=False)


class MLflow:
    """https://mlflow.org/docs"""

    def __init__(self, config: Mapping[str, Any], workdir: Place, identity: str):
        import mlflow

        self._client = mlflow.MlflowClient()
        if not mlflow.get_experiment_by_name(PROJECT):
            self._client.create_experiment(PROJECT)
        experiment = mlflow.get_experiment_by_name(PROJECT).experiment_id
        # It names its runs itself: ours is a tag.
        known = self._client.search_runs([experiment], f"tags.identity = '{identity}'")
        run = known[0] if known else self._client.create_run(
            experiment, tags={'identity': identity}, run_name=workdir.name)
        self._id = run.info.run_id
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


KINDS: dict[str, type] = {'wandb': WandB, 'mlflow': MLflow, 'trackio': Trackio}
NAMES = ('', *KINDS)


class Tracker:
    """The tracker `name`, which may fail, or none: then every method does nothing.

    Figures are numbers by name, pictures ``[H, W, 3]`` uint8.
    """

    def __init__(self, name: str, config: Any, workdir: Place, say: Callable[[str], None]):
        self._name, self._say = name, say
        self._made: Any = None
        if name:
            self._try(lambda: KINDS[name](config.to_dict(), workdir, _identity(workdir, name)))

    def _try(self, act: Callable[[], Any]) -> None:
        """`act` makes the tracker, or uses it and returns None."""
        try:
            self._made = act() or self._made
        except Exception as e:  # anything the tracker raises
            self._made = None
            self._say(f'warning: log.tracker {self._name!r} has failed ({first_line(e)}) and is '
                      'left out; figures are in metrics.jsonl and TensorBoard')

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        if made := self._made:
            numbers = {k: v for k, v in values.items() if not isinstance(v, str)}
            self._try(lambda: made.scalars(step, numbers))

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        if made := self._made:
            self._try(lambda: made.image(step, name, image))

    def close(self) -> None:
        if made := self._made:
            self._try(made.close)


def _identity(workdir: Place, name: str) -> str:
    """This run's name with a tracker: made once, and found again by a resumed run."""
    path = workdir / FILE
    known = json.loads(path.read_bytes()) if path.is_file() else {}
    if name not in known:
        known[name] = secrets.token_hex(4)
        files.write(path, json.dumps(known) + '\n')
    return known[name]
