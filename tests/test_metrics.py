import numpy as np
import pytest

from bert_finetune.glue import TASKS, get_task
from bert_finetune.metrics import chance_level, compute_metrics
from bert_finetune.predictions import write_predictions


def logits_for(classes, count=2):
    return np.eye(count)[classes]


def test_classification_figures_by_hand():
    labels, predicted = np.array([1, 1, 0, 0, 1]), [1, 0, 0, 1, 1]
    # 2 true positives, 1 false positive, 1 false negative, 1 true negative
    mrpc = compute_metrics(get_task("MRPC"), logits_for(predicted), labels)
    assert mrpc == {"accuracy": pytest.approx(3 / 5), "f1": pytest.approx(2 * 2 / (2 * 2 + 1 + 1))}
    cola = compute_metrics(get_task("CoLA"), logits_for(predicted), labels)
    assert cola["mcc"] == pytest.approx((2 * 1 - 1 * 1) / np.sqrt(3 * 3 * 2 * 2))
    assert compute_metrics(get_task("RTE"), logits_for(predicted), labels) == {"accuracy": pytest.approx(3 / 5)}


def test_regression_figures_by_hand():
    figures = compute_metrics(get_task("STS-B"), np.array([[1.0], [2.0], [4.0]]), np.array([0.0, 3.0, 5.0]))
    assert figures["spearman"] == pytest.approx(1.0)
    assert figures["pearson"] == pytest.approx(np.corrcoef([1, 2, 4], [0, 3, 5])[0, 1])
    assert figures["corr"] == pytest.approx((figures["pearson"] + figures["spearman"]) / 2)


def test_constant_predictions_are_finite():
    assert compute_metrics(get_task("STS-B"), np.ones((3, 1)), np.array([0.0, 1.0, 2.0]))["corr"] == 0
    assert compute_metrics(get_task("CoLA"), logits_for([1, 1, 1]), np.array([0, 1, 1]))["mcc"] == 0
    assert compute_metrics(get_task("MRPC"), logits_for([0, 0, 0]), np.array([0, 1, 1]))["f1"] == 0


def test_chance_level():
    labels = np.array([1, 1, 1, 0])
    assert chance_level(get_task("RTE"), labels) == pytest.approx(3 / 4)
    assert chance_level(get_task("MRPC"), labels) == pytest.approx(6 / 7)  # always "equivalent": F1 = 2·3 / (2·3 + 1)
    assert chance_level(get_task("CoLA"), labels) == chance_level(get_task("STS-B"), labels) == 0


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


def test_predictions_as_the_server_wants_them(tmp_path):
    mnli = write_predictions(get_task("MNLI"), "mismatched", logits_for([2, 0], 3), tmp_path)
    assert mnli.name == "MNLI-mm.tsv"
    assert mnli.read_text() == "index\tprediction\n0\tneutral\n1\tcontradiction\n"
    cola = write_predictions(get_task("CoLA"), "test", logits_for([1, 0]), tmp_path)
    assert cola.read_text() == "index\tprediction\n0\t1\n1\t0\n"
    sts = write_predictions(get_task("STS-B"), "test", np.array([[-0.2], [2.5], [7.0]]), tmp_path)
    assert sts.read_text() == "index\tprediction\n0\t0\n1\t2.5\n2\t5\n"
