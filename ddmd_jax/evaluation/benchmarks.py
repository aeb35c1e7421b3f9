"""Published benchmarks: readers of their prompt files, the places of their images, their results.

Prompts are read from the user's copy, as most may not be redistributed. A reader is a function
``(folder or file, counts) -> prompts``, counts by group; an importer reads what a benchmark's own
scorer has written, as ``{figure: value}``.
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import functools
import hashlib
import io
import json
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddmd_jax.data import DataFileError
from ddmd_jax.data.prompts import files as prompt_files
from ddmd_jax.util import errors, shape
from ddmd_jax.util.errors import UserError
from ddmd_jax.util.text import first_line

Counts = Mapping[str, int]
GENEVAL_SHA256 = '5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13'


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt of a benchmark.

    Attributes:
      text: as it is given to the model.
      group: style, category or task; '' where there are none.
      key: its name in the benchmark's own files.
      about: what the benchmark's scorer wants to know of it, JSON.
    """

    text: str
    group: str = ''
    key: str = ''
    about: Any = None


# --- Prompt files ---


def _read(file: Path, origin: str, wanted: int | None) -> bytes:
    try:
        return file.read_bytes()
    except OSError as e:
        errors.raise_environment(e, file)
        count = '' if wanted is None else f', and is to hold {wanted} prompts'
        raise DataFileError(f'{file} is missing ({e.strerror}); it comes from {origin}'
                            + count) from e


def _of(file: Path, origin: str, wanted: int | None,
        parse: Callable[[bytes], list[str]]) -> list[str]:
    data = _read(file, origin, wanted)
    try:
        found = parse(data)
        if not isinstance(found, list):
            raise ValueError(f'it is of type {type(found).__name__}')
        if not all(isinstance(text, str) for text in found):
            raise ValueError('an entry is no text')
        for text in found:
            text.encode()  # JSON has names for halves of characters, which are no text
    except (ValueError, TypeError, KeyError, RecursionError, pickle.UnpicklingError,
            EOFError) as e:
        raise DataFileError(f'{file} is no list of prompts ({first_line(e)}); fetch it again from '
                            f'{origin}') from e
    _counted(file, len(found), wanted, origin)
    return found


def _counted(file: Path, found: int, wanted: int | None, origin: str) -> None:
    if wanted is not None and found != wanted:
        raise DataFileError(f'{file} holds {found} prompts, the published file {wanted}; fetch it '
                            f'again from {origin}')


def _lines(data: bytes) -> list[str]:
    try:
        text = prompt_files.text(data, 'it')
    except DataFileError as e:
        raise ValueError(e) from e
    return [line.strip() for line in re.split(r'\r\n|\r|\n', text) if line.strip()]


def read_hps_v2(folder: Path, counts: Counts, origin: str) -> list[Prompt]:
    """HPS v2's ``<style>.json``: lists of texts; keys are numbers within a style."""
    prompts = []
    for style, wanted in counts.items():
        file = folder / f'{style}.json'
        texts = _of(file, origin, wanted, json.loads)
        prompts += [Prompt(text, style, f'{i:05d}') for i, text in enumerate(texts)]
    return prompts


def read_hps_v3(folder: Path, counts: Counts, origin: str) -> list[Prompt]:
    """HPS v3's ``benchmark_<Category>.json``: lists of entries with a ``caption``."""
    prompts = []
    for category, wanted in counts.items():
        file = folder / f'benchmark_{category}.json'
        texts = _of(file, origin, wanted, lambda data: [x['caption'] for x in json.loads(data)])
        prompts += [Prompt(text, category, f'{i:05d}') for i, text in enumerate(texts)]
    return prompts


def read_dpg(folder: Path, counts: Counts, origin: str) -> list[Prompt]:
    """DPG-Bench's ``dpg_bench/prompts/*.txt``, a prompt a file, or that folder; keys are stems."""
    there = folder / 'prompts' if (folder / 'prompts').is_dir() else folder
    names = sorted(there.glob('*.txt'))
    if not names:
        raise DataFileError(f'{there} holds no prompt files (*.txt); they come from {origin}, '
                            f'{counts.get("")} in all')
    _counted(there, len(names), counts.get(''), origin)
    return [Prompt(' '.join(_of(file, origin, None, _lines)), '', file.stem) for file in names]


def read_geneval(folder: Path, counts: Counts, origin: str) -> list[Prompt]:
    """GenEval's ``evaluation_metadata.jsonl``, or its folder; groups are its tags.

    The published file is known by its hash; another one of as many prompts is refused too.
    """
    file = folder / 'evaluation_metadata.jsonl' if folder.is_dir() else folder
    data, wanted = _read(file, origin, counts.get('')), counts.get('')
    try:
        entries = [shape.load(line.encode(), {'prompt': str, 'tag': str}) for line in _lines(data)]
        prompts = [Prompt(x['prompt'], x['tag'], f'{i:05d}', x) for i, x in enumerate(entries)]
    except ValueError as e:
        raise DataFileError(f"{file} is none of GenEval's files ({first_line(e)}); fetch it again "
                            f'from {origin}') from e
    _counted(file, len(prompts), wanted, origin)
    if wanted == 553 and (found := hashlib.sha256(data).hexdigest()) != GENEVAL_SHA256:
        raise DataFileError(f'{file} is not the published file: its sha256 begins {found[:12]}, '
                            f'expected {GENEVAL_SHA256[:12]}; fetch it again from {origin}')
    return prompts


def read_t2i_compbench(folder: Path, counts: Counts, origin: str) -> list[Prompt]:
    """T2I-CompBench's ``<category>_val.txt``, a prompt a line."""
    prompts = []
    for category, wanted in counts.items():
        file = folder / f'{category}_val.txt'
        texts = _of(file, origin, wanted, _lines)
        prompts += [Prompt(text, category, f'{i:05d}') for i, text in enumerate(texts)]
    return prompts


class _Plain(pickle.Unpickler):
    """Reads lists, dicts and texts, and refuses everything that would run code."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f'it asks for {module}.{name}')


def read_coco(folder: Path, counts: Counts, origin: str) -> list[Prompt]:
    """DMD2's ``all_prompts.pkl`` (or ``.txt``, ``.json``), or the folder that holds it."""
    file = folder
    if folder.is_dir():
        file = next((folder / f'all_prompts{end}' for end in ('.pkl', '.txt', '.json')
                     if (folder / f'all_prompts{end}').exists()), folder / 'all_prompts.pkl')

    def parse(data: bytes) -> list[str]:
        if file.suffix == '.txt':
            return _lines(data)
        found = json.loads(data) if file.suffix == '.json' else _Plain(io.BytesIO(data)).load()
        return list(found.values()) if isinstance(found, dict) else found

    texts = _of(file, origin, counts.get(''), parse)
    return [Prompt(text.strip(), '', f'{i:05d}') for i, text in enumerate(texts)]


# --- Where the official scorers look for images ---

Layout = Callable[[Prompt, int, int], str]  # (prompt, its number, which image of it) -> path


def place_styles(prompt: Prompt, index: int, number: int) -> str:
    return f'{prompt.group}/{prompt.key}.jpg'


def place_categories(prompt: Prompt, index: int, number: int) -> str:
    return f'{prompt.group}/{prompt.key}.png'


def place_dpg(prompt: Prompt, index: int, number: int) -> str:
    """One file of a prompt, its four images as two rows of two."""
    return f'{prompt.key}.png'


def place_geneval(prompt: Prompt, index: int, number: int) -> str:
    return f'{prompt.key}/samples/{number:05d}.png'


def geneval_metadata(prompt: Prompt) -> tuple[str, str]:
    """(place, content) of the file that GenEval's scorer reads of each prompt."""
    return f'{prompt.key}/metadata.jsonl', json.dumps(prompt.about)


def place_t2i_compbench(prompt: Prompt, index: int, number: int) -> str:
    """Their scorers read the prompt off the file's name, up to the first '_'."""
    text = prompt.text.replace('/', ' ').replace('_', ' ')
    return f'{prompt.group}/samples/{text}_{int(prompt.key) * 10 + number:06d}.png'


def place_numbered(prompt: Prompt, index: int, number: int) -> str:
    return f'{index:05d}.png'


# --- Results of the official scorers ---


def _entries(file: Path, parse: Callable[[str], Any], cure: str) -> Any:
    try:
        return parse(file.read_text(encoding='utf-8-sig'))
    except OSError as e:
        errors.raise_environment(e, file)
        raise UserError(f'{file} cannot be read ({e.strerror}); {cure}') from e
    except (ValueError, KeyError, TypeError, RecursionError, csv.Error) as e:
        raise UserError(f'{file} is damaged ({first_line(e)}); {cure}') from e


def _finite(figures: dict[str, float], file: Path) -> dict[str, float]:
    for name, value in figures.items():
        if not np.isfinite(value):
            raise UserError(f'{file}: {name} is {value}, no figure; run the scorer again')
    return figures


def import_geneval(path: Path, prompts: Sequence[Prompt], images: int) -> dict[str, float]:
    """GenEval's ``results.jsonl``: accuracies of images by task; overall is the tasks' mean."""
    def parse(text: str) -> dict[str, list[bool]]:
        right: dict[str, list[bool]] = collections.defaultdict(list)
        for line in filter(None, text.splitlines()):
            entry = shape.load(line.encode(), {'tag': str, 'correct': bool})
            right[entry['tag']].append(entry['correct'])
        return right

    file = path / 'results.jsonl' if path.is_dir() else path
    right = _entries(file, parse, "it is what GenEval's evaluate_images.py writes")
    _all_there(file, {tag: len(found) for tag, found in right.items()}, prompts, images)
    tasks = {f'geneval/{tag}': float(np.mean(right[tag])) for tag in sorted(right)}
    return {'geneval': float(np.mean(list(tasks.values()))), **tasks}


def _all_there(file: Path, found: Counts, prompts: Sequence[Prompt], images: int) -> None:
    wanted = collections.Counter(prompt.group for prompt in prompts)
    for group in {**wanted, **found}:
        if found.get(group, 0) != wanted[group] * images:
            raise UserError(f'{file} has {found.get(group, 0)} results of {group or "all"}, there '
                            f'are {wanted[group] * images} images; was it of these?')


def import_dpg(path: Path, prompts: Sequence[Prompt], images: int) -> dict[str, float]:
    """DPG-Bench's results file: a line an image, then its summary.

    The overall score is the mean over prompts of the scores of its four crops, all with zeroed
    dependents. The categories are its own: of answers that are not zeroed, of the last crop only
    (ELLA, issue 60).
    """
    def parse(text: str) -> tuple[dict[str, float], dict[str, float]]:
        scores, categories, head = {}, {}, ''
        for line in text.splitlines():
            if line.endswith('category scores:'):
                head = line[:2]
            elif line.startswith('\t') and head == 'L1':
                name, value = line.strip().rsplit(': ', 1)
                categories[name] = float(value)
            elif line.startswith('Model: '):
                head = 'summary'
            elif not head and line.count(', ') > images:
                name, *values = line.rsplit(', ', images + 1)
                scores[Path(name).stem] = float(values[-1])
        return scores, categories

    file = path
    if path.is_dir():
        found = sorted(path.glob('dpg-bench_*_results.txt'))
        file = found[-1] if found else path / 'dpg-bench_results.txt'
    scores, categories = _entries(file, parse, "it is what DPG-Bench's compute_dpg_bench.py writes")
    missing = [prompt.key for prompt in prompts if prompt.key not in scores]
    if missing:
        raise UserError(f'{file} has no score of {missing[0]} and {len(missing) - 1} more of '
                        f'{len(prompts)} prompts; run the scorer on all images')
    overall = 100 * float(np.mean([scores[prompt.key] for prompt in prompts]))
    return _finite({'dpg': overall, **{f'dpg/{name}': value
                                       for name, value in sorted(categories.items())}}, file)


# Which of T2I-CompBench's scorers a category's figure comes from.
T2I_FILES = {
    **dict.fromkeys(('color', 'shape', 'texture'), 'annotation_blip'),
    'spatial': 'labels/annotation_obj_detection_2d',
    '3d_spatial': 'labels/annotation_obj_detection_3d', 'numeracy': 'annotation_num',
    'non_spatial': 'annotation_clip', 'complex': 'annotation_3_in_1'}


def import_t2i_compbench(path: Path, prompts: Sequence[Prompt], images: int) -> dict[str, float]:
    """T2I-CompBench's ``<category>/.../vqa_result.json`` of every category that is there."""
    figures = {}
    for category, count in collections.Counter(prompt.group for prompt in prompts).items():
        file = path / category / T2I_FILES[category] / 'vqa_result.json'
        if not file.is_file():
            continue
        answers = _entries(file, lambda text: [float(x['answer']) for x in json.loads(text)],
                           "it is what T2I-CompBench's scorers write")
        if len(answers) != count * images:
            raise UserError(f'{file} has {len(answers)} answers, there are {count * images} images '
                            'of its category; was it of these?')
        figures[f't2i/{category}'] = float(np.mean(answers))
    if not figures:
        raise UserError(f'{path} holds no results of T2I-CompBench (<category>/annotation_*/'
                        'vqa_result.json); give the folder of its categories')
    return _finite(figures, path)


def import_table(name: str, path: Path, prompts: Sequence[Prompt], images: int) -> dict[str, float]:
    """A CSV with columns ``prompt, score`` (and others), a row an image: what has no format."""
    def parse(text: str) -> list[tuple[str, float]]:
        return [(row['prompt'], float(row['score'])) for row in csv.DictReader(io.StringIO(text))]

    rows = _entries(path, parse, 'it is a CSV with the columns prompt and score')
    by_text: dict[str, list[float]] = collections.defaultdict(list)
    for text, score in rows:
        by_text[text].append(score)
    if missing := [prompt.text for prompt in prompts if prompt.text not in by_text]:
        raise UserError(f'{path} has no score of {len(missing)} prompts, {missing[0]!r} first; '
                        'score all images')
    groups = collections.defaultdict(list)
    for prompt in prompts:
        groups[prompt.group].append(float(np.mean(by_text[prompt.text])))
    overall = float(np.mean([x for found in groups.values() for x in found]))
    return _finite({name: overall, **{f'{name}/{group}': float(np.mean(found))
                                      for group, found in groups.items() if group}}, path)


import_hps_v3 = functools.partial(import_table, 'hps_v3')
