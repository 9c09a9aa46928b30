"""Who asks for help, or mistypes an option, does not wait for what a run needs."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPTS = [
    "download_glue_data.py",
    "quickstart.py",
    "bert_finetune/run_glue.py",
    "-m bert_finetune.submission",
    "bert_finetune/convert_bert_original_tf_checkpoint_to_pytorch.py",
    "bert_emd/emd_task_distill.py",
    "-m bert_emd.teacher_cache",
    "experiments/run_suite.py",
    "experiments/compare_results.py",
]
HEAVY = {"torch", "scipy", "sklearn", "matplotlib", "datasets", "pyarrow", "ot", "pyemd", "accelerate"}


@pytest.mark.parametrize(("option", "code"), [("--help", 0), ("--no_such_option", 2)], ids=["help", "a wrong option"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_nothing_heavy_is_imported(script, option, code):
    """Every import is a line on stderr; `python SCRIPT` and `python -m MODULE` alike."""
    command = [sys.executable, "-X", "importtime", *script.split(), option]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    imported = set(re.findall(r"^import time: .*\| +(\w+)", done.stderr, flags=re.MULTILINE))
    assert done.returncode == code and "argparse" in imported
    assert not imported & HEAVY
