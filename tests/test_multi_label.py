"""Several labels a text, through the scripts: every form that files have them in, and all that is done with them."""

import csv
import io
import json
import random
import shutil

import numpy as np
import pytest
import torch
from conftest import save_bert
from datasets import ClassLabel, Dataset, Features, List, Value
from glue_files import sentence
from scipy.special import expit
from test_custom_task import quick, results, run
from test_tables import write
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from bert_emd.emd_task_distill import main as distil
from bert_finetune.checkpoints import load_classifier
from bert_finetune.glue import Task
from bert_finetune.run_glue import main as finetune
from bert_finetune.task_kinds import MultiLabel
from deploy.classify import Classifier
from deploy.classify import main as classify
from deploy.export_student import main as export
from deploy.server import Answer
from experiments.figures import figures_of
from experiments.finished_runs import find_runs

TAGS = ["funny", "good", "sad"]


def tagged(count, seed=0):
    """Texts, each with some of the labels; every fourth has none."""
    rng = random.Random(seed)
    return [(sentence(rng), [tag for tag in TAGS if k % 4 and rng.random() < 0.5]) for k in range(count)]


def as_lists(path, rows):
    return write(path, ["text", "label"], rows)


def with_separator(path, rows):
    return write(path, ["text", "label"], [(text, " ; ".join(labels) or ";") for text, labels in rows])


def in_columns(path, rows):
    marks = [(text, *(int(tag in labels) for tag in TAGS)) for text, labels in rows]
    return write(path, ["text", *TAGS], marks)


# How files have the labels: who writes them, their ending, and the options that say so.
FORMS = {
    "JSON lists": (as_lists, "jsonl", ()),
    "Parquet lists": (as_lists, "parquet", ()),
    "a separator": (with_separator, "csv", ("--label_separator", ";")),
    "columns": (in_columns, "csv", ("--label_columns", ",".join(TAGS))),
}


@pytest.fixture(scope="session")
def tag_teacher(tmp_path_factory):
    """A tiny teacher whose classes stand in another order than the alphabet's, with thresholds."""
    about = {"problem_type": "multi_label_classification", "thresholds": [0.49, 0.51, 0.5], "initializer_range": 0.2}
    return save_bert(tmp_path_factory.mktemp("models") / "tags", ["sad", "funny", "good"], **about)


@pytest.fixture
def files(tmp_path):
    train, dev = (as_lists(tmp_path / f"{name}.jsonl", tagged(count)) for name, count in (("train", 24), ("dev", 12)))
    return ["--train_file", train, "--validation_file", dev, "--test_file", dev]


def probabilities(folder, texts):
    """By class name, of the model that `from_pretrained` loads."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    inputs = AutoTokenizer.from_pretrained(folder)(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        found = model(**inputs).logits.sigmoid().numpy()
    return {name: found[:, k] for k, name in model.config.id2label.items()}, model.config


@pytest.mark.training
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_labels(form, pretrained, tmp_path, capsys):
    make, ending, options = FORMS[form]
    train, dev = (make(tmp_path / f"{name}.{ending}", tagged(count)) for name, count in (("train", 24), ("dev", 12)))
    files = ["--train_file", train, "--validation_file", dev, "--test_file", dev, "--text_column", "text", *options]
    out = tmp_path / "out"
    run(finetune, "--model_name_or_path", pretrained, *files, "--do_train", "--do_predict", *quick(out))
    counts = ", ".join(f"{tag} ({sum(tag in labels for _, labels in tagged(24))})" for tag in TAGS)
    without = sum(not labels for _, labels in tagged(24))
    said = f"several labels a text, 3 classes: {counts}; {without} of 24 texts have none"
    assert said in capsys.readouterr().out
    found, config = probabilities(out, [text for text, _ in tagged(12)])
    assert config.problem_type == "multi_label_classification" and list(found) == TAGS
    # Predictions go by the thresholds that the configuration keeps, and the dev figures are those of these answers.
    answers = {tag: found[tag] > threshold for tag, threshold in zip(TAGS, config.thresholds, strict=True)}
    separator = ";" if form == "a separator" else ","
    written = [separator.join(tag for tag in TAGS if answers[tag][k]) for k in range(12)]
    rows = (out / "predictions.tsv").read_text().splitlines()[1:]
    assert rows == [f"{k}\t{labels}" for k, labels in enumerate(written)]
    right = [[tag for tag in TAGS if answers[tag][k]] == labels for k, (_, labels) in enumerate(tagged(12))]
    assert results(out)["eval_subset_accuracy"] == pytest.approx(np.mean(right))
    assert {"eval_micro_f1", "eval_macro_f1", "eval_mean_average_precision"} <= set(results(out))
    assert (
        f"(`config.thresholds`, chosen on the dev set for the highest F1 of each): funny {config.thresholds[0]:.3g},"
        in (out / "README.md").read_text()
    )


@pytest.mark.training
def test_a_teacher_of_several_labels(tag_teacher, files, tmp_path, capsys):
    """Its configuration says so, and no option; rows without labels, class weights and figures of all kinds."""
    with open(files[1], "a") as train:
        train.write('{"text": "the cat", "label": null}\n{"text": "a dog", "label": "sad, good"}\n')
    out = tmp_path / "out"
    more = ["--alpha", 0.5, "--class_weights", "balanced", "--agreement_file", files[3], "--metric_for_best_model"]
    student = ["--teacher_model", tag_teacher, "--student_layers", 2, *files]
    run(distil, *student, "--do_train", "--do_predict", *more, "mean_average_precision", *quick(out))
    said = capsys.readouterr().out
    assert "26 training rows, 1 of them without a label" in said
    labels = [labels for _, labels in tagged(24)] + [["sad", "good"]]
    weights = {tag: (25 - count) / count for tag in TAGS if (count := sum(tag in each for each in labels))}
    assert "class weights: " + ", ".join(f"{tag} {weights[tag]:.3g}" for tag in ("sad", "funny", "good")) in said
    found, config = probabilities(out, [text for text, _ in tagged(12)])
    assert list(found) == ["sad", "funny", "good"]

    # What the run has kept gives its figures again: by its own thresholds against the labels, by the teacher's else.
    ((finished,), _) = find_runs([out])
    kept = np.load(out / "dev_predictions.npz")
    assert kept["thresholds"].tolist() == config.thresholds and kept["teacher_thresholds"].tolist() == [0.49, 0.51, 0.5]
    for name in ("micro_f1", "macro_f1", "subset_accuracy", "mean_average_precision", "agreement", "divergence"):
        for figure in (*figures_of(finished.task, name), *figures_of(finished.task, f"test_{name}")):
            assert figure.of(finished.predictions(figure)) == pytest.approx(finished.figure(figure)), figure.key
    ours, theirs = ((expit(kept[name]) > [0.49, 0.51, 0.5]) for name in ("logits", "teacher_logits"))
    assert results(out)["eval_agreement"] == pytest.approx((ours == theirs).all(axis=1).mean())

    # Measured again it is the same, without an option.
    run(distil, *("--output_dir", out, "--do_eval", "--validation_file", files[3], "--teacher_model", tag_teacher))
    again = capsys.readouterr().out
    for name in ("micro_f1", "agreement"):
        assert f"{name} {results(out)[f'eval_{name}']:.4f}" in again.splitlines()[-1]


def test_thresholds_go_with_the_classes(tag_teacher, tmp_path, capsys):
    def load(kind, **more):
        return load_classifier(str(tag_teacher), Task("custom", (), kind), "--teacher_model", **more)

    turned = load(MultiLabel({"good": "good", "sad": "sad", "funny": "funny"}), fine_tuned=True)
    assert turned.config.id2label[0] == "good" and turned.config.thresholds == [0.5, 0.49, 0.51]
    # A new head has none, or those of the teacher it is to learn from.
    two = MultiLabel({"good": "good", "sad": "sad"})
    assert not hasattr(load(two).config, "thresholds")
    assert load(two.configured({"thresholds": [0.1, 0.2]})).config.thresholds == [0.1, 0.2]


@pytest.mark.training
def test_without_dev_labels_the_teacher_s_thresholds_stay(tag_teacher, files, tmp_path):
    dev = write(tmp_path / "texts.jsonl", ["text"], [(text,) for text, _ in tagged(12)])
    more = ["--validation_file", dev, "--alpha", 1, "--metric_for_best_model", "agreement"]
    argv = ["--teacher_model", tag_teacher, "--student_layers", 2, *files[:2], *more, *quick(tmp_path / "out")]
    run(distil, *argv)
    assert json.loads((tmp_path / "out/config.json").read_text())["thresholds"] == [0.49, 0.51, 0.5]
    kept = np.load(tmp_path / "out/dev_predictions.npz")
    assert kept["thresholds"].tolist() == kept["teacher_thresholds"].tolist() == [0.49, 0.51, 0.5]


@pytest.mark.training
def test_probabilities_of_several_labels_can_teach(tag_teacher, files, pretrained, tmp_path):
    """What --probabilities writes is read back as --probability_columns, with the labels in their place."""
    out = tmp_path / "answers"
    test = ["--test_file", files[1], "--do_predict", "--probabilities"]
    run(finetune, "--model_name_or_path", tag_teacher, *test, *quick(out))
    table = list(csv.DictReader(io.StringIO((out / "predictions.probabilities.csv").read_text())))
    assert [row["label"] for row in table] == [",".join(labels) or "," for _, labels in tagged(24)]
    train = ["--train_file", out / "predictions.probabilities.csv", "--label_separator", ","]
    columns = ["--probability_columns", "p_good,p_sad,p_funny", "--text_column", "text"]
    soft = ["--student_model", pretrained, *train, *columns, "--validation_file", files[3], *quick(tmp_path / "out")]
    run(distil, *soft)
    assert results(tmp_path / "out")["history"][-1]["soft_loss"] > 0


@pytest.mark.slow
def test_a_student_out_of_pytorch(tag_teacher, files, tmp_path, capsys):
    run(
        export,
        "--model",
        tag_teacher,
        "--output_dir",
        tmp_path / "onnx",
        *files[2:4],
        "--max_drop",
        100,
        "--max_seq_length",
        32,
    )
    texts = [text for text, _ in tagged(12)]
    found, config = probabilities(tag_teacher, texts)
    classifier = Classifier(tmp_path / "onnx", file="model.onnx", threads=1)
    expected = [
        [name for k, name in config.id2label.items() if found[name][row] > config.thresholds[k]] for row in range(12)
    ]
    answers = classifier(texts)
    assert [answer["labels"] for answer in answers] == expected and [] in expected
    for row, answer in enumerate(answers):
        assert answer["probabilities"] == pytest.approx({name: found[name][row] for name in found}, abs=1e-5)
    assert Answer(**answers[0]).model_dump(exclude_none=True) == answers[0]

    even = tmp_path / "even"
    shutil.copytree(tmp_path / "onnx", even)
    config = json.loads((even / "config.json").read_text())
    (even / "config.json").write_text(json.dumps({key: config[key] for key in config if key != "thresholds"}))
    answers_by_half = Classifier(even, file="model.onnx")(texts)
    assert [answer["labels"] for answer in answers_by_half] == [
        [name for name, probability in answer["probabilities"].items() if probability > 0.5] for answer in answers
    ]

    capsys.readouterr()
    plain = ["--model", tmp_path / "onnx", "--file", "model.onnx"]
    run(classify, *plain, texts[0])
    shown, shares = capsys.readouterr().out.rstrip("\n").split("\t")
    assert shown == ",".join(expected[0])
    assert shares == ",".join(f"{answers[0]['probabilities'][name]:.4f}" for name in expected[0])
    for ending in ("csv", "jsonl"):
        run(classify, *plain, "--input", files[3], "--text_column", "text", "--output", tmp_path / f"answers.{ending}")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "answers.csv").read_text())))
    assert [row["labels"] for row in rows] == [",".join(labels) for labels in expected]
    assert list(rows[0]) == ["labels", *config["id2label"].values()]
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    assert [json.loads(line)["labels"] for line in lines] == expected


@pytest.mark.training
def test_lists_of_numbers_with_names(pretrained, tmp_path, capsys):
    """As the hub's datasets have several labels: ClassLabels in lists."""
    features = Features({"text": Value("string"), "label": List(ClassLabel(names=TAGS))})
    data = Dataset.from_dict({"text": [text for text, _ in tagged(16)], "label": [[1, 2], [], [0], [2]] * 4})
    data.cast(features).to_parquet(tmp_path / "train.parquet")
    files = ["--train_file", tmp_path / "train.parquet", "--validation_file", tmp_path / "train.parquet"]
    run(finetune, "--model_name_or_path", pretrained, *files, "--do_train", *quick(tmp_path / "out"))
    said = "3 classes: funny (4), good (4), sad (8); 4 of 16 texts have none"
    assert said in capsys.readouterr().out


@pytest.mark.training
def test_macro_f1_chooses_among_classes_too(pretrained, glue_dir, tmp_path):
    argv = ["--model_name_or_path", pretrained, "--do_train", "--task_name", "RTE", "--data_dir", glue_dir]
    weighed = ["--metric_for_best_model", "macro_f1", "--class_weights", "balanced"]
    run(finetune, *argv, *quick(tmp_path / "out"), *weighed)
    assert {"eval_accuracy", "eval_macro_f1"} <= set(results(tmp_path / "out"))
    ((finished,), _) = find_runs([tmp_path / "out"])
    (figure,) = figures_of(finished.task, "macro_f1")
    assert figure.of(finished.predictions(figure)) == pytest.approx(finished.figure(figure))


GOOD = tagged(8)
# What is wrong: rows of a JSON file, options, and the line that tells.
WRONG = {
    "an unknown name": (
        [*GOOD, ("a", ["good", "bad"])],
        [],
        "dev.jsonl, line 9: label 'bad' is not one of custom's: sad,",
    ),
    "other names": (
        [("a", ["b"]), ("a", ["c"])],
        [],
        "column label: its labels (b, c) are not the model's classes (sad,",
    ),
    "a missing value in dev": ([*GOOD, ("a", None)], [], "dev.jsonl, line 9: no value in column 'label'"),
    "an entry without a name": (
        [*GOOD, ("a", ["good", ""])],
        [],
        "dev.jsonl, line 9: one of the labels in column 'label'",
    ),
    "a list in a list": ([*GOOD, ("a", [["good"]])], [], "line 9: column 'label' holds a list, not a text or number"),
    "no such column": (GOOD, ["--label_columns", "good,sad,funny"], "dev.jsonl: no column 'good'"),
    "nothing to separate": (GOOD, ["--label_separator", ""], "--label_separator: give what stands between the labels"),
    "the separator in a name": (
        GOOD,
        ["--label_separator", "o"],
        "the class 'good' has in its name what stands between",
    ),
    "scores": (GOOD, ["--regression", "--label_separator", ";"], "several labels a text; --regression: scores are one"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_labels(case, tag_teacher, tmp_path, exits_with_2):
    rows, more, line = WRONG[case]
    dev = as_lists(tmp_path / "dev.jsonl", rows)
    argv = ["--model_name_or_path", tag_teacher, "--do_eval", "--validation_file", dev, *more, *quick(tmp_path / "out")]
    assert line in exits_with_2(finetune, *argv)


def test_wrong_files_and_options(tag_teacher, pretrained, glue_dir, tmp_path, exits_with_2):
    def said(main, *argv, model="--model_name_or_path", of=tag_teacher):
        return exits_with_2(main, model, of, *argv, *quick(tmp_path / "out"))

    marks, told = tmp_path / "marks.csv", "marks.csv, line 3: column 'sad' holds"
    columns = ["--do_eval", "--validation_file", marks, "--text_column", "text", "--label_columns"]
    for field in ("2", ""):
        marks.write_text(f"text,funny,sad,good\na,1,0,0\nb,0,{field},1\n")
        assert f"{told} '{field}', and must hold 1 or 0" in said(finetune, *columns, "funny,sad,good")
    marks.write_text("text,funny,sad,good\na,1,0,0\nb,0,1,1\n")
    line = said(finetune, *columns, "sad,good")
    assert "--label_columns sad,good: has no column for the model's funny" in line
    one = save_bert(tmp_path / "one", TAGS, problem_type="single_label_classification")
    dev = ["--do_eval", "--validation_file", as_lists(tmp_path / "dev.jsonl", GOOD)]
    assert "dev.jsonl, line 1: column 'label' holds a list, not a text" in said(finetune, *dev, of=one)
    line = "the fine-tuned model (single_label_classification) gives one a text"
    assert line in said(finetune, *dev, "--label_separator", ";", of=one)
    # A list where the training file has one label a text.
    train = write(tmp_path / "train.jsonl", ["text", "label"], [("a", "good"), ("b", "sad")])
    line = said(finetune, "--do_train", "--train_file", train, *dev[1:], of=pretrained)
    assert "dev.jsonl, line 1: column 'label' holds a list" in line
    mixed = write(tmp_path / "mixed.jsonl", ["text", "label"], [("a", "good"), ("b", "sad"), ("c", ["sad", "good"])])
    line = said(finetune, "--do_train", "--train_file", mixed, *dev[1:], of=pretrained)
    assert "mixed.jsonl, line 3: column 'label' holds a list, not a text" in line
    single = write(tmp_path / "single.jsonl", ["text", "label"], [("a", ["good"]), ("b", ["good"])])
    line = said(finetune, "--do_train", "--train_file", single, *dev[1:], of=pretrained)
    assert "column label: needs at least two classes, found good" in line
    columns = ["--label_columns", "good", "--train_file", marks, "--validation_file", marks, "--text_column", "text"]
    assert "need two or more classes, and there is good" in said(finetune, "--do_train", *columns, of=pretrained)
    rte = ["--do_eval", "--task_name", "RTE", "--data_dir", glue_dir]
    assert "are for your own files, and not GLUE's" in said(finetune, *rte, "--label_columns", "a,b")

    folder = save_bert(tmp_path / "other", TAGS, problem_type="multi_label_classification", thresholds=[0.5, 2])
    line = said(finetune, *dev, of=folder)
    assert "other: thresholds of its config.json is [0.5, 2]; it must be a list of 3 numbers from 0 to 1" in line
    scores = write(tmp_path / "scores.csv", ["text", "label"], [("a", 1.5), ("b", 2.5)])
    train = ["--do_train", "--train_file", scores, "--validation_file", scores]
    weighed = ["--class_weights", "balanced"]
    assert "weighs classes, and these labels are scores" in said(finetune, *train, *weighed, of=pretrained)
    train = ["--do_train", "--train_file", dev[-1], *dev[1:]]
    smoothed = ["--label_smoothing_factor", 0.1]
    assert "smooths over classes of which a text has one" in said(finetune, *train, *smoothed, of=pretrained)
    rte[0] = "--do_train"
    assert "does not go with --class_weights" in said(finetune, *rte, *smoothed, *weighed, of=pretrained)
    line = said(distil, "--student_layers", 2, *train, *weighed, "--alpha", 1, model="--teacher_model")
    assert "--class_weights balanced: weighs the labels' loss, which --alpha 1 leaves out" in line
