"""Run a whole table: every task, student size, method and seed of a plan, each task's teacher first.

    python experiments/run_suite.py plans/ablations.toml --output_dir model/ablations
    python experiments/run_suite.py plans/ablations.toml --output_dir model/ablations --dry_run

Each run is one call of run_glue.py or emd_task_distill.py. Beside its folder lie a record (.json) and all that it
printed (.log). A suite that was stopped, in whatever way, goes on with the same command: what is done stays, what had
begun resumes from its last checkpoint, what failed is tried again. plans/ holds plans to start from.
"""

import argparse
import os
import sys
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path

import psutil
import torch

from bert_finetune.errors import ArgumentParser, InputError, reason_and_file, reports_input_errors
from bert_finetune.files import write_atomically
from experiments.engines import LocalEngine, RayEngine, Run, only_suite
from experiments.estimate import STEPS, estimate
from experiments.plan import Plan, read_plan
from experiments.progress import Progress, by_cell, duration, in_table

MEMORY_PER_RUN = 4 * 2**30  # bytes that a run on a CPU is taken to need, BERT-base as its teacher
_SECONDS_BETWEEN_LOOKS = 0.5


@reports_input_errors
def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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

    plan = read_plan(options.plan)
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
    report(runs, records)


def check_records(runs: list[Run]) -> None:
    """Raise InputError where an output folder holds something else than this plan's run, as far as it has come.

    A student is its teacher's too: trained anew with other options, a teacher leaves no student as it was.
    """
    for run in runs:
        record = run.read_record()
        if not record and run.folder.exists():
            raise InputError(f"{run.folder}: there already, but of no suite; move it, or choose another --output_dir")
        if not record or not run.folder.exists():
            continue
        if run.teacher:
            _compare(run.teacher, f"{run.folder}: its teacher", record.get("teacher_options", run.teacher.options))
        _compare(run, f"{run.folder}:", record.get("options", {}))


def _compare(run: Run, what: str, then: dict) -> None:
    """Raise InputError where a run's options are others than `then`."""
    if then == run.options:
        return
    differ = [name for name in then | run.options if then.get(name) != run.options.get(name)]
    before, after = (" ".join(f"{name}={each.get(name)}" for name in differ) for each in (then, run.options))
    remove = "the folder to run it" if run.seed is not None else f"{run.folder.parent} to run teacher and students"
    raise InputError(
        f"{what} was run with {before}, and the plan now says {after}; remove {remove} anew, or choose another "
        "--output_dir"
    )


def local_environments(jobs: int | None) -> list[dict[str, str]]:
    """One set of environment variables for each of `jobs` runs side by side (None: as many as this machine bears)."""
    gpus = []
    if torch.cuda.is_available():
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = named.split(",") if named else [str(k) for k in range(torch.cuda.device_count())]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    fit = min(cores // 2, int(psutil.virtual_memory().available / MEMORY_PER_RUN))
    jobs = jobs or len(gpus) or max(1, fit)
    threads = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(max(1, cores // jobs))}
    return [threads | ({"CUDA_VISIBLE_DEVICES": gpus[k % len(gpus)]} if gpus else {}) for k in range(jobs)]


def show_what_is_left(plan: Plan, runs: list[Run], environments: list[dict[str, str]]) -> None:
    """Print the commands of all runs that are not done, and about how long they take."""
    left = [run for run in runs if not run.is_done()]
    for run in left:
        print(run.shown)
    print(f"\n{len(left)} of {len(runs)} runs to go")
    seconds = estimate(plan, runs, environments[0])
    rows, columns, cells = by_cell(runs)

    def cell(row: str, column: str) -> str:
        here = [seconds[run.name] for run in cells.get((row, column), []) if run.name in seconds]
        return duration(sum(here)) if here else ""

    lines = in_table([["", *columns], *([row, *(cell(row, column) for column in columns)] for row in rows)])
    total = sum(seconds.values())
    print(
        *("", *lines, ""),
        f"An estimate, from {STEPS} steps of some runs on this machine: {duration(total)} one after the other, "
        f"{duration(total / len(environments))} with {len(environments)} side by side.",
        "Steps after the first few are often faster, and the teacher's answers, once kept, save more.",
        sep="\n",
    )


def run_all(runs: list[Run], engine: LocalEngine | RayEngine, progress: Progress) -> dict[str, dict]:
    """Carry out all runs that are not done; name -> record of each. A student waits for its teacher.

    On the way out, by whatever exception, no run is left behind; records say which were stopped.
    """
    records = {run.name: run.read_record() for run in runs if run.is_done()}
    waiting = [run for run in runs if run.name not in records]
    pending: dict[Future, Run] = {}
    for run in runs:  # what a suite that was killed left behind
        if run.name in records:
            run.remove_checkpoints()
        else:
            _stopped(run)
    try:
        progress.show(records)
        while waiting or pending:
            for run in list(waiting):
                state = records.get(run.teacher.name, {}).get("state") if run.teacher else "done"
                if state == "done":
                    pending[engine.submit(run)] = run
                elif state == "failed":
                    records[run.name] = run.write_record("skipped", error=f"{run.teacher.name} failed")
                else:
                    continue
                waiting.remove(run)
            for future in wait(pending, _SECONDS_BETWEEN_LOOKS, FIRST_COMPLETED).done:
                run = pending.pop(future)
                records[run.name] = _result(future, run)
            begun = {run.name: run.read_record() for run in pending.values()}
            records |= {name: record for name, record in begun.items() if record.get("state") == "running"}
            progress.show(records)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command goes on from here") from None
    finally:
        engine.stop()
        for run in pending.values():
            _stopped(run)
    return records


def _result(future: Future, run: Run) -> dict:
    """The record of a run that has ended; of one that could not be carried out, the reason."""
    try:
        return future.result()
    except Exception as error:
        raised = getattr(error, "cause", None) or error  # Ray gives a whole traceback, and in it what was raised
        return run.write_record("failed", error=reason_and_file(raised))


def _stopped(run: Run) -> None:
    record = run.read_record()
    if record.get("state") == "running":
        run.write_record("stopped", started=record["started"], seconds=run.seconds_so_far())


def report(runs: list[Run], records: dict[str, dict]) -> None:
    """Say how the suite ended. Exits with 1 where a run failed."""
    failed = [run for run in runs if records[run.name]["state"] == "failed"]
    skipped = [run for run in runs if records[run.name]["state"] == "skipped"]
    print(f"{len(runs) - len(failed) - len(skipped)} done, {len(failed)} failed, {len(skipped)} skipped")
    for run in failed:
        print(f"{run.name}: {records[run.name]['error']}; see {run.log}", file=sys.stderr)
    if failed:
        print("the same command tries them again", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
