"""The schedule is tested with stand-ins for the two scripts (suite_scripts.py), the whole way once with the scripts."""

import datetime
import functools
import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import suite_scripts
import warm
from conftest import ROOT
from suite_scripts import is_alive, record, starts, states, wait_for, wait_until, write_plan
from transformers import BertConfig, T5Config

import experiments.engines
import experiments.estimate
import experiments.execution
import experiments.plan
import experiments.progress
from bert_emd.recipes import CUT, OTHERS
from bert_finetune.errors import InputError
from experiments import compare_results, run_suite
from experiments.engines import MEMORY_PER_RUN, RayEngine, local_environments
from experiments.estimate import RunTime, estimate
from experiments.plan import read_plan
from experiments.progress import Progress
from experiments.suite import record_of


@pytest.fixture
def plan(tmp_path, glue_dir, pretrained):
    return functools.partial(write_plan, tmp_path / "plan.toml", glue_dir, pretrained)


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    for name in ("TEACHER_SCRIPT", "STUDENT_SCRIPT"):
        monkeypatch.setattr(experiments.plan, name, getattr(experiments.plan, name))  # put back in the end
    suite_scripts.use_stand_ins(tmp_path)


def suite(plan, out, *more) -> None:
    run_suite.main([str(plan), "--output_dir", str(out), *map(str, more)])


def start(plan, out, tmp_path, **options) -> warm.Process:
    """The suite in a process of its own, with the stand-ins."""
    script = ROOT / "tests/suite_scripts.py"
    return warm.start(script, tmp_path, plan, "--output_dir", out, "--jobs", "2", **options)


@pytest.mark.slow
def test_a_grid_in_order_and_once(plan, stand_ins, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(6), raising=False)
    path, out = (
        plan(("[methods.none]", "[sizes.two]\n[sizes.one]\nstudent_layers = 1\n[methods.none]")),
        tmp_path / "out",
    )
    suite(path, out, "--jobs", 2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "[0/18] 18 runs to go, 2 side by side" and lines[-1] == "18 done, 0 failed, 0 skipped"
    assert len([line for line in lines if " done in " in line]) == 18
    assert (out / "plan.toml").read_text() == path.read_text()
    students = [
        f"{task}/{size}/{method}/seed-{seed}"
        for task in ("RTE", "MRPC")
        for size in ("two", "one")
        for method in ("none", "emd")
        for seed in (1, 2)
    ]
    assert states(out) == dict.fromkeys(sorted([*students, "RTE/teacher", "MRPC/teacher"]), "done")
    order = [run.name for run in read_plan(path).runs(out) if not run.is_teacher]
    assert order == sorted(students, key=lambda name: (students.index(name) // 4, name[-1]))  # seed by seed in a size
    one = record(out / "RTE/one/emd/seed-2")
    assert (one["task"], one["size"], one["method"], one["seed"], one["returncode"]) == ("RTE", "one", "emd", 2, 0)
    assert "--student_layers 1 --task_name RTE" in one["command"]
    assert f"--seed 2 --teacher_model {out}/RTE/teacher --output_dir {out}/RTE/one/emd/seed-2" in one["command"]
    # Half of the cores for each; the whole output is kept.
    assert not [*out.glob("**/checkpoint-*")]
    assert "threads 3 gpu" in (out / "RTE/one/emd/seed-2.log").read_text()

    # Nothing is repeated, and what the plan has more is run; what a killed suite had no time to remove goes.
    (out / "RTE/one/emd/seed-2/checkpoint-1").mkdir()
    path.write_text(path.read_text().replace("seeds = [1, 2]", "seeds = [1, 2, 3]"))
    suite(path, out)
    assert {len(starts(p.parent)) for p in out.glob("**/starts")} == {1} and len([*out.glob("**/starts")]) == 26
    assert not [*out.glob("**/checkpoint-*")]


@pytest.mark.slow
def test_a_failed_run_does_not_stop_the_others(plan, stand_ins, tmp_path, capsys):
    path, out = plan(('layer_mapping = "none"', "weight_decay = 13")), tmp_path / "out"
    with pytest.raises(SystemExit) as exit_info:
        suite(path, out)
    said = capsys.readouterr()
    assert exit_info.value.code == 1 and "6 done, 4 failed, 0 skipped" in said.out
    assert f"RTE/none/seed-1: script.py: error: an unlucky number; see {out}/RTE/none/seed-1.log" in said.err
    assert record(out / "RTE/none/seed-1")["returncode"] == 1 and record(out / "RTE/emd/seed-2")["state"] == "done"
    with pytest.raises(SystemExit):
        suite(path, out)
    assert starts(out / "RTE/none/seed-1") == ["new", "resumed"] and starts(out / "RTE/emd/seed-2") == ["new"]
    assert (out / "RTE/none/seed-1/checkpoint-1").exists() and not (out / "RTE/emd/seed-2/checkpoint-1").exists()


@pytest.mark.slow
def test_students_of_a_failed_teacher_are_skipped(plan, stand_ins, tmp_path, capsys):
    path, out = plan(("[student]", "[teacher.RTE]\nweight_decay = 13\n[student]")), tmp_path / "out"
    with pytest.raises(SystemExit) as exit_info:
        suite(path, out)
    assert exit_info.value.code == 1 and "5 done, 1 failed, 4 skipped" in capsys.readouterr().out
    assert states(out)["RTE/teacher"] == "failed" and states(out)["RTE/emd/seed-1"] == "skipped"
    # Its options mended, and what it left removed, all are run.
    path.write_text(path.read_text().replace("= 13", "= 12"))
    (out / "RTE/teacher/starts").unlink(), (out / "RTE/teacher/checkpoint-1").rmdir(), (out / "RTE/teacher").rmdir()
    suite(path, out)
    assert set(states(out).values()) == {"done"} and starts(out / "MRPC/teacher") == ["new"]


@pytest.mark.slow
@pytest.mark.xdist_group("warm")
def test_killed_with_the_suite_and_started_again(plan, stand_ins, tmp_path):
    more = "student_layers = 2\nlogging_steps = 300"
    path, out = plan(("student_layers = 2", more), ("[1, 2]", "[1]"), ("[methods.emd]", "")), tmp_path / "out"
    killed = start(path, out, tmp_path)
    running = [out / task / "none/seed-1" for task in ("RTE", "MRPC")]
    wait_for(lambda: all((folder / "starts").exists() for folder in running), killed)
    # A second suite in the same folder is refused.
    second = start(path, out, tmp_path)
    assert (
        second.communicate(timeout=120)[1]
        == f"suite_scripts.py: error: --output_dir {out}: another suite is running there\n"
    )
    assert second.returncode == 2
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    pids = [int((folder / "starts").read_text().split()[0]) for folder in running]
    wait_until(lambda: not any(map(is_alive, pids)))
    assert [record(folder)["state"] for folder in running] == ["running"] * 2
    suite(path, out, "--jobs", 2)
    assert len(states(out)) == 4 and set(states(out).values()) == {"done"}
    assert [starts(folder) for folder in running] == [["new", "resumed"]] * 2
    assert starts(out / "RTE/teacher") == ["new"]


@pytest.mark.slow
@pytest.mark.xdist_group("warm")
def test_interrupted(plan, tmp_path):
    more = "student_layers = 2\nlogging_steps = 300"
    path, out = plan(("student_layers = 2", more), ("[1, 2]", "[1]"), ("[methods.emd]", "")), tmp_path / "out"
    process = start(path, out, tmp_path)
    running = out / "RTE/none/seed-1"
    wait_for((running / "starts").exists, process)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "suite_scripts.py: interrupted; the same command goes on from here\n"
    assert process.returncode == 130
    assert record(running)["state"] == "stopped" and "running" not in states(out).values()
    assert not is_alive(int((running / "starts").read_text().split()[0]))


@pytest.mark.slow
def test_a_run_waits_for_an_earlier_start_of_itself(plan, stand_ins, tmp_path):
    """One that outlived its suite, as it may where the kernel does not end it: it still holds its log."""
    path, out = plan(('["RTE", "MRPC"]', '["RTE"]'), ("[1, 2]", "[1]"), ("[methods.emd]", "")), tmp_path / "out"
    (out / "RTE").mkdir(parents=True)
    with open(out / "RTE/teacher.log", "ab") as log:
        lock = "import fcntl, time; fcntl.flock(1, fcntl.LOCK_EX); open('locked', 'w'); time.sleep(60)"
        earlier = subprocess.Popen([sys.executable, "-c", lock], stdout=log, cwd=tmp_path)
    wait_for((tmp_path / "locked").exists, earlier)
    threading.Timer(1.5, earlier.kill).start()
    begin = time.monotonic()
    suite(path, out)
    assert time.monotonic() - begin > 1 and starts(out / "RTE/teacher") == ["new"]
    earlier.wait()


@pytest.mark.slow
def test_a_changed_plan_is_refused(plan, stand_ins, tmp_path, exits_with_2):
    path, out = plan(), tmp_path / "out"
    suite(path, out)
    path.write_text(path.read_text().replace("[methods.emd]", "[methods.emd]\nbeta = 0.1"))
    line = exits_with_2(run_suite.main, path, "--output_dir", out)
    assert f"{out}/RTE/emd/seed-1: was run with beta=None, and the plan now says beta=0.1; remove the folder" in line
    assert "beta" not in (out / "plan.toml").read_text()
    (tmp_path / "other/RTE/teacher").mkdir(parents=True)
    line = exits_with_2(run_suite.main, path, "--output_dir", tmp_path / "other")
    assert f"{tmp_path}/other/RTE/teacher: there already, but of no suite" in line


@pytest.mark.slow
def test_students_of_another_teacher_are_refused(plan, stand_ins, tmp_path, exits_with_2):
    path, out = plan(("[methods.emd]", ""), ("[1, 2]", "[1]")), tmp_path / "out"
    suite(path, out)
    assert record(out / "RTE/none/seed-1")["teacher_options"] == record(out / "RTE/teacher")["options"]
    path.write_text(path.read_text().replace("[student]", "[teacher.RTE]\nlearning_rate = 0.1\n[student]"))
    said = f"was run with learning_rate=None, and the plan now says learning_rate=0.1; remove {out}/RTE to run teacher"
    assert f"{out}/RTE/teacher: {said} and students anew" in exits_with_2(run_suite.main, path, "--output_dir", out)
    shutil.rmtree(out / "RTE/teacher")
    line = exits_with_2(run_suite.main, path, "--output_dir", out)
    assert f"{out}/RTE/none/seed-1: its teacher {said} and students anew" in line
    shutil.rmtree(out / "RTE")
    suite(path, out)
    assert set(states(out).values()) == {"done"} and starts(out / "MRPC/none/seed-1") == ["new"]

    # A record from before teachers were noted is taken to be the plan's.
    older = {name: value for name, value in record(out / "RTE/none/seed-1").items() if name != "teacher_options"}
    (out / "RTE/none/seed-1.json").write_text(json.dumps(older))
    suite(path, out)
    assert starts(out / "RTE/none/seed-1") == ["new"]


@pytest.mark.slow
def test_a_teacher_for_each_seed(plan, stand_ins, tmp_path, capsys, exits_with_2):
    own = ("seeds = [1, 2]", "seeds = [1, 2]\nteacher_seeds = true")
    path, out = plan(own, ('["RTE", "MRPC"]', '["RTE"]')), tmp_path / "out"
    suite(path, out, "--dry_run")
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "measuring" in line] == [
        f"measuring 8 steps of RTE/{method}" for method in ("teacher", "none", "emd")
    ]
    assert "6 of 6 runs to go" in lines
    suite(path, out)
    names = [f"RTE/{method}/seed-{seed}" for method in ("emd", "none", "teacher") for seed in (1, 2)]
    assert states(out) == dict.fromkeys(names, "done")
    for seed in (1, 2):
        teacher, student = record(out / f"RTE/teacher/seed-{seed}"), record(out / f"RTE/none/seed-{seed}")
        assert (teacher["method"], teacher["seed"], teacher["options"]["seed"]) == ("teacher", seed, seed)
        assert f"--seed {seed} --teacher_model {out}/RTE/teacher/seed-{seed} --output_dir" in student["command"]
        assert student["teacher_options"] == teacher["options"]
    # A seed more needs a teacher more, and one that changes its mind needs another folder.
    path.write_text(path.read_text().replace("[1, 2]", "[1, 2, 3]"))
    suite(path, out)
    assert starts(out / "RTE/teacher/seed-3") == starts(out / "RTE/teacher/seed-1") == ["new"]
    path.write_text(path.read_text().replace("teacher_seeds = true", "teacher_seeds = false"))
    line = exits_with_2(run_suite.main, path, "--output_dir", out)
    assert f"{out}/RTE/teacher: there already, but of no suite" in line
    path.write_text(path.read_text().replace("teacher_seeds = false", "teacher_seeds = true"))
    path.write_text(path.read_text().replace("[student]", "[teacher.RTE]\nlearning_rate = 0.1\n[student]"))
    line = exits_with_2(run_suite.main, path, "--output_dir", out)
    assert f"the plan now says learning_rate=0.1; remove {out}/RTE to run teacher and students anew" in line


@pytest.mark.slow
def test_a_teacher_for_each_seed_where_there_was_one(plan, stand_ins, tmp_path, exits_with_2):
    path, out = plan(('["RTE", "MRPC"]', '["RTE"]')), tmp_path / "out"
    suite(path, out)
    path.write_text(path.read_text().replace("seeds = [1, 2]", "seeds = [1, 2]\nteacher_seeds = true"))
    line = exits_with_2(run_suite.main, path, "--output_dir", out)
    assert f"{out}/RTE/teacher: the teacher of all seeds, and the plan now has one for each (teacher_seeds)" in line
    assert f"remove {out}/RTE to run teachers and students anew" in line
    assert "teacher_seeds" not in (out / "plan.toml").read_text()


def test_students_of_a_seeds_failed_teacher_are_skipped(plan, stand_ins, tmp_path, monkeypatch):
    execute = experiments.engines.execute

    def stumble(run, *rest):
        if run.name == "RTE/teacher/seed-1":
            raise MISHAP[0]
        return execute(run, *rest)

    monkeypatch.setattr(experiments.engines, "execute", stumble)
    path = plan(('["RTE", "MRPC"]', '["RTE"]'), ("seeds = [1, 2]", "seeds = [1, 2]\nteacher_seeds = true"))
    with pytest.raises(SystemExit):
        suite(path, tmp_path / "out")
    skipped = {"RTE/emd/seed-1": "skipped", "RTE/none/seed-1": "skipped", "RTE/teacher/seed-1": "failed"}
    done = dict.fromkeys(("RTE/emd/seed-2", "RTE/none/seed-2", "RTE/teacher/seed-2"), "done")
    assert states(tmp_path / "out") == skipped | done


def test_dry_run(plan, stand_ins, tmp_path, capsys):
    cache = tmp_path / "teacher_cache"
    path, out = plan(("student_layers = 2", f'student_layers = 2\nteacher_cache_dir = "{cache}"')), tmp_path / "out"
    suite(path, out, "--dry_run", "--jobs", 2)
    lines = capsys.readouterr().out.splitlines()
    assert not out.exists() and not cache.exists()
    assert [line.rpartition("measuring 8 steps of ")[2] for line in lines if "measuring" in line] == [
        *("RTE/teacher", "MRPC/teacher", "RTE/none", "MRPC/none", "RTE/emd"),
    ]
    assert "10 of 10 runs to go" in lines and any("An estimate, from 8 steps of some runs" in line for line in lines)
    # 24 rows in batches of 32: a step an epoch, of .1 seconds; 3 epochs for a teacher.
    table = [line.split() for line in lines if line.startswith(("RTE", "MRPC"))]
    assert [row[0] for row in table] == ["RTE", "MRPC"] and all(row[2::2] == ["s", "s", "s"] for row in table)
    # The commands are as they stand.
    commands = [line for line in lines if line.startswith("python ")]
    (out / "RTE").mkdir(parents=True)
    for command in (commands[0], commands[1]):
        (out / "RTE/none").mkdir(exist_ok=True)
        subprocess.run(command.replace("python", sys.executable, 1), shell=True, check=True)
    assert (out / "RTE/none/seed-1/eval_results.json").exists() and cache.exists()


def test_estimate(plan, monkeypatch):
    """By hand: seconds of a step x (steps + a third of the steps that an evaluation would be) + seconds once."""
    path = plan(
        ("[teacher]", "[teacher]\ntrain_batch_size = 10\nnum_train_epochs = 2"),
        (
            "layers = 2",
            "layers = 2\ntrain_batch_size = 10\ngradient_accumulation_steps = 2\nmax_steps = 12\neval_steps = 4",
        ),
        ("[methods.none]", "[sizes.two]\n[sizes.one]\nstudent_layers = 1\n[methods.none]"),
        ("[methods.emd]", "[methods.emd]\neval_steps = 0.5"),
    )
    measured = {
        "RTE/teacher": RunTime(1, 10),
        "MRPC/teacher": RunTime(2, 20),
        "RTE/two/none/seed-1": RunTime(1, 5),
        "MRPC/two/none/seed-1": RunTime(4, 7),
        "RTE/two/emd/seed-1": RunTime(3, 100),
        "RTE/one/none/seed-1": RunTime(0.5, 100),
    }
    monkeypatch.setattr(experiments.estimate, "_measure", lambda run, *_: measured[run.name])
    monkeypatch.setattr(experiments.estimate, "_rows", lambda plan, task: {"RTE": (100, 30), "MRPC": (45, 60)}[task])
    read = read_plan(path)
    seconds = estimate(read, read.runs(Path("out")), {})
    # 2 epochs of 10 steps, each then 3 batches to evaluate; of 5 steps and 6 batches.
    assert seconds.pop("RTE/teacher") == pytest.approx(1 * (20 + 2 * 3 / 3) + 10)
    assert seconds.pop("MRPC/teacher") == pytest.approx(2 * (10 + 2 * 6 / 3) + 20)
    # 12 steps of 20 rows; 3 evaluations (emd: 2) of 1.5 and 3 batches. emd: thrice as slow; one layer: half the time.
    by_hand = {
        "RTE/two/none": 1 * (12 + 3 * 1.5 / 3) + 5,
        "RTE/two/emd": 3 * (12 + 2 * 1.5 / 3) + 5,
        "RTE/one/none": 0.5 * (12 + 3 * 1.5 / 3) + 5,
        "RTE/one/emd": 1.5 * (12 + 2 * 1.5 / 3) + 5,
        "MRPC/two/none": 4 * (12 + 3 * 3 / 3) + 7,
        "MRPC/two/emd": 12 * (12 + 2 * 3 / 3) + 7,
        "MRPC/one/none": 2 * (12 + 3 * 3 / 3) + 7,
        "MRPC/one/emd": 6 * (12 + 2 * 3 / 3) + 7,
    }
    assert seconds == pytest.approx({f"{name}/seed-{k}": value for name, value in by_hand.items() for k in (1, 2)})


def test_a_narrow_student_s_estimate_has_its_own_epochs(plan, monkeypatch):
    """As the run itself will: more than a student that is cut from its teacher."""
    path = plan(
        ("[methods.none]", "[sizes.cut]\n[sizes.narrow]\nstudent_width = 12\n[methods.none]"),
    )
    monkeypatch.setattr(experiments.estimate, "_measure", lambda *_: RunTime(1, 0))
    monkeypatch.setattr(experiments.estimate, "_rows", lambda *_: (80, 0))
    read = read_plan(path)
    seconds = estimate(read, read.runs(Path("out")), {})
    cut, narrow = (seconds[f"RTE/{size}/none/seed-1"] for size in ("cut", "narrow"))
    assert narrow / cut == pytest.approx(OTHERS["num_train_epochs"] / CUT["num_train_epochs"])


def test_dry_run_says_what_fails(plan, stand_ins, tmp_path, exits_with_2):
    path = plan(('layer_mapping = "none"', "weight_decay = 13"))
    line = exits_with_2(run_suite.main, path, "--output_dir", tmp_path / "out", "--dry_run")
    assert "RTE/none/seed-1: script.py: error: an unlucky number; tried with python" in line


@pytest.mark.slow
@pytest.mark.xdist_group("warm")
def test_on_a_terminal(plan, stand_ins, tmp_path):
    path, out = (
        plan(('layer_mapping = "none"', "weight_decay = 13"), ("[methods.emd]", "[methods.emd]\nlogging_steps=1")),
        tmp_path / "out",
    )
    controller, terminal = pty.openpty()
    process = start(path, out, tmp_path, terminal=terminal)
    os.close(terminal)
    shown = b""
    while True:
        try:
            shown += os.read(controller, 4096)
        except OSError:  # the other side is closed
            break
    assert process.wait() == 1
    tables = shown.decode().replace("\r\n", "\n").split("\033[J")
    assert len(tables) > 3 and all("F" in table.rpartition("\033[")[2] for table in tables[:-1])
    last = tables[-1].splitlines()
    assert last[0].split() == ["teacher", "none", "emd"]
    assert last[1].split() == ["RTE", "1/1", "0/2,", "2", "failed", "2/2"]
    assert last[3].startswith("6 of 10 runs done") and "an unlucky number" in last[4]
    assert any("1 running" in table and "left" in table for table in tables)


def test_time_left(plan, monkeypatch):
    """Two side by side; by hand: 50 s for a student, 10 s for a teacher."""
    clock = {"monotonic": lambda: 100}
    monkeypatch.setattr(experiments.progress, "time", SimpleNamespace(monotonic=lambda: clock["monotonic"]()))
    runs, stream = read_plan(plan()).runs(Path("out")), io.StringIO()
    progress = Progress(runs, 2, stream)
    records = {"RTE/teacher": {"state": "running"}}
    progress.show({})
    progress.show(records)
    records |= {"RTE/teacher": {"state": "done", "seconds": 10}, "RTE/emd/seed-1": {"state": "running", "seconds": 5}}
    progress.show(records)
    clock["monotonic"] = lambda: 115
    records |= {
        "RTE/none/seed-1": {"state": "done", "seconds": 40},
        "RTE/none/seed-2": {"state": "done", "seconds": 60},
    }
    progress.show(records)
    records["RTE/emd/seed-2"] = {"state": "failed", "seconds": 3, "error": "no luck"}
    progress.show(records)
    assert stream.getvalue().splitlines() == [
        "[0/10] 10 runs to go, 2 side by side",
        "[0/10] RTE/teacher running",
        # A teacher and eight students, all taken to be like the only run that is known; 5 s of one are over.
        "[1/10] RTE/teacher done in 10 s, about 42 s left",
        "[1/10] RTE/emd/seed-1 running",
        # 50 - 20 of the running one, 5 more students, a teacher.
        "[3/10] RTE/none/seed-1 done in 40 s, about 2.4 min left",
        "[3/10] RTE/none/seed-2 done in 1.0 min, about 2.4 min left",
        "[4/10] RTE/emd/seed-2 failed in 3 s: no luck",
    ]


def test_seconds_of_all_starts(plan, tmp_path):
    run = read_plan(plan()).runs(tmp_path / "out")[0]
    assert run.seconds_so_far() == 0
    run.folder.mkdir(parents=True)
    run.write_record("stopped", seconds=30)
    assert run.seconds_so_far() == 30
    # Killed: up to the last line that it printed.
    run.write_record("running", started="2026-01-01T00:00:00+00:00", seconds=30)
    run.log.touch()
    os.utime(run.log, (0, datetime.datetime(2026, 1, 1, 0, 2, tzinfo=datetime.timezone.utc).timestamp()))
    assert run.seconds_so_far() == 150
    run.write_stopped()
    assert record(run.folder)["state"] == "stopped" and record(run.folder)["seconds"] == 150
    run.folder.rmdir()
    assert run.seconds_so_far() == 0


def test_jobs_and_their_devices(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(8))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    memory = type("memory", (), {"available": 3.5 * MEMORY_PER_RUN})
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    assert local_environments(None) == [{"OMP_NUM_THREADS": "2"}] * 3
    assert local_environments(1) == [{"OMP_NUM_THREADS": "8"}]
    memory.available = 0
    assert len(local_environments(None)) == 1
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert local_environments(None) == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert [e["CUDA_VISIBLE_DEVICES"] for e in local_environments(3)] == ["5", "7", "5"]


FILES = 'files.{} = {{train_file = "a.csv", validation_file = "b.csv"}}\n'
BAD_PLANS = {
    "an unknown key": ("seeds", "seed", "seed is not a key of a plan; these are: tasks, seeds"),
    "no seeds": ("seeds = [1, 2]", "", "seeds: give a list of different whole numbers"),
    "an empty list of seeds": ("[1, 2]", "[]", "seeds: give a list of different whole numbers"),
    "a seed twice": ("[1, 2]", "[1, 1]", "seeds: give a list of different whole numbers"),
    "a seed that is no number": ("[1, 2]", "[true]", "seeds: give a list of different whole numbers"),
    "a negative seed": ("[1, 2]", "[-1]", "seeds: must be from 0 to 4294967295"),
    "no TOML": ("[1, 2]", "[1, 2", "plan.toml: "),
    "an unknown task": ('"MRPC"', '"XNLI"', "tasks: 'XNLI' is none of CoLA"),
    "a task twice": ('"MRPC"', '"RTE"', "tasks: give a list of different texts"),
    "a baseline of no method": (
        'baseline = "none"',
        'baseline = "other"',
        "baseline: must be one of the methods: none, emd",
    ),
    "a baseline that is no text": ('baseline = "none"', "baseline = [1]", "baseline: must be one of the methods"),
    "no data": ('data_dir = "', 'data_dir = "nowhere', "/train.tsv, of RTE"),
    "files of another task": (
        "seeds =",
        FILES.format("other") + "seeds =",
        "[files.other]: other is none of the plan's",
    ),
    "files called like GLUE's": ("seeds =", FILES.format("mrpc") + "seeds =", "'mrpc' cannot be the name of a task"),
    "half of the files": (
        '["RTE", "MRPC"]',
        '["own"]\nfiles.own = {train_file = "a.csv"}',
        "[files.own]: give train_file and validation_file",
    ),
    "files that are not there": (
        '["RTE", "MRPC"]',
        f'["own"]\n{FILES.format("own")}',
        "train_file a.csv: no such file",
    ),
    "an option that is not of files": (
        '["RTE", "MRPC"]',
        '["own"]\nfiles.own = {train_file = "a.csv", validation_file = "b.csv", alpha = 1}',
        "[files.own]: alpha is none of train_file",
    ),
    "options of a task that is not in the plan": (
        "[student]",
        "[student.CoLA]",
        "[student.CoLA]: CoLA is none of the plan's tasks and sizes",
    ),
    "no student": ("student_layers = 2", "", "RTE/none: give either student_layers or student_model"),
    "two students": (
        "[methods.emd]",
        '[methods.emd]\nstudent_model = "x"\nstudent_layers = 2',
        "RTE/emd: give either student_layers or",
    ),
    "a step of no script": (
        "[teacher]",
        "[steps.a]\n[teacher]",
        "[steps.a]: script must be one of general_distill, aug",
    ),
    "a step's option that does not exist": (
        "[teacher]",
        '[steps.a]\nscript = "augment_data"\ncopys = 3\n[teacher]',
        "[steps.a]: bert_emd/augment_data.py has no option copys",
    ),
    "what no step makes": (
        "[methods.emd]",
        '[methods.emd]\nunlabeled_file = "{steps.more}"',
        "RTE/emd: unlabeled_file = '{steps.more}': there is no {steps.more} before it",
    ),
    "what a later method makes": (
        "[methods.none]",
        '[methods.none]\nstudent_model = "{methods.emd}"',
        "there is no {methods.emd} before it",
    ),
    "an option that does not exist": (
        "[methods.emd]",
        "[methods.emd]\nbetta = 1",
        "emd]: bert_emd/emd_task_distill.py has no option betta",
    ),
    "a text for a number": (
        "[methods.emd]",
        '[methods.emd]\nbeta = "x"',
        "[methods.emd]: argument --beta: invalid float value: 'x'",
    ),
    "an unknown layer mapping": (
        "[methods.emd]",
        '[methods.emd]\nlayer_mapping = "x"',
        "layer-mapping: invalid choice: 'x'",
    ),
    "an empty list for an option": (
        "[methods.emd]",
        "[methods.emd]\nbeta = []",
        "[methods.emd]: beta: give true, false, a number",
    ),
    "a table for an option": (
        "[methods.emd]",
        "[methods.emd]\nbeta = {a = 1}",
        "[methods.emd.beta]: beta is none of the plan's tasks and sizes",
    ),
    "a seed in a method": (
        "[methods.emd]",
        "[methods.emd]\nseed = 1",
        "[methods.emd]: seed has no place in a plan; the suite decides",
    ),
    "a place in a method": ("[methods.emd]", '[methods.emd]\noutput_dir = "x"', "output_dir has no place in a plan"),
    "a push in a method": ("[methods.emd]", "[methods.emd]\npush_to_hub = true", "push_to_hub has no place in a plan"),
    "a method that is no table": ("[methods.emd]", "[methods]\nemd = 1", "plan.toml: "),
    "a method with a slash": (
        "[methods.emd]",
        '[methods."a/b"]',
        "[methods.a/b]: 'a/b' cannot be the name of a folder here",
    ),
    "a method called teacher": (
        "[methods.emd]",
        "[methods.teacher]",
        "[methods.teacher]: 'teacher' cannot be the name of a folder here",
    ),
    "a size called dot dot": ("[methods.emd]", '[sizes.".."]', "[sizes...]: '..' cannot be the name of a folder here"),
    "a teacher's folder and options": (
        "[teacher]",
        '[teacher]\nfolder = "x"',
        "[teacher]: folder is where a finished teacher lies",
    ),
    "a teacher's option that does not exist": (
        "[teacher]",
        "[teacher]\nbeta = 1",
        "[teacher]: bert_finetune/run_glue.py has no option beta",
    ),
    "teacher_seeds that is no yes or no": (
        "seeds = [1, 2]",
        "seeds = [1, 2]\nteacher_seeds = [1]",
        "teacher_seeds: must be true or false",
    ),
    "teachers with seeds of their own, and one for all": (
        "[teacher]",
        "teacher_seeds = true\n[teacher]\nseed = 7",
        "[teacher]: seed goes with no teacher_seeds, which gives each teacher the seed of its students",
    ),
    "no teacher's model": (
        "model_name_or_path",
        "model_type",
        "[teacher]: give model_name_or_path, or a folder, for RTE",
    ),
    "a teacher's model that is not there": (
        'model_name_or_path = "',
        'model_name_or_path = "/nowhere',
        "[teacher] model_name_or_path",
    ),
}


@pytest.mark.parametrize(("old", "new", "said"), BAD_PLANS.values(), ids=BAD_PLANS)
def test_bad_plans(old, new, said, plan, tmp_path, exits_with_2):
    path = plan((old, new))
    line = exits_with_2(run_suite.main, path, "--output_dir", tmp_path / "out")
    assert f"error: {path}: " in line and said in line
    assert not (tmp_path / "out").exists()


def test_a_finished_teacher_is_not_trained_anew(plan, tmp_path, exits_with_2):
    path = plan(("seeds = [1, 2]", "seeds = [1, 2]\nteacher_seeds = true"))
    path.write_text(re.sub("model_name_or_path = .*", 'folder = "model/{task}"', path.read_text()))
    line = exits_with_2(run_suite.main, path, "--output_dir", tmp_path / "out")
    assert line.endswith(f"{path}: teacher_seeds: goes with [teacher]'s options, to train by, and with no folder")


def test_models_of_another_kind(plan, tmp_path, exits_with_2):
    (tmp_path / "ner").mkdir()
    BertConfig(architectures=["BertForTokenClassification"]).save_pretrained(tmp_path / "ner")
    T5Config().save_pretrained(tmp_path / "t5")

    def said(path):
        return exits_with_2(run_suite.main, path, "--output_dir", tmp_path / "out")

    t5 = "a t5 has an encoder and a decoder"
    path = plan(("student_layers = 2", f'student_model = "{tmp_path}/t5"'))
    assert f"{path}: student_model {tmp_path}/t5: {t5}" in said(path)
    step = f'[steps.general]\nscript = "general_distill"\nteacher_model = "{tmp_path}/t5"\ncorpus = "{path}"\n'
    path = plan(("[methods.none]", f"{step}student_layers = 2\n[methods.none]"))
    assert f"{path}: teacher_model {tmp_path}/t5: {t5}" in said(path)
    path.write_text(re.sub("model_name_or_path = .*", f'folder = "{tmp_path}/ner"', plan().read_text()))
    assert f"{path}: [teacher] folder {tmp_path}/ner: a token classifier, not a text classifier" in said(path)


def test_bad_options(plan, tmp_path, exits_with_2):
    out = ("--output_dir", tmp_path / "out")
    assert "nowhere.toml: No such file" in exits_with_2(run_suite.main, tmp_path / "nowhere.toml", *out)
    assert "--jobs: at least 1" in exits_with_2(run_suite.main, plan(), *out, "--jobs", 0)
    assert "--output_dir" in exits_with_2(run_suite.main, plan())
    line = exits_with_2(run_suite.main, plan(), *out, "--cpus_per_run", 0, "--ray_address", "auto")
    assert line.endswith("--ray_address, --cpus_per_run: only with --engine ray")
    line = exits_with_2(run_suite.main, plan(), *out, "--engine", "ray", "--dry_run")
    assert line.endswith("--dry_run: measures on this machine, and not with --engine ray")


def test_without_ray(plan, tmp_path, monkeypatch, exits_with_2):
    monkeypatch.setitem(sys.modules, "ray", None)
    line = exits_with_2(run_suite.main, plan(), "--output_dir", tmp_path / "out", "--engine", "ray")
    assert line.endswith("--engine ray: Ray is not installed; pip install ray")


MISHAP = PermissionError(13, "Permission denied", "/x/seed-1.log"), "/x/seed-1.log: Permission denied"
MISTAKE = ValueError("no such thing"), "no such thing"


@pytest.mark.parametrize(("error", "said"), [MISHAP, MISTAKE], ids=["a mishap", "a mistake of ours"])
def test_a_run_that_ray_could_not_carry_out(error, said, plan, tmp_path):
    exceptions = pytest.importorskip("ray.exceptions")
    run = read_plan(plan()).runs(tmp_path / "out")[0]
    shown = '\x1b[36mray::_execute_in()\x1b[39m (pid=1, ip=127.0.0.1)\n  File "engines.py", line 1\n'
    raised = exceptions.RayTaskError("_execute_in", shown, error)
    for given in (raised, raised.as_instanceof_cause()):
        future = Future()
        future.set_exception(given)
        told = record_of(future, run, (OSError, exceptions.RayError))
        assert told["error"] == record(run.folder)["error"] == said
        assert ('File "engines.py", line 1' in told.get("traceback", "")) == (error is MISTAKE[0])


def test_a_machine_of_the_cluster_that_died(plan, tmp_path):
    exceptions = pytest.importorskip("ray.exceptions")
    run, future = read_plan(plan()).runs(tmp_path / "out")[0], Future()
    future.set_exception(exceptions.WorkerCrashedError())
    told = record_of(future, run, (OSError, exceptions.RayError))
    assert told["error"].startswith("WorkerCrashedError: ") and "traceback" not in told


@pytest.mark.slow
@pytest.mark.parametrize(("error", "said"), [MISHAP, MISTAKE], ids=["a mishap", "a mistake of ours"])
def test_a_run_that_could_not_be_carried_out(error, said, plan, stand_ins, tmp_path, monkeypatch, capsys):
    """The others are; a mistake of this project keeps its traceback, in the record and at the end."""
    execute = experiments.engines.execute

    def stumble(run, *rest):
        if run.name == "RTE/none/seed-1":
            raise error
        return execute(run, *rest)

    monkeypatch.setattr(experiments.engines, "execute", stumble)
    with pytest.raises(SystemExit) as exit_info:
        suite(plan(), tmp_path / "out")
    printed = capsys.readouterr()
    assert exit_info.value.code == 1 and "9 done, 1 failed, 0 skipped" in printed.out
    assert f"RTE/none/seed-1: {said}; see " in printed.err and record(tmp_path / "out/RTE/none/seed-1")["error"] == said
    assert ("in stumble" in printed.err) == (error is MISTAKE[0])


@pytest.mark.parametrize("cpus", [0, -1])
def test_a_run_that_asks_ray_for_nothing(cpus, monkeypatch):
    machine = {"init": lambda **_: None, "cluster_resources": lambda: {"CPU": 2.0}, "nodes": list}
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(**machine))
    with pytest.raises(InputError, match="at least 0, and not both 0"):
        RayEngine("auto", cpus, None)


# Read and checked but for the data and models, which are not here.
@pytest.mark.parametrize("path", sorted((ROOT / "plans").glob("*.toml")), ids=lambda path: path.stem)
def test_every_plan_that_comes_with_the_project(path):
    plan = read_plan(path)
    runs = plan.runs(Path("out"))
    assert len({run.folder for run in runs}) == len(runs)
    teachers = 0 if plan.teacher_folder else len(plan.seeds) if plan.teacher_seeds else 1
    of_tasks = [run for run in runs if not run.is_step]
    assert len(of_tasks) == len(plan.tasks) * (teachers + len(plan.sizes) * len(plan.methods) * len(plan.seeds))
    assert path.read_text().startswith("# ")


def run_forked(command, environment, log, stopping=None):
    """`run_script` without waiting for imports: their processes are tested above, the scripts' content is not."""
    process = warm.start(*command, PYTHONUNBUFFERED="1", TQDM_DISABLE="1", **environment)
    log.writelines(text.encode() for text in process.communicate(timeout=300))
    return process.returncode


@pytest.mark.training
@pytest.mark.xdist_group("warm")
def test_with_the_real_scripts(plan, pretrained, tmp_path, capsys, monkeypatch):
    """A teacher and a student, estimated and run; then a student of a teacher that is there."""
    monkeypatch.setattr(experiments.execution, "run_script", run_forked)
    monkeypatch.setattr(experiments.estimate, "run_script", run_forked)
    options = 'num_train_epochs = 1\nmax_seq_length = 32\nuse_cpu = true\nreport_to = "none"\n'
    small = (
        ('["RTE", "MRPC"]', '["RTE"]'),
        ("[1, 2]", "[1]"),
        ("[methods.emd]", ""),
        ("layers = 2", "layers = 2\n" + options),
    )
    out = tmp_path / "out"
    path = plan(*small, ("[teacher]", "[teacher]\n" + options))
    suite(path, out, "--dry_run")
    assert "An estimate, from 8 steps" in capsys.readouterr().out
    suite(path, out)
    results = json.loads((out / "RTE/none/seed-1/eval_results.json").read_text())
    assert results["task"] == "RTE" and "eval_accuracy" in results
    command = json.loads((out / "RTE/none/seed-1/args.json").read_text())["command"]
    assert command.endswith(record(out / "RTE/none/seed-1")["command"].removeprefix("python "))

    # The same of files of the user's own, and the tables of both.
    for name in ("train", "dev"):
        lines = [f"{k},word {'good' if k % 3 else 'bad'} {k},{'ab'[k % 2]}" for k in range(16)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["id,said,label", *lines]))
    files = f'train_file = "{tmp_path}/train.csv"\nvalidation_file = "{tmp_path}/dev.csv"\ntext_column = "said"\n'
    own = ('["RTE"]', '["RTE", "own"]'), ("[teacher]", f"[files.own]\n{files}[teacher]\n{options}")
    train, dev = read_plan(plan(*small, *own)).tables("own")
    assert [len(read().rows) for read in (*train, *dev)] == [16, 16]
    suite(plan(*small, *own), out)
    assert states(out) == dict.fromkeys(["RTE/none/seed-1", "RTE/teacher", "own/none/seed-1", "own/teacher"], "done")
    compare_results.main([str(out), "--output_dir", str(tmp_path / "results"), "--no_speed"])
    assert "| method | RTE | own |" in (tmp_path / "results/results.md").read_text()

    path = plan(*small, (f'model_name_or_path = "{pretrained}"', f'folder = "{out}/{{task}}/teacher"'))
    suite(path, tmp_path / "given")
    assert states(tmp_path / "given") == {"RTE/none/seed-1": "done"}
