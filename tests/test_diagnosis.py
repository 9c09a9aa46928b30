"""What each term of the loss has to say, measured at a few steps of a run that it does not disturb."""

import json
import textwrap

import pytest
import torch
import warm
from conftest import ROOT
from safetensors.torch import load_file
from test_emd_task_distill import command
from test_pictures import events_in
from torch import nn

from bert_emd import trainer as trainers
from bert_emd.diagnosis import format_shares, imbalance, mean_shares, measure_shares, measured_steps
from bert_emd.emd_task_distill import main

TERMS = ["attention", "hidden", "embedding", "soft", "hard"]
KEYS = {f"{of}_share_{term}" for of in ("loss", "grad") for term in TERMS}


def run(*argv):
    main([str(argument) for argument in argv])


def results(out):
    return json.loads((out / "eval_results.json").read_text())


def shares_of(found):
    return {key: value for key, value in found.items() if "_share_" in key}


def logged_shares(log_folder):
    """Name -> step -> value."""
    found = {}
    for event in events_in(log_folder):
        for value in event.summary.value:
            if "_share_" in value.tag and value.tag.startswith("train/"):
                found.setdefault(value.tag.removeprefix("train/"), {})[event.step] = value.simple_value
    return found


@pytest.mark.parametrize(
    ("steps", "expected"),
    [(0, set()), (1, {1}), (20, {10}), (50, {25}), (100, {25, 75}), (1000, {100, 300, 500, 700, 900})],
)
def test_steps_are_spread_over_the_training(steps, expected):
    assert measured_steps(steps) == expected


def test_shares_by_hand():
    x, y, unused = nn.Parameter(torch.tensor([3.0, 4.0])), nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.ones(1))
    terms = {"soft": 2 * x.sum() + 0 * y, "hidden": 0.5 * y**2 + y}
    (x.sum() * 7).backward()
    before = x.grad.clone()
    # Losses 14 and 4; gradients (2, 2, 0) and (0, 0, 3).
    norm = 8**0.5
    expected = {"loss_share_soft": 14 / 18, "loss_share_hidden": 4 / 18}
    expected |= {"grad_share_soft": norm / (norm + 3), "grad_share_hidden": 3 / (norm + 3)}
    for scale in (1.0, 1024.0):
        assert measure_shares(terms, [x, y, unused], scale) == pytest.approx(expected)
    assert torch.equal(x.grad, before) and y.grad is None and unused.grad is None
    sum(terms.values()).backward()  # the graph is still there
    assert measure_shares({"soft": 0 * x.sum(), "hard": 0 * y}, [x, y]) == {}
    assert measure_shares({"soft": torch.inf * x.sum(), "hard": y * 1}, [x, y]) == {}


@pytest.mark.parametrize(
    ("hidden", "said"),
    [
        (0.019, "1.9% of the gradient: they do nothing here; raise --beta (now 0.1)"),
        *((share, "") for share in (0.02, 0.5, 0.98)),
        (0.985, "98.5% of the gradient: they do all here; lower --beta (now 0.1)"),
    ],
)
def test_what_is_warned_of(hidden, said):
    shares = {"grad_share_hidden": hidden, "grad_share_soft": 1 - hidden, "loss_share_hidden": 0.5}
    assert (imbalance(shares, 0.1) or "").endswith(said) and bool(imbalance(shares, 0.1)) == bool(said)
    assert imbalance({"grad_share_hidden": 0.001, "grad_share_attention": 0.999}, 1) is None
    assert imbalance({"grad_share_hard": 0.001, "grad_share_soft": 0.999}, 1) is None


def test_means_of_the_log():
    log = [{"loss": 1.0}, {"grad_share_soft": 0.2, "step": 4}, {"eval_loss": 2}, {"grad_share_soft": 0.4, "step": 9}]
    assert mean_shares(log) == pytest.approx({"grad_share_soft": 0.3}) and mean_shares(log[:1]) == {}
    assert format_shares({"loss_share_soft": 0.5, "grad_share_soft": 0.25}) == "soft 25.0% (50.0%)"


@pytest.mark.training
def test_a_run_says_it_and_warns_once(teacher, glue_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("bert_emd.diagnosis._EVERY", 2)
    out = tmp_path / "out"
    more = ["--max_steps", 6, "--alpha", 0.5, "--beta", 1e-6, "--eval_steps", 3]
    run(*command(teacher, glue_dir, out, *more))
    found, (said, warned) = shares_of(results(out)), capsys.readouterr()
    assert found.keys() == KEYS
    for of in ("loss", "grad"):
        assert sum(found[f"{of}_share_{term}"] for term in TERMS) == pytest.approx(1)
    assert found["grad_share_hard"] > 0.4 and found["grad_share_hidden"] < 0.02
    lines = [line for line in warned.splitlines() if "they do nothing here" in line]
    assert len(lines) == 1 and "warning: step 1: the layer losses are 0.0% of the gradient" in lines[0]
    assert f"share of the gradient (of the loss): {format_shares(found)}" in said
    logged = logged_shares(out / "runs")
    assert logged.keys() == KEYS
    assert all(sorted(values) == [0, 2, 4] for values in logged.values())  # so many steps had been made
    assert sum(logged["grad_share_soft"].values()) / 3 == pytest.approx(found["grad_share_soft"], rel=1e-5)


@pytest.mark.training
@pytest.mark.parametrize(
    "more", [[], ["--bf16", "True"], ["--gradient_accumulation_steps", 2], ["--head", "relu", "--alpha", 0.3]]
)
def test_nothing_else_changes(more, teacher, small_student, glue_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("bert_emd.diagnosis._EVERY", 1)
    more = ["--max_steps", 3, "--logging_steps", 1, *more]
    run(*command(teacher, glue_dir, tmp_path / "with", *more, student=("--student_model", small_student)))
    monkeypatch.setattr(trainers, "measured_steps", lambda steps: set())
    run(*command(teacher, glue_dir, tmp_path / "without", *more, student=("--student_model", small_student)))
    ours, theirs = (results(tmp_path / name) for name in ("with", "without"))
    assert shares_of(ours) and not shares_of(theirs)
    assert [{**entry} for entry in ours["history"]] == theirs["history"]
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("with", "without"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.training
def test_a_resumed_run_says_the_same(teacher, glue_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("bert_emd.diagnosis._EVERY", 1)
    more = ["--max_steps", 4, "--eval_steps", 2, "--save_total_limit", 9]
    run(*command(teacher, glue_dir, tmp_path / "whole", *more))
    run(*command(teacher, glue_dir, tmp_path / "again", *more))
    resumed = ["--resume_from_checkpoint", tmp_path / "again/checkpoint-2"]
    run(*command(teacher, glue_dir, tmp_path / "again", *more, *resumed))
    ours, whole = (list(shares_of(results(tmp_path / name)).items()) for name in ("again", "whole"))
    assert ours == whole


@pytest.mark.training
@pytest.mark.parametrize("more", [["--layer_mapping", "none", "--alpha", 1], ["--layer_mapping", "none", "--alpha", 0]])
def test_a_lone_term_has_no_share(more, teacher, glue_dir, tmp_path, capsys):
    run(*command(teacher, glue_dir, tmp_path / "out", "--max_steps", 2, *more))
    assert not shares_of(results(tmp_path / "out")) and "gradient" not in capsys.readouterr().out


@pytest.mark.training
@pytest.mark.xdist_group("warm")
def test_two_processes(teacher, small_student, glue_dir, tmp_path):
    argv = command(teacher, glue_dir, tmp_path / "out", "--max_steps", 2, student=("--student_model", small_student))
    pair = warm.start_pair(ROOT / "bert_emd/emd_task_distill.py", *argv, "--ddp_backend", "gloo", "--alpha", 0.5)
    for process in pair:
        error = process.communicate(timeout=300)[1]
        assert process.returncode == 0, error[-3000:]
    found = shares_of(results(tmp_path / "out"))
    assert found.keys() == KEYS and sum(found.values()) == pytest.approx(2)


@pytest.mark.slow
@pytest.mark.xdist_group("warm")
def test_compiled_models_may_go_backward_twice(tmp_path):
    """In a process of its own, as what is set counts for all that is compiled there."""
    script = """
        import torch
        from transformers import BertConfig, BertModel
        from bert_emd.trainer import allow_several_backward_passes
        allow_several_backward_passes()
        sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
        model = BertModel(BertConfig(vocab_size=9, num_hidden_layers=1, **sizes)).eval()
        model.compile(dynamic=True, backend="aot_eager")
        loss, weights = model(torch.ones(2, 5, dtype=int)).last_hidden_state.norm(), [*model.encoder.parameters()]
        first = torch.autograd.grad(loss, weights, retain_graph=True)
        assert all(map(torch.equal, first, torch.autograd.grad(loss, weights)))
    """
    (tmp_path / "twice.py").write_text(textwrap.dedent(script))
    process = warm.start(tmp_path / "twice.py")
    assert process.wait(timeout=300) == 0, process.communicate()[1]
