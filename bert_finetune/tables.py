"""Files of rows: GLUE's TSV, read exactly, and what users bring: CSV, TSV, JSON, Parquet.

GLUE's files are tab-separated text without quoting: a row ends at a line feed and nowhere else (Unicode line
separators, carriage returns, quotes and NULs are text), and the fields are whatever stands between two tabs.
"""

import csv
import io
import json
import math
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow
from pyarrow import parquet

from bert_finetune.errors import InputError, reason
from bert_finetune.paths import PACKED, ending

# Plain text's ending, and what its only column is called.
PLAIN, TEXT = ".txt", "text"

# Between a CSV file's fields -> what a message calls it. The first that splits a header best is taken.
_DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}

_STREAMED = 1 << 20  # bytes

# How files begin that are not what their name says, or stand for another.
_PARQUET = b"PAR1"
_OTHER_KINDS = {
    b"\x1f\x8b": "a gzip file; its name must end in .gz",
    b"BZh91AY&SY": "a bzip2 file; unpack it first",
    b"\xfd7zXZ": "an xz file; unpack it first",
    b"\x28\xb5\x2f\xfd": "a zstd file; its name must end in .zst",
    b"PK\x03\x04": "a zip file or an Excel workbook; unpack it, or save the table as CSV",
    b"\xd0\xcf\x11\xe0": "an Excel workbook; save the table as CSV",
    _PARQUET: "a Parquet file; its name must end in .parquet",
    b"ARROW1": "an Arrow file; write it with to_csv or to_parquet",
    b"version https://git-lfs": "a Git LFS pointer, the data were not fetched; git lfs pull does that",
    b"<!DOCTYPE": "a web page, not the file itself",
    b"<!doctype": "a web page, not the file itself",
    b"<html": "a web page, not the file itself",
}


@dataclass(frozen=True)
class Table:
    """A file's rows, each field as the file has it: text, or a value of JSON or Parquet.

    `numbers[k]` is where `rows[k]` stands in the file, counted from 1 in `unit`s ("line", or "row" where no line is
    one). `notes`: what the user should know of the way it was read.
    """

    path: Path
    columns: tuple[str, ...]
    rows: list[list]
    numbers: Sequence[int]
    unit: str = "line"
    notes: tuple[str, ...] = ()

    def column(self, name: str) -> int:
        """The position of the column `name`."""
        if self.columns.count(name) != 1:
            several = "more than one" if name in self.columns else "no"
            raise InputError(
                f"{self.path}: {several} column {name!r}; its columns are {', '.join(self.columns)}"
                + ("; " + NO_HEADER if self.lacks_header() else "")
            )
        return self.columns.index(name)

    def has(self, names: Iterable[str]) -> bool:
        """Whether all of these columns are there."""
        return set(names) <= set(self.columns)

    def lacks_header(self) -> bool:
        """Whether the names of the columns look like a row of data."""
        if self.columns == tuple(map(str, range(len(self.columns)))):
            return False  # so pandas numbers columns
        return any(
            is_sentence(name)
            or re.fullmatch(r"-?\d+([.,]\d+)?", name)
            or (name and any(position < len(row) and row[position] == name for row in self.rows))
            for position, name in enumerate(self.columns)
        )

    def place(self, k: int) -> str:
        """How a message names row k."""
        return f"{self.path}, {self.unit} {self.numbers[k]}"

    def text(self, k: int, position: int) -> str | None:
        """A field as text, None where the file has no value or the row ends before it; a whole number has no point.

        Raises InputError for what is neither a text nor a number.
        """
        return self._as_text(k, position, self._value(k, position))

    def entries(self, k: int, position: int) -> list[str | None] | None:
        """The texts of a field that holds a list, None of one that holds none. Raises InputError as `text` does."""
        value = self._value(k, position)
        return [self._as_text(k, position, each) for each in value] if isinstance(value, list) else None

    def _value(self, k: int, position: int):
        row = self.rows[k]
        return row[position] if position < len(row) else None

    def _as_text(self, k: int, position: int, value) -> str | None:
        if isinstance(value, bytes):
            try:
                return value.decode()
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{self.place(k)}: column {self.columns[position]!r} holds bytes that are not UTF-8 text"
                ) from error
        if isinstance(value, list | dict):
            kind = type(value).__name__
            raise InputError(f"{self.place(k)}: column {self.columns[position]!r} holds a {kind}, not a text or number")
        if isinstance(value, float):
            if math.isnan(value):
                return None
            return str(int(value)) if value.is_integer() else str(value)
        return None if value is None else str(value)


NO_HEADER = "the first row looks like data: add a first line with the columns' names"


def is_sentence(name: str) -> bool:
    """Whether the name of a column is rather a text."""
    return len(name.split()) > 5


def read_table(path: str | Path, delimiter: str | None = None) -> Table:
    """Read a file of the user's own by the ending of its name: .tsv, .csv, .json, .jsonl, .parquet or .txt, in any
    case, and with .gz or .zst behind it where it is packed.

    Blanks around the columns' names are no part of them. `delimiter`: between the fields of a CSV file; None: found.
    Raises InputError for another ending, and for a file that is missing, empty, malformed, or text but not UTF-8.
    """
    path = Path(path)
    kind = ending(path)
    if kind not in _READERS:
        raise InputError(
            f"{path}: files are read by their ending, which must be {', '.join(_READERS)}, or one of these and "
            f"{' or '.join(PACKED)}"
        )
    table = read_csv(path, delimiter) if kind == ".csv" else _READERS[kind](path)
    if not table.rows:
        raise InputError(f"{path}: the file holds no row of data")
    return replace(table, columns=tuple(name.strip("\ufeff\u200b \t\r\n\xa0") for name in table.columns))


def read_tsv(path: Path, headerless: tuple[str, ...] = ()) -> Table:
    """Read a tab-separated file exactly: every line a row, no quoting, no row or character changed.

    `headerless`: the columns of a file that may come without a header line; it is taken to have none when its first
    row has as many fields as that and is not made of column names. A byte-order mark and the carriage return of a
    Windows line end are dropped.
    Raises InputError for a file that is missing, empty or not UTF-8.
    """
    path = Path(path)
    return _tsv_table(path, _read_text(path), "\n", headerless)


def read_own_tsv(path: Path) -> Table:
    """Read a tab-separated file of the user's own: as GLUE's, but where there is no line feed a carriage return alone
    ends a row (old Macs), and a row with more fields than the header has is an error: a tab has got into its text."""
    text = _read_text(path)
    table = _tsv_table(path, text, "\n" if "\n" in text else "\r")
    if all(len(name) > 1 and name[0] == name[-1] == '"' for name in table.columns):
        raise InputError(f"{path}: its columns' names stand in double quotes, which TSV does not have; name it .csv")
    for k, row in enumerate(table.rows):
        if len(row) > len(table.columns):
            raise InputError(
                f"{table.place(k)}: {len(row)} tab-separated fields where the header has {len(table.columns)}; mend or "
                "remove the row (text with a tab in it can stand in a .csv, in double quotes)"
            )
    return table


def _tsv_table(path: Path, text: str, end: str, headerless: tuple[str, ...] = ()) -> Table:
    rows = [line.removesuffix("\r").split("\t") for line in text.removesuffix(end).split(end)]
    if len(rows[0]) == len(headerless) and not set(rows[0]) & set(headerless):
        return Table(path, headerless, rows, range(1, len(rows) + 1))
    if len(rows) < 2:
        raise InputError(f"{path}: the file holds no row of data")
    return Table(path, tuple(rows[0]), rows[1:], range(2, len(rows) + 1))


def read_csv(path: Path, delimiter: str | None = None) -> Table:
    """Read a file with a header line and fields between commas, or another `delimiter`; a field in double quotes may
    hold the delimiter and line ends.

    None takes the delimiter that Excel's first line `sep=;` names, or the one that splits the header best. An empty
    line is no row, but in a file of one column it is a row without text.
    """
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # by default a field of 131,072 characters is an error
    text, notes = _read_text(path), []
    named = re.match(r"sep=([^\r\n])(?=[\r\n])", text)
    if named:
        text = text[named.end() :]
    chosen = delimiter or (named[1] if named else _delimiter_of(text))
    called = _DELIMITERS.get(chosen, repr(chosen))
    if not delimiter and chosen != ",":
        notes.append(f"read with a {called} between fields; --delimiter names another")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=chosen, strict=True)
    columns, rows, numbers, empty = (), [], [], []
    start = 1
    try:
        for row in reader:
            place, start = start, reader.line_num + 1
            if not columns:
                columns = tuple(row)
            elif len(row) == len(columns):
                rows.append(row)
                numbers.append(place)
            elif len(columns) == 1 and not row:
                rows.append([""])
                numbers.append(place)
                empty.append(place)
            elif row and (len(row) > 1 or row[0].strip()):
                raise InputError(
                    f"{path}, line {place}: {len(row)} fields where the header has {len(columns)}; text with a "
                    f"{called} or a line end in it must stand in double quotes"
                )
    except csv.Error as error:
        more = ""
        if "expected after" in str(error):
            more = '; a double quote inside a quoted field is written twice, "", and not \\"'
        raise InputError(f"{path}, line {start}: {error}{more}") from error
    if empty:
        notes.append(f"{_lines(empty)} empty, which is read as no text")
    return Table(path, columns, rows, numbers, notes=tuple(notes))


def _delimiter_of(text: str) -> str:
    """The one of the usual delimiters that makes most fields of the first line."""
    header = text.lstrip("\r\n")[:100_000]

    def fields(delimiter: str) -> int:
        try:
            return len(next(csv.reader(io.StringIO(header, newline=""), delimiter=delimiter), ()))
        except csv.Error:
            return 0

    return max(_DELIMITERS, key=fields)


def read_json(path: Path) -> Table:
    """Read JSON: an object a line, or one list of objects, which may stand under the key `data`.

    The columns are all keys that occur, in order of appearance.
    """
    text = _read_text(path)
    whole, notes = _one_value(path, text), ()
    if isinstance(whole, dict) and _are_objects(whole.get("data")):
        whole, notes = whole["data"], ("its rows are those under the key data",)
    elif isinstance(whole, dict) and whole and all(isinstance(value, list | dict) for value in whole.values()):
        raise InputError(
            f"{path}: whole columns, not rows; with pandas, df.to_json('{path.stem}.jsonl', orient='records', "
            "lines=True) writes rows"
        )
    if _are_objects(whole):
        objects, numbers, unit = whole, range(1, len(whole) + 1), "row"
    else:
        objects, numbers = _json_lines(path, text)
        unit = "line"
    columns = tuple(dict.fromkeys(key for value in objects for key in value))
    rows = [[value.get(column) for column in columns] for value in objects]
    return Table(path, columns, rows, numbers, unit, notes)


def _one_value(path: Path, text: str):
    """What a file of one JSON value holds; None for any other, such as one of several lines with a value each."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if text.lstrip().startswith("[") and not error.msg.startswith("Extra data"):
            raise InputError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from error
    except (ValueError, RecursionError):
        pass  # _json_lines comes to it again, and names the line
    return None


def _are_objects(value) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _json_lines(path: Path, text: str) -> tuple[list[dict], list[int]]:
    """The objects of a file with one a line, and the numbers of their lines."""
    objects, numbers = [], []
    for number, line in enumerate(text.split("\n"), start=1):
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
    return objects, numbers


def read_parquet(path: Path) -> Table:
    """Read a Parquet file. The numbers of a ClassLabel column, of Hugging Face's datasets, or of lists of such, become
    its class names; -1, which stands for none there, no value."""
    raw = _read_bytes(path)
    if not raw.startswith(_PARQUET):
        _check_kind(path, raw)
    try:
        table = parquet.ParquetFile(pyarrow.BufferReader(raw)).read()
        values = [_values(column) for column in table.columns]
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path}: not a Parquet file that can be read: {reason(error)}") from error
    for position, (name, names) in enumerate(zip(table.column_names, _class_labels(table.schema), strict=True)):
        if names is not None:
            values[position] = [
                _class_label(value, names, f"{path}, row {k}: column {name!r}")
                for k, value in enumerate(values[position], 1)
            ]
    rows = [list(row) for row in zip(*values, strict=True)]
    return Table(path, tuple(table.column_names), rows, range(1, len(rows) + 1), unit="row")


def _values(column: pyarrow.ChunkedArray) -> list:
    """A column's values; as bytes where its text is not UTF-8, and as text where Python has no such date."""
    try:
        return column.to_pylist()
    except (ValueError, OverflowError):
        text = pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)
        return column.cast(pyarrow.large_binary() if text else pyarrow.string()).to_pylist()


def _class_labels(schema: pyarrow.Schema) -> list[list[str] | None]:
    """Each column's class names, by number; None for a column that is no ClassLabel."""

    def names(field: pyarrow.Field) -> list[str] | None:
        try:
            feature = json.loads(schema.metadata[b"huggingface"])["info"]["features"][field.name]
            feature = feature.get("feature", feature)  # of a list's entries
            found = feature["names"] if feature["_type"] == "ClassLabel" else None
        except (TypeError, KeyError, ValueError, AttributeError):
            return None  # no metadata, none of Hugging Face, or none that says what this column is
        entry = getattr(field.type, "value_type", field.type)
        return found if isinstance(found, list) and pyarrow.types.is_integer(entry) else None

    return [names(field) for field in schema]


def _class_label(value: int | list | None, names: list[str], what: str) -> str | list | None:
    if isinstance(value, list):
        return [_class_label(each, names, what) for each in value]
    if value is None or value == -1:
        return None
    if not 0 <= value < len(names):
        raise InputError(f"{what} holds class {value}, and has only the classes {', '.join(map(str, names))}")
    return str(names[value])


def read_lines(path: Path) -> Table:
    """Read plain text: a text a line, in a column called `TEXT`. Blank lines are no rows."""
    lines = [(k, line.removesuffix("\r")) for k, line in enumerate(_read_text(path).split("\n"), 1)]
    rows = [(k, line) for k, line in lines if line.strip()]
    return Table(path, (TEXT,), [[line] for _, line in rows], [k for k, _ in rows])


# Files of any size, of which little is in memory at a time.


def stream_lines(path: Path) -> Iterator[str]:
    """The lines of plain text, packed or not, without their ends; blank lines are among them."""
    packing, number = PACKED.get(path.suffix.lower()), 0
    try:
        with pyarrow.input_stream(str(path), packing) as stream, io.BufferedReader(stream, _STREAMED) as file:
            _check_kind(path, file.peek())
            for number, raw in enumerate(file, 1):
                yield raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}, line {number}: not UTF-8 text; save the file as UTF-8") from error
    except (OSError, pyarrow.ArrowException) as error:
        what = "cannot be read" if packing is None else f"not a whole {packing} file"
        raise InputError(f"{path}: {what}: {reason(error)}") from error


def stream_texts(path: Path, column: str | None) -> Iterator[str]:
    """A text column of a Parquet file, None for its only one, row by row; a row without a text is left out."""
    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            texts = [field.name for field in schema if pyarrow.types.is_string(field.type) or _is_long(field.type)]
            if column is None and len(texts) == 1:
                (column,) = texts
            if column not in texts:
                there = ", ".join(schema.names)
                said = "which of its columns is the text?" if column is None else f"no column {column!r} of text"
                raise InputError(f"{path}: {said} --text_column names it; its columns are {there}")
            for batch in file.iter_batches(columns=[column]):
                yield from (text for text in batch.column(0).to_pylist() if text is not None)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path}: not a Parquet file that can be read: {reason(error)}") from error


def _is_long(kind: pyarrow.DataType) -> bool:
    return pyarrow.types.is_large_string(kind)


# A file's ending -> who reads it.
_READERS = {
    ".tsv": read_own_tsv,
    ".csv": read_csv,
    ".json": read_json,
    ".jsonl": read_json,
    ".parquet": read_parquet,
    PLAIN: read_lines,
}


def _lines(numbers: list[int]) -> str:
    """Line 3 is; lines 3, 5, 8, 9, 12, ... are."""
    shown = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
    return f"line {shown} is" if len(numbers) == 1 else f"{len(numbers)} lines ({shown}) are"


def _read_bytes(path: Path) -> bytes:
    """What a file holds, unpacked."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    packing = PACKED.get(path.suffix.lower())
    if packing is None:
        return raw
    try:
        return pyarrow.CompressedInputStream(pyarrow.BufferReader(raw), packing).read()
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{path}: not a whole {packing} file: {reason(error)}") from error


def _check_kind(path: Path, raw: bytes) -> None:
    for beginning, kind in _OTHER_KINDS.items():
        if raw.startswith(beginning):
            raise InputError(f"{path}: {kind}")


def _read_text(path: Path) -> str:
    raw = _read_bytes(path)
    _check_kind(path, raw)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: not UTF-8 text; save the file as UTF-8") from error
