"""From files to tokenised datasets.

    read_tsv -> load_split -> tokenize, and load_datasets for all of a task's splits

GLUE's files are tab-separated text without quoting: a row ends at a line feed and nowhere else (Unicode line
separators, carriage returns, quotes and NULs are text), and the fields are whatever stands between two tabs.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from bert_finetune.errors import InputError
from bert_finetune.glue import Task


@dataclass(frozen=True)
class Table:
    """A file's rows as text fields; `first_line` is the line number of `rows[0]` (1 without a header line)."""

    path: Path
    columns: tuple[str, ...]
    rows: list[list[str]]
    first_line: int

    def column(self, name: str) -> int:
        """The position of the column `name`."""
        if name not in self.columns:
            raise InputError(f"{self.path}: no column {name!r}; its columns are {', '.join(self.columns)}")
        return self.columns.index(name)


def read_tsv(path: Path, headerless: tuple[str, ...] = ()) -> Table:
    """Read a tab-separated file exactly: every line a row, no quoting, no row or character changed.

    `headerless`: the columns of a file that may come without a header line; it is taken to have none when its first
    row has as many fields as that and is not made of column names. A byte-order mark and the carriage return of a
    Windows line end are dropped.
    Raises InputError for a file that is missing, empty or not UTF-8.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; fetch it with download_glue_data.py or check --data_dir") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: not UTF-8 text; save the file as UTF-8") from None
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    rows = [line.removesuffix("\r").split("\t") for line in lines]
    if rows and len(rows[0]) == len(headerless) and not set(rows[0]) & set(headerless):
        return Table(path, headerless, rows, first_line=1)
    if len(rows) < 2:
        raise InputError(f"{path}: the file holds no row of data")
    return Table(path, tuple(rows[0]), rows[1:], first_line=2)


def load_split(task: Task, path: Path, split: str) -> Dataset:
    """One file of a task as a dataset with columns `text_a`, `text_b` (pairs only) and `label` (not for a test file).

    `split` is "train", "dev" or "test". Labels are class ids in the order of `task.class_names`, or the regression
    target as a float. Rows with too few fields are an error that names the line; where the official file is known to
    hold some (QQP's train and dev) they are counted, reported and left out, and in a test file they are reported and
    kept with the missing text empty, so that row i of the file stays prediction i.
    """
    table = read_tsv(path, task.headerless)
    text_columns = [table.column(name) for name in task.columns]
    label_column = table.column(task.label_column) if split != "test" else None
    needed = max([*text_columns, label_column or 0]) + 1
    columns = {name: [] for name in ("text_a", "text_b")[: len(text_columns)]} | (
        {} if split == "test" else {"label": []}
    )
    short_lines = []
    for line, row in enumerate(table.rows, start=table.first_line):
        if len(row) < needed:
            if split != "test" and split not in task.skips_short_rows:
                raise InputError(
                    f"{path}, line {line}: {len(row)} tab-separated fields where {needed} are needed; "
                    "mend or remove the row"
                )
            short_lines.append(line)
            if split != "test":
                continue
            row = row + [""] * (needed - len(row))
        for name, position in zip(("text_a", "text_b"), text_columns, strict=False):
            columns[name].append(row[position])
        if label_column is not None:
            columns["label"].append(_label(task, row[label_column], path, line))
    if short_lines:
        shown = ", ".join(map(str, short_lines[:5])) + (", ..." if len(short_lines) > 5 else "")
        fate = "kept with empty text" if split == "test" else "left out"
        print(f"{path}: {len(short_lines)} rows with too few fields {fate} (lines {shown})")
    if not columns["text_a"]:
        raise InputError(f"{path}: the file holds no usable row of data")
    return Dataset.from_dict(columns)


def _label(task: Task, text: str, path: Path, line: int) -> int | float:
    if task.is_regression:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not 0 <= value <= 5:  # NaN fails this too
            raise InputError(f"{path}, line {line}: {text!r} is not a score between 0 and 5")
        return value
    if text not in task.labels:
        raise InputError(f"{path}, line {line}: label {text!r} is not one of {task.name}'s: {', '.join(task.labels)}")
    return list(task.labels).index(text)


def tokenize(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> Dataset:
    """Texts to model inputs (`input_ids`, `attention_mask`, `token_type_ids` where the model has them) and `labels`.

    Nothing is padded here. A pair that is too long loses tokens from the end of its longer sentence until it fits;
    where both are cut to an odd total, the first keeps the extra token, as in the original BERT code (fast tokenizers
    leave it to the second).
    """
    # The tokenizer's own truncation and padding, which its file may switch on, would come before ours.
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.no_truncation()
    backend.no_padding()
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
    train: bool,
    test: bool,
) -> TaskDatasets:
    """Read and tokenise the splits a run needs: dev always, `train` and `test` where asked for.

    `file` gives the path of one of the task's files by its name. A test file that need not be there, and is not, is
    reported and left out.
    """

    def load(name: str, split: str) -> Dataset:
        return tokenize(load_split(task, file(name), split), tokenizer, max_seq_length)

    left_out = {split for split in task.optional if test and not file(task.test[split]).exists()}
    for split in left_out:
        print(
            f"no {task.test[split]} as seen from the {task.name} folder: {task.submission[split]} is not written; "
            "download_glue_data.py fetches it"
        )
    return TaskDatasets(
        train=load(task.train, "train") if train else None,
        dev={split: load(name, "dev") for split, name in task.dev.items()},
        test={split: load(name, "test") for split, name in task.test.items() if test and split not in left_out},
    )
