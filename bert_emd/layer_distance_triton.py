"""The kernel of `pairwise_mse` for CUDA, in Triton: every layer is read once, whatever the number of pairs.

A program holds one block of elements of all teacher layers and takes the student's layers one by one. Layers stay
where they are: the programs get a table of their addresses.
"""

import torch
import triton
import triton.language as tl

# Values of teacher layers that a program holds.
_HELD = 8192
_TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def distances(student: list[torch.Tensor], teacher: list[torch.Tensor], mask: torch.Tensor | None) -> torch.Tensor:
    """Σ mask (student[i] - teacher[j])², (M, N) float64; see `bert_emd.layer_distance.Kernel`."""
    call = _Call(student, teacher, mask)
    partial = torch.empty(call.programs, len(student), call.rows, dtype=call.accuracy, device=student[0].device)
    _distances[(call.programs,)](partial, *call.arguments, **call.constants)
    return partial[..., : len(teacher)].double().sum(0)


def gradients(
    student: list[torch.Tensor], teacher: list[torch.Tensor], mask: torch.Tensor | None, weights: torch.Tensor
) -> list[torch.Tensor]:
    """Σ_j weights[i, j] mask (student[i] - teacher[j]) for each i; see `bert_emd.layer_distance.Kernel`."""
    call = _Call(student, teacher, mask)
    grads = [torch.empty_like(layer, memory_format=torch.contiguous_format) for layer in student]
    _gradients[(call.programs,)](_addresses(grads), weights.contiguous(), *call.arguments, **call.constants)
    return grads


class _Call:
    """What both kernels are launched with."""

    def __init__(self, student: list[torch.Tensor], teacher: list[torch.Tensor], mask: torch.Tensor | None):
        # Held here so that copies of layers that are not contiguous live until the launch.
        self.student, self.teacher = ([layer.contiguous() for layer in side] for side in (student, teacher))
        self.rows = triton.next_power_of_2(len(teacher))
        self.accuracy = torch.promote_types(student[0].dtype, torch.float32)
        block = max(128, _HELD // self.rows)
        self.programs = triton.cdiv(student[0].numel(), block)
        sizes, strides = [1] * 4, [0] * 4
        if mask is not None:
            # Four dimensions, with stride 0 where the mask is broadcast.
            mask = mask.expand(student[0].shape)
            mask = mask.flatten(0, mask.dim() - 4) if mask.dim() > 4 else mask[(None,) * (4 - mask.dim())]
            sizes, strides = mask.shape, mask.stride()
        self.arguments = (
            *(_addresses(self.student), _addresses(self.teacher)),
            *(self.student[0] if mask is None else mask, student[0].numel(), *sizes[1:], *strides),
        )
        self.constants = {
            "M": len(student),
            "N": len(teacher),
            "ROWS": self.rows,
            "BLOCK": block,
            "MASKED": mask is not None,
            "STUDENT": _TYPES[student[0].dtype],
            "TEACHER": _TYPES[teacher[0].dtype],
            "ACCURACY": _TYPES[self.accuracy],
        }


def _addresses(layers: list[torch.Tensor]) -> torch.Tensor:
    return torch.tensor([layer.data_ptr() for layer in layers], device=layers[0].device)


@triton.jit
def _counted(mask, elements, size1, size2, size3, stride0, stride1, stride2, stride3, BLOCK: tl.constexpr, MASKED):
    """The elements of this program's block, and which of them count."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    counted = offsets < elements
    if MASKED:
        place = offsets % size3 * stride3 + offsets // size3 % size2 * stride2
        place += offsets // (size3 * size2) % size1 * stride1 + offsets // (size3 * size2 * size1) * stride0
        counted = counted & (tl.load(mask + place, mask=counted, other=0) != 0)
    return offsets, counted


@triton.jit
def _layers(addresses, count, offsets, counted, ROWS: tl.constexpr, TYPE: tl.constexpr, ACCURACY: tl.constexpr):
    """A block of `count` layers, (ROWS, BLOCK), zero where it does not count."""
    rows = tl.arange(0, ROWS)
    starts = tl.load(addresses + rows, mask=rows < count, other=0).to(tl.pointer_type(TYPE))
    wanted = (rows < count)[:, None] & counted[None, :]
    return tl.load(starts[:, None] + offsets[None, :], mask=wanted, other=0).to(ACCURACY)


@triton.jit
def _layer(addresses, row, offsets, counted, TYPE: tl.constexpr, ACCURACY: tl.constexpr):
    start = tl.load(addresses + row).to(tl.pointer_type(TYPE))
    return tl.load(start + offsets, mask=counted, other=0).to(ACCURACY)


@triton.jit
def _distances(
    partial, student, teacher, mask, elements, size1, size2, size3, stride0, stride1, stride2, stride3,
    M: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
    STUDENT: tl.constexpr, TEACHER: tl.constexpr, ACCURACY: tl.constexpr,
):  # fmt: skip
    offsets, counted = _counted(mask, elements, size1, size2, size3, stride0, stride1, stride2, stride3, BLOCK, MASKED)
    theirs = _layers(teacher, N, offsets, counted, ROWS, TEACHER, ACCURACY)
    for i in tl.static_range(M):
        difference = _layer(student, i, offsets, counted, STUDENT, ACCURACY)[None, :] - theirs
        place = (tl.program_id(0).to(tl.int64) * M + i) * ROWS + tl.arange(0, ROWS)
        tl.store(partial + place, tl.sum(difference * difference, axis=1))


@triton.jit
def _gradients(
    grads, weights, student, teacher, mask, elements, size1, size2, size3, stride0, stride1, stride2, stride3,
    M: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
    STUDENT: tl.constexpr, TEACHER: tl.constexpr, ACCURACY: tl.constexpr,
):  # fmt: skip
    offsets, counted = _counted(mask, elements, size1, size2, size3, stride0, stride1, stride2, stride3, BLOCK, MASKED)
    theirs = _layers(teacher, N, offsets, counted, ROWS, TEACHER, ACCURACY)
    rows = tl.arange(0, ROWS)
    for i in tl.static_range(M):
        weight = tl.load(weights + i * N + rows, mask=rows < N, other=0).to(ACCURACY)
        difference = _layer(student, i, offsets, counted, STUDENT, ACCURACY)[None, :] - theirs
        gradient = tl.sum(weight[:, None] * difference, axis=0)
        target = tl.load(grads + i).to(tl.pointer_type(STUDENT))
        tl.store(target + offsets, gradient.to(STUDENT), mask=offsets < elements)
