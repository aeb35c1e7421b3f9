"""``python -m ddmd_jax.study --suite=paper --config=configs/emoji.py --workdir=DIR``

Runs the suite's experiments with every seed, resuming what was begun, and writes
``DIR/report.html``. Suite `paper`: the paper's claims, what was measured, and whether each holds;
`steps`: the config's recipe at 1, 2, 4 and 8 steps beside DMD2 and CA alone; `robustness`: where
the recipe stays healthy, and whether the health verdict warns in time.

Exit codes: 0 the report is written; 1 it could not be (one line says why); 2 a flag is wrong.
"""

import json
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

from absl import flags
from tqdm import tqdm

from ddmd_jax.util import commands, errors, places
from ddmd_jax.util.errors import UserError

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string('suite', 'paper', 'Which suite of experiments.')
    commands.define_place('config', None, 'Base config.', places.LOCAL)
    commands.define_place('workdir', None, 'Folder of the study; resumed if it holds one.',
                          places.LOCAL)
    flags.DEFINE_integer('seeds', None, 'How many; default the suite\'s, with --quick 1.', 1)
    flags.DEFINE_integer('processes', 1, 'Runs at a time. One on a TPU; on a CPU a run uses about '
                         'two cores.', 1)
    flags.DEFINE_boolean('quick', False, 'The shortened suite: fewer experiments, few steps.')
    flags.DEFINE_list('only', [], 'Experiments, by name; default all.')
    flags.DEFINE_multi_string('set', [], 'field=value for every run, over those of the suite.')
    flags.DEFINE_boolean('keep', False, 'Keep the workdirs of runs that are through.')
    flags.DEFINE_boolean('report_only', False, 'Run nothing; write the report of what is there.')
    commands.at_most(1000, 'seeds', 'processes')


def wrong(text: str) -> None:
    print(f'study: {text}', file=sys.stderr)
    sys.exit(2)


def own_fields(given: list[str]) -> dict[str, Any]:
    """``field=value`` as a dict; values as JSON where they are, else as they stand."""
    found: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition('=')
        if not equals:
            wrong(f'--set {text!r} is not field=value, such as train.steps=20')
        try:
            found[name] = json.loads(value)
        except (ValueError, RecursionError):
            found[name] = value
    return found


def load_config(path: str) -> Any:
    """The config in a file of configs/, whole and valid."""
    from ddmd_jax import config as config_lib

    try:
        config = config_lib.load(path)
        config_lib.check(config)
    except config_lib.ConfigError as e:
        wrong(str(e))
    except Exception as e:  # the file is the user's code, which may raise anything
        wrong(f'--config {path} cannot be read ({" ".join(str(e).split())}); try --config=emoji')
    return config


def main(arguments: list[str]) -> None:
    from ddmd_jax.study import results, suites, trials

    if arguments:
        wrong(f'unexpected argument {arguments[0]!r}')
    if not FLAGS.config or not FLAGS.workdir:
        wrong('--config and --workdir are needed: the config that is varied, and where to keep it')
    config = load_config(FLAGS.config)
    try:
        suite = suites.find(FLAGS.suite)
        experiments = suites.chosen(suite, FLAGS.quick, tuple(FLAGS.only))
    except ValueError as e:
        wrong(str(e))
    folder = places.of(FLAGS.workdir, places.LOCAL)
    quick, own = FLAGS.quick, own_fields(FLAGS['set'].value)
    seeds = FLAGS.seeds or (1 if quick else suite.seeds)
    planned = [
        trials.Trial(e, seed, folder, suites.fields(suite, e, config, quick, seed, own),
                     suite.looked_at)
        for seed in range(suite.first_seed, suite.first_seed + seeds) for e in experiments]
    lacking = suites.lacking(suite, planned[0].fields, config)
    if lacking:
        wrong(f'suite {suite.name!r} needs {" and ".join(lacking)} above 0, which '
              f'{config.teacher.name} has no judge for, or which --set has taken away')
    if suite.seeds == 1 and seeds > 1:
        wrong(f'suite {suite.name!r} takes one seed: recipes are its sample')
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # runs under way are ended, and save
    try:
        if not FLAGS.report_only:
            trials.perform(planned, FLAGS.config, FLAGS.processes,
                         lambda text: tqdm.write(text, file=sys.stderr), FLAGS.keep)
    except (trials.Stopped, KeyboardInterrupt) as e:
        raise UserError(f'{str(e) or "stopped"}; run the same command to go on') from e
    except OSError as e:
        errors.raise_environment(e, folder)
        raise UserError(f'{folder} cannot be written ({e.strerror}); choose another '
                        '--workdir') from e
    found = results.read(folder / 'results', [e.name for e in suite.experiments])
    made_alike(found, lambda e, seed: suites.fields(suite, e, config, quick, seed, own),
               suite.experiments)
    if not found:
        raise UserError(f'{folder / "results"} holds no results; run without --report_only')
    try:
        print(write_report(folder, suite, config.teacher.name, found))
    except ValueError as e:
        raise UserError(f'{folder / "results"}: {e}') from e


def made_alike(found: dict[str, dict[int, dict[str, Any]]], fields: Any,
               experiments: Any) -> None:
    """Takes out results of runs that had other fields than they would have now, and says so."""
    from ddmd_jax.study.trials import plain

    for experiment in experiments:
        by = found.get(experiment.name, {})
        for seed in [s for s in by if by[s]['fields'] != plain(fields(experiment, s))]:
            del by[seed]
            print(f'study: warning: {experiment.name}, seed {seed}, was made with other fields and '
                  'is left out', file=sys.stderr)
        if not by:
            found.pop(experiment.name, None)


def write_report(folder: Path, suite: Any, teacher: str, found: dict[str, Any]) -> str:
    """Writes ``report.html``; what it says in a few lines, and where it is.

    Raises:
      ValueError: the results do not suffice.
    """
    from ddmd_jax.study import claims_page, map_page, robustness

    path, title = folder / 'report.html', f'{suite.title} on {teacher}'
    head = f'Suite {suite.name!r} of {FLAGS.config}, {sum(map(len, found.values()))} runs.'
    how = shlex.join(['python', '-m', 'ddmd_jax.study', *sys.argv[1:]])
    if suite.name == 'robustness':
        judged = map_page.write(path, title, head, how, found)
        return f'{map_page.answer(judged[robustness.COLLAPSE.name].held_out())}\n{path}'
    shown = {name: folder / 'results' / f'{name}-seed{min(by)}.png' for name, by in found.items()}
    claims = claims_page.write(path, title, head, how, found, suite,
                               {k: p for k, p in shown.items() if p.is_file()})
    return '\n'.join([*(f'{c.number}. {c.title}: {c.verdict}' for c in claims), str(path)])


if __name__ == '__main__':
    commands.run('study', main, define_flags)
