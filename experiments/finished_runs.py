"""Finished runs, found on disk: what each is (task, size, method, seed), its figures, its logits."""

import dataclasses
import json
import math
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bert_emd.recipes import AUTHORS_CHOOSE_BY
from bert_finetune.errors import InputError, reading
from bert_finetune.files import read_json
from bert_finetune.glue import TASKS, Task, get_task
from bert_finetune.task_kinds import Classification, MultiLabel, Regression
from experiments.figures import SETTINGS, Arrays, Figure, figures_of
from experiments.planned_runs import STEPS

# The task of files of the user's own, of which a run keeps no more than this; the first whose figure a run has.
_CUSTOM = [
    Task("custom", (), kind, kind.own_metric, figures=kind.own_figures)
    for kind in (Classification({"a class": "a class"}), Regression(), MultiLabel({"a class": "a class"}))
]

# How the published code names figures in eval_results.txt.
_OLDER_NAMES = {
    "acc": "eval_accuracy",
    "f1": "eval_f1",
    "mcc": "eval_mcc",
    "spearmanr": "eval_spearman",
    "corr": "eval_corr",
    "mnli/acc": "eval_matched_accuracy",
    "mnli-mm/acc": "eval_mismatched_accuracy",
}

_SEED_FOLDER = re.compile(r"seed-(\d+)")

# The state of a record (see `find_runs`) whose run counts.
_FINISHED = "done"

# Logits that are kept as they were measured give the same figure again; a file with rounded figures should still pass.
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class FinishedRun:
    """A finished run. results: what eval_results holds; args: args.json, or nothing where there is none."""

    folder: Path
    task: Task
    size: str | None
    method: str
    seed: int | None
    results: dict
    args: dict = dataclasses.field(default_factory=dict)
    record: dict = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        return run_name(self.task.name, self.size, self.method, self.seed)

    @property
    def command(self) -> str:
        """The command that made it; "" where that is not known."""
        command = self.record.get("command") or self.args.get("command") or ""
        return command if isinstance(command, str) else shlex.join(map(str, command))

    def figure(self, figure: Figure, whose: str = "") -> float | None:
        """A figure (-1..1, a divergence 0 or more), of `whose` "teacher_" too; None where it was not measured."""
        return self.number(whose + figure.key)

    def number(self, key: str) -> float | None:
        """A number of eval_results. Raises InputError where it is none, or not finite."""
        value = self.results.get(key)
        if value is None or (isinstance(value, int | float) and math.isfinite(value)):
            return value
        raise InputError(f"{self.folder}: {key} of its eval_results is {value!r}, not a number")

    @property
    def export(self) -> dict:
        """What deploy/export_student.py has found out of its model's graphs; empty where it is not exported."""
        path = self.folder / "onnx" / "export.json"
        return read_json(path) if path.is_file() else {}

    def int8_change(self, figure: Figure) -> float | None:
        """By how much int8 weights change a figure of its exported model, in points; None where that is not known."""
        figures = self.export.get("figures", {})
        values = [figures.get(form, {}).get(figure.key) for form in ("torch", "int8")]
        return None if None in values else 100 * (values[1] - values[0])

    def evaluations(self, figure: Figure) -> set[int]:
        """The steps at which it was measured in training."""
        return {entry["step"] for entry in self.results.get("history", []) if figure.key in entry}

    def predictions(self, figure: Figure) -> Arrays | None:
        """What the run kept of the figure's set; None where it kept nothing.

        Raises InputError for a damaged file, and for one that does not give the run's own figure.
        """
        path = self.folder / figure.predictions_file
        if not path.exists():
            return None
        prefix = f"{figure.split}/" if figure.split else ""
        with reading(str(path)), np.load(path, allow_pickle=False) as arrays:
            kept = {
                name: np.asarray(arrays[prefix + name], dtype=float)
                for name in ("logits", "labels", "teacher_logits")
                if name in figure.needs or prefix + name in arrays
            }
            logits, kind = kept["logits"], figure.task.kind
            whole = all(0 < len(logits) == len(array) and np.isfinite(array).all() for array in kept.values())
            if not (whole and ("labels" not in kept or kind.could_be(logits, kept["labels"]))):
                raise InputError(f"{path}: does not hold logits and a label for each example")
            kept |= {name: arrays[prefix + name] for name in SETTINGS if prefix + name in arrays}
            found, told = figure.of(kept), self.figure(figure)
        if told is not None and abs(found - told) > _TOLERANCE:
            raise InputError(
                f"{path}: gives {figure.key} {found:.4f}, but the eval_results beside it {told:.4f}; "
                "they are not of the same run"
            )
        return kept

    @property
    def pictures(self) -> list[Path]:
        """Its PNG and SVG files, of one that is there as both only the SVG."""
        found = sorted(path for path in self.folder.iterdir() if path.suffix in (".png", ".svg"))
        return list({path.stem: path for path in found}.values())

    @property
    def teacher_folder(self) -> Path | None:
        """The folder of the teacher that its command names; None where that is a hub name or no longer there."""
        name = self.args.get("options", {}).get("teacher_model")
        folder = Path(self.args.get("folder", "."), name) if name else None
        return folder if folder and folder.is_dir() else None

    @property
    def teacher(self) -> str | None:
        """What tells its teacher from others: the folder where that is there, else the name; None without a teacher."""
        name = self.args.get("options", {}).get("teacher_model")
        return name and str(self.teacher_folder.resolve() if self.teacher_folder else Path(name))


@dataclass(frozen=True)
class Unfinished:
    """A run that cannot be compared, and why (`state`)."""

    folder: Path
    task: str | None
    size: str | None
    method: str
    seed: int | None
    state: str

    @property
    def name(self) -> str:
        return run_name(self.task, self.size, self.method, self.seed)


def run_name(task: str | None, size: str | None, method: str, seed: int | None) -> str:
    return " ".join(map(str, filter(None, (task, size, method)))) + ("" if seed is None else f", seed {seed}")


def find_runs(roots: list[Path]) -> tuple[list[FinishedRun], list[Unfinished]]:
    """All runs in and below the given folders, checkpoints aside, in the order of the tasks' table and of their paths.

    A run is a folder with eval_results.json, or only eval_results.txt. A record beside it (`<folder>.json`: task, size,
    method, seed, command, state, seconds) says what it is; otherwise its own files and its path do: the parts below the
    given folder, without those that name the task or the seed, are the method. A record of a run that is not finished,
    and a folder with an args.json but no results, is unfinished.
    Raises InputError for a folder that is not there or without runs, damaged files, and two runs that are the same one.
    """
    runs, unfinished, seen = {}, [], set()
    for root in roots:
        if not root.is_dir():
            raise InputError(f"{root}: no such folder")
        for folder, record in _candidates(root):
            if folder.resolve() in seen:
                continue
            seen.add(folder.resolve())
            found = _read_run(root, folder, record)
            if isinstance(found, Unfinished):
                unfinished.append(found)
            elif found.name in runs:
                raise InputError(f"{found.folder} and {runs[found.name].folder}: both are {found.name}")
            else:
                runs[found.name] = found
    if not runs:
        state = f"{len(unfinished)} unfinished" if unfinished else "no eval_results.json in or below it"
        raise InputError(f"{', '.join(map(str, roots))}: no finished run, {state}")
    order = {name: k for k, name in enumerate(TASKS)}
    return sorted(runs.values(), key=lambda r: (order.get(r.task.name, len(order)), r.task.name)), unfinished


def _candidates(root: Path) -> Iterator[tuple[Path, dict]]:
    """Folders that hold a run or the start of one, or whose record lies beside them, each with its record."""
    for path, folders, files in os.walk(root):
        aside = (".", "checkpoint-", *([STEPS] if "plan.toml" in files else []))
        folders[:] = sorted(name for name in folders if not name.startswith(aside))
        here = Path(path)
        beside = here.resolve().with_name(here.resolve().name + ".json")
        if {"eval_results.json", "eval_results.txt", "args.json"} & {*files}:
            yield here, read_json(beside) if beside.is_file() else {}
        for name in sorted(files):
            if re.fullmatch(r"(teacher|seed-\d+)\.json", name):
                yield here / name.removesuffix(".json"), read_json(here / name)


def _read_run(root: Path, folder: Path, record: dict) -> FinishedRun | Unfinished:
    args = read_json(folder / "args.json") if (folder / "args.json").is_file() else {}
    results = _read_results(folder)
    inner = folder.relative_to(root).parts
    parts = (*folder.resolve().parts[: -len(inner) or None], *inner)
    task_name = record.get("task") or next((r["task"] for r in results if "task" in r), None) or _task_in(parts)
    if not isinstance(task_name, str | None):
        raise InputError(f"{folder}: {json.dumps(task_name)} is no GLUE task")
    seeds = [int(found[1]) for part in parts if (found := _SEED_FOLDER.fullmatch(part))]
    seed = record.get("seed", args.get("seed", seeds[-1] if seeds else None))
    rest = [p for p in inner if not (_SEED_FOLDER.fullmatch(p) or _means(p, task_name))]
    outer = [p for p in reversed(parts) if not _SEED_FOLDER.fullmatch(p)]
    method, size = record.get("method") or "/".join(rest) or outer[0], record.get("size") or None
    state = record.get("state", _FINISHED)
    if state != _FINISHED or not results:
        state = state if state != _FINISHED else "no eval_results"
        return Unfinished(folder, task_name, size, method, seed, state)
    options = args.get("options", {})
    if options.get("one_step") is False and not options.get("pred_distill"):
        return Unfinished(folder, task_name, size, method, seed, "the first of two stages")
    task = _task(task_name, results[0], folder)
    # The published code gives MNLI's matched figure without the set's name.
    results = [{task.best_metric: entry.get(f"eval_{task.metric}")} | entry for entry in results]
    best = max(results, key=lambda entry: _rank(entry.get(_chosen_by(task, entry))))
    run = FinishedRun(folder, task, size, method, seed, best, args, record)
    if all(run.figure(figure) is None for figure in figures_of(task)):
        raise InputError(f"{folder}: its eval_results has no {task.best_metric}, which {task.name} is compared by")
    return run


def _read_results(folder: Path) -> list[dict]:
    """The evaluations in a folder's results: one in eval_results.json. The published code appends each evaluation to
    eval_results.txt; of these the model is kept that is best by `_chosen_by`."""
    path = folder / "eval_results.json"
    if path.is_file():
        return [read_json(path)]
    path = path.with_suffix(".txt")
    if not path.is_file():
        return []
    entries = [{}]
    with reading(str(path)):
        lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        key, equals, text = (part.strip() for part in line.partition("="))
        if not line.strip():
            continue
        if not equals:
            raise InputError(f"{path}, line {number}: not of the form key = value")
        key = _OLDER_NAMES.get(key, key)
        if key in entries[-1]:
            entries.append({})
        try:
            entries[-1][key] = float(text)
        except ValueError:
            entries[-1][key] = text
    return entries


def _chosen_by(task: Task, entry: dict) -> str:
    """The figure by which the published code keeps a model."""
    key = f"eval_{AUTHORS_CHOOSE_BY.get(task.name)}"
    return key if key in entry else task.best_metric


def _rank(value) -> float:
    return value if isinstance(value, int | float) else -math.inf


def _means(part: str, task_name: str | None) -> bool:
    """Whether a folder is called after the task."""
    return part == task_name or (task_name in TASKS and TASKS[task_name].corpus.is_called(part))


def _task_in(parts: tuple[str, ...]) -> str | None:
    """The task that a path names, the last of them."""
    found = (task.name for part in reversed(parts) for task in TASKS.values() if task.corpus.is_called(part))
    return next(found, None)


def _task(name: str | None, results: dict, folder: Path) -> Task:
    if "custom" in (name, results.get("task")):
        found = next((task for task in _CUSTOM if task.best_metric in results), _CUSTOM[0])
        return dataclasses.replace(found, name=name)  # as a plan calls it
    if name is None:
        raise InputError(f"{folder}: neither its eval_results nor its path says which task it is")
    try:
        return get_task(name)
    except InputError as error:
        raise InputError(f"{folder}: {json.dumps(name)} is no GLUE task") from error
