"""Files of prompts as streams of raw text, a row at a time; what is wrong, by file and line."""

import contextlib
import csv
import dataclasses
import functools
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ddmd_jax.data import DataFileError
from ddmd_jax.util.text import first_line

ROWS = 1024  # rows that are decoded at a time
TFDS = 'tfds:'
_SPEC = re.compile(r'tfds:([^:]+(?::[\d.]+)?)(?::(.+))?')  # data set and version, split
Advance = Callable[[int], object]


@dataclasses.dataclass(frozen=True)
class Source:
    """One input: `read(field, advance)` gives its texts in order, null ones as ''.

    `advance` gets the number of bytes read since the last call; `part` names a part of `paths`, a
    split for example.
    """

    name: str  # as it was given
    paths: tuple[Path, ...]
    read: Callable[[str, Advance], Iterator[str]]
    part: str = ''

    @property
    def size(self) -> int:
        return sum(p.stat().st_size for p in self.paths)

    @functools.cached_property
    def checksum(self) -> str:
        """sha256 of the content; of a TFDS split, of its files and of what is read of them."""
        hasher = hashlib.sha256(self.part.encode())
        for path in self.paths:
            with path.open('rb') as file:
                while block := file.read(2**20):
                    hasher.update(block)
        return hasher.hexdigest()


def find(name: str) -> Source:
    """The input that `name` names: a file of a known kind or ``tfds:NAME[/CONFIG][:SPLIT]``.

    Raises:
      DataFileError: it is missing or of an unknown kind.
    """
    if name.startswith(TFDS):
        return _find_tfds(name)
    path = Path(name).expanduser()
    if not path.is_file():
        raise DataFileError(f'no file {path}' + (': it is a folder' if path.is_dir() else ''))
    read = KINDS.get(path.suffix.lower())
    if read is None:
        raise DataFileError(f'{path}: unknown kind {path.suffix!r}; known are {", ".join(KINDS)} '
                            f'and {TFDS}NAME')
    return Source(name, (path,), functools.partial(read, path))


def _lines(path: Path, advance: Advance) -> Iterator[str]:
    """Lines with their ends, as bytes are split: only at line feeds."""
    done = 0
    with path.open('rb') as file:
        for number, raw in enumerate(file, 1):
            try:
                text = raw.decode()
            except UnicodeDecodeError as e:
                raise DataFileError(f'{path} line {number}: not UTF-8 (byte {done + e.start} of '
                                    f'the file, 0x{raw[e.start]:02x}); save it as UTF-8') from e
            done += len(raw)
            advance(len(raw))
            yield text.removeprefix('\ufeff') if number == 1 else text


def _read_text(path: Path, field: str, advance: Advance) -> Iterator[str]:
    """A prompt a line; there is no `field` to choose."""
    return _lines(path, advance)


def _read_jsonl(path: Path, field: str, advance: Advance) -> Iterator[str]:
    """An object a line; empty lines are empty prompts."""
    for number, line in enumerate(_lines(path, advance), 1):
        if not line.strip():
            yield ''
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise DataFileError(f'{path} line {number}: not JSON ({e})') from e
        if not isinstance(row, dict):
            raise DataFileError(f'{path} line {number}: expected a JSON object, found '
                                f'{_kind(row)}')
        if field not in row:
            raise _no_field(f'{path} line {number}', field, list(row))
        if not isinstance(row[field], str | None):
            raise DataFileError(f'{path} line {number}: {field!r} is {_kind(row[field])}, not a '
                                'text')
        yield row[field] or ''


def _kind(value: Any) -> str:
    names = {dict: 'an object', list: 'a list', str: 'a text', bool: 'a truth value'}
    return names.get(type(value), 'null' if value is None else 'a number')


def _no_field(where: str, field: str, there: Sequence[str]) -> DataFileError:
    names = ', '.join(repr(name) for name in there[:12]) + (', ...' if there[12:] else '')
    return DataFileError(f'{where}: no field {field!r}; there are {names or "none"}; name one '
                         'with --field')


def _read_table(path: Path, field: str, advance: Advance, delimiter: str) -> Iterator[str]:
    """Rows below a header; every row must have all its columns."""
    csv.field_size_limit(2**31 - 1)  # such prompts are dropped by length, and counted
    reader = csv.reader(_lines(path, advance), delimiter=delimiter, strict=True)
    line = 1
    try:
        header = next(reader, [])
        if header and field not in header:
            raise _no_field(f'{path} line 1', field, header)
        while line := reader.line_num + 1:
            if (row := next(reader, None)) is None:
                return
            if row and len(row) != len(header):
                raise DataFileError(f'{path} line {line}: {len(row)} columns, {len(header)} in '
                                    f'the header; quote prompts that hold a {delimiter!r}')
            yield row[header.index(field)] if row else ''
    except csv.Error as e:
        raise DataFileError(f'{path} line {line}: {e}; are its quotes closed, and doubled '
                            'inside a quoted field?') from e


def _read_parquet(path: Path, field: str, advance: Advance) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        schema, rows = file.schema_arrow, file.metadata.num_rows
        if field not in schema.names:
            raise _no_field(str(path), field, schema.names)
        kind = schema.field(field).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise DataFileError(f'{path}: {field!r} holds {kind}, not texts')
        size = path.stat().st_size
        for batch in file.iter_batches(ROWS, columns=[field], use_threads=False):
            advance(size * len(batch) // rows)
            yield from (text or '' for text in batch.column(0).to_pylist())
    except (pa.ArrowException, OSError, UnicodeDecodeError) as e:
        raise DataFileError(f'{path} cannot be read as parquet ({first_line(e)})') from e


def _find_tfds(name: str) -> Source:
    import tensorflow_datasets as tfds

    try:
        spec, split = _SPEC.fullmatch(name).groups(default='train')
        folder = Path(spec).expanduser()
        with contextlib.redirect_stdout(io.StringIO()):  # a banner where TensorFlow is missed
            builder = (tfds.builder_from_directory(folder) if folder.is_dir()
                       else tfds.builder(spec, try_gcs=False))
        rows = builder.as_data_source(split)
        parts = builder.info.splits[split].file_instructions
    except Exception as e:  # of many kinds: no such data set, not prepared, no such split
        raise DataFileError(f'{name} cannot be read ({first_line(e)}); give a data set that is '
                            'prepared on this machine as array_record, or its folder') from e
    return Source(name, tuple(Path(p.filename) for p in parts),
                  functools.partial(_read_tfds, name, rows),
                  str([(p.skip, p.take) for p in parts]))


def _read_tfds(name: str, source: Any, field: str, advance: Advance) -> Iterator[str]:
    features = source.dataset_info.features
    if field not in features:
        raise _no_field(name, field, list(features))
    size = sum(Path(p.filename).stat().st_size for p in source.dataset_info.splits[
        source.split].file_instructions)
    for start in range(0, len(source), ROWS):
        try:
            rows = source.__getitems__(list(range(start, min(start + ROWS, len(source)))))
            texts = [row[field].decode() for row in rows]
        except AttributeError as e:
            raise DataFileError(f'{name}: {field!r} holds {features[field]}, not texts') from e
        except Exception as e:  # array_record raises bare RuntimeError/ValueError by cause
            raise DataFileError(f'{name} is damaged near row {start} ({first_line(e)})') from e
        advance(size * len(rows) // len(source))
        yield from texts


KINDS: dict[str, Callable[..., Any]] = {'.txt': _read_text, '.jsonl': _read_jsonl,
         '.csv': functools.partial(_read_table, delimiter=','),
         '.tsv': functools.partial(_read_table, delimiter='\t'), '.parquet': _read_parquet}
