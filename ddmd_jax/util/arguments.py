"""Arguments of the commands; `main` and `prepare`, which take more, have their own."""

import sys
from collections.abc import Callable

from absl import flags


def parser(command: str) -> Callable[[list[str]], list[str]]:
    """absl's parser; an error is one line that begins with `command`, and exit code 2."""
    def parse(argv: list[str]) -> list[str]:
        try:
            return flags.FLAGS(argv)
        except flags.Error as e:
            print(f'{command}: {" ".join(str(e).split())}', file=sys.stderr)
            sys.exit(2)

    return parse
