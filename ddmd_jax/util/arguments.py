"""How all commands but `main` and `prepare`, which read more, take their arguments."""

import sys
from collections.abc import Callable

from absl import flags


def parser(command: str) -> Callable[[list[str]], list[str]]:
    """absl's parser, with what is wrong said in one line of `command`, exit code 2."""
    def parse(argv: list[str]) -> list[str]:
        try:
            return flags.FLAGS(argv)
        except flags.Error as e:
            print(f'{command}: {" ".join(str(e).split())}', file=sys.stderr)
            sys.exit(2)

    return parse
