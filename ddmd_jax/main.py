"""``python -m ddmd_jax.main --config=configs/emoji.py --workdir=DIR``: trains, then evaluates.

Exit codes: 0 done, or stopped by a signal with everything saved; 1 the run could not go on (one
line on stderr says what, where and how to mend it); 2 the config is wrong (every wrong field is
named).
"""

import math
import os
import shlex
import sys
import time
from collections.abc import Mapping
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from ddmd_jax import config as config_lib
from ddmd_jax.util import commands, places
from ddmd_jax.util.errors import UserError, environment
from ddmd_jax.util.places import Place

_CONFIG = config_lib.define_flag()
_COORDINATOR = flags.DEFINE_string(
    'coordinator', None, 'host:port of process 0, if the environment does not name it (TPU pods, '
    'Slurm and Open MPI do).')
_NUM_PROCESSES = flags.DEFINE_integer(
    'num_processes', None, 'Number of processes; with --coordinator.')
_PROCESS_ID = flags.DEFINE_integer('process_id', None, 'Index of this process; with --coordinator.')
_COMPILE_CACHE = commands.define_place(
    'compile_cache', None, 'Folder or gs:// URL of compiled programs, shared by all processes; '
    'default: JAX_COMPILATION_CACHE_DIR, else WORKDIR/compile_cache. Empty: no cache.')
_WORKDIR = commands.define_place(
    'workdir', None, 'Folder or gs:// URL of the run; resumed if it holds one.', places.GS)
_PEER_TIMEOUT = flags.DEFINE_integer(
    'peer_timeout', 100, 'Seconds of silence of one process after which the others end.',
    lower_bound=1)
commands.at_most(10**7, 'peer_timeout')
_REPLAY = flags.DEFINE_boolean(
    'replay', False, 'Only repeat the last step of WORKDIR/bad_batches.jsonl and print its '
    'figures.')
_PROFILE = flags.DEFINE_string(
    'profile', None, 'FIRST:LAST, steps to profile into WORKDIR/profile, as --profile=10:20.')


def profiled(text: str | None) -> tuple[int, int] | None:
    """The window of ``FIRST:LAST``; exits with one line, code 2, if it is none."""
    if text is None:
        return None
    ends = text.split(':')
    numbers = all(e.isdecimal() and len(e) < 10 for e in ends)
    if len(ends) == 2 and numbers and 1 <= int(ends[0]) <= int(ends[1]):
        return int(ends[0]), int(ends[1])
    print(f'main: --profile={text} is not FIRST:LAST, two steps such as 10:20', file=sys.stderr)
    sys.exit(2)


def shared(config) -> dict[str, Any]:
    """What all processes of a run must have alike: fields and versions, places left out."""
    import ddmd_jax

    fields = {name: value for name, value in config_lib.dotted(config).items()
              if name not in ('teacher.path', 'data.path')}
    return fields | {'version of ddmd_jax': ddmd_jax.__version__}


def use_compile_cache(flag: str | None, workdir: Place, environ: Mapping[str, str]) -> None:
    """Keeps compiled programs where `flag`, the environment or else `workdir` says.

    `flag` is a folder, a URL such as ``gs://...`` that JAX can write, '' for no cache, or None
    if it was not given. Raises `UserError` if a folder cannot be written.
    """
    import jax

    name = 'jax_persistent_cache_min_compile_time_secs'
    if name.upper() not in environ:
        jax.config.update(name, 0.0)  # small programs are many: together they take as long
    if flag is None and 'JAX_COMPILATION_CACHE_DIR' in environ:
        return  # JAX has read it
    folder = str(workdir / 'compile_cache') if flag is None else flag
    if folder and not places.is_url(folder):
        folder = str(commands.folder('--compile_cache', folder))
    jax.config.update('jax_compilation_cache_dir', folder or None)


def about(config) -> dict[str, Any]:
    """Facts of a run beside its config: how it was called, where, with which versions."""
    import jax

    from ddmd_jax.train.durable import checkpoint as ckpt

    device = jax.devices()[0]
    return {
        'command': shlex.join(['python', '-m', 'ddmd_jax.main', *sys.argv[1:]]),
        'began': round(time.time()), **_given(config),
        'devices': {'count': jax.device_count(), 'kind': device.device_kind,
                    'platform': device.platform, 'processes': jax.process_count()},
        'versions': {name.removeprefix(ckpt.VERSION): version
                     for name, version in ckpt.versions().items()}}


def _given(config) -> dict[str, Any]:
    """The config's file, and the fields that flags have changed: (its value, ours)."""
    flag = flags.FLAGS['config']
    if not flags.FLAGS.is_parsed():  # whoever called has made the config by hand
        return {'config_file': '', 'changed': {}}
    file, given = config_flags.get_config_filename(flag), config_flags.get_override_values(flag)
    try:
        base = config_lib.load(file) if given else None
    except Exception:  # the file is the user's code, and may not like to be run twice
        base = None
    changed = {name: [config_lib.field(base, name), config_lib.field(config, name)]
               for name in given}
    return {'config_file': file, 'changed': changed}


def run(config, workdir: Place, window: tuple[int, int] | None = None) -> None:
    """One run of any task, to its end; raises the errors that `main` puts in one line."""
    from ddmd_jax.report import page
    from ddmd_jax.train import codec, pretrain
    from ddmd_jax.train.train import Options, distill

    options = Options(window, page.write if config.log.report else None, about(config))
    tasks = {'distill': distill, 'pretrain': pretrain.pretrain, 'codec': codec.train_codec}
    tasks[config.task](config, workdir, options)
    if config.log.report:
        report(workdir)  # once more, with the evaluation


def report(workdir: Place) -> None:
    """Writes ``report.html``, by process 0; no run ends for it."""
    import jax

    from ddmd_jax.report import page

    if jax.process_index():
        return
    try:
        page.write(workdir)
    except Exception as e:  # of a template, a plotting library, a disk
        print(f'warning: {workdir / page.NAME} cannot be written ({e}); write it later with '
              f'`python -m ddmd_jax.report {workdir}`', file=sys.stderr)


def replay(config, workdir: Place) -> None:
    """Prints the step that went wrong last: a line on where it stood, then one for each figure."""
    from ddmd_jax.train import codec, pretrain, train

    task = {'distill': train, 'pretrain': pretrain, 'codec': codec}[config.task].prepare(config)
    entry = train.replay(task, config, workdir)
    place = 'the start' if entry['checkpoint'] is None else f'checkpoint {entry["checkpoint"]}'
    print(f'step {entry["step"]}, from {place}: batches {entry["batches"]}, rows {entry["rows"]}')
    for name, value in sorted(entry['metrics'].items()):
        print(f'{name} {value!r}{"" if math.isfinite(value) else "  <- not finite"}')


def main(argv: list[str]) -> None:
    """`_main`, and what may happen at any moment of it; a run under way has its own handlers."""
    commands.printable()
    try:
        _main(argv)
        commands.flush()
    except BrokenPipeError:
        commands.reader_gone()
    except KeyboardInterrupt:
        sys.exit('main: stopped')


def _main(argv: list[str]) -> None:
    if not flags.FLAGS['verbosity'].present:
        logging.set_verbosity(logging.WARNING)  # libraries' chatter hides the progress bar
    if len(argv) > 1:
        sys.exit(f'main: unexpected argument {argv[1]!r}; flags look like --config.field=value')
    if _CONFIG.value is None:
        sys.exit('main: no --config given; try --config=emoji')
    try:
        config_lib.check(_CONFIG.value)
    except config_lib.ConfigError as e:
        print(e, file=sys.stderr)
        sys.exit(2)
    window = profiled(_PROFILE.value)
    if not _WORKDIR.value:
        sys.exit('main: no --workdir given; name a folder for checkpoints and results')
    from ddmd_jax.parallel import distributed, sharding

    try:
        workdir = commands.folder('--workdir', _WORKDIR.value, places.GS)
        use_compile_cache(_COMPILE_CACHE.value, workdir, os.environ)
        distributed.start(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, os.environ,
                          _PEER_TIMEOUT.value)
        distributed.agree('config', shared(_CONFIG.value))
        sharding.all_devices()
    except UserError as e:
        distributed.fail(str(e))  # the other processes, too, if there are any yet

    from ddmd_jax.train.durable import lock, signals
    from ddmd_jax.train.durable.saving import HungError

    try:
        with signals.watched(), lock.held(workdir):
            if _REPLAY.value:
                replay(_CONFIG.value, workdir)
            else:
                run(_CONFIG.value, workdir, window)
    except signals.Stopped as e:
        print(f'main: {e}', file=sys.stderr)
    except HungError as e:
        distributed.fail(str(e), at_once=True)
    except UserError as e:
        distributed.fail(str(e))
    except Exception as e:  # what is neither the machine's nor another process's fault is a bug
        distributed.exit_if_lost(e)
        if fault := environment(e, workdir):
            distributed.fail(str(fault))
        distributed.exit_if_distributed(e)
        raise


parse_flags = config_lib.parser('main')


if __name__ == '__main__':
    app.run(main, flags_parser=parse_flags)
