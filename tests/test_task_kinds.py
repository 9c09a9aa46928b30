"""All kinds of task, method by method, against values worked out by hand."""

import math

import numpy as np
import pytest
import torch
from scipy.special import expit, logit
from sklearn import metrics

from bert_finetune.errors import InputError
from bert_finetune.glue import TASKS, get_task
from bert_finetune.submission import as_file
from bert_finetune.task_kinds import Classification, MultiLabel, Regression, of_teacher

MOODS = Classification({"0": "bad", "1": "good"})
THREE = Classification({"c": "contradiction", "e": "not-really", "n": "neutral"})
MANY = Classification({f"{k}": f"class {k}" for k in range(25)})
TAGS = MultiLabel({"f": "funny", "s": "sad", "g": "good"})
STARS = Regression(0, 5)
FREE = Regression()
LOG3 = math.log(3)  # softmax of (0, ln 3) is (1/4, 3/4)


def logits_for(classes, count=2):
    return np.eye(count)[classes]


# The model's head


def test_the_outputs_of_a_model():
    assert (MOODS.output_names, MOODS.outputs, MOODS.wanted) == (["bad", "good"], 2, "bad, good")
    assert MOODS.subject == "bad, good"
    assert MANY.subject == ", ".join(f"class {k}" for k in range(8)) + ", ..."
    assert (STARS.output_names, STARS.outputs) == (["score"], 1)
    assert (STARS.subject, STARS.wanted) == ("a score", "one regression score")
    assert (MOODS.problem_type, STARS.problem_type) == ("single_label_classification", "regression")


@pytest.mark.parametrize(
    ("kind", "names", "order"),
    [
        (MOODS, ["bad", "good"], [0, 1]),
        (MOODS, ["good", "bad"], [1, 0]),
        (MOODS, ["GOOD", "Bad"], [1, 0]),
        (MOODS, ["1", "0"], [1, 0]),
        (MOODS, ["LABEL_0", "LABEL_1"], [0, 1]),
        (THREE, ["neutral", "Contradiction", "not really"], [1, 2, 0]),
        (THREE, ["NOT_REALLY", "n", "c"], [2, 0, 1]),
        (STARS, ["LABEL_0"], [0]),
    ],
    ids=[
        "same",
        "turned round",
        "in capitals",
        "as files write them",
        "unnamed",
        "spelt otherwise",
        "mixed",
        "a score",
    ],
)
@pytest.mark.parametrize("fine_tuned", [True, False], ids=["fine-tuned", "pre-trained"])
def test_outputs_are_matched_by_name(kind, names, order, fine_tuned, capsys):
    assert kind.output_order(names, "--teacher_model t", "X", fine_tuned) == order
    assert capsys.readouterr().out == ""


def test_unnamed_outputs_of_three_are_said_aloud(capsys):
    names = ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert THREE.output_order(names, "--teacher_model t", "X", fine_tuned=False) == [0, 1, 2]
    assert capsys.readouterr().out == ""
    assert THREE.output_order(names, "--teacher_model t", "X", fine_tuned=True) == [0, 1, 2]
    assert capsys.readouterr().out == (
        "--teacher_model t: its classes have no names; they are taken to be in the order contradiction, not-really, "
        "neutral\n"
    )


@pytest.mark.parametrize(
    ("kind", "names", "message"),
    [
        (MOODS, ["bad", "fair", "good"], "t: its 3 labels (bad, fair, good) do not fit X (bad, good)"),
        (MOODS, ["bad", "fair"], "t: its labels (bad, fair) are not X's (bad, good); if they mean the same, say"),
        (MOODS, ["bad", "bad"], "t: its labels (bad, bad) are not X's (bad, good)"),
        (STARS, ["bad", "good"], "t: its 2 labels (bad, good) do not fit X (one regression score)"),
    ],
    ids=["too many", "another name", "a name twice", "classes for a score"],
)
def test_outputs_that_do_not_fit(kind, names, message):
    with pytest.raises(InputError) as error:
        kind.output_order(names, "t", "X", fine_tuned=True)
    assert message in str(error.value)
    assert kind.output_order(names, "t", "X", fine_tuned=False) == list(range(kind.outputs))


# Labels in files


def test_labels_are_read():
    assert [MOODS.read(text, "X") for text in ("1", "0")] == [1, 0]
    assert THREE.read("n", "X") == 2
    assert [STARS.read(text, "X") for text in ("2.5", "0", "5.000", "1e-3")] == [2.5, 0, 5, 0.001]
    assert [FREE.read(text, "X") for text in ("-7", "1e6")] == [-7, 1e6]


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (MOODS, "good", "label 'good' is not one of X's: 0, 1"),
        (MOODS, "", "label '' is not one of X's: 0, 1"),
        (STARS, "5.1", "'5.1' is not a score between 0 and 5"),
        (STARS, "-0.1", "'-0.1' is not a score between 0 and 5"),
        (STARS, "nan", "'nan' is not a score between 0 and 5"),
        (FREE, "many", "'many' is not a number"),
        (FREE, "inf", "'inf' is not a number"),
    ],
    ids=["a class's name", "nothing", "too high", "too low", "no number", "a word", "infinite"],
)
def test_labels_that_cannot_be_read(kind, text, message):
    with pytest.raises(ValueError) as error:
        kind.read(text, "X")
    assert str(error.value) == message
    assert not kind.accepts(text)


def test_predictions_in_a_file():
    assert (MOODS.allowed, STARS.allowed) == ("one of 0, 1", "a number from 0 to 5")
    assert all(MOODS.accepts(text) for text in ("0", "1")) and not MOODS.accepts("bad")
    assert all(STARS.accepts(text) for text in ("0", "4.999", "5", "1e-3")) and not STARS.accepts("5.001")


def test_labels_are_described():
    assert MOODS.described(["1", "0", "1"]) == "2 classes: 0 = bad (1), 1 = good (2)"
    assert MOODS.described([]) == "2 classes: 0 = bad, 1 = good"
    assert Classification({"yes": "yes", "no": "no"}).described(["no"]) == "2 classes: yes (0), no (1)"
    assert MANY.described([]) == "25 classes: " + ", ".join(f"{k} = class {k}" for k in range(20)) + ", ..."
    assert STARS.described(["2", "x", "0.5", "4.25"]) == "a score to predict, from 0.5 to 4.25"
    assert STARS.described([]) == "a score to predict"


# Losses


def test_losses_of_classes():
    logits = torch.tensor([[0.0, LOG3], [0.0, 0.0]])
    expected = (math.log(4 / 3) + math.log(2)) / 2
    assert MOODS.hard_loss(logits, torch.tensor([[1], [0]])).item() == pytest.approx(expected)
    one, other = logits[:1], logits[:1].flip(1)  # probabilities 1/4, 3/4 and 3/4, 1/4
    divergence = 3 / 4 * math.log(3) + 1 / 4 * math.log(1 / 3)
    assert MOODS.soft_loss(one, other, 1.0).item() == pytest.approx(divergence)
    assert MOODS.soft_loss(2 * one, 2 * other, 2.0).item() == pytest.approx(4 * divergence)
    assert MOODS.soft_loss(one, one, 1.0).item() == pytest.approx(0, abs=1e-7)
    entropy = -(3 / 4 * math.log(1 / 4) + 1 / 4 * math.log(3 / 4)) / 2  # divided by two classes
    assert MOODS.soft_loss(one, other, 1.0, mean_over_classes=True).item() == pytest.approx(entropy)
    assert MOODS.unit_of_loss(np.array([0, 1, 1])) == 1


def test_losses_of_a_score():
    scores, others = torch.tensor([[1.0], [4.0]]), torch.tensor([[2.0], [1.0]])
    assert STARS.hard_loss(scores, torch.tensor([2, 1])).item() == pytest.approx((1 + 9) / 2)
    assert STARS.soft_loss(scores, others, 1.0).item() == pytest.approx((1 + 9) / 2)
    assert STARS.soft_loss(scores, others, 7.0).item() == pytest.approx((1 + 9) / 2)
    assert STARS.unit_of_loss(np.array([1.0, 2.0, 3.0])) == pytest.approx(2 / 3)
    assert STARS.unit_of_loss(np.array([4.0, 4.0])) == 1


# Answers


def test_answers():
    assert MOODS.answers(np.array([[0.5, 0.25], [-1.0, 3.0]])).tolist() == [0, 1]
    assert STARS.answers(np.array([[0.5], [-1.0]])).tolist() == [0.5, -1.0]


def test_answers_as_they_are_written():
    logits = logits_for([2, 0], 3)
    assert THREE.written(logits) == ["n", "c"]
    assert Classification(THREE.labels, writes_names=True).written(logits) == ["neutral", "contradiction"]
    assert STARS.written(np.array([[-0.2], [1 / 3], [7.0]])) == ["0", "0.333333", "5"]
    assert FREE.written(np.array([[-0.2], [1234567.0]])) == ["-0.2", "1.23457e+06"]


def test_predictions_as_the_server_wants_them():
    def file(task, split, logits):
        return task.submission[split], as_file(task.kind.written(logits))

    mnli = file(get_task("MNLI"), "mismatched", logits_for([2, 0], 3))
    assert mnli == ("MNLI-mm.tsv", "index\tprediction\n0\tneutral\n1\tcontradiction\n")
    _, cola = file(get_task("CoLA"), "test", logits_for([1, 0]))
    assert cola == "index\tprediction\n0\t1\n1\t0\n"
    _, sts = file(get_task("STS-B"), "test", np.array([[-0.2], [2.5], [7.0]]))
    assert sts == "index\tprediction\n0\t0\n1\t2.5\n2\t5\n"


# Figures


def test_classification_figures_by_hand():
    labels, predicted = np.array([1, 1, 0, 0, 1]), [1, 0, 0, 1, 1]
    # 2 true positives, 1 false positive, 1 false negative, 1 true negative
    mrpc = get_task("MRPC").measure(logits_for(predicted), labels)
    assert mrpc == {"accuracy": pytest.approx(3 / 5), "f1": pytest.approx(2 * 2 / (2 * 2 + 1 + 1))}
    cola = get_task("CoLA").measure(logits_for(predicted), labels)
    assert cola["mcc"] == pytest.approx((2 * 1 - 1 * 1) / np.sqrt(3 * 3 * 2 * 2))
    assert get_task("RTE").measure(logits_for(predicted), labels) == {"accuracy": pytest.approx(3 / 5)}
    own = MOODS.measure(MOODS.own_figures, logits_for(predicted), labels)
    assert own["macro_f1"] == pytest.approx((2 * 2 / (2 * 2 + 1 + 1) + 2 * 1 / (2 * 1 + 1 + 1)) / 2)
    assert set(own) == {"accuracy", "macro_f1", "mcc"} and MOODS.own_metric == "accuracy"


def test_regression_figures_by_hand():
    figures = get_task("STS-B").measure(np.array([[1.0], [2.0], [4.0]]), np.array([0.0, 3.0, 5.0]))
    assert figures["spearman"] == pytest.approx(1.0)
    assert figures["pearson"] == pytest.approx(np.corrcoef([1, 2, 4], [0, 3, 5])[0, 1])
    assert figures["corr"] == pytest.approx((figures["pearson"] + figures["spearman"]) / 2)
    assert set(figures) == set(STARS.own_figures) and STARS.own_metric == "spearman"


def test_constant_predictions_are_finite():
    assert get_task("STS-B").measure(np.ones((3, 1)), np.array([0.0, 1.0, 2.0]))["corr"] == 0
    assert get_task("CoLA").measure(logits_for([1, 1, 1]), np.array([0, 1, 1]))["mcc"] == 0
    assert get_task("MRPC").measure(logits_for([0, 0, 0]), np.array([0, 1, 1]))["f1"] == 0
    assert MOODS.measure(["macro_f1"], logits_for([0, 0]), np.array([1, 1]))["macro_f1"] == 0


def test_labels_without_a_spread_have_no_correlation():
    none = {"pearson": 0, "spearman": 0, "corr": 0}
    assert STARS.measure(STARS.own_figures, np.array([[1.0], [2.0]]), np.array([3.0, 3.0])) == none
    assert STARS.measure(STARS.own_figures, np.array([[1.0]]), np.array([3.0])) == none


def constant_figure(name, labels):
    task = get_task(name)
    return task.kind.constant_figure(task.metric, labels, task.kind.outputs)


def test_the_best_constant_answer():
    labels = np.array([1, 1, 1, 0])
    assert constant_figure("RTE", labels) == pytest.approx(3 / 4)
    assert constant_figure("MRPC", labels) == pytest.approx(6 / 7)  # always "equivalent": F1 = 2·3 / (2·3 + 1)
    assert constant_figure("CoLA", labels) == constant_figure("STS-B", labels) == 0
    # A kind read back from a run may not know its classes: the model's number counts.
    assert Classification({}).constant_figure("accuracy", np.array([2, 2, 0]), 3) == pytest.approx(2 / 3)


def test_numbers_that_could_be_a_model_s():
    assert MOODS.could_be(np.zeros((3, 2)), np.array([0, 1, 1]))
    assert not MOODS.could_be(np.zeros((3, 2)), np.array([0, 2, 1]))
    assert not MOODS.could_be(np.zeros((3, 2)), np.array([0, -1, 1]))
    assert not MOODS.could_be(np.zeros((3, 2)), np.array([0, 0.5, 1]))
    assert STARS.could_be(np.zeros((3, 1)), np.array([0.0, 7.5, 1.0]))
    assert not STARS.could_be(np.zeros((3, 2)), np.array([0.0, 7.5, 1.0]))


# Several labels a text


def tagged(count=40, seed=0):
    """Logits and labels of a made-up dev set, in which the last class is rare."""
    generator = np.random.default_rng(seed)
    labels = (generator.random((count, 3)) < (0.5, 0.3, 0.1)).astype(float)
    return generator.normal(size=(count, 3)) + 1.5 * labels - 1, labels


def test_several_labels_in_files():
    assert TAGS.problem_type == "multi_label_classification" and TAGS.outputs == 3
    assert TAGS.read(("g", "f"), "X") == [1, 0, 1] and TAGS.read((), "X") == [0, 0, 0]
    with pytest.raises(ValueError, match="label 'funny' is not one of X's: f, s, g"):
        TAGS.read(("s", "funny"), "X")
    told = TAGS.described([("f",), ("f", "g"), (), ()])
    assert told == "several labels a text, 3 classes: f = funny (2), s = sad (0), g = good (1); 2 of 4 texts have none"
    assert TAGS.described([]) == "several labels a text, 3 classes: f = funny, s = sad, g = good"
    assert TAGS.is_labelled(np.array([[0, 1, 0], TAGS.no_label])).tolist() == [True, False]
    assert TAGS.output_order(["good", "funny", "sad"], "t", "X", fine_tuned=True) == [1, 2, 0]


def test_answers_of_several_labels():
    logits = np.array([[1.0, -1, 0.5], [-1, -2, -3], [0, 4, -0.5]])
    assert TAGS.answers(logits).tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    assert TAGS.written(logits) == ["funny,good", "", "sad"]
    by_threshold = TAGS.configured({"thresholds": np.array([0.8, 0.1, 0.2]), "other": 1})
    assert by_threshold.answers(logits).tolist() == [[0, 1, 1], [0, 1, 0], [0, 1, 1]]
    assert by_threshold.settings == {"thresholds": [0.8, 0.1, 0.2]} and by_threshold.configured({}).settings == {}
    assert "funny 0.8, sad 0.1, good 0.2" in by_threshold.use and "funny 0.5" in TAGS.use
    assert all(TAGS.accepts(text) for text in ("", "sad", "good,funny")) and not TAGS.accepts("sad,f")
    assert TAGS.allowed == "some of funny, sad, good, with ',' between"
    assert MultiLabel(TAGS.labels, separator="|").written(logits)[0] == "funny|good"


def test_losses_of_several_labels():
    """Against sums over classes and examples written out."""
    z, labels = np.array([[0.5, -1, 2], [1, 0, -2]]), np.array([[1.0, 0, 1], [0, 0, 1]])
    p = expit(z)
    terms = -(labels * np.log(p) + (1 - labels) * np.log(1 - p))
    logits = torch.tensor(z, requires_grad=True)
    loss = TAGS.hard_loss(logits, torch.tensor(labels))
    assert loss.item() == pytest.approx(terms.sum() / 2)
    loss.backward()
    np.testing.assert_allclose(logits.grad, (p - labels) / 2)
    weighted = MultiLabel(TAGS.labels, class_weights=(1.0, 2.0, 5.0)).hard_loss(logits, torch.tensor(labels))
    assert weighted.item() == pytest.approx((terms * np.where(labels, (1, 2, 5), 1)).sum() / 2)

    theirs = np.array([[1.0, 1, -1], [0, 2, -2]])
    q, temperature = expit(theirs / 2), 2.0
    divergence = q * np.log(q / expit(z / 2)) + (1 - q) * np.log((1 - q) / (1 - expit(z / 2)))
    logits = torch.tensor(z, requires_grad=True)
    loss = TAGS.soft_loss(logits, torch.tensor(theirs), temperature)
    assert loss.item() == pytest.approx(4 * divergence.sum() / 2)
    loss.backward()
    np.testing.assert_allclose(logits.grad, 4 * (expit(z / 2) - q) / 2 / 2)
    entropy = -(q * np.log(expit(z / 2)) + (1 - q) * np.log(1 - expit(z / 2)))
    mean = TAGS.soft_loss(logits, torch.tensor(theirs), temperature, mean_over_classes=True)
    assert mean.item() == pytest.approx(4 * entropy.sum(axis=1).mean() / 3)
    assert TAGS.soft_loss(logits, logits, 1.0).item() == pytest.approx(0, abs=1e-12)
    np.testing.assert_allclose(TAGS.divergences(z, theirs).mean(), TAGS.soft_loss(*map(torch.tensor, (z, theirs)), 1.0))


def test_a_class_that_nobody_uses_changes_no_loss():
    """Nor does a row without labels count."""
    z, theirs = torch.randn(4, 3), torch.randn(4, 3)
    unused = torch.full((4, 2), -40.0)
    more = MultiLabel({name: name for name in "abcde"})
    wide = [torch.cat([one, unused], dim=1) for one in (z, theirs)]
    assert more.soft_loss(*wide, 1.0).item() == pytest.approx(TAGS.soft_loss(z, theirs, 1.0).item(), rel=1e-5)
    labels = torch.tensor([[1.0, 0, 1], TAGS.no_label, [0, 0, 0], TAGS.no_label])
    logits = z.clone().requires_grad_()
    loss = TAGS.hard_loss(logits, labels)
    assert loss.item() == pytest.approx(TAGS.hard_loss(z[[0, 2]], labels[[0, 2]]).item() / 2)
    loss.backward()
    assert (logits.grad[[1, 3]] == 0).all() and (logits.grad[[0, 2]] != 0).all()


def test_probabilities_of_several_labels():
    z = np.array([[0.5, -30.0, 2.0]])
    np.testing.assert_allclose(TAGS.probabilities(z), expit(z))
    np.testing.assert_allclose(TAGS.logits_of_probabilities([0.2, 0.9, 0.5]), logit([0.2, 0.9, 0.5]))
    assert np.isfinite(TAGS.logits_of_probabilities([0, 1, 0.5])).all()
    with pytest.raises(ValueError, match=r"1\.2 is no probability"):
        TAGS.logits_of_probabilities([0.1, 1.2, 0.5])


def test_figures_of_several_labels():
    logits, labels = tagged()
    found = TAGS.measure(TAGS.own_figures, logits, labels)
    answers = expit(logits) > 0.5
    assert found["micro_f1"] == pytest.approx(metrics.f1_score(labels, answers, average="micro"))
    assert found["macro_f1"] == pytest.approx(metrics.f1_score(labels, answers, average="macro"))
    assert found["subset_accuracy"] == pytest.approx((answers == labels).all(axis=1).mean())
    average = metrics.average_precision_score(labels, logits, average="macro")
    assert found["mean_average_precision"] == pytest.approx(average)
    assert TAGS.own_metric in found
    # A class of which there is nothing says nothing.
    none = np.zeros((40, 1))
    wide = MultiLabel({name: name for name in "abcd"})
    same = wide.measure(wide.own_figures, np.hstack([logits, none - 5]), np.hstack([labels, none]))
    assert same == pytest.approx(found)
    nothing = TAGS.measure(TAGS.own_figures, np.full((2, 3), -1.0), np.zeros((2, 3)))
    assert nothing == {"micro_f1": 0, "macro_f1": 0, "subset_accuracy": 1, "mean_average_precision": 0}


def test_thresholds_are_the_best_for_f1():
    logits, labels = tagged()
    kind = TAGS.fitted(logits, labels)
    for k, threshold in enumerate(kind.thresholds):
        p = expit(logits[:, k])
        tried = [metrics.f1_score(labels[:, k], p > each) for each in np.concatenate([[0.0], p])]
        assert metrics.f1_score(labels[:, k], p > threshold) == pytest.approx(max(tried))
        assert abs(p - threshold).min() > 1e-4  # halfway, and not at a text's own probability
    best, even = (each.measure(["macro_f1"], logits, labels)["macro_f1"] for each in (kind, TAGS))
    assert best > even
    never = labels * (1, 1, 0)
    assert TAGS.fitted(logits, never).thresholds[2] == 0.5
    # Of thresholds that are as good, the nearest to .5.
    one = np.array([[3.0, 0, 0], [-3, 0, 0]])
    assert TAGS.fitted(one, np.array([[1, 0, 0], [0, 0, 0]])).thresholds[0] == pytest.approx(0.5)


def test_agreement_of_several_labels_is_of_whole_answers():
    ours, theirs = np.array([[1.0, 1, -1], [-1, -1, -1]]), np.array([[1.0, 1, 1], [-1, -1, -1]])
    assert TAGS.agreement(ours, theirs)["agreement"] == 0.5
    assert TAGS.agreement(ours, ours) == {"agreement": 1, "divergence": pytest.approx(0, abs=1e-12)}
    assert of_teacher({"logits": 1, "teacher_logits": 2, "teacher_thresholds": 3}) == {"logits": 2, "thresholds": 3}


def test_the_best_constant_set_of_labels():
    labels = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 0], [0, 0, 1]])
    kind = TAGS.configured({"thresholds": [0.9, 0.9, 0.9]})
    every = [np.array([a, b, c]) for a in (0, 1) for b in (0, 1) for c in (0, 1)]
    for figure, score in {
        "micro_f1": lambda answers: metrics.f1_score(labels, answers, average="micro", zero_division=0),
        "macro_f1": lambda answers: metrics.f1_score(labels, answers, average="macro", zero_division=0),
        "subset_accuracy": lambda answers: metrics.accuracy_score(labels, answers),
    }.items():
        best = max(score(np.tile(constant, (4, 1))) for constant in every)
        assert kind.constant_figure(figure, labels, 3) == pytest.approx(best), figure
    assert kind.constant_figure("mean_average_precision", labels, 3) == pytest.approx((3 / 4 + 2 / 4 + 1 / 4) / 3)


def test_numbers_that_could_be_of_several_labels():
    assert TAGS.could_be(np.zeros((2, 3)), np.array([[0.0, 1, 1], [0, 0, 0]]))
    assert not TAGS.could_be(np.zeros((2, 3)), np.array([[0.0, 1, 2], [0, 0, 0]]))
    assert not TAGS.could_be(np.zeros((2, 3)), np.array([0.0, 1]))


# Weights of classes


def test_balanced_weights(capsys):
    labels = np.array([0, 0, 0, 2, -100])
    kind = THREE.weighted(labels)
    assert kind.class_weights == pytest.approx((4 / (2 * 3), 1, 4 / 2))  # of two classes that occur
    assert capsys.readouterr().out == "class weights: contradiction 0.667, not-really 1, neutral 2\n"
    logits = torch.randn(5, 3)
    each = torch.nn.functional.cross_entropy(logits, torch.tensor(labels), reduction="none")
    assert kind.hard_loss(logits, torch.tensor(labels)).item() == pytest.approx(
        sum(each[:3] * 4 / 6).item() / 5 + each[3].item() * 2 / 5
    )
    plain = kind.hard_loss(torch.zeros(5, 3), torch.tensor(labels)).item()
    assert plain == pytest.approx(4 / 5 * math.log(3))  # the weights of all rows have the mean 1
    tags = TAGS.weighted(np.array([[1.0, 1, 0], [0, 1, 0], [0, 1, 0], TAGS.no_label]))
    assert tags.class_weights == (2, 1, 1)
    with pytest.raises(InputError, match="--class_weights balanced: weighs classes, and these labels are scores"):
        STARS.weighted(np.array([1.0]))


def test_best_metrics_are_glue_s():
    best = {name: task.best_metric for name, task in TASKS.items()}
    assert best == {
        "CoLA": "eval_mcc",
        "SST-2": "eval_accuracy",
        "MRPC": "eval_f1",
        "STS-B": "eval_spearman",
        "QQP": "eval_f1",
        "MNLI": "eval_matched_accuracy",
        "QNLI": "eval_accuracy",
        "RTE": "eval_accuracy",
        "WNLI": "eval_accuracy",
    }


def test_a_metric_that_an_evaluation_does_not_give():
    mrpc = get_task("MRPC")
    for metric in (None, "loss", "accuracy", "f1"):
        assert mrpc.chosen_by(metric).figures == ("accuracy", "f1")
    assert mrpc.chosen_by("macro_f1").figures == ("accuracy", "f1", "macro_f1")
    with pytest.raises(
        InputError, match=r"--metric_for_best_model pearson: MRPC has loss, accuracy, f1, macro_f1, mcc$"
    ):
        mrpc.chosen_by("pearson")
    assert mrpc.chosen_by("agreement", "agreement") is mrpc
