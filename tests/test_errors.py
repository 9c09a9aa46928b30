"""What the user did wrong is one line; what is wrong in this project keeps its traceback."""

import os
import zipfile

import numpy as np
import pytest
from safetensors import SafetensorError

from bert_finetune.errors import InputError, reading, reports_input_errors, writing
from bert_finetune.files import read_json, replacing_file


def fails(error: BaseException):
    @reports_input_errors
    def main():
        try:
            raise ValueError("the cause")
        except ValueError as cause:
            raise error from cause

    return main


def shown(main, capsys) -> tuple[int, str]:
    with pytest.raises(SystemExit) as exit_info:
        main()
    return exit_info.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("data.csv, line 3: no label"), 2, "error: data.csv, line 3: no label"),
        (PermissionError(13, "Permission denied", "out/model"), 2, "error: out/model: Permission denied"),
        (KeyboardInterrupt("the same command goes on"), 130, "interrupted; the same command goes on"),
    ],
    ids=["an input error", "a file", "Ctrl-C"],
)
def test_what_comes_from_outside_is_one_line(error, code, line, capsys):
    found, text = shown(fails(error), capsys)
    assert found == code and text.endswith(f": {line}\n") and text.count("\n") == 1


@pytest.mark.parametrize("setting", ["1", "yes"])
def test_debugging_shows_the_traceback_and_its_cause(setting, monkeypatch, capsys):
    monkeypatch.setenv("BERT_EMD_DEBUG", setting)
    code, text = shown(fails(InputError("no label")), capsys)
    assert code == 2 and text.splitlines()[-1].endswith("error: no label")
    assert "ValueError: the cause" in text and text.count("Traceback") == 2


@pytest.mark.parametrize("setting", ["", "0"])
def test_debugging_can_be_off(setting, monkeypatch, capsys):
    monkeypatch.setenv("BERT_EMD_DEBUG", setting)
    assert shown(fails(InputError("no label")), capsys)[1].count("\n") == 1


@pytest.mark.parametrize("bug", [AttributeError("x"), TypeError("x"), IndexError("x"), AssertionError("x")], ids=repr)
def test_a_mistake_of_ours_is_never_renamed(bug, tmp_path):
    """Neither around what is read, nor around what is written, nor by a script's last word."""
    for around in (reading("model"), writing(tmp_path / "file"), replacing_file(tmp_path / "file")):
        with pytest.raises(type(bug)) as raised, around:
            raise bug
        assert raised.value is bug
    with pytest.raises(type(bug)):
        fails(bug)()
    with pytest.raises(OSError, match="no file is named"):
        fails(OSError("no file is named"))()


@pytest.mark.parametrize(
    "damage",
    [
        OSError(5, "Input/output error", "model/x"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
        zipfile.BadZipFile("File is not a zip file"),
        SafetensorError("header too large"),
        EOFError("Ran out of input"),
        RuntimeError("PytorchStreamReader failed reading zip archive"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_damage_names_what_was_read_and_keeps_its_cause(damage):
    with pytest.raises(InputError, match=r"^model: cannot be loaded: ") as raised, reading("model"):
        raise damage
    assert raised.value.__cause__ is damage


@pytest.mark.parametrize(
    "failure",
    [
        OSError(28, "No space left on device"),
        SafetensorError("I/O error: No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos"),
        Exception("No space left on device"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_failure_to_write_names_the_file_once(failure, tmp_path):
    with (
        pytest.raises(OSError, match="cannot be written: ") as raised,
        writing(tmp_path / "folder"),
        writing(tmp_path / "folder" / "file"),
    ):
        raise failure
    assert raised.value.filename == os.fspath(tmp_path / "folder" / "file")
    assert raised.value.strerror.count("cannot be written") == 1 and raised.value.__cause__ is failure


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "numbers.npz"
    np.savez(path, x=1)
    before = path.read_bytes()
    with pytest.raises(ZeroDivisionError), replacing_file(path) as aside:
        aside.write_bytes(b"half")
        raise ZeroDivisionError
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_json_that_is_no_object(tmp_path):
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(InputError, match="holds no object with names"):
        read_json(tmp_path / "list.json")
