"""Reading Orbax checkpoints: state, data iterator, and the manifest, which identifies their run."""

import dataclasses
import hashlib
import importlib.metadata
import json
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from tqdm import tqdm

import ddmd_jax
from ddmd_jax.config import dotted, fields_of
from ddmd_jax.train.durable import checksums
from ddmd_jax.train.feed import Feed
from ddmd_jax.util import buckets, errors, files, places, shape
from ddmd_jax.util.errors import UserError
from ddmd_jax.util.places import Place
from ddmd_jax.util.text import first_line
from ddmd_jax.weights import flat

PACKAGES = ('jax', 'flax', 'optax', 'orbax-checkpoint')
FORMAT_FIELD, FORMAT = 'format', 2  # of the state's tree; a manifest without it has format 1
INTERVAL = 'interval'  # beside the data's state: metrics that had not been logged yet
# In a manifest for those who look for it: what lies there counts.
PLACES = ('teacher.path', 'teacher.variant')
LATER = ('teacher_time', 'encoder_identity', 'data_identity')  # not in older checkpoints, or 'none'
VERSION = 'version.'  # in front of a package's name in a manifest; these only warn


class CheckpointError(UserError):
    """A checkpoint that does not belong to this run, or cannot be read."""


def versions() -> dict[str, str]:
    """Versions of the packages that write a checkpoint, as its manifest has them.

    Ours is the one of the code that runs: a checkout need not be installed.
    """
    others = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {f'{VERSION}{name}': version
            for name, version in {'ddmd_jax': ddmd_jax.__version__, **others}.items()}


def comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config that a checkpoint must agree with, flattened to dotted names."""
    fields = dotted(config)
    # How long, how loud, how often, on which mesh: all else would silently be another experiment.
    free = {f.path for f in fields_of(json.loads(json.dumps(config)))
            if f.may_change or f.later and fields.get(f.path) == f.default}
    # Where everything is trained, nothing is said of adapters: as before there were any.
    silent = tuple(f'{whose}.adapter.' for whose in ('student', 'critic')
                   if fields.get(f'{whose}.adapter.kind', 'full') == 'full')
    return {k: v for k, v in fields.items() if k not in free and not k.startswith(silent)}


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """``field: saved -> current`` for every field that differs."""
    names = sorted(set(saved) | set(current))
    show = lambda d, n: repr(d[n]) if n in d else 'absent'
    return [f'{n}: {show(saved, n)} -> {show(current, n)}' for n in names
            if saved.get(n) != current.get(n) or (n in saved) != (n in current)]


def split_versions(manifest: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(entries that identify the run, entries with the versions of packages)."""
    is_version = lambda name: name.startswith(VERSION)
    return ({k: v for k, v in manifest.items() if not is_version(k)},
            {k: v for k, v in manifest.items() if is_version(k)})


def warn(text: str) -> None:
    """One line on stderr, from process 0."""
    if jax.process_index() == 0:
        tqdm.write(f'warning: {text}', file=sys.stderr)


def anywhere(flag: bool) -> bool:
    """Whether `flag` is true in any process; all of them must ask."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


class UnreadableError(CheckpointError):
    """A checkpoint that should be readable is not; `reason` is Orbax's."""

    def __init__(self, folder: Place, reason: str):
        words = ('its files are what was written, so it may come from other versions: see '
                 f'`python -m ddmd_jax.checkpoints {folder.parent.parent}`'
                 if checksums.known(folder) else
                 'nobody has summed up its files: its run may have been killed while it wrote '
                 'them; with that folder moved away, the run begins before it')
        super().__init__(f'checkpoint {folder} cannot be read ({reason}); {words}')
        self.reason = reason


def agree(error: BaseException | None, doing: str) -> None:
    """Raises in every process what the machine is at fault for in one; all of them must ask.

    Raises:
      EnvironmentFault: `error` is one, here or in another process.
    """
    fault = errors.environment(error) if error else None
    if anywhere(fault is not None):
        raise fault or errors.EnvironmentFault(f'{doing} has failed in another process, whose '
                                               'output says why')


def restore(folder: Place, manifest: Mapping[str, Any], abstract: Any, shardings: Any,
            data: Feed | None = None) -> tuple[Any, list[dict[str, Any]]]:
    """(the state of the checkpoint in `folder`, read straight into `shardings`; its interval).

    Raises:
      CheckpointError: it is another run's, by `manifest`, or it cannot be read.
    """
    check_manifest(folder, manifest)
    target = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings)
    parts = {'state': ocp.args.StandardRestore(target)}
    if data is not None:
        parts['data'] = ocp.args.JsonRestore()
    restored, interval, failed = None, [], None
    try:
        restored = _read(folder, parts)
        if data is not None:
            interval = [{k: np.float32(v) for k, v in x.items()}
                        for x in restored.data.pop(INTERVAL, [])]
            data.set_state(restored.data)
    except Exception as e:  # Orbax raises many kinds; `agree` tells the machine's faults apart
        failed = e
    agree(failed, f'reading {folder}')
    if anywhere(failed is not None):
        raise UnreadableError(folder, first_line(failed) if failed else 'by another process')
    return restored.state, interval


def _read(folder: Place, parts: Mapping[str, Any]) -> Any:
    """Items of one checkpoint, by an Orbax that looks at no other."""
    folder = _reachable(folder)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        return reader.restore(folder, args=ocp.args.Composite(**parts))


def _reachable(folder: Place) -> Place:
    """Where Orbax can read a checkpoint: it has no arrays behind s3://, of which a copy is made."""
    return buckets.local(folder) if places.scheme(folder) == 's3' else folder


def manifest_of(folder: Place) -> dict[str, Any]:
    """The manifest of the checkpoint in `folder`, as Orbax has written it; needs no device.

    Raises:
      CheckpointError: there is none, it is no JSON object, or not what was written.
      EnvironmentFault: it cannot be read.
    """
    try:
        raw = files.patiently((folder / 'manifest' / 'metadata').read_bytes)
        if fault := checksums.fault_of(folder, 'manifest/metadata', raw):
            raise ValueError(fault)
        return shape.load(raw, {})
    except (OSError, ValueError) as e:
        errors.raise_environment(e)
        raise CheckpointError(
            f'checkpoint {folder} has no readable manifest ({first_line(e)}); see what is damaged '
            f'with `python -m ddmd_jax.checkpoints {folder.parent.parent} --verify`') from e


def check_manifest(folder: Place, manifest: Mapping[str, Any]) -> None:
    """Refuses another run's checkpoint, naming each difference; other versions only warn.

    Raises:
      CheckpointError: it is another run's, of another format, or its manifest cannot be read.
    """
    (saved, wrote), (current, reads) = map(split_versions, (manifest_of(folder), manifest))
    form = saved.pop(FORMAT_FIELD, 1)
    for entries in (saved, current):
        for name in (FORMAT_FIELD, *PLACES):
            entries.pop(name, None)
    for name in LATER:
        if saved.get(name, 'none') == 'none':
            for entries in (saved, current):
                entries.pop(name, None)
    if form != FORMAT:
        raise CheckpointError(
            f'checkpoint {folder} was written by an incompatible version (format {form}, this one '
            f'{FORMAT}); start a new run from its weights: another --workdir and '
            f'--config.init_from={folder}')
    found = differences(saved, current)
    if found:
        raise CheckpointError(
            f'checkpoint {folder} was written by another run; '
            f'choose another --workdir, or set back: {"; ".join(found)}')
    if wrote and reads and wrote != reads:
        warn(f'checkpoint {folder} was written with other versions: '
             f'{"; ".join(differences(wrote, reads)).replace(VERSION, "")}')


def set_aside(directory: Place) -> None:
    """Moves damaged checkpoints that are newer than the newest good one out of `directory`.

    Raises:
      CheckpointError: every checkpoint is damaged; then none is moved.
    """
    good, damaged = newest_good(directory)
    if damaged:
        move_aside(directory, damaged, good)


def newest_good(directory: Place) -> tuple[int | None, dict[int, str]]:
    """(newest checkpoint that is not damaged, what is wrong with those after it, by step).

    Raises:
      CheckpointError: there are checkpoints, and every one is damaged.
    """
    damaged: dict[int, str] = {}
    for step in reversed(checksums.steps(directory)):
        fault = damage(directory / str(step))
        if not fault:
            return step, damaged
        damaged[step] = fault
    if damaged:
        raise CheckpointError(
            f'every checkpoint in {directory} is damaged: '
            f'{"; ".join(f"checkpoints/{s}: {why}" for s, why in damaged.items())}; copy one back, '
            'or choose another --workdir')
    return None, {}


def damage(folder: Place) -> str:
    """The first fault in the files of a checkpoint, or ''; all processes read them together.

    Raises:
      EnvironmentFault: a file cannot be read just now, in one of them: nothing is known of it.
    """
    fault, failed = '', None
    try:
        fault = checksums.fault(folder, jax.process_index(), jax.process_count())
    except Exception as e:
        failed = errors.environment(e, folder)
        if failed is None and not isinstance(e, OSError):
            raise
        failed = failed or errors.EnvironmentFault(
            f'{getattr(e, "filename", None) or folder} cannot be read ({first_line(e)}); nothing '
            'was moved: see to it, then run the same command again')
    agree(failed, f'reading {folder}')
    return (fault or 'found by another process') if anywhere(bool(fault)) else ''


def move_aside(directory: Place, damaged: Mapping[int, str], good: int) -> None:
    """Process 0 moves checkpoints to ``damaged/`` beside `directory`; everybody waits for it."""
    if jax.process_index() == 0:
        if not places.is_url(directory):
            (directory.parent / 'damaged').mkdir(exist_ok=True)
        for step, fault in damaged.items():
            place = _free(directory.parent / 'damaged' / str(step))
            files.move(directory / str(step), place)
            warn(f'checkpoint {directory / str(step)} is damaged ({fault}); moved to {place}, '
                 f'going on from step {good}')
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices('damaged checkpoints moved')


def _free(place: Place) -> Place:
    """`place`, or the first of place.1, place.2, ... that does not exist."""
    names = (place.with_name(f'{place.name}.{i}') if i else place for i in range(10**6))
    return next(name for name in names if not name.exists())


@dataclasses.dataclass(frozen=True)
class Saved:
    """A checkpoint of a run, for commands that only read: the one way to its weights."""

    folder: Place
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.folder.name)

    def identities(self) -> dict[str, Any]:
        """What tells it from other checkpoints, wherever it lies: its step, hashes of its manifest
        and of its checksums."""
        hashed = lambda raw: hashlib.sha256(raw).hexdigest()[:16]
        summed = self.folder / checksums.NAME
        return {'step': self.step,
                'manifest': hashed(json.dumps(self.manifest, sort_keys=True).encode()),
                'checksums': hashed(files.patiently(summed.read_bytes)) if summed.is_file() else ''}

    def part(self, name: str, abstract: Any, shardings: Any) -> Any:
        """See `restore_part`; raises `CheckpointError` as well where a file is damaged."""
        if fault := damage(self.folder):
            raise CheckpointError(
                f'checkpoint {self.folder} is damaged ({fault}); start the run again, which goes '
                'back to the newest good one, or name an older one with --step')
        return restore_part(self.folder, name, abstract, shardings)


def saved(workdir: Place, step: int | None = None) -> Saved:
    """The checkpoint `step` of a run's folder, or its newest; reads none of its weights.

    Raises:
      CheckpointError: there is no such checkpoint, or its manifest cannot be read.
    """
    directory = checkpoints_in(workdir)
    steps = checksums.steps(directory)
    if not steps:
        raise CheckpointError(f'{directory} is empty: the run has saved nothing yet')
    if step is not None and step not in steps:
        raise CheckpointError(f'{directory} has no step {step}; there are '
                              f'{", ".join(map(str, steps))}')
    folder = directory / str(steps[-1] if step is None else step)
    return Saved(folder, manifest_of(folder))


def checkpoints_in(workdir: Place) -> Place:
    """Raises `CheckpointError` if a run's folder has no folder of checkpoints."""
    directory = workdir / 'checkpoints'
    if not directory.is_dir():
        raise CheckpointError(f'{workdir} holds no checkpoints; give the --workdir of a run')
    return directory


def restore_part(folder: Place, name: str, abstract: Any, shardings: Any) -> Any:
    """One field of the state of the checkpoint in `folder`; nothing else is read.

    Raises:
      CheckpointError: it cannot be read, or has other shapes than `abstract`.
      EnvironmentFault: the machine is at fault.
    """
    target = {name: jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings)}
    handler = ocp.PyTreeCheckpointHandler()
    try:
        folder = _reachable(folder)
        with ocp.Checkpointer(handler) as reader:
            # A partial restore hands back the request for a leaf that is missing.
            must_match(handler.metadata(folder / 'state').tree[name], abstract)
            return reader.restore(folder / 'state', args=ocp.args.PyTreeRestore(
                target, restore_args=ocp.checkpoint_utils.construct_restore_args(target),
                partial_restore=True))[name]
    except Exception as e:
        errors.raise_environment(e)
        words = (f'holds no {WORDS.get(name, name)} of this shape'
                 if isinstance(e, ValueError | KeyError) else 'cannot be read')
        raise CheckpointError(f'{folder / "state"} {words} ({first_line(e)})') from e


WORDS = {'ema': 'student'}  # what a user calls a field of the state


def must_match(saved: Any, abstract: Any) -> None:
    """Raises `ValueError` naming the first leaf that is not in both trees with one shape."""
    found, wanted = ({path: tuple(leaf.shape) for path, leaf in flat.flatten(tree).items()}
                     for tree in (saved, abstract))
    if found and wanted and found.keys().isdisjoint(wanted):  # of a network and of adapters, say
        raise ValueError('they share no parameter; is adapter.kind the same?')
    for path in sorted(found | wanted):
        if found.get(path) != wanted.get(path):
            raise ValueError(f'{path} is {found.get(path, "absent")}, not '
                             f'{wanted.get(path, "wanted")}')
