"""The user's own files through both scripts."""

import csv
import json
import random
import re

import numpy as np
import pytest
from conftest import save_bert
from datasets import ClassLabel, Dataset, Features, Value
from glue_files import sentence
from test_tables import packed, write
from transformers import AutoModelForSequenceClassification, pipeline

from bert_emd.emd_task_distill import main as distil
from bert_finetune.run_glue import main as finetune

MOODS = ["bad mood", "fair", "good"]


def examples(count, labels, seed=0):
    rng = random.Random(seed)
    return [(sentence(rng), labels[k % len(labels)]) for k in range(count)]


def run(main, *argv):
    main([str(argument) for argument in argv])


def quick(out):
    return ["--output_dir", out, "--max_seq_length", 32, "--num_train_epochs", 1, "--train_batch_size", 8]


def results(out):
    return json.loads((out / "eval_results.json").read_text())


@pytest.fixture(scope="session")
def moody_teacher(tmp_path_factory):
    """A tiny teacher with three classes of its own, not in alphabetical order."""
    return save_bert(tmp_path_factory.mktemp("models") / "moods", ["good", "bad mood", "fair"])


@pytest.mark.training
@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl.gz", "json", "parquet.zst"])
def test_the_engineer_s_path(ending, moody_teacher, tmp_path, capsys):
    """A fine-tuned model and files in, a smaller model with the same label names out, in one command."""

    def table(name, rows):
        path = tmp_path / f"{name}.{ending}"
        if ending == "tsv":
            path.write_text("".join("\t".join(row) + "\n" for row in [("review", "mood"), *rows]))
            return path
        ending_of_format, _, packing = ending.partition(".")
        plain = write(tmp_path / f"{name}.{ending_of_format}", ["review", "mood"], rows)
        return packed(plain, packing) if packing else plain

    train, dev = table("train", examples(24, MOODS)), table("dev", examples(12, MOODS, seed=1))
    out = tmp_path / "out"
    run(
        distil,
        *("--teacher_model", moody_teacher, "--student_layers", 2, "--train_file", train, "--validation_file", dev),
        *("--test_file", dev, "--do_train", "--do_predict", "--label_column", "mood", *quick(out)),
    )
    printed = capsys.readouterr().out
    assert f"{train}: text in review, labels in mood; 3 classes: good (8), bad mood (8), fair (8)" in printed
    found = results(out)
    assert found["task"] == "custom"
    assert {"eval_accuracy", "eval_macro_f1", "eval_mcc", "teacher_eval_accuracy"} <= set(found)
    model = AutoModelForSequenceClassification.from_pretrained(out)
    assert model.config.num_hidden_layers == 2
    assert model.config.id2label == {0: "good", 1: "bad mood", 2: "fair"}
    answers = pipeline("text-classification", model=str(out))([text for text, _ in examples(12, MOODS, seed=1)])
    rows = (out / "predictions.tsv").read_text().splitlines()
    assert rows == ["index\tprediction", *(f"{k}\t{answer['label']}" for k, answer in enumerate(answers))]


@pytest.mark.training
def test_figures_belong_to_the_right_classes(moody_teacher, tmp_path):
    """The dev accuracy is that of the model's own answers, by name."""
    rows = examples(30, MOODS, seed=2)
    dev = write(tmp_path / "dev.csv", ["text", "label"], rows)
    run(finetune, "--model_name_or_path", moody_teacher, "--validation_file", dev, "--do_eval", *quick(tmp_path / "o"))
    run(
        distil,
        *("--teacher_model", moody_teacher, "--student_layers", "1,2,3,4", "--train_file", dev),
        *("--validation_file", dev, "--learning_rate", 0, *quick(tmp_path / "out")),
    )
    answers = pipeline("text-classification", model=str(moody_teacher))([text for text, _ in rows])
    expected = np.mean([answer["label"] == label for answer, (_, label) in zip(answers, rows, strict=True)])
    assert results(tmp_path / "out")["eval_accuracy"] == pytest.approx(expected)
    assert results(tmp_path / "out")["teacher_eval_accuracy"] == pytest.approx(expected)


def test_labels_by_number_and_in_another_spelling(moody_teacher, tmp_path, capsys):
    for labels, said in (
        (["0", "1", "2"], "0 = good (4), 1 = bad mood (4), 2 = fair (4)"),
        (["Good", "BAD-MOOD", "fair"], "Good = good (4), BAD-MOOD = bad mood (4), fair (4)"),
    ):
        dev = write(tmp_path / f"{labels[0]}.csv", ["text", "label"], examples(12, labels))
        files = ["--validation_file", dev, "--test_file", dev, "--do_eval", "--do_predict"]
        run(finetune, "--model_name_or_path", moody_teacher, *files, *quick(tmp_path))
        assert f"3 classes: {said}" in capsys.readouterr().out
        # Predictions are the model's names, however the file writes its labels.
        answers = {row.split("\t")[1] for row in (tmp_path / "predictions.tsv").read_text().splitlines()[1:]}
        assert answers <= {"good", "bad mood", "fair"}


@pytest.mark.training
def test_classes_from_the_data(pretrained, tmp_path, capsys):
    """A new head: whole numbers are classes, in their order, and keep their names."""
    train = write(tmp_path / "train.jsonl", ["text", "stars"], examples(24, [10, 2, 1]))
    out = tmp_path / "out"
    run(
        finetune,
        *("--model_name_or_path", pretrained, "--train_file", train, "--validation_file", train, "--do_train"),
        *("--label_column", "stars", "--metric_for_best_model", "macro_f1", *quick(out)),
    )
    assert "3 classes: 1 (8), 2 (8), 10 (8)" in capsys.readouterr().out
    assert AutoModelForSequenceClassification.from_pretrained(out).config.id2label == {0: "1", 1: "2", 2: "10"}
    best = max(results(out)["history"], key=lambda entry: entry["eval_macro_f1"])
    assert results(out)["eval_macro_f1"] == pytest.approx(best["eval_macro_f1"])


@pytest.mark.training
def test_pairs_and_scores(pretrained, tmp_path, capsys):
    """Two text columns and a score to predict, which may lie outside 0 to 5; the student has the teacher's kind."""
    rows = [(text, text, score) for text, score in examples(16, [-3.5, 0.0, 12.25, 40.0])]
    train = write(tmp_path / "train.parquet", ["first", "second", "score"], rows)
    files = ["--train_file", train, "--validation_file", train, "--text_column", "first, second"]
    files += ["--label_column", "score"]
    run(finetune, "--model_name_or_path", pretrained, *files, "--do_train", *quick(tmp_path / "teacher"))
    assert "text in first and second, labels in score; a score to predict, from -3.5 to 40" in capsys.readouterr().out
    run(
        distil,
        *("--teacher_model", tmp_path / "teacher", "--student_layers", 2, *files, "--alpha", 0.5),
        *("--test_file", train, "--do_predict", "--do_train", *quick(tmp_path / "student")),
    )
    found = results(tmp_path / "student")
    assert {"eval_spearman", "eval_pearson", "teacher_eval_spearman"} <= set(found)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student")
    assert model.config.num_labels == 1 and model.config.problem_type == "regression"
    with open(tmp_path / "student" / "predictions.tsv") as file:
        assert all(np.isfinite(float(row["prediction"])) for row in csv.DictReader(file, delimiter="\t"))


@pytest.mark.training
def test_whole_numbers_as_scores(pretrained, tmp_path, capsys):
    train = write(tmp_path / "train.csv", ["text", "label"], examples(16, ["1", "2", "3", "4", "5"]))
    out = tmp_path / "out"
    files = ["--train_file", train, "--validation_file", train]
    run(finetune, "--model_name_or_path", pretrained, *files, "--do_train", "--regression", *quick(out))
    assert "a score to predict, from 1 to 5" in capsys.readouterr().out
    assert AutoModelForSequenceClassification.from_pretrained(out).config.num_labels == 1


@pytest.mark.training
def test_prediction_alone_needs_only_the_test_file(moody_teacher, tmp_path):
    test = write(tmp_path / "test.csv", ["text"], [("the cat runs",), ("",), ("a, b\nc",)])
    out = tmp_path / "out"
    run(finetune, "--model_name_or_path", moody_teacher, "--test_file", test, "--do_predict", *quick(moody_teacher))
    assert len((moody_teacher / "predictions.tsv").read_text().splitlines()) == 1 + 3
    (moody_teacher / "predictions.tsv").unlink()
    train = write(tmp_path / "train.csv", ["id", "review", "mood"], [("1", *row) for row in examples(9, MOODS)])
    columns = ["--text_column", "review", "--label_column", "mood"]
    files = ["--train_file", train, "--validation_file", train]
    run(distil, "--teacher_model", moody_teacher, "--student_layers", 2, *files, *columns, *quick(out))
    # A finished student remembers its columns.
    test = write(tmp_path / "other.csv", ["id", "review"], [("7", "the cat runs"), ("8", "a dog")])
    run(distil, "--test_file", test, "--do_predict", "--output_dir", out)
    assert len((out / "predictions.tsv").read_text().splitlines()) == 1 + 2


def test_quotes_in_tsv_are_pointed_out(moody_teacher, tmp_path, capsys):
    dev = tmp_path / "dev.tsv"
    dev.write_text('text\tlabel\n"a cat, a dog"\tgood\na dog\tfair\n')
    run(finetune, "--model_name_or_path", moody_teacher, "--validation_file", dev, "--do_eval", *quick(tmp_path))
    assert "dev.tsv: 1 of 2 texts stand in double quotes, which are kept" in capsys.readouterr().out


GOOD = examples(12, MOODS)
# Columns, rows, more options, and what the message says.
BAD = {
    "numbers from 1": (
        ["text", "label"],
        examples(8, ["1", "2"]),
        [],
        "class numbers count from 0, which does not occ",
    ),
    "another label": (
        ["text", "label"],
        [*GOOD, ("a cat", "awful")],
        [],
        r"column label: its labels \(awful, bad mood",
    ),
    "two spellings": (["text", "label"], [*GOOD, ("a", "Good")], [], "Good and good both look like the class good"),
    "no text column": (["id", "text", "label"], [("1", *GOOD[0])], [], "--text_column is missing: .* id, text, label"),
    "wrong text column": (["text", "label"], GOOD, ["--text_column", "review"], "train.csv: no column 'review'"),
    "wrong label column": (
        ["text", "label"],
        GOOD,
        ["--label_column", "mood", "--text_column", "text"],
        "no column 'm",
    ),
    "empty label": (["text", "label"], [*GOOD, ("a", "")], [], "csv, line 14: no value in column 'label'; fill it in"),
    "classes as scores": (["text", "label"], GOOD, ["--regression"], "--regression True: the fine-tuned model has 3"),
    "a GLUE task too": (
        ["text", "label"],
        GOOD,
        ["--task_name", "RTE"],
        "give --task_name with --data_dir, or --train",
    ),
    "an unknown metric": (
        ["text", "label"],
        GOOD,
        ["--metric_for_best_model", "f1"],
        "custom has loss, accuracy, macro_f1, mcc",
    ),
    "too many text columns": (
        ["a", "b", "c", "label"],
        [("1", "2", *GOOD[0])],
        ["--text_column", "a,b,c"],
        "--text_column a,b,c: give one column, or two of a pair",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, moody_teacher, tmp_path, exits_with_2):
    columns, rows, more, message = BAD[case]
    train = write(tmp_path / "train.csv", columns, rows)
    line = exits_with_2(
        distil,
        *("--teacher_model", moody_teacher, "--student_layers", 2, "--train_file", train, "--validation_file", train),
        *quick(tmp_path / "out"),
        *more,
    )
    assert re.search(message, line), line
    assert not (tmp_path / "out").exists()


def test_bad_labels_for_a_new_head(pretrained, tmp_path, exits_with_2):
    def message(rows, *more):
        train = write(tmp_path / "train.jsonl", ["text", "label"], rows)
        files = ["--train_file", train, "--validation_file", train]
        return exits_with_2(
            finetune, "--model_name_or_path", pretrained, *files, "--do_train", *quick(tmp_path / "out"), *more
        )

    assert "needs at least two classes, found good" in message(examples(9, ["good"]))
    assert "60 different labels in 60 rows; is it the right --label_column?" in message(examples(60, range(60)))
    assert "line 1: 'bad mood' is not a number" in message(GOOD, "--regression")
    assert "line 3: no value in column 'label'" in message([*GOOD[:2], ("a cat", None)])
    assert "line 1: no value in column 'text'" in message([(None, "good"), *GOOD])
    files = ["--train_file", tmp_path / "train.jsonl", "--do_train"]
    line = exits_with_2(finetune, "--model_name_or_path", pretrained, *files, *quick(tmp_path / "out"))
    assert "--validation_file is missing" in line
    line = exits_with_2(finetune, "--model_name_or_path", pretrained, *files, "--do_predict", *quick(tmp_path / "out"))
    assert "--validation_file is missing" in line


@pytest.mark.training
@pytest.mark.parametrize("main", [finetune, distil], ids=["fine-tuning", "distillation"])
def test_a_finished_model_remembers_how_its_files_are_read(main, tmp_path, capsys):
    """Scores with a decimal comma, which a look at the finished model need not be told of again."""
    rng = random.Random(0)
    for name in ("train", "dev"):
        rows = [f"{sentence(rng)};{k % 5},5" for k in range(16)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["review;stars", *rows]) + "\n")
    model, out = save_bert(tmp_path / "model", ["score"]), tmp_path / "out"
    start = {finetune: ("--model_name_or_path", model, "--do_train"), distil: ("--teacher_model", model)}[main]
    if main is distil:
        start = (*start, "--student_layers", 2)
    dev = ("--validation_file", tmp_path / "dev.csv")
    read = ("--text_column", "review", "--label_column", "stars", "--decimal", ",", "--delimiter", ";")
    run(main, *start, "--train_file", tmp_path / "train.csv", *dev, *read, *quick(out))
    expected = results(out)["eval_pearson"]
    capsys.readouterr()
    look = ("--model_name_or_path", out) if main is finetune else ()
    run(main, *look, *dev, "--do_eval", "--output_dir", out)
    assert f"pearson {expected:.4f}" in capsys.readouterr().out


@pytest.fixture
def dataset(tmp_path):
    """A dataset's folder: names of classes in the splits' features, no dev split by its usual name."""
    features = Features({"said": Value("string"), "mood": ClassLabel(names=MOODS)})
    for name, count in (("train", 24), ("held", 12), ("test", 6)):
        texts, moods = zip(*examples(count, MOODS), strict=True)
        rows = Dataset.from_dict({"said": texts, "mood": moods}, features=features)
        rows.to_parquet(tmp_path / f"moods/{name}.parquet")
    (tmp_path / "moods/README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n"
        + "".join(f"  - split: {name}\n    path: {name}.parquet\n" for name in ("train", "held", "test"))
        + "---\n"
    )
    return tmp_path / "moods"


@pytest.mark.training
def test_a_dataset_in_place_of_files(dataset, moody_teacher, tmp_path, capsys, exits_with_2, monkeypatch):
    argv = [
        "--teacher_model",
        moody_teacher,
        "--student_layers",
        2,
        "--dataset_name",
        dataset,
        "--label_column",
        "mood",
    ]
    run(distil, *argv, *quick(tmp_path / "out"), "--validation_split", "held", "--do_predict", "--do_train")
    said = capsys.readouterr().out
    assert "moods-train.parquet: text in said, labels in mood; 3 classes: good (8), bad mood (8), fair (8)" in said
    assert results(tmp_path / "out")["global_step"] == 3
    answers = [line.split("\t")[1] for line in (tmp_path / "out/predictions.tsv").read_text().splitlines()[1:]]
    assert len(answers) == 6 and set(answers) <= set(MOODS)

    (tmp_path / "code").mkdir()
    (tmp_path / "code/code.py").write_text("raise SystemExit('it ran')")
    for more, line in {
        (): "split validation: Unknown split \"validation\". Should be one of ['train', 'held', 'test']",
        ("--dataset_config", "other"): "--dataset_config other, split train: BuilderConfig 'other' not found",
        ("--dataset_name", tmp_path / "code"): "Dataset scripts are no longer supported, but found code.py",
        (
            "--dataset_name",
            tmp_path / "none",
        ): f"--dataset_name {tmp_path}/none, split train: Couldn't find any data file",
        ("--train_file", "x.csv"): "give --task_name with --data_dir, or --train_file,",
    }.items():
        assert line in exits_with_2(distil, *argv, *quick(tmp_path / "bad"), *more)
    assert "of which dataset?" in exits_with_2(
        distil, *argv[:4], "--train_file", "x.csv", "--dataset_config", "a", *quick(tmp_path / "bad")
    )
