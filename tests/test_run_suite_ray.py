"""A suite on a cluster of two machines, one of which is lost in the middle: all runs end, none ends twice; Ctrl-C."""

import signal

import pytest
import warm
from conftest import ROOT
from suite_scripts import is_alive, record, starts, states, wait_for, wait_until, write_plan

from experiments import run_suite

ray = pytest.importorskip("ray")
cluster_utils = pytest.importorskip("ray.cluster_utils")

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("warm")]

SMALL = {"object_store_memory": 100 * 2**20, "include_dashboard": False}


@pytest.fixture
def cluster():
    """Two machines with room for a run each, beside the one that leads."""
    started = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **SMALL})
    for _ in range(2):
        started.add_node(num_cpus=1, **SMALL)
    yield started
    started.shutdown()


def start(cluster, plan, out, tmp_path) -> warm.Process:
    """A suite on the cluster, as soon as both machines are at work on a student."""
    options = ["--output_dir", out, "--engine", "ray", "--ray_address", cluster.address, "--cpus_per_run", 1]
    suite = warm.start(ROOT / "tests/suite_scripts.py", tmp_path, plan, *options)
    wait_for(lambda: len(list(out.glob("*/*/*/starts"))) == 2, suite)
    return suite


def test_a_machine_is_lost(cluster, glue_dir, pretrained, tmp_path, monkeypatch):
    changes = ("[1, 2]", "[1]"), ("student_layers = 2", "student_layers = 2\nlogging_steps = 8")
    plan, out = write_plan(tmp_path / "plan.toml", glue_dir, pretrained, *changes), tmp_path / "out"
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    suite = start(cluster, plan, out, tmp_path)
    running = {name for name, state in states(out).items() if state == "running"}
    cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
    said, errors = suite.communicate(timeout=300)
    assert suite.returncode == 0, errors
    assert said.startswith("[0/6] 6 runs to go, 2 side by side") and said.endswith("6 done, 0 failed, 0 skipped\n")
    assert len(states(out)) == 6 and set(states(out).values()) == {"done"}
    (again,) = (name for name in states(out) if starts(out / name) != ["new"])
    assert again in running and starts(out / again) == ["new", "resumed"]
    assert "threads 1 " in (out / "RTE/emd/seed-1.log").read_text()
    assert record(out / "RTE/emd/seed-1")["returncode"] == 0


def test_interrupted(cluster, glue_dir, pretrained, tmp_path):
    changes = ("[1, 2]", "[1]"), ("student_layers = 2", "student_layers = 2\nlogging_steps = 300")
    plan, out = write_plan(tmp_path / "plan.toml", glue_dir, pretrained, *changes), tmp_path / "out"
    suite = start(cluster, plan, out, tmp_path)
    suite.send_signal(signal.SIGINT)
    assert suite.communicate(timeout=60)[1].endswith("interrupted; the same command goes on from here\n")
    assert suite.returncode == 130
    pids = [int(path.read_text().split()[0]) for path in out.glob("*/*/*/starts")]
    wait_until(lambda: not any(map(is_alive, pids)))
    assert sorted(states(out).values()) == ["done", "done", "stopped", "stopped"]


def test_no_cluster(glue_dir, pretrained, tmp_path, monkeypatch, exits_with_2):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))  # where the address of this machine's cluster would be
    plan, out = write_plan(tmp_path / "plan.toml", glue_dir, pretrained), tmp_path / "out"
    line = exits_with_2(run_suite.main, plan, "--output_dir", out, "--engine", "ray")
    assert "--ray_address auto: " in line and line.endswith("'ray start --head' starts a cluster")
