"""The frame of every command but `main`: flags, and what goes wrong as one line and a code."""

import functools
import io
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags, logging

from ddmd_jax.util import buckets, errors, places
from ddmd_jax.util.errors import UserError

FLAGS = flags.FLAGS
flags.disclaim_key_flags()  # those defined here are their command's, and in its --help


def run(name: str, main: Callable[[list[str]], None], define_flags: Callable[[], None],
        parse: Callable[[list[str]], list[str]] | None = None) -> None:
    """Defines flags and parses them, by `parser` or `parse`, then runs ``main(arguments that are
    no flags)``; see `call`."""
    define_flags()
    app.run(functools.partial(call, name, main), flags_parser=parse or parser(name))


class _PlaceParser(flags.ArgumentParser):
    """Checks the name of a place, and fills it in; what is no place (a hub id) stays as it is.

    With `head`, ``HEAD=PATH`` is asked for.
    """

    syntactic_help = 'a path, or a URL'

    def __init__(self, schemes: Sequence[str] | None, head: str = ''):
        super().__init__()
        self.schemes, self.head = schemes, head

    def parse(self, argument: str) -> str:
        name, equals, path = argument.partition('=') if self.head else ('', '', argument)
        if self.head and not (name and path):
            raise ValueError(f'it is not {self.head}=PATH')
        if wrong := places.fault(path, self.schemes):
            raise ValueError(f'it {wrong}')
        return f'{name}{equals}{places.filled(path)}'

    def flag_type(self) -> str:
        return 'place'


def define_place(name: str, default: str | None, text: str,
                 schemes: Sequence[str] | None = places.BUCKETS) -> Any:
    """Defines a flag that names a file or a folder; absl's flag holder.

    `schemes` are those of the URLs that it takes; see `places.of`, which makes a place of it.
    """
    return flags.DEFINE(_PlaceParser(schemes), name, default, text)


def define_places(name: str, text: str,
                  schemes: Sequence[str] | None = places.BUCKETS, head: str = '') -> Any:
    """Defines a flag that may be repeated, each time naming files; see `define_place`.

    With a `head`, as 'SUITE', every value is ``SUITE=PATH``: which file is meant for what.
    """
    return flags.DEFINE_multi(_PlaceParser(schemes, head), flags.ArgumentSerializer(), name, [],
                              text)


def parser(name: str) -> Callable[[list[str]], list[str]]:
    """absl's parser; an error is one line that begins with the command's name, and exit code 2."""
    def parse(argv: list[str]) -> list[str]:
        try:
            return FLAGS(argv)
        except flags.Error as e:
            print(f'{name}: {" ".join(str(e).split())}', file=sys.stderr)
            sys.exit(2)

    return parse


def call(name: str, main: Callable[[list[str]], None], argv: list[str]) -> None:
    """Runs `main`; an error of the user's or of a file is one line on stderr and exit code 1."""
    printable()
    if not FLAGS['verbosity'].present:
        logging.set_verbosity(logging.WARNING)  # libraries' chatter hides what is said here
    try:
        main(argv[1:])
        flush()
    except UserError as e:
        sys.exit(f'{name}: {e}')
    except BrokenPipeError:
        reader_gone()
    except KeyboardInterrupt:
        sys.exit(f'{name}: stopped')
    except Exception as e:  # what is not the machine's fault is a bug, and shows where it is
        if fault := errors.environment(e):
            sys.exit(f'{name}: {fault}')
        if not isinstance(e, OSError):
            raise
        where = f'{e.filename} cannot be read or written' if e.filename else 'the system refuses'
        sys.exit(f'{name}: {where} ({e.strerror or e})')


def printable() -> None:
    """A character that the terminal's encoding lacks is written as its number: no command ends
    for it."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors='backslashreplace')


def flush() -> None:
    """Here a reader that has gone away is noticed, not at exit; nothing if stdout is closed."""
    if sys.stdout is not None:
        sys.stdout.flush()


def reader_gone() -> None:
    """Ends the process without a word: `... | head` has seen enough."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)


def finite(*names: str) -> None:
    """Refuses NaN and infinity as values of these flags, which bounds let through."""
    for name in names:
        flags.register_validator(name, lambda given: given is None or math.isfinite(given),
                                 'must be a finite number')


def at_most(limit: int, *names: str) -> None:
    """Refuses larger values of these flags: what is more is a slip, and ends in want of memory."""
    for name in names:
        flags.register_validator(name, lambda given: given is None or given <= limit,
                                 f'must be at most {limit}')


def given() -> dict[str, Any]:
    """The flags of the command line by ``--name``, but for absl's own and for those that name
    places: where something lies may differ from process to process, and what lies there counts."""
    absls = {flag.name for module, found in FLAGS.flags_by_module_dict().items()
             if module.startswith('absl') for flag in found}
    return {f'--{name}': FLAGS[name].value for name in FLAGS
            if FLAGS[name].present and name not in absls
            and not isinstance(FLAGS[name].parser, _PlaceParser)}


def only_flags(arguments: list[str]) -> None:
    """Raises `UserError` if there is an argument that is no flag."""
    if arguments:
        raise UserError(f'unexpected argument {arguments[0]!r}; flags look like --name=value')


def need(**hints: str) -> None:
    """Raises `UserError`, with its hint, for the first flag that is named here and not given."""
    for name, hint in hints.items():
        if not FLAGS[name].value:
            raise UserError(f'no --{name} given; {hint}')


def folder(flag: str, path: str | os.PathLike,
           schemes: Sequence[str] | None = places.LOCAL) -> places.Place:
    """The folder that a flag names, made if need be; `UserError` if it cannot be written."""
    path = places.of(path, schemes)
    if places.is_url(path):
        buckets.check_writable(path)
        return path
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f'{flag} {path} cannot be made ({e.strerror}); choose another') from e
    if not os.access(path, os.W_OK):
        raise UserError(f'{flag} {path} cannot be written; choose another')
    return path
