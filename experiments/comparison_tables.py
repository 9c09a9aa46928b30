"""The tables of a comparison: for the reader (`ResultTable`), and as CSV a row for each run or for each summary."""

from experiments.comparison import TEACHER, Comparison, Summary
from experiments.figures import all_figures_of, figures_of
from experiments.finished_runs import FinishedRun, Unfinished
from experiments.model_footprints import Footprints, speed_up
from experiments.tables_out import Number, ResultTable, number_cell


def overview(comparison: Comparison, footprints: Footprints, conditions: str) -> ResultTable:
    """Methods x figures, as papers print it."""
    figures = comparison.shown
    counts = {len(summary.values) for summary in comparison.summaries if summary.method != TEACHER}
    rows = []
    for size, method in comparison.methods:
        found = [comparison.of(figure, size, method) for figure in figures]
        average = comparison.average(size, method) if len(comparison.scores) > 1 else None
        cells = [mean_cell(summary, with_seeds=len(counts) > 1) for summary in found]
        rows.append([method, size or "", *cells, number_cell(average), *footprint_cells(footprints, size, method)])
    if comparison.constant:
        constant = [number_cell(comparison.constant.get(figure)) for figure in figures]
        rows.append(["constant answer", "", *constant, "", "", "", ""])
    titles = [figure.title for figure in figures]
    seeds = next(iter(counts)) if len(counts) == 1 else "in brackets"
    spread = f": mean ± standard deviation over seeds (number of seeds: {seeds})" if counts else ""
    sets = "Dev set" + ", or held-out file (test)" * any(figure.part == "test" for figure in figures)
    notes = [f"{sets}, in points{spread}."]
    if comparison.chosen:
        notes.append("A run keeps what is best on the dev set: all figures of that set are a little high.")
    if comparison.constant:
        notes.append("Constant answer: the one that scores best. A method near it has hardly learnt the task.")
    if any("teacher_logits" in figure.needs for figure in figures):
        notes.append(
            "Agreement: with the teacher, in per cent of the answers (of scores: Pearson's correlation). Divergence "
            "from it, in hundredths, smaller is better: KL(teacher || student) in nats (of scores: the mean squared "
            "difference)."
        )
    if len(comparison.scores) > 1:
        averaged = [figure.title for figure in comparison.scores]
        notes.append(f"Average: mean of {', '.join(averaged)}, for methods that have all of them.")
    notes += [conditions] if conditions else []
    header = ["method", "size", *titles, "average", "parameters", "weights (MB)", "speed-up"]
    return ResultTable(f"All figures, {sets[0].lower()}{sets[1:]}", header, rows, tuple(notes)).without_empty_columns()


def differences(comparison: Comparison) -> list[ResultTable]:
    """A table for each figure: every method against the baseline."""
    baseline = comparison.baseline
    header = [
        "method",
        "size",
        "mean ± sd",
        "seeds",
        f"difference to {baseline}",
        "95 % interval",
        "p",
        "p (Holm)",
        "claim",
        "equality",
    ]
    margin = f"{comparison.margin:g}"
    explained = (
        "Here and below: difference in points, over the seeds that both have. Interval: paired bootstrap over dev "
        "examples, for the models as they were trained. p: paired t-test over seeds, for training anew; none with one "
        "seed, or where all seeds differ alike. p (Holm): corrected for all comparisons of its table. A claim stands "
        "only where the interval excludes zero and the corrected p is below .05.",
        "Equality: by paired t-tests over seeds, corrected likewise. "
        f"Equal within {margin}: by two one-sided tests the difference is less than so many points; not equal: it is "
        "more; cannot tell: neither is shown. What is equal within these can be better or worse all the same.",
    )
    tables, said = [], None
    for figure in comparison.figures:
        rows = [difference_row(summary) for summary in comparison.summaries if summary.figure == figure]
        notes = explained if baseline and not tables else ()
        teachers = comparison.teachers.get(figure)
        if teachers not in (None, said):
            notes, said = (*notes, teachers.value), teachers
        tables.append(ResultTable(figure.heading, header, rows, notes).without_empty_columns())
    return tables


def difference_row(summary: Summary) -> list:
    interval = ""
    if summary.interval:
        interval = Number("[{:+.2f}, {:+.2f}]".format(*summary.interval), summary.interval[0])
    return [
        summary.method,
        summary.size or "",
        mean_cell(summary),
        Number(str(len(summary.values)), len(summary.values)),
        number_cell(summary.difference, "+.2f"),
        interval,
        p_cell(summary.p),
        p_cell(summary.holm_p),
        summary.claim,
        summary.equality,
    ]


def p_cell(p: float | None) -> Number | str:
    return "" if p is None else Number(f"{p:.3f}" if p >= 0.001 else "<.001", p)


def mean_cell(summary: Summary | None, with_seeds: bool = False) -> Number | str:
    if summary is None:
        return ""
    spread = "" if summary.sd is None else f" ± {summary.sd:.1f}"
    return Number(f"{summary.mean:.1f}{spread}" + f" ({len(summary.values)})" * with_seeds, summary.mean)


def footprint_cells(footprints: Footprints, size: str | None, method: str) -> list[Number | str]:
    """Parameters, weights and speed-up of a method's model."""
    footprint = footprints.get((size, method))
    if footprint is None:
        return ["", "", ""]
    parameters = Number(f"{footprint.parameters / 1e6:.1f}M", footprint.parameters)
    return [parameters, number_cell(footprint.megabytes), number_cell(speed_up(footprints, size, method), unit=" x")]


def run_rows(runs: list[FinishedRun], unfinished: list[Unfinished]) -> list[dict]:
    """results.csv: a row for each run, unfinished ones too; MNLI's second figure has a column of its own, and so has
    each further figure that some run has."""
    rows = []
    further = dict.fromkeys(figure for run in runs for figure in all_figures_of(run.task) if not figure.is_score)
    further = [figure for figure in further if any(run.figure(figure) is not None for run in runs)]
    for run in runs:
        found = [in_points(run.figure(figure)) for figure in figures_of(run.task)]
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
                **{figure.key: in_points(run.figure(figure)) for figure in further},
                "train_seconds": run.number("train_seconds"),
                "folder": run.folder,
                "command": run.command,
            }
        )
    for run in unfinished:
        known = {name: getattr(run, name) for name in ("task", "size", "method", "seed", "state", "folder")}
        rows.append(dict.fromkeys(rows[0]) | known)
    return rows


def in_points(value: float | None) -> float | None:
    return None if value is None else 100 * value


def summary_rows(comparison: Comparison, footprints: Footprints) -> list[dict]:
    """summary.csv: a row for each method and figure."""
    rows = []
    for summary in (*comparison.summaries, *comparison.beside):
        low, high = summary.interval or (None, None)
        row = {"figure": summary.figure.title, "size": summary.size, "method": summary.method}
        row |= {"seeds": len(summary.values), "mean": summary.mean, "sd": summary.sd, "baseline": comparison.baseline}
        row |= {"common_seeds": len(summary.common), "difference": summary.difference, "low": low, "high": high}
        row |= {"claim": summary.claim, "p": summary.p, "holm_p": summary.holm_p, "equality": summary.equality}
        row |= {"equal_p": summary.equal_p, "unequal_p": summary.unequal_p, "margin": comparison.margin}
        footprint = footprints.get((summary.size, summary.method))
        row |= {name: getattr(footprint, name, None) for name in ("parameters", "megabytes")}
        row["speed_up"] = speed_up(footprints, summary.size, summary.method)
        rows.append(row)
    return rows


def versions(runs: list[FinishedRun]) -> ResultTable:
    """Each package's versions, several where the runs' differ."""
    found: dict[str, dict[str, None]] = {}
    for run in runs:
        for name, version in run.args.get("versions", {}).items():
            found.setdefault(name, {})[version] = None
    return ResultTable(
        "Versions", ["package", "version"], [[name, ", ".join(all_of)] for name, all_of in found.items()]
    )
