import csv
import json
import re
import shutil

import numpy as np
import pytest
from conftest import save_bert

from bert_emd import emd_task_distill
from bert_finetune.finishing import write_eval_results
from bert_finetune.glue import get_task
from deploy.export_student import main as export
from experiments.compare_results import main
from experiments.comparison import Teachers, compare
from experiments.figures import all_figures_of, figures_of
from experiments.finished_runs import find_runs
from experiments.tables_out import Number, ResultTable, latex, markdown

EXAMPLES = 200
LABELS = np.arange(EXAMPLES) % 2


def answers(right: float, shift: int = 0, labels=LABELS) -> np.ndarray:
    """Logits of which the share `right` is right, `shift` moving where the wrong ones lie."""
    wrong = (np.arange(len(labels)) + shift) % len(labels) >= round(right * len(labels))
    return np.eye(2)[np.where(wrong, 1 - labels, labels)]


def write_run(folder, logits=None, labels=LABELS, task="RTE", seed=None, **more):
    """A finished run as the scripts leave it, with `logits` for its dev set(s)."""
    folder.mkdir(parents=True)
    sets = logits if isinstance(logits, dict) else {"": logits}
    results, arrays = {"task": task, "global_step": 10}, {}
    for name, values in sets.items():
        figures = get_task(task).measure(values, labels)
        results |= {"_".join(filter(None, ("eval", name, key))): value for key, value in figures.items()}
        arrays |= {"/".join(filter(None, (name, kind))): a for kind, a in (("logits", values), ("labels", labels))}
    write_eval_results(folder, results | more, [])
    np.savez(folder / "dev_predictions.npz", **arrays)
    if seed is not None:
        run = {"command": f"python run.py --seed {seed}", "folder": ".", "seed": seed, "options": {}}
        (folder / "args.json").write_text(json.dumps(run | {"versions": {"torch": "2.13.0"}}))
    return folder


def record(folder, **what):
    """The record that a suite leaves beside a run's folder."""
    known = {"task": "RTE", "size": None, "method": "emd", "seed": 1, "command": "python x.py", "state": "done"}
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.with_name(folder.name + ".json").write_text(json.dumps(known | what))


def run(tmp_path, *argv, folder="runs"):
    """Run the script on `tmp_path`/runs; its results.md, summary.csv and results.csv."""
    out = tmp_path / "results"
    main([str(tmp_path / folder), "--output_dir", str(out), "--no_speed", *map(str, argv)])
    tables = [list(csv.DictReader((out / name).read_text().splitlines())) for name in ("summary.csv", "results.csv")]
    return (out / "results.md").read_text(), *tables


def only(rows, **cells):
    (row,) = [row for row in rows if all(row[key] == value for key, value in cells.items())]
    return row


def rows_of(text, title):
    """A Markdown table's rows by their first cell."""
    block = text.partition(f"## {title}\n\n")[2].partition("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in block]
    return {row[0]: dict(zip(cells[0], row, strict=True)) for row in cells[2:]}


@pytest.fixture
def suite(tmp_path):
    """Three seeds of a baseline (.60, .62, .64 right) and of two rivals: one far ahead (.18, .20, .22), one level."""
    for seed, right in ((1, 0.60), (2, 0.62), (3, 0.64)):
        write_run(tmp_path / "runs/RTE/none" / f"seed-{seed}", answers(right), seed=seed, train_seconds=10 * seed)
        write_run(tmp_path / "runs/RTE/emd" / f"seed-{seed}", answers(right + 0.16 + 0.02 * seed, 7), seed=seed)
        write_run(tmp_path / "runs/RTE/skip" / f"seed-{seed}", answers(right, 100), seed=seed)
    return tmp_path


def test_means_differences_and_claims(suite, capsys):
    text, summary, runs = run(suite, "--baseline", "none")
    assert text in capsys.readouterr().out
    none, emd, skip = (only(summary, method=method) for method in ("none", "emd", "skip"))
    assert (float(none["mean"]), float(none["sd"]), none["seeds"]) == (62, 2, "3")
    assert (none["difference"], none["low"], none["claim"], none["p"]) == ("", "", "", "")
    assert (none["holm_p"], none["equality"], none["equal_p"]) == ("", "", "")
    assert float(emd["difference"]) == pytest.approx(20) and float(emd["low"]) > 0 and emd["claim"] == "better"
    assert float(emd["p"]) == pytest.approx(0.0033, abs=1e-4)  # t = 20 / (2 / √3) with 2 degrees of freedom
    assert float(skip["difference"]) == 0 and float(skip["low"]) < 0 < float(skip["high"])
    assert skip["claim"] == "" and skip["p"] == "" and skip["equality"] == "cannot tell"
    rows = rows_of(text, "RTE, dev set")
    assert list(rows) == ["none", "emd", "skip"]
    assert rows["emd"]["difference to none"] == "+20.00" and rows["emd"]["claim"] == "better"
    assert rows["skip"]["claim"] == "" and rows["none"]["mean ± sd"] == "62.0 ± 2.0"
    assert len(runs) == 9 and only(runs, method="emd", seed="2")["figure"] == "82.0"
    assert [row["train_seconds"] for row in runs if row["method"] == "none"] == ["10", "20", "30"]
    assert "standard deviation over seeds (number of seeds: 3)." in text


@pytest.fixture
def rivals(tmp_path):
    """Five seeds of a baseline, of `ahead` and of `level`, which differ from it by 5 to 7 and by -.5 to .5 points."""
    for seed in range(1, 6):
        base = 0.5 + 0.02 * seed
        for method, more in (("none", 0), ("ahead", 0.05 + 0.005 * (seed % 5)), ("level", 0.005 * (seed % 3 - 1))):
            write_run(tmp_path / f"runs/RTE/{method}/seed-{seed}", answers(base + more), seed=seed)
    return tmp_path


def test_p_values_are_corrected_and_equality_is_told(rivals):
    text, summary, _ = run(rivals, "--baseline", "none", "--equivalence", 1)
    ahead, level = only(summary, method="ahead"), only(summary, method="level")
    # By hand: differences 5.5, 6, 6.5, 7, 5 of mean 6, and 0, .5, -.5, 0, .5 of mean .1.
    assert (float(ahead["difference"]), float(level["difference"])) == pytest.approx((6, 0.1))
    assert float(ahead["holm_p"]) == pytest.approx(2 * float(ahead["p"]), abs=1e-6) and ahead["claim"] == "better"
    assert float(level["holm_p"]) == float(level["p"]) and level["claim"] == ""
    assert (ahead["equality"], level["equality"]) == ("not equal", "equal within 1")
    # 4 degrees of freedom; the larger t is (.1 - 1) / (.41833 / √5) = -4.81, of two comparisons.
    assert float(level["equal_p"]) == pytest.approx(2 * 0.0043, abs=1e-4) and float(level["unequal_p"]) == 1
    assert float(ahead["equal_p"]) > 0.99 and ahead["margin"] == "1.0"
    rows = rows_of(text, "RTE, dev set")
    assert list(rows["level"])[3:] == ["difference to none", "95 % interval", "p", "p (Holm)", "claim", "equality"]
    assert rows["level"]["equality"] == "equal within 1" and rows["none"]["equality"] == ""
    assert "<td>equal within 1</td>" in (rivals / "results/report.html").read_text()
    assert r" & equal within 1 \\" in (rivals / "results/results.tex").read_text()
    _, summary, _ = run(rivals, "--baseline", "none")
    assert only(summary, method="level")["equality"] == "cannot tell"


def test_a_claim_needs_the_corrected_p(tmp_path):
    """p is .04 for each of two methods: neither is shown to be better."""
    for seed, ahead in ((1, 0.1), (2, 0.15), (3, 0.22)):
        for method in ("once", "twice"):
            write_run(tmp_path / f"runs/RTE/{method}/seed-{seed}", answers(0.6 + ahead, 7), seed=seed)
        write_run(tmp_path / f"runs/RTE/none/seed-{seed}", answers(0.6), seed=seed)
    _, summary, _ = run(tmp_path, "--baseline", "none")
    once = only(summary, method="once")
    assert 0.03 < float(once["p"]) < 0.05 < float(once["holm_p"]) and float(once["low"]) > 0 and once["claim"] == ""
    shutil.rmtree(tmp_path / "runs/RTE/twice")
    assert only(run(tmp_path, "--baseline", "none")[1], method="once")["claim"] == "better"


def with_teachers(runs, name):
    """Have each run's args.json say of which teacher it is, by its seed."""
    for path in runs.glob("**/args.json"):
        args = json.loads(path.read_text())
        options = {"teacher_model": name(args["seed"])}
        path.write_text(json.dumps(args | {"options": options}))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (lambda seed: "teacher", Teachers.ONE),
        (lambda seed: "./teacher" if seed == 1 else "teacher", Teachers.ONE),
        (lambda seed: f"teacher/seed-{seed}", Teachers.OWN),
        (lambda seed: f"teacher/seed-{seed % 2}", Teachers.UNKNOWN),
        (lambda seed: None, Teachers.UNKNOWN),
    ],
    ids=["one", "one under two names", "one for each seed", "shared by some seeds", "not known"],
)
def test_what_p_says_of_the_teacher(name, said, suite):
    with_teachers(suite / "runs", name)
    text = run(suite, "--baseline", "none")[0]
    assert [teachers for teachers in Teachers if teachers.value in text] == [said]
    assert said.value in (suite / "results/report.html").read_text()
    assert said.value in (suite / "results/results.tex").read_text()


def test_nothing_is_said_of_teachers_without_p(suite):
    text = run(suite)[0]
    assert not any(teachers.value in text for teachers in Teachers)


def test_no_claim_where_the_seeds_do_not_agree(tmp_path):
    """An interval over examples alone, be it far from zero, says nothing of a model trained anew."""
    for seed, ahead in ((1, 0.1), (2, 0.2), (3, 0.3)):
        write_run(tmp_path / f"runs/RTE/none/seed-{seed}", answers(0.6), seed=seed)
        write_run(tmp_path / f"runs/RTE/jumpy/seed-{seed}", answers(0.6 + ahead, 7), seed=seed)
    write_run(tmp_path / "runs/RTE/once/seed-1", answers(0.9, 7), seed=1)
    _, summary, _ = run(tmp_path, "--baseline", "none")
    jumpy, once = only(summary, method="jumpy"), only(summary, method="once")
    assert float(jumpy["low"]) > 10 and float(jumpy["p"]) == pytest.approx(0.0742, abs=1e-3) and not jumpy["claim"]
    assert float(once["low"]) > 10 and once["p"] == once["claim"] == ""


def test_the_other_way_round_it_is_worse(suite):
    text, summary, _ = run(suite, "--baseline", "emd")
    assert (
        only(summary, method="none")["claim"] == "worse" and "worse" in rows_of(text, "RTE, dev set")["none"]["claim"]
    )


def test_without_a_baseline(suite):
    text, summary, _ = run(suite)
    assert "No baseline was named (--baseline): no differences." in text
    assert "claim" not in rows_of(text, "RTE, dev set")["emd"] and only(summary, method="emd")["difference"] == ""


def test_the_plan_names_the_baseline(suite):
    (suite / "runs/plan.toml").write_text('baseline = "skip"\n# <b>')
    text, summary, _ = run(suite)
    assert "difference to skip" in text and only(summary, method="emd")["baseline"] == "skip"
    assert "# &lt;b&gt;" in (suite / "results/report.html").read_text()
    more = 'tasks = ["RTE", "MRPC"]\nseeds = [1, 2, 3, 4]\n[methods.none]\n[methods.uniform]\n'
    (suite / "runs/plan.toml").write_text('baseline = "skip"\n' + more)
    assert (
        "- 13 of the planned students have not begun, by method (seeds): RTE none (1), RTE uniform (4), MRPC none (4), "
        "MRPC uniform (4)."
    ) in run(suite)[0]
    (suite / "runs/plan.toml").write_text('baseline = "uniform"')
    assert "The plan's baseline uniform has no finished run: no differences." in run(suite)[0]


def test_the_same_call_gives_the_same_tables(suite):
    assert run(suite, "--baseline", "none") == run(suite, "--baseline", "none")


def test_only_common_seeds_are_paired(suite):
    write_run(suite / "runs/RTE/emd/seed-4", answers(1.0), seed=4)
    write_run(suite / "runs/RTE/last/seed-9", answers(0.9), seed=9)
    text, summary, _ = run(suite, "--baseline", "none")
    emd, last = only(summary, method="emd"), only(summary, method="last")
    assert (emd["seeds"], emd["common_seeds"]) == ("4", "3") and float(emd["difference"]) == pytest.approx(20)
    assert (last["difference"], last["sd"]) == ("", "") and "RTE, last: no seed in common with none." in text
    assert rows_of(text, "All figures, dev set")["emd"]["RTE"].endswith("(4)")


def test_no_interval_without_predictions(suite):
    (suite / "runs/RTE/emd/seed-2/dev_predictions.npz").unlink()
    text, summary, _ = run(suite, "--baseline", "none")
    emd = only(summary, method="emd")
    assert float(emd["difference"]) == pytest.approx(20) and emd["p"] and (emd["low"], emd["claim"]) == ("", "")
    assert "RTE, emd: no interval, since there is no dev_predictions.npz of RTE emd, seed 2." in text


def test_tasks_average_and_mnli(tmp_path):
    labels = np.arange(300) % 3
    for method, right in (("none", 0.5), ("emd", 0.75)):
        matched = np.eye(3)[np.where(np.arange(300) < 300 * right, labels, (labels + 1) % 3)]
        write_run(
            tmp_path / f"runs/MNLI/{method}", {"matched": matched, "mismatched": matched[::-1]}, labels, "MNLI", seed=1
        )
        write_run(tmp_path / f"runs/rte/{method}", answers(right), seed=1)
    write_run(tmp_path / "runs/RTE/skip", answers(0.5), seed=1)
    text, summary, runs = run(tmp_path, "--baseline", "none")
    rows = rows_of(text, "All figures, dev set")
    assert list(rows["emd"])[1:] == ["MNLI-m", "MNLI-mm", "RTE", "average"]
    assert rows["emd"]["MNLI-m"] == rows["emd"]["RTE"] == "75.0" and rows["skip"]["average"] == ""
    mismatched = float(only(summary, figure="MNLI-mm", method="emd")["mean"])
    assert float(rows["emd"]["average"]) == pytest.approx((150 + mismatched) / 3, abs=0.06)
    # As many rows of each class.
    constant = rows["constant answer"]
    assert (constant["MNLI-m"], constant["MNLI-mm"], constant["average"]) == ("33.3", "33.3", "")
    assert constant["RTE"] == "50.0"
    assert "Average: mean of MNLI-m, MNLI-mm, RTE, for methods that have all of them." in text
    assert float(only(runs, task="MNLI", method="emd")["mismatched"]) == mismatched
    assert float(only(summary, figure="MNLI-m", method="emd")["low"]) > 0


def test_records_say_what_a_run_is(tmp_path):
    for size in ("4-312", "6-768"):
        for method in ("none", "emd"):
            folder = write_run(tmp_path / f"runs/RTE/{size}/{method}/seed-5", answers(0.7), seed=1)
            record(folder, size=size, method=f"{method}!", seed=7, command=f"python {size}.py")
    write_run(tmp_path / "runs/RTE/teacher", answers(0.9), seed=42)
    record(tmp_path / "runs/RTE/teacher", method="teacher", size="", seed=None)
    _, summary, runs = run(tmp_path, "--baseline", "none!")
    found = [(row["method"], row["size"]) for row in summary]
    assert found == [("teacher", ""), ("none!", "4-312"), ("emd!", "4-312"), ("none!", "6-768"), ("emd!", "6-768")]
    assert only(runs, method="emd!", size="6-768")["command"] == "python 6-768.py"
    assert only(runs, method="emd!", size="6-768")["seed"] == "7"
    assert only(summary, method="teacher")["difference"] == "" and only(summary, method="teacher")["mean"] == "90.0"
    assert only(summary, method="emd!", size="4-312")["difference"] == "0.0"  # each against its own size's baseline


def test_the_teachers_row_from_its_students(tmp_path):
    for seed in (1, 2):
        write_run(tmp_path / f"runs/emd/seed-{seed}", answers(0.6), seed=seed, teacher_eval_accuracy=0.8)
    text, summary, _ = run(tmp_path)
    assert (only(summary, method="teacher")["mean"], only(summary, method="teacher")["seeds"]) == ("80.0", "1")
    assert list(rows_of(text, "RTE, dev set")) == ["teacher", "emd"]


def test_unfinished_and_failed_runs_are_named(suite):
    record(suite / "runs/RTE/emd/seed-4", seed=4, state="failed")
    record(suite / "runs/RTE/last/seed-1", method="last", state="running")
    (suite / "runs/RTE/last/seed-1/checkpoint-5").mkdir(parents=True)
    (suite / "runs/RTE/last/seed-1/checkpoint-5/eval_results.json").write_text("{}")
    (suite / "runs/RTE/uniform/seed-1").mkdir(parents=True)
    (suite / "runs/RTE/uniform/seed-1/args.json").write_text(json.dumps({"seed": 1}))
    record(suite / "runs/RTE/none/seed-3", method="none", seed=3, state="stopped")  # run again, and not yet through
    text, _, runs = run(suite, "--baseline", "none")
    assert text.splitlines()[2] == (
        "- 4 runs are left out, not finished: RTE emd, seed 4 (failed); RTE last, seed 1 (running); "
        "RTE none, seed 3 (stopped); RTE uniform, seed 1 (no eval_results)."
    )
    assert len(runs) == 8 + 4 and only(runs, state="failed")["seed"] == "4"


def test_the_published_codes_text_file(tmp_path):
    """It says neither task nor seed; each evaluation is appended, and the model kept is that of the best accuracy."""
    folder = tmp_path / "runs/MRPC/student"
    folder.mkdir(parents=True)
    (folder / "eval_results.txt").write_text("acc = 0.80\nf1 = 0.85\nacc = 0.82\nf1 = 0.88\nacc = 0.83\nf1 = 0.87\n")
    (tmp_path / "runs/MNLI").mkdir()
    (tmp_path / "runs/MNLI/eval_results.txt").write_text("acc = 0.7\n\nglobal_step = 5\n")
    text, summary, _ = run(tmp_path)
    assert only(summary, figure="MRPC F1")["mean"] == "87.0" and only(summary, figure="MRPC F1")["method"] == "student"
    assert only(summary, figure="MNLI-m")["mean"] == "70.0" and "MNLI-mm, dev" not in text


def test_a_task_of_ones_own(tmp_path):
    for method, right in (("none", 0.5), ("emd", 0.9)):
        write_run(tmp_path / "runs" / method, answers(right), seed=1, task="RTE")
        results = json.loads((tmp_path / "runs" / method / "eval_results.json").read_text())
        (tmp_path / "runs" / method / "eval_results.json").write_text(json.dumps(results | {"task": "custom"}))
    assert float(only(run(tmp_path, "--baseline", "none")[1], figure="custom", method="emd")["low"]) > 0


def test_names_are_escaped(tmp_path):
    name = '50%_a&b, "c" | <i>#{x}'
    folder = write_run(tmp_path / "runs/RTE/x/seed-1", answers(0.6), seed=1)
    record(folder, method=name)
    text, summary, runs = run(tmp_path)
    assert summary[0]["method"] == runs[0]["method"] == name
    assert '| 50%\\_a&b, "c" \\| \\<i>#{x} |' in text
    out = tmp_path / "results"
    assert r'50\%\_a\&b, "c" | \textless{}i\textgreater{}\#\{x\}' in (out / "results.tex").read_text()
    page = (out / "report.html").read_text()
    assert "50%_a&amp;b, &quot;c&quot; | &lt;i&gt;#{x}" in page and "<i>" not in page


def test_latex_table():
    table = ResultTable(
        "A_b", ["method", "mean"], [["none", Number("-1.5 ± 0.2", -1.5)], ["4-312", ""]], ("Over 2 seeds.",)
    )
    assert latex(table).splitlines() == [
        r"\begin{table}",
        r"\centering",
        r"\caption{A\_b}",
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        r"\begin{tabular}{lr}",
        r"\toprule",
        r"method & mean \\",
        r"\midrule",
        r"none & $-$1.5 $\pm$ 0.2 \\",
        r"4-312 &  \\",
        r"\bottomrule",
        r"\end{tabular}}",
        "",
        r"\smallskip{\footnotesize Over 2 seeds.}",
        r"\end{table}",
    ]
    assert markdown(table).splitlines()[2:5] == ["| method | mean |", "| --- | ---: |", "| none | -1.5 ± 0.2 |"]


def damage(path, content):
    path.write_bytes(content)


BAD = {
    "no such folder": (lambda runs: runs.rename(runs.with_name("elsewhere")), "runs: no such folder"),
    "nothing in it": (
        lambda runs: [path.rename(runs.parent / path.name) for path in runs.iterdir()],
        "no finished run",
    ),
    "damaged json": (
        lambda runs: damage(runs / "RTE/emd/seed-1/eval_results.json", b'{"task": "RTE"'),
        "emd/seed-1/eval_results.json: cannot be loaded",
    ),
    "a list": (lambda runs: damage(runs / "RTE/emd/seed-1/args.json", b"[]"), "args.json: cannot be loaded: holds no"),
    "damaged record": (lambda runs: damage(runs / "RTE/emd/seed-1.json", b"\xff"), "seed-1.json: cannot be loaded"),
    "no npz": (
        lambda runs: damage(runs / "RTE/emd/seed-1/dev_predictions.npz", b"PK\x03\x04 cut"),
        "emd/seed-1/dev_predictions.npz: cannot be loaded",
    ),
    "another array": (
        lambda runs: np.savez(runs / "RTE/emd/seed-1/dev_predictions.npz", scores=LABELS),
        "dev_predictions.npz: cannot be loaded: KeyError",
    ),
    "too few logits": (
        lambda runs: np.savez(runs / "RTE/emd/seed-1/dev_predictions.npz", logits=answers(0.7)[:9], labels=LABELS),
        "dev_predictions.npz: does not hold logits and a label for each example",
    ),
    "stale logits": (
        lambda runs: np.savez(runs / "RTE/emd/seed-1/dev_predictions.npz", logits=answers(0.1), labels=LABELS),
        "gives eval_accuracy 0.1000, but the eval_results beside it 0.7800; they are not of the same run",
    ),
    "another dev set": (
        lambda runs: write_run(runs / "RTE/other", answers(0.6, labels=1 - LABELS), 1 - LABELS, seed=1),
        "two sets of RTE cannot be compared",
    ),
    "a figure that is none": (
        lambda runs: damage(runs / "RTE/emd/seed-1/eval_results.json", b'{"task": "RTE", "eval_accuracy": "high"}'),
        "eval_accuracy of its eval_results is 'high', not a number",
    ),
    "no figure": (
        lambda runs: damage(runs / "RTE/emd/seed-1/eval_results.json", b'{"task": "RTE"}'),
        "its eval_results has no eval_accuracy, which RTE is compared by",
    ),
    "unknown task": (
        lambda runs: damage(runs / "RTE/emd/seed-1/eval_results.json", b'{"task": "XNLI"}'),
        'emd/seed-1: "XNLI" is no GLUE task',
    ),
    "a task that is no text": (
        lambda runs: damage(runs / "RTE/emd/seed-1/eval_results.json", b'{"task": 5}'),
        "emd/seed-1: 5 is no GLUE task",
    ),
    "no task": (
        lambda runs: (
            (runs.parent / "runs/plain").mkdir(),
            damage(runs.parent / "runs/plain/eval_results.txt", b"acc = 1"),
        ),
        "plain: neither its eval_results nor its path says which task it is",
    ),
    "no line of figures": (
        lambda runs: ((runs / "plain").mkdir(), damage(runs / "plain/eval_results.txt", b"acc = 1\nhello")),
        "plain/eval_results.txt, line 2: not of the form key = value",
    ),
    "the same run twice": (
        lambda runs: write_run(runs / "RTE/seed-1/emd", answers(0.6), seed=1),
        "both are RTE emd, seed 1",
    ),
    "a bad plan": (lambda runs: damage(runs / "plan.toml", b"baseline = "), "plan.toml: cannot be loaded"),
    "a damaged picture": (
        lambda runs: damage(runs / "RTE/emd/seed-1/flow.png", b"GIF89a"),
        "flow.png: is not a PNG or SVG picture",
    ),
}


@pytest.mark.parametrize(("what", "line"), BAD.values(), ids=BAD)
def test_bad_input(what, line, suite, exits_with_2):
    what(suite / "runs")
    assert line in exits_with_2(main, suite / "runs", "--no_speed", "--output_dir", suite / "results")
    assert not (suite / "results/results.md").exists()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--baseline", "uniform"], "--baseline uniform: no finished run is of this method; there are emd, none, skip"),
        (["--resamples", "10"], "--resamples 10: an interval needs 100 or more"),
        (["--equivalence", "0"], "--equivalence 0.0: give points, more than 0"),
        (["--equivalence", "nan"], "--equivalence nan: give points, more than 0"),
        (["--pictures", "none.png"], "none.png: No such file or directory"),
    ],
    ids=[
        "a baseline of no run",
        "too few resamples",
        "equal within nothing",
        "equal within nan",
        "a picture that is not there",
    ],
)
def test_bad_options(options, line, suite, exits_with_2):
    assert line in exits_with_2(main, suite / "runs", "--no_speed", "--output_dir", suite / "results", *options)


def test_two_plans_with_different_baselines(suite, exits_with_2):
    for name, baseline in (("RTE", "none"), ("MRPC", "emd")):
        (suite / "runs" / name).mkdir(exist_ok=True)
        (suite / "runs" / name / "plan.toml").write_text(f'baseline = "{baseline}"')
    said = exits_with_2(main, suite / "runs/RTE", suite / "runs/MRPC", "--output_dir", suite / "results")
    assert "the plans name different baselines: none, emd; give --baseline" in said


def test_folders_that_overlap_are_read_once(suite):
    runs, _ = find_runs([suite / "runs", suite / "runs/RTE"])
    assert len(runs) == 9


def test_resampled_intervals_come_from_the_library(suite):
    """The importable pieces give what the script writes."""
    runs, _ = find_runs([suite / "runs"])
    emd = next(s for s in compare(runs, "none").summaries if s.method == "emd")
    row = only(run(suite, "--baseline", "none")[1], method="emd")
    assert emd.interval == pytest.approx((float(row["low"]), float(row["high"])), abs=1e-6)


@pytest.mark.training
def test_a_real_run_of_mnli(glue_dir, tmp_path):
    """Both of its dev sets are found by the names that the trainer gives them."""
    teacher = save_bert(tmp_path / "teacher", get_task("MNLI").kind.output_names)
    argv = ["--teacher_model", teacher, "--student_layers", 1, "--task_name", "MNLI", "--data_dir", glue_dir / "MNLI"]
    argv += ["--output_dir", tmp_path / "runs/emd", "--max_seq_length", 32, "--no_cuda", "--max_steps", 1]
    emd_task_distill.main([str(argument) for argument in argv])
    (found,), _ = find_runs([tmp_path / "runs"])
    for figure in figures_of(found.task):
        kept = found.predictions(figure)
        assert kept["logits"].shape == (12, 3) and figure.of(kept) == pytest.approx(found.figure(figure))
        assert found.figure(figure, "teacher_") is not None


@pytest.mark.training
@pytest.mark.draws
def test_real_runs_from_end_to_end(teacher, glue_dir, tmp_path, monkeypatch):
    """Tiny students, with and without EMD, two seeds each, compared with the teacher's figures, size and speed."""
    monkeypatch.chdir(tmp_path)
    for method, options in {"none": ("--layer_mapping", "none", "--alpha", "0"), "emd": ()}.items():
        for seed in (1, 2):
            out = tmp_path / "runs/RTE" / method / f"seed-{seed}"
            argv = ["--teacher_model", teacher, "--student_layers", 2, "--task_name", "RTE", "--seed", seed, *options]
            argv += ["--data_dir", glue_dir / "RTE", "--output_dir", out, "--max_seq_length", 32, "--no_cuda"]
            emd_task_distill.main([str(argument) for argument in [*argv, "--num_train_epochs", 1]])
    export(["--model", "runs/RTE/emd/seed-1", "--data_dir", str(glue_dir), "--max_drop", "100"])
    main(["runs", "--baseline", "none", "--keep_runs", "kept"])
    text = (tmp_path / "results/results.md").read_text()
    rows = rows_of(text, "All figures, dev set")
    assert list(rows) == ["teacher", "none", "emd", "constant answer"]
    told = [json.loads((tmp_path / f"runs/RTE/emd/seed-{k}/eval_results.json").read_text()) for k in (1, 2)]
    assert float(rows["emd"]["RTE"].split()[0]) == pytest.approx(50 * sum(t["eval_accuracy"] for t in told), abs=0.06)
    assert float(rows["teacher"]["RTE"].split()[0]) == pytest.approx(100 * told[0]["teacher_eval_accuracy"], abs=0.06)
    assert rows["teacher"]["speed-up"] == "1.0 x" and rows["none"]["speed-up"] == rows["emd"]["speed-up"]
    assert float(rows["emd"]["weights (MB)"]) <= float(rows["teacher"]["weights (MB)"])
    assert "Speed-up: on a batch of 8 x 62 made-up tokens" in text
    emd = rows_of(text, "RTE, dev set")["emd"]
    assert re.fullmatch(r"\[[+-]\d+\.\d\d, [+-]\d+\.\d\d\]", emd["95 % interval"])
    page = (tmp_path / "results/report.html").read_text()
    assert "data:image/svg+xml;base64," in page and page.count("RTE emd, seed 1: flow<") == 1
    for name, words in {
        "rte-training": ["none", "emd", "training step"],
        "rte-methods": ["teacher", "emd"],
        "rte-differences": ["emd"],
        "rte-latency": ["teacher", "emd", "full marks: PyTorch, float32; hollow ones: ONNX, int8"],
    }.items():
        drawn = (tmp_path / f"results/{name}.svg").read_text()
        assert all(f">{word}" in drawn for word in words), name
        assert (tmp_path / f"results/{name}.png").read_bytes().startswith(b"\x89PNG")
    assert page.count(">RTE: ") == 4  # each picture of the comparison
    # What is kept of the runs has no model and nothing private, and gives the same tables.
    kept = [path for path in (tmp_path / "kept").rglob("*") if path.is_file()]
    assert {path.name for path in kept} == {"eval_results.json", "args.json", "dev_predictions.npz"}
    assert not any(str(tmp_path) in path.read_text() for path in kept if path.suffix == ".json")
    main(["kept", "--baseline", "none", "--output_dir", "again"])
    again = rows_of((tmp_path / "again/results.md").read_text(), "RTE, dev set")
    assert again == rows_of(text, "RTE, dev set")
    assert 'id="commands"' in page and "<td>transformers</td>" in page


def write_tested_run(folder, right, close, seed, **figures):
    """A run with a teacher's answers for its dev set, and a held-out file; `close`: how near it is to the teacher."""
    write_run(folder, answers(right), seed=seed, **figures)
    kind, teachers = get_task("RTE").kind, answers(0.7, 3)
    ours = close * teachers + (1 - close) * answers(right, 11)
    results = json.loads((folder / "eval_results.json").read_text())
    measured = kind.agreement(answers(right), teachers)
    results |= {f"eval_{name}": value for name, value in measured.items()}
    measured = kind.agreement(ours, teachers) | kind.measure(["accuracy"], ours, LABELS)
    results |= {f"test_{name}": value for name, value in measured.items()} | {"teacher_test_accuracy": 0.7}
    (folder / "eval_results.json").write_text(json.dumps(results))
    np.savez(folder / "dev_predictions.npz", logits=answers(right), labels=LABELS, teacher_logits=teachers)
    np.savez(folder / "test_predictions.npz", logits=ours, labels=LABELS, teacher_logits=teachers)


@pytest.fixture
def tested(tmp_path):
    for seed in (1, 2, 3, 4):
        for method, close in (("none", 0.1), ("emd", 0.6)):
            write_tested_run(tmp_path / f"runs/RTE/{method}/seed-{seed}", 0.6, close + 0.01 * seed**0.5 * close, seed)
    return tmp_path


def test_agreement_stands_beside_the_score(tested):
    text, summary, runs = run(tested, "--baseline", "none")
    rows = rows_of(text, "All figures, dev set, or held-out file (test)")
    titles = ["RTE", "RTE agreement", "RTE divergence", "RTE test", "RTE test agreement", "RTE test divergence"]
    assert list(rows["emd"])[1:] == titles
    for title, key in zip(
        titles, ["figure", *(t.replace("RTE", "eval").replace(" ", "_") for t in titles[1:3])], strict=False
    ):
        known = only(runs, method="emd", seed="1")[key]
        assert rows["emd"][title].startswith(f"{float(known):.1f}")
    assert float(only(runs, method="emd", seed="1")["test_divergence"]) > 0
    assert rows["teacher"]["RTE test"] == "70.0" and rows["teacher"]["RTE agreement"] == ""
    assert only(summary, figure="RTE test divergence", method="emd")["difference"] == ""
    assert [line for line in text.splitlines() if line.startswith("## RTE")] == ["## RTE, dev set"]


def test_compared_by_figures_that_are_named(tested):
    text, summary, _ = run(tested, "--baseline", "none", "--figure", "test_score", "test_agreement", "test_divergence")
    assert "## RTE test, held-out file" in text and "## RTE, dev set" not in text
    by_hand = {}
    for method in ("none", "emd"):
        kept = [dict(np.load(tested / f"runs/RTE/{method}/seed-{k}/test_predictions.npz")) for k in (1, 2, 3, 4)]
        found = [get_task("RTE").kind.divergences(each["logits"], each["teacher_logits"]) for each in kept]
        by_hand[method] = 100 * np.array(found)
    row = only(summary, figure="RTE test divergence", method="emd")
    paired = (by_hand["emd"] - by_hand["none"]).mean(axis=0)
    assert float(row["difference"]) == pytest.approx(paired.mean(), abs=1e-4) and paired.mean() < 0
    error = paired.std() / EXAMPLES**0.5
    assert (float(row["low"]), float(row["high"])) == pytest.approx(
        (paired.mean() - 1.96 * error, paired.mean() + 1.96 * error), abs=0.4 * error
    )
    assert row["claim"] == "better"  # the smaller the better
    agreement = only(summary, figure="RTE test agreement", method="emd")
    assert float(agreement["difference"]) > 0 and float(agreement["low"]) > 0


def test_a_figure_that_no_run_has(tested, exits_with_2):
    for name in ("f1", "test_mcc", "nonsense"):
        line = exits_with_2(main, tested / "runs", "--output_dir", tested / "results", "--figure", name)
        assert f"--figure {name}: no run has it" in line and not (tested / "results").exists()


def test_a_file_without_labels_is_compared_too(tested):
    for folder in (tested / "runs/RTE").glob("*/seed-*"):
        kept = dict(np.load(folder / "test_predictions.npz"))
        np.savez(folder / "test_predictions.npz", **{name: kept[name] for name in ("logits", "teacher_logits")})
        results = json.loads((folder / "eval_results.json").read_text())
        del results["test_accuracy"]
        (folder / "eval_results.json").write_text(json.dumps(results))
    _, summary, _ = run(tested, "--baseline", "none", "--figure", "test_agreement")
    assert float(only(summary, figure="RTE test agreement", method="emd")["low"]) > 0


@pytest.mark.training
def test_a_real_run_with_a_file_of_its_own(teacher, glue_dir, tmp_path):
    argv = ["--teacher_model", teacher, "--student_layers", 1, "--task_name", "RTE", "--data_dir", glue_dir / "RTE"]
    argv += ["--output_dir", tmp_path / "runs/emd", "--max_seq_length", 32, "--no_cuda", "--max_steps", 1]
    argv += ["--agreement_file", glue_dir / "RTE/train.tsv"]
    emd_task_distill.main([str(argument) for argument in argv])
    (found,), _ = find_runs([tmp_path / "runs"])
    for figure in all_figures_of(found.task):
        assert figure.of(found.predictions(figure)) == pytest.approx(found.figure(figure), abs=1e-6), figure.key
