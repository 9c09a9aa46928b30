"""The looped way computes what the authors' code computes, and what ours does; the benchmark runs."""

import functools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_classify import save_student, tokenizer  # noqa: F401 (a fixture)

from bert_emd import layer_distance
from bert_emd.layer_outputs import LayerOutputs
from bert_emd.layer_transport import LayerTransport
from bert_emd.objectives import PARTS, Objective, PublishedCosts
from bert_finetune.task_kinds import Regression

sys.path.insert(0, str(ROOT / "benchmarks"))
import augmentation
import bench
import load
import looped

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("shape", ["M2N3", "M4N12"])
def test_looped_losses_and_weights_are_the_authors(shape):
    values = np.load(GOLDEN / f"transport_2022_{shape}_shared_tau1_plain.npz")
    m, n = map(int, shape.removeprefix("M").split("N"))
    transport = looped.LoopedTransport(m, n)
    for step in range(4):

        def get(name, step=step):
            return torch.tensor(values[f"step{step}/{name}"])

        scores, hidden = get("student_scores").requires_grad_(), get("student_hidden").requires_grad_()
        losses = transport(tuple(scores), tuple(get("teacher_scores")), tuple(hidden), tuple(get("teacher_hidden")))
        sum(losses).backward()
        for name, loss in zip(("attention", "hidden", "embedding"), losses, strict=True):
            assert loss.item() == pytest.approx(get(f"{name}_loss").item(), rel=1e-5)
        for ours, theirs in ((scores, get("grad_student_scores")), (hidden, get("grad_student_hidden"))):
            torch.testing.assert_close(ours.grad, theirs, rtol=1e-4, atol=2e-5 * float(theirs.abs().max()))
        for ours, side in zip(transport.weights["hidden"], ("student", "teacher"), strict=True):
            np.testing.assert_allclose(ours, get(f"after/rep_{side}_weight"), atol=1e-5)


def test_looped_and_ours_are_the_same_loss():
    torch.manual_seed(0)
    student, teacher = ((torch.randn(layers + 1, 3, 5, 8), torch.randn(layers, 3, 2, 5, 5)) for layers in (2, 3))
    student[0].requires_grad_()
    transport = looped.LoopedTransport(2, 3)
    mapping = LayerTransport(2, 3)
    costs = PublishedCosts(max_seq_length=5, count_padding=True)
    objective = Objective(Regression(), costs, 1.0, looks_at=PARTS - {"logits"})
    for _ in range(3):
        theirs = sum(transport(student[1], teacher[1], student[0], teacher[0]))
        (their_grad,) = torch.autograd.grad(theirs, student[0])
        sides = [LayerOutputs(None, tuple(hidden), tuple(scores)) for hidden, scores in (student, teacher)]
        ours, _, _ = objective(mapping, *sides, torch.ones(3, 5, dtype=torch.long), None)
        (our_grad,) = torch.autograd.grad(ours, student[0])
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(our_grad, their_grad)


@pytest.fixture
def small(monkeypatch):
    """The benchmark at a size that takes seconds."""
    shape = {"hidden_size": 24, "num_attention_heads": 12, "intermediate_size": 24}
    sizes = {
        "BATCH": 4,
        "LENGTH": 16,
        "VOCABULARY": 2000,
        "LENGTHS": (8, 16),
        "BATCHES": (4,),
        "READ": 1000,
        "PRODUCT": 32,
    }
    models = {"TEACHER": bench.TEACHER | shape | {"num_hidden_layers": 2}, "STUDENTS": {4: bench.STUDENTS[4] | shape}}
    for name, value in (sizes | models).items():
        monkeypatch.setattr(bench, name, value)
    measure = bench.Machine.seconds
    monkeypatch.setattr(bench.Machine, "seconds", lambda self, works, repeats=1: measure(self, works, 1))
    # Kernels are traced, and not compiled: that takes minutes, and tests of their own.
    monkeypatch.setattr(layer_distance, "_kernel", functools.cache(layer_distance._kernel.__wrapped__))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


@pytest.mark.slow
def test_the_benchmark_runs(small, tmp_path, glue_dir, pretrained, capsys):
    bench.main(["--output_dir", str(tmp_path), "--glue_dir", str(glue_dir), "--tokenizer", str(pretrained)])
    text = (tmp_path / "RESULTS.md").read_text()
    for table in bench.TABLES.values():
        assert f"## {table.__doc__.splitlines()[0]}" in text
    assert "| losses, 12 x 4: ratio, compiled | 6 |" in text
    assert "| RTE | 6 |" in text and "| 12 x 4 |" in text and "Command: `python " in text
    assert "ratio" in capsys.readouterr().out


@pytest.mark.slow
def test_load_of_a_server(tmp_path, tokenizer, exits_with_2):  # noqa: F811
    student = save_student(tmp_path / "student/onnx", tokenizer, ["ah", "bee"])
    (tmp_path / "lines.txt").write_text("a b\nb\n\na\n")
    (tmp_path / "none.txt").write_text("\n")
    command = ["--model", str(student), "--output_dir", str(tmp_path / "out"), "--texts"]
    load.main([*command, str(tmp_path / "lines.txt"), "--clients", "3", "--requests", "40", "--rounds", "2"])
    found = json.loads((tmp_path / "out/load.json").read_text())
    assert list(found["servers"]) == ["one at a time", "batches"]
    assert all(row["requests_a_second"] > 0 and row["p99_ms"] >= row["median_ms"] for row in found["servers"].values())
    stop = found["stop"]
    assert stop["lost"] == 0 and stop["answers_received"] == stop["answers_sent"] > 3 * 40
    assert "| one at a time |" in (tmp_path / "out/load.md").read_text()
    assert "must be 1 or more" in exits_with_2(load.main, *command, tmp_path / "none.txt")
    line = exits_with_2(load.main, "--model", tmp_path, "--texts", tmp_path / "lines.txt", "--output_dir", tmp_path)
    assert "give the folder that deploy/export_student.py has written" in line


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
def test_speed_of_augmentation(bf16, tmp_path, pretrained, exits_with_2, monkeypatch):
    shape = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 24}
    monkeypatch.setattr(augmentation, "SHAPES", {"1 x 24": shape})
    monkeypatch.setattr(augmentation, "has_bf16", lambda use_cpu: bf16)
    (tmp_path / "sentences.txt").write_text(
        "".join(f"{k}\t1.5\tA good film {k} and the dull song .\n" for k in range(9))
    )
    monkeypatch.setattr(augmentation.quickstart, "fetch_text", lambda: None)
    monkeypatch.setattr(augmentation.quickstart, "SENTENCES", tmp_path / "sentences.txt")
    command = ["--tokenizer", str(pretrained), "--output_dir", str(tmp_path), "--rounds", "2", "--few", "2"]
    augmentation.main([*command, "--sentences", "8"])
    found = json.loads((tmp_path / "augmentation.json").read_text())
    row = found["models"]["1 x 24"]
    ways = ["a pass a word, float32", *(["a pass a word, bfloat16"] if bf16 else [])]
    assert list(row) == [*ways, "ours", *(f"times as fast as {way}" for way in ways)]
    assert all(row[way] > 0 for way in ways) and all(row[f"times as fast as {way}"] > 1 for way in ways)
    figures = " | ".join(f"{value:.3g}" for value in row.values())
    assert f"\n| 1 x 24 | {figures} |\n" in (tmp_path / "augmentation.md").read_text()
    assert "no more than --sentences" in exits_with_2(augmentation.main, *command, "--sentences", "1")
