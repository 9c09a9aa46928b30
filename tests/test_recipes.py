"""The recipes hold the authors' hyper-parameters, and what their code made of them."""

import re

import pytest

from bert_emd.arguments import read_options
from bert_emd.emd_task_distill import __doc__ as description
from bert_emd.recipes import RECIPES, recipe_defaults
from bert_finetune.glue import TASKS

# Typed from the authors' README, "for best-performing models": beta / T_emd / T / learning rate, 4 and 6 layers.
PUBLISHED = """
    CoLA   .001 5  1 2e-5   .001 1 7 2e-5
    MNLI   .005 1  3 5e-5   .005 1 1 5e-5
    MRPC   .001 10 1 2e-5   .005 1 1 2e-5
    QQP    .005 1  3 2e-5   .005 1 1 2e-5
    QNLI   .005 1  3 2e-5   .001 1 1 5e-5
    RTE    .005 1  1 2e-5   .005 1 1 2e-5
    SST-2  .001 1  1 2e-5   .001 1 1 2e-5
    STS-B  .005 1  1 3e-5   .005 1 1 3e-5
"""
ROWS = [line.split() for line in PUBLISHED.strip().splitlines()]
NAMES = ("beta", "T_emd", "T", "learning_rate")


@pytest.mark.parametrize("recipe", ["authors-2022", "authors-2020"])
@pytest.mark.parametrize(("task", *"abcdefgh"), ROWS, ids=[row[0] for row in ROWS])
def test_published_hyper_parameters(task, a, b, c, d, e, f, g, h, recipe):
    for layers, values in ((1, (a, b, c, d)), (4, (a, b, c, d)), (5, (e, f, g, h)), (6, (e, f, g, h))):
        defaults = recipe_defaults(recipe, layers, task)
        assert {name: defaults[name] for name in NAMES} == dict(zip(NAMES, map(float, values), strict=True))
        # The authors' code lists epochs and lengths, and runs every task for 10 epochs at length 64.
        assert (defaults["num_train_epochs"], defaults["max_seq_length"]) == (10, 64)
        assert defaults["objective"] == "published" and defaults["weight_momentum"] == 0


def test_a_task_that_the_authors_do_not_list():
    assert recipe_defaults("authors-2022", 4, "my own") == recipe_defaults("authors-2022", 4, "RTE")


@pytest.mark.parametrize("cut", [True, False])
def test_recommended_is_the_same_for_every_task_but_for_its_length(cut):
    own = recipe_defaults("recommended", 4, "my own", cut)
    for task in TASKS:
        length = 64 if task in ("CoLA", "SST-2") else 128
        assert recipe_defaults("recommended", 6, task, cut) == own | {"max_seq_length": length}


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_figure_that_chooses_the_checkpoint(recipe):
    by_figure = {task: recipe_defaults(recipe, 4, task).get("metric_for_best_model") for task in TASKS}
    chosen = {task: figure for task, figure in by_figure.items() if figure}
    assert chosen == ({} if recipe == "recommended" else {"MRPC": "accuracy", "QQP": "accuracy", "STS-B": "corr"})


@pytest.mark.parametrize(("recipe", "first", "second"), [
    ("recommended", None, None), ("authors-2022", "constant", "linear"), ("authors-2020", "constant", "linear")
])  # fmt: skip
def test_schedule_of_the_two_stages(recipe, first, second):
    for pred_distill, schedule, warmup in ((False, first, 0.0), (True, second, 0.1)):
        defaults = recipe_defaults(recipe, 4, "RTE", pred_distill=pred_distill)
        assert defaults.get("lr_scheduler_type") == schedule
        assert defaults.get("warmup_steps") == (None if schedule is None else warmup)


def test_help_says_which_defaults_the_recipe_chooses(capsys):
    with pytest.raises(SystemExit) as exit_info:
        read_options(["--help"], description)
    shown = capsys.readouterr().out
    assert (
        exit_info.value.code == 0 and "    python bert_emd/emd_task_distill.py --teacher_model my-classifier" in shown
    )
    texts = {text.split()[0]: " ".join(text.split()) for text in re.split(r"\n  --(?=\w)", shown)[1:]}
    for name in recipe_defaults("recommended", 4, "RTE"):
        assert "(default: by recipe, student and task)" in texts[name], name
    assert "(default: where the hardware has it, with --recipe recommended)" in texts["bf16"]
    assert "(default: eval)" in texts["teacher_mode"] and "default" not in texts["teacher_model"]
