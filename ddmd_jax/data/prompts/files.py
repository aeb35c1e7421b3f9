"""Files of prompts as streams of raw texts; what is wrong is named by file and line."""

import codecs
import csv
import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from ddmd_jax.data import DataFileError
from ddmd_jax.util.text import first_line

KINDS = ('.txt', '.jsonl', '.csv', '.tsv', '.parquet')
# Marks that Excel, PowerShell and editors begin a file with; UTF-32's begins with UTF-16's.
MARKS = ((codecs.BOM_UTF32_LE, 'utf-32'), (codecs.BOM_UTF32_BE, 'utf-32'),
         (codecs.BOM_UTF16_LE, 'utf-16'), (codecs.BOM_UTF16_BE, 'utf-16'))


def bar(what: str, total: int, unit: str = ' prompts') -> tqdm:
    """A progress bar on stderr; nothing of it is seen where the work takes less than a second."""
    return tqdm(desc=what, total=total, unit=unit, unit_scale=True, file=sys.stderr,
                dynamic_ncols=True, mininterval=1.0, delay=1.0)


def read(path: Path, field: str) -> Iterator[str]:
    """The texts of a file, '' where there is none; `field` is not looked at in a .txt.

    Raises:
      DataFileError: `path` is missing or of an unknown kind, at once; later, on the way, a row
        is not what it should be.
    """
    if not path.is_file():
        raise DataFileError(f'no file {path}' + (': it is a folder' if path.is_dir() else ''))
    match path.suffix.lower():
        case '.txt':
            return _lines(path)
        case '.jsonl':
            return _read_jsonl(path, field)
        case '.csv':
            return _read_table(path, field, ',')
        case '.tsv':
            return _read_table(path, field, '\t')
        case '.parquet':
            return _read_parquet(path, field)
    raise DataFileError(f'{path}: unknown kind {path.suffix!r}; known are {", ".join(KINDS)}')


def text(raw: bytes, name: str) -> str:
    """The text of a whole file, read as `read` reads its lines; errors call it `name`."""
    return ''.join(_decoded(io.BytesIO(raw), name))


def _lines(path: Path) -> Iterator[str]:
    with path.open('rb') as file, bar(path.name, path.stat().st_size, 'B') as progress:
        for line in _decoded(file, path):
            yield line
            progress.update(len(line))


def _decoded(file: BinaryIO, name: str | Path) -> Iterator[str]:
    """Lines with their ends, of which there are three: ``\\n``, ``\\r\\n`` and ``\\r``.

    The text is UTF-8, or UTF-16 or UTF-32 with a mark that says so. One NUL is enough to tell that
    it is neither: UTF-16 without a mark, or no text.
    """
    start = file.read(5)
    file.seek(0)
    # A mark and nothing after it is no text.
    marked = next((code for mark, code in MARKS
                   if start.startswith(mark) and len(start) > len(mark)), '')
    # Latin-1 keeps every byte, so that a line that is not UTF-8 can be named.
    lines = io.TextIOWrapper(file, marked or 'latin-1', newline='')
    number = 0
    try:
        for number, line in enumerate(lines, 1):
            if not marked:
                raw = line.encode('latin-1')
                line = raw.decode('utf-8-sig' if number == 1 else 'utf-8')
            if '\0' in line:
                raise DataFileError(f'{name} line {number}: it holds a NUL, so it is UTF-16 '
                                    'without its mark, or no text; save it as UTF-8')
            yield line
    except UnicodeDecodeError as e:
        where = (f'a line after {number}: not {marked.upper()}, as its mark says' if marked else
                 f'line {number}: not UTF-8 (byte {e.start} of the line, '
                 f'0x{e.object[e.start]:02x})')
        raise DataFileError(f'{name} {where}; save it as UTF-8') from e


def _find(field: str, names: Sequence[str], where: str) -> None:
    """Raises `DataFileError` unless exactly one of these names is `field`."""
    if field not in names:
        there = ', '.join(map(repr, names[:12])) or 'none'
        raise DataFileError(f'{where}: no field {field!r}; there are {there}; name one with '
                            '--field')
    if names.count(field) > 1:
        raise DataFileError(f'{where}: {names.count(field)} columns are called {field!r}; rename '
                            'all but the one that is meant')


def _text(row: Any, field: str, where: str) -> str:
    """The text of an object's `field`, '' for null."""
    if not isinstance(row, dict):
        raise DataFileError(f'{where}: expected a JSON object')
    _find(field, [*row], where)
    if not isinstance(row[field], str | None):
        raise DataFileError(f'{where}: {field!r} is {row[field]!r:.40}, not a text')
    return row[field] or ''


def _read_jsonl(path: Path, field: str) -> Iterator[str]:
    """An object a line; an empty line is an empty prompt."""
    for number, line in enumerate(_lines(path), 1):
        try:
            row = json.loads(line) if line.strip() else {field: ''}
        except (ValueError, RecursionError) as e:
            raise DataFileError(f'{path} line {number}: not JSON ({e})') from e
        yield _text(row, field, f'{path} line {number}')


def _read_table(path: Path, field: str, delimiter: str) -> Iterator[str]:
    """Rows below a header; each must have all of its columns, or be empty."""
    csv.field_size_limit(2**31 - 1)  # such prompts are dropped by length, and counted
    reader = csv.reader(_lines(path), delimiter=delimiter, strict=True)
    header, line = None, 1
    try:
        for row in reader:
            if header is None:
                header = row
                _find(field, header, f'{path} line 1')
            elif row and len(row) != len(header):
                raise DataFileError(f'{path} line {line}: {len(row)} columns, {len(header)} in '
                                    f'the header; quote prompts that hold a {delimiter!r}')
            else:
                yield row[header.index(field)] if row else ''
            line = reader.line_num + 1
    except csv.Error as e:
        raise DataFileError(f'{path} line {line}: {e}; are its quotes closed, and doubled '
                            'inside a quoted field?') from e


def _read_parquet(path: Path, field: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
        _find(field, file.schema_arrow.names, str(path))
        with bar(path.name, file.metadata.num_rows) as progress:
            for batch in file.iter_batches(columns=[field]):
                yield from (_text(row, field, str(path)) for row in batch.to_pylist())
                progress.update(len(batch))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as e:
        raise DataFileError(f'{path} cannot be read as parquet ({first_line(e)})') from e
