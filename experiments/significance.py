"""Whether one method is better than another, or equal: means over seeds, paired bootstrap over dev examples, paired
t-tests, corrected for their number.

scipy is imported where it is used: `--help` asks for no more than RESAMPLES and MARGIN.
"""

import warnings
from collections.abc import Callable, Iterator

import numpy as np

from bert_finetune.glue import Task

RESAMPLES = 2000
# Points within which two methods are called equal.
MARGIN = 0.5
# Every method of a task, and every call, sees the same resampled examples.
_SEED = 0
# Numbers held at once, per array: 2 MB, which stay in a core's cache.
_CHUNK = 250_000

Measure = Callable[[np.ndarray], np.ndarray]
"""How often each example is drawn, (resamples, examples) -> the figure of each resample."""


def mean_and_sd(values: list[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation, sqrt(Σ (x - mean)² / (n - 1)); None for a single value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def seeds_p_value(values: list[float], baseline: list[float]) -> float | None:
    """Two-sided p of the paired t-test (scipy.stats.ttest_rel), value k of both from the same seed.

    None with fewer than two seeds, and where the seeds' differences are all the same, which leaves t without a scale.
    """
    from scipy.stats import ttest_rel

    if not _has_scale(np.subtract(values, baseline)):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of differences that are nearly the same
        return float(ttest_rel(values, baseline).pvalue)


def equality_p_values(values: list[float], baseline: list[float], margin: float) -> tuple[float, float] | None:
    """p of "they differ by less than `margin`" and of "they differ by more", value k of both from the same seed.

    With the mean m of the n differences, their standard error s, and t of n - 1 degrees of freedom:

        less: max(P(t > (m + margin) / s), P(t < (m - margin) / s)), which are two one-sided paired t-tests
        more: 2 min(P(t < (m + margin) / s), P(t > (m - margin) / s)), at most 1; for margin 0 `seeds_p_value`

    None where that is None. Source: Schuirmann, Journal of Pharmacokinetics and Biopharmaceutics 15, 1987.
    """
    from scipy.stats import t

    differences = np.subtract(values, baseline)
    if not _has_scale(differences):
        return None
    count, mean, error = len(differences), differences.mean(), differences.std(ddof=1) / len(differences) ** 0.5
    above, below = (mean + margin) / error, (mean - margin) / error
    less = max(t.sf(above, count - 1), t.cdf(below, count - 1))
    more = 2 * min(t.cdf(above, count - 1), t.sf(below, count - 1))
    return float(less), min(1.0, float(more))


def _has_scale(differences: np.ndarray) -> bool:
    """Whether t can be had from the seeds' differences: there are two or more, and not all the same."""
    return len(differences) > 1 and np.ptp(differences) >= 1e-12


def holm(p_values: list[float | None]) -> list[float | None]:
    """The p-values of m tests, corrected: where nothing differs, one of them is below .05 in at most 5 % of tables.

    The k-th smallest is multiplied by m - k + 1, is at least what a smaller one became, and at most 1. None is no test:
    it stays, and does not count. Source: Holm, Scandinavian Journal of Statistics 6, 1979.
    """
    tests = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    corrected, least = list(p_values), 0.0
    for k, (p, place) in enumerate(tests):
        least = max(least, min(1.0, (len(tests) - k) * p))
        corrected[place] = least
    return corrected


def bootstrap_interval(figures: np.ndarray, baseline: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of mean over seeds of (figure - baseline), over the resamples of both (seeds, resamples).

    Source: Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13; paired, as in Koehn, Statistical
    Significance Tests for Machine Translation Evaluation, EMNLP 2004.
    """
    low, high = np.quantile((figures - baseline).mean(axis=0), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def resampled_figures(measures: list[Measure], examples: int, resamples: int = RESAMPLES) -> np.ndarray:
    """A figure of each run on each resample of the examples: (runs, resamples); `measures`: each run's.

    A resample draws as many examples as there are, with replacement; all runs get the same ones.
    """
    return np.hstack([[measure(weights) for measure in measures] for weights in _resamples(examples, resamples)])


def _resamples(examples: int, resamples: int) -> Iterator[np.ndarray]:
    """How often each example is drawn, (some resamples, examples) at a time."""
    generator = np.random.default_rng(_SEED)
    rows = max(1, _CHUNK // examples)
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        drawn = generator.integers(examples, size=(count, examples)) + examples * np.arange(count)[:, None]
        yield np.bincount(drawn.ravel(), minlength=count * examples).reshape(count, examples).astype(float)


def mean_of(values: np.ndarray) -> Measure:
    """The mean of what was measured of each example, (examples,)."""
    return lambda weights: weights @ values / weights.sum(axis=1)


def measure_of(task: Task, logits: np.ndarray, labels: np.ndarray) -> Measure:
    """`task.metric`, as `Task.measure` has it."""
    answers = task.kind.answers(logits)
    for figures, make, axes in ((_OF_CONFUSION, _counts, 1), (_OF_RANKS, _correlations, 1), (_OF_SETS, _of_sets, 2)):
        if task.metric in figures and answers.ndim == axes:
            return make(task.metric, answers, labels)
    if task.metric == "mean_average_precision":
        return _mean_average_precision(logits, labels)
    return _measured_anew(task, logits, labels)


def _measured_anew(task: Task, logits: np.ndarray, labels: np.ndarray) -> Measure:
    """Any figure, slowly: measured for each resample by itself."""

    def measure(weights: np.ndarray) -> np.ndarray:
        drawn = [np.repeat(np.arange(len(labels)), counts.astype(int)) for counts in weights]
        return np.array([task.measure(logits[rows], labels[rows])[task.metric] for rows in drawn])

    return measure


def _counts(metric: str, predictions: np.ndarray, labels: np.ndarray) -> Measure:
    """A figure that the confusion matrix determines."""
    from scipy.sparse import csr_array

    labels = labels.astype(int)
    classes = 1 + max(labels.max(), predictions.max(), 1)
    # Sparse: an example is in one of the classes² cells.
    places = np.arange(len(labels)), labels * classes + predictions
    cells = csr_array((np.ones(len(labels)), places), shape=(len(labels), classes * classes))
    figure = _OF_CONFUSION[metric]
    return lambda weights: figure((weights @ cells).reshape(-1, classes, classes))


def _accuracy(confusion: np.ndarray) -> np.ndarray:
    return np.trace(confusion, axis1=1, axis2=2) / confusion.sum(axis=(1, 2))


def _class_f1(confusion: np.ndarray) -> np.ndarray:
    """2 TP / (2 TP + FP + FN) of each class; NaN for one that is neither in the labels nor predicted."""
    with np.errstate(invalid="ignore"):
        return 2 * np.diagonal(confusion, axis1=1, axis2=2) / (confusion.sum(axis=1) + confusion.sum(axis=2))


def _mcc(confusion: np.ndarray) -> np.ndarray:
    """Gorodkin's R_K, which is Matthews' correlation for two classes; 0 where labels or predictions are constant."""
    count, right = confusion.sum(axis=(1, 2)), np.trace(confusion, axis1=1, axis2=2)
    true, predicted = confusion.sum(axis=2), confusion.sum(axis=1)
    covariance = right * count - (true * predicted).sum(axis=1)
    scale = (count**2 - (true**2).sum(axis=1)) * (count**2 - (predicted**2).sum(axis=1))
    return _over_scale(covariance, scale)


_OF_CONFUSION = {
    "accuracy": _accuracy,
    "f1": lambda confusion: np.nan_to_num(_class_f1(confusion)[:, 1]),
    "macro_f1": lambda confusion: np.nanmean(_class_f1(confusion), axis=1),
    "mcc": _mcc,
}


def _of_sets(metric: str, predictions: np.ndarray, labels: np.ndarray) -> Measure:
    """A figure of several labels a text (examples, classes): of how often a class is in both sets of labels, how often
    in the two together, and of how many texts the sets are the same."""
    both, each = predictions * labels, predictions + labels
    same = (predictions == labels).all(axis=1).astype(float)
    return lambda weights: _OF_SETS[metric](weights @ both, weights @ each, weights @ same / weights.sum(axis=1))


def _f1_of_sets(both: np.ndarray, each: np.ndarray) -> np.ndarray:
    """2 TP / (2 TP + FP + FN); NaN where there is nothing."""
    with np.errstate(invalid="ignore"):
        return 2 * both / each


def _macro_f1_of_sets(both: np.ndarray, each: np.ndarray) -> np.ndarray:
    """The mean over the classes that are there; 0 where none is."""
    f1 = _f1_of_sets(both, each)
    return np.nansum(f1, axis=1) / np.maximum(1, np.count_nonzero(each, axis=1))


_OF_SETS = {
    "micro_f1": lambda both, each, same: np.nan_to_num(_f1_of_sets(both.sum(axis=1), each.sum(axis=1))),
    "macro_f1": lambda both, each, same: _macro_f1_of_sets(both, each),
    "subset_accuracy": lambda both, each, same: same,
}


def _mean_average_precision(logits: np.ndarray, labels: np.ndarray) -> Measure:
    """The mean over the classes that occur."""
    classes = [_average_precision(*column) for column in zip(logits.T, labels.T, strict=True)]

    def measure(weights: np.ndarray) -> np.ndarray:
        found = np.stack([each(weights) for each in classes])
        return np.nansum(found, axis=0) / np.maximum(1, np.count_nonzero(~np.isnan(found), axis=0))

    return measure


def _average_precision(scores: np.ndarray, labels: np.ndarray) -> Measure:
    """Σ (R_k - R_{k-1}) P_k over a class's different scores from the highest on, with the precision and recall of
    those from there up; NaN for a class that does not occur."""
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)  # of equal scores

    def measure(weights: np.ndarray) -> np.ndarray:
        weights = weights[:, order]
        right, chosen = (np.cumsum(each, axis=1)[:, last] for each in (weights * labels[order], weights))
        gained = np.diff(right, axis=1, prepend=0)
        with np.errstate(invalid="ignore"):
            return (gained * right / np.maximum(chosen, 1)).sum(axis=1) / right[:, -1]

    return measure


def _correlations(metric: str, predictions: np.ndarray, labels: np.ndarray) -> Measure:
    """Pearson's and Spearman's correlation, or their mean."""
    kinds = [kind(predictions, labels) for kind in _OF_RANKS[metric]]
    return lambda weights: np.mean([kind(weights) for kind in kinds], axis=0)


def _pearson(x: np.ndarray, y: np.ndarray) -> Measure:
    x, y = x - x.mean(), y - y.mean()
    moments = np.stack([x, y, x * y, x * x, y * y], axis=1)

    def pearson(weights: np.ndarray) -> np.ndarray:
        mx, my, xy, xx, yy = (weights @ moments).T / weights.sum(axis=1)
        return _over_scale(xy - mx * my, (xx - mx**2) * (yy - my**2))

    return pearson


def _spearman(x: np.ndarray, y: np.ndarray) -> Measure:
    ranks = _ranks(x), _ranks(y)

    def spearman(weights: np.ndarray) -> np.ndarray:
        x, y = (rank(weights) for rank in ranks)
        xy, xx, yy = (np.einsum("ij,ij,ij->i", weights, *pair) for pair in ((x, y), (x, x), (y, y)))
        return _over_scale(xy, xx * yy)

    return spearman


_OF_RANKS = {"pearson": (_pearson,), "spearman": (_spearman,), "corr": (_pearson, _spearman)}


def _ranks(values: np.ndarray) -> Measure:
    """Weights -> the rank of each example among the drawn ones less their mean, ties as in `scipy.stats.rankdata`."""
    _, group = np.unique(values, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(group.max() + 1))

    def ranks(weights: np.ndarray) -> np.ndarray:
        sizes = np.add.reduceat(weights[:, order], starts, axis=1)
        after = np.cumsum(sizes, axis=1)
        return (after - (sizes + after[:, -1:]) / 2)[:, group]

    return ranks


def _over_scale(covariance: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Covariance / √scale; 0 where one side is constant."""
    return covariance / np.sqrt(np.where(scale > 1e-20, scale, np.inf))
