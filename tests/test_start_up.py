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
    "bert_emd/general_distill.py",
    "bert_emd/augment_data.py",
    "-m bert_emd.teacher_cache",
    "experiments/run_suite.py",
    "experiments/compare_results.py",
    "deploy/export_student.py",
    "deploy/classify.py",
    "deploy/measure.py",
    "deploy/serve.py",
]
HEAVY = {"torch", "scipy", "sklearn", "matplotlib", "datasets", "pyarrow", "ot", "pyemd", "accelerate"}


@pytest.mark.slow
@pytest.mark.parametrize(("option", "code"), [("--help", 0), ("--no_such_option", 2)], ids=["help", "a wrong option"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_nothing_heavy_is_imported(script, option, code):
    """`python SCRIPT` and `python -m MODULE` alike."""
    returned, _, imported = run(*script.split(), option)
    assert returned == code and "argparse" in imported
    assert not imported & HEAVY


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("seed = 1\n", "seed is not a key of a plan"),
        ("[methods.other]\nbetta = 1\n", "[methods.other]: bert_emd/emd_task_distill.py has no option betta"),
        ('[methods.other]\nlearning_rate = "x"\n', "[methods.other]: argument --learning_rate"),
        ("[teacher]\nseed = 1\n", "[teacher]: give model_name_or_path"),
    ],
    ids=["a key", "an option", "a value", "nothing to train"],
)
def test_a_wrong_plan_waits_for_nothing_heavy(wrong, said, tmp_path):
    plan = tmp_path / "plan.toml"
    plan.write_text('tasks = ["RTE"]\nseeds = [1]\nbaseline = "emd"\n' + wrong + "[methods.emd]\n")
    returned, last, imported = run("experiments/run_suite.py", str(plan), "--output_dir", str(tmp_path / "out"))
    assert returned == 2 and said in last
    assert not imported & HEAVY


def run(*words):
    """Exit code, last line on stderr, and what was imported: each import is a line there."""
    done = subprocess.run([sys.executable, "-X", "importtime", *words], cwd=ROOT, capture_output=True, text=True)
    imported = set(re.findall(r"^import time: .*\| +(\w+)", done.stderr, flags=re.MULTILINE))
    errors = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    return done.returncode, errors[-1] if errors else "", imported
