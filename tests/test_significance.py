from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import norm, ttest_rel

from bert_finetune.glue import REGRESSION_FIGURES, TASKS, Task
from bert_finetune.metrics import compute_metrics
from experiments.significance import bootstrap_interval, mean_and_sd, resampled_figures, seeds_p_value


def test_mean_and_sd_by_hand():
    assert mean_and_sd([80.0, 82.0, 87.0]) == (83.0, pytest.approx(13**0.5))  # (9 + 1 + 16) / 2
    assert mean_and_sd([80.0]) == (80.0, None)


def classes(count, metric):
    return Task("custom", (), {str(k): str(k) for k in range(count)}, metric, figures=("accuracy", "macro_f1", "mcc"))


SCORES = Task("custom", (), {}, figures=REGRESSION_FIGURES)


@pytest.mark.parametrize(
    "task",
    [TASKS["RTE"], TASKS["MRPC"], TASKS["CoLA"], TASKS["STS-B"], TASKS["MNLI"]]
    + [classes(5, metric) for metric in ("accuracy", "macro_f1", "mcc")]
    + [replace(SCORES, metric=metric) for metric in REGRESSION_FIGURES],
    ids=lambda task: f"{task.name} {task.metric}",
)
def test_resamples_are_measured_as_compute_metrics_does(task):
    """Against a plain loop over the same resamples, with ties, and so few examples that some are constant."""
    rng = np.random.default_rng(0)
    for examples in (4, 40):
        logits = [rng.normal(size=(examples, task.num_labels)).round(1) for _ in range(3)]
        labels = rng.integers(task.num_labels, size=examples) if task.labels else rng.integers(4, size=examples) / 2
        found = resampled_figures(task, logits, labels, 120)
        assert found.shape == (3, 120)
        drawn = np.random.default_rng(0).integers(examples, size=(120, examples))
        looped = [[compute_metrics(task, run[k], labels[k])[task.metric] for k in drawn] for run in logits]
        np.testing.assert_allclose(found, looped, atol=1e-12)


def test_the_interval_of_an_accuracy_is_the_analytic_one():
    """The mean of paired differences d of -1, 0, 1 has the standard error sd(d) / √n."""
    rng = np.random.default_rng(3)
    labels = rng.integers(2, size=2000)
    right = rng.random((2, 2000)) < [[0.82], [0.8]]
    logits = [np.eye(2)[np.where(run, labels, 1 - labels)] for run in right]
    figures = resampled_figures(TASKS["RTE"], logits, labels, 6000)
    difference = right[0].astype(float) - right[1]
    error = difference.std(ddof=1) / 2000**0.5
    expected = norm.interval(0.95, difference.mean(), error)
    assert bootstrap_interval(figures[:1], figures[1:]) == pytest.approx(expected, abs=0.1 * error)


def test_seeds_are_averaged_before_the_interval():
    figures = np.array([[0.2, 0.4, 0.6], [0.4, 0.4, 0.4]])
    assert bootstrap_interval(figures, np.zeros((2, 3)), level=0.5) == pytest.approx((0.35, 0.45))


def test_a_method_against_itself_is_level():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(50, 2))
    figures = resampled_figures(TASKS["CoLA"], [logits, logits], rng.integers(2, size=50))
    assert bootstrap_interval(figures[:1], figures[1:]) == (0, 0)


def test_p_over_seeds():
    ours, theirs = [80.0, 82.0, 81.0], [79.0, 80.5, 80.0]
    differences = np.subtract(ours, theirs)
    t = differences.mean() / (differences.std(ddof=1) / 3**0.5)
    assert seeds_p_value(ours, theirs) == pytest.approx(ttest_rel(ours, theirs).pvalue)
    assert t == pytest.approx(7, abs=0.01) and seeds_p_value(ours, theirs) == pytest.approx(0.0198, abs=1e-3)
    assert seeds_p_value([80.0], [79.0]) is None
    assert seeds_p_value([80.0, 81.0], [79.0, 80.0]) is None  # always 1: t has no scale
