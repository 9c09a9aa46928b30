"""Stand-ins for the two scripts that a suite runs: they take the same options and are done at once.

A run sleeps --logging_steps seconds unless it resumes, fails with --weight_decay 13, and leaves a line in `starts` for
each time it is started: its process, and whether there was a checkpoint to resume from.

    python tests/suite_scripts.py FOLDER ...    run_suite.py ... with stand-ins, which are written into FOLDER
"""

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import warm

from experiments import plan, run_suite

PLAN = """
tasks = ["RTE", "MRPC"]
seeds = [1, 2]
baseline = "none"
data_dir = "{data}"

[teacher]
model_name_or_path = "{model}"

[student]
student_layers = 2

[methods.none]
layer_mapping = "none"

[methods.emd]
"""

SCRIPT = """
import json, os, sys, time
from pathlib import Path

*argv, resume = sys.argv[1:]
assert resume == "--resume_from_checkpoint"
options = dict(zip(argv[::2], argv[1::2], strict=True))
if "--teacher_model" in options:
    assert (Path(options["--teacher_model"]) / "eval_results.json").exists()
folder = Path(options["--output_dir"])
folder.mkdir(exist_ok=True)
Path(options.get("--teacher_cache_dir", folder)).mkdir(parents=True, exist_ok=True)
resumed = (folder / "checkpoint-1").exists()
(folder / "checkpoint-1").mkdir(exist_ok=True)
with open(folder / "starts", "a") as starts:
    starts.write(f"{os.getpid()} {'resumed' if resumed else 'new'}\\n")
print("threads", os.environ.get("OMP_NUM_THREADS"), "gpu", os.environ.get("CUDA_VISIBLE_DEVICES"))
time.sleep(0 if resumed else float(options.get("--logging_steps", 0)))
if options.get("--weight_decay") == "13":
    sys.exit("script.py: error: an unlucky number")
(folder / "eval_results.json").write_text(json.dumps({"train_seconds": 0.8}))
"""


def use_stand_ins(folder: Path) -> None:
    """Let plans read from now on, in this process, run the stand-ins."""
    for name in ("TEACHER_SCRIPT", "STUDENT_SCRIPT"):
        path = folder / f"{name.lower()}.py"
        path.write_text(SCRIPT)
        setattr(plan, name, dataclasses.replace(getattr(plan, name), path=str(path)))


def write_plan(path: Path, data: Path, model: Path, *changes: tuple[str, str]) -> Path:
    """`PLAN`, with some of its text replaced."""
    text = PLAN.format(data=data, model=model)
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    return path


def starts(folder: Path) -> list[str]:
    """How a run was started, each time: new or resumed."""
    return [line.split()[1] for line in (folder / "starts").read_text().splitlines()]


def record(folder: Path) -> dict:
    return json.loads(folder.with_name(folder.name + ".json").read_text())


def states(out: Path) -> dict[str, str]:
    """Run -> state, of all that have a record."""
    folders = [path.with_suffix("") for path in sorted(out.glob("**/*.json"))]
    records = {str(folder.relative_to(out)): record(folder) for folder in folders}
    return {name: each["state"] for name, each in records.items() if "state" in each}


def wait_until(fits: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not fits():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def wait_for(fits: Callable[[], bool], suite: warm.Process | subprocess.Popen) -> None:
    """Wait for something that a suite does on its way."""
    wait_until(lambda: fits() or suite.poll() is not None, seconds=180)
    assert fits(), suite.communicate()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


if __name__ == "__main__":
    use_stand_ins(Path(sys.argv[1]))
    run_suite.main(sys.argv[2:])
