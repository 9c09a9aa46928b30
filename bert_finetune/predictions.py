"""Test-set predictions in the form the GLUE server takes."""

from pathlib import Path

import numpy as np

from bert_finetune.files import write_atomically
from bert_finetune.glue import Task
from bert_finetune.metrics import predictions_from_logits
from bert_finetune.submission import as_file


def write_predictions(task: Task, split: str, logits: np.ndarray, folder: str | Path) -> Path:
    """Write `index<TAB>prediction` rows, one for each row of the test file in its order, and return the file's path.

    The prediction is the label as GLUE's files write it (a class name for MNLI, QNLI and RTE, 0 or 1 elsewhere), for a
    task of the user's own the model's class name;
    for regression a number, for STS-B kept within 0 and 5 as the server demands.
    """
    predictions = predictions_from_logits(task, logits)
    if task.is_regression:
        written = [f"{value:.6g}" for value in np.clip(predictions, *task.score_range)]
    else:
        labels = task.class_names if task.predicts_names else list(task.labels)
        written = [labels[k] for k in predictions]
    path = Path(folder) / task.submission[split]
    write_atomically(path, as_file(written))
    return path
