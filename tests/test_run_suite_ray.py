"""A suite on a cluster of two machines, one of which is lost in the middle: all runs end, none ends twice."""

import os
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from test_run_suite import plan, record, starts, states  # noqa: F401

ray = pytest.importorskip("ray")

from ray.cluster_utils import Cluster  # noqa: E402

SMALL = {"object_store_memory": 100 * 2**20, "include_dashboard": False}


def test_a_machine_is_lost(plan, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    path, out = plan(("student_layers = 2", "student_layers = 2\nlogging_steps = 8")), tmp_path / "out"
    code = (
        "import sys; from pathlib import Path; import suite_scripts; from bert_emd import run_suite;"
        "suite_scripts.use_stand_ins(Path(sys.argv[1])); run_suite.main(sys.argv[2:])"
    )
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **SMALL})
    try:
        nodes = [cluster.add_node(num_cpus=1, **SMALL) for _ in range(2)]
        command = [sys.executable, "-c", code, tmp_path, path, "--output_dir", out, "--engine", "ray"]
        driver = subprocess.Popen(
            [*command, "--ray_address", cluster.address, "--cpus_per_run", "1"], stdout=subprocess.PIPE, text=True
        )
        deadline = time.monotonic() + 180
        # Both machines at work on a student.
        while list(states(out).values()).count("running") < 2 or len(states(out)) < 4:
            assert driver.poll() is None and time.monotonic() < deadline, driver.communicate()
            time.sleep(0.05)
        running = {name for name, state in states(out).items() if state == "running"}
        cluster.remove_node(nodes[0], allow_graceful=False)
        said = driver.communicate(timeout=300)[0]
    finally:
        cluster.shutdown()
    assert driver.returncode == 0, said
    assert said.startswith("[0/10] 10 runs to go, 2 side by side") and said.endswith("10 done, 0 failed, 0 skipped\n")
    assert set(states(out).values()) == {"done"} and len(states(out)) == 10
    again = {name for name in states(out) if starts(out / name) != ["new"]}
    assert len(again) == 1 and again < running and starts(out / again.pop()) == ["new", "resumed"]
    assert "threads 1" in (out / "RTE/emd/seed-1.log").read_text()
    assert record(out / "RTE/emd/seed-1")["returncode"] == 0
