"""What a task asks for, a class or a score, and all that follows from it. Nobody else asks which of the two a task is.

A kind knows how labels are read, what a model's head must look like, its hard and soft loss, how logits become answers
and how these are written, its figures, and the best answer that looks at no text. docs/architecture.md says what a
third kind would write.

torch, scipy and scikit-learn are imported where they are used: every script reads the table of tasks, also for --help.
"""

import math
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from bert_finetune.errors import InputError

# The loss squares scores, in float32, which ends at 3.4e38.
_LARGEST_SCORE = 1e18
# How many classes a message lists.
_LISTED = 20


# Figures of a model and its teacher, of every kind, and all figures that are better where they are smaller.
AGREEMENT = ("agreement", "divergence")
SMALLER_IS_BETTER = ("loss", "divergence")


class TaskKind(ABC):
    """The interface of the kinds. Shapes: `logits` (examples, `outputs`), labels (examples,)."""

    # transformers' name for it, which a model's configuration keeps.
    problem_type: ClassVar[str]
    # What a task of the user's own is measured by, and the one of these that chooses the best checkpoint.
    own_figures: ClassVar[tuple[str, ...]]
    own_metric: ClassVar[str]
    # The figure that says how alike two models' answers are.
    agreement_figure: ClassVar[str]
    # What stands in the place of a training row's label that has none.
    no_label: ClassVar[int | float]

    @property
    @abstractmethod
    def output_names(self) -> list[str]:
        """The names of a model's outputs, in the order of its logits."""

    @property
    def outputs(self) -> int:
        """How many numbers a model gives for an example."""
        return len(self.output_names)

    @property
    @abstractmethod
    def subject(self) -> str:
        """What a model of this kind tells, in the words of a model card."""

    @property
    @abstractmethod
    def wanted(self) -> str:
        """What a model's head must have, in words."""

    @abstractmethod
    def output_order(self, names: list[str], what: str, task: str, fine_tuned: bool) -> list[int]:
        """order[k]: which output of a model is this task's output k; `names` are the model's, as its labels are called.

        `what` and `task` are how messages call the two. Raises InputError for a fine-tuned model that does not fit; of
        another the outputs are then taken as they are.
        """

    @abstractmethod
    def read(self, text: str, task: str) -> int | float:
        """A label as the task's files write it -> what a model learns. Raises ValueError that says what is wrong."""

    @property
    @abstractmethod
    def allowed(self) -> str:
        """What a prediction in a file may be, in words."""

    @abstractmethod
    def accepts(self, prediction: str) -> bool:
        """Whether a prediction in a file is one."""

    @abstractmethod
    def described(self, texts: list[str]) -> str:
        """What labels there are, for the user to check; `texts`: all labels of a file, none where it has no labels."""

    @abstractmethod
    def hard_loss(self, logits, labels):
        """The loss against the true labels: tensors, a scalar; the mean over examples, 0 for those without a label."""

    @abstractmethod
    def soft_loss(self, student_logits, teacher_logits, temperature: float, mean_over_classes: bool = False):
        """The loss against a teacher's logits: tensors, a scalar; the mean over examples.

        mean_over_classes: the authors' arithmetic, where a loss has classes to sum over.
        """

    @abstractmethod
    def unit_of_loss(self, labels: np.ndarray) -> float:
        """What losses are to be divided by, so that they mean the same on all tasks of this kind; `labels`: of the
        training rows."""

    @abstractmethod
    def answers(self, logits: np.ndarray) -> np.ndarray:
        """What a model's logits say of each example, (examples,)."""

    @abstractmethod
    def written(self, logits: np.ndarray) -> list[str]:
        """The answers as a file of predictions has them."""

    @abstractmethod
    def measure(self, figures: Iterable[str], logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """The named figures, each in -1..1 or 0..1."""

    @abstractmethod
    def divergences(self, logits: np.ndarray, teacher_logits: np.ndarray) -> np.ndarray:
        """How far a model's answer to each example is from its teacher's, (examples,); 0 where they are the same."""

    def agreement(self, logits: np.ndarray, teacher_logits: np.ndarray) -> dict[str, float]:
        """How a model agrees with its teacher, whatever the labels: `agreement`, the `agreement_figure` with the
        teacher's answers in the place of the labels, and `divergence`, the mean of `divergences`."""
        as_teacher = self.measure([self.agreement_figure], logits, self.answers(teacher_logits))
        values = as_teacher[self.agreement_figure], float(self.divergences(logits, teacher_logits).mean())
        return dict(zip(AGREEMENT, values, strict=True))

    @abstractmethod
    def constant_figure(self, figure: str, labels: np.ndarray, outputs: int) -> float:
        """What `figure` is for the best constant answer: the most that a model reaches which has learnt nothing.

        outputs: of the model; a kind read back from a finished run may not know all of its classes.
        """

    @abstractmethod
    def could_be(self, logits: np.ndarray, labels: np.ndarray) -> bool:
        """Whether these numbers, read from a file, can be a model's answers and the labels to them."""


@dataclass(frozen=True)
class Classification(TaskKind):
    """One class out of several.

    `labels`: the label as the files write it -> the class name that a model carries. `writes_names`: predictions are
    written as class names, not as the files write labels.

    Figures: `accuracy`; `mcc`, Matthews' correlation; `f1` of class 1; `macro_f1`, the mean of all classes' F1.
    """

    labels: dict[str, str]
    writes_names: bool = False

    problem_type = "single_label_classification"
    own_figures = ("accuracy", "macro_f1", "mcc")
    own_metric = "accuracy"
    agreement_figure = "accuracy"
    no_label = -100

    @property
    def output_names(self) -> list[str]:
        return list(self.labels.values())

    @property
    def subject(self) -> str:
        return ", ".join(self.output_names[:8]) + (", ..." if self.outputs > 8 else "")

    @property
    def wanted(self) -> str:
        return ", ".join(self.output_names)

    def output_order(self, names: list[str], what: str, task: str, fine_tuned: bool) -> list[int]:
        """Classes are found by name; LABEL_0, LABEL_1, ... count as unnamed."""
        as_they_are = list(range(self.outputs))
        if len(names) == self.outputs:
            if all(name == f"LABEL_{k}" for k, name in enumerate(names)):
                if self.outputs > 2 and fine_tuned:
                    print(f"{what}: its classes have no names; they are taken to be in the order {self.wanted}")
                return as_they_are
            spelling = {plain(name): k for k, pair in enumerate(self.labels.items()) for name in pair}
            found = {spelling.get(plain(name)): position for position, name in enumerate(names)}
            if set(found) == set(as_they_are):
                return [found[k] for k in as_they_are]
        if not fine_tuned:
            return as_they_are
        if len(names) != self.outputs:
            raise _does_not_fit(names, what, task, self.wanted)
        raise InputError(
            f"{what}: its labels ({', '.join(names)}) are not {task}'s ({self.wanted}); "
            "if they mean the same, say with --class_names what the model's are called here, in its order"
        )

    def read(self, text: str, task: str) -> int:
        if text not in self.labels:
            raise ValueError(f"label {text!r} is not one of {task}'s: {', '.join(self.labels)}")
        return list(self.labels).index(text)

    @property
    def allowed(self) -> str:
        return f"one of {', '.join(self.labels)}"

    def accepts(self, prediction: str) -> bool:
        return prediction in self.labels

    def described(self, texts: list[str]) -> str:
        counts = Counter(texts)
        shown = ", ".join(
            (label if label == name else f"{label} = {name}") + (f" ({counts[label]})" if texts else "")
            for label, name in list(self.labels.items())[:_LISTED]
        )
        return f"{self.outputs} classes: {shown}" + (", ..." if self.outputs > _LISTED else "")

    def hard_loss(self, logits, labels):
        """The cross-entropy."""
        from torch.nn import functional

        labels = labels.view(-1)
        return functional.cross_entropy(logits, labels, ignore_index=self.no_label, reduction="sum") / len(labels)

    def soft_loss(self, student_logits, teacher_logits, temperature: float, mean_over_classes: bool = False):
        """T² · KL(p^T || p^S), p = softmax(z / T), the mean over examples; or, with `mean_over_classes`, the
        cross-entropy -Σ p^T log p^S · T² divided by the number of classes, the authors' convention."""
        from torch.nn import functional

        if mean_over_classes:
            targets = functional.softmax(teacher_logits / temperature, dim=-1)
            log_probabilities = functional.log_softmax(student_logits / temperature, dim=-1)
            return -(targets * log_probabilities).mean() * temperature**2
        ours, theirs = (
            functional.log_softmax(logits / temperature, dim=-1) for logits in (student_logits, teacher_logits)
        )
        return functional.kl_div(ours, theirs, log_target=True, reduction="batchmean") * temperature**2

    def unit_of_loss(self, labels: np.ndarray) -> float:
        """1: a nat is a nat."""
        return 1.0

    def answers(self, logits: np.ndarray) -> np.ndarray:
        """Class ids."""
        return np.asarray(logits, dtype=np.float64).argmax(axis=-1)

    def written(self, logits: np.ndarray) -> list[str]:
        names = self.output_names if self.writes_names else list(self.labels)
        return [names[k] for k in self.answers(logits)]

    def measure(self, figures: Iterable[str], logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        from sklearn import metrics

        known: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
            "accuracy": metrics.accuracy_score,
            "mcc": metrics.matthews_corrcoef,
            "f1": lambda *pair: metrics.f1_score(*pair, zero_division=0),
            "macro_f1": lambda *pair: metrics.f1_score(*pair, average="macro", zero_division=0),
        }
        answers = self.answers(logits)
        return {figure: float(known[figure](labels, answers)) for figure in figures}

    def divergences(self, logits: np.ndarray, teacher_logits: np.ndarray) -> np.ndarray:
        """KL(teacher || student) = Σ p^T log(p^T / p^S) over the classes, p = softmax(z), in nats."""
        from scipy.special import log_softmax

        ours, theirs = (log_softmax(np.asarray(one, dtype=np.float64), axis=-1) for one in (logits, teacher_logits))
        return (np.exp(theirs) * (theirs - ours)).sum(axis=-1)

    def constant_figure(self, figure: str, labels: np.ndarray, outputs: int) -> float:
        constants = (np.tile(one, (len(labels), 1)) for one in np.eye(outputs))
        return max(self.measure([figure], constant, labels)[figure] for constant in constants)

    def could_be(self, logits: np.ndarray, labels: np.ndarray) -> bool:
        return bool(np.isin(labels, range(logits.shape[-1])).all())


@dataclass(frozen=True)
class Regression(TaskKind):
    """A score, which lies from `low` to `high`.

    Figures: `pearson`, `spearman` and `corr`, their mean; a constant prediction has no correlation and counts as 0.
    """

    low: float = -math.inf
    high: float = math.inf

    problem_type = "regression"
    own_figures = ("pearson", "spearman", "corr")
    own_metric = "spearman"
    agreement_figure = "pearson"
    no_label = math.nan

    @property
    def output_names(self) -> list[str]:
        return ["score"]

    @property
    def subject(self) -> str:
        return "a score"

    @property
    def wanted(self) -> str:
        return "one regression score"

    def output_order(self, names: list[str], what: str, task: str, fine_tuned: bool) -> list[int]:
        if fine_tuned and len(names) != 1:
            raise _does_not_fit(names, what, task, self.wanted)
        return [0]

    def read(self, text: str, task: str) -> float:
        value = number(text)
        if value is not None and abs(value) > _LARGEST_SCORE:
            raise ValueError(f"{text!r} is too large: float32 has no room for its square, the loss; scale the scores")
        if value is None or not self.low <= value <= self.high:
            bounded = f"score between {self.low:g} and {self.high:g}"
            raise ValueError(f"{text!r} is not a {'number' if math.isinf(self.high) else bounded}")
        return value

    @property
    def allowed(self) -> str:
        return f"a number from {self.low:g} to {self.high:g}"

    def accepts(self, prediction: str) -> bool:
        value = number(prediction)
        return value is not None and self.low <= value <= self.high

    def described(self, texts: list[str]) -> str:
        numbers = [value for value in map(number, texts) if value is not None]
        return "a score to predict" + (f", from {min(numbers):g} to {max(numbers):g}" if numbers else "")

    def hard_loss(self, logits, labels):
        """The mean squared error."""
        import torch
        from torch.nn import functional

        logits, labels = logits.view(-1), labels.view(-1).float()
        return functional.mse_loss(logits, torch.where(labels.isnan(), logits.detach(), labels))

    def soft_loss(self, student_logits, teacher_logits, temperature: float, mean_over_classes: bool = False):
        """The mean squared error; a score has neither temperature nor classes."""
        return self.hard_loss(student_logits, teacher_logits)

    def unit_of_loss(self, labels: np.ndarray) -> float:
        """The scores' variance, the loss of the best constant answer; 1 where all are the same."""
        known = labels[~np.isnan(labels)]
        return float(np.var(known)) or 1.0 if len(known) else 1.0

    def answers(self, logits: np.ndarray) -> np.ndarray:
        """The scores themselves."""
        return np.asarray(logits, dtype=np.float64).reshape(-1)

    def written(self, logits: np.ndarray) -> list[str]:
        return [f"{value:.6g}" for value in np.clip(self.answers(logits), self.low, self.high)]

    def measure(self, figures: Iterable[str], logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        from scipy import stats

        answers = self.answers(logits)
        constant = len(labels) < 2 or np.ptp(answers) == 0 or np.ptp(labels) == 0
        pearson, spearman = (
            0.0 if constant else float(kind(answers, labels).statistic) for kind in (stats.pearsonr, stats.spearmanr)
        )
        known = {"pearson": pearson, "spearman": spearman, "corr": (pearson + spearman) / 2}
        return {figure: known[figure] for figure in figures}

    def divergences(self, logits: np.ndarray, teacher_logits: np.ndarray) -> np.ndarray:
        """The squared difference of the two scores."""
        return (self.answers(logits) - self.answers(teacher_logits)) ** 2

    def constant_figure(self, figure: str, labels: np.ndarray, outputs: int) -> float:
        return 0.0

    def could_be(self, logits: np.ndarray, labels: np.ndarray) -> bool:
        return logits.size == len(labels)


def _does_not_fit(names: list[str], what: str, task: str, wanted: str) -> InputError:
    return InputError(f"{what}: its {len(names)} labels ({', '.join(names)}) do not fit {task} ({wanted})")


def number(text: str) -> float | None:
    """The finite number that a field stands for, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    if "_" in text:
        return None  # Python's own way of writing 10 is 1_0
    return value if math.isfinite(value) else None


def plain(name: str) -> str:
    """A class name without what spellings differ in: case, and blanks, underscores or hyphens."""
    return re.sub(r"[\s_-]+", "_", name.lower())
