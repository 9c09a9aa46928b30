"""A run in two processes is the run of one process on the same batches: losses, flows, layer weights, the student."""

import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, save_bert
from glue_files import write_task
from safetensors.numpy import load_file

ROWS, STEP, EPOCHS = 27, 8, 2  # a last step of 3 rows: 2 for one process, 1 for the other
LONE_ROW = 25  # a last step of one row


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A narrow student without dropout, whose random numbers would differ between processes."""
    changes = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_hidden_layers": 2}
    folder = tmp_path_factory.mktemp("models") / "student"
    return save_bert(folder, None, seed=1, hidden_size=12, intermediate_size=24, **changes)


def distil(processes, teacher, student, data, out, *options):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes] if processes > 1 else []
    command = [
        *(sys.executable, *launch, ROOT / "bert_emd/emd_task_distill.py", "--teacher_model", teacher),
        *("--student_model", student, "--task_name", "RTE", "--data_dir", data, "--output_dir", out, "--no_cuda"),
        *("--max_seq_length", 32, "--num_train_epochs", EPOCHS, "--train_batch_size", STEP // processes),
        *("--bf16", False, "--alpha", 0.5, "--beta", 0.1, "--logging_steps", 1, "--eval_step", 2, *options),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(list(map(str, command)), text=True, env=environment, **pipes)


def left_by(out):
    """The numbers of a run, by name."""
    with np.load(out / "flows.npz") as flows, np.load(out / "dev_predictions.npz") as predictions:
        numbers = {name: flows[name] for name in flows.files} | {name: predictions[name] for name in predictions.files}
    with open(out / "layer_weights.csv", newline="") as file:
        header, *rows = csv.reader(file)
    numbers["layer weights"] = np.array(rows, dtype=float)
    history = json.loads((out / "eval_results.json").read_text())["history"]
    for k, entry in enumerate(history):
        numbers |= {f"{name} {k}": value for name, value in entry.items()}
    return numbers | {"header": header} | load_file(out / "model.safetensors")


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (ROWS, ["--teacher_cache", "none", "--learning_rate", "1e-3"]),
        # SGD follows the gradient's size, which AdamW does not.
        (
            LONE_ROW,
            [
                *("--teacher_cache", "disk", "--teacher_cache_dtype", "float32", "--optim", "sgd"),
                *("--learning_rate", "0.3", "--train_sampling_strategy", "random"),
                *("--gradient_accumulation_steps", "2", "--separate"),
            ],
        ),
    ],
    ids=["AdamW, short last step", "SGD, cache, accumulation"],
)
def test_two_processes_equal_one(rows, options, teacher, student, tmp_path):
    data = write_task(tmp_path / "RTE", "RTE", train=rows, dev=13)
    runs = [distil(count, teacher, student, data, tmp_path / f"of-{count}", *options) for count in (1, 2)]
    for run in runs:
        error = run.communicate(timeout=300)[1]
        assert run.returncode == 0, error[-3000:]
    one, two = left_by(tmp_path / "of-1"), left_by(tmp_path / "of-2")
    assert one.keys() == two.keys() and one.pop("header") == two.pop("header")
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    start = load_file(student / "model.safetensors")
    moved = max(np.abs(one[f"bert.{name}"] - value).max() for name, value in start.items())
    assert moved > 1e-3
