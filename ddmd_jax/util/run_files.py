"""The files that a run leaves in its folder, and what each must be for those that read it."""

from typing import Any

from ddmd_jax.util import errors, files, jsonl, shape
from ddmd_jax.util.errors import UserError
from ddmd_jax.util.places import Place


def _pair(value: Any) -> str:
    return '' if isinstance(value, list) and len(value) == 2 else 'not a pair'


def _rows(value: Any) -> str:
    """Rows of figures, one or more; all have those of the first."""
    fault = shape.fault(value, [{'name': str, str: shape.VALUE}])
    if fault or not value:
        return fault or 'not rows of figures'
    less = next((row['name'] for row in value if value[0].keys() - row.keys()), None)
    return '' if less is None else f'and {less} lacks figures that {value[0]["name"]} has'


LIKE: dict[str, Any] = {
    'config.json': {'train?': {'steps?': shape.count}},
    'run.json': {'command?': str, 'config_file?': str, 'changed?': {str: _pair},
                 'versions?': {str: str},
                 'devices?': {'count': shape.count, 'kind': str, 'processes': shape.count}},
    'eval.json': {'rows': _rows, 'seconds?': {str: shape.finite}, 'step?': shape.count,
                  'weights?': str, 'config?': dict},
    'metrics.jsonl': {'step': shape.count, 'health?': str, 'health_reason?': str,
                      str: shape.VALUE},
    'times.jsonl': {'step': shape.count, 'time': shape.finite}}


def read(workdir: Place, name: str) -> Any:
    """A file's JSON, None if it is not there; of a ``.jsonl`` its entries, none if it is not there.

    Raises:
      UserError: it is no JSON, or not what a run writes.
      EnvironmentFault: it cannot be read.
    """
    path = workdir / name
    if path.suffix == '.jsonl':
        return _entries(path, LIKE[name])
    if not path.exists():
        return None
    try:
        return shape.load(files.patiently(path.read_bytes), LIKE[name])
    except (OSError, ValueError) as e:
        errors.raise_environment(e, path)
        raise UserError(f'{path} is damaged ({e}); delete it') from e


def _entries(path: Place, like: Any) -> list[dict[str, Any]]:
    try:
        found = jsonl.read(path)
    except (OSError, ValueError) as e:
        errors.raise_environment(e, path)
        raise UserError(str(e)) from e
    for number, entry in enumerate(found, 1):
        if fault := shape.fault(entry, like):
            raise UserError(f'{path}, line {number}: {fault}; mend it, or take it out')
    return found
