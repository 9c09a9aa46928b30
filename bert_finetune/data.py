"""From files to tokenised datasets.

read_tsv or OwnFiles -> load_split -> tokenize, and load_datasets for all of a task's splits
"""

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path

from datasets import Dataset, concatenate_datasets
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from bert_finetune.errors import InputError
from bert_finetune.glue import Task
from bert_finetune.own_files import OwnFiles
from bert_finetune.paths import ending, several
from bert_finetune.processes import is_main_process
from bert_finetune.soft_labels import TEACHER_LOGITS
from bert_finetune.tables import PLAIN, TEXT, Table, read_tsv


@dataclass(frozen=True)
class GlueFiles:
    """How a GLUE task's files are read: exactly. Has the interface of `OwnFiles`."""

    task: Task

    def read(self, path: Path) -> Table:
        """A file as it is."""
        if not path.exists():
            raise InputError(f"{path}: no such file; fetch it with download_glue_data.py or check --data_dir")
        return read_tsv(path, self.task.headerless)

    @property
    def label_names(self) -> tuple[str, ...]:
        """The column of the labels."""
        return (self.task.label_column,)

    def texts(self, table: Table, name: str) -> list[str | None]:
        """The fields of a column; None where a row ends before it."""
        position = table.column(name)
        return [table.text(k, position) for k in range(len(table.rows))]

    fields = texts

    def labels(self, table: Table) -> list[str | None]:
        """The labels; None where a row ends before them."""
        return self.texts(table, self.task.label_column)


def load_split(task: Task, path: Path, split: str, labels: str = "all") -> Dataset:
    """One file of a task as a dataset with columns `text_a`, `text_b` (pairs only) and `label` (not for a test file).

    `split` is "train", "dev" or "test". Labels are what the task's kind reads from their text. labels: "all" rows have
    them; "some", of the user's own files, where they or their column may be missing; "none" are looked at. Training
    rows without one have the kind's `no_label`, and a dev file of none has no column. Soft labels of a training file,
    which only one whose labels are not looked at may lack, are a column TEACHER_LOGITS. Rows with too few fields are an
    error that names the line; where the official file is known to hold some (QQP's train and dev) they are counted,
    reported and left out, and in a test file they are reported and kept with the missing text empty, so that row i of
    the file stays prediction i.
    """
    files = task.own_files or GlueFiles(task)
    table = files.read(path)
    soft_labels = task.own_files.soft_labels if task.own_files and split == "train" else None
    looked_at = labels != "none"
    if split == "test" or (labels == "some" and not table.has(files.label_names)):
        labels = "none"
    table = with_full_rows(table, task, split, labels != "none")
    if not table.rows:
        raise InputError(f"{path}: the file holds no usable row of data")
    columns = {
        name: present(files.texts(table, column), table, column)
        for name, column in zip(("text_a", "text_b"), task.columns, strict=False)
    }
    found = files.labels(table) if labels != "none" else [None] * len(table.rows)
    if labels == "all":
        present(found, table, files.label_names[0])
    if split == "train" or labels != "none":
        columns["label"] = []
        for k, label in enumerate(found):
            try:
                columns["label"].append(task.kind.no_label if label is None else task.kind.read(label, task.name))
            except ValueError as error:
                raise InputError(f"{table.place(k)}: {error}") from error
    if soft_labels and (looked_at or soft_labels.are_in(table)):
        columns[TEACHER_LOGITS] = soft_labels.read(table, task.kind)
    return Dataset.from_dict(columns)


def with_full_rows(table: Table, task: Task, split: str, labelled: bool) -> Table:
    """The table with all fields that the split needs in each row: see `load_split`."""
    label_names = (task.own_files or GlueFiles(task)).label_names if labelled else ()
    needed = 1 + max(map(table.column, (*task.columns, *label_names)))
    short = [k for k, row in enumerate(table.rows) if len(row) < needed]
    if not short:
        return table
    if split == "test":
        fate, kept = "kept with empty text", range(len(table.rows))
    elif split in task.skips_short_rows:
        fate, kept = "left out", sorted(set(range(len(table.rows))).difference(short))
    else:
        raise InputError(
            f"{table.place(short[0])}: {len(table.rows[short[0]])} tab-separated fields where {needed} are needed; "
            "mend or remove the row"
        )
    shown = ", ".join(str(table.numbers[k]) for k in short[:5]) + (", ..." if len(short) > 5 else "")
    if is_main_process():
        print(f"{table.path}: {len(short)} rows with too few fields {fate} (lines {shown})")
    rows = [table.rows[k] + [""] * (needed - len(table.rows[k])) for k in kept]
    return replace(table, rows=rows, numbers=[table.numbers[k] for k in kept])


def present(values: list[str | None], table: Table, column: str) -> list[str]:
    missing = [k for k, value in enumerate(values) if value is None]
    if missing:
        shown = (table.text(missing[0], table.column(column)) or "").strip()
        raise InputError(
            f"{table.place(missing[0])}: no value in column {column!r}"
            + (f", as {shown!r} is none" if shown else "")
            + (f" (nor in {len(missing) - 1} more rows)" if len(missing) > 1 else "")
            + "; fill it in or remove the row"
        )
    return values


def tokenize(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> Dataset:
    """Texts to model inputs (`input_ids`, `attention_mask`, `token_type_ids` where the model has them) and `labels`.

    Nothing is padded here. A pair that is too long loses tokens from the end of its longer sentence until it fits;
    where both are cut to an odd total, the first keeps the extra token, as in the original BERT code (fast tokenizers
    leave it to the second).
    """
    backend = plain_backend(tokenizer)
    with_types = "token_type_ids" in tokenizer.model_input_names
    pair = "text_b" in dataset.column_names
    room = max_seq_length - tokenizer.num_special_tokens_to_add(pair=pair)
    if room < 1 + pair:
        raise InputError(f"--max_seq_length {max_seq_length} leaves no room for text beside the special tokens")

    def encode(batch):
        firsts = backend.encode_batch(batch["text_a"], add_special_tokens=False)
        seconds = backend.encode_batch(batch["text_b"], add_special_tokens=False) if pair else [None] * len(firsts)
        inputs = {"input_ids": [], "attention_mask": []} | ({"token_type_ids": []} if with_types else {})
        for first, second in zip(firsts, seconds, strict=True):
            if second is not None:
                length = len(second.ids)
                second.truncate(min(length, max(room // 2, room - len(first.ids))))
            first.truncate(room - (len(second.ids) if pair else 0))
            encoding = backend.post_process(first, second, True)
            inputs["input_ids"].append(encoding.ids)
            inputs["attention_mask"].append(encoding.attention_mask)
            if with_types:
                inputs["token_type_ids"].append(encoding.type_ids)
        return inputs

    tokenized = dataset.map(encode, batched=True, remove_columns=["text_a", "text_b"][: 1 + pair])
    return tokenized.rename_column("label", "labels") if "label" in tokenized.column_names else tokenized


def plain_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """What splits texts to pieces, without truncation and padding of its own, which its file may switch on."""
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.no_truncation()
    backend.no_padding()
    return backend


def load_held_out(task: Task, path: Path, tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> Dataset:
    """A file with the task's text columns, read as `_as_own_file` says; with `labels` where it has their column and
    they are not all missing."""
    task = _as_own_file(task, path)
    split = "dev" if _has_labels(task, path) else "test"
    return tokenize(load_split(task, path, split), tokenizer, max_seq_length)


def _has_labels(task: Task, path: Path) -> bool:
    """Whether a file has the labels' column, and not all of them are missing."""
    files = task.own_files or GlueFiles(task)
    table = files.read(path)
    return table.has(files.label_names) and any(label is not None for label in files.labels(table))


def columns_of_file(task: Task, path: Path) -> dict[str, list[str]]:
    """A test file's texts, and its labels where it has their columns, by the columns' names, as a CSV file has them;
    empty where missing."""
    files = task.own_files or GlueFiles(task)
    table = files.read(path)
    names = [*task.columns, *(files.label_names if table.has(files.label_names) else [])]
    return {name: [field or "" for field in files.fields(table, name)] for name in names}


def load_unlabelled(task: Task, path: Path, tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> Dataset:
    """A file's texts, read as `_as_own_file` says, as training rows without labels, whatever labels it has."""
    return tokenize(load_split(_as_own_file(task, path), path, "train", "none"), tokenizer, max_seq_length)


def _as_own_file(task: Task, path: Path) -> Task:
    """The task of a file that is not one of its own: read as the user's own files are, or, where it is a .tsv of a GLUE
    task, as GLUE's; of plain text, a text a line. Raises InputError for plain text where the task has pairs."""
    if ending(path) == PLAIN:
        if len(task.columns) > 1:
            raise InputError(f"{path}: a text a line, and {task.name} has pairs of texts")
        task = replace(task, columns=(TEXT,))
    if task.own_files is None and ending(path) != ".tsv":
        task = replace(task, own_files=OwnFiles(task.label_column))
    return task


@dataclass(frozen=True)
class TaskDatasets:
    """A task's tokenised splits: `dev` and `test` by split name (two of each for MNLI)."""

    train: Dataset | None
    dev: dict[str, Dataset]
    test: dict[str, Dataset]


def load_datasets(
    task: Task,
    file: Callable[[str], Path],
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
    splits: list[str],
    unlabelled: Collection[str] = (),
) -> TaskDatasets:
    """Read and tokenise the `splits` asked for, of "train", "dev" and "test".

    `file` gives the path of one of the task's files by its name. unlabelled: of "train" and "dev" those that may be
    without labels where the files are the user's own: rows of the first, and the whole file of the second. A test file
    that need not be there, and is not, is reported and left out.
    """

    def load(name: str, split: str) -> Dataset:
        paths, labels = [file(name)], "all"
        if task.own_files and split == "train":
            paths = several("--train_file", name)
        if task.own_files and split in unlabelled:
            labels = "some" if split == "train" or _has_labels(task, paths[0]) else "none"
        rows = [load_split(task, path, split, labels) for path in paths]
        return tokenize(concatenate_datasets(rows), tokenizer, max_seq_length)

    wanted = list(task.test) if "test" in splits else []
    for split in [split for split in wanted if split in task.optional and not file(task.test[split]).exists()]:
        wanted.remove(split)
        print(
            f"no {task.test[split]} as seen from the {task.name} folder: {task.submission[split]} is not written; "
            "download_glue_data.py fetches it"
        )
    return TaskDatasets(
        train=load(task.train, "train") if "train" in splits else None,
        dev={split: load(name, "dev") for split, name in task.dev.items()} if "dev" in splits else {},
        test={split: load(task.test[split], "test") for split in wanted},
    )
