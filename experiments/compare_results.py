"""Compare finished runs: tables of means over seeds, differences to a baseline and how sure they are; one report.

    python compare_results.py ../model/ablations --baseline none --output_dir ../results

Every folder below the given ones with an eval_results.json is a run. Figures are of the dev set, in points (100 x
accuracy, F1 or correlation). What is written: results.md, results.tex (needs booktabs and graphicx), results.csv (a row
for each run), summary.csv (a row for each method and figure), a picture of each figure over training and against speed,
report.html (all of it, with the runs' own pictures, commands and versions).
"""

import argparse
import csv
import io
from collections import Counter
from itertools import product
from pathlib import Path

from bert_finetune.errors import ArgumentParser, InputError, reports_input_errors
from bert_finetune.files import read_toml, write_atomically
from experiments.comparison import TEACHER, Comparison, Cost, Summary, compare, costs
from experiments.finished_runs import Run, Unfinished, figures_of, find_runs, run_name
from experiments.published import published_tables
from experiments.report import Picture, report_page
from experiments.score_pictures import draw_accuracy_against_latency, draw_dev_scores
from experiments.significance import RESAMPLES
from experiments.tables_out import Number, Table, latex, markdown, markdown_text

Costs = dict[tuple[str | None, str], Cost]


@reports_input_errors
def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="folders of runs, such as a suite's output folder")
    parser.add_argument(
        "--baseline",
        help="method to compare the others with (default: the one of the suite's plan.toml; without it, no comparison)",
    )
    parser.add_argument("--output_dir", type=Path, default=Path("results"), help="where the tables go (results)")
    parser.add_argument("--resamples", type=int, default=RESAMPLES, help=f"bootstrap resamples ({RESAMPLES})")
    parser.add_argument("--no_speed", action="store_true", help="do not time the models")
    parser.add_argument("--pictures", nargs="+", type=Path, default=[], help="further PNG or SVG files for the report")
    options = parser.parse_args(argv)
    if options.resamples < 100:
        raise InputError(f"--resamples {options.resamples}: an interval needs 100 or more")

    plan_files = {root: root / "plan.toml" for root in options.folders if (root / "plan.toml").is_file()}
    runs, unfinished = find_runs(options.folders)
    plans = [read_toml(path) for path in plan_files.values()]
    baseline, notes = choose_baseline(options.baseline, plans, runs)
    notes += state_notes(unfinished) + begin_notes(plans, [*runs, *unfinished])
    comparison = compare(runs, baseline, options.resamples)
    cost, conditions = costs(runs, timed=not options.no_speed)
    measured = [overview(comparison, cost, conditions), *differences(comparison)]
    published = published_tables()
    notes += comparison.notes
    title = "Results on the dev set"

    listed = [f"- {markdown_text(note)}" for note in notes]
    options.output_dir.mkdir(parents=True, exist_ok=True)
    pictures = [*draw_pictures(runs, comparison, cost, options.output_dir), *run_pictures(runs)]
    text = "\n".join([f"# {title}", "", *listed, "", *map(markdown, [*measured, *published])])
    files = {
        "results.md": text,
        "results.tex": "\n".join(["% needs booktabs and graphicx", *map(latex, [*measured, *published])]),
        "results.csv": as_csv(run_rows(runs, unfinished)),
        "summary.csv": as_csv(summary_rows(comparison, cost)),
        "report.html": report_page(
            title,
            notes,
            measured,
            published,
            pictures + [Picture(path, path.stem) for path in options.pictures],
            {run.name: run.command for run in runs if run.command},
            versions(runs),
            {str(root): path.read_text(encoding="utf-8") for root, path in plan_files.items()},
        ),
    }
    for name, content in files.items():
        write_atomically(options.output_dir / name, content)
    print(text)
    print(f"written into {options.output_dir}: {', '.join(files)}")


def choose_baseline(asked: str | None, plans: list[dict], runs: list[Run]) -> tuple[str | None, list[str]]:
    """The baseline's name, or None, and what there is to say about it.

    Raises InputError for a method that no run is of, and plans that differ.
    """
    methods = dict.fromkeys(run.method for run in runs)
    planned = list(dict.fromkeys(plan.get("baseline") for plan in plans))
    if asked is None and len(planned) > 1:
        raise InputError(f"the plans name different baselines: {', '.join(map(str, planned))}; give --baseline")
    name = asked or next(iter(planned), None)
    if name in methods:
        return name, []
    if asked:
        raise InputError(f"--baseline {asked}: no finished run is of this method; there are {', '.join(methods)}")
    reason = f"The plan's baseline {name} has no finished run" if name else "No baseline was named (--baseline)"
    return None, [f"{reason}: no differences."]


def state_notes(unfinished: list[Unfinished]) -> list[str]:
    """The runs that are left out, counted and named."""
    if not unfinished:
        return []
    named = "; ".join(f"{run.name} ({run.state})" for run in unfinished)
    return [f"{len(unfinished)} {'runs are' if len(unfinished) > 1 else 'run is'} left out, not finished: {named}."]


def begin_notes(plans: list[dict], begun: list[Run | Unfinished]) -> list[str]:
    """How many of the plans' students have not begun, and which methods of which tasks they are of."""
    known = {run.name for run in begun}
    missing = []
    for plan in plans:
        parts = (plan.get("tasks", []), plan.get("sizes") or [None], plan.get("methods", []), plan.get("seeds", []))
        missing += [place for place in product(*parts) if run_name(*place) not in known]
    if not missing:
        return []
    named = Counter(run_name(*place[:3], None) for place in missing)
    listed = ", ".join(f"{name} ({count})" for name, count in named.items())
    return [f"{len(missing)} of the planned students have not begun, by method (seeds): {listed}."]


def overview(comparison: Comparison, cost: Costs, conditions: str) -> Table:
    """Methods x figures, as papers print it."""
    figures = comparison.figures
    counts = {len(summary.values) for summary in comparison.summaries if summary.method != TEACHER}
    rows = []
    for size, method in comparison.methods:
        found = [comparison.of(figure, size, method) for figure in figures]
        average = comparison.average(size, method) if len(figures) > 1 else None
        cells = [mean_cell(summary, with_seeds=len(counts) > 1) for summary in found]
        rows.append([method, size or "", *cells, points(average), *cost_cells(cost.get((size, method)))])
    if comparison.constant:
        constant = [points(comparison.constant.get(figure)) for figure in figures]
        rows.append(["constant answer", "", *constant, "", "", "", ""])
    titles = [figure.title for figure in figures]
    seeds = next(iter(counts)) if len(counts) == 1 else "in brackets"
    spread = f": mean ± standard deviation over seeds (number of seeds: {seeds})" if counts else ""
    notes = [
        f"Dev set, in points{spread}.",
        "A run keeps what is best on this very set: all figures are a little high.",
    ]
    if comparison.constant:
        notes.append("Constant answer: the one that scores best. A method near it has hardly learnt the task.")
    if len(figures) > 1:
        notes.append(f"Average: mean of {', '.join(titles)}, for methods that have all of them.")
    notes += [conditions] if conditions else []
    header = ["method", "size", *titles, "average", "parameters", "weights (MB)", "speed-up"]
    return Table("All figures, dev set", header, rows, tuple(notes)).without_empty_columns()


def differences(comparison: Comparison) -> list[Table]:
    """A table for each figure: every method against the baseline."""
    baseline = comparison.baseline
    header = [
        "method",
        "size",
        "mean ± sd",
        "seeds",
        f"difference to {baseline}",
        "95 % interval",
        "claim",
        "p",
    ]
    notes = (
        "Here and below: difference in points, over the seeds that both have. Interval: paired bootstrap over dev "
        "examples, for the models as they were trained. p: paired t-test over seeds, for training anew; none with one "
        "seed, or where all seeds differ alike. A claim stands only where the interval excludes zero and p < .05; it "
        "is not corrected for several comparisons.",
    )
    tables = []
    for figure in comparison.figures:
        rows = [difference_row(summary) for summary in comparison.summaries if summary.figure == figure]
        table = Table(f"{figure.title}, dev set", header, rows, notes if baseline and not tables else ())
        tables.append(table.without_empty_columns())
    return tables


def difference_row(summary: Summary) -> list:
    p = "" if summary.p is None else Number(f"{summary.p:.3f}" if summary.p >= 0.001 else "<.001", summary.p)
    interval = ""
    if summary.interval:
        interval = Number("[{:+.2f}, {:+.2f}]".format(*summary.interval), summary.interval[0])
    return [
        summary.method,
        summary.size or "",
        mean_cell(summary),
        Number(str(len(summary.values)), len(summary.values)),
        points(summary.difference, "+.2f"),
        interval,
        summary.claim,
        p,
    ]


def mean_cell(summary: Summary | None, with_seeds: bool = False) -> Number | str:
    if summary is None:
        return ""
    spread = "" if summary.sd is None else f" ± {summary.sd:.1f}"
    return Number(f"{summary.mean:.1f}{spread}" + f" ({len(summary.values)})" * with_seeds, summary.mean)


def cost_cells(cost: Cost | None) -> list:
    if cost is None:
        return ["", "", ""]
    parameters = Number(f"{cost.parameters / 1e6:.1f}M", cost.parameters)
    return [parameters, points(cost.megabytes), points(cost.speed_up, ".1f", " x")]


def points(value: float | None, form: str = ".1f", unit: str = "") -> Number | str:
    return "" if value is None else Number(f"{value:{form}}{unit}", value)


def run_rows(runs: list[Run], unfinished: list[Unfinished]) -> list[dict]:
    """results.csv: a row for each run, unfinished ones too; MNLI's second figure has a column of its own."""
    rows = []
    for run in runs:
        found = [100 * value if (value := run.figure(figure)) is not None else None for figure in figures_of(run.task)]
        rows.append(
            {
                "task": run.task.name,
                "size": run.size,
                "method": run.method,
                "seed": run.seed,
                "state": "done",
                "metric": run.task.metric,
                "figure": found[0],
                "mismatched": found[1] if len(found) > 1 else None,
                "train_seconds": run.number("train_seconds"),
                "folder": run.folder,
                "command": run.command,
            }
        )
    for run in unfinished:
        known = {name: getattr(run, name) for name in ("task", "size", "method", "seed", "state", "folder")}
        rows.append(dict.fromkeys(rows[0]) | known)
    return rows


def summary_rows(comparison: Comparison, cost: Costs) -> list[dict]:
    """summary.csv: a row for each method and figure."""
    rows = []
    for summary in comparison.summaries:
        low, high = summary.interval or (None, None)
        row = {"figure": summary.figure.title, "size": summary.size, "method": summary.method}
        row |= {"seeds": len(summary.values), "mean": summary.mean, "sd": summary.sd, "baseline": comparison.baseline}
        row |= {"common_seeds": len(summary.common), "difference": summary.difference, "low": low, "high": high}
        row |= {"claim": summary.claim, "p": summary.p}
        known = cost.get((summary.size, summary.method))
        for name in ("parameters", "megabytes", "speed_up"):
            row[name] = getattr(known, name, None)
        rows.append(row)
    return rows


def as_csv(rows: list[dict]) -> str:
    """Floats to 6 decimals, which hides no more than binary noise; None is empty."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: round(value, 6) if isinstance(value, float) else value for key, value in row.items()})
    return file.getvalue()


def draw_pictures(runs: list[Run], comparison: Comparison, cost: Costs, folder: Path) -> list[Picture]:
    """Into `folder`, for each figure: the dev score over training, a line for each method, and the score against the
    time for a sentence, where it was measured. PNG and SVG."""
    pictures = []
    for figure in comparison.figures:
        metric = figure.key.removeprefix("eval_")
        name = figure.title.lower().replace(" ", "-").replace("ρ", "rho")
        methods: dict[str, list[Run]] = {}
        for run in runs:
            if run.method != TEACHER and run.task.name == figure.task.name:
                methods.setdefault(label(run.size, run.method), []).append(run)
        lines = {
            method: [run.folder for run in of_it]
            for method, of_it in methods.items()
            if set.intersection(*(run.evaluations(figure) for run in of_it))
        }
        if lines:
            draw_dev_scores(lines, folder / f"{name}-training", metric)
            pictures.append(Picture(folder / f"{name}-training.svg", f"{figure.title}: dev score over training"))
        models = [
            (label(summary.size, summary.method), known.milliseconds / 1000, summary.mean / 100)
            for summary in comparison.summaries
            if summary.figure == figure and (known := cost.get((summary.size, summary.method))) and known.milliseconds
        ]
        if len(models) > 1:
            draw_accuracy_against_latency(models, folder / f"{name}-latency", metric)
            pictures.append(Picture(folder / f"{name}-latency.svg", f"{figure.title}: dev score against speed"))
    return pictures


def label(size: str | None, method: str) -> str:
    return f"{method}, {size}" if size else method


def run_pictures(runs: list[Run]) -> list[Picture]:
    """Those of each method's first seed: further seeds show much the same."""
    first = {(run.task.name, run.size, run.method): run for run in reversed(runs)}
    chosen = [run for run in runs if run in first.values()]
    return [Picture(path, f"{run.name}: {path.stem}") for run in chosen for path in run.pictures]


def versions(runs: list[Run]) -> Table:
    """Each package's versions, several where the runs' differ."""
    found: dict[str, dict[str, None]] = {}
    for run in runs:
        for name, version in run.args.get("versions", {}).items():
            found.setdefault(name, {})[version] = None
    return Table("Versions", ["package", "version"], [[name, ", ".join(all_of)] for name, all_of in found.items()])


if __name__ == "__main__":
    main()
