"""A frozen teacher's answers, computed once and kept: it gives the same ones in every epoch."""

import contextlib
import hashlib
import math
import os
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
import transformers
from datasets import Dataset
from filelock import FileLock
from transformers import PreTrainedModel

from bert_emd.layer_outputs import LayerOutputs, layer_outputs
from bert_finetune.digests import data_digest, weights_digest
from bert_finetune.errors import InputError, writing

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Layout:
    """What is kept of a teacher for each example.

    shapes: part -> its shape for one example, in which 0 stands for the example's length; "embedding" (1, length,
        width), "hidden" (layers, length, width), "attention" (layers, heads, length, length) for scores, or (layers, 2,
        heads, length, head size) for their factors.
    classes: logits of an example, 0 where they are not looked at. layers: of the teacher.
    """

    shapes: dict[str, tuple[int, ...]]
    classes: int
    layers: int

    @classmethod
    @torch.no_grad()
    def of(cls, teacher: PreTrainedModel, parts: frozenset[str]) -> "Layout":
        """Found from the teacher's outputs for one token."""
        outputs = layer_outputs(teacher, parts, input_ids=torch.ones(1, 1, dtype=torch.long, device=teacher.device))
        shapes = {}
        if "embedding" in parts:
            shapes["embedding"] = (1, 0, outputs.hidden_states[0].shape[-1])
        if "hidden" in parts:
            shapes["hidden"] = (len(outputs.hidden_states) - 1, 0, outputs.hidden_states[1].shape[-1])
        if "attention" in parts:
            layers, first = len(outputs.attention), outputs.attention[0].shape
            shapes["attention"] = (layers, first[1], 0, 0) if len(first) == 4 else (layers, 2, first[2], 0, first[4])
        classes = outputs.logits.shape[-1] if "logits" in parts else 0
        return cls(shapes, classes, teacher.config.num_hidden_layers)

    def shape(self, part: str, length: int) -> tuple[int, ...]:
        """Of a part of an example with `length` tokens."""
        return tuple(size or length for size in self.shapes[part])

    def size(self, length: int) -> int:
        """Values of an example with `length` tokens, without its logits."""
        return sum(math.prod(self.shape(part, length)) for part in self.shapes)

    def split(self, values: torch.Tensor, length: int) -> dict[str, torch.Tensor]:
        """The parts of an example, as views of all its values (size(length),)."""
        shapes = {part: self.shape(part, length) for part in self.shapes}
        pieces = values.split([math.prod(shape) for shape in shapes.values()])
        return {part: piece.view(shape) for (part, shape), piece in zip(shapes.items(), pieces, strict=True)}


@dataclass(frozen=True)
class CachePlan:
    """A cache that is not opened yet: of what, where, how large (`size` in bytes)."""

    layout: Layout
    lengths: list[int]
    dtype: str
    folder: Path | None
    device: torch.device
    size: int

    @property
    def missing(self) -> int:
        """Bytes that are not there yet."""
        there = self.folder.glob("*") if self.folder else ()
        return max(0, self.size - sum(path.stat().st_blocks * 512 for path in there))

    def __str__(self) -> str:
        where = f"in {self.folder}" if self.folder else f"in memory ({self.device.type})"
        each = self.size / len(self.lengths) / 1e6
        return f"teacher cache: {self.size / 1e9:.2f} GB {where}, {len(self.lengths)} x {each:.1f} MB, {self.dtype}"

    def open(self) -> "TeacherCache":
        return TeacherCache(self.layout, self.lengths, self.dtype, self.folder, "cpu" if self.folder else self.device)


class TeacherCache:
    """The teacher's answers for the examples of a training set, each kept from the first time it is asked for.

    lengths: tokens of each example. dtype: "bfloat16" or "float32". `folder`: where the answers lie, memory-mapped, so
    that a run that goes on after a kill, or another one with the same teacher and data, also at the same time, finds
    them; None keeps them in the memory of `device`.

    What `answers` returns are always the kept values, also the first time, and what is kept stays, so that every epoch
    sees the same. With each example lies a checksum: what a killed run left unfinished is computed anew. Only real
    tokens are kept, the first of each row; padding, on the right, comes back as zeros, which is right for costs that
    do not count it.
    """

    def __init__(
        self,
        layout: Layout,
        lengths: list[int],
        dtype: str = "bfloat16",
        folder: Path | None = None,
        device: torch.device | str = "cpu",
    ):
        self.layout = layout
        self._lengths = lengths
        self._starts = np.concatenate([[0], np.cumsum([layout.size(length) for length in lengths])]).tolist()
        shapes = {
            "values": ((self._starts[-1],), _DTYPES[dtype]),
            "logits": ((len(lengths), layout.classes), torch.float32),
            "checksums": ((len(lengths),), torch.int64),
        }
        self._on_disk = folder is not None
        self._writing = contextlib.nullcontext()  # held by one run at a time
        if self._on_disk:
            folder.mkdir(parents=True, exist_ok=True)
            self._writing = FileLock(folder / "lock")
            with self._writing:
                arrays = {name: _mapped(folder / name, *shape) for name, shape in shapes.items()}
        else:
            arrays = {name: torch.zeros(shape, dtype=dtype, device=device) for name, (shape, dtype) in shapes.items()}
        self._values, self._logits, self._checksums = arrays["values"], arrays["logits"], arrays["checksums"]
        self._verified = torch.zeros(len(lengths), dtype=torch.bool)

    def knows(self, examples: torch.Tensor) -> bool:
        """Whether the answers for all of `examples` (their numbers in the training set) are kept and whole."""
        return all(map(self._knows, examples.tolist()))

    def _knows(self, k: int) -> bool:
        if not self._verified[k] and self._on_disk:
            self._verified[k] = bool(self._checksums[k]) and int(self._checksums[k]) == self._checksum(k)
        return bool(self._verified[k])

    def keep(self, examples: torch.Tensor, outputs: LayerOutputs) -> None:
        """Keep the teacher's `outputs` for those of a batch that are not known yet."""
        sources = {
            "embedding": lambda: torch.stack(outputs.hidden_states[:1], dim=1),
            "hidden": lambda: torch.stack(outputs.hidden_states[1:], dim=1),
            # (batch, layers, ...), the batch before a factor's 2
            "attention": lambda: torch.stack([layer.movedim(-4, 0) for layer in outputs.attention], dim=1),
        }
        batch = {part: sources[part]() for part in self.layout.shapes}
        with self._writing:
            for row, k in enumerate(examples.tolist()):
                if self._knows(k):  # perhaps from another run, a moment ago
                    continue
                for part, kept in self._parts(k).items():
                    kept.copy_(batch[part][row][tuple(slice(size) for size in kept.shape)])
                if self.layout.classes:
                    self._logits[k] = outputs.logits[row]
                if self._on_disk:
                    self._checksums[k] = self._checksum(k)
                self._verified[k] = True

    def answers(self, examples: torch.Tensor, attention_mask: torch.Tensor) -> LayerOutputs:
        """The kept answers for a batch, in the form `layer_outputs` gives them, on the batch's device: layers in the
        precision they are kept in, logits in float32."""
        (batch, length), device = attention_mask.shape, attention_mask.device
        padded = {}
        for part in self.layout.shapes:
            layers, *rest = self.layout.shape(part, length)
            padded[part] = torch.zeros(layers, batch, *rest, dtype=self._values.dtype, device=self._values.device)
        for row, k in enumerate(examples.tolist()):
            for part, kept in self._parts(k).items():
                padded[part][:, row][tuple(slice(size) for size in kept.shape)] = kept
        padded = {part: values.to(device) for part, values in padded.items()}
        states, attention, logits = None, None, None
        if "hidden" in padded or "embedding" in padded:
            first = padded["embedding"].unbind() if "embedding" in padded else (None,)
            states = (*first, *(padded["hidden"].unbind() if "hidden" in padded else [None] * self.layout.layers))
        if "attention" in padded:
            attention = padded["attention"]
            attention = (attention if attention.dim() == 5 else attention.movedim(1, 2)).unbind()
        if self.layout.classes:
            logits = self._logits[examples.to(self._logits.device)].to(device)
        return LayerOutputs(logits, states, attention)

    def _parts(self, k: int) -> dict[str, torch.Tensor]:
        return self.layout.split(self._values[self._starts[k] : self._starts[k + 1]], self._lengths[k])

    def _checksum(self, k: int) -> int:
        # 1 is added so that no checksum is 0, which stands for an example that has not been kept.
        values = self._values[self._starts[k] : self._starts[k + 1]]
        return zlib.crc32(self._logits[k].numpy(), zlib.crc32(values.view(torch.uint8).numpy())) + 1


def _mapped(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor whose memory is the file `path`, made anew (all zero) where it is not there in this size."""
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return torch.zeros(shape, dtype=dtype)
    if not path.exists() or path.stat().st_size != size:
        try:
            with writing(path), open(path, "wb") as file:
                # All of its room is taken now: a disk that is full later could only kill the process.
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)
                else:  # macOS
                    file.truncate(size)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
    return torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=dtype).view(shape)


def plan_cache(
    choice: str,
    dtype: str,
    folder: Path,
    teacher: PreTrainedModel,
    parts: frozenset[str],
    data: Dataset,
    device: torch.device,
    worthwhile: bool,
    lasting: bool = False,
    variant: str = "",
) -> CachePlan | None:
    """The cache that `choice` asks for, or None; nothing is written yet.

    choice: "memory" (of `device`), "disk" (below `folder`, in a sub-folder named after teacher and data), "none", or
    "auto": where it is `worthwhile` and takes no more than half of what is free, a GPU's memory, or beside a CPU the
    disk. lasting: `folder` stays for further runs, which is always worthwhile, and on disk. variant: what else the
    answers depend on. Raises InputError where what is asked for does not fit.
    """
    if choice == "none" or (choice == "auto" and not (worthwhile or lasting)):
        return None
    asked = choice
    if choice == "auto":
        choice = "disk" if lasting or device.type == "cpu" else "memory"
    layout, lengths = Layout.of(teacher, parts), [len(ids) for ids in data["input_ids"]]
    values = sum(map(layout.size, lengths))
    size = values * _DTYPES[dtype].itemsize + len(lengths) * (layout.classes * 4 + 8)
    place = folder / _key(teacher, data, f"{layout} {dtype} {variant}")[:16] if choice == "disk" else None
    plan = CachePlan(layout, lengths, dtype, place, device, size)
    free = _free_disk(folder) if place else _free_memory(device)
    if plan.missing > (free / 2 if asked == "auto" else free):
        if asked == "auto":
            return None
        raise InputError(
            f"--teacher_cache {choice}: the teacher's answers need {plan.missing / 1e9:.1f} GB, "
            f"and {free / 1e9:.1f} GB are free; use another place, or none"
        )
    return plan


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def _free_disk(folder: Path) -> int:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    return shutil.disk_usage(existing).free


def _key(teacher: PreTrainedModel, data: Dataset, kept: str) -> str:
    """A digest of all that the answers depend on: the teacher's weights and configuration, its inputs, what is kept,
    and what computes it."""
    computed = f"{torch.__version__} {transformers.__version__} {teacher.device.type} "
    computed += torch.get_float32_matmul_precision()
    inputs = data.remove_columns([name for name in ("labels",) if name in data.column_names])
    text = " ".join((kept, teacher.config.to_json_string(), computed, weights_digest(teacher), data_digest([inputs])))
    return hashlib.sha256(text.encode()).hexdigest()
