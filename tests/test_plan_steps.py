"""What a plan has done before its runs: general distillation, augmentation, the first of two stages."""

import json
import time
from pathlib import Path

import pytest
from suite_scripts import record, write_plan
from test_run_suite import run_forked, suite

import experiments.execution
from bert_finetune.tables import read_tsv
from experiments import compare_results, planned_runs, run_suite
from experiments.plan import read_plan

QUICK = 'num_train_epochs = 1\nmax_seq_length = 32\nuse_cpu = true\nreport_to = "none"\n'
STEPS = """
[steps.general]
script = "general_distill"
teacher_model = "{model}"
student_layers = 2
corpus = "{corpus}"
{quick}
[steps.more]
script = "augment_data"
word_vectors = "{model}"
copies = 2
"""
METHODS = """
[methods.general]
student_model = "{steps.general}"
[methods.more]
unlabeled_file = "{steps.more}"
[methods.layers]
one_step = false
[methods.two-stage]
student_model = "{methods.layers}"
pred_distill = true
"""


@pytest.fixture
def plan(tmp_path, glue_dir, pretrained):
    (tmp_path / "corpus.txt").write_text("\n".join(f"a document {k}\nof two lines\n" for k in range(40)))
    steps = STEPS.format(model=pretrained, corpus=tmp_path / "corpus.txt", quick=QUICK + "dev_share = 0.2")
    changes = (
        ('["RTE", "MRPC"]', '["RTE"]'),
        ("[1, 2]", "[1]"),
        ("layers = 2", "layers = 2\n" + QUICK),
        ("[teacher]", f"{steps}[teacher]\n{QUICK}"),
        ("[methods.emd]", METHODS),
    )
    return write_plan(tmp_path / "plan.toml", glue_dir, pretrained, *changes)


def test_what_runs_need(plan, tmp_path):
    runs = {run.name: run for run in read_plan(plan).runs(tmp_path)}
    assert list(runs)[:2] == ["steps/general", "steps/RTE/more"]
    general, more = runs["steps/general"], runs["steps/RTE/more"]
    assert (general.folder, more.folder) == (tmp_path / "steps/general", tmp_path / "steps/more/RTE.tsv")
    assert more.command[-3:] == ["--output", str(more.folder), "--overwrite"] and "RTE" in more.command
    assert runs["RTE/general/seed-1"].waits_for == [runs["RTE/teacher"], general]
    command = runs["RTE/more/seed-1"].shown
    assert f"--unlabeled_file {more.folder}" in command and "--student_layers 2" in command
    command = runs["RTE/two-stage/seed-1"].shown
    assert f"--student_model {runs['RTE/layers/seed-1'].folder}" in command and "student_layers" not in command


@pytest.mark.training
@pytest.mark.xdist_group("warm")
def test_the_whole_way(plan, tmp_path, monkeypatch, capsys, exits_with_2):
    monkeypatch.setattr(experiments.execution, "run_script", run_forked)
    out = tmp_path / "out"
    suite(plan, out)
    assert "8 done, 0 failed, 0 skipped" in capsys.readouterr().out
    train = len(read_tsv(out / "steps/more/RTE.tsv").rows)
    results = {
        name: json.loads((out / f"RTE/{name}/seed-1/eval_results.json").read_text()) for name in ("none", "more")
    }
    assert results["more"]["global_step"] > results["none"]["global_step"] and train > 0

    # The steps are no runs to compare, nor is a first stage.
    compare_results.main([str(out), "--output_dir", str(tmp_path / "results"), "--no_speed"])
    said = capsys.readouterr().out
    table = (tmp_path / "results/results.md").read_text()
    assert "the first of two stages" in said and "| two-stage |" in table and "| layers |" not in table

    # A suite that was killed just before it could say that a step is done.
    told = record(out / "steps/more/RTE.tsv")
    (out / "steps/more/RTE.tsv.json").write_text(json.dumps(told | {"state": "stopped"}))
    suite(plan, out)
    assert "8 done, 0 failed" in capsys.readouterr().out

    # Students of another step are not the plan's, nor are those that follow from it by way of others.
    written = plan.read_text()
    plan.write_text(written.replace("copies = 2", "copies = 3"))
    line = exits_with_2(run_suite.main, plan, "--output_dir", out)
    assert "copies=2" in line and "copies=3" in line
    (out / "steps/more/RTE.tsv").unlink()
    line = exits_with_2(run_suite.main, plan, "--output_dir", out)
    assert "RTE/more/seed-1: steps/RTE/more was run with copies=2" in line


def test_what_follows_by_way_of_others(plan, tmp_path):
    plan.write_text(
        plan.read_text().replace("[methods.layers]\n", '[methods.layers]\nstudent_model = "{steps.general}"\n')
    )
    runs = {run.name: run for run in read_plan(plan).runs(tmp_path)}
    last = runs["RTE/two-stage/seed-1"]
    assert [run.name for run in last.needs] == ["RTE/layers/seed-1"]
    assert [run.name for run in last.follows] == ["RTE/layers/seed-1", "steps/general"]


def test_dry_run_before_the_steps(plan, tmp_path, capsys):
    plan.write_text(plan.read_text().replace("[methods.none]", '[methods.none]\nstudent_model = "{steps.general}"'))
    suite(plan, tmp_path / "out", "--dry_run")
    assert "An estimate needs what steps/general makes" in capsys.readouterr().out


@pytest.mark.xdist_group("warm")
def test_a_step_that_fails(plan, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiments.execution, "run_script", lambda command, *rest: int("augment" in command[0]))
    plan.write_text(plan.read_text().replace("[methods.general]", "[methods.gone]"))
    monkeypatch.setattr(planned_runs.PlannedRun, "is_done", lambda run: False)
    with pytest.raises(SystemExit):
        suite(plan, tmp_path / "out")
    out = capsys.readouterr()
    assert "1 failed, 1 skipped" in out.out and "RTE/more/seed-1 skipped: steps/RTE/more failed" in out.out


def test_runs_begin_in_the_plan_s_order_once_they_can(plan, tmp_path, monkeypatch):
    begun = []

    def pretend(command, environment, log, stopping=None):
        options = dict(zip(command[1::2], command[2::2], strict=False))
        out = Path(options.get("--output_dir") or options["--output"])
        begun.append(str(out.relative_to(tmp_path / "out")))
        time.sleep(0.6 if "general_distill" in command[0] else 0.1)
        if "--output" in options:
            out.touch()
        else:
            out.mkdir(parents=True)
            (out / "eval_results.json").write_text("{}")
        return 0

    monkeypatch.setattr(experiments.execution, "run_script", pretend)
    plan.write_text(plan.read_text().replace("seeds = [1]", "seeds = [1, 2, 3]"))
    suite(plan, tmp_path / "out", "--jobs", 2)
    assert len(begun) == 3 + 3 * 5
    # What waits for a long step begins before the runs of later seeds that could begin earlier.
    assert begun.index("RTE/general/seed-1") < begun.index("RTE/more/seed-3")
