"""A run's config: its defaults, and every wrong field at once, in words, before anything is built.

`fields` is the table that all of it follows from, `rules` are the values a field may hold,
`together` has the conditions among several fields, `files` finds a config by its name.
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Set
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_dict

from ddmd_jax.config import fields, together
from ddmd_jax.config.fields import REQUIRED, Field, under
from ddmd_jax.config.files import define_flag, load
from ddmd_jax.config.rules import ANY

__all__ = ['ConfigError', 'check', 'defaults', 'define_flag', 'field', 'fields_of', 'load',
           'parser', 'validate']


class ConfigError(ValueError):
    """A config with wrong fields; the message has a line for each of them."""


def defaults(task: str, changes: Mapping[str, Any]) -> ConfigDict:
    """The whole config of a run of `task`, for a file of ``configs/``.

    Args:
      task: whose fields it has: 'distill', 'pretrain' or 'codec'.
      changes: dotted field -> value: those that are required, and those that differ from the
        defaults. Nothing is judged here: `check` names what is wrong.
    """
    config = ConfigDict()
    for path, value in {'task': task, **changes}.items():
        _put(config, path, value)
    _fill(config)
    return config


def check(config: ConfigDict) -> None:
    """Puts defaults where `config` leaves a field out, if it describes a run.

    Raises:
      ConfigError: naming every field that is wrong, the value found and what is allowed.
    """
    lines = validate(config)
    if lines:
        count = '1 field is' if len(lines) == 1 else f'{len(lines)} fields are'
        raise ConfigError('\n'.join([f'config: {count} wrong', *lines]))
    with config.unlocked():
        _fill(config)


def dotted(config: Any) -> dict[str, Any]:
    """Values of a config, or of the dict it was saved as, by dotted names, as JSON has them."""
    from ddmd_jax.weights import flat

    plain = json.loads(json.dumps(config.to_dict() if hasattr(config, 'to_dict') else config))
    return {name.replace('/', '.'): value for name, value in flat.flatten(plain).items()}


def field(config: Any, name: str) -> Any:
    """A field of a config, or of the dict it was saved as, by its dotted name; None if absent."""
    for part in name.split('.'):
        config = config.get(part) if hasattr(config, 'get') else None
    return config


def fields_of(config: Any) -> tuple[Field, ...]:
    """The fields of a config: of its task, its teacher's family, its data set, its regularisers.

    `config` may be wrong. A misspelt task is recognised by its sections; where no family, data set
    or regulariser goes by a name, the section whose fields it would bring may hold anything.
    """
    from ddmd_jax import families
    from ddmd_jax.method import regularisers

    distill = config.get('task') == 'distill' or (
        config.get('task') not in ('pretrain', 'codec') and 'critic' in config)
    codec = config.get('task') == 'codec'
    found = fields.COMMON + (
        fields.DISTILL if distill else fields.CODEC if codec else fields.PRETRAIN)
    try:
        family = families.get(str(field(config, 'teacher.name')))
    except families.UnknownFamily:
        family = families.Family('')
    data_sets = {name: data.fields for name, data in family.data_sets.items()}
    if distill:
        data_sets |= dict.fromkeys(fields.PROMPT_SETS, fields.PROMPTS) | dict.fromkeys(
            fields.REAL_SETS, fields.IMAGES)
    # (section, the fields that somebody brings to it; None where nobody is found)
    brought = [] if codec else [('data', data_sets.get(str(field(config, 'data.name'))))]
    if config.get('task') == 'pretrain' or not (codec or distill):
        brought.append(('teacher.model', family.architecture or None))
    if distill:
        names = field(config, 'method.regularisers')
        try:
            kinds = map(regularisers.get, regularisers.BUILT_IN if names is None else names)
            brought += [(f'method.{kind.name}', kind.fields) for kind in kinds]
        except (TypeError, ValueError):
            brought.append(('method', None))
    for section, own in brought:
        found += under(section, own or ())
    known = [f'{f.path}.' for f in found]
    for section in (section for section, own in brought if own is None):
        given = field(config, section)  # the wrong name is one mistake, and no more
        paths = [f'{section}.{name}' for name in (given if hasattr(given, 'get') else ())]
        found += tuple(Field(path, ANY, REQUIRED, fields.FIXED, '') for path in paths
                       if not any(name.startswith(f'{path}.') for name in known))
    return found


def parser(name: str) -> Callable[[list[str]], list[str]]:
    """absl's parser for the command `name`, which has ``--config``: what goes wrong in a config's
    name, file or fields is one line, and exit code 2."""
    def parse(argv: list[str]) -> list[str]:
        pairs = [x for a in argv for x in a.split('=', 1)]  # ``--config x`` is ``--config=x``
        named = next((x for flag, x in zip(pairs, pairs[1:]) if flag == '--config'), 'the file')
        try:
            return flags.FLAGS(argv)
        except OSError:
            wrong = f'config: {named} cannot be read; try --config=emoji'
        except (AttributeError, KeyError):  # an override of a field that is not there
            wrong = f'config: {_misspelt(argv, named)}'
        except flags.Error as e:
            wrong = f'{name}: {" ".join(str(e).split())}'
        except Exception as e:  # of the file, or of how ml_collections reads an override
            wrong = f'config: {" ".join(str(e).split())}'
        print(wrong, file=sys.stderr)
        sys.exit(2)

    return parse


def _misspelt(argv: list[str], named: str) -> str:
    """The first override in `argv` of a field that there is not, and what it may have meant."""
    config = load(named)
    known = {f.path: f for f in fields_of(config)}
    given = [a.removeprefix('--config.').partition('=')[0] for a in argv
             if a.startswith('--config.')]
    for path in given:
        if path not in known:
            return f'{path}: no such field; {_meant(path, known)}'
    absent = [path for path in given if field(config, path) is None]
    return f'{named} lacks {" or ".join(absent)}; set it in the file'


def _fill(config: ConfigDict) -> None:
    """Puts a default where a field is absent."""
    for f in fields_of(config):
        if f.filled and f.default is not REQUIRED:
            _put(config, f.path, f.default, over=False)


def _put(config: ConfigDict, path: str, value: Any, over: bool = True) -> None:
    """Sets a field, `over` the value it has or not, and makes the sections on its way."""
    *sections, name = path.split('.')
    for section in sections:
        if section not in config:
            config[section] = ConfigDict()
        config = config[section]
    if over or name not in config:  # a number may follow where None stands
        config[name] = config_dict.placeholder(float) if value is None else value


def validate(config: ConfigDict) -> list[str]:
    """One line for each wrong field of `config`: field, value found, what is allowed."""
    values = config.to_dict()
    known = {f.path: f for f in fields_of(values)}
    sections = {path[:i] for path in known for i, char in enumerate(path) if char == '.'}
    sound: dict[str, Any] = {}
    lines, named = [], set()  # fields and sections that a line has named: not missing as well
    for path, value in _leaves(values, sections):
        wrong = ''
        if path in known:
            rule = known[path].rule
            if rule.ok(value):
                sound[path] = value
            else:
                wrong = f'must be {rule.allowed}{rule.hint(value)}'
        elif path in sections:
            wrong = f'must be a section with {", ".join(_inside(known, path))}'
        else:
            named.add(_nearest(path, known))
            wrong = f'but there is no such field; {_meant(path, known)}'
        if wrong:
            named.add(path)
            lines.append(f'{path}: {_show(value)}, {wrong}')
    for path, f in known.items():
        if path in sound or any(f'{path}.'.startswith(f'{name}.') for name in named):
            continue
        if f.default is REQUIRED:
            lines.append(f'{path}: missing, must be {f.rule.allowed}')
        else:
            sound[path] = f.default
    lines += [f'{path}: {_show(sound[path])}, {wrong}' for path, wrong in together.look_up(sound)]
    for condition, path, *others in together.CONDITIONS:
        if {path, *others} <= sound.keys():
            wrong = condition(*(sound[name] for name in (path, *others)))
            if wrong:  # one line for a field, and no other that only follows from it
                lines.append(f'{path}: {_show(sound.pop(path))}, {wrong}')
    return lines


def _show(value: Any) -> str:
    """A value in a message, no longer than a line of it can bear."""
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + '...'


def _leaves(values: Mapping, sections: Set[str], prefix: str = '') -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of everything in `values` that is not a known section."""
    for key, value in values.items():
        path = f'{prefix}{key}'
        if path in sections and isinstance(value, Mapping):
            yield from _leaves(value, sections, f'{path}.')
        else:
            yield path, value


def _inside(known: Mapping[str, Field], section: str) -> list[str]:
    """Names of the fields and sections directly in `section`; '' is the whole config."""
    prefix = section and f'{section}.'
    paths = [path[len(prefix):] for path in known if path.startswith(prefix)]
    return list(dict.fromkeys(path.split('.')[0] for path in paths))


def _meant(path: str, known: Mapping[str, Field]) -> str:
    """What to say of a `path` that none of the `known` fields has: which one it may have meant."""
    if near := _nearest(path, known):
        return f'did you mean {near}?'
    section = path.rpartition('.')[0]
    here = _inside(known, section)
    return f'known here: {", ".join(here)}' if here else _meant(section, known)


def _nearest(path: str, known: Mapping[str, Field]) -> str:
    """The field that `path` was likely meant to be: spelt alike there, or the same elsewhere.

    Of several elsewhere it is one of the least deep.
    """
    section, _, name = path.rpartition('.')
    near = [f'{section}.{found}'.lstrip('.')
            for found in difflib.get_close_matches(name, _inside(known, section), 1)]
    near += sorted((other for other in known if other.rpartition('.')[2] == name),
                   key=lambda other: other.count('.'))
    return near[0] if near else ''
