"""A suite: all runs of a plan, each teacher before its students, in an output folder that no other suite works in."""

import contextlib
import sys
import traceback
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path

from bert_finetune.errors import InputError, reason_and_file
from experiments.engines import LocalEngine, RayEngine
from experiments.execution import lock
from experiments.planned_runs import PlannedRun
from experiments.progress import Progress

_SECONDS_BETWEEN_LOOKS = 0.5


@contextlib.contextmanager
def only_suite(output_dir: Path) -> Iterator[None]:
    """Keep every other suite out of `output_dir`. Raises InputError where there is one already."""
    output_dir.mkdir(parents=True, exist_ok=True)
    with open(output_dir / ".lock", "ab") as file:
        if not lock(file):
            raise InputError(f"--output_dir {output_dir}: another suite is running there")
        yield


def check_records(runs: list[PlannedRun]) -> None:
    """Raise InputError where an output folder holds something else than this plan's run, as far as it has come.

    A student is its teacher's too: trained anew with other options, a teacher leaves no student as it was.
    """
    for run in runs:
        record = run.read_record()
        if run.is_teacher and run.seed is not None and run.folder.parent.with_suffix(".json").exists():
            raise InputError(
                f"{run.folder.parent}: the teacher of all seeds, and the plan now has one for each (teacher_seeds); "
                f"remove {run.folder.parents[1]} to run teachers and students anew, or choose another --output_dir"
            )
        if not record and run.folder.exists():
            raise InputError(f"{run.folder}: there already, but of no suite; move it, or choose another --output_dir")
        if not record or not run.folder.exists():
            continue
        if run.teacher:
            _check_options(run.teacher, f"{run.folder}: its teacher", record.get("teacher_options"))
        for other in run.follows:
            _check_options(other, f"{run.folder}: {other.name}", record.get("needs", {}).get(other.name))
        _check_options(run, f"{run.folder}:", record.get("options", {}))


def _check_options(run: PlannedRun, what: str, then: dict | None) -> None:
    """Raise InputError where a run's options are others than `then`; None: what they were is not known."""
    if then in (None, run.options):
        return
    differ = [name for name in then | run.options if then.get(name) != run.options.get(name)]
    before, after = (" ".join(f"{name}={each.get(name)}" for name in differ) for each in (then, run.options))
    task_folder = run.folder.parents[0 if run.seed is None else 1]
    remove = f"{task_folder} to run teacher and students" if run.is_teacher else "the folder to run it"
    raise InputError(
        f"{what} was run with {before}, and the plan now says {after}; remove {remove} anew, or choose another "
        "--output_dir"
    )


def run_all(runs: list[PlannedRun], engine: LocalEngine | RayEngine, progress: Progress) -> dict[str, dict]:
    """Carry out all runs that are not done; name -> record of each. A run waits for those that it needs.

    On the way out, by whatever exception, no run is left behind; records say which were stopped.
    """
    records = {run.name: run.read_record() for run in runs if run.is_done()}
    waiting = [run for run in runs if run.name not in records]
    pending: dict[Future, PlannedRun] = {}
    for run in runs:  # what a suite that was killed left behind
        if run.name in records:
            run.remove_checkpoints()
        else:
            run.write_stopped()
    try:
        progress.show(records)
        while waiting or pending:
            for run in list(waiting):
                states = {other.name: records.get(other.name, {}).get("state") for other in run.waits_for}
                lost = [f"{name} {state}" for name, state in states.items() if state in ("failed", "skipped")]
                if all(state == "done" for state in states.values()):
                    if len(pending) >= engine.room:
                        break
                    pending[engine.submit(run)] = run
                elif lost:
                    records[run.name] = run.write_record("skipped", error=lost[0])
                else:
                    continue
                waiting.remove(run)
            for future in wait(pending, _SECONDS_BETWEEN_LOOKS, FIRST_COMPLETED).done:
                run = pending.pop(future)
                records[run.name] = record_of(future, run, engine.failures)
            begun = {run.name: run.read_record() for run in pending.values()}
            records |= {name: record for name, record in begun.items() if record.get("state") == "running"}
            progress.show(records)
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt("the same command goes on from here") from interrupt
    finally:
        engine.stop()
        for run in pending.values():
            run.write_stopped()
    return records


def record_of(future: Future, run: PlannedRun, failures: tuple[type[Exception], ...]) -> dict:
    """The record of a run that has ended; of one that could not be carried out, the reason.

    What is none of `failures` is a mistake of this project: the suite goes on, and the record keeps the traceback.
    """
    error = future.exception()
    if error is None:
        return future.result()
    raised = getattr(error, "cause", None) or error  # Ray gives a whole traceback, and in it what was raised
    more = {} if isinstance(raised, failures) else {"traceback": "".join(traceback.format_exception(error))}
    return run.write_record("failed", error=reason_and_file(raised), **more)


def show_outcome(runs: list[PlannedRun], records: dict[str, dict]) -> None:
    """Say how the suite ended. Exits with 1 where a run failed."""
    failed = [run for run in runs if records[run.name]["state"] == "failed"]
    skipped = [run for run in runs if records[run.name]["state"] == "skipped"]
    print(f"{len(runs) - len(failed) - len(skipped)} done, {len(failed)} failed, {len(skipped)} skipped")
    for run in failed:
        record = records[run.name]
        print(f"{run.name}: {record['error']}; see {run.log}", file=sys.stderr)
        print(record.get("traceback", ""), end="", file=sys.stderr)
    if failed:
        print("the same command tries them again", file=sys.stderr)
        sys.exit(1)
