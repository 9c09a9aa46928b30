"""A run in two processes is the run of one process on the same batches: losses, flows, layer weights, the student."""

import csv
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import warm
from conftest import ROOT, save_bert
from glue_files import write_task
from safetensors.numpy import load_file

from bert_finetune.samplers import SharedBatches

# Without --multi_gpu accelerate starts one process on a CPU, whatever --num_processes says; the script has --no_cuda.
ACCELERATE = "accelerate.commands.launch --multi_gpu --num_machines 1 --mixed_precision no --dynamo_backend no".split()
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node"],
    "accelerate": [*ACCELERATE, "--main_process_port", "0", "--num_processes"],
}
ROWS, STEP, EPOCHS = 27, 8, 2  # a last step of 3 rows: 2 for one process, 1 for the other
LONE_ROW = 25  # a last step of one row


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A narrow student without dropout, whose random numbers would differ between processes."""
    changes = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_hidden_layers": 2}
    folder = tmp_path_factory.mktemp("models") / "student"
    return save_bert(folder, None, seed=1, hidden_size=12, intermediate_size=24, **changes)


def launch(processes, launcher, script, *options):
    command = [
        *(ROOT / script, "--train_batch_size", STEP // processes, "--bf16", False, "--max_seq_length", 32),
        *("--num_train_epochs", EPOCHS, "--eval_step", 2, "--no_cuda", *options),
    ]
    if processes == 1:
        return [warm.start(*command)]
    if launcher == "warm":
        return warm.start_pair(*command, "--ddp_backend", "gloo")
    command = [sys.executable, "-m", *LAUNCHERS[launcher], processes, *command, "--ddp_backend", "gloo"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return [subprocess.Popen(list(map(str, command)), text=True, **pipes)]


def run_both(folder, launcher, *arguments):
    """The output folders of the same run in one process and in two."""
    outs = [folder / f"of-{count}" for count in (1, 2)]
    runs = [launch(count, launcher, *arguments, "--output_dir", out) for count, out in enumerate(outs, start=1)]
    for process in itertools.chain(*runs):
        error = process.communicate(timeout=300)[1]
        assert process.returncode == 0, error[-3000:]
    return outs


def left_by(out):
    """The numbers of a run, by name."""
    with np.load(out / "dev_predictions.npz") as predictions:
        numbers = load_file(out / "model.safetensors") | dict(predictions)
    if (out / "flows.npz").exists():
        with np.load(out / "flows.npz") as flows:
            numbers |= dict(flows)
        with open(out / "layer_weights.csv", newline="") as file:
            header, *rows = csv.reader(file)
        numbers |= dict(zip(header, np.array(rows, float).T, strict=True))
    history = json.loads((out / "eval_results.json").read_text())["history"]
    for entry in history:
        numbers |= {f"{name} at {entry['step']}": value for name, value in entry.items() if name.endswith("_loss")}
    return numbers


def assert_equal_runs(outs, start):
    one, two = map(left_by, outs)
    assert one.keys() == two.keys()
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
    before = load_file(start / "model.safetensors")
    assert max(np.abs(one[f"bert.{name}"] - value).max() for name, value in before.items()) > 1e-3


@pytest.mark.training
@pytest.mark.xdist_group("warm")
@pytest.mark.parametrize(
    ("launcher", "rows", "options"),
    [
        ("torchrun", ROWS, ["--teacher_cache", "none", "--learning_rate", "1e-3"]),
        # SGD follows the gradient's size, which AdamW does not.
        (
            "warm",
            LONE_ROW,
            [
                *("--teacher_cache", "disk", "--teacher_cache_dtype", "float32", "--optim", "sgd"),
                *("--learning_rate", "0.3", "--train_sampling_strategy", "random"),
                *("--gradient_accumulation_steps", "2", "--separate"),
                # At this rate the relative losses of so small a teacher would blow rounding up.
                *("--objective", "published", "--weight_momentum", "0"),
            ],
        ),
    ],
    ids=["AdamW, short last step", "SGD, cache, accumulation"],
)
def test_two_processes_equal_one(launcher, rows, options, teacher, student, tmp_path):
    data = write_task(tmp_path / "RTE", "RTE", train=rows, dev=13)
    models = ["--teacher_model", teacher, "--student_model", student, "--task_name", "RTE", "--data_dir", data]
    more = ["--alpha", 0.5, "--beta", 0.1, "--logging_steps", 1, *options]
    outs = run_both(tmp_path, launcher, "bert_emd/emd_task_distill.py", *models, *more)
    assert_equal_runs(outs, student)


@pytest.mark.training
@pytest.mark.xdist_group("warm")
def test_fine_tuning(student, tmp_path):
    data = write_task(tmp_path / "STS-B", "STS-B", train=ROWS, dev=13)
    options = ["--model_name_or_path", student, "--task_name", "STS-B", "--data_dir", data, "--do_train"]
    options += ["--optim", "sgd", "--learning_rate", 0.01, "--ddp_timeout", 300, "--ddp_bucket_cap_mb", 1]
    options += ["--ddp_broadcast_buffers", True, "--ddp_find_unused_parameters", True]
    outs = run_both(tmp_path, "accelerate", "bert_finetune/run_glue.py", *options)
    assert_equal_runs(outs, student)


@pytest.mark.parametrize("rows", [1, 3, 4, 8, 9, 10, 11, 16])
def test_shared_batches(rows):
    batches = SharedBatches(range(rows), 4, False, 2)
    dealt = list(batches)
    assert len(dealt) == len(batches) == 2 * -(-rows // 8)
    for k, (first, second) in enumerate(zip(dealt[::2], dealt[1::2], strict=True)):
        step = list(range(8 * k, min(8 * k + 8, rows)))
        assert first + second == (step if len(step) > 1 else 2 * step)
        assert len(first) - len(second) in (0, 1)
    assert list(SharedBatches(range(rows), 4, True, 2)) == dealt[: rows // 8 * 2]
