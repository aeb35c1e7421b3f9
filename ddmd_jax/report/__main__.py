"""``python -m ddmd_jax.report RUN [RUN ...] [--out=FILE]``: one page of a run, or of several.

Of one run it is RUN/report.html, which the run itself writes, too; several are put side by side
in ``report.html`` here. Exit codes: 0; 1 if there is nothing to report of (one line on stderr).
"""

import sys
from pathlib import Path

from absl import app, flags

from ddmd_jax.util import arguments

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string('out', '', 'File to write.')


def main(argv: list[str]) -> None:
    from ddmd_jax.report import page, read

    if not argv[1:]:
        sys.exit('report: no run given; name the --workdir of one, or of several')
    folders = [Path(name).expanduser().absolute() for name in argv[1:]]
    out = Path(FLAGS.out or (page.NAME if folders[1:] else folders[0] / page.NAME)).expanduser()
    try:
        page.save(out, read.read_all(folders))
    except read.ReportError as e:
        sys.exit(f'report: {e}')
    except OSError as e:
        sys.exit(f'report: {out} cannot be written ({e.strerror or e}); choose another --out')
    print(out)


if __name__ == '__main__':
    define_flags()
    app.run(main, flags_parser=arguments.parser('report'))
