"""Damaged inputs at the doors of the commands, each drawn from a seed; `test_fuzz` runs a few.

    python tests/fuzz.py --inputs=20000 --seed=1       # by hand: what is wrong is printed, and 1

A door is what a command calls, with the frame that the command has (`commands.call`), in this
process. It must end with the project's own one line, or with 0 and what is right: what the
undamaged input gives, or what Python's own readers make of the damaged one. Never a traceback;
and what was to be read is as it was.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import copy
import csv
import dataclasses
import io
import json
import os
import random
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags

from ddmd_jax.util import commands

FLAGS = flags.FLAGS


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
    """The flags of one command, as if it were alone in its process."""
    before = set(FLAGS)
    define_flags()
    mine = set(FLAGS) - before
    try:
        yield
    finally:
        FLAGS.unparse_flags()
        for name in mine:
            delattr(FLAGS, name)


def call(name: str, act: Callable[[list[str]], Any], args: list[str] = [],
         define_flags: Callable[[], None] = lambda: None) -> Ended:
    """Runs `act` in the frame of the command `name`; raises `FoundError` where the frame breaks."""
    value, err, out, code = [], io.StringIO(), io.StringIO(), 0
    with defined(define_flags), contextlib.redirect_stderr(err), contextlib.redirect_stdout(out):
        try:
            argv = commands.parser(name)([name, *args])
            commands.call(name, lambda rest: value.append(act(rest)), argv)
        except SystemExit as e:
            if isinstance(e.code, str):
                print(e.code, file=err)
            code = e.code if isinstance(e.code, int) else int(e.code is not None)
        except BaseException as e:
            raise FoundError(f'{name} {args}: traceback\n{traceback.format_exc()}') from e
    ended = Ended(code, err.getvalue(), value[0] if value else None, out.getvalue())
    own = [x for x in ended.said.splitlines() if x.startswith(f'{name}: ')]
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

    kinds = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string()),
             pa.binary(), pa.list_(pa.string()), pa.struct([('prompt', pa.string())]), pa.int64(),
             pa.null(), pa.bool_(), pa.timestamp('s')]
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
        pq.write_table(pa.Table.from_arrays(columns, names), file, row_group_size=rng.choice((1, 4)),
                       compression=rng.choice(('none', 'snappy', 'gzip', 'zstd')))
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


# --- The doors, and running them ---

DOORS: dict[str, Callable[[random.Random, Path], None]] = {'prompts': of_prompts}


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
