"""What a task asks for, a class, several labels or a score, and all that follows from it. Nobody else asks which of
these a task is.

A kind knows how labels are read, what a model's head must look like, its hard and soft loss, how logits become answers
and how these are written, its figures, and the best answer that looks at no text. docs/architecture.md says what
one more kind would write.

torch, scipy and scikit-learn are imported where they are used: every script reads the table of tasks, also for --help.
"""

import math
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from bert_finetune.errors import InputError
from bert_finetune.processes import is_main_process

# The loss squares scores, in float32, which ends at 3.4e38.
LARGEST_SCORE = 1e18
# How many classes a message lists.
_LISTED = 20
# The probability above which a class applies, where nothing says better.
_EVEN = 0.5
# How far a row's probabilities, as somebody has rounded them, may be from 1 in their sum; and what counts as 0.
_NEAR_ONE = 1e-3
_LEAST_PROBABILITY = 1e-8


# Figures of a model and its teacher, of every kind, and all figures that are better where they are smaller.
AGREEMENT = ("agreement", "divergence")
SMALLER_IS_BETTER = ("loss", "divergence")


class TaskKind(ABC):
    """The interface of the kinds. Shapes: `logits` (examples, `outputs`), labels (examples,), those of several labels a
    text (examples, `outputs`)."""

    # transformers' name for it, which a model's configuration keeps.
    problem_type: ClassVar[str]
    # What a task of the user's own is measured by, and the one of these that chooses the best checkpoint.
    own_figures: ClassVar[tuple[str, ...]]
    own_metric: ClassVar[str]
    # The figure that says how alike two models' answers are.
    agreement_figure: ClassVar[str]
    # What stands in the place of a training row's label that has none.
    no_label: int | float | list[float]
    # Whether a text has one class, whose label --label_smoothing_factor can smooth.
    one_class: ClassVar[bool] = False

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

    @property
    def settings(self) -> dict[str, list[float]]:
        """What a model's configuration keeps of how its logits become answers, by name."""
        return {}

    def configured(self, settings: Mapping) -> "TaskKind":
        """The kind of one model, with such `settings` out of its configuration."""
        return self

    def fitted(self, logits: np.ndarray, labels: np.ndarray) -> "TaskKind":
        """The kind with the settings that are best for these answers of a model, those to the dev set."""
        return self

    @property
    def use(self) -> str:
        """How to read what a transformers pipeline gives, for a model card; empty where that is plain."""
        return ""

    @abstractmethod
    def output_order(self, names: list[str], what: str, task: str, fine_tuned: bool) -> list[int]:
        """order[k]: which output of a model is this task's output k; `names` are the model's, as its labels are called.

        `what` and `task` are how messages call the two. Raises InputError for a fine-tuned model that does not fit; of
        another the outputs are then taken as they are.
        """

    @abstractmethod
    def read(self, text, task: str) -> int | float | list[float]:
        """A label as the task's files write it, a text or several (`OwnFiles.labels`) -> what a model learns. Raises
        ValueError that says what is wrong."""

    @abstractmethod
    def is_labelled(self, labels: np.ndarray) -> np.ndarray:
        """Which rows have a label, (examples,)."""

    @abstractmethod
    def weighted(self, labels: np.ndarray) -> "TaskKind":
        """The kind whose hard loss weighs classes, so that rare ones count like others; `labels`: of the training rows.
        Raises InputError where there are no classes."""

    @property
    @abstractmethod
    def allowed(self) -> str:
        """What a prediction in a file may be, in words."""

    @abstractmethod
    def accepts(self, prediction: str) -> bool:
        """Whether a prediction in a file is one."""

    @abstractmethod
    def described(self, texts: list) -> str:
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

    @property
    def probability_columns(self) -> list[str]:
        """What the columns of a file with `probabilities` are called."""
        return [f"p_{name}" for name in self.output_names]

    @abstractmethod
    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """A model's logits as probabilities, (examples, outputs)."""

    @abstractmethod
    def logits_of_probabilities(self, values: list[float]) -> list[float]:
        """An example's `probabilities` -> logits that have them. Raises ValueError for what are none."""

    def averaged(self, logits: list[np.ndarray]) -> np.ndarray:
        """The logits whose probabilities are the mean of several models' probabilities."""
        mean = np.mean([self.probabilities(each) for each in logits], axis=0)
        return np.array([self.logits_of_probabilities(row) for row in mean.tolist()], dtype=np.float32)

    @abstractmethod
    def answers(self, logits: np.ndarray) -> np.ndarray:
        """What a model's logits say of each example, shaped as labels."""

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
class Classes(TaskKind):
    """What kinds with classes have in common.

    `labels`: the label as the files write it -> the class name that a model carries. `class_weights`: of the hard loss,
    in the order of the classes; None weighs nothing.
    """

    labels: dict[str, str]
    class_weights: tuple[float, ...] | None = None

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

    @abstractmethod
    def balanced_weights(self, labels: np.ndarray) -> np.ndarray:
        """The weight of each class that these labels call for."""

    def weighted(self, labels: np.ndarray) -> "Classes":
        weights = self.balanced_weights(labels[self.is_labelled(labels)]).tolist()
        if is_main_process():
            shown = [f"{name} {weight:.3g}" for name, weight in zip(self.output_names, weights, strict=True)]
            print(f"class weights: {', '.join(shown[:_LISTED])}" + (", ..." if len(shown) > _LISTED else ""))
        return replace(self, class_weights=tuple(weights))

    def _weights_like(self, logits):
        """`class_weights` as a tensor."""
        return None if self.class_weights is None else logits.new_tensor(self.class_weights)


@dataclass(frozen=True)
class Classification(Classes):
    """One class out of several.

    `writes_names`: predictions are written as class names, not as the files write labels.

    Figures: `accuracy`; `mcc`, Matthews' correlation; `f1` of class 1; `macro_f1`, the mean of all classes' F1.
    """

    writes_names: bool = False

    problem_type = "single_label_classification"
    own_figures = ("accuracy", "macro_f1", "mcc")
    own_metric = "accuracy"
    agreement_figure = "accuracy"
    no_label = -100
    one_class = True

    def read(self, text: str, task: str) -> int:
        if text not in self.labels:
            raise ValueError(f"label {text!r} is not one of {task}'s: {', '.join(self.labels)}")
        return list(self.labels).index(text)

    def is_labelled(self, labels: np.ndarray) -> np.ndarray:
        return labels != self.no_label

    def balanced_weights(self, labels: np.ndarray) -> np.ndarray:
        """n / (k n_c) for n rows, n_c of them of class c, and k classes that occur, which makes 1 the mean weight of a
        row; 1 for a class that does not occur."""
        counts = np.bincount(labels, minlength=self.outputs)
        return np.where(counts, len(labels) / (max(1, np.count_nonzero(counts)) * np.maximum(counts, 1)), 1.0)

    @property
    def allowed(self) -> str:
        return f"one of {', '.join(self.labels)}"

    def accepts(self, prediction: str) -> bool:
        return prediction in self.labels

    def described(self, texts: list[str]) -> str:
        return _listed_classes(self.labels, Counter(texts) if texts else None)

    def hard_loss(self, logits, labels):
        """The cross-entropy, times the weight of the row's class where there are `class_weights`."""
        from torch.nn import functional

        labels, weights = labels.view(-1), self._weights_like(logits)
        losses = functional.cross_entropy(logits, labels, weights, ignore_index=self.no_label, reduction="sum")
        return losses / len(labels)

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

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """softmax(z)"""
        from scipy.special import softmax

        return softmax(np.asarray(logits, dtype=np.float64), axis=-1)

    def logits_of_probabilities(self, values: list[float]) -> list[float]:
        """log p; a probability of 0 counts as 10⁻⁸, so that all stays finite."""
        total = sum(_checked_probabilities(values))
        if abs(total - 1) > _NEAR_ONE:
            raise ValueError(f"probabilities sum to {total:g}, not 1")
        return [math.log(max(value / total, _LEAST_PROBABILITY)) for value in values]

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
class MultiLabel(Classes):
    """Each class applies or does not; a text may have several, or none. Labels are 1 and 0, (examples, `outputs`).

    A class applies where its probability σ(z) is above its threshold: `thresholds`, in the order of the classes; None
    is .5 for all. `separator`: between the labels in a file of predictions.

    Figures: `micro_f1`, of all decisions together; `macro_f1`, the mean F1 of the classes that labels or answers have;
    `subset_accuracy`, the share of texts all of whose labels are right; `mean_average_precision`, over the classes that
    occur, which looks at no threshold. Two models agree on a text where they give it just the same labels.
    """

    separator: str = ","
    thresholds: tuple[float, ...] | None = None

    problem_type = "multi_label_classification"
    own_figures = ("micro_f1", "macro_f1", "subset_accuracy", "mean_average_precision")
    own_metric = "micro_f1"
    agreement_figure = "subset_accuracy"

    @property
    def no_label(self) -> list[float]:
        return [math.nan] * self.outputs

    @property
    def settings(self) -> dict[str, list[float]]:
        return {} if self.thresholds is None else {"thresholds": list(self.thresholds)}

    def configured(self, settings: Mapping) -> "MultiLabel":
        found = settings.get("thresholds")
        return replace(self, thresholds=None if found is None else tuple(map(float, found)))

    def fitted(self, logits: np.ndarray, labels: np.ndarray) -> "MultiLabel":
        """Each class with the threshold of the highest F1, halfway between two probabilities; of several as good the
        nearest to .5. A class that does not occur keeps .5."""
        columns = zip(self.probabilities(logits).T, np.asarray(labels).T, strict=True)
        return replace(self, thresholds=tuple(_best_threshold(*column) for column in columns))

    @property
    def use(self) -> str:
        thresholds = self.thresholds or (_EVEN,) * self.outputs
        shown = ", ".join(f"{name} {value:.3g}" for name, value in zip(self.output_names, thresholds, strict=True))
        return (
            "A text may have several labels, or none: with `top_k=None`, those whose score is above their threshold "
            f"(`config.thresholds`, chosen on the dev set for the highest F1 of each): {shown}."
        )

    def read(self, text: tuple[str, ...], task: str) -> list[float]:
        unknown = [label for label in text if label not in self.labels]
        if unknown:
            raise ValueError(f"label {unknown[0]!r} is not one of {task}'s: {', '.join(self.labels)}")
        return [float(label in text) for label in self.labels]

    def is_labelled(self, labels: np.ndarray) -> np.ndarray:
        return ~np.isnan(labels).any(axis=-1)

    def balanced_weights(self, labels: np.ndarray) -> np.ndarray:
        """(n - n_c) / n_c, for n rows, n_c of them with class c; 1 for a class that all have, or none."""
        counts = labels.sum(axis=0)
        others = len(labels) - counts
        return np.where((counts > 0) & (others > 0), others / np.maximum(counts, 1), 1.0)

    @property
    def allowed(self) -> str:
        return f"some of {', '.join(self.output_names)}, with {self.separator!r} between"

    def accepts(self, prediction: str) -> bool:
        return not prediction or set(prediction.split(self.separator)) <= set(self.output_names)

    def described(self, texts: list[tuple[str, ...]]) -> str:
        counts = Counter(label for labels in texts for label in set(labels))
        without = sum(not labels for labels in texts)
        told = f"; {without} of {len(texts)} texts have none" if without else ""
        return f"several labels a text, {_listed_classes(self.labels, counts if texts else None)}{told}"

    def hard_loss(self, logits, labels):
        """Σ -(w_c y_c log σ(z_c) + (1 - y_c) log σ(-z_c)) over the classes; w_c = 1 without `class_weights`."""
        from torch.nn import functional

        labels = labels.to(logits.dtype)
        losses = functional.binary_cross_entropy_with_logits(
            logits, labels.nan_to_num(), pos_weight=self._weights_like(logits), reduction="none"
        )
        return (losses * ~labels.isnan()).sum() / len(labels)

    def soft_loss(self, student_logits, teacher_logits, temperature: float, mean_over_classes: bool = False):
        """T² Σ KL(p^T || p^S) over the classes, of each class's two outcomes, p = σ(z / T); or, with
        `mean_over_classes`, T² times their cross-entropy -Σ (p^T log p^S + (1 - p^T) log(1 - p^S)) divided by the
        number of classes."""
        from torch.nn import functional

        ours, theirs = student_logits / temperature, teacher_logits / temperature
        targets = theirs.sigmoid()
        losses = functional.binary_cross_entropy_with_logits(ours, targets, reduction="none")
        if mean_over_classes:
            return losses.mean() * temperature**2
        least = functional.binary_cross_entropy_with_logits(theirs, targets, reduction="none")
        return (losses - least).sum(dim=-1).mean() * temperature**2

    def unit_of_loss(self, labels: np.ndarray) -> float:
        """1: a nat is a nat."""
        return 1.0

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """σ(z)"""
        from scipy.special import expit

        return expit(np.asarray(logits, dtype=np.float64))

    def logits_of_probabilities(self, values: list[float]) -> list[float]:
        """log(p / (1 - p)); 0 and 1 count as 10⁻⁸ and 1 - 10⁻⁸, so that all stays finite."""
        from scipy.special import logit

        return logit(np.clip(_checked_probabilities(values), _LEAST_PROBABILITY, 1 - _LEAST_PROBABILITY)).tolist()

    def answers(self, logits: np.ndarray) -> np.ndarray:
        """1 where a class applies, else 0."""
        return (self.probabilities(logits) > (_EVEN if self.thresholds is None else self.thresholds)).astype(int)

    def written(self, logits: np.ndarray) -> list[str]:
        names = np.array(self.output_names)
        return [self.separator.join(names[row]) for row in self.answers(logits).astype(bool)]

    def measure(self, figures: Iterable[str], logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        from sklearn import metrics

        labels, answers = np.asarray(labels).astype(int), self.answers(logits)
        occur = np.flatnonzero(labels.any(axis=0))
        ranked = self.probabilities(logits)
        known: dict[str, Callable[[], float]] = {
            "micro_f1": lambda: metrics.f1_score(labels, answers, average="micro", zero_division=0),
            "macro_f1": lambda: np.nan_to_num(metrics.f1_score(labels, answers, average="macro", zero_division=np.nan)),
            "subset_accuracy": lambda: metrics.accuracy_score(labels, answers),
            "mean_average_precision": lambda: np.mean(
                [metrics.average_precision_score(labels[:, c], ranked[:, c]) for c in occur] or [0]
            ),
        }
        return {figure: float(known[figure]()) for figure in figures}

    def divergences(self, logits: np.ndarray, teacher_logits: np.ndarray) -> np.ndarray:
        """Σ KL(teacher || student) over the classes, of each class's two outcomes, p = σ(z), in nats."""
        from scipy.special import expit, log_expit

        ours, theirs = (np.asarray(one, dtype=np.float64) for one in (logits, teacher_logits))
        both = (expit(sign * theirs) * (log_expit(sign * theirs) - log_expit(sign * ours)) for sign in (1, -1))
        return sum(both).sum(axis=-1)

    def constant_figure(self, figure: str, labels: np.ndarray, outputs: int) -> float:
        """Of the m most frequent classes, for every m, and of the most frequent set of labels."""
        labels = np.asarray(labels).astype(int)
        sets, counts = np.unique(labels, axis=0, return_counts=True)
        ranks = np.argsort(np.argsort(-labels.sum(axis=0), kind="stable"))
        constants = [*(ranks < m for m in range(outputs + 1)), sets[counts.argmax()]]
        kind = replace(self, thresholds=None)
        logits = (np.tile(np.where(constant, 1.0, -1.0), (len(labels), 1)) for constant in constants)
        return max(kind.measure([figure], constant, labels)[figure] for constant in logits)

    def could_be(self, logits: np.ndarray, labels: np.ndarray) -> bool:
        return logits.shape == labels.shape and bool(np.isin(labels, (0, 1)).all())


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
        if value is not None and abs(value) > LARGEST_SCORE:
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

    def is_labelled(self, labels: np.ndarray) -> np.ndarray:
        return ~np.isnan(labels)

    def weighted(self, labels: np.ndarray) -> "Regression":
        raise InputError("--class_weights balanced: weighs classes, and these labels are scores; leave it out")

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

    @property
    def probability_columns(self) -> list[str]:
        return ["predicted_score"]

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """The scores: what a model says has no other form."""
        return np.asarray(logits, dtype=np.float64).reshape(-1, 1)

    def logits_of_probabilities(self, values: list[float]) -> list[float]:
        """The scores themselves."""
        return values

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


def of_teacher(arrays: Mapping) -> dict:
    """The teacher's part of what a run keeps of a set: `teacher_logits` and so on, without `teacher_`."""
    return {name.removeprefix("teacher_"): array for name, array in arrays.items() if name.startswith("teacher_")}


def _listed_classes(labels: dict[str, str], counts: Counter | None) -> str:
    """3 classes: 0 = bad (7), 1 = good (4), ..."""
    shown = ", ".join(
        (label if label == name else f"{label} = {name}") + ("" if counts is None else f" ({counts[label]})")
        for label, name in list(labels.items())[:_LISTED]
    )
    return f"{len(labels)} classes: {shown}" + (", ..." if len(labels) > _LISTED else "")


def _best_threshold(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Of one class, as `MultiLabel.fitted` says."""
    from sklearn.metrics import precision_recall_curve

    if not labels.any():
        return _EVEN
    precision, recall, cuts = precision_recall_curve(labels, probabilities)
    f1 = (2 * precision * recall / np.maximum(precision + recall, np.finfo(float).tiny))[:-1]
    halfway = (cuts + np.concatenate([[0.0], cuts[:-1]])) / 2
    return float(min(halfway[np.isclose(f1, f1.max())], key=lambda threshold: abs(threshold - _EVEN)))


def _does_not_fit(names: list[str], what: str, task: str, wanted: str) -> InputError:
    return InputError(f"{what}: its {len(names)} labels ({', '.join(names)}) do not fit {task} ({wanted})")


def _checked_probabilities(values: list[float]) -> list[float]:
    wrong = [value for value in values if not 0 <= value <= 1 + _NEAR_ONE]
    if wrong:
        raise ValueError(f"{wrong[0]:g} is no probability, which is from 0 to 1")
    return values


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
