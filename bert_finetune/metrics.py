"""GLUE's metrics, from scikit-learn and scipy."""

from functools import partial

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from bert_finetune.errors import InputError
from bert_finetune.glue import Task


def predictions_from_logits(task: Task, logits: np.ndarray) -> np.ndarray:
    """Class ids (argmax of (n, classes) logits), or the regression values (n,)."""
    logits = np.asarray(logits, dtype=np.float64)
    return logits.reshape(-1) if task.is_regression else logits.argmax(axis=-1)


def compute_metrics(task: Task, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The task's dev figures (`task.figures`), each in -1..1 or 0..1.

    Classification: `accuracy`; `mcc`, Matthews' correlation; `f1` of class 1; `macro_f1`, the mean of all classes' F1.
    Regression: `pearson`, `spearman` and `corr`, their mean; a constant prediction has no correlation and counts as 0.
    """
    predictions = predictions_from_logits(task, logits)
    if task.is_regression:
        pearson, spearman = (_correlation(kind, predictions, labels) for kind in (pearsonr, spearmanr))
        return {"pearson": pearson, "spearman": spearman, "corr": (pearson + spearman) / 2}
    return {name: float(_CLASSIFICATION[name](labels, predictions)) for name in task.figures}


_CLASSIFICATION = {
    "accuracy": accuracy_score,
    "mcc": matthews_corrcoef,
    "f1": partial(f1_score, zero_division=0),
    "macro_f1": partial(f1_score, average="macro", zero_division=0),
}


def _correlation(kind, predictions: np.ndarray, labels: np.ndarray) -> float:
    if len(labels) < 2 or np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0
    return float(kind(predictions, labels).statistic)


def check_metric(task: Task, metric: str | None) -> None:
    """Raise InputError for a `--metric_for_best_model` that the task's evaluation does not give."""
    figures = ("loss", *task.figures)
    if metric not in (None, *figures):
        raise InputError(f"--metric_for_best_model {metric}: {task.name} has {', '.join(figures)}")


def chance_level(task: Task, labels: np.ndarray) -> float:
    """What `task.metric` gives for the best constant answer: the figure that a model which learnt nothing reaches."""
    if task.is_regression or task.metric == "mcc":
        return 0.0
    constant = [np.eye(task.num_labels)[[k] * len(labels)] for k in range(task.num_labels)]
    return max(compute_metrics(task, logits, labels)[task.metric] for logits in constant)
