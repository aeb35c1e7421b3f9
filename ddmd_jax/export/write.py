"""Exports a student of a run, and pushes what was exported to a hub."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from ddmd_jax.export import card
from ddmd_jax.export.student import Student, open_student
from ddmd_jax.families.family import Exported
from ddmd_jax.models.adapters import LoRA
from ddmd_jax.parallel import sharding
from ddmd_jax.util import buckets, files, places, processes, shape
from ddmd_jax.util.errors import UserError
from ddmd_jax.util.places import Place
from ddmd_jax.util.text import first_line
from ddmd_jax.weights import flat, lora
from ddmd_jax.weights.flat import WeightsError

COMMITTED = 'commit_success.txt'  # Orbax's mark of a checkpoint in a bucket that is complete

MARK = '.export.json'  # in a folder that an export is still writing to


@dataclasses.dataclass(frozen=True)
class Wanted:
    """How a student is exported."""

    format: str = 'diffusers'  # or 'safetensors', 'orbax', 'lora'
    dtype: str = 'float32'  # of the tensors, or 'bfloat16', 'float16'
    ema: bool = True  # the EMA student, or the raw one
    sampler: str = ''  # of the pipeline's scheduler, of `sampling.STUDENT_MODES`; '' is the run's
    teacher: str = ''  # path of the teacher if it moved
    step: int | None = None  # checkpoint; None is the newest
    variant: str | None = None  # of the teacher's files; None is the run's
    naming: str = 'diffusers'  # of a LoRA's tensors, of `lora.NAMINGS`


def export(workdir: Place, out: Place, wanted: Wanted = Wanted()) -> list[Place]:
    """Writes a student of a run into `out`; returns the model's files, then the card.

    One process does it, with all of its devices.

    Raises:
      CheckpointError: there is no checkpoint, it is damaged, or it has no student.
      WeightsError: the teacher cannot be read, `out` holds a file of the same name, or the
        family has no such format.
    """
    sharding.all_devices()
    student = open_student(workdir, wanted.teacher, wanted.ema, wanted.step, wanted.variant)
    family, form = student.export, wanted.format
    write = {'diffusers': family.write_pipeline, 'safetensors': family.write_weights,
             'orbax': _write_orbax, 'lora': None}[form]
    names = {**family.names, 'orbax': ('params',)}
    if student.binding.leans and family.adapters:
        names['lora'] = (lora.FILE, 'scheduler')
        if form == 'lora':
            write = functools.partial(_write_lora, student, wanted.naming)
    elif form == 'lora':
        raise WeightsError(f'{workdir} trained all of its student, which has no adapters; give '
                           '--format=diffusers' if not student.binding.leans else
                           f'{student.family} has no published names, as a LoRA needs; give '
                           '--format=safetensors, which merges it')
    if write is None or form not in names:
        raise WeightsError(f'students of {student.family} are not written as {form}; give --format='
                           f'{" or ".join(names)}')
    _clear(out)
    for name in (*names[form], *card.NAMES):  # before anything large is read
        if (out / name).exists():
            raise WeightsError(f'{out / name} exists already; choose another place or delete it')
    told = card.read(student)
    trained = student.read()
    exported = Exported(trained if form == 'lora' else student.network(trained), student.source,
                        student.step, student.steps, student.time, wanted.dtype,
                        wanted.sampler or student.sampler)
    weights = flat.corner_identity(trained, student.mesh)
    with _marked(out, [*names[form], *card.NAMES]), files.filled(out) as folder:
        write(exported, folder)
        card.write(student, folder, form, exported, weights, told)
        if form == 'orbax' and places.is_url(out):  # without it Orbax takes it for half written
            (folder / 'params' / COMMITTED).touch()
        return [out / name for name in (*names[form], card.README) if (folder / name).exists()]


@contextlib.contextmanager
def _marked(out: Place, names: list[str]) -> Iterator[None]:
    """Inside, a file in `out` says what is being written there, by whom: see `_clear`."""
    out.mkdir(parents=True, exist_ok=True)
    files.write_json(out / MARK, {'names': names, **processes.name()})
    try:
        yield
    except BaseException:
        _remove(out, names)
        raise
    (out / MARK).unlink()


def _clear(out: Place) -> None:
    """Takes away what an export that did not come to its end has left in `out`.

    Raises:
      WeightsError: it is still at it.
    """
    try:
        found = shape.load((out / MARK).read_bytes(), {'names': [str], 'process?': shape.count})
    except FileNotFoundError:
        return
    except ValueError as e:
        raise WeightsError(f'{out / MARK} is of an export that did not end, and cannot be read '
                           f'({first_line(e)}); choose another place or delete {out}') from e
    names = [name for name in found['names'] if Path(name).name == name]
    if processes.running(found) and found['process'] != os.getpid():
        raise WeightsError(f'{out} is being written by process {found["process"]}; wait for it, or '
                           'choose another place')
    _remove(out, names)


def _remove(out: Place, names: Sequence[str]) -> None:
    # And what is called so until it is whole: `files.replacing`'s, Orbax's.
    for path in list(out.iterdir()) if out.is_dir() else []:
        if path.name in names or path.name.startswith(tuple(
                f'{name}{end}' for name in names for end in ('.tmp', '.orbax-checkpoint-tmp'))):
            files.remove(path)
    files.remove(out / MARK)


def _write_lora(student: Student, naming: str, exported: Exported, out: Path) -> None:
    """The adapters, and the scheduler that takes the student's steps if it has one."""
    assert student.export.adapters and isinstance(student.binding, LoRA)
    if student.export.write_scheduler:
        student.export.write_scheduler(exported, out)  # may refuse
    lora.write(out / lora.FILE, lora.on_host(exported.params, student.binding.scale),
               student.export.adapters, naming, jnp.dtype(exported.dtype),
               student.saved.manifest.get('teacher_identity', ''))


def _write_orbax(student: Exported, out: Path) -> None:
    """``OUT/params``: the parameters by their names here."""
    cast = jax.tree.map(lambda x: x.astype(student.dtype), student.params)
    for name, leaf in flat.flatten(cast).items():
        flat.check_finite(out / 'params', name, leaf)
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as writer:
        writer.save(out / 'params', args=ocp.args.StandardSave(cast))


def push(folder: Place, name: str, private: bool) -> str:
    """Uploads `folder` as the model ``owner/name``, made if need be; its address.

    Raises:
      UserError: no network, no login, no such owner; the folder is as it was.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=buckets.local(folder),
                          commit_message='ddmd_jax.export')
    except Exception as e:  # network, login or name: the line names all three
        raise UserError(f'{name} cannot be pushed ({first_line(e)}); {folder} is complete: check '
                        f'the name, the network and your login (hf auth login), then '
                        f'`hf upload {name} {folder}`') from e
    return f'{api.endpoint}/{name}'
