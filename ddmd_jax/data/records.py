"""Files of records that are read at random (ArrayRecord), with checksums."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from ddmd_jax.data import DataFileError
from ddmd_jax.util import errors
from ddmd_jax.util.text import first_line


def write(path: Path, records: Iterable[bytes]) -> None:
    """Raises OSError, a full disk included; what making the `records` raises goes on."""
    from array_record.python.array_record_module import ArrayRecordWriter

    try:
        writer = ArrayRecordWriter(str(path), 'group_size:1')
        for record in records:
            writer.write(record)
        writer.close()
    except RuntimeError as e:
        if type(e) is not RuntimeError:
            raise
        errors.raise_environment(e, path)
        raise OSError(first_line(e)) from e  # the library's, which has no errno


class Records:
    """Records of `files`, in their order; `name` and `cure` begin and end what goes wrong.

    Raises:
      DataFileError: a file is missing or damaged, or there are not `count` records.
    """

    def __init__(self, files: Sequence[Path], count: int, name: str, cure: str):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self._count, self._name, self._cure = count, name, cure
        try:
            self._source = ArrayRecordDataSource([str(file) for file in files])
            found = len(self._source)
        except Exception as e:  # array_record raises bare RuntimeError, whatever the cause
            errors.raise_environment(e)
            raise self._damaged(first_line(e)) from e
        if found != count:
            raise self._damaged(f'{found} records of {count}')

    def __len__(self) -> int:
        return self._count

    def read(self, rows: Sequence[int]) -> list[bytes]:
        """Records by number, in any order, as often as asked; together faster than one by one."""
        try:
            return self._source.__getitems__([int(row) for row in rows]) if len(rows) else []
        except Exception as e:
            errors.raise_environment(e)
            raise self._damaged(f'a record among {min(rows)}..{max(rows)}, {first_line(e)}') from e

    def _damaged(self, reason: str) -> DataFileError:
        return DataFileError(f'{self._name} ({reason}); {self._cure}')
