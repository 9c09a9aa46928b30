"""How long a suite will take, from a few steps of some of its runs."""

import math
import tempfile
import time
from argparse import Namespace
from dataclasses import dataclass, fields, replace
from pathlib import Path

from bert_emd.arguments import DistillationArguments
from bert_emd.recipes import recipe_defaults
from bert_finetune.errors import InputError
from bert_finetune.files import read_json
from bert_finetune.paths import several
from bert_finetune.tables import read_table
from experiments.execution import last_error, run_script
from experiments.plan import STUDENT_SCRIPT, TEACHER_SCRIPT, Plan
from experiments.planned_runs import PlannedRun, as_arguments, as_text
from experiments.progress import duration, table_of_runs

STEPS = 8
_FEW_STEPS = {"max_steps": STEPS, "eval_strategy": "no", "save_strategy": "no", "do_predict": False}
# An evaluation's time per example, in that of training: a forward pass is a third of forward and backward.
_FORWARD = 1 / 3


@dataclass(frozen=True)
class RunTime:
    """Seconds of one step, and of all that a run does once: start, reading, the last evaluation, saving."""

    step: float
    once: float


def show_what_is_left(plan: Plan, runs: list[PlannedRun], environments: list[dict[str, str]]) -> None:
    """Print the commands of all runs that are not done, and about how long they take."""
    left = [run for run in runs if not run.is_done()]
    for run in left:
        print(run.shown)
    print(f"\n{len(left)} of {len(runs)} runs to go")
    before = [other for run in left if run.method == plan.baseline for other in run.needs if not other.is_done()]
    if before:
        print(f"An estimate needs what {before[0].name} makes: ask again when that is done.")
        return
    seconds = estimate(plan, runs, environments[0])

    def summed(runs: list[PlannedRun]) -> str:
        here = [seconds[run.name] for run in runs if run.name in seconds]
        return duration(sum(here)) if here else ""

    total = sum(seconds.values())
    print(
        *("", *table_of_runs(runs, summed), ""),
        f"An estimate, from {STEPS} steps of some runs on this machine: {duration(total)} one after the other, "
        f"{duration(total / len(environments))} with {len(environments)} side by side.",
        "Steps after the first few are often faster, and the teacher's answers, once kept, save more.",
        *(["What [steps] take is not in it."] if any(run.is_step for run in left) else []),
        sep="\n",
    )


def estimate(plan: Plan, runs: list[PlannedRun], environment: dict[str, str]) -> dict[str, float]:
    """Name of every run that is not done -> its seconds.

    Measured are `STEPS` steps of each task's first teacher and of a student by the baseline, and for the first task of
    each method and each size; the other cells are products of these. A method that needs what steps make is measured
    once they are done, and counted like the baseline before; steps are not. Raises InputError where one of them fails.
    """
    left = [run for run in runs if not run.is_done()]
    students = {(run.task, run.size, run.method): run for run in reversed(runs) if run.is_student}
    wanted = [run for run in left if run.is_student]
    first_teachers = {run.task: run for run in reversed(left) if run.is_teacher}
    tasks, sizes, methods = (list(dict.fromkeys(getattr(r, key) for r in wanted)) for key in ("task", "size", "method"))
    with tempfile.TemporaryDirectory() as folder:

        def measure(run: PlannedRun) -> RunTime:
            print(f"measuring {STEPS} steps of {run.name.removesuffix(f'/seed-{run.seed}')}", flush=True)
            return _measure(run, Path(folder), environment)

        teachers = {run.task: measure(run) for run in left if run in first_teachers.values()}
        base = {task: measure(students[task, sizes[0], plan.baseline]) for task in tasks}
        first = {(sizes[0], plan.baseline): base[tasks[0]]} if tasks else {}
        for size, method in [(sizes[0], method) for method in methods] + [(size, plan.baseline) for size in sizes]:
            if (size, method) not in first:
                run = students[tasks[0], size, method]
                there = all(other.is_done() for other in run.needs)
                first[size, method] = measure(run) if there else base[tasks[0]]

    def time_of(run: PlannedRun) -> RunTime:
        if run.is_teacher:
            return teachers[run.task]
        alike = first[run.size, plan.baseline], first[sizes[0], run.method]
        factor = math.prod(one.step / base[tasks[0]].step for one in alike)
        return replace(base[run.task], step=base[run.task].step * factor)

    rows = {task: _rows(plan, task) for task in {run.task for run in left if not run.is_step}}
    found = {}
    for run in (run for run in left if not run.is_step):
        train, dev = rows[run.task]
        unlabelled = (run.options | run.place).get("unlabeled_file")
        if unlabelled and all(other.is_done() for other in run.needs):
            paths = several("unlabeled_file", as_text(unlabelled))
            train += sum(len(read_table(path).rows) for path in paths)
        found[run.name] = _seconds(_resolved(run), time_of(run), train, dev)
    return found


def _measure(run: PlannedRun, folder: Path, environment: dict[str, str]) -> RunTime:
    """Do a few steps of a run in `folder`; its teacher is the one there, if it has not been trained yet.

    A teacher's cache is in `folder` as well, the run's own: a few answers that no later run is to find, and none from
    an earlier one, which would make the steps faster.
    """
    place = dict(run.place)
    if run.teacher and not run.teacher.is_done():
        place["teacher_model"] = str(folder / run.teacher.name)
    options = run.options | _FEW_STEPS
    if "teacher_cache_dir" in options:
        options["teacher_cache_dir"] = str(folder / run.name / "teacher_cache")
    short = replace(run, folder=folder / run.name, options=options, place=place)
    short.folder.parent.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    with open(short.log, "wb") as log:
        returncode = run_script(short.command, environment, log)
    if returncode:
        raise InputError(f"{run.name}: {last_error(short.log, returncode)}; tried with {short.shown}")
    training = read_json(short.folder / "eval_results.json")["train_seconds"]
    return RunTime(step=training / STEPS, once=time.monotonic() - begin - training)


def _rows(plan: Plan, name: str) -> tuple[int, int]:
    """How many rows a task has to train on, and in all its dev sets."""
    train, dev = (sum(len(read().rows) for read in readers) for readers in plan.tables(name))
    return train, dev


def _resolved(run: PlannedRun) -> Namespace:
    """A run's options with their defaults. Of a recipe's, those of a 4-layer student: times do not depend on these."""
    arguments = as_arguments(run.options)
    if run.is_teacher:
        return TEACHER_SCRIPT.parser().parse_known_args(arguments)[0]
    parser = STUDENT_SCRIPT.parser()
    chosen, _ = parser.parse_known_args(arguments)
    own = DistillationArguments(**{field.name: getattr(chosen, field.name) for field in fields(DistillationArguments)})
    parser.set_defaults(
        **recipe_defaults(own.recipe, 4, run.options.get("task_name", "custom"), own.copies_teacher, own.pred_distill)
    )
    return parser.parse_known_args(arguments)[0]


def _seconds(options: Namespace, run_time: RunTime, train_rows: int, dev_rows: int) -> float:
    batch = options.per_device_train_batch_size * options.gradient_accumulation_steps
    epoch = math.ceil(train_rows / batch)
    steps = options.max_steps if options.max_steps > 0 else math.ceil(epoch * options.num_train_epochs)
    every = options.eval_steps or options.save_steps or (500 if options.evaluate_during_training else epoch)
    evaluations = 0 if options.eval_strategy == "no" else steps / (every * steps if every < 1 else every)
    return run_time.once + run_time.step * (steps + evaluations * _FORWARD * dev_rows / batch)
