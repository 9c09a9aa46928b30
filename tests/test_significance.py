import numpy as np
import pytest
from scipy.stats import norm, ttest_rel

from bert_finetune.glue import TASKS, Task
from bert_finetune.task_kinds import Classification, MultiLabel, Regression
from experiments.significance import (
    _measured_anew,
    bootstrap_interval,
    equality_p_values,
    holm,
    mean_and_sd,
    measure_of,
    resampled_figures,
    seeds_p_value,
)


def test_mean_and_sd_by_hand():
    assert mean_and_sd([80.0, 82.0, 87.0]) == (83.0, pytest.approx(13**0.5))  # (9 + 1 + 16) / 2
    assert mean_and_sd([80.0]) == (80.0, None)


def classes(count, metric):
    kind = Classification({str(k): str(k) for k in range(count)})
    return Task("custom", (), kind, metric, figures=kind.own_figures)


def scores(metric):
    return Task("custom", (), Regression(), metric, figures=Regression.own_figures)


def sets_of_labels(metric):
    kind = MultiLabel({name: name for name in "abc"})
    return Task("custom", (), kind, metric, figures=kind.own_figures)


TASKS_OF_ALL_METRICS = (
    [TASKS[name] for name in ("RTE", "MRPC", "CoLA", "STS-B", "MNLI")]
    + [classes(5, metric) for metric in Classification.own_figures]
    + [scores(metric) for metric in Regression.own_figures]
)


def made_up(task, examples, rng, runs=3):
    """Logits of some runs, with ties, and labels; of few examples some resamples are constant."""
    logits = [rng.normal(size=(examples, task.kind.outputs)).round(1) for _ in range(runs)]
    if isinstance(task.kind, Regression):
        return logits, rng.integers(4, size=examples) / 2
    if isinstance(task.kind, MultiLabel):
        return logits, (rng.random((examples, 3)) < (0.5, 0.2, 0.1)).astype(float)
    return logits, rng.integers(task.kind.outputs, size=examples)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS_OF_ALL_METRICS, ids=lambda task: f"{task.name} {task.metric}")
def test_resamples_are_measured_as_the_task_does(task):
    """Against a plain loop over the same resamples."""
    rng = np.random.default_rng(0)
    for examples in (4, 40):
        logits, labels = made_up(task, examples, rng)
        found = resampled_figures([measure_of(task, run, labels) for run in logits], examples, 120)
        assert found.shape == (3, 120)
        drawn = np.random.default_rng(0).integers(examples, size=(120, examples))
        looped = [[task.measure(run[k], labels[k])[task.metric] for k in drawn] for run in logits]
        np.testing.assert_allclose(found, looped, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    "task",
    [*TASKS_OF_ALL_METRICS, *map(sets_of_labels, MultiLabel.own_figures)],
    ids=lambda task: f"{task.name} {task.metric}",
)
def test_the_slow_way_for_any_figure_equals_the_fast_ones(task):
    """It calls the task itself, which knows nothing of weights."""
    rng = np.random.default_rng(1)
    for examples in (4, 40):
        (logits,), labels = made_up(task, examples, rng, runs=1)
        weights = rng.multinomial(examples, np.full(examples, 1 / examples), size=50).astype(float)
        slow, fast = _measured_anew(task, logits, labels)(weights), measure_of(task, logits, labels)(weights)
        np.testing.assert_allclose(slow, fast, atol=1e-12)


def test_figures_of_a_kind_that_is_not_known_here():
    """Several labels for an example, by exact match: neither a confusion matrix nor ranks."""

    class SeveralLabels(Classification):
        def answers(self, logits):
            return logits > 0

        def measure(self, figures, logits, labels):
            return {"accuracy": (self.answers(logits) == labels).all(axis=1).mean()}

    rng = np.random.default_rng(2)
    task = Task("custom", (), SeveralLabels({name: name for name in "abc"}), "accuracy")
    logits, labels = rng.normal(size=(30, 3)), rng.integers(2, size=(30, 3))
    (found,) = resampled_figures([measure_of(task, logits, labels)], 30, 40)
    drawn = np.random.default_rng(0).integers(30, size=(40, 30))
    right = ((logits > 0) == labels).all(axis=1)
    np.testing.assert_allclose(found, right[drawn].mean(axis=1))


def test_the_interval_of_an_accuracy_is_the_analytic_one():
    """The mean of paired differences d of -1, 0, 1 has the standard error sd(d) / √n."""
    rng = np.random.default_rng(3)
    labels = rng.integers(2, size=2000)
    right = rng.random((2, 2000)) < [[0.82], [0.8]]
    logits = [np.eye(2)[np.where(run, labels, 1 - labels)] for run in right]
    figures = resampled_figures([measure_of(TASKS["RTE"], run, labels) for run in logits], 2000, 6000)
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
    figures = resampled_figures([measure_of(TASKS["CoLA"], logits, rng.integers(2, size=50))] * 2, 50)
    assert bootstrap_interval(figures[:1], figures[1:]) == (0, 0)


def test_p_over_seeds():
    ours, theirs = [80.0, 82.0, 81.0], [79.0, 80.5, 80.0]
    differences = np.subtract(ours, theirs)
    t = differences.mean() / (differences.std(ddof=1) / 3**0.5)
    assert seeds_p_value(ours, theirs) == pytest.approx(ttest_rel(ours, theirs).pvalue)
    assert t == pytest.approx(7, abs=0.01) and seeds_p_value(ours, theirs) == pytest.approx(0.0198, abs=1e-3)
    assert seeds_p_value([80.0], [79.0]) is None
    assert seeds_p_value([80.0, 81.0], [79.0, 80.0]) is None  # always 1: t has no scale


def tail(x):
    """P(t > x) of t with 2 degrees of freedom."""
    return 0.5 - x / (2 * (2 + x * x) ** 0.5)


def test_equality_by_hand():
    # Differences 1, 1.5, 1: mean 7/6, standard error 1/6. Within .5 they are not: t is 10 and 4.
    less, more = equality_p_values([80.0, 82.0, 81.0], [79.0, 80.5, 80.0], 0.5)
    assert (less, more) == pytest.approx((1 - tail(4), 2 * tail(4))) and more == pytest.approx(0.0572, abs=1e-4)
    # Within 1.5 they may well be: t is 16 and -2.
    less, more = equality_p_values([80.0, 82.0, 81.0], [79.0, 80.5, 80.0], 1.5)
    assert (less, more) == pytest.approx((tail(2), 1)) and less == pytest.approx(0.0918, abs=1e-4)
    # Differences .1, 0, -.1: standard error .1 / √3.
    less, more = equality_p_values([80.1, 82.0, 80.9], [80.0, 82.0, 81.0], 0.5)
    assert (less, more) == pytest.approx((tail(5 * 3**0.5), 1))
    assert equality_p_values([80.0], [79.0], 0.5) is None
    assert equality_p_values([80.0, 81.0], [79.0, 80.0], 0.5) is None


def test_equality_is_two_one_sided_tests():
    """As scipy has them; and against a margin of 0 only "differ by more" is left, which is the paired t-test."""
    ours, theirs = np.random.default_rng(4).normal(size=(2, 6))
    one_sided = [
        ttest_rel(ours + 0.4, theirs, alternative="greater"),
        ttest_rel(ours - 0.4, theirs, alternative="less"),
    ]
    less, _ = equality_p_values(ours, theirs, 0.4)
    assert less == pytest.approx(max(test.pvalue for test in one_sided))
    _, more = equality_p_values(ours, theirs, 0)
    assert more == pytest.approx(seeds_p_value(ours, theirs))


@pytest.mark.parametrize(
    ("p_values", "corrected"),
    [
        # R: p.adjust(p, "holm")
        ([0.01, 0.02, 0.03, 0.04, 0.05], [0.05, 0.08, 0.09, 0.09, 0.09]),
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        ([0.5, None, 0.04, 0.9], [1, None, 0.12, 1]),
        ([0.02, 0.02], [0.04, 0.04]),
        ([0.03], [0.03]),
        ([None], [None]),
        ([], []),
    ],
)
def test_holm(p_values, corrected):
    assert holm(p_values) == [p and pytest.approx(p) for p in corrected]


def test_holm_keeps_its_promise():
    """Of 2000 tables of 8 methods that do not differ, no more than 5 % have a corrected p below .05."""
    p_values = np.random.default_rng(5).random((2000, 8))
    found = np.mean([min(holm(list(table))) < 0.05 for table in p_values])
    assert found == pytest.approx(1 - (1 - 0.05 / 8) ** 8, abs=0.01) and found < 0.06
