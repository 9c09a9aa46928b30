"""Every bad input ends with exit code 2 and one line that names what is wrong; what was there before is left alone."""

import shutil

import pytest
import torch
from conftest import save_bert
from glue_files import FORMATS, rows, write_task, write_tsv
from safetensors.torch import load_file

from bert_emd.emd_task_distill import main as distil
from bert_finetune.run_glue import main as finetune
from bert_finetune.trainer import QuietProgress

RTE = ["entailment", "not_entailment"]


@pytest.fixture
def world(tmp_path, teacher, pretrained, small_student):
    """A good teacher, student and data set, each a copy that a case may break, and an output folder."""
    for name, folder in (("teacher", teacher), ("pretrained", pretrained), ("student", small_student)):
        shutil.copytree(folder, tmp_path / name)
    write_task(tmp_path / "data", "RTE")
    return tmp_path


def distil_command(world, *more):
    return [
        *("--teacher_model", world / "teacher", "--student_model", world / "student", "--task_name", "RTE"),
        *("--data_dir", world / "data", "--output_dir", world / "out", "--max_seq_length", 32, *more),
    ]


def finetune_command(world, *more):
    return [
        *("--model_name_or_path", world / "pretrained", "--task_name", "RTE", "--data_dir", world / "data"),
        *("--do_train", "--output_dir", world / "out", "--max_seq_length", 32, *more),
    ]


COMMANDS = {finetune: finetune_command, distil: distil_command}
HEADER = FORMATS["RTE"][0]
ROWS = rows("RTE", "train", 3)

# How the data is broken, and what the message says.
BAD_DATA = {
    "no file": (lambda data: (data / "train.tsv").unlink(), "train.tsv: no such file"),
    "no dev file": (lambda data: (data / "dev.tsv").unlink(), "dev.tsv: no such file"),
    "empty": (lambda data: (data / "train.tsv").write_text(""), "train.tsv: the file holds no row"),
    "header only": (lambda data: write_tsv(data / "train.tsv", HEADER, []), "train.tsv: the file holds no row"),
    "no column": (
        lambda data: write_tsv(data / "train.tsv", ["index", "premise", "sentence2", "label"], ROWS),
        "no column 'sentence1'; its columns are index, premise, sentence2, label",
    ),
    "a label": (
        lambda data: write_tsv(data / "train.tsv", HEADER, [ROWS[0], [*ROWS[1][:3], "maybe"]]),
        "train.tsv, line 3: label 'maybe' is not one of RTE's: entailment, not_entailment",
    ),
    "a short row": (
        lambda data: write_tsv(data / "dev.tsv", HEADER, [ROWS[0], ROWS[1][:2]]),
        "dev.tsv, line 3: 2 tab-separated fields where 4 are needed",
    ),
    "not text": (lambda data: (data / "train.tsv").write_bytes(b"\xff\xfe\x00"), "train.tsv, line 1: not UTF-8"),
    "a folder": (
        lambda data: ((data / "train.tsv").unlink(), (data / "train.tsv").mkdir()),
        "train.tsv: cannot be read",
    ),
}


@pytest.mark.parametrize("script", COMMANDS, ids=["finetune", "distil"])
@pytest.mark.parametrize("case", BAD_DATA)
def test_data(script, case, world, exits_with_2):
    damage, message = BAD_DATA[case]
    damage(world / "data")
    assert message in exits_with_2(script, *COMMANDS[script](world))
    assert not (world / "out").exists()


BAD_OPTIONS = {
    "unknown task": (["--task_name", "XNLI"], "--task_name XNLI: no such task; choose one of CoLA"),
    "no number": (["--learning_rate", "fast"], "argument --learning_rate/--learning-rate: invalid float value: 'fast'"),
    "unknown option": (["--learning_rat", "1"], "unrecognized arguments: --learning_rat 1"),
    "too long": (["--max_seq_length", "65"], "--max_seq_length 65: the model has only 64 positions"),
    "too short": (["--max_seq_length", "4"], "--max_seq_length 4 leaves no room for text"),
    "no data folder": (["--data_dir", "nowhere"], "train.tsv: no such file"),
    "bad checkpoint": (["--resume_from_checkpoint", "nowhere"], "--resume_from_checkpoint nowhere: not a complete"),
    "batch size": (["--train_batch_size", "0"], "--train_batch_size 0: must be at least 1"),
    "seed": (["--seed", "-1"], "--seed -1: must be from 0"),
    "batch larger than the data": (
        ["--dataloader_drop_last", "--train_batch_size", "25"],
        "--dataloader_drop_last: the training file has 24 rows, fewer than a batch of 25",
    ),
    "strategy": (["--save_strategy", "sometimes"], "sometimes is not a valid SaveStrategy"),
}


@pytest.mark.parametrize("script", COMMANDS, ids=["finetune", "distil"])
@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_options(script, case, world, exits_with_2):
    options, message = BAD_OPTIONS[case]
    assert message in exits_with_2(script, *COMMANDS[script](world, *options))
    assert not list((world / "out").glob("*"))


@pytest.mark.parametrize("missing", ["--task_name", "--data_dir"])
@pytest.mark.parametrize("script", COMMANDS, ids=["finetune", "distil"])
def test_required_options(script, missing, world, exits_with_2):
    command = COMMANDS[script](world)
    at = command.index(missing)
    assert f"the following arguments are required: {missing}" in exits_with_2(script, *command[:at], *command[at + 2 :])


def test_finetune_models(world, exits_with_2):
    assert "no such folder" in exits_with_2(finetune, *finetune_command(world, "--model_name_or_path", world / "no"))
    line = exits_with_2(finetune, *finetune_command(world, "--model_type", "roberta"))
    assert f"--model_type roberta: {world / 'pretrained'} is a bert" in line
    line = exits_with_2(finetune, *finetune_command(world)[:-5], "--output_dir", world / "out")
    assert "nothing to do: give --do_train, --do_eval or --do_predict" in line


# A broken pair of models: what is changed, extra options, the message.
BAD_MODELS = {
    "no teacher": (lambda w: shutil.rmtree(w / "teacher"), [], "--teacher_model {w}/teacher: no such folder"),
    "no head": (
        lambda w: save_bert(w / "teacher", None),
        [],
        "--teacher_model {w}/teacher: not a fine-tuned classifier, it has no weights for classifier.bias",
    ),
    "another task's teacher": (
        lambda w: save_bert(w / "teacher", ["contradiction", "entailment", "neutral"]),
        [],
        "its 3 labels (contradiction, entailment, neutral) do not fit RTE (entailment, not_entailment)",
    ),
    "other class names": (
        lambda w: save_bert(w / "teacher", ["negative", "positive"]),
        [],
        "its labels (negative, positive) are not RTE's",
    ),
    "heads": (
        lambda w: save_bert(w / "student", None, num_attention_heads=2, num_hidden_layers=2),
        [],
        "the student has 2 attention heads and the teacher 3",
    ),
    "vocabulary": (
        lambda w: save_bert(w / "student", None, vocabulary=["other", "words"], num_hidden_layers=2),
        [],
        "its vocabulary (7 tokens) is not that of --teacher_model",
    ),
    "too many layers": (
        lambda w: None,
        ["--student_model", "", "--student_layers", "5"],
        "--student_layers 5: the teacher has 4 layers",
    ),
    "no student": (lambda w: None, ["--student_model", ""], "give --student_model, or --student_layers"),
    "widths": (lambda w: None, ["--projection", "none"], "--projection none: the student is 12 wide, the teacher 24"),
    "mapping": (
        lambda w: save_bert(w / "student", None, num_hidden_layers=1),
        ["--layer_mapping", "skip"],
        "--layer_mapping skip: gives no pairs for 1 student and 4 teacher layers",
    ),
    "unknown mapping": (lambda w: None, ["--layer_mapping", "emb"], "invalid choice: 'emb'"),
    "damaged student": (
        lambda w: (w / "student" / "model.safetensors").write_bytes(b"x" * 100),
        [],
        "--student_model {w}/student: cannot be loaded",
    ),
    "teacher too short": (
        lambda w: save_bert(w / "teacher", RTE, max_position_embeddings=16),
        [],
        "--max_seq_length 32: the model has only 16 positions",
    ),
    "two students": (lambda w: None, ["--student_layers", "2"], "leave it or --student_model out"),
    "temperature": (lambda w: None, ["--T", "0"], "--T 0.0: must be above 0"),
    "temperature of the costs": (lambda w: None, ["--T_emd", "-1"], "--T_emd -1.0: must be above 0"),
    "alpha": (lambda w: None, ["--alpha", "1.5"], "--alpha 1.5: must be from 0 to 1"),
    "beta": (lambda w: None, ["--beta", "-1"], "--beta -1.0: must be 0 or more"),
    "no loss left": (
        lambda w: None,
        ["--one_step", "False", "--layer_mapping", "none"],
        "no loss is left to train with",
    ),
    "label smoothing": (
        lambda w: None,
        ["--label_smoothing_factor", "0.1"],
        "--label_smoothing_factor: is not supported in distillation",
    ),
    "checkpointing": (
        lambda w: None,
        ["--gradient_checkpointing"],
        "--gradient_checkpointing: is not supported in distillation",
    ),
    "padding": (lambda w: None, ["--count_padding"], "--count_padding: needs --pad_to_max_length"),
    "a recipe's padding": (
        lambda w: None,
        ["--recipe", "authors-2022", "--pad_to_max_length", "False"],
        "--count_padding: needs --pad_to_max_length",
    ),
    "metric": (lambda w: None, ["--metric_for_best_model", "f1"], "--metric_for_best_model f1: RTE has loss, accuracy"),
    "output below a file": (
        lambda w: (w / "file").write_text("mine"),
        ["--output_dir", "{w}/file/out"],
        "--output_dir {w}/file/out: {w}/file is a file, not a folder",
    ),
    "output holds the input": (
        lambda w: None,
        ["--output_dir", "{w}"],
        "--output_dir {w}: {w}/teacher is also read from",
    ),
    "output is input": (
        lambda w: None,
        ["--output_dir", "{w}/teacher"],
        "--output_dir {w}/teacher: {w}/teacher is also read from; choose another folder",
    ),
    "output is a file": (
        lambda w: (w / "out").write_text("mine"),
        [],
        "--output_dir {w}/out: {w}/out is a file, not a folder",
    ),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_distil_models(case, world, exits_with_2):
    damage, options, message = BAD_MODELS[case]
    damage(world)
    options = [option.format(w=world) for option in options]
    assert message.format(w=world) in exits_with_2(distil, *distil_command(world, *options))
    assert not (world / "out").is_dir()


def test_no_teacher_option(world, exits_with_2):
    assert "--teacher_model is missing" in exits_with_2(distil, *distil_command(world)[2:])


@pytest.mark.parametrize("script", COMMANDS, ids=["finetune", "distil"])
def test_output_folder_that_holds_a_run(script, world, exits_with_2):
    command = [str(part) for part in COMMANDS[script](world, "--max_steps", 1)]
    (world / "out").mkdir()
    (world / "out" / "notes.txt").write_text("mine")
    script(command)
    before = {path: path.stat().st_mtime_ns for path in (world / "out").rglob("*") if path.is_file()}
    line = exits_with_2(script, *command)
    assert "already holds a run; choose another folder, or give --overwrite_output_dir" in line
    assert {path: path.stat().st_mtime_ns for path in (world / "out").rglob("*") if path.is_file()} == before
    script([*command, "--overwrite_output_dir"])
    assert (world / "out" / "notes.txt").read_text() == "mine"
    assert len(list((world / "out").rglob("events.out.tfevents.*"))) == 1


@pytest.mark.parametrize("script", COMMANDS, ids=["finetune", "distil"])
@pytest.mark.parametrize("broken_by", [5, 6])  # between two checkpoints; just before one is due
def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(script, broken_by, world, exits_with_2, monkeypatch):
    original = QuietProgress.on_step_end

    def diverge(self, args, state, control, model=None, **kwargs):
        # The step's update leaves weights beyond what float32 holds, as a learning rate that is far too high does.
        if state.global_step == broken_by:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1e38)
        original(self, args, state, control, **kwargs)

    monkeypatch.setattr(QuietProgress, "on_step_end", diverge)
    command = COMMANDS[script](world, "--save_steps", 2, "--train_batch_size", 4, "--num_train_epochs", 3)
    line = exits_with_2(script, *command)
    assert "at step 6; nothing was saved after it" in line
    assert f"the last good checkpoint is {world / 'out' / 'checkpoint-4'}" in line
    assert not (world / "out" / "model.safetensors").exists()
    assert not (world / "out" / "checkpoint-6").exists()
    weights = load_file(world / "out" / "checkpoint-4" / "model.safetensors")
    assert all(torch.isfinite(value).all() for value in weights.values())


def test_a_learning_rate_far_too_high(world, exits_with_2):
    line = exits_with_2(distil, *distil_command(world, "--learning_rate", "1e30", "--warmup_steps", 0))
    assert "not finite" in line or "loss is" in line
    # Nothing of it stands in the way of the corrected command.
    distil([str(part) for part in distil_command(world, "--max_steps", 1)])
