"""Datasets of the Hugging Face hub, or of a folder as the hub has them, as Parquet files for the time of a run."""

import functools
import tempfile
from pathlib import Path

from datasets import load_dataset
from datasets.exceptions import DatasetsError

from bert_finetune.errors import InputError, reason


@functools.cache
def dataset_file(name: str, config: str | None, split: str) -> Path:
    """A split of a dataset as a file, which is there as long as the process; ClassLabels keep their classes' names.

    name: on the hub, or a folder. No code of a dataset is run: the datasets package does not know how to any more.
    Raises InputError for one that is not there or cannot be read.
    """
    what = " ".join(filter(None, (f"--dataset_name {name}", config and f"--dataset_config {config}")))
    try:
        rows = load_dataset(name, config, split=split)
        path = Path(_folder().name) / f"{Path(name).name}-{split}.parquet"
        rows.to_parquet(path)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise InputError(f"{what}, split {split}: {reason(error)}") from error
    return path


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="dataset-")
