"""Training rows without labels, in the training file and in files of their own: only the teacher teaches them."""

import csv
import gzip
import json

import numpy as np
import pytest
import torch
from conftest import save_bert
from glue_files import rows
from test_custom_task import MOODS, examples, moody_teacher, quick, run  # noqa: F401 (a fixture)
from test_tables import write

from bert_emd.emd_task_distill import main as distil
from bert_finetune.run_glue import main as finetune
from bert_finetune.task_kinds import Classification, Regression


def table(path, pairs, label="mood"):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("review", label)[: len(pairs[0])], *pairs])
    return path


@pytest.fixture
def files(tmp_path):
    """A training file of 16 rows, four of them without a label, and a dev file."""
    labelled = [(text, "" if k % 4 == 0 else label) for k, (text, label) in enumerate(examples(16, MOODS))]
    table(tmp_path / "dev.csv", examples(12, MOODS, seed=1))
    return table(tmp_path / "train.csv", labelled), tmp_path / "dev.csv"


def command(teacher, files, out, *more):
    train, dev = files
    shape = ["--student_layers", 2, "--text_column", "review", "--label_column", "mood", "--logging_steps", 1]
    return ["--teacher_model", teacher, "--train_file", train, "--validation_file", dev, *shape, *quick(out), *more]


@pytest.mark.parametrize(
    "kind", [Classification({"a": "a", "b": "b", "c": "c"}), Regression()], ids=["classes", "score"]
)
def test_the_hard_loss_of_a_batch_leaves_them_out(kind):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, kind.outputs, generator=generator, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 0, 1, 2]) if kind.outputs == 3 else torch.randn(6, generator=generator)
    some = labels.clone()
    some[[1, 4]] = kind.no_label
    loss = kind.hard_loss(logits, some)
    kept = [0, 2, 3, 5]
    assert loss.item() == pytest.approx(4 / 6 * kind.hard_loss(logits[kept], labels[kept]).item())
    loss.backward()
    assert (logits.grad[[1, 4]] == 0).all() and (logits.grad[kept] != 0).any(dim=1).all()
    assert kind.hard_loss(logits, torch.full_like(labels, kind.no_label)).item() == 0
    unit = kind.unit_of_loss(some.double().numpy())
    assert unit == pytest.approx(kind.unit_of_loss(labels[kept].double().numpy()))
    assert kind.unit_of_loss(np.array([kind.no_label] * 3, dtype=float)) == 1


@pytest.mark.training
def test_empty_labels_and_more_files(moody_teacher, files, tmp_path, capsys):  # noqa: F811
    texts = [text for text, _ in examples(8, MOODS, seed=2)]
    (tmp_path / "lines.txt").write_text("\n\n".join(texts) + "\n")
    (tmp_path / "more.jsonl.gz").write_bytes(
        gzip.compress("".join(json.dumps({"review": text, "mood": "unheard of"}) + "\n" for text in texts).encode())
    )
    out = tmp_path / "out"
    more = f"{tmp_path}/lin*.txt,{tmp_path}/more.jsonl.gz"
    again = command(moody_teacher, files, out, "--unlabeled_file", more, "--alpha", 0.5, "--save_strategy", "epoch")
    run(distil, *again)
    said = capsys.readouterr().out
    assert "32 training rows, 20 of them without a label: these learn from the teacher alone" in said
    results = json.loads((out / "eval_results.json").read_text())
    assert results["global_step"] == 4 and results["grad_share_hard"] > 0

    # What they are is part of the run: with other texts it does not go on.
    (tmp_path / "lines.txt").write_text("other words\n")
    with pytest.raises(SystemExit):
        run(distil, *again, "--num_train_epochs", 2, "--resume_from_checkpoint")
    assert "is of another experiment: the data" in capsys.readouterr().err


@pytest.mark.training
def test_a_training_file_without_a_label_column(moody_teacher, files, tmp_path, capsys, exits_with_2):  # noqa: F811
    train = table(tmp_path / "train.csv", [(text,) for text, _ in examples(16, MOODS)])
    alone = command(moody_teacher, (train, files[1]), tmp_path / "out", "--alpha", 1)
    run(distil, *alone)
    said = capsys.readouterr().out
    assert "dev.csv: text in review, labels in mood; 3 classes" in said
    assert "16 training rows, 16 of them without a label" in said
    assert json.loads((tmp_path / "out/eval_results.json").read_text())["global_step"] == 2
    # Nor does the dev file, where the teacher's answers choose.
    dev = table(tmp_path / "dev.csv", [(text,) for text, _ in examples(12, MOODS, seed=1)])
    by_teacher = "--alpha", 1, "--metric_for_best_model", "agreement"
    run(distil, *command(moody_teacher, (train, dev), tmp_path / "none", *by_teacher))
    results = json.loads((tmp_path / "none/eval_results.json").read_text())
    assert 0 <= results["eval_agreement"] <= 1 and "eval_accuracy" not in results
    assert "3 classes: good, bad mood, fair" in capsys.readouterr().out
    finished = ["--output_dir", tmp_path / "none", "--validation_file", dev, "--do_eval"]
    run(distil, *finished, "--teacher_model", moody_teacher)
    assert f"dev: agreement {results['eval_agreement']:.4f}" in capsys.readouterr().out
    # With empty labels it is as without any, and the dev file says how they are written.
    numbered = table(tmp_path / "dev.csv", [(text, k % 3) for k, (text, _) in enumerate(examples(12, MOODS, seed=1))])
    empty = table(tmp_path / "train.csv", [(text, "") for text, _ in examples(16, MOODS)])
    run(distil, *command(moody_teacher, (empty, numbered), tmp_path / "empty", "--alpha", 0.5))
    assert "3 classes: 0 = good (4), 1 = bad mood (4), 2 = fair (4)" in capsys.readouterr().out
    train = table(tmp_path / "train.csv", [(text,) for text, _ in examples(16, MOODS)])
    dev = table(tmp_path / "dev.csv", [(text,) for text, _ in examples(12, MOODS, seed=1)])
    other = command(moody_teacher, (train, dev), tmp_path / "other", "--alpha", 1)
    assert "dev.csv: no column 'mood'" in exits_with_2(distil, *other)
    half = command(moody_teacher, (train, dev), tmp_path / "half", "--alpha", 0.5)
    assert "train.csv: no column 'mood'" in exits_with_2(distil, *half)


@pytest.mark.training
def test_a_task_of_glue_and_scores(tmp_path, glue_dir, capsys):
    teacher = save_bert(tmp_path / "teacher", ["score"])
    pairs = [(row[7], row[8]) for row in rows("STS-B", "train", 8)]
    with open(tmp_path / "more.csv", "w", newline="") as file:
        csv.writer(file).writerows([("sentence1", "sentence2"), *pairs])
    argv = ["--teacher_model", teacher, "--student_layers", 2, "--task_name", "STS-B", "--data_dir", glue_dir]
    run(distil, *argv, *quick(tmp_path / "out"), "--unlabeled_file", tmp_path / "more.csv", "--alpha", 0.5)
    assert "32 training rows, 8 of them without a label" in capsys.readouterr().out
    results = json.loads((tmp_path / "out/eval_results.json").read_text())
    assert results["global_step"] == 4 and np.isfinite(results["eval_loss"])


def test_bad_input(moody_teacher, files, tmp_path, glue_dir, exits_with_2):  # noqa: F811
    (tmp_path / "lines.txt").write_text("a\n")
    (tmp_path / "empty.txt").write_text("\n \n")
    table(tmp_path / "other.csv", [("a", "b")])
    (tmp_path / "short.tsv").write_text("mood\treview\nfair\tword\ngood\n")
    for more, line in {
        ("--unlabeled_file", "nowhere.txt"): "--unlabeled_file nowhere.txt: no such file",
        ("--unlabeled_file", tmp_path / "empty.txt"): "empty.txt: the file holds no row of data",
        ("--unlabeled_file", tmp_path / "dev.csv", "--text_column", "said"): "train.csv: no column 'said'",
        ("--alpha", 0, "--layer_mapping", "none"): "4 training rows have no label, and nothing else teaches",
        ("--alpha", 0, "--pred_distill"): "4 training rows have no label, and nothing else teaches",
        ("--unlabeled_file", ","): "--unlabeled_file ,: names no file",
        ("--unlabeled_file", ",".join(["x.csv"] * 90)): "--unlabeled_file x.csv: no such file",
        ("--unlabeled_file", tmp_path / "short.tsv"): "short.tsv, line 3: 1 tab-separated fields where 2 are needed",
    }.items():
        assert line in exits_with_2(distil, *command(moody_teacher, files, tmp_path / "out", *more))
    train, dev = files
    tuning = ["--model_name_or_path", moody_teacher, "--do_train", "--train_file", train, "--validation_file", dev]
    columns = ["--text_column", "review", "--label_column", "mood"]
    line = exits_with_2(finetune, *tuning, *columns, *quick(tmp_path / "out"))
    assert "train.csv, line 2: no value in column 'mood' (nor in 3 more rows)" in line
    pairs = ["--teacher_model", save_bert(tmp_path / "pairs", ["entailment", "not_entailment"]), "--student_layers", 2]
    pairs += ["--task_name", "RTE", "--data_dir", glue_dir, "--unlabeled_file", tmp_path / "lines.txt"]
    line = exits_with_2(distil, *pairs, *quick(tmp_path / "out"))
    assert "lines.txt: a text a line, and RTE has pairs of texts" in line


@pytest.mark.training
def test_several_training_files(moody_teacher, tmp_path, capsys, exits_with_2):  # noqa: F811
    dev = table(tmp_path / "dev.csv", examples(12, MOODS, seed=1))
    (tmp_path / "many").mkdir()
    for k in range(2):
        table(tmp_path / f"train-{k}.csv", examples(12, MOODS[k : k + 2], seed=k))
        write(tmp_path / f"many/{k}.parquet", ["review", "mood"], examples(8, MOODS, seed=k))
    for k, (files, steps) in enumerate({f"{tmp_path}/train-*.csv": 3, f"{tmp_path}/many,{dev}": 4}.items()):
        run(distil, *command(moody_teacher, (files, dev), tmp_path / f"out-{k}"))
        assert json.loads((tmp_path / f"out-{k}/eval_results.json").read_text())["global_step"] == steps
    # The first two files together say what classes there are.
    assert "3 classes: good (6), bad mood (6), fair (12)" in capsys.readouterr().out
    table(tmp_path / "train-1.csv", [("a", "b")], label="other")
    line = exits_with_2(distil, *command(moody_teacher, (f"{tmp_path}/train-*.csv", dev), tmp_path / "out"))
    assert "train-1.csv: no column 'mood'" in line
    line = exits_with_2(distil, *command(moody_teacher, (tmp_path, dev), tmp_path / "out"))
    assert f"--train_file {tmp_path}: no folder of .parquet files" in line
