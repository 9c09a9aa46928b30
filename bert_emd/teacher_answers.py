"""A frozen teacher's answers, computed once and kept: it gives the same ones in every epoch."""

import contextlib
import functools
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
from bert_emd.teacher_cache import ABOUT, Cache, caches_in, claim, surplus
from bert_finetune.digests import data_digest, weights_digest
from bert_finetune.errors import InputError, writing
from bert_finetune.files import write_json
from bert_finetune.soft_labels import TEACHER_LOGITS

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Layout:
    """What is kept of a teacher for each example.

    shapes: part -> its shape for one example, in which 0 stands for the example's length; "embedding" (1, length,
        width), "hidden" (layers, length, width), "attention" (layers, heads, length, length) for scores, or (layers, 2,
        heads, length, head size) for their factors, "logits" (classes,).
    layers: of the teacher.
    """

    shapes: dict[str, tuple[int, ...]]
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
        if "logits" in parts:
            shapes["logits"] = (outputs.logits.shape[-1],)
        return cls(shapes, teacher.config.num_hidden_layers)

    def shape(self, part: str, length: int) -> tuple[int, ...]:
        """Of a part of an example with `length` tokens."""
        return tuple(size or length for size in self.shapes[part])

    def size(self, part: str, length: int) -> int:
        """Values of a part of an example with `length` tokens."""
        return math.prod(self.shape(part, length))

    def file(self, part: str) -> str:
        """A part's name in a cache's folder, where runs whose losses look at other parts find it too."""
        return f"{part}-{'x'.join(str(size or 'L') for size in self.shapes[part])}"


def _files(folder: Path, layout: Layout, part: str) -> tuple[Path, Path]:
    """Of a part's values, and of their checksums."""
    return folder / layout.file(part), folder / f"{layout.file(part)}.checksums"


def _dtype(part: str, dtype: str) -> torch.dtype:
    return torch.float32 if part == "logits" else _DTYPES[dtype]


@dataclass(frozen=True)
class CachePlan:
    """A cache that is not opened yet: of what, where, and in how much room.

    limit: bytes that all caches beside `folder` may take with it. about: what the cache is, for who lists them.
    """

    layout: Layout
    lengths: list[int]
    dtype: str
    folder: Path | None
    device: torch.device
    limit: float
    about: dict

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        """Part -> bytes, with a checksum for each example."""
        return {
            part: sum(self.layout.size(part, length) for length in self.lengths) * _dtype(part, self.dtype).itemsize
            + len(self.lengths) * 8
            for part in self.layout.shapes
        }

    @property
    def missing(self) -> int:
        """Bytes that are not there yet."""
        missing = 0
        for part, size in self.sizes.items():
            there = _files(self.folder, self.layout, part) if self.folder else ()
            missing += max(0, size - sum(path.stat().st_blocks * 512 for path in there if path.exists()))
        return missing

    def giving_way(self) -> list[Cache]:
        """Other caches that have to go for this one."""
        return surplus(self.folder.parent, self.limit - self.missing, spare=self.folder) if self.folder else []

    def __str__(self) -> str:
        where = f"in {self.folder}" if self.folder else f"in memory ({self.device.type})"
        size = sum(self.sizes.values())
        each = size / len(self.lengths) / 1e6
        return f"teacher cache: {size / 1e9:.2f} GB {where}, {len(self.lengths)} x {each:.1f} MB, {self.dtype}"

    def open(self) -> "TeacherCache":
        """Make it, or find it; what has to go for it is removed, and named."""
        for cache in self.giving_way():
            told = str(cache)
            if cache.remove():
                print(f"teacher cache: removed {told}; --teacher_cache_limit {self.limit / 1e9:g}")
        device = "cpu" if self.folder else self.device
        return TeacherCache(self.layout, self.lengths, self.dtype, self.folder, device, self.about)


class TeacherCache:
    """The teacher's answers for the examples of a training set, each kept from the first time it is asked for.

    lengths: tokens of each example. dtype: "bfloat16" or "float32". `folder`: where the answers lie, memory-mapped, so
    that a run that goes on after a kill, or another one with the same teacher and data, also at the same time, finds
    them; None keeps them in the memory of `device`. about: what is kept, written down in `folder`.

    What `answers` returns are always the kept values, also the first time, and what is kept stays, so that every epoch
    sees the same. With each example's parts lie checksums: what a killed run left unfinished is computed anew. Only
    real tokens are kept, the first of each row; padding, on the right, comes back as zeros, which is right for costs
    that do not count it.
    """

    def __init__(
        self,
        layout: Layout,
        lengths: list[int],
        dtype: str = "bfloat16",
        folder: Path | None = None,
        device: torch.device | str = "cpu",
        about: dict | None = None,
    ):
        self.layout = layout
        self._writing = contextlib.nullcontext()  # held by one run at a time
        if folder is not None:
            self._in_use = claim(folder)
            self._writing = FileLock(folder / "lock")
        with self._writing:
            if folder is not None and about is not None:
                write_json(folder / ABOUT, about)
            self._parts = {
                part: _Part(layout, part, lengths, _dtype(part, dtype), folder, device) for part in layout.shapes
            }

    def knows(self, examples: torch.Tensor) -> bool:
        """Whether the answers for all of `examples` (their numbers in the training set) are kept and whole."""
        return all(part.knows(k) for k in examples.tolist() for part in self._parts.values())

    def keep(self, examples: torch.Tensor, outputs: LayerOutputs) -> None:
        """Keep those of the teacher's `outputs` for a batch that are not known yet."""
        sources = {
            "embedding": lambda: torch.stack(outputs.hidden_states[:1], dim=1),
            "hidden": lambda: torch.stack(outputs.hidden_states[1:], dim=1),
            # (batch, layers, ...), the batch before a factor's 2
            "attention": lambda: torch.stack([layer.movedim(-4, 0) for layer in outputs.attention], dim=1),
            "logits": lambda: outputs.logits,
        }
        batch = {name: sources[name]() for name in self._parts}
        with self._writing:
            for name, part in self._parts.items():
                for row, k in enumerate(examples.tolist()):
                    if not part.knows(k):  # else perhaps from another run, a moment ago
                        part.keep(k, batch[name][row])

    def answers(self, examples: torch.Tensor, attention_mask: torch.Tensor) -> LayerOutputs:
        """The kept answers for a batch, in the form `layer_outputs` gives them, on the batch's device: layers in the
        precision they are kept in, logits in float32."""
        length, device, numbers = attention_mask.shape[1], attention_mask.device, examples.tolist()
        padded = {
            name: part.padded(numbers, length).to(device) for name, part in self._parts.items() if name != "logits"
        }
        states, attention, logits = None, None, None
        if "hidden" in padded or "embedding" in padded:
            first = padded["embedding"].unbind() if "embedding" in padded else (None,)
            states = (*first, *(padded["hidden"].unbind() if "hidden" in padded else [None] * self.layout.layers))
        if "attention" in padded:
            attention = padded["attention"]
            attention = (attention if attention.dim() == 5 else attention.movedim(1, 2)).unbind()
        if "logits" in self._parts:
            logits = torch.stack([self._parts["logits"][k] for k in numbers]).to(device)
        return LayerOutputs(logits, states, attention)


class _Part:
    """One part of all examples' answers, flat and one after the other, with a checksum for each."""

    def __init__(
        self,
        layout: Layout,
        name: str,
        lengths: list[int],
        dtype: torch.dtype,
        folder: Path | None,
        device: torch.device | str,
    ):
        self._layout, self._name, self._lengths = layout, name, lengths
        self._starts = np.concatenate([[0], np.cumsum([layout.size(name, length) for length in lengths])])
        size, self._on_disk = int(self._starts[-1]), folder is not None
        if self._on_disk:
            values, checksums = _files(folder, layout, name)
            self._values = _mapped(values, size, dtype)
            self._checksums = _mapped(checksums, len(lengths), torch.int64)
        else:
            self._values = torch.zeros(size, dtype=dtype, device=device)
        self._verified = torch.zeros(len(lengths), dtype=torch.bool)

    def __getitem__(self, k: int) -> torch.Tensor:
        """Of an example, without padding."""
        return self._flat(k).view(self._layout.shape(self._name, self._lengths[k]))

    def knows(self, k: int) -> bool:
        if not self._verified[k] and self._on_disk:
            self._verified[k] = bool(self._checksums[k]) and int(self._checksums[k]) == self._checksum(k)
        return bool(self._verified[k])

    def keep(self, k: int, values: torch.Tensor) -> None:
        """Of an example; `values` may be padded."""
        kept = self[k]
        kept.copy_(values[tuple(slice(size) for size in kept.shape)])
        if self._on_disk:
            self._checksums[k] = self._checksum(k)
        self._verified[k] = True

    def padded(self, examples: list[int], length: int) -> torch.Tensor:
        """Of a batch, (layers, batch, ...)."""
        first, *rest = self._layout.shape(self._name, length)
        batch = torch.zeros(first, len(examples), *rest, dtype=self._values.dtype, device=self._values.device)
        for row, k in enumerate(examples):
            kept = self[k]
            batch[:, row][tuple(slice(size) for size in kept.shape)] = kept
        return batch

    def _flat(self, k: int) -> torch.Tensor:
        return self._values[self._starts[k] : self._starts[k + 1]]

    def _checksum(self, k: int) -> int:
        # 1 is added so that no checksum is 0, which stands for an example that has not been kept.
        return zlib.crc32(self._flat(k).view(torch.uint8).numpy()) + 1


def _mapped(path: Path, size: int, dtype: torch.dtype) -> torch.Tensor:
    """`size` values whose memory is the file `path`, made anew (all zero) where it is not there in this size."""
    room = size * dtype.itemsize
    if not path.exists() or path.stat().st_size != room:
        try:
            with writing(path), open(path, "wb") as file:
                # All of its room is taken now: a disk that is full later could only kill the process.
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, room)
                else:  # macOS
                    file.truncate(room)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
    return torch.from_file(str(path), shared=True, size=size, dtype=dtype)


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
    limit: float = math.inf,
) -> CachePlan | None:
    """The cache that `choice` asks for, or None; nothing is written yet.

    choice: "memory" (of `device`), "disk" (below `folder`, in a sub-folder named after teacher and data), "none", or
    "auto": where it is `worthwhile` and takes no more than half of what is free, a GPU's memory, or beside a CPU the
    disk. lasting: `folder` stays for further runs, which is always worthwhile, and on disk. variant: what else the
    answers depend on. limit: bytes that all caches in `folder` may take, for which the least recently used go. Raises
    InputError where what is asked for does not fit.
    """
    if choice == "none" or (choice == "auto" and not (worthwhile or lasting)):
        return None
    asked = choice
    if choice == "auto":
        choice = "disk" if lasting or device.type == "cpu" else "memory"
    layout, lengths = Layout.of(teacher, parts), [len(ids) for ids in data["input_ids"]]
    place = folder / _key(teacher, data, f"{dtype} {variant}")[:16] if choice == "disk" else None
    about = {
        "teacher": teacher.name_or_path,
        "examples": len(lengths),
        "dtype": dtype,
        "torch": torch.__version__,
        "device": teacher.device.type,
    }
    plan = CachePlan(layout, lengths, dtype, place, device, limit, about)
    if place:
        going = sum(cache.size for cache in plan.giving_way())
        free, room = _free_disk(folder) + going, limit + going - sum(cache.size for cache in caches_in(folder))
    else:
        free, room = _free_memory(device), math.inf
    if asked == "auto":
        return plan if plan.missing <= min(free / 2, max(room, 0)) else None
    if plan.missing > free:
        raise InputError(
            f"--teacher_cache {choice}: the teacher's answers need {plan.missing / 1e9:.1f} GB, "
            f"and {free / 1e9:.1f} GB are free; use another place, or none"
        )
    if plan.missing > max(room, 0):
        raise InputError(
            f"--teacher_cache_limit {limit / 1e9:g}: the teacher's answers need {plan.missing / 1e9:.1f} GB, "
            f"and what is in use in {folder} leaves {max(room, 0) / 1e9:.1f} GB; give more, or --teacher_cache none"
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
    inputs = data.remove_columns([name for name in ("labels", TEACHER_LOGITS) if name in data.column_names])
    text = " ".join((kept, teacher.config.to_json_string(), computed, weights_digest(teacher), data_digest([inputs])))
    return hashlib.sha256(text.encode()).hexdigest()
