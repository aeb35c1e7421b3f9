"""The table of bad inputs in docs/bad_inputs.md: what each ends with, from processes that had it.

    python tests/faults/bad_inputs.py      # writes the table into docs/bad_inputs.md

One process imports what all need and forks one for each case before JAX has any device; there
the command runs as ``python -m`` runs it. Exit codes and lines are therefore those of processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pickle
import re
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / 'docs' / 'bad_inputs.md'
MARKS = '<!-- table -->', '<!-- end -->'
RUN = ('--config=configs/emoji.py', '--workdir=DIR/run')


def nothing(folder: Path) -> None:
    """The folder is empty."""


def write(name: str, text: str) -> Callable[[Path], None]:
    """A file with a text."""
    def make(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return make


def trap(folder: Path) -> None:
    """A pickle that leaves a file behind if it is ever loaded."""
    class Trap:
        def __reduce__(self):
            return os.system, (f'touch {folder}/executed',)

    (folder / 'weights.safetensors').write_bytes(pickle.dumps(Trap()))


def of_another_codec(folder: Path) -> None:
    """The embedded teacher, trained on another codec's latents as its file says."""
    raw = (ROOT / 'ddmd_jax/families/emoji/files/teacher.safetensors').read_bytes()
    end = 8 + int.from_bytes(raw[:8], 'little')
    header = json.loads(raw[8:end])
    header['__metadata__']['codec'] = '0123456789abcdef'
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)
    (folder / 'weights.safetensors').write_bytes(
        len(text).to_bytes(8, 'little') + text + raw[end:])


def damaged_run(folder: Path) -> None:
    """A run whose one checkpoint lacks its arrays."""
    write('run/checkpoints/4/manifest/metadata', '{"seed": 0}')(folder)


def other_run(folder: Path) -> None:
    """A run's checkpoint, but for its arrays, of a config without fields."""
    for item in ('state', 'data'):
        write(f'run/checkpoints/4/{item}/metadata', '{}')(folder)
    damaged_run(folder)


def locked(folder: Path) -> None:
    """A folder that this process has locked; the one forked from it inherits no lock by `open`."""
    import fcntl

    write('run/lock', 'process 4711 on host, since 2026-01-01 00:00:00 +0000\n')(folder)
    fcntl.flock(os.open(folder / 'run' / 'lock', os.O_RDWR), fcntl.LOCK_EX)


EVALUATE = ('--suite=hps_v3', '--prompts=hps_v3=DIR/prompts', '--limit=1', '--images=DIR/images',
            '--results=hps_v3=DIR/scores.csv', '--out=DIR/out')


def benchmark(folder: Path) -> None:
    """HPS v3's prompts in the published number, an image of each first one, and their scores."""
    import numpy as np

    from ddmd_jax.evaluation import pictures, suites

    rows = ['prompt,score']
    for i, category in enumerate(suites.CATEGORIES):
        texts = [f'{category} {k}' for k in range(1000)]
        write(f'prompts/benchmark_{category}.json', json.dumps(
            [{'caption': text} for text in texts]))(folder)
        write(f'images/{category}/00000.png', '')(folder)
        (folder / 'images' / category / '00000.png').write_bytes(
            pictures.png(np.full((8, 8, 3), i, np.uint8), {}))
        rows.append(f'{texts[0]},{i}')
    write('scores.csv', '\n'.join(rows))(folder)


def spoilt(spoil: Callable[[Path], object]) -> Callable[[Path], None]:
    """A benchmark of which something is wrong."""
    def make(folder: Path) -> None:
        benchmark(folder)
        spoil(folder)
    return make


def other_shape(folder: Path) -> None:
    """Inception's weights by their names, but of other shapes."""
    import numpy as np
    import safetensors.numpy
    from flax import nnx

    from ddmd_jax.models import inception
    from ddmd_jax.models.layers import abstract_params
    from ddmd_jax.weights import flat

    shapes = flat.flatten(abstract_params(lambda: inception.Inception(nnx.Rngs(0))))
    safetensors.numpy.save_file(
        {name: np.zeros(3, np.float32) for path, leaf in shapes.items()
         for name in inception.entry(path).names(leaf.shape)}, folder / 'fid.safetensors')


def python(folder: Path) -> None:
    """A Python that has nothing installed."""
    (folder / 'python').write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    (folder / 'python').chmod(0o755)


@dataclasses.dataclass(frozen=True)
class Case:
    """A command with bad arguments; DIR in them stands for a folder that `make` has filled."""

    what: str
    command: str
    args: tuple[str, ...]
    make: Callable[[Path], None] = nothing
    environ: dict[str, str] = dataclasses.field(default_factory=dict)


def field(what: str, *args: str, config: str = 'emoji') -> Case:
    """A run with wrong fields."""
    run = (f'--config=configs/{config}.py', '--workdir=DIR/run')
    return Case(what, 'main', run + tuple(f'--config.{a}' for a in args))


CASES = (
    Case('no config', 'main', ()),
    Case('no such config', 'main', ('--config=nofile.py', '--workdir=DIR/run')),
    Case('no workdir', 'main', RUN[:1]),
    Case('a workdir that cannot be made', 'main', (*RUN[:1], '--workdir=/proc/nowhere')),
    Case('a stray argument', 'main', (*RUN, 'more')),
    Case('no such flag', 'main', (*RUN, '--wrokdir=x')),
    Case('a cache that cannot be made', 'main', (*RUN, '--compile_cache=/proc/nowhere')),
    Case('one of three flags', 'main', (*RUN, '--num_processes=2')),
    Case('a process too many', 'main', (*RUN, '--coordinator=localhost:1', '--num_processes=2',
                                        '--process_id=2')),
    Case('no time to answer', 'main', (*RUN, '--peer_timeout=0')),
    field('a misspelt field', 'method.alhpa=3'),
    field('a word for a number', 'train.steps=few'),
    field('a schedule that is none', 'method.schedule=hybird'),
    field('guidance that guides nothing', 'method.alpha=1.0'),
    field('an empty range', 'method.tau_ca=(0.5, 0.5)'),
    field('a batch that does not divide', 'data.global_batch=30'),
    field('two sources', 'resume=runs/a', 'init_from=runs/b'),
    field('what to do about NaN', 'train.on_nan=panic'),
    field('which is best', 'checkpoint.best_mode=least'),
    field('a negative threshold', 'train.spike=-1.0'),
    field('a mesh of more devices than there are', 'mesh.data=3'),
    field('no teacher', 'teacher.path=DIR/nowhere.safetensors'),
    Case('a teacher that is no safetensors file', 'main',
         (*RUN, '--config.teacher.path=DIR/weights.safetensors'),
         write('weights.safetensors', 'no weights')),
    Case('a pickle in place of the teacher', 'main',
         (*RUN, '--config.teacher.path=DIR/weights.safetensors'), trap),
    Case("a teacher of another codec's latents", 'main',
         (*RUN, '--config.teacher.path=DIR/weights.safetensors'), of_another_codec),
    Case('a teacher trained again on another codec', 'main',
         ('--config=configs/emoji_teacher.py', '--workdir=DIR/run',
          '--config.init_from=DIR/weights.safetensors'), of_another_codec),
    Case('no packages to draw from', 'prepare',
         ('emoji', '--packages=DIR/nowhere', '--out=DIR/out'), nothing),
    Case('no such folder on the hub', 'main',
         ('--config=configs/lumina.py', '--workdir=DIR/run', '--config.teacher.path=no/such',
          '--config.mesh.data=1', '--config.mesh.fsdp=1'),
         environ={'HF_HUB_OFFLINE': '1'}),
    field('no prompts', 'data.path=DIR/nowhere', config='emoji_prompts'),
    Case('a folder that another run has', 'main', RUN, locked),
    field('nothing to resume', 'resume=DIR/nowhere'),
    field('no weights to start from', 'init_from=DIR/nowhere'),
    Case('every checkpoint damaged', 'main', RUN, damaged_run),
    Case('nothing to replay', 'main', (*RUN, '--replay')),
    Case('no run to list', 'checkpoints', ()),
    Case('a folder without checkpoints', 'checkpoints', ('DIR',)),
    Case('a damaged checkpoint', 'checkpoints', ('DIR/run', '--verify'), damaged_run),
    Case('keep nothing', 'checkpoints', ('DIR/run', '--prune', '--keep=0'), damaged_run),
    Case('a run that is going on is pruned', 'checkpoints', ('DIR/run', '--prune'),
         lambda folder: (damaged_run(folder), locked(folder))),
    Case('no checkpoint to export', 'export', ('--checkpoint=DIR', '--out=DIR/out')),
    Case('a student of a teacher nobody knows', 'export', ('--checkpoint=DIR/run', '--out=DIR/out'),
         other_run),
    Case('no place on the hub', 'export', ('--checkpoint=DIR/run', '--out=DIR/out', '--push=me')),
    Case('no run to report of', 'report', ('DIR',)),
    Case('a damaged file of a run', 'report', ('DIR/run',),
         lambda folder: (write('run/config.json', '{}')(folder),
                         write('run/eval.json', '{')(folder))),
    Case('a window that is none', 'main', (*RUN, '--profile=20:10')),
    Case('a benchmark of a prompt less', 'evaluate', EVALUATE, spoilt(write(
        'prompts/benchmark_Arts.json', json.dumps([{'caption': 'a cat'}] * 999)))),
    Case('weights that are not the published ones', 'evaluate',
         (*EVALUATE, '--metrics=fid', '--reference=DIR/images',
          '--weights=fid=DIR/weights-inception-2015-12-05-6726825d.pth'),
         spoilt(write('weights-inception-2015-12-05-6726825d.pth', 'another'))),
    Case('weights of another shape', 'evaluate',
         (*EVALUATE, '--metrics=fid', '--reference=DIR/images',
          '--weights=fid=DIR/fid.safetensors'),
         spoilt(other_shape)),
    Case('an image that is missing', 'evaluate', EVALUATE,
         spoilt(lambda folder: (folder / 'images/Food/00000.png').unlink())),
    Case('an image that cannot be decoded', 'evaluate', EVALUATE,
         spoilt(write('images/Food/00000.png', 'half of it'))),
    Case('a score that is NaN', 'evaluate', EVALUATE,
         spoilt(lambda folder: (folder / 'scores.csv').write_text(
             (folder / 'scores.csv').read_text().replace('Food 0,5', 'Food 0,nan')))),
    Case('a Python without the package', 'evaluate',
         (*(x for x in EVALUATE if 'results' not in x), '--metrics=hps_v3',
          '--python=hps_v3=DIR/python'),
         spoilt(python)),
    Case('no such suite', 'study', ('--config=configs/emoji.py', '--workdir=DIR', '--suite=all')),
)


def outcome(case: Case, folder: Path) -> tuple[int, str]:
    """(exit code, lines on stderr) of a process forked here that runs `case`."""
    case.make(folder)
    args = [arg.replace('DIR', str(folder)) for arg in case.args]
    log = folder / 'stderr'
    child = os.fork()
    if child == 0:
        _become(f'ddmd_jax.{case.command}', args, log, case.environ)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    lines = [' '.join(x.split()) for x in log.read_text().replace('\r', '\n').splitlines()]
    if (folder / 'executed').exists():
        lines.append('EXECUTED')
    wanted = re.compile(r'(main|config|checkpoints|prepare|export|report|study|evaluate|EXECUTED|'
                        r'Traceback|\w+\.\w+|\w+_\w+)\b.*')
    told = [x for x in lines if wanted.match(x) and not x.startswith('config: 1 field is wrong')
            and f'{case.command}: {x}' not in lines]  # what it says again below its table
    return code, ' / '.join(told).replace(str(folder), 'DIR')


def _become(module: str, args: list[str], log: Path, environ: dict[str, str]) -> None:
    """Runs a command in this process as ``python -m`` does; does not return."""
    target = os.open(log, os.O_CREAT | os.O_WRONLY)
    os.dup2(target, 2)
    os.dup2(target, 1)
    os.environ |= environ
    sys.argv = [module, *args]
    code = 0
    try:
        runpy.run_module(module, run_name='__main__', alter_sys=True)
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
        if isinstance(e.code, str):
            os.write(2, f'{e.code}\n'.encode())
    except BaseException as e:  # what Python itself would have said
        os.write(2, f'Traceback: {e!r}\n'.encode())
        code = 1
    finally:
        os._exit(code)


def outcomes() -> list[tuple[int, str]]:
    """Of every case, in a process without devices."""
    done = subprocess.run([sys.executable, __file__, '--json'], cwd=ROOT, capture_output=True,
                          text=True, check=False, timeout=600, env=os.environ | {
                              'JAX_PLATFORMS': 'cpu', 'PYTHONWARNINGS': 'ignore', 'COLUMNS': '400',
                              'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
                              'PYTHONPATH': str(ROOT)})
    assert done.returncode == 0, done.stderr
    return [tuple(x) for x in json.loads(done.stdout.splitlines()[-1])]


def table(found: list[tuple[int, str]]) -> str:
    """Lines of markdown."""
    safe = lambda text: text.replace('|', '\\|').replace('`', "'")
    rows = ['| input | command | code | said |', '|---|---|---|---|']
    for case, (code, told) in zip(CASES, found, strict=True):
        command = ' '.join((case.command, *(a.replace(' ', '') for a in case.args)))
        rows.append(f'| {case.what} | `{safe(command)}` | {code} | `{safe(told)}` |')
    return '\n'.join(rows)


def in_docs() -> str:
    """The table that docs/bad_inputs.md holds."""
    return DOCS.read_text().split(MARKS[0])[1].split(MARKS[1])[0].strip()


if __name__ == '__main__':
    if '--json' not in sys.argv:
        text = DOCS.read_text()
        new = f'{MARKS[0]}\n{table(outcomes())}\n{MARKS[1]}'
        DOCS.write_text(text.replace(f'{MARKS[0]}{text.split(MARKS[0])[1].split(MARKS[1])[0]}'
                                     f'{MARKS[1]}', new))
        sys.exit()
    sys.path[:0] = [str(ROOT)]
    with contextlib.redirect_stdout(sys.stderr):
        # What takes time to import, so that it takes it once; no device is touched.
        from ddmd_jax.parallel import distributed  # noqa: F401
        from ddmd_jax.train.durable import lock  # noqa: F401
    results = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            results.append(outcome(case, Path(folder)))
    print(json.dumps(results))
