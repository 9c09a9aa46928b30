"""Classifying with an exported student, without torch and transformers; files of any size, also broken ones."""

import csv
import io
import json
import os
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import ROOT
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from transformers import BertTokenizer

from bert_finetune.data import tokenize
from deploy import classify
from deploy.classify import Classifier, Line, WrongInput, main

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def save_graph(folder: Path, weights: np.ndarray) -> None:
    """A graph in whose place a student's could stand: logits are the sum of each real token's row of `weights`."""
    folder.mkdir(parents=True, exist_ok=True)
    nodes = [
        helper.make_node("Gather", ["weights", "input_ids"], ["rows"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["column"]),
        helper.make_node("Mul", ["rows", "column"], ["real"]),
        helper.make_node("ReduceSum", ["real", "second"], ["logits"], keepdims=0),
    ]
    numbers = {"weights": weights.astype(np.float32), "last": np.array([-1]), "second": np.array([1])}
    axes = ["batch", "sequence"]
    graph = helper.make_graph(
        nodes,
        "student",
        [helper.make_tensor_value_info(name, TensorProto.INT64, axes) for name in INPUTS],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", weights.shape[1]])],
        [numpy_helper.from_array(array, name) for name, array in numbers.items()],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), folder / "model.onnx"
    )


@pytest.fixture(scope="module")
def tokenizer():
    return BertTokenizer(vocab={word: k for k, word in enumerate(VOCABULARY)})


def save_student(folder: Path, tokenizer, names: list[str], **about) -> Path:
    weights = np.zeros((len(VOCABULARY), len(names)))
    weights[5:] = np.linspace(-2, 2, 8 * len(names)).reshape(8, len(names)) if len(names) == 1 else 0
    for k in range(len(names)):
        weights[5 + k, k] = 2  # the class is that of the letter that is there most often
    save_graph(folder, weights)
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"id2label": dict(enumerate(names))}))
    (folder / "export.json").write_text(json.dumps({"max_seq_length": 12} | about))
    return folder


@pytest.fixture(scope="module")
def student(tmp_path_factory, tokenizer):
    return save_student(tmp_path_factory.mktemp("student") / "onnx", tokenizer, ["ah", "bee", "sea"])


def run(*argv, stdin=b""):
    """Exit code, stdout and stderr of the command."""
    command = [sys.executable, ROOT / "deploy/classify.py", *argv]
    done = subprocess.run(list(map(str, command)), input=stdin, capture_output=True)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def call(capsys, *argv) -> tuple[int, str, str]:
    """The same in this process."""
    capsys.readouterr()
    try:
        main([str(word) for word in argv])
        code = 0
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


def test_in_three_lines(student):
    classify = Classifier(student)
    (answer, other) = classify(["a a b", "c"])
    assert answer["label"] == "ah" and other["label"] == "sea"
    shares = np.exp([4, 2, 0]) / np.exp([4, 2, 0]).sum()
    assert answer["probabilities"] == pytest.approx(dict(zip(["ah", "bee", "sea"], shares, strict=True)))
    assert classify([]) == []


def test_answers_keep_their_order_whatever_the_batches(student):
    texts = ["a " * length + letter for length, letter in zip(range(9), "abcabcabc", strict=True)]
    one, many = (Classifier(student)(texts, batch_size=size) for size in (1, 4))
    assert [a["label"] for a in one] == [a["label"] for a in many]
    assert [a["probabilities"] for a in one] == [pytest.approx(a["probabilities"]) for a in many]


def test_scores(tmp_path, tokenizer, capsys):
    folder = save_student(tmp_path / "onnx", tokenizer, ["LABEL_0"])
    assert Classifier(folder)(["h h"]) == [{"score": pytest.approx(4)}]
    assert call(capsys, "--model", folder, "h h")[:2] == (0, "4.0000\n")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.text("abc ", max_size=40), st.text("def ", max_size=40)), min_size=1, max_size=4),
    st.booleans(),
)
def test_texts_become_tokens_as_in_training(student, tokenizer, pairs, alone):
    pairs = [pair[:1] for pair in pairs] if alone else pairs
    columns = dict(zip(("text_a", "text_b"), map(list, zip(*pairs, strict=True)), strict=False))
    trained = tokenize(Dataset.from_dict(columns), tokenizer, 12)
    for ours, theirs in zip(Classifier(student).encode(pairs), trained, strict=True):
        assert (ours.ids, ours.type_ids) == (theirs["input_ids"], theirs["token_type_ids"])


def test_a_text_a_pair_and_lines(student, capsys):
    assert call(capsys, "--model", student, "b b")[:2] == (0, "bee\t0.9647\n")
    assert call(capsys, "--model", student, "a", "c c")[1].startswith("sea\t")
    code, out, err = run("--model", student, stdin=b"a\nb b\n\nc\n")
    assert (code, err) == (0, "")
    assert [line.split("\t")[0] for line in out.splitlines()] == ["ah", "bee", "ah", "sea"]
    code, out, _ = run("--model", student, stdin=b"a\tc c\nb\tb\n")
    assert [line.split("\t")[0] for line in out.splitlines()] == ["sea", "bee"]


FILES = {
    ".csv": 'id,text\n1,"a, a"\n2,"b\nb"\n3,c\n',
    ".tsv": 'id\ttext\n1\ta "a"\n2\tb\n3\tc\n',
    ".jsonl": '{"id": 1, "text": "a"}\n{"text": "b"}\n{"text": "c", "more": [1]}\n',
}


@pytest.mark.parametrize("ending", FILES)
@pytest.mark.parametrize("written", [".csv", ".tsv", ".jsonl"])
def test_files(ending, written, student, tmp_path, capsys):
    source, target = tmp_path / f"in{ending}", tmp_path / f"out{written}"
    source.write_text(FILES[ending])
    code, out, err = call(capsys, "--model", student, "--input", source, "--text_column", "text", "--output", target)
    assert (code, out, err) == (0, "", "")
    if written == ".jsonl":
        found = [json.loads(line) for line in target.read_text().splitlines()]
        labels, shares = [row["label"] for row in found], [row["probabilities"] for row in found]
    else:
        delimiter = {".csv": ",", ".tsv": "\t"}[written]
        found = list(csv.DictReader(target.open(newline=""), delimiter=delimiter))
        labels = [row["label"] for row in found]
        shares = [{name: float(row[name]) for name in ("ah", "bee", "sea")} for row in found]
    assert labels == ["ah", "bee", "sea"]
    assert all(sum(row.values()) == pytest.approx(1, abs=1e-5) for row in shares)


def test_pairs_and_the_columns_of_training(tmp_path, tokenizer, capsys):
    folder = save_student(tmp_path / "onnx", tokenizer, ["ah", "bee", "sea"], text_columns=["one", "other"])
    (tmp_path / "in.csv").write_text("other,one\nc c,a\nb,b\n")
    code, out, _ = call(capsys, "--model", folder, "--input", tmp_path / "in.csv")
    assert code == 0 and [line.split("\t")[0] for line in out.splitlines()] == ["sea", "bee"]


def test_a_broken_first_line_and_another_delimiter(student, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text('oh\n{"said": "b"}\n')
    code, out, _ = call(capsys, "--model", student, "--input", tmp_path / "in.jsonl", "--skip_bad_lines")
    assert code == 0 and [line.split("\t")[0] for line in out.splitlines()] == ["", "bee"]
    (tmp_path / "in.csv").write_text("id;text\n1;c\n")
    more = ["--text_column", "text", "--delimiter", ";"]
    assert call(capsys, "--model", student, "--input", tmp_path / "in.csv", *more)[1].startswith("sea\t")


def test_one_column_needs_no_name_and_may_have_blank_rows(student, tmp_path, capsys):
    (tmp_path / "in.csv").write_text("whatever\na\n\nb\n")
    code, out, _ = call(capsys, "--model", student, "--input", tmp_path / "in.csv")
    assert code == 0 and [line.split("\t")[0] for line in out.splitlines()] == ["ah", "ah", "bee"]


BROKEN = {
    "too few fields": (".csv", b"id,text\n1,a\n2\n3,c\n", 3, "1 fields where the header has 2"),
    "a stray quote": (".csv", b'id,text\n1,a\n2,"b"b\n3,c\n', 3, "not CSV: ',' expected after '\"'"),
    "not UTF-8": (".csv", b"id,text\n1,a\n2,\xff\n3,c\n", 3, "not UTF-8"),
    "too many tabs": (".tsv", b"id\ttext\n1\ta\n2\tb\tb\n3\tc\n", 3, "3 fields where the header has 2"),
    "no JSON": (".jsonl", b'{"text": "a"}\n{"text": \n{"text": "c"}\n', 2, "not JSON: "),
    "no object": (".jsonl", b'{"text": "a"}\n[1]\n{"text": "c"}\n', 2, "no object"),
    "no text": (".jsonl", b'{"text": "a"}\n{"text": null}\n{"text": "c"}\n', 2, "no text in text"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_line_ends_it_or_is_skipped(case, student, tmp_path, capsys):
    ending, content, number, fault = BROKEN[case]
    source, target = tmp_path / f"in{ending}", tmp_path / "out.csv"
    source.write_bytes(content)
    command = ["--model", student, "--input", source, "--text_column", "text", "--output", target]
    code, _, err = call(capsys, *command)
    assert code == 2 and len(err.splitlines()) == 1
    assert err.startswith(f"classify.py: error: {source}, line {number}: {fault}")
    assert "--skip_bad_lines goes on past it" in err
    assert [row[:3] for row in target.read_text().splitlines()] == ["lab", "ah,"]

    code, _, err = call(capsys, *command, "--skip_bad_lines")
    assert code == 0 and f"line {number}: {fault}" in err and err.endswith("1 broken lines skipped\n")
    assert [row.split(",")[0] for row in target.read_text().splitlines()] == ["label", "ah", "", "sea"]


def test_many_broken_lines_are_counted(student, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n' + "oh\n" * 30)
    code, out, err = call(capsys, "--model", student, "--input", tmp_path / "in.jsonl", "--skip_bad_lines")
    assert code == 0 and out.count("\n") == 31
    assert len(err.splitlines()) == 11 and err.endswith("30 broken lines skipped\n")


def test_memory_does_not_grow_with_the_file(student, monkeypatch):
    """Lines are read as they are answered."""
    read = []

    def endless():
        for number in range(1, 10**9):
            read.append(number)
            yield Line(number, ("a",))

    monkeypatch.setattr(classify, "_BATCHES_AT_ONCE", 2)
    answers = classify.classified(Classifier(student), endless(), 4, lambda line: None)
    for wanted in range(1, 30):
        assert next(answers)["label"] == "ah"
        assert len(read) <= wanted + 8


ONNX = ["--model", "{w}/onnx"]
BAD = {
    "no folder": (
        ["--model", "{w}/nothing", "a"],
        "{w}/nothing/config.json: No such file or directory; give",
    ),
    "no such column": (
        [*ONNX, "--input", "{w}/a.csv", "--text_column", "texts"],
        "there is no column texts",
    ),
    "which column": (
        [*ONNX, "--input", "{w}/a.csv"],
        "{w}/a.csv: --text_column is missing; the columns are",
    ),
    "no such file": ([*ONNX, "--input", "{w}/b.csv"], "{w}/b.csv: No such file or directory"),
    "another ending": (
        [*ONNX, "--input", "{w}/a.xlsx"],
        "{w}/a.xlsx: must be one of .csv, .tsv, .jsonl",
    ),
    "a text and a file": ([*ONNX, "a", "--input", "{w}/a.csv"], "give one text, the two of a pair, or"),
    "three texts": ([*ONNX, "a", "b", "c"], "give one text, the two of a pair, or --input"),
    "no threads": ([*ONNX, "a", "--threads", "0"], "--batch_size and --threads: give 1 or more"),
    "its own output": (
        [*ONNX, "--input", "{w}/a.csv", "--output", "{w}/a.csv"],
        "{w}/a.csv: would replace the --input",
    ),
    "a delimiter for nothing": (
        [*ONNX, "a", "--delimiter", ";"],
        "--delimiter: give one character, and a .csv file as",
    ),
    "another model": ([*ONNX, "a", "--file", "none.onnx"], "{w}/onnx: cannot be loaded: "),
    "a damaged model": (["--model", "{w}/damaged", "a"], "{w}/damaged: cannot be loaded: "),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, student, tmp_path, capsys):
    (tmp_path / "onnx").symlink_to(student)
    (tmp_path / "damaged").mkdir()
    for path in student.iterdir():
        (tmp_path / "damaged" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "damaged/model.onnx").write_bytes(b"no graph")
    (tmp_path / "a.csv").write_text("text,id\na,1\n")
    words, said = BAD[case]
    code, out, err = call(capsys, *(word.format(w=tmp_path) for word in words))
    assert code == 2 and out == "" and said.format(w=tmp_path) in err.splitlines()[-1]
    assert "Traceback" not in err
    assert (tmp_path / "a.csv").read_text() == "text,id\na,1\n"


def test_an_empty_file_has_no_answers(student, tmp_path, capsys):
    for ending, content in ((".csv", "text\n"), (".jsonl", ""), (".tsv", "text\n")):
        (tmp_path / f"in{ending}").write_text(content)
        assert call(capsys, "--model", student, "--input", tmp_path / f"in{ending}") == (0, "", "")


def test_mixed_texts_and_pairs(student):
    with pytest.raises(WrongInput, match="all texts, or all pairs"):
        Classifier(student)(["a", ("a", "b")])


def bare_environment(folder: Path, *packages: str) -> dict[str, str]:
    """Variables of a process (python -S) that has what `pip install` brings of these packages, and nothing else."""
    wanted, known = list(packages), set()
    folder.mkdir()
    while wanted:
        name = canonicalize_name(wanted.pop())
        if name in known:
            continue
        known.add(name)
        found = distribution(name)
        for top in {path.parts[0] for path in found.files if path.parts[0] not in ("..", "__pycache__")}:
            if not (folder / top).exists():
                (folder / top).symlink_to(found.locate_file(top))
        needed = map(Requirement, found.requires or [])
        wanted += [one.name for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    environment = {"PYTHONPATH": str(folder), "PATH": os.environ["PATH"]}
    for missing in ("torch", "transformers", "bert_finetune"):
        done = subprocess.run([sys.executable, "-S", "-c", f"import {missing}"], env=environment, cwd=folder)
        assert done.returncode == 1, missing
    return environment


@pytest.mark.slow
def test_it_needs_neither_torch_nor_transformers(student, tmp_path):
    """With a copy of the one file."""
    environment = bare_environment(tmp_path / "site", "onnxruntime", "tokenizers")
    script = tmp_path / "classify.py"
    script.write_bytes((ROOT / "deploy/classify.py").read_bytes())
    command = [sys.executable, "-S", script, "--model", student]
    done = subprocess.run(command, env=environment, cwd=tmp_path, input=b"a\nb\n", capture_output=True)
    assert done.returncode == 0, done.stderr
    assert [line.split("\t")[0] for line in io.StringIO(done.stdout.decode())] == ["ah", "bee"]
