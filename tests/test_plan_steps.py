"""What a plan has done before its runs: general distillation, augmentation, the first of two stages."""

import json

import pytest
from suite_scripts import record, states, write_plan
from test_run_suite import run_forked, suite

import experiments.execution
from bert_finetune.tables import read_tsv
from experiments import compare_results
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
    assert more.command[-2:] == ["--output", str(more.folder)] and "RTE" in more.command
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

    # Students of another step are not the plan's.
    plan.write_text(plan.read_text().replace("copies = 2", "copies = 3"))
    from experiments.run_suite import main

    line = exits_with_2(main, plan, "--output_dir", out)
    assert "copies=2" in line and "copies=3" in line
    assert states(out)["RTE/more/seed-1"] == "done" and record(out / "RTE/more/seed-1")["needs"]
