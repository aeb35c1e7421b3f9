"""What a request for images needs: prompts, places to write to, weights, and writing itself."""

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from ddmd_jax import families
from ddmd_jax.data.prompts import build as prompt_sets, files as prompt_files
from ddmd_jax.data.prompts.text import normalise
from ddmd_jax.diffusion import drawing
from ddmd_jax.evaluation import pictures
from ddmd_jax.families import Family, LoadOptions, Teacher
from ddmd_jax.parallel import sharding
from ddmd_jax.train import prompts as sources
from ddmd_jax.train.durable import checkpoint as ckpt


class RequestError(ValueError):
    """What is asked for cannot be made."""


# --- What is asked for ---


def read_prompts(given: Sequence[str], name: str, split: str) -> list[str]:
    """`given`, then those of the file or set `name` ('' is none), normalised.

    Empty ones of `given` are the null prompt; those of a file are left out.

    Raises:
      DataFileError: no such file or set, or it cannot be read.
      RequestError: it holds no prompt.
    """
    found = [normalise(text) for text in given]
    if name:
        texts: Iterable[str] = (
            prompt_sets.open_set(name, split) if Path(name).expanduser().is_dir()
            else prompt_files.read(Path(name).expanduser(), 'prompt'))
        more = list(filter(None, map(normalise, texts)))
        if not more:
            raise RequestError(f'{name} holds no prompt')
        found += more
    return found


def places(out: Path, named: Sequence[drawing.ImageName], sheet: bool, suffix: str,
           overwrite: bool) -> tuple[list[Path], Path | None]:
    """(a file for each image, the sheet's or None); their folder is made.

    If `out` is a file, the sheet is that file, and images are not written one by one.

    Raises:
      RequestError: one of them is there already, or the folder cannot be made.
    """
    if out.suffix.lower() not in pictures.SUFFIXES:
        folder = out
        files = [out / name for name in drawing.file_names(named, suffix)]
        grid = out / f'grid{suffix}' if sheet else None
    elif sheet:
        folder, files, grid = out.parent, [], out
    elif len(named) == 1:
        folder, files, grid = out.parent, [out], None
    else:
        raise RequestError(f'--out {out} is one file for {len(named)} images; name a folder, or '
                           'give --grid for a sheet of them')
    there = [file for file in (*files, grid) if file and file.exists()]
    if there and not overwrite:
        more = f' and {len(there) - 1} more' if there[1:] else ''
        raise RequestError(f'{there[0]} exists already{more}; choose another --out, or replace '
                           'with --overwrite')
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise RequestError(f'--out {folder} cannot be made ({e.strerror}); choose another') from e
    if not os.access(folder, os.W_OK):
        raise RequestError(f'--out {folder} cannot be written; choose another')
    return files, grid


@dataclasses.dataclass(frozen=True)
class Model:
    """Where the weights are: the teacher's, and those of a run's student if `workdir` is one.

    `steps` and `shift` are what the student was trained for, `identity` the teacher's then.
    """

    family: Family
    path: str
    dtype: str
    size: tuple[int, ...] | None
    workdir: Path | None = None
    step: int = 0
    steps: int = 1
    shift: float | None = None
    identity: str | None = None


def find_model(workdir: Path | None, path: str, size: tuple[int, ...] | None) -> Model:
    """What a run's newest checkpoint says of its teacher and student; reads no weights.

    `path` is the teacher's if it has moved, or if there is no `workdir`; `size` that of the
    images, None the run's own.

    Raises:
      CheckpointError: there is no checkpoint, or its manifest cannot be read.
      RequestError: it is of a pre-training or an unknown family, or has no such size.
    """
    if workdir is None:
        family, path = families.find(path)
        if family.load is None:
            raise RequestError(f'--teacher_path {path}: of {family.name} the text side alone is '
                               'here')
        model = Model(family, path, family.dtype, size)
    else:
        model = _of_run(workdir, *ckpt.read_manifest(workdir), path, size)
    if size and (one := model.family.one_size):
        raise RequestError(f'--size: {model.family.name} has but one, {one[0]},{one[1]}; leave it '
                           'out')
    return model


def _of_run(workdir: Path, step: int, manifest: Mapping[str, Any], path: str,
            size: tuple[int, ...] | None) -> Model:
    if manifest.get('task', 'distill') != 'distill':
        raise RequestError(f'{workdir} trains a teacher, there is no student in it; draw with '
                           '--teacher --teacher_path=TEACHER.safetensors')
    try:
        family = families.get(str(manifest.get('teacher.name')))
    except families.UnknownFamily as e:
        raise RequestError(f'{workdir} distils a teacher that is unknown here: {e}') from e
    first = tuple(manifest[name] for name in ('data.sizes.0.0', 'data.sizes.0.1')
                  if name in manifest)
    path = '' if path == family.name else path or manifest.get('teacher.path', '')
    return Model(family, path, manifest.get('teacher.dtype', family.dtype),
                 size or first or None, workdir, step, manifest.get('student.steps', 1),
                 manifest.get('method.shift'), manifest.get('teacher_identity'))


# --- With whose weights ---


def request(named: Sequence[drawing.ImageName], model: Model, mesh: Mesh) -> drawing.Request:
    """The images asked for with their prompts encoded; the text encoder is let go.

    Raises:
      WeightsError: the text encoder cannot be read.
    """
    text = model.family.load_text(LoadOptions(model.path, mesh, model.dtype))
    return drawing.Request.encoded(named, lambda texts: sources.encode_texts(texts, text, mesh))


def load(model: Model, whose: Sequence[str], mesh: Mesh) -> tuple[Teacher, dict[str, Any]]:
    """(the teacher without its weights, parameters of those of `whose` on `mesh`).

    `whose` holds 'student', 'teacher' or both.

    Raises:
      CheckpointError: the student cannot be read, or has another shape.
      RequestError: the teacher's folder has no decoder.
      WeightsError: the teacher cannot be read.
    """
    # Kernels in the type of the products: predictions are the same, and half is read.
    teacher = model.family.load_teacher(LoadOptions(
        model.path, mesh, model.dtype, model.size, param_dtype=model.dtype))
    if teacher.latents.decode is None:
        raise RequestError(f'{model.path} has no autoencoder beside its transformer; give the '
                           "pipeline's folder with --teacher_path")
    if model.identity not in (None, teacher.identity) and 'student' in whose:
        ckpt.warn(f'{model.workdir} distils another teacher than the one at {model.path}')
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), teacher.params)
    layout = sharding.shard_tree(abstract, teacher.rules, mesh)
    params = {}
    if 'teacher' in whose:
        params['teacher'] = jax.device_put(teacher.params, layout)
    teacher = dataclasses.replace(teacher, params=None)  # no longer held on to
    if model.workdir and 'student' in whose:
        params['student'] = ckpt.restore_ema(model.workdir, model.step, abstract, layout)
    return teacher, params


# --- Writing ---


def write(batches: Iterable[np.ndarray], named: Sequence[drawing.ImageName], files: Sequence[Path],
          about: Mapping[str, str], keep: int) -> np.ndarray:
    """Writes every image to its file as it comes, if there are files; returns the first `keep`.

    Args:
      batches: images ``[<= B, H, W, 3]`` in [-1, 1], in the order of `named` and of `files`.
      about: what each says of itself beside its prompt and number.
    """
    kept, start = [], 0
    for images in batches:
        for image, name, file in zip(images, named[start:], files[start:]):
            pictures.save(Image.fromarray(pictures.to_uint8(image)), file, {
                'prompt': name.prompt, 'image': str(name.number), **about})
        kept.append(images[:max(0, keep - start)])
        start += len(images)
    return np.concatenate(kept)
