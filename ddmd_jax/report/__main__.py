"""``python -m ddmd_jax.report RUN [RUN ...] [--out=FILE]``: one page of a run, or of several.

Of one run it is RUN/report.html, which the run itself writes, too; several are put side by side
in ``report.html`` here. Exit codes: 0; 1 if there is nothing to report (one line on stderr).
"""

from absl import flags

from ddmd_jax.util import commands, places
from ddmd_jax.util.errors import UserError


def define_flags() -> None:
    commands.define_place('out', '', 'File to write.')


def main(arguments: list[str]) -> None:
    from ddmd_jax.report import page, read

    if not arguments:
        raise UserError('no run given; name the --workdir of one, or of several')
    folders = [places.of(name) for name in arguments]
    out = flags.FLAGS.out or (page.NAME if folders[1:] else folders[0] / page.NAME)
    page.save(places.of(out), read.read_all(folders))
    print(out)


if __name__ == '__main__':
    commands.run('report', main, define_flags)
