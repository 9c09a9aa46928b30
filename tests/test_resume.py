"""A run that is killed and resumed ends as if it had never been: same weights, layer weights, history, bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import warm
from conftest import ROOT

from bert_finetune.outputs import last_checkpoint

pytestmark = [pytest.mark.training, pytest.mark.xdist_group("warm")]


def command(teacher, glue_dir, out, *more):
    return [
        *(ROOT / "bert_emd/emd_task_distill.py", "--teacher_model", teacher, "--student_layers", "2"),
        *("--task_name", "RTE", "--data_dir", glue_dir / "RTE", "--output_dir", out, "--max_seq_length", "32"),
        *("--num_train_epochs", "8", "--train_batch_size", "4", "--eval_step", "4", "--logging_steps", "3"),
        *("--save_total_limit", "20", "--learning_rate", "1e-3", "--no_cuda", *more),
    ]


def distil(*arguments):
    process = warm.start(*command(*arguments))
    error = process.communicate(timeout=300)[1]
    assert process.returncode == 0, error[-3000:]


def kept(out):
    """What must not depend on an interruption."""
    results = json.loads((out / "eval_results.json").read_text())
    return {
        "weights": (out / "model.safetensors").read_bytes(),
        "layer weights": (out / "layer_weights.csv").read_text(),
        "flows": (out / "flows.npz").read_bytes(),
        "score": results["eval_accuracy"],
        "scores": [(entry["step"], entry["eval_accuracy"], entry["eval_loss"]) for entry in results["history"]],
    }


# A student with projections, and what else keeps a state of its own; checkpoints are rotated.
OTHER_OPTIONS = [
    *("--projection", "per_layer", "--optimizer", "bert_adam", "--train_sampling_strategy", "random", "--separate"),
    *("--gradient_accumulation_steps", "2", "--save_total_limit", "1"),
]


@pytest.fixture(scope="module")
def uninterrupted(teacher, glue_dir, tmp_path_factory):
    """By an interpreter of its own: what the others share, the seed of hashes above all, must not matter."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    subprocess.run([sys.executable, *map(str, command(teacher, glue_dir, out))], check=True)
    return out


@pytest.mark.parametrize("options", [[], OTHER_OPTIONS], ids=["defaults", "others"])
def test_killed_in_mid_training(options, uninterrupted, teacher, glue_dir, tmp_path):
    if options:
        distil(teacher, glue_dir, tmp_path / "whole", *options)
        uninterrupted = tmp_path / "whole"
    out = tmp_path / "out"
    process = warm.start(*command(teacher, glue_dir, out, *options))
    deadline = time.monotonic() + 240
    while not (out / "checkpoint-12" / "trainer_state.json").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1][-3000:]
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (out / "eval_results.json").exists()
    assert last_checkpoint(out) is not None
    # As if the kill had come while the next checkpoint was being written.
    shutil.copytree(last_checkpoint(out), out / "checkpoint-99")
    (out / "checkpoint-99" / "trainer_state.json").write_text('{"epoch": 3.0, "global_')
    distil(teacher, glue_dir, out, *options, "--resume_from_checkpoint")
    assert kept(out) == kept(uninterrupted)


@pytest.mark.parametrize("step", [4, 20])  # in mid-epoch, and near an epoch's end
def test_resume_from_a_named_checkpoint(step, uninterrupted, teacher, glue_dir, tmp_path):
    out = tmp_path / "out"
    for earlier in range(4, step + 1, 4):  # the best one is among them
        shutil.copytree(uninterrupted / f"checkpoint-{earlier}", out / f"checkpoint-{earlier}")
    distil(teacher, glue_dir, out, "--resume_from_checkpoint", out / f"checkpoint-{step}")
    assert kept(out) == kept(uninterrupted)


def test_resume_where_nothing_was_saved_yet_starts_over(uninterrupted, teacher, glue_dir, tmp_path):
    out = tmp_path / "out"
    half = out / ".saving-checkpoint-4" / "checkpoint-4"  # killed while the first one was being written
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")
    distil(teacher, glue_dir, out, "--resume_from_checkpoint")
    assert kept(out) == kept(uninterrupted)


def test_same_command_same_result(uninterrupted, teacher, glue_dir, tmp_path):
    distil(teacher, glue_dir, tmp_path / "out")
    assert kept(tmp_path / "out") == kept(uninterrupted)
