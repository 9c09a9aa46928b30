"""The figures that runs are compared by: a task's own, and those that compare a student with its teacher; on the dev
set, or on the held-out file (`--agreement_file`)."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np

from bert_finetune.glue import Task
from bert_finetune.task_kinds import AGREEMENT, SMALLER_IS_BETTER, of_teacher
from experiments.significance import Measure, mean_of, measure_of

# A task's own figure, whatever it is called there.
SCORE = "score"

_TITLES = {
    "accuracy": "accuracy",
    "f1": "F1",
    "macro_f1": "macro F1",
    "mcc": "MCC",
    "micro_f1": "micro F1",
    "spearman": "ρ",
}

Arrays = dict[str, np.ndarray]
"""What a run has kept of a set, by name: `logits` (examples, outputs), `labels`, `teacher_logits`; and `SETTINGS`."""

# What is not of the examples but of a model, where its kind has it: `TaskKind.settings`, and the teacher's.
SETTINGS = ("thresholds", "teacher_thresholds")


@dataclass(frozen=True)
class Figure:
    """One of the task's figures, against the labels.

    name: as the task's kind has it. part: "eval", the dev set, or "test", the held-out file. split: the dev set's name
    where there are several (MNLI), else "".
    """

    task: Task
    name: str
    part: str = "eval"
    split: str = ""

    # Which arrays it is measured on.
    needs: ClassVar[tuple[str, ...]] = ("logits", "labels")

    def __hash__(self) -> int:
        return hash((self.task.name, self.name, self.part, self.split))  # a task holds dictionaries

    @property
    def title(self) -> str:
        """As published tables head the column: `RTE`, `MRPC F1`, `MNLI-mm`; and `RTE test agreement`."""
        task = Path(self.task.submission[self.split]).stem if self.split else self.task.name
        name = "" if self.name == self.task.metric == "accuracy" else _TITLES.get(self.name, self.name)
        return " ".join(filter(None, (task, "test" if self.part == "test" else "", name)))

    @property
    def heading(self) -> str:
        """The title, and which set it is of."""
        return f"{self.title}, {'held-out file' if self.part == 'test' else 'dev set'}"

    @property
    def label(self) -> str:
        """What an axis calls it: `dev accuracy`, `held-out agreement`."""
        return f"{'held-out' if self.part == 'test' else 'dev'} {self.name}"

    @property
    def key(self) -> str:
        """Its name in eval_results."""
        return "_".join(filter(None, (self.part, self.split, self.name)))

    @property
    def predictions_file(self) -> str:
        """Where a run keeps what it is measured on."""
        return f"{'test' if self.part == 'test' else 'dev'}_predictions.npz"

    @property
    def smaller_is_better(self) -> bool:
        return self.name in SMALLER_IS_BETTER

    @property
    def is_score(self) -> bool:
        """Whether GLUE reports it: the task's own metric on a dev set."""
        return self.part == "eval" and self.name == self.task.metric

    def measure(self, arrays: Arrays) -> Measure:
        """The figure of resamples of the set."""
        task = replace(self.task, metric=self.name, kind=self.task.kind.configured(arrays))
        return measure_of(task, arrays["logits"], arrays["labels"])

    def of(self, arrays: Arrays) -> float:
        """The figure of the whole set."""
        return float(self.measure(arrays)(np.ones((1, len(arrays["logits"]))))[0])

    def constant(self, arrays: Arrays) -> float | None:
        """What the best constant answer scores; None where that says nothing."""
        return self.task.kind.constant_figure(self.name, arrays["labels"], arrays["logits"].shape[-1])


class Agreement(Figure):
    """The kind's `agreement_figure`, against the teacher's answers."""

    needs = ("logits", "teacher_logits")

    def measure(self, arrays: Arrays) -> Measure:
        teacher = of_teacher(arrays)
        kind = self.task.kind.configured(teacher)
        task = replace(self.task, metric=kind.agreement_figure, kind=kind)
        return measure_of(task, arrays["logits"], kind.answers(teacher["logits"]))

    def constant(self, arrays: Arrays) -> None:
        return None


class Divergence(Agreement):
    """The mean of the kind's `divergences` from the teacher's answers."""

    def measure(self, arrays: Arrays) -> Measure:
        return mean_of(self.task.kind.divergences(arrays["logits"], arrays["teacher_logits"]))


_OF_TEACHER = dict(zip(AGREEMENT, (Agreement, Divergence), strict=True))


def figures_of(task: Task, name: str = SCORE) -> list[Figure]:
    """The task's figures of that name, one for each dev set, or, for `test_...`, the held-out file's; none where the
    task has no such figure."""
    part, name = ("test", name.removeprefix("test_")) if name.startswith("test_") else ("eval", name)
    name = task.metric if name == SCORE else name
    if name not in (*task.figures, *task.kind.own_figures, *_OF_TEACHER):
        return []
    splits = list(task.dev) if part == "eval" and len(task.dev) > 1 else [""]
    return [_OF_TEACHER.get(name, Figure)(task, name, part, split) for split in splits]


def all_figures_of(task: Task) -> Iterable[Figure]:
    """What tables show of a task: its score and how students agree with their teachers, on all sets."""
    names = (SCORE, *AGREEMENT)
    return [figure for name in (*names, *(f"test_{name}" for name in names)) for figure in figures_of(task, name)]
