"""Configs by name: a file, or one of those that come with the package.

``--config=lumina`` and ``--config=lumina:coupled_shared`` work wherever the package is installed;
``--config=configs/lumina.py`` is the file, as ever.
"""

from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from ddmd_jax.util import places

PACKAGE = Path(__file__).parents[1]
# Where setup.py puts the folder `configs` in an installed package, and where a checkout has it.
FOLDERS = (PACKAGE / 'configs', PACKAGE.parent / 'configs')


def located(name: str) -> str:
    """The path of the config `name`, what follows a colon kept; `name` itself if there is none."""
    name, colon, argument = name.partition(':')
    shipped = [path for path in (folder / f'{name}.py' for folder in FOLDERS) if path.is_file()]
    found = shipped[0] if shipped and name.isidentifier() and not Path(name).is_file() else name
    return f'{found}{colon}{argument}'


class _Parser(config_flags.config_flags.ConfigFileFlagParser):
    """ml_collections' parser of a config's path, which takes a name too."""

    def parse(self, path: str) -> Any:
        if wrong := places.fault(path, places.LOCAL):
            raise ValueError(f'{path} {wrong}')
        return super().parse(located(places.filled(path)))


def load(name: str) -> ConfigDict:
    """The config `name`, as ``--config=name`` has it.

    Raises:
      OSError: there is no such file. Whatever else the file raises is passed on.
    """
    config = _Parser('config').parse(name)
    config.lock()  # a file that is not there is only noticed when it is looked at
    return config


class _FlagParser(_Parser):
    """The parser of a flag: what the file itself raises is told from a wrong override."""

    def parse(self, path: str) -> Any:
        try:
            found = super().parse(path)
        except (OSError, ValueError, TypeError):  # which ml_collections and absl know
            raise
        except Exception as e:  # the file is the user's code and may raise anything
            what = ('it has no get_config(), which returns the config'
                    if "has no attribute 'get_config'" in str(e) else
                    f'{type(e).__name__} {" ".join(str(e).split())}'.strip())
            raise _FileError(f'{path} cannot be run ({what})') from e
        if not isinstance(found, ConfigDict):
            getattr(found, 'to_dict', None)  # raises OSError where there is no such file
            raise _FileError(f'{path} returns a {type(found).__name__}, not a ConfigDict')
        return found


class _FileError(Exception):
    """A config's file that is none."""


def define_flag() -> Any:
    """Defines ``--config``, its name or file, and ``--config.field=value``; absl's flag holder."""
    holder = config_flags.DEFINE_config_file(
        'config', None, 'A file such as configs/emoji.py, or its name: emoji.', lock_config=True)
    flags.FLAGS['config'].parser = _FlagParser('config')
    return holder
