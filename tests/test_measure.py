"""What models cost, measured side by side in all forms that they are there in."""

import csv
import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import warm
from test_export_student import RTE, save
from transformers import BertConfig, BertForSequenceClassification

from bert_finetune import footprint
from deploy import graph, measure
from deploy.formats import QUANTIZATIONS
from deploy.measure import FORMS, Candidate, compared, find_candidates, main, measure_latencies, read_options

# On one worker, which makes its models once.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("warm")]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A teacher, and a student with an export."""
    folder = tmp_path_factory.mktemp("models")
    save(folder / "teacher", "ELECTRA")
    student = BertForSequenceClassification.from_pretrained(save(folder / "student")).eval()
    names = ["input_ids", "attention_mask", "token_type_ids"]
    (folder / "student/onnx").mkdir()
    graph.write_onnx(student, names, folder / "student/onnx/model.onnx")
    graph.quantize(folder / "student/onnx/model.onnx", folder / "student/onnx/model_quantized.onnx", QUANTIZATIONS[0])
    (folder / "student/openvino").mkdir()
    graph.write_openvino(folder / "student/onnx/model.onnx", folder / "student/openvino/openvino_model.xml")
    return folder


@pytest.fixture
def forked(tmp_path, monkeypatch):
    """Programs do not wait for imports."""

    def run(command, **_):
        (tmp_path / "program.py").write_text(command[2])
        process = warm.start(tmp_path / "program.py", *command[3:])
        out, err = process.communicate(timeout=300)
        return SimpleNamespace(returncode=process.returncode, stdout=out, stderr=err)

    monkeypatch.setattr(measure.subprocess, "run", run)


@pytest.mark.draws
def test_all_tables(models, tmp_path, monkeypatch, capsys, forked):
    monkeypatch.setattr(footprint, "time_in_turns", partial(footprint.time_in_turns, seconds=0))
    folders = [str(models / "teacher"), str(models / "student")]
    threads = torch.get_num_threads()
    main([*folders, "--batches", "1,3", "--lengths", "4,9", "--threads", "1", "--output_dir", str(tmp_path / "costs")])
    torch.set_num_threads(threads)
    costs = json.loads((tmp_path / "costs/costs.json").read_text())
    assert costs["threads"] == 1
    teacher, student = costs["models"]
    assert (teacher["model"], student["model"]) == ("teacher", "student") and student["layers"] == 2
    forms = [(row["model"], row["form"]) for row in costs["forms"]]
    in_torch = ["PyTorch float32", "PyTorch bfloat16"]
    assert forms == [("teacher", form) for form in in_torch] + [
        ("student", form) for form in [*in_torch, "ONNX float32", "ONNX int8", "OpenVINO float32"]
    ]
    assert all(row["load_seconds"] > 0 and row["peak_megabytes"] > 20 for row in costs["forms"])
    sizes = {row["form"]: row["megabytes"] for row in costs["forms"] if row["model"] == "student"}
    assert sizes["ONNX int8"] < sizes["ONNX float32"]
    assert sizes["OpenVINO float32"] > 4 * (student["parameters"] + student["embeddings"]) / 1e6
    found = costs["latencies"]
    assert len(found) == 4 * 7 and all(row["rounds"] == 5 and row["p95_ms"] >= row["median_ms"] > 0 for row in found)
    assert [row["speed_up"] for row in found if (row["model"], row["form"]) == forms[0]] == [1] * 4
    with open(tmp_path / "costs/costs.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 28
    text = (tmp_path / "costs/costs.md").read_text()
    assert text in capsys.readouterr().out and text.count("| student | ONNX int8 |") == 1 + 4
    (student,) = (line for line in text.splitlines() if line.startswith("| student | 2 x 24 |"))
    told = next(row for row in found if (row["model"], row["form"], row["batch"], row["length"]) == (*forms[2], 3, 9))
    assert student.endswith(f"| {told['speed_up']:.1f} x |")
    assert "teacher, PyTorch float32" in (tmp_path / "costs/costs.svg").read_text()


def test_parameters_and_operations_by_hand(models):
    config = BertConfig.from_pretrained(models / "student")
    told = measure.describe("student", models / "student", [5])
    width, inner, words, length = 24, 48, config.vocab_size, 5
    assert told["embeddings"] == width * (words + config.max_position_embeddings + config.type_vocab_size)
    layer = 4 * width * (width + 1) + inner * (width + 1) + width * (inner + 1) + 4 * width
    head = width * (width + 1) + len(RTE) * (width + 1)
    assert told["parameters"] == 2 * layer + head + 2 * width
    products = length * (4 * width**2 + 2 * width * inner) + 2 * length**2 * width
    assert told["flops"][5] == 2 * (2 * products + width**2 + len(RTE) * width)


def test_models_take_turns(models, monkeypatch):
    """One round of all after the other, from a warm-up on; figures are of the rounds alone."""
    called, clock = [], iter(range(10**6))
    candidates = [Candidate(name, models, FORMS[0]) for name in ("one", "two")]
    monkeypatch.setattr(
        measure, "_runner", lambda candidate: lambda *shape: lambda: called.append((candidate.model, *shape))
    )
    monkeypatch.setattr(footprint.time, "perf_counter", lambda: next(clock))
    rows = measure_latencies(candidates, [(2, 7)])
    # Each is timed the second time.
    assert called == [("one", 2, 7), ("one", 2, 7), ("two", 2, 7), ("two", 2, 7)] * (2 + 5)
    assert [(row["median_ms"], row["p95_ms"], row["rounds"]) for row in rows] == [(1000, 1000, 5)] * 2
    assert [row["sentences_a_second"] for row in compared(rows)] == [2, 2]


BAD = {
    "no model": (["{w}"], "{w}: holds no model (config.json, model.safetensors)"),
    "no numbers": (["{w}/student", "--batches", "1,x"], "--batches 1,x: give whole numbers from 1 on"),
    "no sentence": (["{w}/student", "--batches", "0"], "--batches 0: give whole numbers from 1 on"),
    "too long": (["{w}/student", "--lengths", "8,400"], "--lengths 400: {w}/student has only 66 positions"),
    "no threads": (["{w}/student", "--threads", "0"], "--threads 0: give 1 or more"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, models, tmp_path, exits_with_2):
    words, said = BAD[case]
    line = exits_with_2(main, *(word.format(w=models) for word in words), "--output_dir", tmp_path / "costs")
    assert said.format(w=models) in line and not (tmp_path / "costs").exists()


def test_folders_of_one_name(models, tmp_path):
    (tmp_path / "student").symlink_to(models / "student")
    (tmp_path / "alias").mkdir()
    for path in (models / "student").iterdir():
        (tmp_path / "alias" / path.name).symlink_to(path)
    (tmp_path / "other").mkdir()
    (tmp_path / "alias").rename(tmp_path / "other/student")
    folders = [models / "student", tmp_path / "other/student"]
    assert read_options(list(map(str, folders))).output_dir == tmp_path / "other/student/costs"
    assert list(dict.fromkeys(found.model for found in find_candidates(folders, 8))) == list(map(str, folders))
