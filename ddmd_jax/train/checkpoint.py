"""Orbax checkpoints: state, data iterator and a manifest that says whose they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from ddmd_jax.train.feed import Feed
from ddmd_jax.weights import flat

# What may differ between a checkpoint and the run that resumes it: how long, how loud,
# how often, on which mesh, how it is sampled. Everything else would silently be another experiment.
FREE_SECTIONS = ('log', 'checkpoint', 'eval', 'mesh')
FREE_FIELDS = ('train.steps', 'student.sampler', 'teacher.remat', 'teacher.attention',
               'train.teacher_passes', 'train.offload', 'data.path')  # its identity counts


class CheckpointError(RuntimeError):
    """A checkpoint that does not belong to this run, or cannot be read."""


def comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config that a checkpoint must agree with, flattened to dotted names."""
    plain = json.loads(json.dumps(config))
    kept = {k: v for k, v in plain.items() if k not in FREE_SECTIONS}
    fields = {k.replace('/', '.'): v for k, v in flat.flatten(kept).items()}
    return {k: v for k, v in fields.items() if k not in FREE_FIELDS}


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """``field: saved -> current`` for every field that differs."""
    names = sorted(set(saved) | set(current))
    show = lambda d, n: repr(d[n]) if n in d else 'absent'
    return [f'{n}: {show(saved, n)} -> {show(current, n)}' for n in names
            if saved.get(n) != current.get(n) or (n in saved) != (n in current)]


class Checkpoints:
    """One run's checkpoints under ``workdir/checkpoints``; saving is asynchronous."""

    def __init__(self, workdir: Path, *, keep: int, manifest: Mapping[str, Any]):
        self.manifest = dict(manifest)
        self.directory = workdir / 'checkpoints'
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self.manager = ocp.CheckpointManager(self.directory, options=options)

    @property
    def latest(self) -> int | None:
        return self.manager.latest_step()

    def save(self, step: int, state: Any, data: Feed) -> None:
        """Starts saving; returns once the arrays are copied to the host."""
        if step == self.latest:
            return
        self.manager.save(step, args=ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            # One counter of global batches, the same in every process: Grain's own handler
            # writes a file a process, which another number of processes could not read.
            data=ocp.args.JsonSave(data.get_state()),
            manifest=ocp.args.JsonSave(self.manifest)))

    def restore(self, abstract: Any, shardings: Any,
                data: Feed | None = None) -> Any:
        """The newest state, read straight into `shardings`; `data` is moved to its place.

        Raises:
          CheckpointError: it was written by another config or teacher (each difference is
            named), or it cannot be read.
        """
        step = self.latest
        self._check_manifest(step)
        target = jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings)
        parts = {'state': ocp.args.StandardRestore(target)}
        if data is not None:
            parts['data'] = ocp.args.JsonRestore()
        try:
            restored = self.manager.restore(step, args=ocp.args.Composite(**parts))
            if data is not None:
                data.set_state(restored.data)
            return restored.state
        except Exception as e:  # Orbax raises many kinds; the user needs the folder and a cure
            reason = (str(e).splitlines() or [type(e).__name__])[0]
            raise CheckpointError(
                f'checkpoint {self.directory / str(step)} cannot be read ({reason}); delete '
                'that folder to fall back to the one before it') from e

    def _check_manifest(self, step: int) -> None:
        try:
            args = ocp.args.Composite(manifest=ocp.args.JsonRestore())
            saved = self.manager.restore(step, args=args).manifest
        except Exception as e:
            raise CheckpointError(f'checkpoint {self.directory / str(step)} has no readable '
                                  'manifest; delete that folder or choose another --workdir') from e
        found = differences(saved, self.manifest)
        if found:
            raise CheckpointError(
                f'checkpoint {self.directory / str(step)} was written by another run; '
                f'choose another --workdir, or set back: {"; ".join(found)}')

    def wait(self) -> None:
        """Blocks until saves under way are on disk."""
        self.manager.wait_until_finished()

    def close(self) -> None:
        self.manager.close()


def read_manifest(workdir: Path) -> tuple[int, dict[str, Any]]:
    """``(newest step, manifest)`` of a run's folder, for commands that only read.

    Raises:
      CheckpointError: there is none, or it cannot be read.
    """
    directory = workdir / 'checkpoints'
    if not directory.is_dir():
        raise CheckpointError(f'{workdir} holds no checkpoints; give the --workdir of a run')
    with ocp.CheckpointManager(directory) as manager:
        step = manager.latest_step()
        if step is None:
            raise CheckpointError(f'{directory} is empty: the run has saved nothing yet')
        try:
            args = ocp.args.Composite(manifest=ocp.args.JsonRestore())
            return step, manager.restore(step, args=args).manifest
        except Exception as e:
            raise CheckpointError(f'checkpoint {directory / str(step)} has no readable '
                                  'manifest; delete that folder to fall back') from e


def restore_ema(workdir: Path, step: int, abstract: Any, shardings: Any) -> Any:
    """The averaged student alone, straight into `shardings`; nothing else is read.

    Raises:
      CheckpointError: it cannot be read, or has other shapes than `abstract`.
    """
    target = {'ema': jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings)}
    folder = workdir / 'checkpoints' / str(step) / 'state'
    handler = ocp.PyTreeCheckpointHandler()
    try:
        with ocp.Checkpointer(handler) as reader:
            # A partial restore takes what is missing for given: it hands back the request.
            _must_match(handler.metadata(folder).tree['ema'], abstract)
            return reader.restore(folder, args=ocp.args.PyTreeRestore(
                target, restore_args=ocp.checkpoint_utils.construct_restore_args(target),
                partial_restore=True))['ema']
    except Exception as e:
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise CheckpointError(f'{folder} holds no student of this shape ({reason})') from e


def _must_match(saved: Any, abstract: Any) -> None:
    """Raises `ValueError` naming the first leaf that is not in both trees with one shape."""
    found, wanted = ({path: tuple(leaf.shape) for path, leaf in flat.flatten(tree).items()}
                     for tree in (saved, abstract))
    for path in sorted(found | wanted):
        if found.get(path) != wanted.get(path):
            raise ValueError(f'{path} is {found.get(path, "absent")}, not '
                             f'{wanted.get(path, "wanted")}')
