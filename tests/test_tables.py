import csv
import gzip
import json
import sys

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from bert_finetune.errors import InputError
from bert_finetune.tables import read_table

# Everything that text can hold, lone surrogates aside: quotes, commas, tabs, line ends, NUL, Unicode line separators.
# (Before Python 3.11, csv refuses NUL.)
NUL = "" if sys.version_info >= (3, 11) else "\0"
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=NUL), max_size=12)
ROWS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=6)
ODD = [
    'He said "no", twice',
    "two\nlines",
    "a\ttab",
    f"NUL {'no' if NUL else chr(0)} here",
    "next\u2028line\u2029\x85\x0b\x0c",
    "",
    " blanks ",
    "NA",
    "null",
    "1e5",
    "x" * 200_000,
]


def write(path, columns, rows):
    """A table in the format that the file's ending names, as other programs write it."""
    if path.suffix == ".csv":
        with open(path, "w", encoding="utf-8", newline="") as file:
            csv.writer(file, quoting=csv.QUOTE_ALL).writerows([columns, *rows])
    elif path.suffix == ".parquet":
        parquet.write_table(pyarrow.table(dict(zip(columns, zip(*rows, strict=True), strict=True))), path)
    else:
        objects = [dict(zip(columns, row, strict=True)) for row in rows]
        path.write_text("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in objects), encoding="utf-8")
    return path


def packed(path, packing):
    """The same file packed, gz or zst, and the plain one gone."""
    into = path.with_name(f"{path.name}.{packing}")
    content = path.read_bytes()
    codec = {"gz": "gzip", "zst": "zstd"}[packing.lower()]
    into.write_bytes(gzip.compress(content) if codec == "gzip" else pyarrow.compress(content, codec, asbytes=True))
    path.unlink()
    return into


def texts(table):
    """All fields as text."""
    return [[table.text(k, position) for position in range(len(table.columns))] for k in range(len(table.rows))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tables")


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
@given(rows=ROWS)
def test_every_text_comes_back_as_it_was_written(ending, folder, rows):
    table = read_table(write(folder / f"table.{ending}", ["text", "label"], rows))
    assert table.columns == ("text", "label")
    assert [tuple(row) for row in table.rows] == rows


@pytest.mark.parametrize("ending", ["csv", "json", "parquet"])
def test_odd_text(ending, tmp_path):
    table = read_table(write(tmp_path / f"table.{ending}", ["text", "label"], [(text, "1") for text in ODD]))
    assert [row[0] for row in table.rows] == ODD


def test_csv_as_spreadsheets_write_it(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbftext,label\r\n"one, two",1\r\n\r\n"a\r\nb",0\r\nlast,1')
    table = read_table(path)
    assert table.columns == ("text", "label")
    assert table.rows == [["one, two", "1"], ["a\r\nb", "0"], ["last", "1"]]
    assert list(table.numbers) == [2, 4, 6]


def test_json_and_parquet_values(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "label": 1}\n\n{"label": 2.5, "text": "b", "more": true}\n{"text": null}\n')
    table = read_table(path)
    assert table.columns == ("text", "label", "more")
    assert texts(table) == [["a", "1", None], ["b", "2.5", "True"], [None, None, None]]
    assert list(table.numbers) == [1, 3, 4]
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["a", None], "label": [0, 1], "score": [0.5, float("nan")]}), path)
    assert texts(read_table(path)) == [["a", "0", "0.5"], [None, "1", None]]
    # pandas keeps whole numbers with a gap as floats, and some programs keep text as bytes.
    parquet.write_table(pyarrow.table({"text": ["café".encode(), b""], "label": [1.0, None]}), path)
    assert texts(read_table(path)) == [["café", "1"], ["", None]]


@pytest.mark.parametrize("packing", ["gz", "zst", "GZ"])
@pytest.mark.parametrize("ending", ["csv", "json", "parquet"])
def test_packed_files(ending, packing, tmp_path):
    rows = [("one, two", "1"), ("three", "0")] * 500
    path = packed(write(tmp_path / f"table.{ending}", ["text", "label"], rows), packing)
    assert [tuple(row) for row in read_table(path).rows] == rows
    whole = path.read_bytes()
    if ending == "csv":
        path.write_bytes(whole + packed(write(tmp_path / "more.csv", ["more", "1"], rows), packing).read_bytes())
        assert len(read_table(path).rows) == 2001  # packed in two parts, as programs do
    for damaged in (whole[: len(whole) // 2], b"text,label\na,1\n"):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"table\.\w+\.\w+: not a whole (gzip|zstd) file: "):
            read_table(path)


BAD = {
    "short.csv": (b"text,label\na,1\nb\n", r"short.csv, line 3: 1 fields where the header has 2"),
    "comma.csv": (b"text,label\nyes, no,1\n", r"comma.csv, line 2: 3 fields where the header has 2"),
    "quote.csv": (b'text,label\n"a"b,1\n', r"quote.csv, line 2: ',' expected after '\"'"),
    "open.csv": (b'text,label\nb,0\n"a,1\n', r"open.csv, line 3: unexpected end of data"),
    "empty.csv": (b"", r"empty.csv: the file holds no row"),
    "header.csv": (b"text,label\n", r"header.csv: the file holds no row"),
    "latin.csv": (b"text,label\na,1\n\xe9,0\n", r"latin.csv, line 3: not UTF-8"),
    "wide.csv": ("text,label\na,1\n".encode("utf-16"), r"wide.csv, line 1: not UTF-8"),
    "array.json": (b'["a", 1]\n["b", 2]\n', r"array.json, line 1: not a JSON object; there must be one object a line"),
    "pretty.json": (b'{\n  "text": "a"\n}\n', r"pretty.json, line 1: not JSON: .*one object a line"),
    "deep.json": (b'{"a": ' + b"[" * 100_000 + b"\n", r"deep.json, line 1: not JSON"),
    "list.json": (b'{"text": "a"}\n{"text": ["a"]}\n', r"list.json, line 2: column 'text' holds a list, not a text"),
    "empty.json": (b"\n\n", r"empty.json: the file holds no row"),
    "not.parquet": (b"PAR1 and more", r"not.parquet: not a Parquet file"),
    "table.xlsx": (b"PK", r"table.xlsx: files are read by their ending, which must be .tsv, .csv"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(name, tmp_path):
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        texts(read_table(tmp_path / name))


def test_files_that_cannot_be_read(tmp_path):
    for ending in ("csv", "jsonl", "parquet", "tsv"):
        with pytest.raises(InputError, match=f"a.{ending}: no such file"):
            read_table(tmp_path / f"a.{ending}")
        (tmp_path / f"b.{ending}").mkdir()
        with pytest.raises(InputError, match=f"b.{ending}: cannot be read: Is a directory"):
            read_table(tmp_path / f"b.{ending}")


def test_columns_are_found_by_name(tmp_path):
    table = read_table(write(tmp_path / "a.csv", ["text", "label", "label"], [("a", "1", "2")]))
    assert table.column("text") == 0
    with pytest.raises(InputError, match=r"a\.csv: no column 'sentence'; its columns are text, label, label"):
        table.column("sentence")
    with pytest.raises(InputError, match=r"a\.csv: more than one column 'label'"):
        table.column("label")


def test_columns_that_python_has_no_values_for(tmp_path):
    """They stop nothing where they are not used."""
    columns = {
        "text": ["a", "b"],
        "day": pyarrow.array([2**31 - 1, 0], pyarrow.int32()).cast(pyarrow.date32()),
        "broken": pyarrow.array([b"\xff", b"ok"]).view(pyarrow.string()),
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    table = read_table(tmp_path / "a.parquet")
    assert [table.text(k, 0) for k in range(2)] == ["a", "b"]
    assert table.text(1, 1) == "1970-01-01"
    with pytest.raises(InputError, match=r"a\.parquet, row 1: column 'broken' holds bytes that are not UTF-8 text"):
        table.text(0, 2)


@pytest.mark.parametrize("metadata", ["", "{", "[]", '{"info": null}', '{"info": {"features": [1]}}'])
def test_metadata_that_are_not_hugging_face_s(metadata, tmp_path):
    table = pyarrow.table({"text": ["a"], "label": [0]}).replace_schema_metadata({"huggingface": metadata})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert texts(read_table(tmp_path / "a.parquet")) == [["a", "0"]]


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["csv", "tsv", "json", "parquet"])
@given(
    content=st.one_of(
        st.binary(max_size=60),
        st.text('text,label;\t|\n\r"\\[]{}:0.\x00\ufeff\u2028', max_size=60).map(str.encode),
        st.recursive(
            st.none() | st.booleans() | st.floats() | TEXT, lambda x: st.lists(x) | st.dictionaries(TEXT, x)
        ).map(lambda value: json.dumps(value).encode()),
    )
)
def test_any_bytes_are_read_or_refused(ending, folder, content):
    path = folder / f"any.{ending}"
    path.write_bytes(content)
    try:
        table = read_table(path)
    except InputError as error:
        assert str(path) in str(error)
    else:
        assert len(table.rows) == len(table.numbers) > 0
