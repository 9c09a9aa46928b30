"""Soft labels: from columns of the training file, from files that models have written, from several teachers."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import save_bert
from test_custom_task import MOODS, examples, moody_teacher, quick, run  # noqa: F401 (a fixture)
from test_unlabelled import command, files, table  # noqa: F401 (a fixture)

from bert_emd.emd_task_distill import main as distil
from bert_finetune.run_glue import main as finetune
from bert_finetune.soft_labels import SoftLabels
from bert_finetune.tables import read_table
from bert_finetune.task_kinds import Classification, Regression

KIND = Classification({name: name for name in ("bad", "fair", "good")})
# The classes of the fixture's teacher, in its order.
P_COLUMNS = ["p_good", "p_bad mood", "p_fair"]
COLUMNS = SoftLabels("--probability_columns", ("p_good", "p_bad", "p_fair"))


def written(path, header, *rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_columns_are_found_by_the_classes_names(tmp_path, capsys):
    path = written(
        tmp_path / "rows.csv", ["text", "p_good", "p_bad", "p_fair"], ["a", ".7", ".1", ".2"], ["b", 1, 0, 0]
    )
    logits = COLUMNS.read(read_table(path), KIND)
    assert np.exp(logits[0]) == pytest.approx([0.1, 0.2, 0.7]) and np.isfinite(logits).all()
    assert np.argmax(logits[1]) == 2
    assert "probabilities of bad, fair, good in p_bad, p_fair, p_good" in capsys.readouterr().out
    # Names that differ by case only are told apart, and what cannot be is taken in order.
    cased = SoftLabels("", ("p_good", "p_Good"))
    path = written(tmp_path / "cased.csv", ["text", "p_good", "p_Good"], ["a", ".7", ".3"])
    both = Classification({"Good": "Good", "good": "good"})
    assert np.exp(cased.read(read_table(path), both)[0]) == pytest.approx([0.3, 0.7])
    # Under other names they stand in the order of the classes.
    other = SoftLabels("--probability_columns", ("x", "y", "z"))
    path = written(tmp_path / "other.csv", ["text", "x", "y", "z"], ["a", ".7", ".1", ".2"])
    assert np.exp(other.read(read_table(path), KIND)[0]) == pytest.approx([0.7, 0.1, 0.2])


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_a_list_in_one_column(tmp_path, ending):
    path = tmp_path / f"rows{ending}"
    if ending == ".csv":
        written(path, ["text", "p"], ["a", "[0.5, 0.25, 0.25]"])
    elif ending == ".jsonl":
        path.write_text(json.dumps({"text": "a", "p": [0.5, 0.25, 0.25]}) + "\n")
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": ["a"], "p": [[0.5, 0.25, 0.25]]}), path)
    one = SoftLabels("--probability_columns p", ("p",))
    assert np.exp(one.read(read_table(path), KIND)[0]) == pytest.approx([0.5, 0.25, 0.25])
    logits = SoftLabels("--logit_columns p", ("p",), are_logits=True)
    assert logits.read(read_table(path), KIND)[0] == [0.5, 0.25, 0.25]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ([".7", ".1", ".3"], "probabilities sum to 1.1, not 1"),
        (["1.2", "-.2", "0"], "is no probability"),
        ([".7", "", ".3"], "a value is missing"),
        ([".7", "much", ".3"], "'much' is not a number"),
        (["nan", ".5", ".5"], "not a number"),
        (["1e300", ".5", ".5"], "too large"),
    ],
)
def test_what_is_no_probability(tmp_path, row, complaint):
    path = written(tmp_path / "rows.csv", ["text", "p_good", "p_bad", "p_fair"], ["a", ".5", ".25", ".25"], ["b", *row])
    with pytest.raises(Exception, match=f"rows.csv, line 3: .*{complaint}"):
        COLUMNS.read(read_table(path), KIND)


def test_another_number_of_columns_than_classes(tmp_path):
    path = written(tmp_path / "rows.csv", ["text", "p_good", "p_bad"], ["a", ".5", ".5"])
    with pytest.raises(Exception, match="2 columns where the outputs are bad, fair, good"):
        SoftLabels("--probability_columns p_good,p_bad", ("p_good", "p_bad")).read(read_table(path), KIND)
    path.write_text('text,p\na,"[0.5, 0.5]"\n')
    with pytest.raises(Exception, match="2 values where the outputs are bad, fair, good"):
        SoftLabels("--probability_columns p", ("p",)).read(read_table(path), KIND)


@pytest.mark.parametrize("kind", [KIND, Regression()], ids=["classes", "score"])
def test_averaged_probabilities(kind):
    generator = np.random.default_rng(0)
    logits = [generator.normal(size=(5, kind.outputs)) for _ in range(3)]
    mean = np.mean([kind.probabilities(each) for each in logits], axis=0)
    np.testing.assert_allclose(kind.probabilities(kind.averaged(logits)), mean, rtol=1e-5)


def predicted(model, rows, out):
    """What run_glue.py writes of the training texts."""
    options = ["--text_column", "review", "--label_column", "mood", "--max_seq_length", 16, "--do_predict"]
    run(finetune, "--model_name_or_path", model, "--test_file", rows, *options, "--probabilities", "--output_dir", out)
    return out / "predictions.probabilities.csv"


@pytest.mark.training
def test_a_model_s_probabilities_in_its_place(moody_teacher, files, tmp_path, capsys):  # noqa: F811
    path = predicted(moody_teacher, files[0], tmp_path / "predicted")
    rows = read_csv(path)
    assert list(rows[0]) == ["review", "mood", *P_COLUMNS]
    assert [row["review"] for row in rows] == [row["review"] for row in read_csv(files[0])]
    for row in rows:
        assert sum(float(row[column]) for column in P_COLUMNS) == pytest.approx(1, abs=1e-4)

    # Learning from the file is learning from the model: the same losses at the first step, and the same student.
    columns = "--probability_columns", ",".join(P_COLUMNS)
    plain = ["--layer_mapping", "none", "--alpha", 1]
    run(distil, *command(moody_teacher, files, tmp_path / "asked", *plain))
    run(distil, *command(moody_teacher, (path, files[1]), tmp_path / "read", *plain, *columns))
    figures = [json.loads((tmp_path / out / "eval_results.json").read_text()) for out in ("asked", "read")]
    assert figures[0]["history"][-1]["soft_loss"] == pytest.approx(figures[1]["history"][-1]["soft_loss"], rel=1e-3)
    assert figures[0]["eval_accuracy"] == figures[1]["eval_accuracy"]
    assert "came with the training data (--probability_columns" in (tmp_path / "read" / "README.md").read_text()

    # Other probabilities are another experiment.
    written(path, ["review", "mood", *P_COLUMNS], *([row["review"], row["mood"], 1, 0, 0] for row in rows))
    with pytest.raises(SystemExit):
        run(
            distil,
            *command(moody_teacher, (path, files[1]), tmp_path / "read", *plain, *columns, "--resume_from_checkpoint"),
        )
    assert "is of another experiment: the data" in capsys.readouterr().err

    # With layers too, which the teacher still teaches.
    run(distil, *command(moody_teacher, (path, files[1]), tmp_path / "layers", *columns, "--alpha", 1))
    layers = json.loads((tmp_path / "layers" / "eval_results.json").read_text())
    assert layers["grad_share_hidden"] > 0 and layers["history"][-1]["soft_loss"] > 0


@pytest.mark.training
def test_without_a_teacher(moody_teacher, files, tmp_path, capsys):  # noqa: F811
    path = predicted(moody_teacher, files[0], tmp_path / "predicted")
    student = save_bert(tmp_path / "small", None, seed=3, num_hidden_layers=1)
    columns = "--probability_columns", ",".join(P_COLUMNS)
    more = ["--text_column", "review", "--label_column", "mood", *quick(tmp_path / "out"), *columns, "--alpha", 1]
    own = ["--train_file", path, "--validation_file", files[1], "--student_model", student]
    run(distil, *own, *more)
    results = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert results["history"][-1]["soft_loss"] > 0 and "teacher_eval_accuracy" not in results
    assert not (tmp_path / "out" / "layer_weights.csv").exists()

    # Texts without probabilities have nobody to ask.
    texts = table(tmp_path / "more.csv", [[text] for text, _ in examples(4, MOODS)])
    for options, complaint in (
        (["--unlabeled_file", texts], "and there is no --teacher_model to ask"),
        (["--alpha", 0], "nothing would be learnt from it with --alpha 0"),
        (["--metric_for_best_model", "agreement"], "--metric_for_best_model agreement"),
        (["--logit_columns", "p"], "give one of the two"),
    ):
        with pytest.raises(SystemExit):
            run(distil, *own, *more, "--overwrite_output_dir", *options)
        assert complaint in capsys.readouterr().err


@pytest.mark.training
def test_a_teacher_answers_where_no_probabilities_are(moody_teacher, files, tmp_path, capsys):  # noqa: F811
    path = predicted(moody_teacher, files[0], tmp_path / "predicted")
    texts = [text for text, _ in examples(8, MOODS, seed=4)]
    (tmp_path / "more.txt").write_text("\n".join(texts))
    more = ["--unlabeled_file", tmp_path / "more.txt", "--layer_mapping", "none", "--alpha", 1]
    columns = "--probability_columns", ",".join(P_COLUMNS)
    run(distil, *command(moody_teacher, (path, files[1]), tmp_path / "some", *more, *columns))
    assert "asking 1 teachers about 8 training rows" in capsys.readouterr().out
    run(distil, *command(moody_teacher, files, tmp_path / "asked", *more))
    losses = [
        json.loads((tmp_path / out / "eval_results.json").read_text())["history"][-1] for out in ("some", "asked")
    ]
    assert losses[0]["soft_loss"] == pytest.approx(losses[1]["soft_loss"], rel=1e-3)


@pytest.mark.training
def test_augmented_rows_are_trained_on(glue_dir, teacher, tmp_path):
    data = tmp_path / "glue" / "RTE"
    shutil.copytree(glue_dir / "RTE", data)
    lines = (data / "train.tsv").read_text().splitlines(keepends=True)
    (data / "train_aug.tsv").write_text("".join([*lines, *lines[1:]]))
    own = ["--teacher_model", teacher, "--student_layers", 2, "--task_name", "RTE", "--data_dir", data.parent]
    for out, more in (("plain", []), ("augmented", ["--aug_train"])):
        run(distil, *own, *quick(tmp_path / out), *more)
    plain, augmented = (
        json.loads((tmp_path / out / "eval_results.json").read_text())["global_step"] for out in ("plain", "augmented")
    )
    assert augmented == 2 * plain


def test_augmented_rows_of_a_glue_task(moody_teacher, files, tmp_path, capsys):  # noqa: F811
    options = ["--teacher_model", moody_teacher, "--student_layers", 2, *quick(tmp_path / "out"), "--aug_train"]
    for more, complaint in (
        (["--task_name", "RTE", "--data_dir", tmp_path], "train_aug.tsv; bert_emd/augment_data.py writes it"),
        (
            [
                "--train_file",
                files[0],
                "--validation_file",
                files[1],
                "--text_column",
                "review",
                "--label_column",
                "mood",
            ],
            "give your own augmented file as --train_file",
        ),
    ):
        with pytest.raises(SystemExit):
            run(distil, *options, *more)
        assert complaint in capsys.readouterr().err


@pytest.mark.training
def test_several_teachers(moody_teacher, files, tmp_path, capsys):  # noqa: F811
    second = tmp_path / "second"
    labelled = table(tmp_path / "labelled.csv", examples(12, MOODS, seed=5))
    more = ["--text_column", "review", "--label_column", "mood", *quick(second), "--do_train", "--learning_rate", 1e-2]
    own = ["--train_file", labelled, "--validation_file", files[1]]
    run(finetune, "--model_name_or_path", moody_teacher, *own, *more, "--seed", 8)
    both = f"{moody_teacher},{second}"
    run(distil, *command(both, files, tmp_path / "out", "--alpha", 1, "--logging_steps", 1))
    said = capsys.readouterr().out
    assert "2 teachers together" in said and "asking 2 teachers about 16 training rows" in said
    with np.load(tmp_path / "out" / "dev_predictions.npz") as found:
        together = torch.from_numpy(found["teacher_logits"]).softmax(dim=-1)
    each = [
        [[float(row[column]) for column in P_COLUMNS] for row in read_csv(predicted(model, files[1], out))]
        for model, out in ((moody_teacher, tmp_path / "p1"), (second, tmp_path / "p2"))
    ]
    np.testing.assert_allclose(together, np.mean(each, axis=0), atol=1e-4)
    # What they teach is the mean of their probabilities.
    paths = [predicted(model, files[0], tmp_path / name) for model, name in ((moody_teacher, "t1"), (second, "t2"))]
    one, other = map(read_csv, paths)
    mean = [
        [row["review"], row["mood"], *((float(row[name]) + float(more[name])) / 2 for name in P_COLUMNS)]
        for row, more in zip(one, other, strict=True)
    ]
    averaged = written(tmp_path / "mean.csv", ["review", "mood", *P_COLUMNS], *mean)
    columns = "--probability_columns", ",".join(P_COLUMNS)
    run(distil, *command(moody_teacher, (averaged, files[1]), tmp_path / "mean", *columns, "--alpha", 1))
    losses = [json.loads((tmp_path / out / "eval_results.json").read_text())["history"][-1] for out in ("out", "mean")]
    assert losses[0]["soft_loss"] == pytest.approx(losses[1]["soft_loss"], rel=1e-3)

    card = (tmp_path / "out" / "README.md").read_text()
    assert "| teacher 1 |" in card and "| teacher 2 |" in card and "averaged with those of" in card

    # A run that goes on must have the same ones.
    with pytest.raises(SystemExit):
        run(distil, *command(moody_teacher, files, tmp_path / "out", "--alpha", 1, "--resume_from_checkpoint"))
    assert "is of another experiment" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(distil, *command(both, files, tmp_path / "train", "--teacher_mode", "train"))
    assert "--teacher_mode train: several teachers" in capsys.readouterr().err
