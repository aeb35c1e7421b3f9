"""Damaged inputs at the doors of the commands, each drawn from a seed; `test_fuzz` runs a few.

    python tests/fuzz.py --inputs=20000 --seed=1       # by hand: what is wrong is printed, and 1

A door is what a command calls, with the frame that the command has (`commands.call`), in this
process. It must end with the project's own one line, or with 0 and what is right: what the
undamaged input gives, or what Python's own readers make of the damaged one. Never a traceback;
and what was to be read is as it was.
"""

from __future__ import annotations

import argparse
import atexit
import codecs
import contextlib
import copy
import csv
import dataclasses
import functools
import io
import json
import random
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import array_record.python.array_record_data_source  # noqa: F401 - it has flags of its own
from absl import flags

from ddmd_jax.util import commands

FLAGS = flags.FLAGS
_BEFORE = set(FLAGS)  # absl's, and libraries'


class FoundError(AssertionError):
    """A damaged input that did not end as it must."""


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a command ended: its code, its lines on stderr, and what it returned."""

    code: int
    said: str
    value: Any = None
    out: str = ''


@contextlib.contextmanager
def defined(define_flags: Callable[[], None]):
    """The flags of one command, as if it were alone in its process: `main` has its own at once."""
    others = {name: FLAGS[name] for name in set(FLAGS) - _BEFORE}
    for name in others:
        delattr(FLAGS, name)
    define_flags()
    try:
        yield
    finally:
        FLAGS.unparse_flags()
        for name in set(FLAGS) - _BEFORE:
            delattr(FLAGS, name)
        for name, flag in others.items():
            FLAGS[name] = flag


def call(name: str, act: Callable[[list[str]], Any], args: Sequence[str] = (),
         define_flags: Callable[[], None] = lambda: None, parse: Any = None) -> Ended:
    """Runs `act` in the frame of the command `name`; raises `FoundError` where the frame breaks."""
    value, err, out, code = [], io.StringIO(), io.StringIO(), 0
    with defined(define_flags), contextlib.redirect_stderr(err), contextlib.redirect_stdout(out):
        try:
            argv = (parse or commands.parser(name))([name, *args])
            commands.call(name, lambda rest: value.append(act(rest)), argv)
        except SystemExit as e:
            if isinstance(e.code, str):
                print(e.code, file=err)
            code = e.code if isinstance(e.code, int) else int(e.code is not None)
        except BaseException as e:
            raise FoundError(f'{name} {args}: traceback\n{traceback.format_exc()}') from e
    ended = Ended(code, err.getvalue(), value[0] if value else None, out.getvalue())
    heads = (f'{name}: ', 'config: ') if parse else f'{name}: '
    own = [x for x in ended.said.splitlines() if x.startswith(heads)]
    if code and len(own) != 1:
        raise FoundError(f'{name} {args}: code {code} with {ended.said!r}')
    return ended


def content(folder: Path) -> dict[str, Any]:
    """Names and bytes of everything below a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() if p.is_file() else None
            for p in sorted(folder.rglob('*'))}


# --- Damage to bytes, to files, to JSON ---


def spoilt(rng: random.Random, raw: bytes) -> bytes:
    """Bytes with one damage."""
    at = rng.randrange(len(raw) + 1)
    kind = rng.randrange(7)
    if kind == 0:
        return b''
    if kind == 1:
        return raw[:at]
    if kind == 2 and raw:
        at %= len(raw)
        return raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1:]
    if kind == 3:
        return raw[:at] + b'\0' * rng.choice((1, 8, 64)) + raw[at:]
    if kind == 4:
        return raw[:at] + rng.randbytes(rng.choice((1, 3, 40))) + raw[at:]
    if kind == 5:
        return raw + rng.choice((b'\0', b'\n', b'}', b'{"a": 1}\n', raw))
    return raw[at:]


ODD = (None, True, False, 0, -1, 1, 2**31, 2**63, 10**400, -0.5, 1e308, float('nan'), float('inf'),
       '', 'x', '\u00e9\U0001f34e', '../..', '/', 'nan', [], [[]], {}, [None], {'': None},
       [1, 2, 3], {'a': {'b': []}}, 'a' * 300)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Every place in a JSON value, the whole first."""
    found = [path]
    items = value.items() if isinstance(value, dict) else (
        enumerate(value) if isinstance(value, list) else ())
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


def mangled(rng: random.Random, value: Any) -> Any:
    """A JSON value with something else, or nothing, at one or two of its places."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2))):
        path = rng.choice(places(value))
        odd = copy.deepcopy(rng.choice(ODD))
        if not path:
            if rng.random() < 0.3:
                return odd
            continue
        inner = value
        for key in path[:-1]:
            inner = inner[key]
        if rng.random() < 0.25:
            del inner[path[-1]]
        else:
            inner[path[-1]] = odd
    return value


def bad_json(rng: random.Random, value: Any) -> bytes:
    """The text of a JSON file that is not as it was written: in its bytes, or in its values."""
    whole = json.dumps(value, indent=rng.choice((None, 1)))
    kind = rng.randrange(8)
    if kind == 0:
        return spoilt(rng, whole.encode())
    if kind == 1:
        return b'[' * 100_000
    if kind == 2:
        return whole.encode(rng.choice(('utf-16', 'utf-8-sig', 'utf-32', 'utf-16-le')))
    if kind == 3:
        return b'1' * 5000
    return json.dumps(mangled(rng, value)).encode()


def ruin(rng: random.Random, file: Path) -> str:
    """One damage to a file; says which."""
    kind = rng.randrange(8)
    if kind == 0:
        file.unlink()
        return 'absent'
    if kind == 1:
        file.unlink()
        file.mkdir()
        return 'a folder'
    if kind == 2:
        file.rename(file.with_name(file.name + '.old'))
        return 'renamed'
    if kind == 3:
        file.unlink()
        file.symlink_to('/nowhere/at/all')
        return 'a link to nothing'
    before = file.read_bytes()
    file.write_bytes(spoilt(rng, before))
    return 'bytes' if file.read_bytes() != before else 'nothing'


# --- Files of prompts ---

TEXTS = ('a cat', 'a dog, two cats', 'say "hi"', '"', "it's", 'caf\u00e9', '\u732b\u306e\u7d75',
         '\U0001f34e and \U0001f1e9\U0001f1ea', 'tab\there', 'two\nlines', 'old\rmac', 'a\r\nb',
         '\u202ertl', 'a\u2028b', 'a\x85b', 'a\x0bb\x0cc', ' padded ', '', '   ', '\ufeffmark',
         '# no comment', '{"a": 1}', '[1]', 'null', 'NaN', '-1', '1e400', '=SUM(A1)', '\\n', '\\',
         'a;b', 'a|b', 'e\u0301', 'x' * 2500, '\x1b[31mred', '~/$HOME', 'a\x00b')
NAMES = ('prompt', 'caption', 'a.b', '', 'pr\u00f6mpt', ' prompt')
ENCODINGS = ('utf-8', 'utf-8', 'utf-8', 'utf-8-sig', 'utf-16', 'utf-32', 'utf-16-le', 'utf-16-be',
             'latin-1', 'cp1252', 'shift_jis', 'gb18030', 'koi8-r', 'utf-7')


def decoded(raw: bytes) -> str | None:
    """The text of a file, by its mark or as UTF-8; None where it cannot be told, or is no text."""
    marks = ((codecs.BOM_UTF32_LE, 'utf-32'), (codecs.BOM_UTF32_BE, 'utf-32'),
             (codecs.BOM_UTF16_LE, 'utf-16'), (codecs.BOM_UTF16_BE, 'utf-16'))
    kind = next((name for mark, name in marks if raw.startswith(mark)), 'utf-8-sig')
    try:
        text = raw.decode(kind)
    except UnicodeDecodeError:
        return None
    return None if '\0' in text else text


def reference(file: Path, field: str) -> list[str] | None:
    """What Python's own readers and pyarrow find in a file of prompts; None: it must be refused."""
    raw, kind = file.read_bytes(), file.suffix.lower()
    if kind == '.parquet':
        return _parquet(file, field)
    text = decoded(raw)
    if text is None or kind not in ('.txt', '.csv', '.tsv', '.jsonl'):
        return None
    if kind == '.txt':
        return text.replace('\r\n', '\n').replace('\r', '\n').split('\n')
    if kind == '.jsonl':
        try:
            rows = [json.loads(x) for x in io.StringIO(text, newline=None) if x.strip()]
        except (ValueError, RecursionError):
            return None
        good = all(isinstance(r, dict) and field in r and isinstance(r[field], str | None)
                   for r in rows)
        return [r[field] or '' for r in rows] if good else None
    csv.field_size_limit(2**31 - 1)
    try:
        rows = list(csv.reader(io.StringIO(text, newline=''),
                               delimiter=',' if kind == '.csv' else '\t', strict=True))
    except csv.Error:
        return None
    if not rows:
        return []
    head, *rows = rows
    if head.count(field) != 1 or any(r and len(r) != len(head) for r in rows):
        return None
    return [r[head.index(field)] for r in rows if r]


def _parquet(file: Path, field: str) -> list[str] | None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        opened = pq.ParquetFile(file)
        if opened.schema_arrow.names.count(field) != 1:
            return None
        values = opened.read([field]).column(field).to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError, ValueError):
        return None
    return [v or '' for v in values] if all(isinstance(v, str | None) for v in values) else None


def _written(rng: random.Random, file: Path, field: str) -> None:
    """A file of prompts as the world has them."""
    texts = [rng.choice(TEXTS) for _ in range(rng.choice((0, 1, 2, 5, 9)))]
    end, kind = rng.choice(('\n', '\r\n', '\r', '\n\r', '\u2028')), file.suffix.lower()
    others = [rng.choice(NAMES) for _ in range(rng.randrange(3))]
    heads = rng.sample([*others, field], len(others) + 1)
    row = lambda x: [x if name == field else rng.choice(TEXTS) for name in heads]
    if kind == '.parquet':
        return _write_parquet(rng, file, field, texts)
    if kind in ('.csv', '.tsv'):
        out = io.StringIO(newline='')
        try:
            writer = csv.writer(out, delimiter=rng.choice((',', '\t', ';')) if rng.random() < 0.2
                                else ',' if kind == '.csv' else '\t', lineterminator=end,
                                quoting=rng.choice((csv.QUOTE_MINIMAL, csv.QUOTE_ALL)))
            writer.writerows([heads, *map(row, texts)])
        except csv.Error:  # of line ends that it does not know
            out.write(end.join(','.join(row(x)) for x in texts))
        text = out.getvalue()
    elif kind == '.jsonl':
        def value(x):
            return x if rng.random() < 0.9 else rng.choice((*ODD, '\ud83c', b'1'.hex()))
        text = end.join(json.dumps({name: value(x) for name, x in zip(heads, row(t))},
                                   ensure_ascii=rng.random() < 0.5) for t in texts)
    elif kind == '.json':
        text = json.dumps([{field: x} for x in texts])
    else:
        text = end.join(x for x in texts)
    text += end if rng.random() < 0.7 else ''
    file.write_bytes(text.encode(rng.choice(ENCODINGS), 'replace'))


def _write_parquet(rng: random.Random, file: Path, field: str, texts: list[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = [pa.string(), pa.large_string(), pa.string_view(),
             pa.dictionary(pa.int8(), pa.string()), pa.binary(), pa.list_(pa.string()),
             pa.struct([('prompt', pa.string())]), pa.int64(), pa.null(), pa.bool_(),
             pa.timestamp('s')]
    kind = rng.choice(kinds[:4]) if rng.random() < 0.6 else rng.choice(kinds)
    if pa.types.is_list(kind):
        values = [[t] for t in texts]
    elif pa.types.is_struct(kind):
        values = [{'prompt': t} for t in texts]
    elif kind in (pa.int64(), pa.timestamp('s')):
        values = list(range(len(texts)))
    elif kind == pa.null():
        values = [None] * len(texts)
    elif kind == pa.bool_():
        values = [True] * len(texts)
    elif kind == pa.binary():
        values = [t.encode() for t in texts]
    else:
        values = [t if rng.random() < 0.9 else None for t in texts]
    column = pa.array(values, kind)
    names, columns = [field], [column]
    if rng.random() < 0.4:
        names.append(rng.choice(NAMES))
        columns.append(pa.array(range(len(texts)), pa.int32()))
    try:
        pq.write_table(pa.Table.from_arrays(columns, names), file,
                       compression=rng.choice(('none', 'snappy', 'gzip', 'zstd')),
                       row_group_size=rng.choice((1, 4)))
    except pa.ArrowException:  # a type that this version does not write
        pq.write_table(pa.table({field: texts}), file)


def of_prompts(rng: random.Random, folder: Path) -> None:
    """`prepare prompts` of one file, in whatever form."""
    import gzip

    from ddmd_jax import prepare
    from ddmd_jax.data.prompts import build
    from ddmd_jax.data.prompts.text import normalise

    kind = rng.choice(('.txt', '.csv', '.tsv', '.jsonl', '.parquet', '.TXT', '.json'))
    field = rng.choice(('prompt', 'prompt', *NAMES))
    file, out = folder / f'p{kind}', folder / 'out'
    _written(rng, file, field)
    if rng.random() < 0.4:
        file.write_bytes(spoilt(rng, file.read_bytes()))
    if rng.random() < 0.05:
        file.write_bytes(gzip.compress(file.read_bytes()))
    share = rng.choice((0, 0.5, 1))
    before = content(folder)
    ended = call('prepare', lambda rest: prepare.prompts(), [
        f'--input={file}', f'--out={out}', f'--field={field}', '--near_threshold=1',
        f'--validation={share}'], prepare.prompts_flags)
    wanted = reference(file, field)
    wanted = wanted and {p for t in wanted if 0 < len(p := normalise(t)) <= 2000}
    if ended.code:
        if content(folder) != before:
            raise FoundError('refused, and something was written')
        if wanted:
            raise FoundError(f'{file.name} can be read, and was refused: {ended.said}')
        return
    if not wanted:
        raise FoundError(f'{file.name}: {file.read_bytes()[:200]!r} was read, and is to be refused')
    found = [p for split in ('train', 'validation') for p in build.open_set(out, split)]
    if sorted(found) != sorted(wanted):
        raise FoundError(f'{file.name}: {file.read_bytes()[:200]!r} was read as {found}, not '
                         f'{sorted(wanted)}')


# --- Folders that the commands have made ---


@dataclasses.dataclass(frozen=True)
class Made:
    """Undamaged folders, made once: `set` of prompts, `embeddings`, `run` of an emoji student,
    `latents` of real images, `evaluation`."""

    set: Path
    embeddings: Path
    run: Path
    teacher: Path
    latents: Path

    @classmethod
    def below(cls, folder: Path) -> Made:
        import jax
        import numpy as np
        import tiny
        from PIL import Image
        from saved import save
        from test_report import make_run

        from ddmd_jax import families
        from ddmd_jax.data import embeddings
        from ddmd_jax.data.images import cache
        from ddmd_jax.data.prompts import build

        (folder / 'p.txt').write_text('\n'.join(f'{a} {b}' for a in 'abcdef' for b in 'uvwxyz'))
        build.prepare(build.Settings((str(folder / 'p.txt'),), near_threshold=1.0, validation=0.3),
                      folder / 'set')
        rng = np.random.default_rng(0)
        part = lambda n: {'embeds': rng.normal(size=(n, 8)).astype(embeddings.FLOAT),
                          'pooled': rng.normal(size=3).astype(embeddings.FLOAT)}
        embeddings.write(folder / 'embeddings', {'width': 8, 'length': 4, 'identity': '0' * 16},
                         part(1), [(f'prompt {i}', part(1 + i % 4)) for i in range(12)])
        teacher = tiny.save_toy(folder)
        loaded = families.load_teacher(str(teacher))
        run = make_run(folder / 'run', lines=12, pictures=1)
        save(run, {'task': 'distill', 'teacher.name': 'emoji', 'teacher.path': str(teacher),
                   'teacher.dtype': 'float32', 'student.steps': 2,
                   'teacher_identity': loaded.identity},
             jax.tree.map(np.asarray, loaded.params), step=7)
        rows = [{'name': n, 'steps': 2, 'evaluations': 2, 'guidance': 1.0, 'frechet': i + 0.5}
                for i, n in enumerate(('teacher_few_step', 'student'))]
        (run / 'eval.json').write_text(json.dumps({
            'rows': rows, 'seconds': {'input_wait': 0.5}, 'step': 7, 'seed': 0,
            'config': json.loads((run / 'config.json').read_text())}))
        Image.new('RGB', (8, 8)).save(run / 'samples.png')
        sizes = {'sizes': [[8, 8], [8, 16]], 'factor': 2, 'channels': 3}
        state = {'first': '0.png', 'last': '2.png', 'images': '0', 'captions': '0'}
        parts = cache.Parts(folder / 'latents', {'codec': 'y', **sizes}, {'input': 'x'},
                            [state] * 2)
        for part in range(2):
            parts.write(part, [(f'{i}.png', f'caption {i}', i % 2, rng.normal(
                size=(4, 8 if i % 2 else 4, 3))) for i in range(3)], f'{part}', [])
        parts.finish([parts.done(0), parts.done(1)])
        return cls(folder / 'set', folder / 'embeddings', run, teacher, folder / 'latents')


@functools.cache
def made() -> Made:
    folder = Path(tempfile.mkdtemp(prefix='ddmd_fuzz_made_'))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Made.below(folder)


def damaged(rng: random.Random, folder: Path, files: list[str]) -> str:
    """Damages one of the `files` of a folder; says which, or '' where it is as it was."""
    name = rng.choice(files)
    if name.endswith('.json') and rng.random() < 0.8:
        value = json.loads((folder / name).read_bytes())
        (folder / name).write_bytes(bad_json(rng, value))
        return name
    return name if ruin(rng, folder / name) != 'nothing' else ''


def of_set(rng: random.Random, folder: Path) -> None:
    """A set of prompts, as `sample --prompts` and all others open it."""
    from ddmd_jax import sample

    here = Path(shutil.copytree(made().set, folder / 'set'))
    name = damaged(rng, here, ['card.json', 'card.json', 'train.array_record',
                               'validation.array_record'])
    before = content(folder)
    for split in ('train', 'validation'):
        ended = call('sample', lambda rest, split=split: sample.read_prompts([], str(here), split))
        if not ended.code and ended.value != sample.read_prompts([], str(made().set), split):
            raise FoundError(f'{name} is damaged, and other prompts were read')
    if content(folder) != before:
        raise FoundError('what was read has changed')


def of_embeddings(rng: random.Random, folder: Path) -> None:
    """A folder of embeddings, as a run opens it and reads its batches."""
    import numpy as np

    from ddmd_jax.data import conditioning

    def read(path):
        prompts = conditioning.open_embeddings(str(path), 8)
        arrays = [x for cond in (prompts.null, prompts.lookup(prompts.rows))
                  for _, x in sorted(cond.items())]
        # Not the identity: it is what the card says, and of another name is another data set.
        return [prompts.lengths, *arrays, *map(prompts.caption, prompts.rows)]

    here = Path(shutil.copytree(made().embeddings, folder / 'embeddings'))
    names = ['card.json', 'card.json', 'index.safetensors', 'null.safetensors',
             'embeddings.array_record']
    name = _other_arrays(rng, here) if rng.random() < 0.2 else damaged(rng, here, names)
    before = content(folder)
    ended = call('main', lambda rest: read(here))
    if not ended.code:
        wanted = read(made().embeddings)
        if not all(map(np.array_equal, ended.value, wanted)) or len(ended.value) != len(wanted):
            raise FoundError(f'{name} is damaged, and other arrays were read')
    if content(folder) != before:
        raise FoundError('what was read has changed')


def _other_arrays(rng: random.Random, folder: Path) -> str:
    """Arrays of another shape, dtype or name, well written."""
    import ml_dtypes
    import numpy as np
    import safetensors.numpy as st

    name = rng.choice(('index.safetensors', 'null.safetensors'))
    shapes = ((12,), (12, 1), (11,), (0,), (), (1, 8), (2, 9), (5, 8), (1, 8, 1), (3,))
    kinds = (np.int32, np.int64, np.float32, ml_dtypes.bfloat16, np.uint8)
    keys = ('lengths',) if name.startswith('index') else ('embeds', 'pooled', 'other')
    st.save_file({k: np.full(rng.choice(shapes), rng.choice((0, 1, 2, 200)), rng.choice(kinds))
                  for k in keys[:rng.randint(1, 3)]}, folder / name)
    return name


def of_latents(rng: random.Random, folder: Path) -> None:
    """A folder of real images' latents, as a run opens it and reads its batches."""
    import numpy as np

    from ddmd_jax.data.images.cache import ImageCache

    def read(path):
        stored = ImageCache(path)
        rows = range(len(stored))
        return [stored.identity, stored.codec, stored.shapes, stored.buckets, *map(
            stored.__getitem__, rows), *map(stored.name, rows), *map(
                lambda row: stored.latents([row]), rows)]

    here = Path(shutil.copytree(made().latents, folder / 'latents'))
    name = damaged(rng, here, ['card.json', 'card.json', 'index.safetensors',
                               'images-00000.array_record', 'images-00001.array_record'])
    before = content(folder)
    ended = call('main', lambda rest: read(here))
    if not ended.code:
        wanted = read(made().latents)
        if len(ended.value) != len(wanted) or not all(map(np.array_equal, ended.value, wanted)):
            raise FoundError(f'{name} is damaged, and other latents were read')
    if content(folder) != before:
        raise FoundError('what was read has changed')


FILES = ('config.json', 'run.json', 'eval.json', 'metrics.jsonl', 'times.jsonl')


def _bad_lines(rng: random.Random, raw: bytes) -> bytes:
    """JSON lines, one of them mangled."""
    lines = [json.loads(x) for x in raw.splitlines()]
    at = rng.randrange(len(lines))
    text = [json.dumps(x).encode() for x in lines]
    text[at] = bad_json(rng, lines[at]).replace(b'\n', b' ')
    return b'\n'.join(text) + b'\n' * rng.randrange(3)


def of_run_files(rng: random.Random, folder: Path) -> None:
    """The JSON of a run's folder, as `report`, `summarise` and `export` read it."""
    from ddmd_jax.export import card
    from ddmd_jax.export.student import field_of
    from ddmd_jax.report import page
    from ddmd_jax.study import summarise
    from ddmd_jax.train.durable import checkpoint as ckpt

    here = Path(shutil.copytree(made().run, folder / 'run',
                                ignore=shutil.ignore_patterns('checkpoints', 'pictures')))
    name = rng.choice(FILES)
    if rng.random() < 0.8:
        bad = _bad_lines(rng, (here / name).read_bytes()) if name.endswith('l') else (
            bad_json(rng, json.loads((here / name).read_bytes())))
        (here / name).write_bytes(bad)
    else:
        ruin(rng, here / name)
    before = content(here)
    told = [call('report', lambda rest: page.render([_read(here)])),
            call('summarise', lambda rest: summarise.main([str(here)]))]
    student = _student(here, ckpt.saved(made().run))
    told.append(call('export', lambda rest: (
        card.write(student, folder, 'orbax', _exported(student), 'its own', card.read(student)),
        field_of(here, 'student.sampler'))))
    if content(here) != before:
        raise FoundError('what was read has changed')
    if name in ('config.json', 'run.json', 'eval.json') and not _parses(here / name) and (
            not told[0].code):
        raise FoundError(f'{name} is no JSON object, and a report was written')


def _parses(file: Path) -> bool:
    try:
        return not file.exists() and file.name != 'config.json' or isinstance(
            json.loads(file.read_bytes()), dict)
    except (OSError, ValueError, RecursionError):
        return False


def _read(folder: Path) -> Any:
    from ddmd_jax.report import read

    return read.read(folder)


def _student(workdir: Path, saved: Any) -> Any:
    from ddmd_jax import families
    from ddmd_jax.export import student

    family = families.get('emoji')
    export = student.plain_export(family)
    return student.Student(workdir, saved, 'emoji', export, None, True, None, '', '')


def _exported(student: Any) -> Any:
    from ddmd_jax.families.family import Exported

    return Exported(None, None, 7, 2, None, 'float32', student.sampler + '!')


def of_checkpoint(rng: random.Random, folder: Path) -> None:
    """A run's checkpoint, as `checkpoints`, `export` and `sample` open it."""
    import numpy as np

    from ddmd_jax import checkpoints
    from ddmd_jax.train.durable import checkpoint as ckpt, checksums

    here = Path(shutil.copytree(made().run, folder / 'run',
                                ignore=shutil.ignore_patterns('pictures')))
    kept = here / 'checkpoints' / '7'
    names = [n.relative_to(here).as_posix() for n in sorted(kept.rglob('*')) if n.is_file()]
    if rng.random() < 0.8:
        name = damaged(rng, here, [*names, 'checkpoints/7/checksums.json',
                                   'checkpoints/7/manifest/metadata'])
    else:
        name = _other_folder(rng, kept)
    before, wrong = content(here), name and not name.endswith(checksums.NAME)
    listed = call('checkpoints', checkpoints.main, [str(here)], checkpoints.define_flags)
    verified = call('checkpoints', checkpoints.main, [str(here), '--verify'],
                    checkpoints.define_flags)
    if wrong and not verified.code:
        raise FoundError(f'{name} is damaged, and is called good: {verified.out} {listed.out}')
    like, layout = _like()
    ended = call('sample', lambda rest: ckpt.saved(here).part('ema', like, layout))
    if wrong and not ended.code:
        raise FoundError(f'{name} is damaged, and was read')
    if not ended.code:
        _equal(ended.value, ckpt.saved(made().run).part('ema', like, layout), np)
    if content(here) != before:
        raise FoundError('what was read has changed')


def _equal(a: Any, b: Any, np: Any) -> None:
    import jax

    if not all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b))):
        raise FoundError('other weights were read')


@functools.cache
def _like() -> Any:
    import jax
    import jax.numpy as jnp

    from ddmd_jax import families
    from ddmd_jax.parallel import sharding

    mesh = sharding.make_mesh({}, jax.devices()[:1])
    teacher = families.load_teacher(str(made().teacher))
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), teacher.params)
    return like, sharding.shard_tree(like, teacher.rules, mesh)


def _other_folder(rng: random.Random, kept: Path) -> str:
    """The folder itself, or one in or beside it, is not what it was; what, or ''."""
    kind = rng.randrange(6)
    if kind == 0:
        kept.rename(kept.with_name('7.old'))
    elif kind == 1:
        shutil.rmtree(kept / rng.choice(('state', 'data', 'manifest')))
    elif kind == 2:
        shutil.rmtree(kept)
        kept.write_text('no folder')
    elif kind == 3:
        shutil.rmtree(kept)
        kept.mkdir()
    elif kind == 4:
        shutil.rmtree(kept.parent)
        kept.parent.write_text('no folder')
    else:
        name = rng.choice(('9', '008', '99999999999999999999', '\u0663'))
        (kept.parent / name).mkdir()
        if name in ('008', '\u0663'):  # no step is called so: it is nobody's checkpoint
            return ''
    return 'a folder'


OUTS = {'compare': 'x.json', 'blind': 'x.html', 'grid': 'x.png'}


@functools.cache
def evaluation() -> tuple[Path, dict[str, Any]]:
    """(an evaluation of two rows, drawn by nobody; what the commands make of it)."""
    import numpy as np
    from evaluate_suites import CAPTIONS

    from ddmd_jax.diffusion import drawing
    from ddmd_jax.evaluation.kept import Kept

    here = made().run.parent / 'evaluation'
    named = drawing.names(CAPTIONS[:4], 1, 0)
    pixels = np.random.default_rng(0).integers(0, 255, (2, 4, 8, 8, 3), np.uint8)
    for row, form, drawn in zip(('student', 'teacher_few_step'), ('arrayrecord', 'png'), pixels):
        images = Kept(here / 'images' / 'toy' / row, named, form)
        images.claim({'steps': 2, 'guidance': 1.0, 'step': 7, 'weights': row})
        images.add(range(4), drawn)
        images.finish()
    ended = call('evaluate', *_measured(here))
    assert ended.code == 0, ended.said
    out = Path(shutil.copytree(here, here.with_name('evaluation_out')))
    return here, {mode: _shown(mode, here, out) for mode in OUTS}


def _measured(here: Path) -> tuple[Any, list[str], Any]:
    from ddmd_jax import evaluate

    return evaluate.main, ['--suite=evaluate_suites.TOY', '--count=3,1', f'--out={here}'], (
        evaluate.define_flags)


def _shown(mode: str, here: Path, out: Path) -> tuple[int, Any]:
    from ddmd_jax import evaluate

    ended = call('evaluate', evaluate.main, [
        f'--{mode}', f'{here}:student', f'{here}:teacher_few_step', f'--out={out / OUTS[mode]}'],
        evaluate.define_flags)
    return ended.code, None if ended.code else (out / OUTS[mode]).read_bytes()


def of_evaluation(rng: random.Random, folder: Path) -> None:
    """An evaluation's folder, as it is shown, compared and measured again."""
    whole, shown = evaluation()
    here, out = Path(shutil.copytree(whole, folder / whole.name)), folder / 'out'
    out.mkdir()
    names = [n.relative_to(here).as_posix() for n in sorted(here.rglob('*.*'))
             if n.suffix in ('.json', '.parquet', '.png', '.arrayrecord')
             and n.name != 'samples.png']
    name = damaged(rng, here, names) if rng.random() < 0.85 else _other_rows(rng, here)
    before = content(here)
    for mode in OUTS:
        found = _shown(mode, here, out)
        if not found[0] and found != shown[mode]:
            raise FoundError(f'{name} is damaged, and --{mode} shows something else')
    if content(here) != before:
        raise FoundError('what was read has changed')
    ended = call('evaluate', *_measured(here))
    same = ended.code or name.endswith('manifest.json') or all(  # a manifest may say something else
        (here / n).read_bytes() == (whole / n).read_bytes()
        for n in ('eval.json', 'scores.parquet', 'table.md', 'table.html'))
    if not same:
        raise FoundError(f'{name} is damaged, and other figures were written')


def _other_rows(rng: random.Random, here: Path) -> str:
    """A table of scores of other columns, types or rows; what."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(here / 'scores.parquet').to_pydict()
    name = rng.choice(sorted(table))
    kind = rng.randrange(5)
    if kind == 0:
        del table[name]
    elif kind == 1:
        odd = rng.choice((None, 'x', 1, 1.5, float('inf'), float('nan'), -1, True, b'x', [1]))
        table[name] = [odd] * len(table[name])
    elif kind == 2:
        table[rng.choice(('row', 'x', ''))] = table.pop(name)
    elif kind == 3:
        table = {key: values[:3] for key, values in table.items()}
    else:
        table[name][0] = rng.choice((None, *table[name]))
    pq.write_table(pa.table(table), here / 'scores.parquet')
    return f'scores.parquet, {name}'


def of_results(rng: random.Random, folder: Path) -> None:
    """The results of a study, as its report reads them."""
    from ddmd_jax.study import claims, claims_page, results, robustness, suites

    suite = suites.SUITES[rng.choice(sorted(suites.SUITES))]
    names = [e.name for e in suite.experiments[:2]]
    row = {'steps': 4, 'guidance': 1.0, 'all_match': 0.9, 'all_match_held_out': 0.9,
           'frechet': 1.0, 'colour_error': 1.0, 'std': 0.5, 'diversity': None}
    rows = dict.fromkeys(('student', 'few_step', 'guided', 'real'), row)
    whole = {'fields': {'log.every': 5}, 'data_std': 0.4, **rows,
             'figures': {'std_ratio': 1.0, 'guided_share': 0.5, 'observer_cos': 0.0,
                         'bands_live': [0.5, 0.5], 'bands_ema': [0.5, 0.5]},
             'curves': {'step': [5, 10], **{name: [0.4, 0.5] for name in (
                 'x_std', 'ema_std', 'ema_match', 'ema_cast', 'dm_rel_gap', 'dm_cos',
                 'fake_loss')}}}
    for name in names:
        (folder / f'{name}-seed0.json').write_text(json.dumps(whole))
    (folder / f'{names[0]}-seed0.json').write_bytes(bad_json(rng, whole))
    if rng.random() < 0.1:
        (folder / f'{names[0]}-seedx.json').write_text('?')

    def act(rest):
        found = results.read(folder, names)
        for asked in claims.CLAIMS:
            claims.judge(found, asked)
        claims_page.markdown(found, suite)
        with contextlib.suppress(ValueError):  # which the command says in a line
            robustness.read(found)

    before = content(folder)
    call('study', act)
    if content(folder) != before:
        raise FoundError('what was read has changed')


def of_teacher(rng: random.Random, folder: Path) -> None:
    """The file of a teacher, or a JSON of a published folder."""
    import numpy as np

    from ddmd_jax.families.emoji import teacher
    from ddmd_jax.weights import diffusers, flat, transformers

    if rng.random() < 0.5:
        file = Path(shutil.copy(made().teacher, folder / 'toy.safetensors'))
        _header(rng, file) if rng.random() < 0.6 else ruin(rng, file)
        before = content(folder)
        ended = call('main', lambda rest: teacher.read(str(file)))
        if not ended.code:
            wanted = teacher.read(str(made().teacher))
            same = ended.value[0] == wanted[0] and flat.identity(ended.value[1]) == flat.identity(
                wanted[1])
            if not same and not _only_values(ended.value[1], wanted[1], np):
                raise FoundError('another teacher was read')
    else:
        config = {'_class_name': 'X', 'architectures': ['X'], 'weight_map': {'a': 'b'},
                  'shift': 6.0}
        for name in ('config.json', 'model.safetensors.index.json', 'scheduler_config.json'):
            (folder / name).write_bytes(bad_json(rng, config))
        before = content(folder)
        from ddmd_jax.families import published_flow
        from ddmd_jax.families.lumina import teacher as lumina

        like = transformers.Published(('X',), '', ())
        for act in (lambda: transformers.open_folder(folder, like),
                    lambda: diffusers.open_folder(folder, 'X'),
                    lambda: diffusers.headers(folder, 'model'),
                    lambda: published_flow._scheduler_shift(lumina.FLOW, folder)):
            call('main', lambda rest, act=act: act())
    if content(folder) != before:
        raise FoundError('what was read has changed')


def _only_values(a: Any, b: Any, np: Any) -> bool:
    """Safetensors has no checksums: a bit of a value may differ, but not a name or a shape."""
    import jax

    return jax.tree.map(np.shape, a) == jax.tree.map(np.shape, b)


def _header(rng: random.Random, file: Path) -> None:
    """Mangles the JSON of a safetensors file, or JSON in its metadata."""
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], 'little')
    header = json.loads(raw[8:8 + size])
    if rng.random() < 0.7:
        meta = header['__metadata__']
        name = rng.choice(sorted(meta))
        meta[name] = bad_json(rng, json.loads(meta[name])).decode('latin-1') if (
            meta[name].startswith('{')) else rng.choice(('', 'x', '-1', '{}'))
    else:
        name = rng.choice(sorted(set(header) - {'__metadata__'}))
        header[name] = mangled(rng, header[name])
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, 'little') + text + raw[8 + size:])


def of_lora(rng: random.Random, folder: Path) -> None:
    """The file of a LoRA, as a run that starts from it reads it."""
    import ml_dtypes
    import numpy as np
    import safetensors.numpy as st

    from ddmd_jax.families.lumina import names as lumina
    from ddmd_jax.weights import lora

    kernels = {f'layers/attn/{name}/kernel': (2, 8, 6) for name in ('to_q', 'to_k')}
    names = lora.Names('transformer', lumina.transformer, rng.choice(('diffusion_model.',
                                                                      lora.KOHYA)))
    draws = np.random.default_rng(0)
    factors = {name: (draws.normal(size=(2, 8, 3)), draws.normal(size=(2, 3, 6)))
               for name in kernels}
    file = folder / lora.FILE
    lora.write(file, factors, names, rng.choice(lora.NAMINGS))
    kind = rng.randrange(3)
    if kind == 0:
        _header(rng, file)
    elif kind == 1:
        ruin(rng, file)
    else:
        tensors = st.load_file(file)
        for name in rng.sample(sorted(tensors), rng.randint(1, 2)):
            found = tensors.pop(name)
            shape = rng.choice((found.shape, found.shape[::-1], (), (0,), (0, 6), (3, 0), (3, 3)))
            kind = rng.choice((np.float32, np.float32, np.float16, ml_dtypes.float8_e4m3fn))
            with np.errstate(over='ignore'):
                odd = np.full(shape, rng.choice((0, 1, 1e30, np.inf, np.nan))).astype(kind)
            tensors[rng.choice((name, name, f'{name}.x', 'x', '', f'{name}.alpha'))] = odd
        st.save_file(tensors, file, metadata=rng.choice((None, {lora.CONFIG: bad_json(
            rng, {'transformer.r': 3, 'transformer.lora_alpha': 3}).decode('latin-1')})))
    before = content(folder)
    ended = call('main', lambda rest: lora.find(folder) and lora.read(file, kernels, names))
    for name, (a, b) in (ended.value or {}).items():
        if a.shape != (2, 8, a.shape[-1]) or b.shape != (2, a.shape[-1], 6):
            raise FoundError(f'factors of {name} are {a.shape} and {b.shape}')
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise FoundError(f'factors of {name} are not finite')
    if content(folder) != before:
        raise FoundError('what was read has changed')


# --- Flags and fields ---

EDGES = ('-1', '0', '1', '2', '2147483647', '2147483648', '4294967295', '4294967296',
         '9223372036854775807', '9223372036854775808', '1' * 5000, '-0', '0x10', '1e3', '1_000',
         '\u0661', '\u00b2', 'nan', '-nan', 'inf', '-inf', '1e400', '1e39', '1e-50', '5e-324',
         '-1e400', '0.1', '', ' ', '\u00e9\U0001f34e', 'a,b', ',', '1,', ',1', '0,0', '64,64',
         '-1,1', '1' * 9 + ',1', '64,64,64', 'None', 'True', '[]', '()', '(1,', '{}', '(' * 300,
         '"', '~', '~/x', '$HOME/x', '$NO/x', '~nobody/x', '/', '.', '..', '/dev/null',
         '/proc/nowhere', '--', '=', '%s', '\\', 'a\nb', 'x' * 300, 'gs://b/x', 'http://x')
_OWN = {'sample': ('--checkpoint=/nowhere', '--prompt=a', '--out=OUT/x'),
        'export': ('--checkpoint=/nowhere', '--out=OUT/x'),
        'report': ('/nowhere',), 'checkpoints': ('/nowhere',), 'summarise': ('/nowhere',),
        'prompts': ('--input=IN', '--out=OUT/x'),
        'embed': ('--prompts=/nowhere', '--out=OUT/x', '--teacher=emoji', '--path=/nowhere'),
        'images': ('--input=/nowhere', '--teacher=sdxl', '--path=/nowhere', '--out=OUT/x'),
        'emoji': ('--packages=/nowhere', '--out=OUT/x'),
        'evaluate': ('--suite=geneval', '--prompts=geneval=/nowhere', '--model=/nowhere',
                     '--out=OUT/x'),
        'plan': ('--config=emoji', '--layout', '--topology=nowhere'),
        'study': ('--config=/nowhere.py', '--workdir=OUT/x', '--report_only')}
# What a hub or a bucket is asked for, and what is written where the tests stand: never of these.
FETCHED = ('path', 'teacher_path', 'teacher', 'push', 'model')
WRITTEN = ('out', 'packages', 'workdir')
# Of these a gs:// URL is asked for, an http:// one refused.
IN_BUCKETS = ('checkpoint', 'prompts', 'input', 'captions', 'images', 'reference')
URLS = ('http://', 'gs://')


def of_flags(rng: random.Random, folder: Path) -> None:
    """A command with a flag of another value: what can be said of it before weights are read."""
    from ddmd_jax import checkpoints, config as config_lib, evaluate, prepare, sample
    from ddmd_jax.export import __main__ as export
    from ddmd_jax.planner import command as planner
    from ddmd_jax.report import __main__ as report
    from ddmd_jax.study import __main__ as study, summarise

    acts = {'summarise': (summarise.main, lambda: None),
            **{module.__name__.split('.')[1]: (module.main, module.define_flags)
               for module in (sample, evaluate, export, report, study, checkpoints)},
            'plan': (planner.main, planner.define_flags),
            **{word: (lambda rest, run=run: (commands.only_flags(rest), run()), define)
               for word, (define, run) in prepare.COMMANDS.items()}}
    name = rng.choice(sorted(acts))
    act, define_flags = acts[name]
    with defined(define_flags):
        names = sorted(set(FLAGS) - _BEFORE)
    (folder / 'in.txt').write_text('a cat\n')
    (folder / 'out').mkdir()
    args = [a.replace('OUT', str(folder / 'out')).replace('IN', str(folder / 'in.txt'))
            for a in _OWN[name]]
    for _ in range(rng.choice((1, 1, 2))):
        edge = rng.choice(EDGES)
        if not names or rng.random() < 0.1:
            free = '' if edge.startswith('gs://') else edge.replace('--', '-')
            args.append(rng.choice(('', '--no', '--x=1', '-', free)))
        else:
            flag = rng.choice(names)
            if edge.startswith(URLS) and flag in (*FETCHED, *WRITTEN):
                continue
            if flag in WRITTEN:
                edge = f'{folder}/out/{edge.replace("/", "_")[:100]}'
            if edge.startswith('gs://') and flag in IN_BUCKETS:
                continue
            args.append(f'--{flag}={edge}')
    args = [a for a in args if a not in ('/', '.', '..')]
    call('prepare' if name in prepare.COMMANDS else name, act, args, define_flags,
         config_lib.parser(name) if name == 'plan' else None)


CONFIGS = ('emoji', 'emoji_prompts', 'emoji_teacher', 'emoji_codec', 'lumina', 'sdxl', 'zimage')


@functools.cache
def _config(name: str) -> Any:
    from ddmd_jax import config as config_lib

    return config_lib.load(name)


def of_fields(rng: random.Random, folder: Path) -> None:
    """A config with a field of another value, as `main` checks it before anything is built."""
    import numpy as np

    from ddmd_jax import config as config_lib

    here = [name for name in CONFIGS if Path(config_lib.files.located(name)).is_file()]
    config = copy.deepcopy(_config(rng.choice(here))).unlock()
    fields = [f for f in config_lib.fields_of(config) if f.path != 'teacher.path']
    field = rng.choice(fields)
    odd = rng.choice((*ODD, 2**32, 1e39, 1e-50, 5e-324, -1e400, (), (0, 1), (1.0, 2.0), ((64, 64),),
                      ((-1, 2**40),), (0.0, 0.5), (1e-50, 0.5), (float('nan'), 1), 'float32'))
    *sections, last = field.path.split('.')
    section = config
    for part in sections:
        section = section[part]
    with contextlib.suppress(TypeError, KeyError, AttributeError, ValueError):  # no such value
        if rng.random() < 0.9:
            del section[last]
            section[last] = odd
        else:
            del section[last]
    for _ in range(2):
        try:
            config_lib.check(config)
        except config_lib.ConfigError as e:
            if not str(e).startswith('config: ') or field.path.split('.')[0] not in str(e):
                raise FoundError(f'{field.path}={odd!r}: {e}') from e
            return
        except Exception as e:
            raise FoundError(f'{field.path}={odd!r}: {traceback.format_exc()}') from e
    value = config_lib.field(config, field.path)
    if isinstance(value, float | int) and not isinstance(value, bool):
        with np.errstate(all='ignore'):
            kept = np.float32(value) if isinstance(value, float) else value
        if isinstance(value, float) and (not np.isfinite(kept) or (kept == 0) != (value == 0)) or (
                isinstance(value, int) and type(field.default) is int and (
                    not -1 <= value < 2**32)):
            raise FoundError(f'{field.path}={value!r} was taken')


def of_main(rng: random.Random, folder: Path) -> None:
    """The command line of a training: parsed and checked, and refused for want of a workdir."""
    from ddmd_jax import config as config_lib, main as train

    name = rng.choice(('emoji', 'lumina'))
    path = rng.choice([f.path for f in config_lib.fields_of(_config(name))])
    flag = rng.choice((f'config.{path}', f'config.{path}', 'profile', 'peer_timeout', 'config',
                       'num_processes', 'process_id', 'coordinator', 'replay'))
    args = ['main', f'--config={name}', f'--{flag}={rng.choice(EDGES)}']
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        try:
            train.main(train.parse_flags(args))
            raise FoundError(f'{args} went on without a --workdir')
        except SystemExit as e:
            code, said = (1, e.code) if isinstance(e.code, str) else (e.code, err.getvalue())
        except FoundError:
            raise
        except BaseException as e:
            raise FoundError(f'{args}: traceback\n{traceback.format_exc()}') from e
        finally:
            FLAGS.unparse_flags()
            for each in _MAIN:
                FLAGS[each].unparse()
    if code not in (1, 2) or not said.strip() or len(said.splitlines()) > 4:
        raise FoundError(f'{args}: code {code} with {said!r}')


_MAIN = ('config', 'profile', 'peer_timeout', 'num_processes', 'process_id', 'coordinator',
         'replay', 'workdir', 'compile_cache')

# --- The doors, and running them ---

DOORS: dict[str, Callable[[random.Random, Path], None]] = {
    'prompts': of_prompts, 'set': of_set, 'embeddings': of_embeddings, 'run files': of_run_files,
    'latents': of_latents, 'evaluation': of_evaluation, 'checkpoint': of_checkpoint,
    'results': of_results, 'teacher': of_teacher, 'lora': of_lora, 'flags': of_flags,
    'fields': of_fields, 'main': of_main}


def tried(door: str, seed: int) -> None:
    """One damaged input at a door; raises `FoundError` where it ends as it must not."""
    folder = Path(tempfile.mkdtemp(prefix='ddmd_fuzz_'))
    try:
        DOORS[door](random.Random(f'{door} {seed}'), folder)
    except FoundError as e:
        raise FoundError(f'door {door!r}, seed {seed}: {e}') from e
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument('--inputs', type=int, default=2000)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--door', nargs='*', choices=sorted(DOORS), default=sorted(DOORS))
    parser.add_argument('--most', type=int, default=20, help='ends after so many that are wrong')
    given = parser.parse_args()
    wrong = 0
    for i in range(given.inputs):
        try:
            tried(given.door[i % len(given.door)], given.seed * 10**6 + i)
        except Exception as e:
            wrong += 1
            print(e if isinstance(e, FoundError) else traceback.format_exc(), '\n')
            if wrong == given.most:
                break
    print(f'{i + 1} inputs at {", ".join(given.door)}: {wrong} wrong')
    return int(wrong > 0)


if __name__ == '__main__':
    sys.exit(main())
