"""Plans of suites: read from TOML, checked wholly, and unrolled into runs. docs/suites.md explains them."""

import functools
import itertools
import re
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from bert_emd.arguments import DistillationArguments
from bert_finetune.arguments import ModelArguments, TaskArguments
from bert_finetune.command_line import Parser
from bert_finetune.errors import InputError
from bert_finetune.files import read_toml
from bert_finetune.glue import TASKS
from bert_finetune.paths import several
from experiments.planned_runs import PlannedRun, as_arguments, as_text

if TYPE_CHECKING:
    from bert_finetune.tables import Table

# What a run's place in the plan decides, and what does not go with that.
_GIVEN = """
    task_name data_dir train_file validation_file test_file dataset_name dataset_config train_split validation_split
    test_split teacher_model output_dir overwrite_output_dir
    resume_from_checkpoint do_train help
    push_to_hub hub_model_id hub_token hub_strategy hub_revision hub_private_repo hub_always_push
""".split()
_KEYS = "tasks seeds baseline data_dir teacher_seeds files teacher student sizes methods".split()
# Options of a task of the user's own files.
_FILES = "train_file validation_file text_column label_column delimiter decimal merge_case regression".split()
# A word for a folder, and not the teacher's.
_FOLDER_NAME = re.compile(r"(?!teacher$)[A-Za-z0-9][A-Za-z0-9._-]*", re.IGNORECASE)
_KINDS = {str: "texts", int: "whole numbers"}


@dataclass(frozen=True)
class Script:
    """One of the two scripts that a suite runs. `arguments`: its own options; the Trainer's come with them. `given`:
    options that a plan must not set."""

    path: str
    arguments: tuple[type, ...]
    given: tuple[str, ...]

    @functools.cached_property
    def _checker(self) -> ArgumentParser:
        return self.parser()

    @functools.cached_property
    def _light_checker(self) -> ArgumentParser:
        return _without_required(Parser(*self.arguments, TaskArguments, description="").light)

    def parser(self) -> ArgumentParser:
        """All options of the script, none of them required."""
        return _without_required(Parser(*self.arguments, TaskArguments, description="").full())

    def check(self, where: str, options: dict) -> None:
        """Raise InputError for options that the script does not have, or that do not fit as far as that can be told
        without torch; `check_values` tells the rest."""
        for name, value in options.items():
            if name in self.given:
                raise InputError(f"{where}: {name} has no place in a plan; the suite decides on it")
            values = value if isinstance(value, list) else [value]
            if not values or not all(isinstance(one, str | int | float) for one in values):
                raise InputError(f"{where}: {name}: give true, false, a number, a text, or a list of such")
            if self._parse(self._light_checker, where, {name: value}):
                raise InputError(f"{where}: {self.path} has no option {name}")

    def check_values(self, where: str, options: dict) -> None:
        """Raise InputError for values of the Trainer's options that do not fit."""
        for name, value in options.items():
            self._parse(self._checker, where, {name: value})

    def _parse(self, parser: ArgumentParser, where: str, option: dict) -> list[str]:
        """Have an option parsed; returns what is unknown of it."""
        try:
            return parser.parse_known_args(as_arguments(option))[1]
        except InputError as error:
            raise InputError(f"{where}: {str(error).removesuffix('; see --help')}") from error


def _without_required(parser: ArgumentParser) -> ArgumentParser:
    """The parser with no option required: a plan's table need not hold what another one gives."""
    for action in parser._actions:
        action.required = False
    return parser


TEACHER_SCRIPT = Script("bert_finetune/run_glue.py", (ModelArguments,), tuple(_GIVEN))
STUDENT_SCRIPT = Script("bert_emd/emd_task_distill.py", (DistillationArguments,), (*_GIVEN, "seed"))
# What describes files, both scripts know alike.
FILES = Script(TEACHER_SCRIPT.path, TEACHER_SCRIPT.arguments, ())


@dataclass(frozen=True)
class Plan:
    """tasks x sizes x methods x seeds. A plan without sizes has one, called "".

    files: of each task that is not GLUE's, the options that name and describe its files.
    teacher, student, sizes, methods: options as the plan has them, with tables within for a task or a size (see
    `_options`). teacher_folder: where a finished teacher lies, with {task}, in place of options.
    teacher_seeds: a task has a teacher for each seed, not one for all.
    baseline: the method that others are measured against.
    """

    path: Path
    tasks: list[str]
    seeds: list[int]
    baseline: str
    data_dir: str
    teacher_seeds: bool
    files: dict[str, dict]
    teacher: dict
    teacher_folder: str | None
    student: dict
    sizes: dict[str, dict]
    methods: dict[str, dict]

    def runs(self, output_dir: Path) -> list[PlannedRun]:
        """Every run, each teacher before its students. Raises InputError for a student that nothing is made from."""
        return [run for task in self.tasks for run in self._runs(task, output_dir)]

    def _runs(self, task: str, output_dir: Path) -> Iterator[PlannedRun]:
        where = self.files.get(task) or {"task_name": task, "data_dir": self.data_dir}
        shared = where | {"do_train": True}
        teachers = {}
        if self.teacher_folder:
            shared["teacher_model"] = self.teacher_folder.replace("{task}", task)
        else:
            for seed in self.seeds if self.teacher_seeds else [None]:
                options, folder = _options(self.teacher, task) | shared, output_dir / task / "teacher"
                if seed is not None:
                    options, folder = options | {"seed": seed}, folder / f"seed-{seed}"
                teachers[seed] = PlannedRun(task, "", "teacher", seed, TEACHER_SCRIPT.path, options, folder)
        yield from teachers.values()
        # Seed by seed, so that what a stopped suite has done can be compared.
        for size, seed, method in itertools.product(self.sizes, self.seeds, self.methods):
            options = {}
            for table in (self.student, self.sizes[size], self.methods[method]):
                options |= _options(table, task, size)
            options |= shared
            if ("student_model" in options) == ("student_layers" in options):
                name = "/".join(filter(None, (task, size, method)))
                raise InputError(f"{self.path}: {name}: give either student_layers or student_model")
            folder = output_dir / task / size / method / f"seed-{seed}"
            teacher = teachers.get(seed if self.teacher_seeds else None)
            place = {"teacher_model": str(teacher.folder)} if teacher else {}
            options["seed"] = seed
            yield PlannedRun(task, size, method, seed, STUDENT_SCRIPT.path, options, folder, place, teacher)

    def tables(self, task: str) -> tuple[list[Callable[[], "Table"]], list[Callable[[], "Table"]]]:
        """What reads each of a task's training files, and of its dev sets. Raises InputError for one that is not
        there."""
        from bert_finetune.tables import read_table, read_tsv

        if task in self.files:
            arguments = TaskArguments(**self.files[task])
            train = several(f"{self.path}: [files.{task}] train_file", arguments.train_file)
            paths = [*train, Path(arguments.validation_file)]
            readers = [partial(read_table, path, arguments.delimiter) for path in paths]
        else:
            known = TASKS[task]
            arguments = TaskArguments(task_name=task, data_dir=self.data_dir)
            train = [arguments.file(known.train)]
            paths = [*train, *map(arguments.file, known.dev.values())]
            readers = [partial(read_tsv, path, known.headerless) for path in paths]
        for path in paths:
            if not path.is_file():
                raise InputError(f"{self.path}: there is no {path}, of {task}")
        return readers[: len(train)], readers[len(train) :]

    def check_sources(self) -> None:
        """Raise InputError where data or models that the plan names are not there."""
        for task in self.tasks:
            self.tables(task)
        models = {}
        for task in self.tasks:
            if self.teacher_folder:
                models[self.teacher_folder.replace("{task}", task)] = "[teacher] folder"
            else:
                models[_options(self.teacher, task)["model_name_or_path"]] = "[teacher] model_name_or_path"
        for run in self.runs(Path()):
            if "student_model" in run.options:
                models[run.options["student_model"]] = "student_model"
            if "unlabeled_file" in run.options:
                several(f"{self.path}: unlabeled_file", as_text(run.options["unlabeled_file"]))
        from bert_finetune.checkpoints import load_config  # which imports torch

        for model, option in models.items():
            load_config(model, f"{self.path}: {option}")


def _options(table: dict, *names: str) -> dict:
    """What a table says to all, and then, in the order of the file, what it says in tables within it to one of the
    `names`."""
    options = {name: value for name, value in table.items() if not isinstance(value, dict)}
    for name, within in table.items():
        if isinstance(within, dict) and name in names:
            options |= _options(within, *names)
    return options


def read_plan(path: Path) -> Plan:
    """Read a plan and check all that it says by itself; what lies outside it is for `Plan.check_sources`.

    Raises InputError that names the file and the place in it.
    """

    def check(fits: bool, what: str) -> None:
        if not fits:
            raise InputError(f"{path}: {what}")

    checked = []

    def distinct(key: str, kind: type) -> list:
        values = plan.get(key)
        good = isinstance(values, list) and values and all(type(value) is kind for value in values)
        check(good and len(set(values)) == len(values), f"{key}: give a list of different {_KINDS[kind]}")
        return values

    def table(holder: dict, key: str, where: str) -> dict:
        check(isinstance(holder.get(key, {}), dict), f"{where}: must be a table")
        return holder.get(key, {})

    def check_options(where: str, options: dict, script: Script, within: list[str]) -> None:
        plain = _options(options)
        script.check(f"{path}: [{where}]", plain)
        checked.append((script, f"{path}: [{where}]", plain))
        for name, value in options.items():
            if isinstance(value, dict):
                check(name in within, f"[{where}.{name}]: {name} is none of the plan's tasks and sizes")
                check_options(f"{where}.{name}", value, script, within)

    def named(key: str, within: list[str]) -> dict[str, dict]:
        tables = table(plan, key, key)
        for name in tables:
            check(_FOLDER_NAME.fullmatch(name), f"[{key}.{name}]: {name!r} cannot be the name of a folder here")
            check_options(f"{key}.{name}", table(tables, name, f"{key}.{name}"), STUDENT_SCRIPT, within)
        return tables

    def options_of(key: str, script: Script, within: list[str]) -> dict:
        check_options(key, table(plan, key, key), script, within)
        return plan.get(key, {})

    plan = read_toml(path)
    for key in plan:
        check(key in _KEYS, f"{key} is not a key of a plan; these are: {', '.join(_KEYS)}")
    tasks, seeds = distinct("tasks", str), distinct("seeds", int)
    files = table(plan, "files", "files")
    for task in tasks:
        check(
            task in TASKS or task in files, f"tasks: {task!r} is none of {', '.join(TASKS)}, and has no [files.{task}]"
        )
    for name in files:
        where, options = f"[files.{name}]", table(files, name, f"files.{name}")
        fits = _FOLDER_NAME.fullmatch(name) and name.lower() not in {"custom", *map(str.lower, TASKS)}
        check(fits, f"{where}: {name!r} cannot be the name of a task of your own")
        check(name in tasks, f"{where}: {name} is none of the plan's tasks")
        given = all(isinstance(options.get(option), str) for option in ("train_file", "validation_file"))
        check(given, f"{where}: give train_file and validation_file")
        for option in options:
            check(option in _FILES, f"{where}: {option} is none of {', '.join(_FILES)}")
        FILES.check(f"{path}: {where}", options)
        checked.append((FILES, f"{path}: {where}", options))
    check(all(0 <= seed < 2**32 for seed in seeds), "seeds: must be from 0 to 4294967295")
    sizes = named("sizes", tasks)
    places = [*tasks, *sizes]
    methods = named("methods", places)
    check(methods, "methods: give at least one, as [methods.emd]")
    baseline, data_dir = plan.get("baseline"), plan.get("data_dir", "glue_data")
    check(baseline in [*methods], f"baseline: must be one of the methods: {', '.join(methods)}")
    check(isinstance(data_dir, str), "data_dir: must be a text")
    teacher_seeds = plan.get("teacher_seeds", False)
    check(isinstance(teacher_seeds, bool), "teacher_seeds: must be true or false")
    folder = table(plan, "teacher", "teacher").get("folder")
    if folder is None:
        teacher = options_of("teacher", TEACHER_SCRIPT, tasks)
        for task in tasks:
            options = _options(teacher, task)
            check("model_name_or_path" in options, f"[teacher]: give model_name_or_path, or a folder, for {task}")
            check(
                not (teacher_seeds and "seed" in options),
                "[teacher]: seed goes with no teacher_seeds, which gives each teacher the seed of its students",
            )
    else:
        teacher = {}
        alone = isinstance(folder, str) and len(plan["teacher"]) == 1
        check(alone, "[teacher]: folder is where a finished teacher lies, and goes with no other option")
        check(not teacher_seeds, "teacher_seeds: goes with [teacher]'s options, to train by, and with no folder")
    student = options_of("student", STUDENT_SCRIPT, places)
    read = Plan(
        *(path, tasks, seeds, baseline, data_dir, teacher_seeds, files),
        *(teacher, folder, student, sizes or {"": {}}, methods),
    )
    read.runs(Path())
    for script, where, plain in checked:
        script.check_values(where, plain)  # last, since this imports torch
    return read
