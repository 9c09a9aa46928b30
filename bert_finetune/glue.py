"""The GLUE tasks, one row of a table each: files, columns, labels, metric, submission name.

Row counts, label sets and metrics follow the GLUE benchmark (Wang et al., 2019) and its official files. MNLI's classes
stand in the order of the BERT-EMD authors' code (contradiction, entailment, neutral); models are matched by class name,
never by position.
"""

from dataclasses import dataclass

import numpy as np

from bert_finetune.errors import InputError
from bert_finetune.task_kinds import Classification, Regression, TaskKind


@dataclass(frozen=True)
class Task:
    """What is particular to one task.

    `columns`: names of the text column, or of both, as the header line has them; `headerless` names the columns of a
    file that comes without one. `kind`: what the labels are, and all that follows from it.
    `dev`, `test`: split name -> file name, as seen from the task's folder; the first dev split chooses the best
    checkpoint. `optional`: test splits whose file need not be there.
    `figures`: what is measured on the dev set, by the names that the kind gives them; `metric` is the one that GLUE (and
    the paper's table) reports and that chooses the best checkpoint.
    `submission`: test split -> file name that the GLUE server expects. `test_rows`: how many rows the official test
    files have, in the order of `test`. `filler`: the answers, in turn, of a submission without predictions: the most
    frequent class of the dev set; for regression two scores, since a constant has no correlation.
    `skips_short_rows`: a split whose official file is known to hold rows with too few fields; they are counted and
    left out there. Anywhere else such a row is an error, and in a test file it is kept, so that predictions stay in
    line with the file.
    """

    name: str
    columns: tuple[str, ...]
    kind: TaskKind
    metric: str = "accuracy"
    label_column: str = "label"
    figures: tuple[str, ...] = ("accuracy",)
    train: str = "train.tsv"
    dev: dict[str, str] = None
    test: dict[str, str] = None
    submission: dict[str, str] = None
    test_rows: tuple[int, ...] = ()
    filler: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    headerless: tuple[str, ...] = ()
    skips_short_rows: tuple[str, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "dev", {"dev": "dev.tsv"} if self.dev is None else self.dev)
        object.__setattr__(self, "test", {"test": "test.tsv"} if self.test is None else self.test)
        object.__setattr__(self, "submission", self.submission or {"test": f"{self.name}.tsv"})

    @property
    def best_metric(self) -> str:
        """`metric` on the (first) dev set, as the trainer names it."""
        return self.dev_figure(self.metric)

    def dev_figure(self, metric: str) -> str:
        """How the trainer names a figure on the (first) dev set."""
        return f"eval_{next(iter(self.dev))}_{metric}" if len(self.dev) > 1 else f"eval_{metric}"

    def measure(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """The task's figures of a model's logits (examples, outputs)."""
        return self.kind.measure(self.figures, logits, labels)

    def check_metric(self, metric: str | None) -> None:
        """Raise InputError for a `--metric_for_best_model` that an evaluation does not give."""
        figures = ("loss", *self.figures)
        if metric not in (None, *figures):
            raise InputError(f"--metric_for_best_model {metric}: {self.name} has {', '.join(figures)}")


_ENTAILMENT = Classification({"entailment": "entailment", "not_entailment": "not_entailment"})

TASKS = {
    task.name: task
    for task in (
        # CoLA's train and dev have no header line: column 0 is the source, 1 the label, 3 the sentence.
        Task(
            "CoLA",
            ("sentence",),
            Classification({"0": "unacceptable", "1": "acceptable"}),
            "mcc",
            figures=("accuracy", "mcc"),
            test_rows=(1063,),
            filler=("1",),
            headerless=("source", "label", "star", "sentence"),
        ),
        Task(
            "SST-2", ("sentence",), Classification({"0": "negative", "1": "positive"}), test_rows=(1821,), filler=("1",)
        ),
        Task(
            "MRPC",
            ("#1 String", "#2 String"),
            Classification({"0": "not_equivalent", "1": "equivalent"}),
            "f1",
            "Quality",
            figures=("accuracy", "f1"),
            test_rows=(1725,),
            filler=("1",),
        ),
        Task(
            "STS-B",
            ("sentence1", "sentence2"),
            Regression(0, 5),
            "spearman",
            "score",
            figures=Regression.own_figures,
            test_rows=(1379,),
            filler=("2.000", "3.000"),
        ),
        Task(
            "QQP",
            ("question1", "question2"),
            Classification({"0": "not_duplicate", "1": "duplicate"}),
            "f1",
            "is_duplicate",
            figures=("accuracy", "f1"),
            test_rows=(390965,),
            filler=("0",),
            skips_short_rows=("train", "dev"),
        ),
        # The MNLI model predicts the diagnostic set too, which has a folder of its own.
        Task(
            "MNLI",
            ("sentence1", "sentence2"),
            Classification({name: name for name in ("contradiction", "entailment", "neutral")}),
            label_column="gold_label",
            dev={"matched": "dev_matched.tsv", "mismatched": "dev_mismatched.tsv"},
            test={
                "matched": "test_matched.tsv",
                "mismatched": "test_mismatched.tsv",
                "diagnostic": "../diagnostic/diagnostic.tsv",
            },
            submission={"matched": "MNLI-m.tsv", "mismatched": "MNLI-mm.tsv", "diagnostic": "AX.tsv"},
            test_rows=(9796, 9847, 1104),
            filler=("entailment",),
            optional=("diagnostic",),
        ),
        Task("QNLI", ("question", "sentence"), _ENTAILMENT, test_rows=(5463,), filler=("not_entailment",)),
        Task("RTE", ("sentence1", "sentence2"), _ENTAILMENT, test_rows=(3000,), filler=("entailment",)),
        Task(
            "WNLI",
            ("sentence1", "sentence2"),
            Classification({"0": "not_entailment", "1": "entailment"}),
            test_rows=(146,),
            filler=("0",),
        ),
    )
}


def get_task(name: str) -> Task:
    """The task called `name`, in any case, with or without the dash (`sts-b`, `STSB`)."""
    wanted = name.replace("-", "").lower()
    for task in TASKS.values():
        if task.name.replace("-", "").lower() == wanted:
            return task
    raise InputError(f"--task_name {name}: no such task; choose one of {', '.join(TASKS)}")
