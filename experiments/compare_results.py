"""Compare finished runs: tables of means over seeds, differences to a baseline and how sure they are; one report.

    python experiments/compare_results.py model/mappings --baseline none --output_dir model/mappings/results

Every folder below the given ones with an eval_results.json is a run. Figures are of the dev set, those called test_...
of the runs' --agreement_file, in points (100 x accuracy, F1 or correlation). What is written: results.md, results.tex
(needs booktabs and graphicx), results.csv (a row for each run), summary.csv (a row for each method and figure),
pictures of each figure compared by, report.html (all of it, with the runs' own pictures, commands and versions).
"""

from argparse import Namespace, RawDescriptionHelpFormatter
from pathlib import Path

from bert_finetune.errors import ArgumentParser, InputError, reports_input_errors
from bert_finetune.files import as_csv, read_toml, write_atomically
from experiments.figures import SCORE
from experiments.significance import MARGIN, RESAMPLES

TITLE = "Results on the dev set"


@reports_input_errors
def main(argv: list[str] | None = None) -> None:
    options = read_options(argv)

    from experiments.comparison import begin_notes, choose_baseline, compare, state_notes
    from experiments.comparison_tables import differences, overview, run_rows, summary_rows, versions
    from experiments.finished_runs import find_runs
    from experiments.kept_runs import keep_runs
    from experiments.model_footprints import model_footprints
    from experiments.published import published_tables
    from experiments.report import Picture, report_page
    from experiments.report_pictures import draw_pictures, run_pictures
    from experiments.tables_out import latex_page, markdown_page

    plan_files = {root: root / "plan.toml" for root in options.folders if (root / "plan.toml").is_file()}
    runs, unfinished = find_runs(options.folders)
    plans = [read_toml(path) for path in plan_files.values()]
    baseline, notes = choose_baseline(options.baseline, plans, runs)
    notes += state_notes(unfinished) + begin_notes(plans, [*runs, *unfinished])
    comparison = compare(runs, baseline, options.resamples, options.equivalence, options.figure)
    footprints, conditions = model_footprints(runs, timed=not options.no_speed)
    measured = [overview(comparison, footprints, conditions), *differences(comparison)]
    published = published_tables()
    notes += comparison.notes

    options.output_dir.mkdir(parents=True, exist_ok=True)
    pictures = [*draw_pictures(runs, comparison, footprints, options.output_dir), *run_pictures(runs)]
    text = markdown_page(TITLE, notes, [*measured, *published])
    files = {
        "results.md": text,
        "results.tex": latex_page([*measured, *published]),
        "results.csv": as_csv(run_rows(runs, unfinished)),
        "summary.csv": as_csv(summary_rows(comparison, footprints)),
        "report.html": report_page(
            TITLE,
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
    if options.keep_runs:
        keep_runs(runs, options.folders, options.keep_runs)
        for path in plan_files.values():
            write_atomically(options.keep_runs / path.name, path.read_text(encoding="utf-8"))
    print(text)
    print(f"written into {options.output_dir}: {', '.join(files)}")


def read_options(argv: list[str] | None) -> Namespace:
    """The command line. Raises InputError for one that makes no sense."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="folders of runs, such as a suite's output folder")
    parser.add_argument(
        "--baseline",
        help="method to compare the others with (default: the one of the suite's plan.toml; without it, no comparison)",
    )
    parser.add_argument(
        "--figure",
        nargs="+",
        default=[SCORE],
        help="what to compare by: accuracy, f1, ..., agreement, divergence, or score, the task's own (the default); of "
        "the dev set, or, as test_score, of the runs' --agreement_file",
    )
    parser.add_argument("--output_dir", type=Path, default=Path("results"), help="where the tables go (results)")
    parser.add_argument("--resamples", type=int, default=RESAMPLES, help=f"bootstrap resamples ({RESAMPLES})")
    parser.add_argument(
        "--equivalence",
        type=float,
        default=MARGIN,
        help=f"methods that differ by less than so many points are equal ({MARGIN})",
    )
    parser.add_argument(
        "--keep_runs",
        type=Path,
        metavar="DIR",
        help="copy there what was read of the runs, without their models: the tables can be made again from it",
    )
    parser.add_argument("--no_speed", action="store_true", help="do not time the models")
    parser.add_argument("--pictures", nargs="+", type=Path, default=[], help="further PNG or SVG files for the report")
    options = parser.parse_args(argv)
    if options.resamples < 100:
        raise InputError(f"--resamples {options.resamples}: an interval needs 100 or more")
    if not 0 < options.equivalence < 200:
        raise InputError(f"--equivalence {options.equivalence}: give points, more than 0")
    return options


if __name__ == "__main__":
    main()
