"""How a student agrees with its teacher: on the dev set at every evaluation, on a held-out file at the end."""

import json

import numpy as np
import pytest
import torch
from conftest import save_bert
from test_emd_task_distill import command
from test_tables import write
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from bert_emd.emd_task_distill import main
from bert_finetune.glue import TASKS, get_task
from bert_finetune.task_kinds import Regression
from experiments.plan import read_plan

PAIR = ["sentence1", "sentence2"]
TEXTS = [("the cat runs", "the dog sings"), ("a good film", "a dull book"), ("the dog", "the cat runs a good film")]


def run(*argv):
    main([str(argument) for argument in argv])


def results(out):
    return json.loads((out / "eval_results.json").read_text())


def softmax(logits):
    powers = np.exp(logits)
    return powers / powers.sum(axis=1, keepdims=True)


def by_hand(task, ours, theirs):
    """Agreement and divergence by their definitions."""
    if isinstance(task.kind, Regression):
        return np.corrcoef(ours[:, 0], theirs[:, 0])[0, 1], ((ours - theirs) ** 2).mean()
    p, q = softmax(theirs), softmax(ours)
    return (ours.argmax(1) == theirs.argmax(1)).mean(), (p * np.log(p / q)).sum(axis=1).mean()


@pytest.mark.parametrize("task", ["MNLI", "STS-B"])
def test_values(task):
    task, rng = get_task(task), np.random.default_rng(0)
    ours, theirs = rng.normal(size=(2, 50, task.kind.outputs))
    found = task.kind.agreement(ours, theirs)
    assert (found["agreement"], found["divergence"]) == pytest.approx(by_hand(task, ours, theirs))
    assert task.kind.agreement(theirs, theirs) == pytest.approx({"agreement": 1, "divergence": 0})


def test_kl_of_classes_does_not_depend_on_a_constant_or_overflow():
    kind, theirs = get_task("RTE").kind, np.array([[1000.0, 998.0], [0.0, 0.0]])
    assert kind.divergences(theirs + 7, theirs) == pytest.approx([0, 0])
    assert np.isfinite(kind.divergences(np.array([[-1000.0, 1000.0]] * 2), theirs)).all()


@pytest.mark.training
@pytest.mark.parametrize("task", ["CoLA", "MNLI", "STS-B"])
def test_every_evaluation_has_it(task, glue_dir, tmp_path, capsys):
    teacher = save_bert(tmp_path / "teacher", TASKS[task].kind.output_names, initializer_range=0.5)
    out, task = tmp_path / "out", TASKS[task]
    run(*command(teacher, glue_dir, out, task=task.name))
    printed, found = capsys.readouterr().out, results(out)
    steps = [line for line in printed.splitlines() if line.startswith("step ")]
    assert len(steps) == len(found["history"]) == 2
    arrays = np.load(out / "dev_predictions.npz")
    for split, prefix in task.dev_prefixes.items():
        place = f"{split}/" if len(task.dev) > 1 else ""
        expected = by_hand(task, *(arrays[place + name].astype(float) for name in ("logits", "teacher_logits")))
        assert (found[f"{prefix}_agreement"], found[f"{prefix}_divergence"]) == pytest.approx(expected, abs=1e-6)
        for entry, line in zip(found["history"], steps, strict=True):
            assert f"{prefix.removeprefix('eval_')}_agreement"[-9:] in line
            assert np.isfinite([entry[f"{prefix}_agreement"], entry[f"{prefix}_divergence"]]).all()
    text = (out / "eval_results.txt").read_text()
    assert f"{next(iter(task.dev_prefixes.values()))}_agreement = " in text
    assert "agreement |" in (out / "README.md").read_text()


@torch.no_grad()
def logits_of(folder):
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    return np.concatenate([model(**tokenizer(*text, return_tensors="pt")).logits.numpy() for text in TEXTS])


@pytest.mark.training
@pytest.mark.parametrize("ending", ["csv", "jsonl", "tsv"])
@pytest.mark.parametrize("labels", [None, ["entailment", "not_entailment", "entailment"]], ids=["bare", "labelled"])
def test_a_file_of_its_own(ending, labels, teacher, glue_dir, tmp_path, capsys):
    columns, rows = PAIR + ["label"] * bool(labels), TEXTS
    if labels:
        rows = [(*text, label) for text, label in zip(TEXTS, labels, strict=True)]
    path = tmp_path / f"held-out.{ending}"
    if ending == "tsv":
        path.write_text("".join("\t".join(row) + "\n" for row in [columns, *rows]))
    else:
        write(path, columns, rows)
    out = tmp_path / "out"
    run(*command(teacher, glue_dir, out, "--agreement_file", path, "--max_steps", 2))
    found, arrays, task = results(out), np.load(out / "test_predictions.npz"), get_task("RTE")
    ours = logits_of(out)
    np.testing.assert_allclose(arrays["logits"], ours, atol=1e-5)
    np.testing.assert_allclose(arrays["teacher_logits"], logits_of(teacher), atol=1e-5)
    expected = by_hand(task, ours, logits_of(teacher))
    assert (found["test_agreement"], found["test_divergence"]) == pytest.approx(expected, abs=1e-5)
    assert ("test_accuracy" in found) == ("teacher_test_accuracy" in found) == ("labels" in arrays) == bool(labels)
    if labels:
        right = np.array([name == "not_entailment" for name in labels]) == ours.argmax(axis=1)
        assert found["test_accuracy"] == pytest.approx(right.mean())
    assert "test: " in capsys.readouterr().out.splitlines()[-1]
    # The same of the finished student, with nothing written.
    more = ["--teacher_model", teacher, "--agreement_file", path, "--task_name", "RTE", "--data_dir", glue_dir]
    run("--do_eval", "--output_dir", out, *more, "--no_cuda")
    shown = f"agreement {found['test_agreement']:.4f} divergence {found['test_divergence']:.4f}"
    (last,) = [line for line in capsys.readouterr().out.splitlines()[-1:] if line.startswith("dev: ")]
    assert f"agreement {found['eval_agreement']:.4f}" in last and shown in last.partition("test: ")[2]


@pytest.mark.training
@pytest.mark.parametrize(("metric", "best"), [("agreement", max), ("divergence", min)])
def test_the_best_checkpoint_by_it(metric, best, glue_dir, tmp_path):
    teacher = save_bert(tmp_path / "teacher", get_task("RTE").kind.output_names, initializer_range=0.5)
    out, more = tmp_path / "out", ("--eval_steps", 1, "--max_steps", 4, "--learning_rate", 1e-2)
    run(*command(teacher, glue_dir, out, "--metric_for_best_model", metric, *more))
    found = results(out)
    values = {entry["step"]: entry[f"eval_{metric}"] for entry in found["history"]}
    assert len(set(values.values())) > 1
    assert values[found["global_step"]] == best(values.values()) == pytest.approx(found[f"eval_{metric}"])


def test_a_plan_may_name_one(tmp_path):
    plan = tmp_path / "plan.toml"
    plan.write_text(
        'tasks = ["RTE", "CoLA"]\nseeds = [1]\nbaseline = "emd"\n[teacher]\nfolder = "teacher"\n[student]\n'
        'student_layers = 2\n[student.RTE]\nagreement_file = "splits/test/RTE/dev.tsv"\n[methods.emd]\n'
    )
    of_rte, of_cola = read_plan(plan).runs(tmp_path)
    assert "--agreement_file splits/test/RTE/dev.tsv" in of_rte.shown and "--agreement_file" not in of_cola.shown


def test_bad_files(teacher, glue_dir, tmp_path, exits_with_2):
    other = write(tmp_path / "other.csv", ["review", "label"], [("a good film", "entailment")])
    wrong = write(tmp_path / "wrong.csv", [*PAIR, "label"], [("a good film", "a film", "maybe")])
    for path, said in (
        (other, "other.csv: no column 'sentence1'; its columns are review, label"),
        (wrong, "wrong.csv, line 2: label 'maybe' is not one of RTE's"),
        (tmp_path / "none.csv", "none.csv: no such file"),
    ):
        line = exits_with_2(main, *command(teacher, glue_dir, tmp_path / "out", "--agreement_file", path))
        assert said in line and not (tmp_path / "out").exists()
    where = ["--task_name", "RTE", "--data_dir", glue_dir, "--student_model", teacher, "--agreement_file", wrong]
    line = exits_with_2(main, "--do_eval", *where, "--output_dir", tmp_path / "out", "--max_seq_length", 32)
    assert "--agreement_file: whom is the student to agree with? Give --teacher_model" in line
