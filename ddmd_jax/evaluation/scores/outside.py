"""Figures that a published package measures, run by a Python of its own.

Such a package pins other versions than ours (hpsv3: transformers 4.45, deepspeed), so that it lives
in an environment that the user makes. A process there is asked for one picture after another: a
line of JSON goes in, ``{"file", "sha256", "prompt"}``, its picture beside it as a PNG; a line comes
out, ``{"file", "sha256", "score"}``, the hash that of the file which was scored. One picture at a
time stands on the disk, and no score depends on another picture.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO

import numpy as np
from tqdm import tqdm

from ddmd_jax.evaluation import pictures as png
from ddmd_jax.evaluation.scores.scorers import ScoreError
from ddmd_jax.util import shape
from ddmd_jax.util.text import first_line

ANSWER = {'file': str, 'sha256': str, 'score': shape.finite}


@dataclasses.dataclass(frozen=True)
class Outside:
    """A figure of pictures and their prompts that another Python measures.

    Attributes:
      title: for messages.
      package: what is installed there, as pip calls it.
      program: the file that is run there, beside this one; paths of weights are its arguments.
    """

    title: str
    package: str
    program: str


OUTSIDE = {'hps_v3': Outside('HPS v3', 'hpsv3', 'hps_v3_program.py')}


def run(scorer: Outside, python: str, weights: Sequence[str], images: Iterable[np.ndarray],
        prompts: Sequence[str]) -> np.ndarray:
    """Figures ``[N]`` fp64 of N pictures ``[H, W, 3] uint8``, any sizes, in the package's unit.

    Args:
      scorer: which.
      python: the Python of the package's environment; ours (PYTHONPATH) is kept from it.
      weights: files of them; none are those that the package fetches.
      images: N pictures.
      prompts: N texts.

    Raises:
      ScoreError: there is no such Python or package, it ended before its last score, a score is
        not finite or of another picture than was asked for, or there are more or fewer pictures
        than prompts.
    """
    code = (Path(__file__).parent / scorer.program).read_text(encoding='utf-8')
    own = {name: x for name, x in os.environ.items() if name not in ('PYTHONPATH', 'PYTHONHOME')}
    scores: list[float] = []
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as said:
        try:
            process = subprocess.Popen(  # -u: what it says last is what it has told last
                [os.path.abspath(python), '-u', '-c', code, *map(os.path.abspath, weights)],
                bufsize=0, cwd=folder, env=own, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=said)
        except OSError as e:
            raise ScoreError(f'{python} cannot be run ({e.strerror}); name the Python of an '
                             f'environment that has {scorer.package}') from e
        with process:
            try:
                for image in tqdm(images, scorer.title, len(prompts), unit=' images',
                                  file=sys.stderr, dynamic_ncols=True):
                    if len(scores) == len(prompts):
                        raise ScoreError(f'{scorer.title}: there are more pictures than '
                                         f'{len(prompts)} prompts')
                    file, data = Path(folder, f'{len(scores):06d}.png'), png.png(image, {})
                    file.write_bytes(data)
                    asked = {'file': file.name, 'sha256': hashlib.sha256(data).hexdigest(),
                             'prompt': prompts[len(scores)]}
                    if not (answer := _answer(process, asked)):
                        raise ScoreError(_why(scorer, python, process, said,
                                              f'{len(scores)} of {len(prompts)}'))
                    scores.append(_checked(scorer, answer, asked))
                    file.unlink()
                if len(scores) < len(prompts):
                    raise ScoreError(f'{scorer.title}: there are {len(scores)} pictures for '
                                     f'{len(prompts)} prompts')
                if more := process.communicate()[0].splitlines():
                    raise ScoreError(f'{scorer.title}: {len(more)} score{"s" * (len(more) > 1)} '
                                     'more than was asked for')
            finally:
                process.kill()
    return np.asarray(scores, np.float64)


def _answer(process: subprocess.Popen[bytes], asked: dict[str, str]) -> bytes:
    """The line that answers; b'' if the process has ended."""
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(json.dumps(asked).encode() + b'\n')
    except BrokenPipeError:
        return b''
    return process.stdout.readline()


def _checked(scorer: Outside, answer: bytes, asked: dict[str, str]) -> float:
    """The score of an answer; raises `ScoreError` if it is none, or not of what was asked."""
    try:
        found = shape.load(answer, ANSWER)
    except ValueError as e:
        raise ScoreError(f'{scorer.title} of {asked["file"]}: {first_line(e)}; is the package '
                         'whole, and are its weights?') from e
    for name in ('file', 'sha256'):
        if found[name] != asked[name]:
            raise ScoreError(f'{scorer.title}: asked for {name} {asked[name][:12]}, told a score '
                             f'of {found[name][:12]}: of another picture')
    return found['score']


def _why(scorer: Outside, python: str, process: subprocess.Popen[bytes], said: IO[bytes],
         count: str) -> str:
    """Why there are no more answers: the last that the process has said, and its code."""
    code = process.wait()
    said.seek(0)
    last = next((line.strip() for line in reversed(said.read().decode(
        errors='replace').splitlines()) if line.strip()), 'without a word')[:300]
    if last.startswith('ModuleNotFoundError'):
        return f'{python}: {last}; install {scorer.package} there, or name another with --python'
    return f'{python} ended with code {code} after {count} pictures ({last})'
