"""The submission's command, on made-up predictions for as many rows as the official test files have."""

import os
import random
import subprocess
import sys
import zipfile
from collections import Counter

import pytest
from conftest import ROOT, SHARED, save_bert
from glue_files import write_task

from bert_finetune.data import load_split
from bert_finetune.glue import TASKS, get_task
from bert_finetune.run_glue import main as finetune
from bert_finetune.submission import main

# The official test files: task, rows, what a prediction may be.
THREE, TWO = ["contradiction", "entailment", "neutral"], ["entailment", "not_entailment"]
OFFICIAL = {
    "CoLA.tsv": ("CoLA", 1063, ["0", "1"]),
    "SST-2.tsv": ("SST-2", 1821, ["0", "1"]),
    "MRPC.tsv": ("MRPC", 1725, ["0", "1"]),
    "STS-B.tsv": ("STS-B", 1379, ["0.000", "2.513", "5.000", "5", "1e-3"]),
    "QQP.tsv": ("QQP", 390965, ["0", "1"]),
    "MNLI-m.tsv": ("MNLI", 9796, THREE),
    "MNLI-mm.tsv": ("MNLI", 9847, THREE),
    "AX.tsv": ("MNLI", 1104, THREE),
    "QNLI.tsv": ("QNLI", 5463, TWO),
    "RTE.tsv": ("RTE", 3000, TWO),
    "WNLI.tsv": ("WNLI", 146, ["0", "1"]),
}


def lines(name):
    """A file's lines, the header first."""
    _, count, allowed = OFFICIAL[name]
    answers = random.Random(name).choices(allowed, k=count)
    return ["index\tprediction", *(f"{k}\t{answer}" for k, answer in enumerate(answers))]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in content), newline="")


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """A root with predictions of all tasks in model/<TASK>/student."""
    root = tmp_path_factory.mktemp("complete")
    for name, (task, _, _) in OFFICIAL.items():
        write(root / "model" / task / "student" / name, lines(name))
    return root


@pytest.fixture
def student(tmp_path):
    """A folder with predictions of WNLI."""
    write(tmp_path / "student" / "WNLI.tsv", lines("WNLI.tsv"))
    return tmp_path / "student"


def run(*argv):
    main([str(argument) for argument in argv])


def contents(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name).decode() for name in archive.namelist()}


@pytest.mark.slow
def test_a_complete_submission(complete, tmp_path, capsys):
    output = tmp_path / "emd.zip"
    folders = sorted((complete / "model").glob("*/student"))
    run(*folders, "--output", output)
    printed = capsys.readouterr()
    assert f"MNLI-mm.tsv: {complete}/model/MNLI/student/MNLI-mm.tsv\n" in printed.out and not printed.err
    packed = contents(output)
    assert list(packed) and set(packed) == set(OFFICIAL)
    for name, (task, _, _) in OFFICIAL.items():
        assert packed[name] == (complete / "model" / task / "student" / name).read_text()
    run("--check", output)
    assert capsys.readouterr().out == f"{output}: 11 files, as the server takes them\n"


@pytest.mark.slow
def test_the_command_and_its_default_name(tmp_path, student):
    (tmp_path / "submission.zip").write_text("an earlier one")
    command = [sys.executable, "-m", "bert_finetune.submission"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run([*command, "student"], **options)
    assert done.returncode == 0 and "WNLI.tsv: student/WNLI.tsv" in done.stdout, done
    assert set(contents(tmp_path / "submission.zip")) == set(OFFICIAL)
    done = subprocess.run([*command, "--check", "student/WNLI.tsv"], **options)
    assert done.returncode == 2
    assert done.stderr == ("submission.py: error: student/WNLI.tsv: not a readable zip (File is not a zip file)\n")


def test_neither_this_nor_the_downloader_waits_for_what_it_may_not_need():
    code = "import sys, bert_finetune.submission, download_glue_data; "
    code += "sys.exit(bool({'torch', 'transformers', 'requests', 'urllib3', 'huggingface_hub'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_tasks_left_out_are_filled_and_said_aloud(student, tmp_path, capsys):
    write(tmp_path / "other" / "AX.tsv", lines("AX.tsv"))
    output = tmp_path / "submission.zip"
    run(student, tmp_path / "other", "--output", output)
    printed = capsys.readouterr()
    for said in ("CoLA.tsv: no predictions; filled with 1", "STS-B.tsv: no predictions; filled with 2.000 and 3.000"):
        assert said in printed.out
    filled = [name for name in OFFICIAL if name not in ("WNLI.tsv", "AX.tsv")]
    assert printed.err.startswith("warning: ") and "mean nothing" in printed.err
    assert set(printed.err.removeprefix("warning: ").split(": ")[0].split(", ")) == set(filled)
    packed = contents(output)
    for name in filled:
        header, *rows = packed[name].splitlines()
        assert header == "index\tprediction" and len(rows) == OFFICIAL[name][1]
        answers = {row.split("\t")[1] for row in rows}
        assert len(answers) == (2 if name == "STS-B.tsv" else 1)  # a constant has no correlation
    assert packed["AX.tsv"].splitlines() == lines("AX.tsv")
    run("--check", output)


@pytest.mark.skipif(not (SHARED / "glue_data").exists(), reason="the official files are not here")
@pytest.mark.parametrize("name", ["CoLA", "MRPC", "QNLI", "RTE", "WNLI", "MNLI"])
def test_the_filler_is_the_most_frequent_class_of_the_official_dev_set(name):
    path = SHARED / "glue_data" / name / "dev.tsv"
    if name == "MNLI":
        path = SHARED / "glue_data" / "samples" / "MNLI" / "dev_matched.reconstructed.tsv"
    ((most, _),) = Counter(load_split(get_task(name), path, "dev")["label"]).most_common(1)
    assert TASKS[name].filler == (list(TASKS[name].kind.labels)[most],)


def bad_rows(name, changes):
    """The lines of a file with some of them (by line number, from 1) changed; None: left out."""
    changed = dict(enumerate(lines(name), start=1)) | changes
    return [line for line in changed.values() if line is not None]


# A file that is not right, and what is said of it.
BAD_FILES = {
    "header": ("WNLI.tsv", {1: "id\tlabel"}, "line 1: 'id\\tlabel' instead of the header 'index\\tprediction'"),
    "no header": ("WNLI.tsv", {1: None}, "line 1: '0\\t"),
    "a row missing": (
        "WNLI.tsv",
        {100: None},
        "145 rows instead of 146, line 100: index '99' instead of 98, line 101: index '100' instead of 99, ...",
    ),
    "a row too many": ("WNLI.tsv", {148: "146\t0"}, "147 rows instead of 146"),
    "an empty line at the end": ("WNLI.tsv", {148: ""}, "147 rows instead of 146, line 148: '' is not an index, a tab"),
    "a class name": ("WNLI.tsv", {7: "5\tentailment"}, "line 7: 'entailment' is not one of 0, 1"),
    "a number": ("RTE.tsv", {3000: "2998\t1"}, "line 3000: '1' is not one of entailment, not_entailment"),
    "another task's class": ("AX.tsv", {9: "7\tnot_entailment"}, "is not one of contradiction, entailment, neutral"),
    "an index": ("WNLI.tsv", {3: "01\t0"}, "line 3: index '01' instead of 1"),
    "fields": ("WNLI.tsv", {3: "1 0", 4: "2\t0\t0"}, "line 3: '1 0' is not an index, a tab and a prediction, line 4:"),
    "a Windows line end": ("WNLI.tsv", {3: "1\t0\r"}, "line 3: '0\\r' is not one of 0, 1"),
    "no text": ("WNLI.tsv", {3: "1\t\udcff"}, "line 3: '\ufffd' is not one of 0, 1"),
    "a score too high": ("STS-B.tsv", {5: "3\t5.001"}, "line 5: '5.001' is not a number from 0 to 5"),
    "a score too low": ("STS-B.tsv", {5: "3\t-0.1"}, "line 5: '-0.1' is not a number from 0 to 5"),
    "no score": ("STS-B.tsv", {5: "3\tnan", 6: "4\thigh"}, "line 5: 'nan' is not a number from 0 to 5, line 6: 'high'"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(case, tmp_path, exits_with_2):
    name, changes, message = BAD_FILES[case]
    text = "".join(line + "\n" for line in bad_rows(name, changes))
    (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    output = tmp_path / "submission.zip"
    output.write_text("an earlier one")
    line = exits_with_2(main, tmp_path, "--output", output)
    assert f"error: {tmp_path / name}, " in line and message in line
    assert output.read_text() == "an earlier one"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "submission.zip"])


def test_every_bad_file_is_named(complete, tmp_path, exits_with_2):
    write(tmp_path / "WNLI.tsv", lines("WNLI.tsv")[:-1])
    write(tmp_path / "QQP.tsv", bad_rows("QQP.tsv", dict.fromkeys(range(2, 1000), "x")))
    (tmp_path / "CoLA.tsv").write_text("")
    line = exits_with_2(main, tmp_path, complete / "model" / "RTE" / "student", "--output", tmp_path / "a.zip")
    assert f"{tmp_path}/CoLA.tsv, line 1: '' instead of the header 'index\\tprediction', 0 rows instead of 1063" in line
    assert (
        f"; {tmp_path}/QQP.tsv, line 2: 'x' is not" in line and "line 4: 'x' is not an index, a tab and a pred" in line
    )
    assert f"; {tmp_path}/WNLI.tsv, 145 rows instead of 146" in line
    assert "line 5: 'x'" not in line and "RTE" not in line


def test_folders(complete, student, tmp_path, exits_with_2):
    (tmp_path / "empty").mkdir()
    twin, nowhere = tmp_path / "twin", tmp_path / "model" / "*" / "student"
    write(twin / "WNLI.tsv", lines("WNLI.tsv"))
    for folders, message in (
        ([student, twin], f"WNLI.tsv is both in {student} and in {twin}; leave one of them out"),
        ([student, nowhere], f"{nowhere}: no such folder"),
        ([student / "WNLI.tsv"], f"{student / 'WNLI.tsv'}: no such folder"),
        ([student, tmp_path / "empty"], f"{tmp_path / 'empty'}: holds no predictions (CoLA.tsv, SST-2.tsv, "),
        ([], "give the folders whose predictions to pack, or --check and a zip"),
        ([student, "--check", "a.zip"], "give the folders whose predictions to pack, or --check and a zip"),
        ([student, "--out", "a.zip"], "unrecognized arguments: --out"),
        ([student, "--output", tmp_path], f"--output {tmp_path}: give the name of a zip, in a folder that is there"),
        ([student, "--output", tmp_path / "no" / "a.zip"], "a.zip: give the name of a zip, in a folder that is there"),
        ([student, "--output", student / "WNLI.tsv" / "a.zip"], "a.zip: give the name of a zip, in a folder that is"),
        ([student, "--output", ""], "--output .: give the name of a zip, in a folder that is there"),
        (["--check", tmp_path / "no.zip"], f"{tmp_path / 'no.zip'}: No such file or directory"),
        (["--check", tmp_path], f"{tmp_path}: Is a directory"),
    ):
        assert message in exits_with_2(main, *folders)
    assert not list(tmp_path.rglob("*.zip*"))


def test_a_zip_that_cannot_be_finished(student, tmp_path, exits_with_2, monkeypatch):
    output = tmp_path / "submission.zip"
    output.write_text("an earlier one")

    def full(*args):
        raise OSError(28, "No space left on device", str(output))

    monkeypatch.setattr(os, "replace", full)
    assert f"{output}: cannot be written: No space left on device" in exits_with_2(main, student, "--output", output)
    assert output.read_text() == "an earlier one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student", "submission.zip"]


def zipped(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files:
            archive.writestr(name, content)


SMALL = ("WNLI.tsv", "AX.tsv")
# What is done to the files of a good zip, and what is said of it.
BAD_ZIPS = {
    "files missing": (lambda files: files[:-2], "RTE.tsv, WNLI.tsv not at its top level"),
    "in a folder": (
        lambda files: [(f"emd/{name}" if name in SMALL else name, text) for name, text in files],
        "AX.tsv, WNLI.tsv not at its top level; 'emd/AX.tsv', 'emd/WNLI.tsv' to be removed",
    ),
    "a stranger": (lambda files: [*files, ("notes.txt", "mine")], ": 'notes.txt' to be removed"),
    "content": (
        lambda files: [(name, text.replace("\t", ",") if name in SMALL else text) for name, text in files],
        ": AX.tsv, line 1: 'index,prediction' instead of the header 'index\\tprediction', line 2: ",
    ),
    "the last row": (
        lambda files: [(name, text.replace("390964\t", "390965\t")) for name, text in files],
        ": QQP.tsv, line 390966: index '390965' instead of 390964",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", BAD_ZIPS)
def test_bad_zips(case, tmp_path, exits_with_2):
    damage, message = BAD_ZIPS[case]
    files = [(name, "".join(f"{line}\n" for line in lines(name))) for name in OFFICIAL]
    zipped(tmp_path / "a.zip", damage(files))
    assert f"error: {tmp_path / 'a.zip'}: " in (line := exits_with_2(main, "--check", tmp_path / "a.zip"))
    assert message in line
    if case == "content":
        assert "; WNLI.tsv, line 1: 'index,prediction'" in line


def test_damaged_zips(student, tmp_path, exits_with_2):
    good = tmp_path / "good.zip"
    run(student, "--output", good)
    raw = good.read_bytes()
    middle = len(raw) // 2
    for damaged in (b"", b"PK", raw[:middle], raw[:middle] + bytes(99) + raw[middle + 99 :]):
        (tmp_path / "bad.zip").write_bytes(damaged)
        assert f"{tmp_path / 'bad.zip'}: not a readable zip (" in exits_with_2(main, "--check", tmp_path / "bad.zip")
    encrypted = bytearray(raw)
    encrypted[6] |= 1  # the flag in the first file's own header ...
    encrypted[raw.index(b"PK\x01\x02") + 8] |= 1  # ... and in the directory
    (tmp_path / "bad.zip").write_bytes(encrypted)
    assert "is encrypted" in exits_with_2(main, "--check", tmp_path / "bad.zip")


def predict(model, task, data_dir, out):
    options = ["--model_name_or_path", model, "--task_name", task, "--data_dir", data_dir, "--output_dir", out]
    finetune(
        [
            str(option)
            for option in [*options, "--do_predict", "--max_seq_length", 48, "--eval_batch_size", 256, "--no_cuda"]
        ]
    )


def test_what_do_predict_writes_is_checked(tmp_path, exits_with_2):
    write_task(tmp_path / "data" / "MNLI", "MNLI")
    predict(save_bert(tmp_path / "model", THREE), "MNLI", tmp_path / "data", tmp_path / "out")
    line = exits_with_2(main, tmp_path / "out", "--output", tmp_path / "a.zip")
    for name in ("MNLI-m.tsv", "MNLI-mm.tsv", "AX.tsv"):  # of six rows each, and right but for that
        assert f"{tmp_path / 'out' / name}, 6 rows instead of {OFFICIAL[name][1]}" in line
    assert "line" not in line.removeprefix(str(tmp_path))


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "glue_data").exists(), reason="the official files are not here")
def test_official_files_end_to_end(tmp_path, capsys):
    predict(save_bert(tmp_path / "model", TWO), "WNLI", SHARED / "glue_data", tmp_path / "WNLI")
    made_up = write_task(tmp_path / "data" / "MNLI", "MNLI")
    (tmp_path / "data/diagnostic/diagnostic.tsv").unlink()
    (tmp_path / "data/diagnostic/diagnostic.tsv").symlink_to(SHARED / "glue_data/diagnostic/diagnostic.tsv")
    predict(save_bert(tmp_path / "mnli", THREE), "MNLI", made_up, tmp_path / "MNLI")
    for name in ("MNLI-m.tsv", "MNLI-mm.tsv"):
        (tmp_path / "MNLI" / name).unlink()
    run(tmp_path / "WNLI", tmp_path / "MNLI", "--output", tmp_path / "a.zip")
    assert f"AX.tsv: {tmp_path}/MNLI/AX.tsv\n" in capsys.readouterr().out
    run("--check", tmp_path / "a.zip")
