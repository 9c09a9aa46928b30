"""A frozen teacher's answers, computed once and kept: it gives the same ones in every epoch."""

import hashlib
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from bert_emd.objectives import LayerOutputs
from bert_finetune.errors import InputError

PLACES = ("auto", "memory", "disk", "none")
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Layout:
    """What is kept of a teacher for each token and each example.

    columns: part -> where it stands in a token's row; "embedding" (width), "hidden" (layers x width), "attention"
        (layers x 2 x heads x head size: the scaled queries and the keys).
    classes: logits of an example, 0 where they are not looked at.
    """

    columns: dict[str, slice]
    classes: int
    shape: tuple[int, int, int]  # layers, heads, width

    @classmethod
    def of(cls, teacher: PreTrainedModel, parts: frozenset[str]) -> "Layout":
        config = teacher.config
        layers, heads, width = config.num_hidden_layers, config.num_attention_heads, config.hidden_size
        columns, end = {}, 0
        for part, size in (("embedding", width), ("hidden", layers * width), ("attention", 2 * layers * width)):
            if part in parts:
                columns[part] = slice(end, end + size)
                end += size
        return cls(columns, config.num_labels if "logits" in parts else 0, (layers, heads, width))

    @property
    def row(self) -> int:
        """Values of a token."""
        return max((column.stop for column in self.columns.values()), default=0)


class TeacherCache:
    """The teacher's answers for the examples of a training set, each kept from the first time it is asked for.

    lengths: tokens of each example. dtype: "bfloat16" or "float32". `folder`: where the answers lie, memory-mapped, so
    that a run that goes on after a kill, or another one with the same teacher and data, finds them; None keeps them in
    the memory of `device`.

    What `answers` returns are always the kept values, also the first time, so that every epoch sees the same. With each
    example lies a checksum: what a killed run left unfinished is computed anew. Only real tokens are kept; padding
    comes back as zeros, which is right for costs that do not count it.
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
        starts = np.concatenate([[0], np.cumsum(lengths)])
        self._starts = torch.as_tensor(starts, device=device)
        shapes = {
            "tokens": ((int(starts[-1]), layout.row), _DTYPES[dtype]),
            "logits": ((len(lengths), layout.classes), torch.float32),
            "checksums": ((len(lengths),), torch.int64),
        }
        self._on_disk = folder is not None
        if self._on_disk:
            folder.mkdir(parents=True, exist_ok=True)
            arrays = {name: _mapped(folder / name, *shape) for name, shape in shapes.items()}
        else:
            arrays = {name: torch.zeros(shape, dtype=dtype, device=device) for name, (shape, dtype) in shapes.items()}
        self._tokens, self._logits, self._checksums = arrays["tokens"], arrays["logits"], arrays["checksums"]
        self._verified = torch.zeros(len(lengths), dtype=torch.bool)

    def knows(self, examples: torch.Tensor) -> bool:
        """Whether the answers for all of `examples` (their numbers in the training set) are kept and whole."""
        for k in examples.tolist():
            if not self._verified[k]:
                if not self._on_disk or not self._checksums[k] or self._checksums[k] != self._checksum(k):
                    return False
                self._verified[k] = True
        return True

    def keep(self, examples: torch.Tensor, attention_mask: torch.Tensor, outputs: LayerOutputs) -> None:
        """Keep the teacher's `outputs` for a batch."""
        real = attention_mask.bool()
        rows = self._rows(examples, real)
        for part, column in self.layout.columns.items():
            if part == "attention":
                values = torch.stack(outputs.attention_factors)  # (layers, 2, batch, heads, length, head size)
                values = values.permute(2, 4, 0, 1, 3, 5).flatten(2)
            else:
                states = outputs.hidden_states[:1] if part == "embedding" else outputs.hidden_states[1:]
                values = torch.cat(states, dim=-1)
            self._tokens[rows, column] = values[real].to(self._tokens)
        if self.layout.classes:
            self._logits[examples.to(self._logits.device)] = outputs.logits.to(self._logits)
        for k in examples.tolist():
            if self._on_disk:
                self._checksums[k] = self._checksum(k)
            self._verified[k] = True

    def answers(self, examples: torch.Tensor, attention_mask: torch.Tensor) -> LayerOutputs:
        """The kept answers for a batch, in the form `layer_outputs` gives them, on the batch's device, in float32."""
        real, device = attention_mask.bool(), attention_mask.device
        kept = self._tokens[self._rows(examples, real)].to(device, torch.float32)
        padded = torch.zeros(*real.shape, kept.shape[1], device=device)
        padded[real] = kept
        layers, heads, width = self.layout.shape
        states, factors = [None] * (layers + 1), None
        if "embedding" in self.layout.columns:
            states[0] = padded[..., self.layout.columns["embedding"]]
        if "hidden" in self.layout.columns:
            states[1:] = padded[..., self.layout.columns["hidden"]].split(width, dim=-1)
        if "attention" in self.layout.columns:
            values = padded[..., self.layout.columns["attention"]]
            values = values.view(*real.shape, layers, 2, heads, width // heads)
            factors = values.permute(2, 3, 0, 4, 1, 5).unbind()
        logits = self._logits[examples.to(self._logits.device)].to(device) if self.layout.classes else None
        with_states = {"embedding", "hidden"} & set(self.layout.columns)
        return LayerOutputs(logits, tuple(states) if with_states else None, factors)

    def _rows(self, examples: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Where the real tokens of a batch are kept, in the order of `real`'s true entries."""
        starts = self._starts[examples.to(self._starts.device)].to(real.device)
        return (starts[:, None] + real.cumsum(1) - 1)[real].to(self._tokens.device)

    def _checksum(self, k: int) -> int:
        # 1 is added so that no checksum is 0, which stands for an example that has not been kept.
        tokens = self._tokens[self._starts[k] : self._starts[k + 1]].contiguous()
        logits = self._logits[k].contiguous()
        return zlib.crc32(logits.numpy().tobytes(), zlib.crc32(tokens.view(torch.uint8).numpy())) + 1


def _mapped(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor whose memory is the file `path`, made sparse and zero where it is not there in this size."""
    size = int(np.prod(shape)) * dtype.itemsize
    if not path.exists() or path.stat().st_size != max(size, 1):
        with open(path, "wb") as file:
            file.truncate(max(size, 1))
    if not size:
        return torch.zeros(shape, dtype=dtype)
    return torch.from_file(str(path), shared=True, size=int(np.prod(shape)), dtype=dtype).view(shape)


def open_cache(
    choice: str,
    dtype: str,
    folder: Path,
    teacher: PreTrainedModel,
    parts: frozenset[str],
    data: Dataset,
    device: torch.device,
    rereads: bool,
    variant: str = "",
) -> TeacherCache | None:
    """The cache that `choice` asks for, its size printed before anything is computed; None for no cache.

    choice: "memory" (of `device`), "disk" (below `folder`, in a sub-folder named after teacher and data), "none", or
    "auto": a GPU's memory where it fits into half of what is free, else disk where it does, else none; none too where
    no answer is read twice (`rereads`). variant: what else the answers depend on. Raises InputError where what is asked
    for does not fit.
    """
    layout = Layout.of(teacher, parts)
    lengths = [len(ids) for ids in data["input_ids"]]
    size = sum(lengths) * layout.row * _DTYPES[dtype].itemsize + len(lengths) * (layout.classes * 4 + 8)
    free = {"memory": _free_memory(device), "disk": _free_disk(folder)}
    if choice == "auto":
        fits = [place for place in free if size < free[place] / 2 and (place == "disk" or device.type != "cpu")]
        choice = fits[0] if fits and rereads else "none"
    if choice == "none":
        return None
    if size > free[choice]:
        raise InputError(
            f"--teacher_cache {choice}: the teacher's answers need {size / 1e9:.1f} GB, "
            f"and {free[choice] / 1e9:.1f} GB are free; use another place, or none"
        )
    key = _key(teacher, data, f"{layout} {dtype} {variant}")
    place = folder / key[:16] if choice == "disk" else None
    print(
        f"teacher cache: {size / 1e9:.2f} GB {f'in {place}' if place else f'in memory ({device.type})'}, "
        f"{sum(lengths)} tokens x {layout.row * _DTYPES[dtype].itemsize / 1e3:.1f} kB, {dtype}"
    )
    return TeacherCache(layout, lengths, dtype, place, device="cpu" if place else device)


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def _free_disk(folder: Path) -> int:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    return shutil.disk_usage(existing).free


def _key(teacher: PreTrainedModel, data: Dataset, kept: str) -> str:
    """A digest of all that the answers depend on: the teacher's weights and configuration, its inputs, what is kept."""
    digest = hashlib.sha256(f"{kept} {teacher.config.to_json_string()}".encode())
    for name, value in sorted(teacher.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        if name in data.column_names:
            column = data.with_format("numpy")[name][:]
            digest.update(name.encode())
            for row in column:
                digest.update(np.asarray(row, dtype=np.int64).tobytes())
    return digest.hexdigest()
