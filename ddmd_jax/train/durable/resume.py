"""Where a run's state comes from.

| there is | kind | state | optimiser, counters, data | manifest |
|---|---|---|---|---|
| a checkpoint in the run's own workdir | `own` | from it | from it | must be equal |
| else `config.resume` | `resume` | from it | from it | must be equal |
| else `config.init_from` | `init` | student, critic, EMA from it | fresh | not asked |
| else nothing | `scratch` | as the teacher's | fresh | none yet |
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from ddmd_jax import config as config_lib
from ddmd_jax.train import state as st
from ddmd_jax.train.durable import checkpoint as ckpt, checksums, saving
from ddmd_jax.train.durable.checkpoint import CheckpointError
from ddmd_jax.train.durable.rollback import GuardError
from ddmd_jax.train.feed import Feed
from ddmd_jax.util import places
from ddmd_jax.util.places import Place

OWN, RESUME, INIT, SCRATCH = 'own', 'resume', 'init', 'scratch'
WEIGHTS = ('student', 'critic', 'ema')


@dataclasses.dataclass(frozen=True)
class Source:
    """One of the four kinds, and the folder of the checkpoint or weights it reads."""

    kind: str
    path: Place | None = None


def choose(config: Any, checkpoints: saving.Checkpoints) -> Source:
    """Which of the table's lines holds; looks at folders, reads no state.

    Raises:
      CheckpointError: see `origin`.
    """
    if checkpoints.latest is not None:
        return Source(OWN, checkpoints.directory / str(checkpoints.latest))
    return origin(config)


def origin(config: Any) -> Source:
    """Which of the lines after the first holds: where the run once began.

    Raises:
      CheckpointError: what `config.resume` or `config.init_from` names is not there, or has no
        checkpoint that is not damaged.
    """
    if config.resume:
        return Source(RESUME, _checkpoint('resume', config.resume))
    if config.init_from:
        return Source(INIT, _weights(config.init_from))
    return Source(SCRATCH)


def _checkpoint(field: str, named: str) -> Place:
    """The checkpoint that a field names: itself, or the newest good one of a run's folder."""
    path = places.of(named)
    if path.name.isdigit() and (path / 'state').is_dir():
        fault = ckpt.damage(path)
        if fault:
            raise CheckpointError(f'config.{field}: {path} is damaged ({fault}); name another')
        return path
    if not checksums.steps(path / 'checkpoints'):
        raise CheckpointError(f'config.{field}: {path} holds no checkpoints; give the --workdir of '
                              'a run, or one of its checkpoints')
    step, damaged = ckpt.newest_good(path / 'checkpoints')
    for bad, why in damaged.items():
        ckpt.warn(f'checkpoint {path / "checkpoints" / str(bad)} is damaged ({why}); '
                  f'taking step {step}')
    return path / 'checkpoints' / str(step)


def _weights(named: str) -> Place:
    """A checkpoint, or a folder or file of weights as the teacher's family has them."""
    path = places.of(named)
    if (path / 'checkpoints').is_dir() or (path / 'state').is_dir():
        return _checkpoint('init_from', named)
    if not path.exists():
        raise CheckpointError(f'config.init_from: no {path}; give the --workdir of a run, one of '
                              'its checkpoints, or weights such as `export` writes')
    return path


def recorded(config: Any, workdir: Place, step: int | None) -> Source:
    """The checkpoint `step` of a run, or for None where the run once began.

    Raises:
      GuardError: that checkpoint is gone.
    """
    if step is None:
        return origin(config)
    path = workdir / 'checkpoints' / str(step)
    if not path.is_dir():
        raise GuardError(f'{path} is gone, from which a step went wrong; it cannot be replayed')
    return Source(RESUME, path)


def manifest_of(config: Any, identities: Mapping[str, str]) -> dict[str, Any]:
    """Whose a checkpoint of this run is; see `checkpoint.check_manifest`."""
    places = {name: found for name in ckpt.PLACES
              if (found := config_lib.field(config, name)) is not None}
    return ckpt.comparable(config.to_dict()) | places | ckpt.versions() | identities


def start(source: Source, task: Any, checkpoints: saving.Checkpoints,
          feed: Feed) -> st.TrainState:
    """The state that `source` names, and `feed` at its place; see `begin`."""
    if source.kind == OWN:
        return checkpoints.restore(task.spec.shapes, task.spec.shardings, feed)
    state, checkpoints.interval = begin(source, checkpoints.manifest, task, feed)
    return state


def begin(source: Source, manifest: Mapping[str, Any], task: Any,
          feed: Feed) -> tuple[st.TrainState, list[dict[str, Any]]]:
    """(the state of a run that has no checkpoint of its own; metrics not logged when it was saved).

    Args:
      source: where it comes from.
      manifest: whose a checkpoint must be if it is gone on from.
      task: a `train.Task`: its spec, and how it reads weights that are no checkpoint.
      feed: is moved to its place.

    Raises:
      CheckpointError: another run's, not readable, of other shapes, or of another scale.
      WeightsError: likewise, of weights.
    """
    if source.kind == INIT:
        _check_scale(source.path, manifest)
    if source.kind in (SCRATCH, INIT):
        feed.start_prefetch()
        if source.kind == SCRATCH:
            return task.spec.create(), []
        return with_weights(task.spec.create(), source.path, task.read_weights), []
    return ckpt.restore(source.path, manifest, task.spec.shapes, task.spec.shardings, feed)


def _check_scale(path: Place, manifest: Mapping[str, Any]) -> None:
    """Raises `CheckpointError` if adapters of a checkpoint would be another network's here.

    Their factors do not say what the product is scaled by; of another rank, their shapes differ.
    """
    ranks = [name for name in manifest if name.endswith('.adapter.rank')]
    saved = ckpt.manifest_of(path) if ranks and (path / 'state').is_dir() else {}
    for rank in ranks:
        alpha = rank.replace('.rank', '.alpha')
        old, new = (m.get(alpha, m.get(rank)) for m in (saved, manifest))
        if saved.get(rank) == manifest[rank] and old != new:
            raise CheckpointError(f'config.init_from: the adapters in {path} are of {alpha} '
                                  f'{old:g}, here it is {new:g}; set config.{alpha}={old:g}')


def with_weights(state: st.TrainState, path: Place,
                 read_weights: Callable[[str], Any]) -> st.TrainState:
    """A fresh `state` with the weights at `path`: student, critic and EMA of a checkpoint, or
    student and EMA alone where there is no more, the critic staying the teacher's."""
    layout = lambda tree: jax.tree.map(lambda x: x.sharding, tree)
    if (path / 'state').is_dir():
        for name in WEIGHTS:
            old = getattr(state, name)
            if old is not None:
                # One at a time: the others need not be there twice.
                new = ckpt.restore_part(path, name, old, layout(old))
                state = dataclasses.replace(state, **{name: new})
        return state
    found = read_weights(str(path))
    try:
        ckpt.must_match(found, state.student)
    except ValueError as e:
        raise CheckpointError(f'config.init_from: {path} holds no student of this shape '
                              f'({e})') from e
    # Copies in the state's types: its buffers are donated, and these may be another's.
    for name in ('student', 'ema'):
        old = getattr(state, name)
        types, where = jax.tree.map(lambda x: x.dtype, old), layout(old)
        state, old = dataclasses.replace(state, **{name: None}), None  # not there twice
        copy = lambda tree, types=types: jax.tree.map(lambda x, t: x.astype(t) + 0, tree, types)
        state = dataclasses.replace(state, **{name: jax.jit(copy, out_shardings=where)(found)})
    return state


def described(source: Source, workdir: Place, step: int) -> str:
    """Where the state came from, for the log; '' of a run from scratch."""
    if source.kind == OWN:
        return f'resumed {workdir} at step {step}'
    if source.kind == RESUME:
        return f'resumed {source.path} at step {step}, in {workdir} from here on'
    return f'weights from {source.path}, everything else fresh' if source.kind == INIT else ''
