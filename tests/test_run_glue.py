import json

import numpy as np
import pytest
from conftest import SHARED, official_head
from glue_files import rows
from transformers import AutoModelForSequenceClassification, pipeline

from bert_finetune.data import load_split
from bert_finetune.glue import TASKS
from bert_finetune.run_glue import main

pytestmark = pytest.mark.training


def command(pretrained, glue_dir, task, out, *more):
    """The seed document's command."""
    return [
        *("--model_type", "bert", "--model_name_or_path", pretrained, "--task_name", task, "--do_train", "--do_eval"),
        *("--do_lower_case", "--data_dir", glue_dir / task, "--max_seq_length", 32),
        *("--per_gpu_train_batch_size", 8, "--learning_rate", "1e-3", "--num_train_epochs", "2.0"),
        *("--save_steps", 2, "--output_dir", out, "--evaluate_during_training", "--overwrite_output_dir", "--no_cuda"),
        *more,
    ]


def run(*argv):
    main([str(argument) for argument in argv])


@pytest.mark.parametrize("task", list(TASKS))
def test_every_task_trains_with_the_seed_document_s_command(task, pretrained, glue_dir, tmp_path, capsys):
    run(*command(pretrained, glue_dir, task, tmp_path / "out", "--do_predict"))
    out = tmp_path / "out"
    results = json.loads((out / "eval_results.json").read_text())
    assert results["task"] == task
    assert [entry["step"] for entry in results["history"]] == [2, 4, 6]
    checkpoint = json.loads((out / f"checkpoint-{results['global_step']}/trainer_state.json").read_text())
    logged = {entry["step"]: entry for entry in checkpoint["log_history"] if TASKS[task].best_metric in entry}
    for entry in results["history"][: len(logged)]:  # each with its own figures, the last one too
        assert entry[TASKS[task].best_metric] == logged[entry["step"]][TASKS[task].best_metric]
    best = max(results["history"], key=lambda entry: entry[TASKS[task].best_metric])
    assert results[TASKS[task].best_metric] == pytest.approx(best[TASKS[task].best_metric], abs=1e-6)
    assert f"task = {task}\n" in (out / "eval_results.txt").read_text()
    if task == "MNLI":
        assert "eval_mismatched_accuracy" in results
    with np.load(out / "dev_predictions.npz") as kept:
        for split, file in TASKS[task].dev.items():
            name, prefix = (f"{split}/", f"{split}_") if len(TASKS[task].dev) > 1 else ("", "")
            logits, labels = kept[f"{name}logits"], kept[f"{name}labels"]
            assert list(labels) == list(load_split(TASKS[task], glue_dir / task / file, "dev")["label"])
            for figure, value in TASKS[task].measure(logits, labels).items():
                assert value == pytest.approx(results[f"eval_{prefix}{figure}"], abs=1e-6)
    for name in TASKS[task].submission.values():
        assert len((out / name).read_text().splitlines()) == 1 + 6
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(lines) == 3 and all("losses: train " in line and "dev: " in line for line in lines)


def test_output_folder(pretrained, glue_dir, tmp_path):
    out = tmp_path / "out"
    run(*command(pretrained, glue_dir, "RTE", out))
    model, info = AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.id2label == {0: "entailment", 1: "not_entailment"}
    answer = pipeline("text-classification", model=str(out))({"text": "the cat runs", "text_pair": "the dog sings"})
    assert answer["label"] in ("entailment", "not_entailment")
    args = json.loads((out / "args.json").read_text())
    assert args["options"]["learning_rate"] == 1e-3 and args["versions"]["torch"] and args["seed"] == 42
    assert list((out / "runs").rglob("events.out.tfevents.*"))


def test_same_seed_same_model_and_another_seed_another(pretrained, glue_dir, tmp_path):
    weights = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        run(*command(pretrained, glue_dir, "CoLA", tmp_path / name, "--seed", seed))
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def test_a_model_trained_in_float16_is_looked_at_on_a_cpu_too(pretrained, glue_dir, tmp_path, capsys):
    run(*command(pretrained, glue_dir, "RTE", tmp_path / "out"))
    trained = json.loads((tmp_path / "out/eval_results.json").read_text())
    args = json.loads((tmp_path / "out/args.json").read_text())
    args["options"]["fp16"] = True
    (tmp_path / "out/args.json").write_text(json.dumps(args))
    options = ["--model_name_or_path", tmp_path / "out", "--task_name", "RTE", "--data_dir", glue_dir, "--use_cpu"]
    run(*options, "--do_eval", "--output_dir", tmp_path / "look")
    said = capsys.readouterr().out
    assert f"{tmp_path / 'out'}: trained in float16, which needs a GPU; looked at in float32" in said
    assert f"dev: accuracy {trained['eval_accuracy']:.4f} loss {trained['eval_loss']:.4f}" in said


def test_evaluate_and_predict_without_training(teacher, glue_dir, tmp_path, capsys):
    options = ["--model_name_or_path", teacher, "--task_name", "RTE", "--data_dir", glue_dir, "--max_seq_length", 32]
    run(*options, "--do_eval", "--do_predict", "--output_dir", tmp_path / "out")
    assert "dev: accuracy" in capsys.readouterr().out
    predictions = [line.split("\t")[1] for line in (tmp_path / "out/RTE.tsv").read_text().splitlines()[1:]]
    classify = pipeline("text-classification", model=str(teacher))
    pairs = [{"text": row[1], "text_pair": row[2]} for row in rows("RTE", "test", 6)]
    assert predictions == [answer["label"] for answer in classify(pairs)]


def test_nothing_is_left_in_the_folder_one_works_from(teacher, glue_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--model_name_or_path", teacher, "--task_name", "RTE", "--data_dir", glue_dir, "--max_seq_length", 32]
    run(*options, "--do_eval", "--output_dir", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] in ([], ["out"])


@pytest.mark.skipif(not (SHARED / "glue_data").exists(), reason="the official files are not here")
@pytest.mark.parametrize("task", ["RTE", "STS-B"])
def test_official_data_with_the_packaged_model(task, packaged_model, tmp_path):
    """A short run on real text, end to end, to dev figures that transformers' own pipeline gives as well."""
    data, out = official_head(task, tmp_path / "data"), tmp_path / "out"
    run(
        *("--model_name_or_path", packaged_model, "--task_name", task, "--data_dir", data, "--do_train"),
        *("--max_seq_length", 256, "--train_batch_size", 4, "--max_steps", 2, "--output_dir", out),
        *("--save_strategy", "no", "--load_best_model_at_end", False),
    )
    results = json.loads((out / "eval_results.json").read_text())
    dev = load_split(TASKS[task], data / "dev.tsv", "dev")
    kind = "none" if task == "STS-B" else "softmax"
    classify = pipeline("text-classification", model=str(out), function_to_apply=kind, top_k=None)
    names = TASKS[task].kind.output_names
    answers = classify([{"text": row["text_a"], "text_pair": row["text_b"]} for row in dev])
    scores = np.array([[{a["label"]: a["score"] for a in answer}[name] for name in names] for answer in answers])
    for name, value in TASKS[task].measure(scores, np.array(dev["label"])).items():
        assert results[f"eval_{name}"] == pytest.approx(value, abs=1e-4)
