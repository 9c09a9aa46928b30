"""The README.md that a run leaves in its output folder."""

import json
import re
import sys

import pytest
import yaml
from conftest import save_bert

from bert_emd.emd_task_distill import main as distil
from bert_finetune.glue import TASKS
from bert_finetune.paths import command_for_others
from bert_finetune.run_glue import main as finetune

pytestmark = pytest.mark.training


def run(main, *argv):
    main([str(argument) for argument in argv])


def quick(out):
    return ["--output_dir", out, "--max_seq_length", 32, "--num_train_epochs", 1, "--train_batch_size", 8]


def rows(card):
    """The card's table as dicts by column name."""
    header, _, *lines = [line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("|")]
    return [dict(zip(header, line, strict=True)) for line in lines]


def test_student(teacher, glue_dir, tmp_path):
    out = tmp_path / "out"
    task = ["--task_name", "RTE", "--data_dir", glue_dir / "RTE", "--seed", 7]
    run(distil, "--teacher_model", teacher, "--student_layers", 2, *task, *quick(out))
    card = (out / "README.md").read_text()
    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head) == {"library_name": "transformers", "pipeline_tag": "text-classification"}
    assert "# license: yours to fill in" in head
    assert body.startswith("\n# 2-layer bert for RTE (entailment, not_entailment)\n")
    assert f"Distilled with BERT-EMD from `{teacher.name}`." in body
    assert "![Average flow between student and teacher layers](flow.png)" in body
    assert (out / "flow.png").read_bytes().startswith(b"\x89PNG")
    args = json.loads((out / "args.json").read_text())
    for part in (
        command_for_others(args["command"]),
        "\nSeed 7.\n",
        f"torch {args['versions']['torch']}",
        'model="out"',
        '"text_pair"',
    ):
        assert part in body
    assert str(tmp_path) not in body and sys.executable not in body
    results = json.loads((out / "eval_results.json").read_text())
    teachers, students = rows(card)
    assert teachers["model"] == "teacher" and students["model"] == "this model"
    assert float(teachers["accuracy"]) == round(results["teacher_eval_accuracy"], 4)
    assert float(students["accuracy"]) == round(results["eval_accuracy"], 4)
    assert teachers["layers x width"] == "4 x 24" and students["layers x width"] == "2 x 24"
    assert teachers["speed-up"] == "1.0 x" and float(students["a sentence"].removesuffix(" ms")) > 0
    size = (out / "model.safetensors").stat().st_size / 1e6
    assert abs(float(students["weights"].removesuffix(" MB")) - size) < 0.06


def test_fine_tuned_model_and_several_dev_sets(pretrained, glue_dir, tmp_path):
    out = tmp_path / "out"
    task = ["--task_name", "MNLI", "--data_dir", glue_dir]
    run(finetune, "--model_name_or_path", pretrained, *task, "--do_train", *quick(out))
    card = (out / "README.md").read_text()
    assert f"Fine-tuned from `{pretrained.name}`." in card and "flow.png" not in card
    (row,) = rows(card)
    assert {"matched_accuracy", "mismatched_accuracy"} <= set(row)


def test_students_without_layer_losses_have_no_picture(tmp_path, glue_dir):
    teacher = save_bert(tmp_path / "teacher", TASKS["RTE"].kind.output_names)
    task = ["--task_name", "RTE", "--data_dir", glue_dir]
    for more, said in (
        (["--layer_mapping", "none", "--alpha", 0], f"Fine-tuned from `{teacher.name}`. `{teacher.name}` took no part"),
        (["--layer_mapping", "none"], f"Distilled from the predictions of `{teacher.name}`."),
        (
            ["--use_att", False, "--use_rep", False],
            f"Distilled from the embeddings and predictions of `{teacher.name}`.",
        ),
        (["--num_train_epochs", 0], f"Distilled with BERT-EMD from `{teacher.name}`."),
    ):
        out = tmp_path / "-".join(map(str, more))
        run(distil, "--teacher_model", teacher, "--student_layers", 2, *task, *quick(out), *more)
        card = (out / "README.md").read_text()
        assert len(rows(card)) == 2 and "flow.png" not in card and not (out / "flow.png").exists()
        assert said in card


def test_figures_are_of_the_saved_model(tmp_path, glue_dir):
    teacher = save_bert(tmp_path / "teacher", TASKS["RTE"].kind.output_names)
    task = ["--task_name", "RTE", "--data_dir", glue_dir, "--head", "relu", "--bf16"]
    out = tmp_path / "out"
    run(distil, "--teacher_model", teacher, "--student_layers", 2, *task, *quick(out), "--layer_mapping", "uniform")
    card = (out / "README.md").read_text()
    assert "layer by layer under a fixed mapping" in card
    results = json.loads((out / "eval_results.json").read_text())
    teachers, students = rows(card)
    assert teachers["model"] == "teacher (with a relu before its classifier)"
    assert float(students["accuracy"]) == round(results["own_head_eval_accuracy"], 4)


def test_only_a_card_of_ours_is_replaced(pretrained, glue_dir, tmp_path, capsys):
    out = tmp_path / "out"
    task = ["--task_name", "RTE", "--data_dir", glue_dir, "--model_name_or_path", pretrained, "--do_train"]
    run(finetune, *task, *quick(out))
    card = (out / "README.md").read_text()
    (out / "README.md").write_text(card.replace("this model", "an earlier model"))
    run(finetune, *task, *quick(out), "--overwrite_output_dir")
    assert rows((out / "README.md").read_text()) and "an earlier model" not in (out / "README.md").read_text()
    (out / "README.md").write_text("my notes")
    run(finetune, *task, *quick(out), "--overwrite_output_dir")
    assert (out / "README.md").read_text() == "my notes"
    assert re.search("README.md: not written by a run, and left as it is", capsys.readouterr().out)
