"""SHA-256 of what a run depends on, so that it is known again."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from bert_finetune.soft_labels import TEACHER_LOGITS

_CHUNK = 1 << 20  # bytes
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_TARGETS = ("labels", TEACHER_LOGITS)


def file_digest(path: Path) -> str:
    """Of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def weights_digest(model: nn.Module) -> str:
    """Of a model's parameters and buffers, with their names."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def data_digest(datasets: Iterable[Dataset]) -> str:
    """Of tokenised examples, with their labels and soft labels where they have them."""
    digest = hashlib.sha256()
    for data in datasets:
        for name in (*_INPUTS, *_TARGETS):
            if name in data.column_names:
                digest.update(name.encode())
                for row in data[name]:
                    digest.update(np.asarray(row, dtype=float if name in _TARGETS else np.int64).tobytes() + b"|")
    return digest.hexdigest()
