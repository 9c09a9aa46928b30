"""A suite on a cluster of two machines, one of which is lost in the middle: all runs end, none ends twice."""

import subprocess
import sys
import time

import pytest
from conftest import ROOT
from suite_scripts import record, starts, states, write_plan

from bert_emd import run_suite

ray = pytest.importorskip("ray")
cluster_utils = pytest.importorskip("ray.cluster_utils")

SMALL = {"object_store_memory": 100 * 2**20, "include_dashboard": False}


def test_a_machine_is_lost(glue_dir, pretrained, tmp_path, monkeypatch):
    changes = ("[1, 2]", "[1]"), ("student_layers = 2", "student_layers = 2\nlogging_steps = 8")
    plan, out = write_plan(tmp_path / "plan.toml", glue_dir, pretrained, *changes), tmp_path / "out"
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **SMALL})
    try:
        machines = [cluster.add_node(num_cpus=1, **SMALL) for _ in range(2)]
        command = [sys.executable, ROOT / "tests/suite_scripts.py", tmp_path, plan, "--output_dir", out]
        command += ["--engine", "ray", "--ray_address", cluster.address, "--cpus_per_run", "1"]
        suite = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 180
        # Both machines at work on a student.
        while len(states(out)) < 4 or list(states(out).values()).count("running") < 2:
            assert suite.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        running = {name for name, state in states(out).items() if state == "running"}
        cluster.remove_node(machines[0], allow_graceful=False)
        said = suite.communicate(timeout=300)[0]
    finally:
        cluster.shutdown()
    assert suite.returncode == 0, said
    assert said.startswith("[0/6] 6 runs to go, 2 side by side") and said.endswith("6 done, 0 failed, 0 skipped\n")
    assert len(states(out)) == 6 and set(states(out).values()) == {"done"}
    (again,) = (name for name in states(out) if starts(out / name) != ["new"])
    assert again in running and starts(out / again) == ["new", "resumed"]
    assert "threads 1 " in (out / "RTE/emd/seed-1.log").read_text()
    assert record(out / "RTE/emd/seed-1")["returncode"] == 0


def test_no_cluster(glue_dir, pretrained, tmp_path, monkeypatch, exits_with_2):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))  # where the address of this machine's cluster would be
    plan, out = write_plan(tmp_path / "plan.toml", glue_dir, pretrained), tmp_path / "out"
    line = exits_with_2(run_suite.main, plan, "--output_dir", out, "--engine", "ray")
    assert "--ray_address auto: " in line and line.endswith("'ray start --head' starts a cluster")
