"""What a run goes on from: the same experiment only, whole checkpoints only, the best one where it is said to be; and
nothing is lost by a kill or a power cut, or by a run that is replaced."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import warm
from conftest import save_bert
from glue_files import write_task
from mishaps import full_disk, snapshot

from bert_emd.emd_task_distill import main as distil
from bert_finetune import files, finishing, outputs, run_checkpoints, run_trainer
from bert_finetune.errors import InputError
from bert_finetune.glue import get_task
from bert_finetune.run_checkpoints import checkpoints, fault_of, keep, last_checkpoint, last_good_checkpoint
from bert_finetune.run_glue import main as fine_tune

pytestmark = pytest.mark.training

KILLS = int(os.environ.get("FUZZ_KILLS", 3))
EPOCHS, EVERY = 2, 2  # 24 rows of 8: 6 steps, checkpoints 2, 4, 6


@pytest.fixture(scope="module")
def world(tmp_path_factory, teacher, small_student):
    """Models and data that a test may change."""
    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(teacher, folder / "teacher")
    shutil.copytree(small_student, folder / "student")
    write_task(folder / "RTE", "RTE")
    return folder


def distillation(world, out, *more):
    return [
        *f"--teacher_model {world / 'teacher'} --student_model {world / 'student'} --task_name RTE".split(),
        *f"--data_dir {world / 'RTE'} --output_dir {out} --max_seq_length 32 --train_batch_size 8".split(),
        *f"--num_train_epochs {EPOCHS} --eval_step {EVERY} --logging_steps 1 --learning_rate 1e-3 --no_cuda".split(),
        *("--save_total_limit", "9", *map(str, more)),
    ]


def fine_tuning(world, out, *more):
    return [
        *f"--model_name_or_path {world / 'student'} --task_name RTE --data_dir {world / 'RTE'}".split(),
        *f"--output_dir {out} --max_seq_length 32 --train_batch_size 8 --num_train_epochs {EPOCHS}".split(),
        *f"--eval_step {EVERY} --learning_rate 1e-3 --no_cuda --do_train --save_total_limit 9".split(),
        *map(str, more),
    ]


SCRIPTS = {"distillation": (distil, distillation), "fine-tuning": (fine_tune, fine_tuning)}


@pytest.fixture(scope="module", params=SCRIPTS)
def finished(request, world, tmp_path_factory):
    """A run that went through: script, its options, its folder."""
    script, options = SCRIPTS[request.param]
    out = tmp_path_factory.mktemp("runs") / "out"
    script(options(world, out))
    return script, options, out


def weights(out):
    return (out / "model.safetensors").read_bytes()


def stopped(whole: Path, out: Path, step: int) -> Path:
    """The folder of a run that was stopped after the checkpoint of `step`."""
    out.mkdir()
    for checkpoint in checkpoints(whole):
        if int(checkpoint.name.split("-")[1]) <= step:
            shutil.copytree(checkpoint, out / checkpoint.name)
    shutil.copy(whole / "args.json", out)
    return out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--learning_rate", "1e-4"], "--learning_rate was 0.001, now 0.0001"),
        (["--train_batch_size", "4"], "rows of a batch was 8, now 4"),
        (["--seed", "7"], "--seed was 42, now 7"),
        (["--max_seq_length", "24"], "--max_seq_length was 32, now 24"),
        (["--num_train_epochs", "1"], "--num_train_epochs was 2.0, now 1.0"),
        (["--eval_step", "3"], "--eval_steps was 2, now 3"),
        (["--gradient_accumulation_steps", "2"], "--gradient_accumulation_steps was 1, now 2"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_another_experiment_is_refused_by_name(change, said, finished, world, tmp_path, exits_with_2):
    script, options, whole = finished
    out = stopped(whole, tmp_path / "out", 2)
    before = snapshot(out)
    line = exits_with_2(script, *options(world, out, *change, "--resume_from_checkpoint"))
    assert "checkpoint-2: is of another experiment: " in line and said in line
    assert snapshot(out) == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--beta", "7", "--cost_attention", "softmax2"], "normalize, now softmax2, --beta was 10.0, now 7.0"),
        (["--student_layers", "2"], "leave it or --student_model out"),
        (["--teacher_cache", "none"], "the teacher's answers was kept in bfloat16, now asked for at each step"),
    ],
    ids=["beta", "student_layers", "teacher_cache"],
)
def test_another_distillation_is_refused_by_name(change, said, world, tmp_path, exits_with_2):
    out = tmp_path / "out"
    distil(distillation(world, out, "--max_steps", 4))
    line = exits_with_2(distil, *distillation(world, out, "--max_steps", 4, *change, "--resume_from_checkpoint"))
    assert said in line


def test_other_models_and_data_under_the_same_names_are_refused(world, tmp_path, exits_with_2):
    mine = tmp_path / "world"
    shutil.copytree(world, mine)
    out = tmp_path / "out"
    distil(distillation(mine, out, "--max_steps", 2))
    for said, part, change in (
        ("the teacher was ", "teacher", lambda: save_bert(mine / "teacher", get_task("RTE").kind.output_names, seed=9)),
        ("the student as it starts was ", "student", lambda: save_bert(
            mine / "student", None, seed=9, hidden_size=12, num_hidden_layers=2, intermediate_size=24
        )),
        ("the data was ", "RTE", lambda: write_task(mine / "RTE", "RTE", seed=9)),
    ):  # fmt: skip
        change()
        line = exits_with_2(distil, *distillation(mine, out, "--max_steps", 4, "--resume_from_checkpoint"))
        assert said in line and line.count(" was ") == 1
        shutil.rmtree(mine / part)
        shutil.copytree(world / part, mine / part)


def test_what_may_change_may(finished, world, tmp_path):
    script, options, whole = finished
    out = stopped(whole, tmp_path / "out", 2)
    moved = tmp_path / "moved"
    shutil.copytree(world, moved)
    more = ["--logging_steps", 5, "--eval_batch_size", 3, "--report_to", "none", "--save_total_limit", 2]
    script(options(moved, out, *more, "--resume_from_checkpoint"))
    assert weights(out) == weights(whole)


def test_a_run_may_be_made_longer(finished, world, tmp_path):
    script, options, whole = finished
    out = stopped(whole, tmp_path / "out", 6)
    script(options(world, out, "--num_train_epochs", EPOCHS + 1, "--resume_from_checkpoint"))
    assert json.loads((out / "eval_results.json").read_text())["history"][-1]["step"] == 9


def test_every_start_has_an_entry_and_counts_its_seconds(finished, world, tmp_path):
    script, options, whole = finished
    out = stopped(whole, tmp_path / "out", 4)
    marker = out / "checkpoint-4" / "complete.json"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"seconds": 1000.0}))
    script(options(world, out, "--resume_from_checkpoint"))
    entry = json.loads((out / "args.json").read_text())
    (before,) = entry["earlier_starts"]
    assert before["options"]["resume_from_checkpoint"] is None and before["started"] <= entry["started"]
    assert entry["options"]["resume_from_checkpoint"] == "last"
    assert 1000 < json.loads((out / "eval_results.json").read_text())["train_seconds"] < 1100


def test_a_moved_folder_ends_with_the_same_best_model(finished, world, tmp_path, monkeypatch):
    """Stopped, moved, and gone on with from another working directory."""
    script, options, whole = finished
    (tmp_path / "elsewhere").mkdir()
    stopped(whole, tmp_path / "elsewhere" / "out", 6)
    monkeypatch.chdir(tmp_path / "elsewhere")
    script(options(world, "out", "--resume_from_checkpoint"))
    out = tmp_path / "elsewhere" / "out"
    assert weights(out) == weights(whole)
    results = [json.loads((folder / "eval_results.json").read_text()) for folder in (out, whole)]
    assert results[0]["global_step"] == results[1]["global_step"]
    best = out / f"checkpoint-{results[0]['global_step']}" / "model.safetensors"
    assert best.read_bytes() == weights(out)


def test_a_best_checkpoint_that_is_gone_is_an_error(finished, world, tmp_path, exits_with_2):
    script, options, whole = finished
    out = stopped(whole, tmp_path / "out", 6)
    best = json.loads((whole / "eval_results.json").read_text())["global_step"]
    shutil.rmtree(out / f"checkpoint-{best}")
    there = [path.name for path in checkpoints(out)]
    if best == 6:
        pytest.skip("the last step is the best")
    line = exits_with_2(script, *options(world, out, "--resume_from_checkpoint"))
    assert f"checkpoint-{best}: the run's best checkpoint is gone; there is {', '.join(there)}" in line


DAMAGE = {
    "no optimizer": (lambda c: (c / "optimizer.pt").unlink(), "has no optimizer.pt"),
    "no schedule": (lambda c: (c / "scheduler.pt").unlink(), "has no scheduler.pt"),
    "no random state": (lambda c: next(c.glob("rng_state*")).unlink(), "has no rng_state"),
    "another byte": (lambda c: flip(c / "model.safetensors"), "its model.safetensors is damaged"),
    "cut": (lambda c: (c / "trainer_state.json").write_text('{"epoch'), "its trainer_state.json is damaged"),
    "marker": (lambda c: (c / "complete.json").write_text("{"), "its complete.json is damaged"),
}


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_or_refused(name, finished, world, tmp_path, exits_with_2, capsys):
    script, options, whole = finished
    out = stopped(whole, tmp_path / "out", 4)
    damage, fault = DAMAGE[name]
    damage(out / "checkpoint-4")
    line = exits_with_2(script, *options(world, out, "--resume_from_checkpoint", out / "checkpoint-4"))
    assert f"checkpoint-4: {fault}" in line
    script(options(world, out, "--resume_from_checkpoint"))
    assert f"checkpoint-4: {fault}" in capsys.readouterr().out
    assert weights(out) == weights(whole)


def test_a_checkpoint_without_optimizer_is_not_gone_on_from(world, tmp_path, exits_with_2):
    out = tmp_path / "out"
    fine_tune(fine_tuning(world, out, "--save_only_model", "True", "--max_steps", 2))
    more = ["--save_only_model", "True", "--max_steps", 4]
    line = exits_with_2(fine_tune, *fine_tuning(world, out, *more, "--resume_from_checkpoint", out / "checkpoint-2"))
    assert "checkpoint-2: has no optimizer.pt" in line


def test_what_a_run_did_not_write_stays(world, tmp_path, exits_with_2):
    """A user's own files that are named like checkpoints."""
    out = tmp_path / "out"
    fine_tune(fine_tuning(world, out, "--max_steps", 2))
    shutil.copytree(out / "checkpoint-2", out / "checkpoint-best")
    (out / "checkpoint-notes.txt").write_text("mine")
    (out / "checkpoint-half").mkdir()
    mine = {name: value for name, value in snapshot(out).items() if name.startswith(("checkpoint-b", "checkpoint-n"))}
    fine_tune(fine_tuning(world, out, "--max_steps", 4, "--resume_from_checkpoint"))
    fine_tune(fine_tuning(world, out, "--max_steps", 2, "--overwrite_output_dir", "--save_total_limit", 1))
    left = snapshot(out)
    assert {name: left[name] for name in mine} == mine and (out / "checkpoint-half").is_dir()
    (out / "checkpoint-7").mkdir()
    line = exits_with_2(fine_tune, *fine_tuning(world, out, "--overwrite_output_dir"))
    assert "checkpoint-7: no run made this, and a checkpoint may have to lie there; move it elsewhere" in line


class Fails(Exception):
    pass


@pytest.mark.parametrize("where", ["Trainer.__init__", "Trainer.training_step"])
def test_a_run_that_is_replaced_goes_once_the_new_one_has_something(where, world, tmp_path, monkeypatch):
    out = tmp_path / "out"
    fine_tune(fine_tuning(world, out, "--max_steps", 2))
    (out / "mine.txt").write_text("mine")
    for name in ("onnx", "openvino", "other"):  # exports of its model, and something else
        (out / name).mkdir()
        (out / name / ("notes.txt" if name == "openvino" else "export.json")).write_text("{}")
    before = snapshot(out)

    def fails(*args, **kwargs):
        raise Fails

    with monkeypatch.context() as patch:
        patch.setattr(f"transformers.{where}", fails)
        with pytest.raises(Fails):
            fine_tune(fine_tuning(world, out, "--overwrite_output_dir", "--seed", 5))
    assert snapshot(out) == before
    fine_tune(fine_tuning(world, out, "--overwrite_output_dir", "--seed", 5))
    assert not (out / ".replaced").exists() and (out / "mine.txt").exists()
    assert not (out / "onnx").exists() and (out / "openvino").exists() and (out / "other").exists()
    assert json.loads((out / "args.json").read_text())["seed"] == 5 and weights(out) != before["model.safetensors"]


def test_a_replacing_run_that_was_killed_leaves_the_earlier_one(world, tmp_path, exits_with_2):
    out = tmp_path / "out"
    fine_tune(fine_tuning(world, out, "--max_steps", 2))
    before = weights(out)
    outputs._set_aside(out)  # and then the kill
    assert "already holds a run" in exits_with_2(fine_tune, *fine_tuning(world, out))
    outputs._set_aside(out)
    assert (out / ".replaced" / "model.safetensors").read_bytes() == before
    outputs._put_back(out)
    assert weights(out) == before and not (out / ".replaced").exists()


class Disk:
    """What a power cut would leave of a folder: flushed contents under names that were flushed too, as they were after
    each operation. Without a flush a file is there, and empty."""

    def __init__(self, folder: Path, monkeypatch):
        self.folder, self.states = folder, [{}]
        self._contents: dict[Path, bytes] = {}
        for name in ("flush", "rename", "remove"):
            original = getattr(files, name)
            for module in (files, run_checkpoints, outputs, run_trainer):
                if getattr(module, name, None) is original:
                    monkeypatch.setattr(module, name, self._recording(name, original))

    def _recording(self, name, original):
        def recorded(path, *more):
            original(path, *more)
            if name == "flush" and Path(path).is_file():
                self._contents[Path(path)] = Path(path).read_bytes()
            if name == "rename":
                target = Path(more[0])
                for kept in [kept for kept in self._contents if kept == path or Path(path) in kept.parents]:
                    self._contents[target / kept.relative_to(path)] = self._contents.pop(kept)
            self.states.append(
                {
                    found: self._contents.get(found, b"") if found.is_file() else None
                    for found in sorted(self.folder.rglob("*"))
                    if "runs" not in found.parts
                }
            )

        return recorded

    def after_a_cut(self, k: int, folder: Path) -> Path:
        """The folder as it is left where the power goes after operation k."""
        folder.mkdir()
        for path, content in self.states[k].items():
            place = folder / path.relative_to(self.folder)
            if content is None:
                place.mkdir(parents=True, exist_ok=True)
            else:
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(content)
        return folder


def test_a_power_cut_at_any_instant_loses_no_checkpoint(world, tmp_path, monkeypatch):
    """Every prefix of what a run does to its disk can be gone on from, and ends with the reference's weights."""
    out = tmp_path / "out"
    options = ["--save_total_limit", 1]
    disk = Disk(out, monkeypatch)
    fine_tune(fine_tuning(world, out, *options))
    monkeypatch.undo()
    reference = weights(out)
    assert len(disk.states) > 60
    done, resumed = 0, {}
    for k in range(len(disk.states)):
        left = disk.after_a_cut(k, tmp_path / f"cut-{k}")
        last = last_good_checkpoint(left)
        steps = int(last.name.split("-")[1]) if last else 0
        if not (left / "eval_results.json").exists():  # then the last one may go
            assert steps >= done, f"operation {k} lost checkpoint-{done}"
        done = max(done, steps)
        # What is gone on from decides all that comes after: each different one is gone on from once.
        state = tuple(sorted((path.name, (path / "complete.json").read_text()) for path in checkpoints(left)))
        if state not in resumed:
            fine_tune(fine_tuning(world, left, *options, "--resume_from_checkpoint"))
            resumed[state] = weights(left)
    assert done == 6 and len(resumed) >= 4
    assert all(found == reference for found in resumed.values())


def test_killed_at_random_instants(world, tmp_path):
    """A run is started until it is through, each time killed at some instant; `make fuzz` kills 200 times."""

    def start(out, *more):
        return warm.start("bert_emd/emd_task_distill.py", *distillation(world, out, "--save_total_limit", 1, *more))

    process, began = start(tmp_path / "whole"), time.monotonic()  # not with the time that its server takes to start
    assert process.wait(timeout=300) == 0
    seconds, draw, kills = time.monotonic() - began, random.Random(0), 0
    reference = weights(tmp_path / "whole")
    while kills < KILLS:
        out = tmp_path / f"after-{kills}"
        while True:
            process = start(out, "--resume_from_checkpoint")
            try:
                code = process.wait(timeout=draw.uniform(0, 1.2 * seconds) if kills < KILLS else 300)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.communicate()
                kills += 1
                continue
            assert code == 0, process.communicate()[1][-3000:]
            break
        assert weights(out) == reference, out


def test_a_kill_while_a_checkpoint_is_removed_leaves_none_that_is_half_there(tmp_path, monkeypatch):
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "complete.json").write_text("{}")

    def killed(folder):
        (folder / "complete.json").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        keep(tmp_path, 1, None)
    assert checkpoints(tmp_path) == [tmp_path / "checkpoint-4"]
    assert run_checkpoints.not_of_a_run(tmp_path) is None


def test_a_folder_that_nothing_can_be_written_in_any_more(world, tmp_path, monkeypatch, exits_with_2):
    """As it clears up behind the first checkpoint, or as it begins the second; the first one stays."""
    out = tmp_path / "out"

    def read_only(path):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    for function, named in (("remove", out), ("begin", out / "checkpoint-4")):
        with monkeypatch.context() as patch:
            patch.setattr(run_trainer, function, read_only)
            resumed = ["--resume_from_checkpoint"] * out.exists()
            line = exits_with_2(fine_tune, *fine_tuning(world, out, *resumed))
        assert f"error: {named}: cannot be written: Read-only file system" in line
        assert [path.name for path in checkpoints(out)] == ["checkpoint-2"]
    fine_tune(fine_tuning(world, out, "--resume_from_checkpoint"))
    assert [path.name for path in checkpoints(out)] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_no_old_figures_beside_new_weights(world, tmp_path, monkeypatch, exits_with_2):
    """A finished run that goes on for longer, and whose disk is full once its new weights are there."""
    out, last = tmp_path / "out", ["--load_best_model_at_end", "False"]
    fine_tune(fine_tuning(world, out, *last))
    before, original = weights(out), finishing.write_eval_results

    def on_a_full_disk(*args):
        with full_disk(40):
            original(*args)

    longer = fine_tuning(world, out, *last, "--num_train_epochs", 3, "--resume_from_checkpoint")
    with monkeypatch.context() as patch:
        patch.setattr(finishing, "write_eval_results", on_a_full_disk)
        assert f"{out}/eval_results.json: cannot be written" in exits_with_2(fine_tune, *longer)
    assert weights(out) != before
    assert not [*out.glob("eval_results.*"), *out.glob("*_predictions.npz")]
    fine_tune(longer)
    assert json.loads((out / "eval_results.json").read_text())["history"][-1]["epoch"] == 3


def test_a_run_that_cannot_save_its_first_result_leaves_the_earlier_one(world, tmp_path, monkeypatch, exits_with_2):
    out = tmp_path / "out"
    fine_tune(fine_tuning(world, out))
    before = snapshot(out)
    original = finishing.save_classifier

    def on_a_full_disk(*args):
        with full_disk(20_000):
            original(*args)

    monkeypatch.setattr(finishing, "save_classifier", on_a_full_disk)
    words = fine_tuning(world, out, "--save_strategy", "no", "--overwrite_output_dir")
    assert "cannot be written" in exits_with_2(fine_tune, *words)
    assert snapshot(out) == before


def test_keep(tmp_path):
    for step in (2, 4, 10, 6):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "complete.json").write_text("{}")
    (tmp_path / "checkpoint-best").mkdir()
    names = [path.name for path in checkpoints(tmp_path)]
    assert names == ["checkpoint-2", "checkpoint-4", "checkpoint-6", "checkpoint-10"]
    keep(tmp_path, None, None)
    assert [path.name for path in checkpoints(tmp_path)] == names
    keep(tmp_path, 2, tmp_path / "checkpoint-2")
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-6", "checkpoint-10"]
    keep(tmp_path, 1, tmp_path / "checkpoint-10")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10" and len(checkpoints(tmp_path)) == 1
    assert fault_of(tmp_path / "checkpoint-best") == "not a complete checkpoint folder"
    with pytest.raises(InputError, match="is of another experiment: --beta was 1, now 2, the teacher was a, now b"):
        (tmp_path / "checkpoint-10" / "complete.json").write_text(
            json.dumps({"experiment": {"beta": 1, "the teacher": "a", "max_steps": 5}})
        )
        run_checkpoints.check_same_experiment(
            tmp_path / "checkpoint-10", {"beta": 2, "the teacher": "b", "max_steps": 9}
        )
