"""What the models of finished runs cost to keep and to run."""

import importlib.util
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoModelForSequenceClassification

from bert_finetune.errors import reading
from bert_finetune.footprint import Footprint, classifying, milliseconds_each
from deploy.classify import ENGINES, INT8, batch_of
from experiments.comparison import TEACHER
from experiments.finished_runs import FinishedRun

# By (size, method).
Footprints = dict[tuple[str | None, str], Footprint]
# Of each tensor of a model: its shape and bytes.
Tensors = dict[str, tuple[tuple[int, ...], int]]

# Speed is timed on sequences of this many tokens, so many at once.
_BATCH, _TOKENS = 8, 64


def model_footprints(runs: list[FinishedRun], timed: bool) -> tuple[Footprints, str]:
    """The footprint of each (size, method), by the first of its runs whose model is there, and how speed was measured.

    timed: time one model of each architecture and the teacher, in turns, in float32, and one export with int8 weights
    of each architecture; where there is no teacher's model nothing is timed. Models of one architecture get one time:
    what differs between them is chance.
    """
    folders: dict[tuple[str | None, str], Path] = {}
    for run in runs:
        if (run.size, run.method) not in folders and _tensors(run.folder):
            folders[run.size, run.method] = run.folder
    if not folders:
        return {}, ""
    if not any(method == TEACHER for _, method in folders):
        candidates = filter(None, (run.teacher_folder for run in runs))
        folders.update(((None, TEACHER), folder) for folder in candidates if _tensors(folder))
    tensors = {key: _tensors(folder) for key, folder in folders.items()}
    milliseconds, int8, conditions = {}, {}, ""
    if timed and len(folders) > 1 and any(method == TEACHER for _, method in folders):
        architectures = {_architecture(tensors[key]): folder for key, folder in reversed(folders.items())}
        exports = {
            _architecture(_tensors(run.folder)): run.folder / "onnx" / INT8
            for run in runs
            if (run.folder / "onnx" / INT8).is_file() and importlib.util.find_spec(ENGINES[".onnx"].package)
        }
        exports = {architecture: path for architecture, path in exports.items() if architecture in architectures}
        milliseconds, int8, conditions = _time(architectures, exports)
    return {
        key: Footprint(
            parameters=sum(math.prod(shape) for shape, _ in parts.values()),
            megabytes=sum(size for _, size in parts.values()) / 1e6,
            milliseconds=milliseconds.get(_architecture(parts)),
            int8_milliseconds=int8.get(_architecture(parts)),
        )
        for key, parts in tensors.items()
    }, conditions


def speed_up(footprints: Footprints, size: str | None, method: str) -> float | None:
    """How many times as fast as the teacher; None where that was not measured."""
    own = footprints.get((size, method))
    if own is None or own.milliseconds is None:
        return None
    teacher = next(footprint for (_, name), footprint in footprints.items() if name == TEACHER)
    return teacher.milliseconds / own.milliseconds


def _tensors(folder: Path) -> Tensors:
    """From the header of the folder's model file; empty without a model."""
    found = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with reading(str(path)), safe_open(path, "np") as file:
            for name in file.keys():  # noqa: SIM118 (no dictionary)
                part = file.get_slice(name)
                shape, bits = tuple(part.get_shape()), int(re.search(r"\d+", part.get_dtype())[0])
                found[name] = shape, math.prod(shape) * bits // 8
    return found


def _architecture(tensors: Tensors) -> frozenset:
    return frozenset((name, shape) for name, (shape, _) in tensors.items())


def _time(
    folders: dict[frozenset, Path], exports: dict[frozenset, Path]
) -> tuple[dict[frozenset, float], dict[frozenset, float], str]:
    """Milliseconds a sentence of each model, and of each export (on a CPU), in turns on one batch of made-up tokens;
    and these conditions in words."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = []
    for folder in folders.values():
        with reading(str(folder)):
            model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
        models.append(model.eval().to(device))
    tokens = min([_TOKENS, *(getattr(model.config, "max_position_embeddings", _TOKENS) - 2 for model in models)])
    known = min(model.config.vocab_size for model in models)
    ids = torch.randint(known, (_BATCH, tokens), generator=torch.Generator().manual_seed(0)).to(device)
    works = [classifying(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}) for model in models]
    exports = exports if device == "cpu" else {}
    works += [_running(path, ids.cpu().numpy()) for path in exports.values()]
    each = milliseconds_each(works, _BATCH, most=9)
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU (threads: {torch.get_num_threads()})"
    conditions = (
        f"Speed-up: on a batch of {_BATCH} x {tokens} made-up tokens, {where}, float32, one model an architecture."
    )
    return dict(zip(folders, each, strict=False)), dict(zip(exports, each[len(folders) :], strict=True)), conditions


def _running(path: Path, ids: np.ndarray) -> Callable[[], object]:
    """What runs an exported graph on a batch of tokens."""
    engine = ENGINES[path.suffix]
    with reading(str(path)):
        graph = engine.open(path, torch.get_num_threads(), spin=False)
    inputs = batch_of(graph, ids)
    return lambda: graph(inputs)
