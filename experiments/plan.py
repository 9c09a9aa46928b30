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
from bert_emd.augment_data import parser as augment_parser
from bert_emd.general_arguments import GeneralArguments
from bert_emd.layer_arguments import OF_MADE_STUDENTS
from bert_finetune.arguments import ModelArguments, TaskArguments
from bert_finetune.command_line import Parser
from bert_finetune.errors import InputError
from bert_finetune.files import read_toml
from bert_finetune.glue import TASKS
from bert_finetune.paths import several
from experiments.planned_runs import STEPS, PlannedRun, as_arguments, as_text

if TYPE_CHECKING:
    from bert_finetune.tables import Table

# What a run's place in the plan decides, and what does not go with that.
_GIVEN = """
    task_name data_dir train_file validation_file test_file dataset_name dataset_config train_split validation_split
    test_split teacher_model output_dir overwrite_output_dir
    resume_from_checkpoint do_train help
    push_to_hub hub_model_id hub_token hub_strategy hub_revision hub_private_repo hub_always_push
""".split()
_KEYS = "tasks seeds baseline data_dir teacher_seeds files steps teacher student sizes methods".split()
# Options of a task of the user's own files.
_FILES = """
    train_file validation_file text_column label_column label_separator label_columns delimiter decimal merge_case
    regression
""".split()
# Of the options that say where a task's files are, those that a step about its training rows takes.
_OF_TRAINING_FILES = "task_name data_dir train_file text_column label_column label_columns delimiter".split()
# Two ways to name a student, of which the later wins: the options of one that is made, and that of one that is there.
_MADE, _THERE = ("student_layers", *OF_MADE_STUDENTS), ("student_model",)
# A word for a folder, and not the teacher's, nor that of the steps.
_FOLDER_NAME = re.compile(rf"(?!(teacher|{STEPS})$)[A-Za-z0-9][A-Za-z0-9._-]*", re.IGNORECASE)
# In an option's text: what a step has made, or another method's run of the same task, size and seed.
_REFERENCE = re.compile(r"\{(steps|methods)\.([\w.-]+)\}")
_KINDS = {str: "texts", int: "whole numbers"}


@dataclass(frozen=True)
class PlainParser:
    """A parser of argparse, with the interface of `Parser`: it imports nothing heavy."""

    light: ArgumentParser

    def full(self) -> ArgumentParser:
        """All options of the script."""
        return self.light


@dataclass(frozen=True)
class Script:
    """One of the scripts that a suite runs. `options`: makes its parser. `given`: options that a plan must not set.
    `output`: its option that names what it makes. `of_tasks`: whether it has the options of a task's files."""

    path: str
    options: Callable[[], Parser | PlainParser]
    given: tuple[str, ...]
    output: str = "output_dir"
    of_tasks: bool = True

    @functools.cached_property
    def _checker(self) -> ArgumentParser:
        return self.parser()

    @functools.cached_property
    def _light_checker(self) -> ArgumentParser:
        return _without_required(self.options().light)

    def parser(self) -> ArgumentParser:
        """All options of the script, none of them required."""
        return _without_required(self.options().full())

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


def _of_finetuning() -> Parser:
    return Parser(ModelArguments, TaskArguments, description="")


def _of_distillation() -> Parser:
    return Parser(DistillationArguments, TaskArguments, description="")


TEACHER_SCRIPT = Script("bert_finetune/run_glue.py", _of_finetuning, tuple(_GIVEN))
STUDENT_SCRIPT = Script("bert_emd/emd_task_distill.py", _of_distillation, (*_GIVEN, "seed"))
# What describes files, both scripts know alike.
FILES = Script(TEACHER_SCRIPT.path, _of_finetuning, ())
# What can come before the runs of all tasks, by the name that a step's `script` has.
STEP_SCRIPTS = {
    "general_distill": Script(
        "bert_emd/general_distill.py",
        lambda: Parser(GeneralArguments, description=""),
        tuple(name for name in _GIVEN if not hasattr(GeneralArguments, name)),
        of_tasks=False,
    ),
    "augment_data": Script(
        "bert_emd/augment_data.py", lambda: PlainParser(augment_parser()), (*_GIVEN, "output", "overwrite"), "output"
    ),
}


@dataclass(frozen=True)
class Plan:
    """tasks x sizes x methods x seeds. A plan without sizes has one, called "".

    files: of each task that is not GLUE's, the options that name and describe its files.
    steps: options of what comes before the runs, with the name of its script, of STEP_SCRIPTS, as `script`.
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
    steps: dict[str, dict]
    teacher: dict
    teacher_folder: str | None
    student: dict
    sizes: dict[str, dict]
    methods: dict[str, dict]

    def runs(self, output_dir: Path) -> list[PlannedRun]:
        """Every run, each after those that it needs. Raises InputError for a student that nothing is made from, and for
        references that lead nowhere."""
        steps = {}
        for name in self.steps:
            for task in self.tasks if STEP_SCRIPTS[self.steps[name]["script"]].of_tasks else [""]:
                steps[name, task] = self._step(name, task, output_dir, steps)
        return [*steps.values(), *(run for task in self.tasks for run in self._runs(task, output_dir, steps))]

    def _where(self, task: str) -> dict:
        return self.files.get(task) or {"task_name": task, "data_dir": self.data_dir}

    def _step(self, name: str, task: str, output_dir: Path, steps: dict[tuple[str, str], PlannedRun]) -> PlannedRun:
        options = dict(self.steps[name])
        script = STEP_SCRIPTS[options.pop("script")]
        made = output_dir / STEPS / name / task
        if script.of_tasks:
            options |= {key: value for key, value in self._where(task).items() if key in _OF_TRAINING_FILES}
            made = made.with_name(f"{made.name}{'.tsv' if task in TASKS else '.jsonl'}")
        place, needs = self._read(f"[steps.{name}]", options, {"steps": _of_task(steps, task)})
        return PlannedRun(STEPS, task, name, None, script.path, options, made, place, needs=needs, output=script.output)

    def _read(
        self, where: str, options: dict, made: dict[str, dict[str, PlannedRun]]
    ) -> tuple[dict[str, str], tuple[PlannedRun, ...]]:
        """The options whose texts refer to what other runs make, with that in its place, and these runs; `made`: of
        "steps" and "methods", by name."""
        place, needs = {}, {}
        for option, value in options.items():
            for reference in _REFERENCE.finditer(as_text(value)):
                kind, name = reference.groups()
                if name not in made.get(kind, {}):
                    raise InputError(
                        f"{self.path}: {where}: {option} = {value!r}: there is no {reference[0]} before it"
                    )
                run = needs[reference[0]] = made[kind][name]
                place[option] = place.get(option, as_text(value)).replace(reference[0], str(run.folder))
        return place, tuple(needs.values())

    def _runs(self, task: str, output_dir: Path, steps: dict[tuple[str, str], PlannedRun]) -> Iterator[PlannedRun]:
        shared = self._where(task) | {"do_train": True}
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
        students = {}
        for size, seed, method in itertools.product(self.sizes, self.seeds, self.methods):
            options = {}
            for table in (self.student, self.sizes[size], self.methods[method]):
                later = _options(table, task, size)
                replaced = _THERE if "student_layers" in later else _MADE if "student_model" in later else []
                options = {name: value for name, value in options.items() if name not in replaced} | later
            options |= shared
            if ("student_model" in options) == ("student_layers" in options):
                name = "/".join(filter(None, (task, size, method)))
                raise InputError(f"{self.path}: {name}: give either student_layers or student_model")
            folder = output_dir / task / size / method / f"seed-{seed}"
            teacher = teachers.get(seed if self.teacher_seeds else None)
            others = {name: run for (*same, name), run in students.items() if same == [size, seed]}
            name = "/".join(filter(None, (task, size, method)))
            place, needs = self._read(name, options, {"steps": _of_task(steps, task), "methods": others})
            if teacher:
                place["teacher_model"] = str(teacher.folder)
            options["seed"] = seed
            run = PlannedRun(task, size, method, seed, STUDENT_SCRIPT.path, options, folder, place, teacher, needs)
            students[size, seed, method] = run
            yield run

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
        models = []
        for task in self.tasks:
            if self.teacher_folder:
                models.append(("[teacher] folder", self.teacher_folder.replace("{task}", task)))
            else:
                name = "model_name_or_path"
                models.append((f"[teacher] {name}", _options(self.teacher, task)[name]))
        for run in self.runs(Path()):
            there = {name: as_text(value) for name, value in run.options.items() if name not in run.place}
            for name in ("student_model", *(("teacher_model", "masked_lm") if run.is_step else ())):
                if name in there:
                    models.append((name, there[name]))
            for name in ("unlabeled_file", "corpus"):
                if name in there:
                    several(f"{self.path}: {name}", there[name])
        # Which import torch.
        from bert_finetune.checkpoints import load_classifier_config, load_config, load_encoder_config

        load = {
            "[teacher] folder": partial(load_classifier_config, fine_tuned=True),
            "[teacher] model_name_or_path": load_classifier_config,
            "student_model": load_classifier_config,
            "teacher_model": load_encoder_config,  # of general distillation
            "masked_lm": load_config,
        }
        for option, model in dict.fromkeys(models):
            load[option](model, f"{self.path}: {option}")


def _of_task(steps: dict[tuple[str, str], PlannedRun], task: str) -> dict[str, PlannedRun]:
    """What steps have made that a run of a task can read, by the steps' names."""
    return {name: run for (name, of), run in steps.items() if of in ("", task)}


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
    steps = table(plan, "steps", "steps")
    for name in steps:
        where, options = f"[steps.{name}]", dict(table(steps, name, f"steps.{name}"))
        check(_FOLDER_NAME.fullmatch(name), f"{where}: {name!r} cannot be the name of a folder here")
        script = STEP_SCRIPTS.get(options.pop("script", None))
        check(script, f"{where}: script must be one of {', '.join(STEP_SCRIPTS)}")
        script.check(f"{path}: {where}", options)
        checked.append((script, f"{path}: {where}", options))
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
        *(path, tasks, seeds, baseline, data_dir, teacher_seeds, files, steps),
        *(teacher, folder, student, sizes or {"": {}}, methods),
    )
    read.runs(Path())
    for script, where, plain in checked:
        script.check_values(where, plain)  # last, since this imports torch
    return read
