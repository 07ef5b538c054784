"""Rows from files: JSON lines, CSV, Parquet. Each row comes with its place, `file:line`."""

import csv
import glob
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rlorch.data.rows import jsonable, shown
from rlorch.errors import DataError

Placed = tuple[str, Any]

JSON_LINES = (".jsonl", ".ndjson", ".json")
SUFFIXES = (*JSON_LINES, ".csv", ".parquet")


def is_file_source(source: str) -> bool:
    """Whether a source names files by suffix: a path or a glob."""
    return source.endswith(SUFFIXES)


def find_files(source: str) -> list[Path]:
    """The files of a path or glob, by name.

    Raises:
        DataError: there are none.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
    if not found:
        raise DataError(f"{source}: no such file (looked from {Path.cwd()}); check data.source")
    return found


def files_of_directory(directory: Path, split: str) -> list[Path]:
    """The data files of a directory: of the first kind that it has, and of the split where names begin with it.

    Raises:
        DataError: it has none.
    """
    for suffix in SUFFIXES:
        found = sorted(directory.glob(f"*{suffix}"))
        if found:
            return [path for path in found if path.name.startswith(split)] or found
    raise DataError(f"{directory}: neither a saved dataset nor a directory with {', '.join(SUFFIXES)} files")


def read_files(paths: Iterable[Path]) -> Iterator[Placed]:
    """(place, row) over all files, by suffix.

    Raises:
        DataError: a file that cannot be read, or a row that is malformed.
    """
    for path in paths:
        try:
            if path.suffix == ".csv":
                yield from _read_csv(path)
            elif path.suffix == ".parquet":
                yield from _read_parquet(path)
            else:
                yield from read_jsonl(path)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def read_jsonl(path: Path) -> Iterator[Placed]:
    """(`file:line`, row) of each line; blank lines are skipped.

    Raises:
        DataError: a line that is not UTF-8 or not JSON.
    """
    with path.open("rb") as lines:  # bytes: text mode would also split at U+2028 and the like
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                row = json.loads(text)
            except UnicodeDecodeError as error:
                raise DataError(f"{where}: not UTF-8 (byte {error.start}); convert the file to UTF-8") from error
            except ValueError as error:
                raise DataError(f"{where}: not JSON ({error}): {shown(line[:100])}. {_advice(line)}") from error
            if isinstance(row, list):
                raise DataError(f"{where}: a JSON array; put one object on each line (jq -c '.[]' does it)")
            yield where, row


def _advice(line: bytes) -> str:
    if line.strip() in (b"[", b"{"):
        return "Put each row on one line (jq -c . does it)"
    return "Fix or remove the line"


def _read_csv(path: Path) -> Iterator[Placed]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        try:
            for row in reader:
                where = f"{path}:{reader.line_num}"
                if None in row:
                    raise DataError(f"{where}: more cells than the header has columns; quote cells with commas")
                if any(cell is None for cell in row.values()):
                    raise DataError(f"{where}: fewer cells than the header has columns ({len(row)})")
                yield where, dict(row)
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}:{reader.line_num}: not readable as CSV: {error}") from error


def _read_parquet(path: Path) -> Iterator[Placed]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise DataError(f"{path}: reading Parquet needs pyarrow: pip install 'rlorch[data]'") from error
    number = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    where = f"{path} row {number}"
                    yield where, jsonable(row, where)
                    number += 1
    except ArrowException as error:
        raise DataError(f"{path}: not readable as Parquet: {error}") from error
