"""The results of a study's runs: one JSON file each, ``results/NAME-seedN.json``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddmd_jax.method import health
from ddmd_jax.util import errors, files, run_files, shape
from ddmd_jax.util.errors import UserError
from ddmd_jax.util.files import write_json

CURVES = ('loss', 'fake_loss', 'dm_rel_gap', 'dm_cos', 'dm_to_ca', 'x_std', 'saturation', 'ema_std',
          'ema_start', 'ema_cast', 'ema_match', 'ema_objects', 'ema_background', 'ema_image_std',
          'gan_critic_loss', 'gan_loss', 'mv_kl', 'health')


def curves(workdir: Path) -> dict[str, list[Any]]:
    """Columns of ``metrics.jsonl``: `step` and those of CURVES that are there."""
    lines = run_files.read(workdir, 'metrics.jsonl')
    # An fp32's digits: at a threshold a verdict turns on the last.
    short = lambda v: float(f'{v:.7g}') if isinstance(v, float) else v
    return {name: [short(line.get(name)) for line in lines] for name in ('step', *CURVES)
            if any(name in line for line in lines)}


def watched(curves: Mapping[str, Sequence[Any]]) -> tuple[dict[str, Any], ...]:
    """What the health verdict looks at, a dict a logged line."""
    names = [name for name in ('step', *health.WATCHED) if name in curves]
    return tuple(dict(zip(names, line)) for line in zip(*(curves[name] for name in names)))


def evaluated(workdir: Path) -> dict[str, Any]:
    """Rows of the run's evaluation; {} if it has none.

    `student`; `start`, what it was before; `few_step`, its teacher in as few steps by Euler;
    `guided`, the teacher with the run's ``eval.teacher_steps`` and ``eval.guidance``; `real`
    images.
    """
    found = run_files.read(workdir, 'eval.json')
    if found is None:
        return {}
    rows = {row['name']: row for row in found['rows']}
    return {'student': rows['student'], 'start': rows['teacher_in_student_sampler'],
            'few_step': rows['teacher_few_step'],
            'guided': rows['teacher_guided'], 'real': rows['real'], 'seconds': found['seconds']}


def write(path: Path, result: Mapping[str, Any]) -> None:
    """Writes a run's result whole or not at all."""
    write_json(path, dict(result), indent=None)


def _word(value: Any) -> str:
    return '' if value is None else shape.fault(value, str)


def _number(value: Any) -> str:
    """Of `shape`: a number, NaN too, or null."""
    return '' if value is None else shape.fault(value, float)


def _columns(value: Any) -> str:
    """Of `shape`: columns of one length, steps among them unless there are none."""
    fault = shape.fault(value, {'step?': [shape.count], 'health?': [_word], str: [_number]})
    if fault or not value:
        return fault
    return '' if 'step' in value and len({*map(len, value.values())}) == 1 else (
        'not columns of one length with their steps')


_ROW: dict[Any, Any] = {str: shape.VALUE} | dict.fromkeys(
    ('steps?', 'guidance?', 'frechet?', 'all_match?', 'all_match_held_out?', 'colour_error?',
     'std?', 'diversity?'),
    _number)
_LOOKED_AT: dict[str, Any] = {'bands_live?': [_number], 'bands_ema?': [_number]} | dict.fromkeys(
    ('std_ratio?', 'guided_share?', 'observer_cos?'), _number)
LIKE: dict[str, Any] = {
    'fields': {'log.every?': shape.count}, 'curves?': _columns, 'failed?': str,
    'data_std?': _number, 'figures?': _LOOKED_AT} | dict.fromkeys(
    ('student?', 'start?', 'few_step?', 'guided?', 'real?'), _ROW)


def read_one(path: Path) -> dict[str, Any]:
    """One run's result.

    Raises:
      UserError: it is not what a study writes.
      EnvironmentFault: it cannot be read.
    """
    try:
        return shape.load(files.patiently(path.read_bytes), LIKE)
    except (OSError, ValueError) as e:
        errors.raise_environment(e, path)
        raise UserError(f'{path} is damaged ({e}); delete it, and its run is done again') from e


def read(folder: Path, names: Sequence[str]) -> dict[str, dict[int, dict[str, Any]]]:
    """``{experiment: {seed: result}}`` of what stands in `folder`, seeds in order."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for name in names:
        by = {int(seed): p for p in folder.glob(f'{name}-seed*.json')
              if (seed := p.stem.rpartition('-seed')[2]).isdecimal()}
        if by:
            found[name] = {seed: read_one(by[seed]) for seed in sorted(by)}
    return found
