"""Files of rows, read exactly: TSV as GLUE has it, CSV, JSON lines, Parquet.

GLUE's files are tab-separated text without quoting: a row ends at a line feed and nowhere else (Unicode line
separators, carriage returns, quotes and NULs are text), and the fields are whatever stands between two tabs.
"""

import csv
import io
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow
from pyarrow import parquet

from bert_finetune.errors import InputError


@dataclass(frozen=True)
class Table:
    """A file's rows as text fields, None where JSON or Parquet has no value.

    `numbers[k]` is where `rows[k]` stands in the file, counted from 1 in `unit`s ("line", or "row" of a Parquet file).
    """

    path: Path
    columns: tuple[str, ...]
    rows: list[list[str | None]]
    numbers: Sequence[int]
    unit: str = "line"

    def column(self, name: str) -> int:
        """The position of the column `name`."""
        if self.columns.count(name) != 1:
            several = "more than one" if name in self.columns else "no"
            raise InputError(f"{self.path}: {several} column {name!r}; its columns are {', '.join(self.columns)}")
        return self.columns.index(name)

    def place(self, k: int) -> str:
        """How a message names row k."""
        return f"{self.path}, {self.unit} {self.numbers[k]}"


def read_table(path: str | Path, headerless: tuple[str, ...] = ()) -> Table:
    """Read a file by the ending of its name: .tsv, .csv, .json or .jsonl (an object a line), .parquet.

    Raises InputError for another ending, and for a file that is missing, empty, malformed, or text but not UTF-8.
    """
    path = Path(path)
    if path.suffix == ".tsv":
        return read_tsv(path, headerless)
    if path.suffix not in _READERS:
        raise InputError(f"{path}: files are read by their ending, which must be .tsv, {', '.join(_READERS)}")
    table = _READERS[path.suffix](path)
    if not table.rows:
        raise InputError(f"{path}: the file holds no row of data")
    return table


def read_tsv(path: Path, headerless: tuple[str, ...] = ()) -> Table:
    """Read a tab-separated file exactly: every line a row, no quoting, no row or character changed.

    `headerless`: the columns of a file that may come without a header line; it is taken to have none when its first
    row has as many fields as that and is not made of column names. A byte-order mark and the carriage return of a
    Windows line end are dropped.
    Raises InputError for a file that is missing, empty or not UTF-8.
    """
    path = Path(path)
    lines = _read_text(path).split("\n")
    if lines[-1] == "":
        lines.pop()
    rows = [line.removesuffix("\r").split("\t") for line in lines]
    if rows and len(rows[0]) == len(headerless) and not set(rows[0]) & set(headerless):
        return Table(path, headerless, rows, range(1, len(rows) + 1))
    if len(rows) < 2:
        raise InputError(f"{path}: the file holds no row of data")
    return Table(path, tuple(rows[0]), rows[1:], range(2, len(rows) + 1))


def read_csv(path: Path) -> Table:
    """Read a comma-separated file with a header line; a field in double quotes may hold commas and line ends."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # by default a field of 131,072 characters is an error
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True)
    columns, rows, numbers = None, [], []
    start = 1
    try:
        for row in reader:
            place, start = start, reader.line_num + 1
            if columns is None:
                columns = tuple(row)
            elif len(row) == len(columns):
                rows.append(row)
                numbers.append(place)
            elif row:  # an empty line is none
                raise InputError(
                    f"{path}, line {place}: {len(row)} fields where the header has {len(columns)}; text with a comma "
                    "or a line end in it must stand in double quotes"
                )
    except csv.Error as error:
        raise InputError(f"{path}, line {start}: {error}") from error
    return Table(path, columns or (), rows, numbers)


def read_json_lines(path: Path) -> Table:
    """Read a file with one JSON object a line; the columns are all keys that occur, in order of appearance."""
    objects, numbers = [], []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: not JSON: {error}; there must be one object a line") from error
        if not isinstance(value, dict):
            raise InputError(f"{path}, line {number}: not a JSON object; there must be one object a line")
        objects.append(value)
        numbers.append(number)
    columns = tuple(dict.fromkeys(key for value in objects for key in value))
    rows = [
        [_text(value.get(column), f"{path}, line {number}", column) for column in columns]
        for value, number in zip(objects, numbers, strict=True)
    ]
    return Table(path, columns, rows, numbers)


def read_parquet(path: Path) -> Table:
    """Read a Parquet file."""
    _check_readable(path)
    try:
        columns = parquet.read_table(path).to_pydict()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path}: not a Parquet file that can be read: {str(error).splitlines()[0]}") from error
    rows = [
        [_text(value, f"{path}, row {number}", column) for column, value in zip(columns, row, strict=True)]
        for number, row in enumerate(zip(*columns.values(), strict=True), start=1)
    ]
    return Table(path, tuple(columns), rows, range(1, len(rows) + 1), unit="row")


_READERS: dict[str, Callable[[Path], Table]] = {
    ".csv": read_csv,
    ".json": read_json_lines,
    ".jsonl": read_json_lines,
    ".parquet": read_parquet,
}


def _text(value, place: str, column: str) -> str | None:
    """A value as text; a whole number has no point, whatever the file keeps it as."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{place}: column {column!r} holds bytes that are not UTF-8 text") from error
    if isinstance(value, list | dict):
        raise InputError(f"{place}: column {column!r} holds a {type(value).__name__}, not a text or number")
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return str(int(value)) if value.is_integer() else str(value)
    return None if value is None else str(value)


def _check_readable(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def _read_text(path: Path) -> str:
    raw = _check_readable(path)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: not UTF-8 text; save the file as UTF-8") from error
