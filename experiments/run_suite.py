"""Run a whole table: every task, student size, method and seed of a plan, each task's teacher first.

    python experiments/run_suite.py plans/quickstart.toml --output_dir model/mappings
    python experiments/run_suite.py plans/quickstart.toml --output_dir model/mappings --dry_run

Each run is one call of run_glue.py or emd_task_distill.py, each step before them of another script. Beside its folder
lie a record (.json) and all that it printed (.log). A suite that was stopped, in whatever way, goes on with the same
command: finished runs are kept, unfinished ones go on from their last checkpoint, failed ones are tried again. plans/
holds plans to start from.
"""

from argparse import Namespace, RawDescriptionHelpFormatter
from pathlib import Path

from bert_finetune.errors import ArgumentParser, InputError, reports_input_errors
from bert_finetune.files import write_atomically


@reports_input_errors
def main(argv: list[str] | None = None) -> None:
    options = read_options(argv)

    from experiments.plan import read_plan

    plan = read_plan(options.plan)

    from experiments.engines import LocalEngine, RayEngine, local_environments
    from experiments.estimate import show_what_is_left
    from experiments.progress import Progress
    from experiments.suite import check_records, only_suite, run_all, show_outcome

    plan.check_sources()
    runs = plan.runs(options.output_dir)
    if options.dry_run:
        check_records(runs)
        show_what_is_left(plan, runs, local_environments(options.jobs))
        return
    with only_suite(options.output_dir):
        check_records(runs)
        write_atomically(options.output_dir / "plan.toml", options.plan.read_text(encoding="utf-8"))
        if options.engine == "ray":
            engine = RayEngine(options.ray_address or "auto", options.cpus_per_run, options.gpus_per_run)
        else:
            engine = LocalEngine(local_environments(options.jobs))
        records = run_all(runs, engine, Progress(runs, engine.jobs))
    show_outcome(runs, records)


def read_options(argv: list[str] | None) -> Namespace:
    """The command line. Raises InputError for options that do not go together."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path, help="the plan, a TOML file")
    parser.add_argument("--output_dir", type=Path, required=True, help="<task>/[<size>/]<method>/seed-<n> go in here")
    parser.add_argument(
        "--dry_run", action="store_true", help="print what is left to run, and its time on this machine"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        help="runs side by side (default: one per GPU; on a CPU half its cores, if memory allows)",
    )
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="this machine or a Ray cluster")
    parser.add_argument("--ray_address", help="the cluster's (default: auto, this machine's)")
    parser.add_argument("--cpus_per_run", type=float, help="on Ray (default: a GPU's share of the cores, else 2)")
    parser.add_argument("--gpus_per_run", type=float, help="on Ray (default: 1 where the cluster has GPUs)")
    options = parser.parse_args(argv)
    if options.jobs is not None and (options.jobs < 1 or options.engine == "ray"):
        raise InputError("--jobs: at least 1, and not with --engine ray, which fills its cluster")
    of_ray = {f"--{name}": getattr(options, name) for name in ("ray_address", "cpus_per_run", "gpus_per_run")}
    if options.engine != "ray" and (given := [name for name, value in of_ray.items() if value is not None]):
        raise InputError(f"{', '.join(given)}: only with --engine ray")
    if options.engine == "ray" and options.dry_run:
        raise InputError("--dry_run: measures on this machine, and not with --engine ray")
    return options


if __name__ == "__main__":
    main()
