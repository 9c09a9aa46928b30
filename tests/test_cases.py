"""Files as people have them: tests/cases, made up after public bug reports, and their neighbours written here."""

import gzip
import io
import json
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet
from transformers import BertConfig

from bert_finetune.arguments import TaskArguments
from bert_finetune.data import load_split
from bert_finetune.errors import InputError, reports_input_errors
from bert_finetune.run_glue import main as finetune

CASES = Path(__file__).parent / "cases"
TWO = {"negative": 3, "positive": 3}


@dataclass
class Case:
    """A file: one of tests/cases by its name, or its `content` under the ending of its name.

    teacher: class names of the fine-tuned model that it is for; None: a new head. options: of TaskArguments.
    counts: what is read, label -> rows; None for scores. scores: those. said: parts of what is printed; only
    these lines are, beside the one that describes the task. refused: a part of the message, where the file is.
    """

    content: bytes | str | None = None
    counts: dict[str, int] | None = None
    scores: list[float] | None = None
    said: list[str] = field(default_factory=list)
    refused: str | None = None
    teacher: list[str] | None = None
    options: dict = field(default_factory=dict)
    texts: list[str] | None = None
    split: str = "train"


def read(path, case):
    """The task that a file says, and its rows."""
    option = {"train": "train_file", "dev": "validation_file", "test": "test_file"}[case.split]
    arguments = TaskArguments(**{option: str(path)}, **case.options)
    names = case.teacher or ["LABEL_0", "LABEL_1"]
    config = BertConfig(id2label=dict(enumerate(names)), num_labels=len(names))
    task = arguments.load_task(config, fine_tuned=case.teacher is not None, splits=[case.split])
    return task, load_split(task, arguments.file(str(path)), case.split)


def place(name, case, folder):
    if case.content is None:
        return CASES / name
    path = folder / name.replace(" ", "_")
    path.write_bytes(case.content.encode() if isinstance(case.content, str) else case.content)
    return path


def given(name):
    return (CASES / name).read_bytes()


def arrow(columns, metadata=None):
    """The bytes of a Parquet file."""
    out = io.BytesIO()
    parquet.write_table(pyarrow.table(columns).replace_schema_metadata(metadata), out)
    return out.getvalue()


def class_label(*names):
    feature = {"names": list(names), "_type": "ClassLabel"}
    return {"huggingface": json.dumps({"info": {"features": {"label": feature}}})}


ROWS = "good soup,positive\nrude waiter,negative\n"
OBJECTS = [{"text": "good soup", "label": "positive"}, {"text": "rude waiter", "label": "negative"}]
LINES = "".join(json.dumps(value) + "\n" for value in OBJECTS)
PAIR = {"negative": 1, "positive": 1}

READ = {
    # Labels
    "mixed_labels.csv": Case(counts={"0": 3, "1": 3}),
    "float5.csv": Case(counts={"0": 2, "1": 1, "2": 1, "3": 1, "4": 1}),
    "float5 for a teacher.csv": Case(given("float5.csv"), {"0": 2, "1": 1, "2": 1, "3": 1, "4": 1}, teacher=[*"01234"]),
    "a model's own floats.csv": Case("text,label\na,0\nb,1.0\n", {"0.0": 1, "1.0": 1}, teacher=["0.0", "1.0"]),
    "names that are versions.csv": Case("text,label\na,1.0\nb,2.0beta\n", {"1.0": 1, "2.0beta": 1}),
    "names with underscores.csv": Case("text,label\na,1_0\nb,2_0\n", {"1_0": 1, "2_0": 1}),
    "leading zeros.csv": Case("text,label\na,01\nb,02\n", {"01": 1, "02": 1}),
    "decimals.parquet": Case(
        arrow({"text": ["a", "b"], "label": pyarrow.array([0, 1], pyarrow.decimal128(3, 2))}), {"0": 1, "1": 1}
    ),
    "booleans.parquet": Case(arrow({"text": ["a", "b"], "label": [True, False]}), {"True": 1, "False": 1}),
    "blank_labels.csv": Case(counts={"negative": 6, "positive": 6}, said=["12 labels have blanks around them"]),
    "a no-break space.csv": Case(
        "text,label\na,positive\xa0\nb,negative\n", PAIR, said=["1 labels have blanks around them"]
    ),
    "case_labels.csv": Case(
        counts={"Negative": 1, "Positive": 1, "negative": 1, "positive": 1},
        said=[
            "warning: labels that differ by case only (Positive and positive, Negative and negative) are classes of "
            "their own; --merge_case makes them one"
        ],
    ),
    "case_labels merged.csv": Case(
        given("case_labels.csv") + b"a,positive\nb,negative\n",
        {"negative": 3, "positive": 3},
        options={"merge_case": True},
        said=["labels that differ by case only (Positive and positive, Negative and negative) are one class each"],
    ),
    "case for a teacher.csv": Case(
        "text,label\na,good\nb,GOOD\nc,bad\nd,bad\n",
        {"Good": 2, "Bad": 2},
        teacher=["Good", "Bad"],
        options={"merge_case": True},
        said=["(GOOD and good) are one class each"],
    ),
    "a teacher's own cases.csv": Case(
        "text,label\na,good\nb,Good\n", {"Good": 1, "good": 1}, teacher=["Good", "good"], said=["differ by case only"]
    ),
    "classlabel.parquet": Case(counts={"negative": 3, "positive": 3}),
    "classlabel for a teacher.parquet": Case(
        given("classlabel.parquet"), {"positive": 3, "negative": 3}, teacher=["positive", "negative"]
    ),
    "other metadata.parquet": Case(
        arrow({"text": ["a", "b"], "label": [0, 1]}, {"huggingface": "{}"}), {"0": 1, "1": 1}
    ),
    # Scores
    "commas.csv": Case(
        "text;label\na;0,5\nb;1,0\nc;-2,25\n", scores=[0.5, 1, -2.25], options={"decimal": ","}, said=["a semicolon"]
    ),
    "whole with commas.csv": Case('text,label\na,"1,0"\nb,2\nc,"1,0"\n', {"1": 2, "2": 1}, options={"decimal": ","}),
    "points beside commas.jsonl": Case(
        '{"text": "a", "label": 0.5}\n{"text": "b", "label": "1,5"}\n', scores=[0.5, 1.5], options={"decimal": ","}
    ),
    "commas unsaid.csv": Case(
        'text,label\na,"0,5"\nb,"1,0"\n',
        {"0,5": 1, "1,0": 1},
        said=["warning: labels such as 0,5 look like numbers with a decimal comma: --decimal ,"],
    ),
    # Columns
    "header_space.csv": Case(counts=TWO),
    "header space.tsv": Case("text \t label\ngood soup\tpositive\nrude\tnegative\n", PAIR),
    "header space.jsonl": Case(LINES.replace('"label"', '"label "'), PAIR),
    "two marks.csv": Case("\ufeff\ufefftext,label\n" + ROWS, PAIR),
    "pandas_index.csv": Case(counts=TWO, said=["a column without a name, an index of the rows, is left out"]),
    "pandas index twice.csv": Case(
        "Unnamed: 0,text,label\n0,good soup,positive\n1,rude,negative\n", PAIR, said=["a column without a name"]
    ),
    "pandas index.parquet": Case(
        arrow({"text": ["a", "b"], "label": ["x", "y"], "__index_level_0__": [3, 7]}),
        {"x": 1, "y": 1},
        said=["a column without a name"],
    ),
    "columns of a spreadsheet.csv": Case(
        "text,label,,\ngood soup,positive,,\nrude,negative,,\n", PAIR, said=["a column without a name"]
    ),
    "an index unused.csv": Case(",text,label\n0,a,x\n1,b,y\n", {"x": 1, "y": 1}, options={"text_column": "text"}),
    "nested.jsonl": Case(counts=TWO, options={"text_column": "text"}),
    "bytes unused.parquet": Case(
        arrow({"text": ["a", "b"], "label": ["x", "y"], "image": [b"\xff", None], "tags": [["a"], []]}),
        {"x": 1, "y": 1},
        options={"text_column": "text"},
    ),
    # Delimiters and line ends
    "semicolon.csv": Case(counts=TWO, said=["read with a semicolon between fields; --delimiter names another"]),
    "tabs.csv": Case('text\tlabel\n"a, b"\tpositive\nc\tnegative\n', PAIR, said=["read with a tab"]),
    "quoted tabs.csv": Case('"text"\t"label"\n"a"\t"x"\n"b"\t"y"\n', {"x": 1, "y": 1}, said=["read with a tab"]),
    "bars.csv": Case("text|label\na, b|positive\nc;d|negative\n", PAIR, said=["read with a bar"]),
    "semicolons, and commas in the header.csv": Case(
        "text;label;a, b\nx;positive;\ny;negative;\n", PAIR, options={"text_column": "text"}, said=["a semicolon"]
    ),
    "forced.csv": Case(
        "text;label,gold\nx;positive,1\ny;negative,2\n",
        {"negative,2": 1, "positive,1": 1},
        options={"label_column": "label,gold", "delimiter": ";"},
    ),
    "another delimiter.csv": Case("text~label\nx~positive\ny~negative\n", PAIR, options={"delimiter": "~"}),
    "a tab by its name.csv": Case("text\tlabel\nx\tpositive\ny\tnegative\n", PAIR, options={"delimiter": "\\t"}),
    "sep.csv": Case("sep=;\r\ntext;label\r\nx;positive\r\ny;negative\r\n", PAIR, said=["a semicolon"]),
    "an empty first line.csv": Case("\ntext,label\n" + ROWS, PAIR),
    "blank lines.csv": Case("text,label\n\ngood soup,positive\n  \nrude,negative\n\n", PAIR),
    "mac.csv": Case("text,label\rgood soup,positive\rrude,negative\r", PAIR),
    "tsv_mac.tsv": Case(counts=TWO),
    "windows.tsv": Case("\ufefftext\tlabel\r\ngood soup\tpositive\r\nrude\tnegative", PAIR),
    "a carriage return in text.tsv": Case(
        "text\tlabel\ngood\rsoup\tpositive\nrude\tnegative\n", PAIR, texts=["good\rsoup", "rude"]
    ),
    "ending.CSV": Case("text,label\n" + ROWS, PAIR),
    "ending.TSV": Case("text\tlabel\ngood soup\tpositive\nrude\tnegative\n", PAIR),
    "ending.JSONL": Case(LINES, PAIR),
    "ending.Parquet": Case(arrow({"text": ["a", "b"], "label": ["x", "y"]}), {"x": 1, "y": 1}),
    # JSON
    "array.json": Case(counts=TWO),
    "array_pretty.json": Case(counts=TWO),
    "datakey.json": Case(counts=TWO, said=["its rows are those under the key data"]),
    "array.jsonl": Case(json.dumps(OBJECTS), PAIR),
    "pandas table.json": Case(
        json.dumps({"schema": {"fields": []}, "data": OBJECTS}, indent=1), PAIR, said=["under the key data"]
    ),
    "lists of strings in data.jsonl": Case(
        '{"text": "a", "label": "x", "data": ["b"]}\n{"text": "a", "label": "y", "data": []}\n',
        {"x": 1, "y": 1},
        options={"text_column": "text"},
    ),
    "windows.jsonl": Case("\ufeff" + LINES.replace("\n", "\r\n"), PAIR),
    "surrogate.jsonl": Case(
        counts={"negative": 3, "positive": 4},
        said=["1 texts hold half a character, a lone surrogate, which is replaced by \ufffd (line 7)"],
        texts=["good soup", "rude waiter", "lovely", "cold food", "best cake", "never again", "cut emoji \ufffd"],
    ),
    "a whole emoji.jsonl": Case(
        '{"text": "\\ud83d\\ude00", "label": "x"}\n{"text": "a", "label": "y"}', {"x": 1, "y": 1}, texts=["😀", "a"]
    ),
    # Rows to predict
    "test_blank.csv": Case(
        split="test",
        teacher=["a", "b"],
        texts=["good soup", "", "rude waiter"],
        said=["line 3 is empty, which is read as no text"],
    ),
    "blank rows to predict.csv": Case(
        'text\n\n""\nx\n\n',
        split="test",
        teacher=["a", "b"],
        texts=["", "", "x", ""],
        said=["2 lines (2, 5) are empty, which is"],
    ),
    "blank rows to predict.tsv": Case("text\nx\n\ny\n", split="test", teacher=["a", "b"], texts=["x", "", "y"]),
    "no labels to predict.parquet": Case(
        arrow({"text": ["a"], "label": [-1]}, class_label("x", "y")), split="test", teacher=["x", "y"], texts=["a"]
    ),
}

REFUSED = {
    "missing_label.csv": Case(refused="line 8: no value in column 'label' (nor in 1 more rows); fill it in"),
    "missing_label in dev.csv": Case(
        given("missing_label.csv"), split="dev", teacher=["positive", "negative"], refused="line 8: no v"
    ),
    "regmiss.csv": Case(refused="line 3: no value in column 'label'; fill it in or remove the row"),
    "regnan.csv": Case(refused="line 2: no value in column 'label', as 'nan' is none; fill it in"),
    "NA among numbers.csv": Case(
        "text,label\na,0\nb,1\nc,N/A\n", refused="line 4: no value in column 'label', as 'N/A'"
    ),
    "nan among names.csv": Case(
        "text,label\na,x\nb,y\nc,NaN\n", refused="line 4: no value in column 'label', as 'NaN'"
    ),
    "blanks for a label.csv": Case("text,label\na,x\nb,y\nc,  \n", refused="line 4: no value in column 'label'; fill"),
    "no label.parquet": Case(
        arrow({"text": ["a", "b", "c"], "label": [1, 0, -1]}, class_label("x", "y")), refused="row 3: no value in col"
    ),
    "a number without a class.parquet": Case(
        arrow({"text": ["a", "b"], "label": [1, 2]}, class_label("x", "y")),
        refused="row 2: column 'label' holds class 2, and has only the classes x, y",
    ),
    "reg39.csv": Case(refused="line 2: '1e39' is too large: float32 has no room for its square"),
    "too large a square.csv": Case("text,label\na,0.5\nb,-1e20\n", refused="line 3: '-1e20' is too large"),
    "infinite.csv": Case("text,label\na,0.5\nb,inf\n", refused="line 3: 'inf' is not a number"),
    "infinite.jsonl": Case(
        '{"text": "a", "label": 0.5}\n{"text": "b", "label": 1e999}\n', refused="line 2: 'inf' is not a number"
    ),
    "a point for a comma.csv": Case(
        "text;label\na;0,5\nb;1.5\n",
        options={"decimal": ","},
        refused="line 3: 1.5 has a point, which --decimal , does",
    ),
    "cases for a teacher.csv": Case(
        "text,label\na,good\nb,GOOD\nc,bad\n",
        teacher=["Good", "Bad"],
        refused="GOOD and good both look like the class Good; write it in one way (where only the case differs, --me",
    ),
    "tsv_extra.tsv": Case(refused="line 2: 3 tab-separated fields where the header has 2; mend or remove the row"),
    "label_first_tab.tsv": Case(refused="line 2: 3 tab-separated fields where the header has 2"),
    "extra to predict.tsv": Case("text\na\tb\n", split="test", teacher=["x", "y"], refused="line 2: 2 tab-separated"),
    "noheader.csv": Case(
        refused="no column 'label'; its columns are good soup, positive; the first row looks like data: add a first "
    ),
    "no header, numbers.tsv": Case("good\t1\nbad\t0\n", refused="the first row looks like data: add a first line"),
    "no header to predict.csv": Case(
        "I would not go there again\nnever\n", split="test", teacher=["x", "y"], refused="the first row looks like data"
    ),
    "columns that are numbered.csv": Case("0,1\na,x\n", refused="no column 'label'; its columns are 0, 1"),
    "quoted names.tsv": Case('"text"\t"label"\n"a"\t"x"\n', refused="names stand in double quotes, which TSV does not"),
    "an index alone.csv": Case(",label\n0,x\n1,y\n", refused="--text_column is missing"),
    "columns.json": Case(
        refused="whole columns, not rows; with pandas, df.to_json('columns.jsonl', orient='records', lines=True) writes"
    ),
    "pandas index.json": Case('{"0": {"text": "a"}, "1": {"text": "b"}}', refused="whole columns, not rows"),
    "pandas split.json": Case('{"columns": ["text"], "index": [0], "data": [["a"]]}', refused="whole columns, not ro"),
    "lists.json": Case('{"text": ["a", "b"], "label": ["x", "y"]}', refused="whole columns, not rows"),
    "a list of texts.json": Case('["a", "b"]', refused="line 1: not a JSON object; there must be one object a line"),
    "a mistake.json": Case(
        '[\n {"text": "a"},\n {"text" "b"}\n]\n', refused="line 3: not JSON: Expecting ':' delimiter"
    ),
    "cut off.json": Case('[{"text": "a", "label": "x"},\n', refused="line 2: not JSON: Expecting value"),
    "surrogate_label.jsonl": Case(refused=r"line 7: the label '\ud83d' holds half a character, a lone surrogate"),
    "dup.parquet": Case(refused="more than one column 'label'; its columns are text, label, label"),
    "dup with blanks.csv": Case("text,label,label \na,x,y\n", refused="more than one column 'label'"),
    "nested in use.jsonl": Case(
        given("nested.jsonl"), options={"text_column": "meta"}, refused="line 1: column 'meta' holds a dict"
    ),
    "quotes_inside.csv": Case(
        refused="line 3: ',' expected after '\"'; a double quote inside a quoted field is written twice, \"\", and n"
    ),
    "backslash.csv": Case(
        refused="line 2: ',' expected after '\"'; a double quote inside a quoted field is written twice"
    ),
    "trailing.csv": Case(refused="line 3: 3 fields where the header has 2; text with a comma or a line end in it must"),
    "too many.csv": Case(
        "text;label\na;b;x\n", refused="line 2: 3 fields where the header has 2; text with a semicolon"
    ),
    "gzip.csv": Case(gzip.compress(b"text,label\n"), refused="gzip.csv: a gzip file; its name must end in .gz"),
    "gzip.tsv": Case(gzip.compress(b"text\tlabel\n"), refused="gzip.tsv: a gzip file"),
    "gzip.jsonl": Case(gzip.compress(LINES.encode()), refused="gzip.jsonl: a gzip file"),
    "gzip.parquet": Case(gzip.compress(arrow({"text": ["a"]})), refused="gzip.parquet: a gzip file"),
    "excel.csv": Case(
        b"PK\x03\x04\x14\x00", refused="a zip file or an Excel workbook; unpack it, or save the table as"
    ),
    "parquet.csv": Case(arrow({"text": ["a"]}), refused="a Parquet file; its name must end in .parquet"),
    "pointer.csv": Case(
        b"version https://git-lfs.github.com/spec/v1\n", refused="a Git LFS pointer, the data were not"
    ),
    "pointer.parquet": Case(b"version https://git-lfs.github.com/spec/v1\n", refused="a Git LFS pointer"),
    "page.csv": Case(b"<!DOCTYPE html>\n<html>", refused="a web page, not the file itself"),
    "excel text.csv": Case(
        "text\tlabel\na\tx\n".encode("utf-16"), refused="line 1: not UTF-8 text; save the file as UTF-8"
    ),
}


@pytest.mark.parametrize("name", READ)
def test_read(name, tmp_path, capsys):
    case = READ[name]
    task, rows = read(place(name, case, tmp_path), case)
    printed = [line for line in capsys.readouterr().out.splitlines() if ": text in " not in line]
    if case.counts is not None:
        assert Counter(task.kind.output_names[k] for k in rows["label"]) == case.counts
        assert task.kind.output_names == (case.teacher or sorted(case.counts))
    if case.scores is not None:
        assert rows["label"][:] == case.scores
    if case.texts is not None:
        assert rows["text_a"][:] == case.texts
    # Each finding is one line, printed once though the file is read twice.
    assert len(printed) == len(case.said), printed
    for part, line in zip(case.said, printed, strict=True):
        assert part in line


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, tmp_path):
    case = REFUSED[name]
    path = place(name, case, tmp_path)
    with pytest.raises(InputError) as error:
        read(path, case)
    assert str(path) in str(error.value)
    assert case.refused in str(error.value)
    assert "\n" not in str(error.value)


def test_every_file_is_a_case():
    assert {path.name for path in CASES.iterdir()} <= {*READ, *REFUSED}


def test_files_of_a_run_are_spelled_alike(tmp_path, capsys):
    """What training data say of labels counts for dev data: numbers however written, one case, one decimal sign."""

    def labels(train, dev, **options):
        for name, rows in (("train", train), ("dev", dev)):
            (tmp_path / f"{name}.csv").write_text("text;label\n" + "".join(f"a;{label}\n" for label in rows))
        files = {"train_file": str(tmp_path / "train.csv"), "validation_file": str(tmp_path / "dev.csv")}
        task = TaskArguments(**files, **options).load_task(BertConfig(), fine_tuned=False, splits=["train", "dev"])
        return task.kind.output_names, load_split(task, tmp_path / "dev.csv", "dev")["label"][:]

    assert labels(["0", "1"], ["1.0", "0.0"]) == (["0", "1"], [1, 0])
    assert labels(["0.0", "1.0"], ["1", "0"]) == (["0", "1"], [1, 0])
    assert labels(["a", "b", "B", "b"], ["B", "A"], merge_case=True) == (["a", "b"], [1, 0])
    assert labels(["0,5", "1"], ["2,5", "-1"], decimal=",") == (["score"], [2.5, -1])
    printed = capsys.readouterr().out.splitlines()
    assert sum("train.csv: read with a semicolon" in line for line in printed) == 4
    assert sum("dev.csv: read with a semicolon" in line for line in printed) == 4
    with pytest.raises(InputError, match=r"dev\.csv, line 3: label 'A' is not one of custom's: a, b"):
        labels(["a", "b"], ["b", "A"])


def test_only_the_main_process_says_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    read(CASES / "semicolon.csv", Case())
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--delimiter", ";;"], "--delimiter ;;: must be one character"),
        (["--delimiter", ""], "--delimiter : must be one character"),
        (["--delimiter", '"'], "must be one character"),
        (["--delimiter", ";", "--train_file", "a.jsonl"], "--delimiter: none of your files is a .csv"),
        (["--decimal", ";"], "argument --decimal: invalid choice: ';'"),
        (["--decimal", ",", "--train_file", "", "--task_name", "RTE", "--data_dir", "x"], "are for your own files"),
    ],
)
def test_options(options, message, exits_with_2):
    line = exits_with_2(finetune, "--model_name_or_path", "x", "--train_file", "a.csv", "--do_train", *options)
    assert message in line


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_what_a_console_cannot_show_is_escaped(encoding, tmp_path, monkeypatch):
    path = tmp_path / "a.csv"
    path.write_text("text,label\na,好\nb,\N{GRINNING FACE}\n", encoding="utf-8")
    console = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", console)

    @reports_input_errors
    def main():
        read(path, Case())
        print("\ud83d")

    main()
    console.flush()
    printed = console.buffer.getvalue().decode(encoding)
    assert ("好 (1), 😀 (1)" if encoding == "utf-8" else r"\u597d (1), \U0001f600 (1)") in printed
    assert printed.endswith("\\ud83d\n")
