"""Validation of a run's config: every wrong field at once, in words, before anything is built.

A schema is a flat table, dotted field -> `Rule` (rooms `rules`, `schemas`); what only several
fields together can get wrong is a named function (`together`). The two tasks have a schema each,
that of `configs/emoji.py` (distill) and that of `configs/emoji_teacher.py` (pretrain).
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict, config_dict

from ddmd_jax.config.rules import Rule
from ddmd_jax.config.schemas import DATASETS, TASKS, distill_schema, pretrain_schema
from ddmd_jax.config.together import DISTILL_TOGETHER, PRETRAIN_TOGETHER


class ConfigError(ValueError):
    """A config with wrong fields; the message has a line for each of them."""


def check(config: ConfigDict) -> None:
    """Puts defaults where `config` may leave a field out; else nothing if it describes a run.

    Raises:
      ConfigError: naming every field that is wrong, the value found and what is allowed.
    """
    lines = validate(config)
    if lines:
        count = '1 field is' if len(lines) == 1 else f'{len(lines)} fields are'
        raise ConfigError('\n'.join([f'config: {count} wrong', *lines]))
    with config.unlocked():
        for path, rule in schema_of(config).items():
            if rule.filled:
                _put_default(config, path.split('.'), rule.default)


def field(config: Any, name: str) -> Any:
    """A field of a config, or of the dict it was saved as, by its dotted name; None if absent."""
    for part in name.split('.'):
        config = config.get(part) if hasattr(config, 'get') else None
    return config


def _put_default(config: ConfigDict, path: Sequence[str], default: Any) -> None:
    *sections, name = path
    for section in sections:
        if section not in config:
            config[section] = ConfigDict()
        config = config[section]
    if name not in config:
        config[name] = config_dict.placeholder(float) if default is None else default


def validate(config: ConfigDict) -> list[str]:
    """One line for each wrong field of `config`: field, value found, what is allowed."""
    values, distill, schema = config.to_dict(), _is_distill(config), schema_of(config)
    sound: dict[str, Any] = {}
    lines = list(_section_errors(schema, values, '', sound))
    for rule, field, *others in DISTILL_TOGETHER if distill else PRETRAIN_TOGETHER:
        if {field, *others} <= sound.keys():
            words = rule(sound[field], *(sound[other] for other in others))
            lines += [f'{field}: {show(sound[field])}, {words}'] if words else []
    return lines


def _is_distill(config: ConfigDict) -> bool:
    """Told by its sections, so that a misspelt task still has all its fields checked."""
    task = config.get('task')
    return task == 'distill' or (task not in TASKS and 'critic' in config)


def schema_of(config: ConfigDict) -> dict[str, Rule]:
    """The schema of the task, and of the data set, that `config` names."""
    return distill_schema(_dataset(config)) if _is_distill(config) else pretrain_schema()


def _dataset(config: Any) -> str:
    """The data set whose fields `config` should have; told by them where its name is wrong."""
    data = config.to_dict().get('data')
    data = data if isinstance(data, Mapping) else {}
    if data.get('name') in DATASETS:
        return data['name']
    return 'prompts' if {'path', 'sizes', 'lengths'} & set(data) else 'emoji'


def show(value: Any) -> str:
    """A value in a message, no longer than a line of it can bear."""
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + '...'


def _section_errors(schema: dict[str, Rule], values: Mapping, prefix: str,
                    sound: dict[str, Any]) -> Iterator[str]:
    """Lines on the section at `prefix` ('' or 'a.b.'); fields that are right go to `sound`."""
    known, guessed = _names(schema, prefix), set()
    section = lambda path: f'a section with {", ".join(_names(schema, path + "."))}'
    for key, value in values.items():
        path = f'{prefix}{key}'
        rule = schema.get(path)
        if key not in known:
            near = _nearest(str(key), known, prefix, schema)
            guessed.add(near)
            yield (f'{path}: {show(value)}, but there is no such field; '
                   + (f'did you mean {near}?' if near else f'known here: {", ".join(known)}'))
        elif rule is None and isinstance(value, Mapping):
            yield from _section_errors(schema, value, f'{path}.', sound)
        elif rule is None:
            yield f'{path}: {show(value)}, must be {section(path)}'
        elif rule.ok(value):
            sound[path] = value
        else:
            yield f'{path}: {show(value)}, must be {rule.allowed}{rule.hint(value)}'
    for path in (prefix + key for key in known if key not in values):
        rule = schema.get(path)
        if rule and rule.default is not dataclasses.MISSING:
            sound[path] = rule.default
        elif rule is None and path not in guessed and _may_be_absent(schema, f'{path}.'):
            yield from _section_errors(schema, {}, f'{path}.', sound)
        # A misspelt field is one mistake, and the line on its unknown name has named it.
        elif path not in guessed:
            yield f'{path}: missing, must be {rule.allowed if rule else section(path)}'


def _may_be_absent(schema: dict[str, Rule], prefix: str) -> bool:
    return all(rule.filled for path, rule in schema.items() if path.startswith(prefix))


def _names(schema: dict[str, Rule], prefix: str) -> list[str]:
    """Names of the fields and sections directly under `prefix`."""
    inside = [path[len(prefix):] for path in schema if path.startswith(prefix)]
    return list(dict.fromkeys(path.split('.')[0] for path in inside))


def _nearest(key: str, known: list[str], prefix: str, schema: dict[str, Rule]) -> str:
    """The field that `key` was likely meant to be: spelt alike here, or the same elsewhere."""
    near = [prefix + name for name in difflib.get_close_matches(key, known, 1)]
    near += [path for path in schema if path.rpartition('.')[2] == key]
    return near[0] if near else ''
