"""Stand-ins for the two scripts that a suite runs: they take the same options and are done at once.

A run sleeps --logging_steps seconds unless it resumes, fails with --weight_decay 13, and leaves a line in `starts` for
each time it is started: its process, and whether there was a checkpoint to resume from.
"""

import dataclasses
from pathlib import Path

from bert_emd import suite_plan

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
    for name in ("TEACHER", "STUDENT"):
        path = folder / f"{name.lower()}.py"
        path.write_text(SCRIPT)
        setattr(suite_plan, name, dataclasses.replace(getattr(suite_plan, name), path=str(path)))
