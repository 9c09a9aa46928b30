"""The GLUE tasks, one row of a table each, for reading, downloading, checking and submitting.

Row counts, columns, label sets and metrics follow the GLUE benchmark (Wang et al., 2019) and its official files; their
checksums are in glue_sha256.py. MNLI's classes stand in the order of the BERT-EMD authors' code (contradiction,
entailment, neutral); models are matched by class name, never by position.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import numpy as np

from bert_finetune.errors import InputError
from bert_finetune.task_kinds import Classification, Regression, TaskKind

if TYPE_CHECKING:
    from bert_finetune.own_files import OwnFiles


@dataclass(frozen=True)
class File:
    """A TSV file as GLUE publishes it.

    `path`: its place in the data folder and in the official archive. `split`: its name on the hub. `rows`: without the
    header. `columns`: each column, in the file's order -> the hub's field with that content, or None where the hub has
    none. `header`: whether the first line names the columns.
    """

    path: str
    split: str
    rows: int
    columns: dict[str, str | None]
    header: bool = True

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name


@dataclass(frozen=True)
class Corpus:
    """What GLUE publishes in one folder, and where it is to be had.

    `folder`: its place in the data folder; `aliases`: its other names. `kind`: what its labels are. `sources`: what to
    download, below the address of the official server. `config`: its name on the hub; `hub_labels`: the labels in the
    order of the hub's numbers, where the files do not write these numbers themselves.
    """

    folder: str
    kind: TaskKind
    files: tuple[File, ...]
    sources: tuple[str, ...]
    config: str
    hub_labels: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()

    def is_called(self, name: str) -> bool:
        """Whether `name` means this one: in any case, with or without the dash (`sts-b`, `STSB`), or an alias."""
        return _plain(name) in map(_plain, (self.folder, *self.aliases))


def _plain(name: str) -> str:
    return name.replace("-", "").lower()


@dataclass(frozen=True)
class Task:
    """What is particular to one task.

    `columns`: names of the text column, or of both, as the header line has them; `headerless` names the columns of a
    file that comes without one. `kind`: what the labels are, and all that follows from it.
    `dev`, `test`: split name -> file name, as seen from the task's folder; the first dev split chooses the best
    checkpoint. `optional`: test splits whose file need not be there.
    `figures`: what is measured on the dev set, by the names that the kind gives them; `metric` is the one that GLUE and
    the paper's table report and that chooses the best checkpoint.
    `submission`: test split -> file name that the GLUE server expects. `filler`: the answers, in turn, of a submission
    without predictions: the most frequent class of the dev set; for regression two scores, since a constant has no
    correlation.
    `skips_short_rows`: a split whose official file is known to hold rows with too few fields; they are counted and
    left out there. Anywhere else such a row is an error, and in a test file it is kept, so that predictions stay in
    line with the file.
    `corpus`: the official files; None for a task that is not GLUE's, whose files are read as `own_files` says.
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
    filler: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    headerless: tuple[str, ...] = ()
    skips_short_rows: tuple[str, ...] = ()
    corpus: Corpus | None = None
    own_files: "OwnFiles | None" = None

    def __post_init__(self):
        object.__setattr__(self, "dev", {"dev": "dev.tsv"} if self.dev is None else self.dev)
        object.__setattr__(self, "test", {"test": "test.tsv"} if self.test is None else self.test)
        object.__setattr__(self, "submission", self.submission or {"test": f"{self.name}.tsv"})

    @property
    def dev_prefixes(self) -> dict[str, str]:
        """Dev split -> what the trainer's names of its figures begin with."""
        return {split: f"eval_{split}" if len(self.dev) > 1 else "eval" for split in self.dev}

    @property
    def best_metric(self) -> str:
        """`metric` on the (first) dev set, as the trainer names it."""
        return self.dev_figure(self.metric)

    def dev_figure(self, metric: str) -> str:
        """How the trainer names a figure on the (first) dev set."""
        return f"{next(iter(self.dev_prefixes.values()), 'eval')}_{metric}"

    def measure(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """The task's figures of a model's logits (examples, outputs)."""
        return self.kind.measure(self.figures, logits, labels)

    def weighted(self, class_weights: str, labels: Sequence) -> "Task":
        """The task whose hard loss weighs classes as `--class_weights` says; `labels`: of the training rows."""
        return self if class_weights == "none" else replace(self, kind=self.kind.weighted(np.asarray(labels)))

    def chosen_by(self, metric: str | None, *more: str) -> "Task":
        """The task with the figure that `--metric_for_best_model` names among those that are measured.

        `more`: figures beside those of the task's kind. Raises InputError for one that there is not.
        """
        of_kind = dict.fromkeys((*self.figures, *self.kind.own_figures))
        figures = ("loss", *of_kind, *more)
        if metric not in (None, *figures):
            raise InputError(f"--metric_for_best_model {metric}: {self.name} has {', '.join(figures)}")
        return self if metric not in of_kind else replace(self, figures=tuple(dict.fromkeys((*self.figures, metric))))


def _corpus(
    folder: str,
    kind: TaskKind,
    labelled: dict[str, str | None],
    unlabelled: dict[str, str | None],
    rows: tuple[int, int, int],
    header: bool = True,
    sources: tuple[str, ...] = (),
    **more,
) -> Corpus:
    """Train and dev, of `labelled` columns and with a `header` or without, and test; by default all in one archive."""
    train, dev, test = rows
    files = (
        File(f"{folder}/train.tsv", "train", train, labelled, header),
        File(f"{folder}/dev.tsv", "validation", dev, labelled, header),
        File(f"{folder}/test.tsv", "test", test, unlabelled),
    )
    return Corpus(folder, kind, files, sources or (f"glue/data/{folder}.zip",), _plain(folder), **more)


def _task(corpus: Corpus, metric: str = "accuracy", **more) -> Task:
    """The task whose training file is the first of `corpus`: its columns are text, but for indices and the label."""
    train = corpus.files[0]
    (label,) = (name for name, field in train.columns.items() if field == "label")
    texts = tuple(name for name, field in train.columns.items() if field not in (None, "idx", "label"))
    return Task(
        corpus.folder,
        texts,
        corpus.kind,
        metric,
        label.removeprefix("\ufeff"),
        headerless=() if train.header else tuple(train.columns),
        corpus=corpus,
        **more,
    )


_INDEX = {"index": "idx"}
_LABEL = {"label": "label"}
_SENTENCE = {"sentence": "sentence"}
_PAIR = {"sentence1": "sentence1", "sentence2": "sentence2"}
_PREMISE = {"sentence1": "premise", "sentence2": "hypothesis"}
_QUESTION = {"question": "question", "sentence": "sentence"}
_QUESTIONS = {"question1": "question1", "question2": "question2"}
_MRPC_PAIR = {"#1 ID": None, "#2 ID": None, "#1 String": "sentence1", "#2 String": "sentence2"}
_STS_TEST = _INDEX | dict.fromkeys(("genre", "filename", "year", "old_index", "source1", "source2")) | _PAIR
_MNLI_ORIGIN = dict.fromkeys(("promptID", "pairID", "genre"))
_MNLI_PARSES = dict.fromkeys(f"sentence{n}_{parse}" for parse in ("binary_parse", "parse") for n in (1, 2))
_MNLI_TEST = _INDEX | _MNLI_ORIGIN | _MNLI_PARSES | _PREMISE
_MNLI_TRAIN = _MNLI_TEST | {"label1": None, "gold_label": "label"}
_MNLI_DEV = _MNLI_TEST | dict.fromkeys(f"label{n}" for n in range(1, 6)) | {"gold_label": "label"}

_ENTAILMENT = Classification({"entailment": "entailment", "not_entailment": "not_entailment"})
_THREE_WAY = Classification({name: name for name in ("contradiction", "entailment", "neutral")})

# MNLI's model predicts the diagnostic set too, which has a folder of its own and no labels.
DIAGNOSTIC = Corpus(
    "diagnostic",
    _THREE_WAY,
    (File("diagnostic/diagnostic.tsv", "test", 1104, _INDEX | _PREMISE),),
    ("glue/data/AX.tsv",),
    config="ax",
    aliases=("AX",),
)

TASKS = {
    task.name: task
    for task in (
        _task(
            _corpus(
                "CoLA",
                Classification({"0": "unacceptable", "1": "acceptable"}),
                {"source": None} | _LABEL | {"star": None} | _SENTENCE,
                _INDEX | _SENTENCE,
                rows=(8551, 1043, 1063),
                header=False,
            ),
            "mcc",
            figures=("accuracy", "mcc"),
            filler=("1",),
        ),
        _task(
            _corpus(
                "SST-2",
                Classification({"0": "negative", "1": "positive"}),
                _SENTENCE | _LABEL,
                _INDEX | _SENTENCE,
                rows=(67349, 872, 1821),
                aliases=("SST",),
            ),
            filler=("1",),
        ),
        _task(
            _corpus(
                "MRPC",
                Classification({"0": "not_equivalent", "1": "equivalent"}),
                {"\ufeffQuality": "label"} | _MRPC_PAIR,
                _INDEX | _MRPC_PAIR,
                rows=(3668, 408, 1725),
                sources=(
                    "senteval/senteval_data/msr_paraphrase_train.txt",
                    "senteval/senteval_data/msr_paraphrase_test.txt",
                    "glue/data/mrpc_dev_ids.tsv",
                ),
            ),
            "f1",
            figures=("accuracy", "f1"),
            filler=("1",),
        ),
        _task(
            _corpus(
                "STS-B",
                Regression(0, 5),
                _STS_TEST | {"score": "label"},
                _STS_TEST,
                rows=(5749, 1500, 1379),
                aliases=("STS",),
            ),
            "spearman",
            figures=Regression.own_figures,
            filler=("2.000", "3.000"),
        ),
        _task(
            _corpus(
                "QQP",
                Classification({"0": "not_duplicate", "1": "duplicate"}),
                dict.fromkeys(("id", "qid1", "qid2")) | _QUESTIONS | {"is_duplicate": "label"},
                {"id": "idx"} | _QUESTIONS,
                rows=(363846, 40430, 390965),
                sources=("glue/data/QQP-clean.zip",),
            ),
            "f1",
            figures=("accuracy", "f1"),
            filler=("0",),
            skips_short_rows=("train", "dev"),
        ),
        _task(
            Corpus(
                "MNLI",
                _THREE_WAY,
                (
                    File("MNLI/train.tsv", "train", 392702, _MNLI_TRAIN),
                    File("MNLI/dev_matched.tsv", "validation_matched", 9815, _MNLI_DEV),
                    File("MNLI/dev_mismatched.tsv", "validation_mismatched", 9832, _MNLI_DEV),
                    File("MNLI/test_matched.tsv", "test_matched", 9796, _MNLI_TEST),
                    File("MNLI/test_mismatched.tsv", "test_mismatched", 9847, _MNLI_TEST),
                ),
                ("glue/data/MNLI.zip",),
                config="mnli",
                hub_labels=("entailment", "neutral", "contradiction"),
            ),
            dev={"matched": "dev_matched.tsv", "mismatched": "dev_mismatched.tsv"},
            test={
                "matched": "test_matched.tsv",
                "mismatched": "test_mismatched.tsv",
                "diagnostic": f"../{DIAGNOSTIC.files[0].path}",
            },
            submission={"matched": "MNLI-m.tsv", "mismatched": "MNLI-mm.tsv", "diagnostic": "AX.tsv"},
            filler=("entailment",),
            optional=("diagnostic",),
        ),
        _task(
            _corpus(
                "QNLI",
                _ENTAILMENT,
                _INDEX | _QUESTION | _LABEL,
                _INDEX | _QUESTION,
                rows=(104743, 5463, 5463),
                sources=("glue/data/QNLIv2.zip",),
                hub_labels=("entailment", "not_entailment"),
            ),
            filler=("not_entailment",),
        ),
        _task(
            _corpus(
                "RTE",
                _ENTAILMENT,
                _INDEX | _PAIR | _LABEL,
                _INDEX | _PAIR,
                rows=(2490, 277, 3000),
                hub_labels=("entailment", "not_entailment"),
            ),
            filler=("entailment",),
        ),
        _task(
            _corpus(
                "WNLI",
                Classification({"0": "not_entailment", "1": "entailment"}),
                _INDEX | _PAIR | _LABEL,
                _INDEX | _PAIR,
                rows=(635, 71, 146),
            ),
            filler=("0",),
        ),
    )
}

# All that GLUE publishes.
CORPORA = (*(task.corpus for task in TASKS.values()), DIAGNOSTIC)


def get_task(name: str) -> Task:
    """The task called `name`, in any case, with or without the dash (`sts-b`, `STSB`), or by an alias (`STS`)."""
    for task in TASKS.values():
        if task.corpus.is_called(name):
            return task
    raise InputError(f"--task_name {name}: no such task; choose one of {', '.join(TASKS)}")
