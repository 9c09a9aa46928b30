"""The tables of results that are committed, made anew by the code from what lies beside them.

    python tests/committed_tables.py            # writes them anew
    python tests/committed_tables.py --check    # says which are not what the code gives; exit code 1 where one is not

tests/data/comparison holds runs, made up, and all their tables, which go the whole way of compare_results.py. In
results/ the runs' logits and models are not kept: its tables are made of results.csv (the figures) and summary.csv
(intervals, p-values, sizes), and of results.md what neither has: constant answers and how speed was timed. All paths
are seen from the root.
"""

import contextlib
import csv
import io
import os
import re
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

from bert_finetune.files import write_atomically
from bert_finetune.footprint import Footprint
from bert_finetune.glue import TASKS
from experiments.compare_results import TITLE, main
from experiments.comparison import Comparison, Summary, teachers_of
from experiments.comparison_tables import differences, overview
from experiments.figures import figures_of
from experiments.model_footprints import Footprints
from experiments.published import published_tables
from experiments.report import report_page
from experiments.tables_out import ResultTable, latex_page, markdown_page

ROOT = Path(__file__).resolve().parents[1]
MADE_UP = Path("tests/data/comparison")
RESULTS = Path("results")


def tables_of_made_up_runs() -> dict[Path, str]:
    """File -> its content, by the script, from the runs that are committed."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        main([str(MADE_UP / "runs"), "--output_dir", folder, "--no_speed", "--equivalence", "4"])
        names = ("results.md", "results.tex", "results.csv", "summary.csv")
        return {MADE_UP / name: Path(folder, name).read_text(encoding="utf-8") for name in names}


def tables_of_results() -> dict[Path, str]:
    """File -> its content, from the CSV files beside it; of report.html only the tables are made anew."""
    comparison, footprints = read_comparison()
    text = (RESULTS / "results.md").read_text(encoding="utf-8")
    comparison.constant = _constant_answers(text, comparison)
    (conditions,) = re.findall("^Speed-up: .*$", text, re.MULTILINE)
    measured, published = [overview(comparison, footprints, conditions), *differences(comparison)], published_tables()
    report = (RESULTS / "report.html").read_text(encoding="utf-8")
    page = report_page(TITLE, [], measured, published, [], {}, ResultTable("Versions", [], []), {})
    for section in ("measured", "published"):
        old, new = (re.search(f'<section id="{section}">.*?</section>', text, re.DOTALL)[0] for text in (report, page))
        report = report.replace(old, new)
    return {
        RESULTS / "results.md": markdown_page(TITLE, [], [*measured, *published]),
        RESULTS / "results.tex": latex_page([*measured, *published]),
        RESULTS / "report.html": report,
    }


def read_comparison() -> tuple[Comparison, Footprints]:
    """What results/ says of its runs, but for the constant answers. Of times only the ratios are known: the teacher's
    is called 1."""
    summaries, runs = (_rows(name) for name in ("summary.csv", "results.csv"))
    figures = {figure.title: figure for task in TASKS.values() for figure in figures_of(task)}
    comparison = Comparison(summaries[0]["baseline"], float(summaries[0]["margin"]))
    footprints = {}
    for row in summaries:
        figure, place = figures[row["figure"]], (row["size"] or None, row["method"])
        of_task = [run for run in runs if run["task"] == figure.task.name]
        known = [run for run in of_task if (run["size"] or None, run["method"]) == place]
        values = tuple(float(run["figure"]) for run in known)
        told = {key: _number(row[key]) for key in ("difference", "p", "holm_p", "equal_p", "unequal_p")}
        told["interval"] = (float(row["low"]), float(row["high"])) if row["low"] else None
        comparison.summaries.append(Summary(figure, *place, values, margin=comparison.margin, **told))
        comparison.teachers[figure] = teachers_of([_of_teacher(run) for run in of_task])
        footprints[place] = Footprint(
            int(row["parameters"]), float(row["megabytes"]), milliseconds=1 / float(row["speed_up"])
        )
    return comparison, footprints


def _of_teacher(run: dict) -> SimpleNamespace:
    """A run of results.csv, with the teacher that its command names."""
    found = re.search(r"--teacher_model (\S+)", run["command"])
    return SimpleNamespace(method=run["method"], seed=run["seed"], teacher=found and found[1])


def _constant_answers(text: str, comparison: Comparison) -> dict:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    header, constant = rows[0], next(row for row in rows if row[0] == "constant answer")
    cells = dict(zip(header, constant, strict=True))
    return {figure: float(cells[figure.title]) for figure in comparison.figures}


def _rows(name: str) -> list[dict]:
    return list(csv.DictReader((RESULTS / name).read_text(encoding="utf-8").splitlines()))


def _number(text: str) -> float | None:
    return float(text) if text else None


def stale(tables: dict[Path, str]) -> list[Path]:
    """The files that are not what the code gives."""
    return [path for path, text in tables.items() if not path.exists() or path.read_text(encoding="utf-8") != text]


if __name__ == "__main__":
    os.chdir(ROOT)
    tables = tables_of_made_up_runs() | tables_of_results()
    if sys.argv[1:] == ["--check"]:
        print(*stale(tables), sep="\n")
        sys.exit(bool(stale(tables)))
    for path, content in tables.items():
        write_atomically(path, content)
