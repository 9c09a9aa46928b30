"""From files to tokenised datasets.

read_table -> load_split -> tokenize, and load_datasets for all of a task's splits
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from bert_finetune.errors import InputError
from bert_finetune.glue import TASKS, Task
from bert_finetune.tables import Table, read_table


def load_split(task: Task, path: Path, split: str) -> Dataset:
    """One file of a task as a dataset with columns `text_a`, `text_b` (pairs only) and `label` (not for a test file).

    `split` is "train", "dev" or "test". Labels are what the task's kind reads from their text. Rows with too few fields
    are an error that names the line; where the official file is known to hold some (QQP's train and dev) they are
    counted, reported and left out, and in a test file they are reported and kept with the missing text empty, so that
    row i of the file stays prediction i.
    """
    if task.name in TASKS and not path.exists():
        raise InputError(f"{path}: no such file; fetch it with download_glue_data.py or check --data_dir")
    table = read_table(path, task.headerless)
    text_columns = [table.column(name) for name in task.columns]
    label_column = table.column(task.label_column) if split != "test" else None
    needed = max([*text_columns, label_column or 0]) + 1
    columns = {name: [] for name in ("text_a", "text_b")[: len(text_columns)]} | (
        {} if split == "test" else {"label": []}
    )
    short = []
    for k, row in enumerate(table.rows):
        if len(row) < needed:
            if split != "test" and split not in task.skips_short_rows:
                raise InputError(
                    f"{table.place(k)}: {len(row)} tab-separated fields where {needed} are needed; "
                    "mend or remove the row"
                )
            short.append(str(table.numbers[k]))
            if split != "test":
                continue
            row = row + [""] * (needed - len(row))
        for name, position in zip(("text_a", "text_b"), text_columns, strict=False):
            columns[name].append(_present(row[position], table, k, position))
        if label_column is not None:
            label = _present(row[label_column], table, k, label_column)
            try:
                columns["label"].append(task.kind.read(label, task.name))
            except ValueError as error:
                raise InputError(f"{table.place(k)}: {error}") from error
    if short:
        shown = ", ".join(short[:5]) + (", ..." if len(short) > 5 else "")
        fate = "kept with empty text" if split == "test" else "left out"
        print(f"{path}: {len(short)} rows with too few fields {fate} (lines {shown})")
    if not columns["text_a"]:
        raise InputError(f"{path}: the file holds no usable row of data")
    return Dataset.from_dict(columns)


def _present(value: str | None, table: Table, k: int, position: int) -> str:
    if value is None:
        raise InputError(f"{table.place(k)}: no value in column {table.columns[position]!r}")
    return value


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
    splits: list[str],
) -> TaskDatasets:
    """Read and tokenise the `splits` asked for, of "train", "dev" and "test".

    `file` gives the path of one of the task's files by its name. A test file that need not be there, and is not, is
    reported and left out.
    """

    def load(name: str, split: str) -> Dataset:
        return tokenize(load_split(task, file(name), split), tokenizer, max_seq_length)

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
