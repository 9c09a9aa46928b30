import json

import numpy as np
import pytest
from drawn import assert_apart, texts

from bert_finetune.glue import get_task
from experiments.comparison import Summary
from experiments.figures import figures_of
from experiments.score_pictures import (
    Speed,
    draw_accuracy_against_latency,
    draw_dev_scores,
    draw_forest,
    draw_methods,
)


def scores_of(folder, scores):
    folder.mkdir()
    history = [{"step": step, "eval_accuracy": value, "eval_loss": 1.0} for step, value in scores.items()]
    (folder / "eval_results.json").write_text(json.dumps({"history": history}))
    return folder


@pytest.mark.slow
def test_dev_scores(tmp_path):
    emd = [
        scores_of(tmp_path / "a", {10: 0.5, 20: 0.7, 30: 0.8}),
        scores_of(tmp_path / "b", {10: 0.6, 20: 0.8, 30: 0.9, 40: 0.9}),  # one stopped earlier
    ]
    plain = [scores_of(tmp_path / "c", {15: 0.4, 30: 0.845})]
    figure = draw_dev_scores({"EMD": emd, "plain": plain}, tmp_path / "scores")
    (axis,) = figure.axes
    mean, low, high, single = axis.lines
    np.testing.assert_array_equal(mean.get_xdata(), [10, 20, 30])
    np.testing.assert_allclose(
        [line.get_ydata() for line in (low, mean, high)], [[0.5, 0.7, 0.8], [0.55, 0.75, 0.85], [0.6, 0.8, 0.9]]
    )
    np.testing.assert_array_equal(single.get_xydata(), [[15, 0.4], [30, 0.845]])
    assert mean.get_marker() != single.get_marker() and mean.get_linestyle() != single.get_linestyle()
    assert len(axis.collections) == 1  # one run has no band
    assert {"EMD", "plain", "training step", "dev accuracy"} <= set(texts(tmp_path / "scores.svg"))
    assert any("lowest to highest" in text for text in texts(tmp_path / "scores.svg"))
    assert_apart(axis)
    assert "dev loss" in [axis.get_ylabel() for axis in draw_dev_scores({"p": plain}, tmp_path / "p", "loss").axes]
    with pytest.raises(ValueError, match=r"no step at which eval_f1 of all of these was measured: .*c"):
        draw_dev_scores({"plain": plain}, tmp_path / "none", "f1")
    with pytest.raises(ValueError, match=r"no step at which eval_accuracy of all of these was measured: .*d, .*e"):
        runs = [scores_of(tmp_path / "d", {1: 0.5}), scores_of(tmp_path / "e", {2: 0.5})]
        draw_dev_scores({"EMD": runs}, tmp_path / "none")
    assert not list(tmp_path.glob("none*"))


@pytest.mark.slow
def test_accuracy_against_latency(tmp_path):
    models = [
        Speed("teacher", 10, 0.85),
        Speed("EMD", 5, 0.8201),
        Speed("plain", 5, 0.82),
        Speed("uniform", 5.1, 0.8199),
    ]
    (axis,) = draw_accuracy_against_latency(models, tmp_path / "speed").axes
    points = [(name.get_text(), *line.get_xydata()[0]) for line, name in zip(axis.lines, axis.texts, strict=True)]
    assert points == [(model.name, model.milliseconds, model.score) for model in models]
    assert axis.get_title() == ""
    assert len({line.get_marker() for line in axis.lines}) == len(models)
    assert {"teacher", "EMD", "plain", "uniform", "milliseconds a sentence"} <= set(texts(tmp_path / "speed.svg"))
    assert_apart(axis)
    (figure,) = figures_of(get_task("RTE"), "test_agreement")
    (axis,) = draw_accuracy_against_latency(models[:1], tmp_path / "one", figure.label).axes
    assert axis.get_ylabel() == "held-out agreement"
    (axis,) = draw_accuracy_against_latency([*models, Speed("x", 4, 0.8, 2.5, 0.79)], tmp_path / "int8").axes
    joined, own = axis.lines[-2:]
    assert joined.get_xydata().tolist() == [[4, 0.8], [2.5, 0.79]] and own.get_xydata().tolist() == [[4, 0.8]]
    assert joined.get_marker() == own.get_marker() and joined.get_markerfacecolor() == "1"
    assert len(axis.texts) == 5 and "hollow ones: ONNX, int8" in axis.get_title()


def summaries(**changes):
    (figure,) = figures_of(get_task("MRPC"))
    told = {"difference": 1.0, "interval": (0.2, 1.8), "common": (1, 2, 3)} | changes
    return [
        Summary(figure, "small", "emd", (81.0, 82.0, 83.0), holm_p=0.01, **told),
        Summary(figure, "small", "uniform", (80.0, 81.0, 82.5), holm_p=0.4, **told | {"difference": 0.1}),
    ]


def test_differences_stand_in_an_interval_beside_a_band_of_what_matters(tmp_path):
    (axis,) = draw_forest(summaries(), tmp_path / "forest").axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["emd, small", "uniform, small"]
    lines = [line for line in axis.get_lines() if len(line.get_xdata()) == 2 and line.get_xdata()[0] != 0]
    assert [tuple(line.get_xdata()) for line in lines] == [(0.2, 1.8)] * 2
    marks = [line for line in axis.get_lines() if line.get_marker() == "o"]
    assert [line.get_xdata()[0] for line in marks] == [1.0, 0.1]
    assert [line.get_markerfacecolor() for line in marks] == ["0", "1"]  # only the first is a claim
    (band,) = axis.patches
    assert (band.get_x(), band.get_width()) == (-0.5, 1.0)
    assert "MRPC F1: difference to the baseline, 95 % interval" in texts(tmp_path / "forest.svg")
    (alone,) = draw_forest(summaries(interval=None)[:1], tmp_path / "one").axes
    assert not [line for line in alone.get_lines() if tuple(line.get_xdata()) == (0.2, 1.8)]


def test_every_method_s_mean_with_its_interval_over_seeds(tmp_path):
    (axis,) = draw_methods(summaries(), {"teacher": 85.0, "none": 80.0}, tmp_path / "methods").axes
    means = [line.get_xdata()[0] for line in axis.get_lines() if line.get_marker() == "o"]
    assert means == [82.0, pytest.approx(81.1667, abs=1e-3)]
    half = 4.302653 * 1.0 / 3**0.5  # t of 2 degrees of freedom, standard deviation 1
    intervals = [tuple(line.get_xdata()) for line in axis.get_lines() if line.get_color() == "0"]
    assert (pytest.approx(82 - half, abs=1e-4), pytest.approx(82 + half, abs=1e-4)) in intervals
    assert {"teacher", "none", "MRPC F1: mean of 3 seeds, 95 % interval"} <= set(texts(tmp_path / "methods.svg"))
