import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHARED, official_head, save_bert
from glue_files import write_task
from transformers import AutoModelForSequenceClassification, PreTrainedModel, pipeline

from bert_emd.arguments import read_options
from bert_emd.emd_task_distill import main
from bert_emd.objectives import LayerCosts
from bert_emd.recipes import has_bf16
from bert_finetune.glue import TASKS
from bert_finetune.run_glue import main as run_glue

pytestmark = pytest.mark.training


def command(teacher, glue_dir, out, *more, task="RTE", student=("--student_layers", 2)):
    return [
        *("--teacher_model", teacher, *student, "--task_name", task, "--data_dir", glue_dir / task),
        *("--output_dir", out, "--max_seq_length", 32, "--num_train_epochs", 2, "--train_batch_size", 8, "--no_cuda"),
        *more,
    ]


def run(*argv):
    main([str(argument) for argument in argv])


def results(out):
    return json.loads((out / "eval_results.json").read_text())


def weights_csv(out):
    with open(out / "layer_weights.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("task", list(TASKS))
def test_every_task(task, glue_dir, tmp_path):
    teacher = save_bert(tmp_path / "teacher", TASKS[task].kind.output_names)
    out = tmp_path / "out"
    run(*command(teacher, glue_dir, out, "--do_train", "--do_predict", task=task))
    found = results(out)
    assert np.isfinite(found[TASKS[task].best_metric]) and np.isfinite(found[f"teacher_{TASKS[task].best_metric}"])
    entry = found["history"][-1]
    for name in ("train", "attention", "hidden", "embedding", "soft"):
        assert entry[f"{name}_loss"] > 0
    model, info = AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and model.config.num_hidden_layers == 2
    assert list(model.config.id2label.values()) == (TASKS[task].kind.output_names)
    for name in TASKS[task].submission.values():
        assert len((out / name).read_text().splitlines()) == 1 + 6


def test_outputs(teacher, glue_dir, tmp_path, capsys):
    out = tmp_path / "out"
    run(*command(teacher, glue_dir, out, "--eval_step", 2, "--logging_steps", 1))
    printed = capsys.readouterr().out
    assert "recipe recommended" in printed and "--beta 1.0" in printed
    assert "teacher: 4 layers x 24" in printed and "student from the teacher's layers 2, 4" in printed
    assert sum(line.startswith("step ") for line in printed.splitlines()) == 3
    with np.load(out / "flows.npz") as flows:
        assert flows["attention_flow"].shape == flows["hidden_flow"].shape == (6, 2, 4)
        np.testing.assert_allclose(flows["attention_flow"].sum(axis=(1, 2)), 1, atol=1e-9)
        np.testing.assert_array_equal(flows["steps"], range(1, 7))
    table = weights_csv(out)
    assert [row["step"] for row in table] == list("123456")
    assert float(table[-1]["hidden_student_1"]) + float(table[-1]["hidden_student_2"]) == pytest.approx(1, abs=1e-5)
    assert table[-1]["attention_teacher_4"] == table[-1]["hidden_teacher_4"]  # merged
    assert json.loads((out / "args.json").read_text())["options"]["beta"] == 1.0
    assert list((out / "runs").rglob("events.out.tfevents.*"))
    answer = pipeline("text-classification", model=str(out))({"text": "the cat runs", "text_pair": "the dog sings"})
    assert answer["label"] in TASKS["RTE"].kind.output_names


def test_a_narrower_student_with_its_own_checkpoint(teacher, small_student, glue_dir, tmp_path):
    out = tmp_path / "out"
    run(*command(teacher, glue_dir, out, student=("--student_model", small_student)))
    model = AutoModelForSequenceClassification.from_pretrained(out)
    assert model.config.hidden_size == 12
    assert not any("projection" in name for name in model.state_dict())


@pytest.mark.parametrize(
    ("mapping", "layers", "pairs"),
    [
        ("uniform", "2", "1-2, 2-4"),
        ("skip", "2", "1-2"),
        ("last", "2", "1-3"),
        ("skip", "3", "1-2, 2-3"),
        ("uniform", "5", "1-1, 2-2, 3-3, 4-4, 5-4"),  # of a student with more layers than its teacher
        ("last", "5", "1-1, 2-1, 3-2, 4-3"),
        ("emd", "5", None),
    ],
)
def test_layers_learn_from_those_that_are_printed(mapping, layers, pairs, teacher, glue_dir, tmp_path, capsys):
    out, student = tmp_path / "out", ("--student_layers", layers)
    if int(layers) > 4:
        names = TASKS["RTE"].kind.output_names
        student = ("--student_model", save_bert(tmp_path / "student", names, num_hidden_layers=int(layers)))
    run(*command(teacher, glue_dir, out, "--layer_mapping", mapping, "--max_steps", 2, student=student))
    printed = capsys.readouterr().out
    with np.load(out / "flows.npz") as flows:
        for branch in ("attention_flow", "hidden_flow"):
            flow = flows[branch].mean(axis=0)
            assert flow.shape == (int(layers), 4) and flow.sum() == pytest.approx(1)
            found = ", ".join(f"{i + 1}-{j + 1}" for i, j in np.argwhere(flow))
            assert found == pairs if pairs else len(np.argwhere(flow)) >= 5
    assert (f"layer mapping, student-teacher: {pairs}\n" in printed) == bool(pairs)


def test_plain_fine_tuning_is_that_of_run_glue(teacher, glue_dir, tmp_path):
    student = save_bert(tmp_path / "student", TASKS["RTE"].kind.output_names, num_hidden_layers=2)
    same = ["--learning_rate", "1e-3", "--max_steps", 3, "--logging_steps", 1, "--bf16", "False", "--seed", 5]
    plain = ["--layer_mapping", "none", "--alpha", 0]
    run(*command(teacher, glue_dir, tmp_path / "ours", *same, *plain, student=("--student_model", student)))
    options = json.loads((tmp_path / "ours/args.json").read_text())["options"]
    same += ["--lr_scheduler_type", options["lr_scheduler_type"], "--warmup_steps", options["warmup_steps"]]
    same += ["--weight_decay", options["weight_decay"], "--train_batch_size", 8, "--max_seq_length", 32, "--no_cuda"]
    where = ["--task_name", "RTE", "--data_dir", glue_dir, "--output_dir", tmp_path / "theirs", "--do_train"]
    run_glue([str(argument) for argument in ("--model_name_or_path", student, *where, *same)])
    ours, theirs = (results(tmp_path / name)["history"][-1] for name in ("ours", "theirs"))
    assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-6)
    assert ours["hard_loss"] == pytest.approx(ours["train_loss"], rel=1e-6)
    assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=1e-6)


def test_with_one_branch_off_only_the_other_shapes_the_weights(teacher, glue_dir, tmp_path):
    for off, on in (("att", "hidden"), ("rep", "attention")):
        rows = []
        for more in ([], ["--separate"]):
            out = tmp_path / "-".join([off, *more])
            run(*command(teacher, glue_dir, out, "--logging_steps", 1, f"--use_{off}", "False", *more))
            rows.append([{k: v for k, v in row.items() if k.startswith(on)} for row in weights_csv(out)])
        merged, separate = rows
        assert merged == separate and merged[-1][f"{on}_student_1"] != "0.500000"


def test_weights_stay_uniform_without_cost_attention(teacher, glue_dir, tmp_path):
    for name, option in (("a", ["--update_weight", "False"]), ("b", ["--cost_attention", "none"])):
        run(*command(teacher, glue_dir, tmp_path / name, "--logging_steps", 2, *option))
        for row in weights_csv(tmp_path / name):
            assert row["hidden_student_1"] == row["attention_student_2"] == "0.500000"
            assert row["hidden_teacher_3"] == "0.250000"


@pytest.mark.parametrize("option", ["--separate", "--seperate"])
def test_two_sets_of_weights(option, teacher, glue_dir, tmp_path):
    run(*command(teacher, glue_dir, tmp_path / "out", "--logging_steps", 2, option))
    row = weights_csv(tmp_path / "out")[-1]
    assert row["attention_student_1"] != row["hidden_student_1"]


def test_recipe_values_give_way_to_the_command_line(teacher, glue_dir, tmp_path):
    arguments = [str(a) for a in command(teacher, glue_dir, tmp_path / "out", task="MRPC")]
    distillation, task_args, args = read_options(arguments, "")
    assert (distillation.beta, distillation.alpha, args.learning_rate) == (1.0, 0.5, 1e-4)  # cut from the teacher
    assert (args.num_train_epochs, task_args.max_seq_length) == (2, 32)
    distillation, _, args = read_options(
        [*arguments, "--beta", "0.5", "--learning_rate", "1e-3", "--warmup_proportion", "0.2"], ""
    )
    assert (distillation.beta, args.learning_rate, args.warmup_steps) == (0.5, 1e-3, 0.2)


@pytest.mark.parametrize(("recipe", "cost_attention"), [("authors-2022", "normalize"), ("authors-2020", "softmax2")])
def test_authors_recipes(recipe, cost_attention, small_student, glue_dir, tmp_path, capsys):
    out, teacher = tmp_path / "out", save_bert(tmp_path / "teacher", TASKS["MRPC"].kind.output_names)
    options = ["--recipe", recipe, "--max_steps", 3, "--train_batch_size", 9]
    run(*command(teacher, glue_dir, out, *options, task="MRPC", student=("--student_model", small_student)))
    printed = capsys.readouterr().out
    options = json.loads((out / "args.json").read_text())["options"]
    expected = {
        "recipe": recipe,
        "cost_attention": cost_attention,
        "teacher_mode": "train",
        "head": "relu",
        "projection": "shared",
        "optimizer": "bert_adam",
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.01,
        "count_padding": True,
        "pad_to_max_length": True,
        "dataloader_drop_last": True,
        "train_sampling_strategy": "random",
        "metric_for_best_model": "accuracy",
        "eval_steps": 50,
        "alpha": 1.0,
        "T_emd": 10,
        "max_seq_length": 32,  # given on the command line; the recipe's is 64
    }
    assert {name: options[name] for name in expected} == expected
    assert f"recipe {recipe}" in printed and "--optimizer bert_adam" in printed
    found = results(out)
    assert found["eval_loss"] != found["own_head_eval_loss"]
    assert "figures are with a relu before the classifier; the saved model as it is:" in printed
    # A finished student is measured as it was trained, or as the plain model that is saved.
    for head, figures in ((), "eval"), (("--head", "own"), "own_head_eval"):
        run(*command(teacher, glue_dir, out, "--do_eval", *head, task="MRPC", student=()))
        line = capsys.readouterr().out.splitlines()[-1]
        assert f"f1 {found[f'{figures}_f1']:.4f} loss {found[f'{figures}_loss']:.4f}" in line


def test_dropping_the_last_training_batch_keeps_every_dev_and_test_row(teacher, glue_dir, tmp_path):
    out = tmp_path / "out"
    run(
        *command(teacher, glue_dir, out, "--dataloader_drop_last", "--do_train", "--do_predict", "--eval_batch_size", 5)
    )
    assert len((out / "RTE.tsv").read_text().splitlines()) == 1 + 6
    accuracy = results(out)["eval_accuracy"]
    assert accuracy * 12 == pytest.approx(round(accuracy * 12))  # all 12 dev rows, not 10


def test_two_stages(teacher, small_student, glue_dir, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    run(*command(teacher, glue_dir, first, "--one_step", "False", student=("--student_model", small_student)))
    entry = results(first)["history"][-1]
    assert entry["hidden_loss"] > 0 and "soft_loss" not in entry
    run(*command(teacher, glue_dir, second, "--pred_distill", student=("--student_model", first)))
    entry = results(second)["history"][-1]
    assert entry["soft_loss"] > 0 and "hidden_loss" not in entry
    assert not (second / "flows.npz").exists()


def test_the_teacher_is_not_changed(teacher, glue_dir, tmp_path):
    before = (teacher / "model.safetensors").read_bytes()
    run(*command(teacher, glue_dir, tmp_path / "out", "--teacher_mode", "train", "--head", "relu"))
    assert (teacher / "model.safetensors").read_bytes() == before


def test_evaluate_a_finished_student(teacher, glue_dir, tmp_path, capsys):
    out = tmp_path / "out"
    run(*command(teacher, glue_dir, out))
    accuracy = results(out)["eval_accuracy"]
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    for model in (["--student_model", out], []):
        capsys.readouterr()
        run(*command(teacher, glue_dir, out, "--do_eval", student=model))
        assert f"dev: accuracy {accuracy:.4f}" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    run(*command(teacher, glue_dir, out, "--do_predict", student=[]))
    assert (out / "RTE.tsv").exists()


def test_a_student_learns(tmp_path):
    """On a task whose first word tells the label, EMD distillation gets an untrained student to the teacher's level."""
    from bert_finetune.run_glue import main as finetune

    data = write_task(tmp_path / "data" / "SST-2", "SST-2", train=400, dev=100)
    pretrained = save_bert(tmp_path / "pretrained", None)
    shared = ["--task_name", "SST-2", "--data_dir", str(data), "--max_seq_length", "32", "--learning_rate", "2e-3"]
    shared += ["--num_train_epochs", "4"]
    finetune(
        ["--model_name_or_path", str(pretrained), "--do_train", *shared, "--output_dir", str(tmp_path / "teacher")]
    )
    run("--teacher_model", tmp_path / "teacher", "--student_layers", 2, *shared, "--output_dir", tmp_path / "out")
    found = results(tmp_path / "out")
    assert found["teacher_eval_accuracy"] > 0.95
    assert found["eval_accuracy"] > 0.9
    first, last = found["history"][0], found["history"][-1]
    assert last["hidden_loss"] < first["hidden_loss"] and last["attention_loss"] < first["attention_loss"]


@pytest.mark.skipif(not (SHARED / "glue_data").exists(), reason="the official files are not here")
@pytest.mark.parametrize("task", ["RTE", "STS-B"])
def test_official_data_with_the_packaged_model(task, packaged_model, tmp_path):
    from bert_finetune.run_glue import main as finetune

    data = official_head(task, tmp_path / "data")
    shared = ["--task_name", task, "--data_dir", str(data), "--max_seq_length", "48", "--max_steps", "4"]
    shared += ["--train_batch_size", "8", "--save_strategy", "no", "--load_best_model_at_end", "False"]
    teacher = tmp_path / "teacher"
    finetune(["--model_name_or_path", str(packaged_model), "--do_train", *shared, "--output_dir", str(teacher)])
    run("--teacher_model", teacher, "--student_layers", 3, *shared, "--output_dir", tmp_path / "out")
    found = results(tmp_path / "out")
    assert np.isfinite(found[TASKS[task].best_metric]) and np.isfinite(found["eval_loss"])
    with np.load(tmp_path / "out" / "flows.npz") as flows:
        assert flows["hidden_flow"].shape[1:] == (3, 6)


def assert_same_history(ours, theirs, **tolerance):
    for entry, expected in zip(ours["history"], theirs["history"], strict=True):
        assert entry == pytest.approx(expected, **tolerance)


@pytest.fixture
def shallow_teacher(tmp_path):
    """Compiling takes as long as there are layers, and pairs of them."""
    return save_bert(tmp_path / "teacher", TASKS["RTE"].kind.output_names, num_hidden_layers=1)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_comparison_of_layers(shallow_teacher, glue_dir, tmp_path):
    options, student = ["--beta", 1], ["--student_layers", 1]
    run(*command(shallow_teacher, glue_dir, tmp_path / "eager", *options, student=student))
    run(*command(shallow_teacher, glue_dir, tmp_path / "compiled", *options, "--torch_compile", student=student))
    assert_same_history(results(tmp_path / "compiled"), results(tmp_path / "eager"), rel=1e-3)


def test_compiled_models(shallow_teacher, glue_dir, tmp_path, monkeypatch):
    """As on a GPU, but with a compiler backend that needs none and only traces."""
    options, student = ["--beta", 1], ["--student_layers", 1]
    run(*command(shallow_teacher, glue_dir, tmp_path / "eager", *options, student=student))
    compiled = []
    monkeypatch.setattr("bert_finetune.run_trainer._NOT_COMPILED", ())
    monkeypatch.setattr("bert_emd.task_distillation.LayerCosts", lambda *args: LayerCosts(*args[:2]))
    monkeypatch.setattr(
        PreTrainedModel,
        "compile",
        lambda self, **options: compiled.append(options) or torch.nn.Module.compile(self, **options),
    )
    options += ["--torch_compile", "--torch_compile_backend", "eager"]
    run(*command(shallow_teacher, glue_dir, tmp_path / "out", *options, student=student))
    assert compiled == [{"dynamic": True, "backend": "eager"}] * 3  # the teacher is measured first
    assert_same_history(results(tmp_path / "out"), results(tmp_path / "eager"), rel=1e-3)
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")


def test_bfloat16_is_the_default_where_the_hardware_has_it(teacher, glue_dir, tmp_path, monkeypatch, capsys):
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    if "flags" in flags:
        assert has_bf16(use_cpu=True) == ("avx512_bf16" in flags or "amx_bf16" in flags)
    monkeypatch.setattr("bert_emd.arguments.has_bf16", lambda use_cpu: True)
    for more, expected in (
        ([], True),
        (["--bf16", "False"], False),
        (["--recipe", "authors-2022"], False),
        (["--recipe", "authors-2022", "--bf16"], True),
    ):
        arguments = command(teacher, glue_dir, tmp_path / "out", *more)
        assert read_options([str(argument) for argument in arguments], "")[2].bf16 == expected
    run(*command(teacher, glue_dir, tmp_path / "bf16", "--beta", 1))
    run(*command(teacher, glue_dir, tmp_path / "float32", "--beta", 1, "--bf16", "False"))
    ours, theirs = results(tmp_path / "bf16"), results(tmp_path / "float32")
    assert (ours["precision"], theirs["precision"]) == ("bfloat16", "float32")
    # Who loads the saved model has it in float32, and these figures are there too.
    run(*command(teacher, glue_dir, tmp_path / "bf16", "--do_eval", "--bf16", "False", student=[]))
    line = capsys.readouterr().out.splitlines()[-1]
    assert f"dev: accuracy {ours['float32_eval_accuracy']:.4f} agreement " in line
    assert "measured in bfloat16; of this model in float32: accuracy" in (tmp_path / "bf16/README.md").read_text()
    assert not any(name.startswith("float32") for name in theirs)
    assert_same_history(ours, theirs, rel=0.1, abs=0.1)
    assert ours["history"] != theirs["history"]
