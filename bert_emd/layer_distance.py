"""All student layers against all teacher layers in one pass over the data."""

from collections.abc import Iterator

import torch
from torch.autograd.function import once_differentiable

# Elements of one layer that are compared at a time, so that the pieces of all layers stay in the processor's cache.
_BLOCK = 1 << 15


def pairwise_mse(
    student: list[torch.Tensor],
    teacher: list[torch.Tensor],
    divisor: float | torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """D[i, j] = Σ mask (student[i] - teacher[j])² / divisor over all elements, for all i and j: BERT-EMD's layer costs.

    `student`: M tensors, `teacher`: N tensors, all of one shape. `divisor`: the number of elements by default, which
    makes D the mean squared errors. `mask`: boolean, broadcastable to a layer; elements where it is False do not
    count. Returns D (M, N), float32 (float64 for float64 inputs), differentiable in the student.

    Differences are taken before squares are summed, so nearly equal layers lose no digits; sums run in float64. Every
    input is read once forward and once backward, in pieces: neither M·N differences nor stacked layers are ever held.
    Raises ValueError for shapes that differ.
    """
    shapes = {tuple(layer.shape) for layer in (*student, *teacher)}
    if len(shapes) != 1:
        raise ValueError(f"student and teacher layers must have one shape, got {sorted(shapes)}")
    if divisor is None:
        divisor = student[0].numel()
    return _PairwiseSquaredDistance.apply(mask, len(student), *student, *teacher) / divisor


class _PairwiseSquaredDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mask: torch.Tensor | None, student_layers: int, *layers: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(mask, *layers)
        ctx.student_layers = student_layers
        dtype = torch.promote_types(layers[0].dtype, torch.float32)
        total = torch.zeros(student_layers, len(layers) - student_layers, dtype=torch.float64, device=layers[0].device)
        for block in _blocks(layers[0].shape, _BLOCK):
            pieces = _pieces(layers, block, mask, dtype)
            difference = (pieces[:student_layers, None] - pieces[None, student_layers:]).flatten(0, 1).unsqueeze(1)
            total += (difference @ difference.mT).double().view_as(total)
        return total.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple:
        # dD[i, j]/d student[i] = 2 (student[i] - teacher[j]); a flow has few pairs, the others cost nothing.
        mask, *layers = ctx.saved_tensors
        student, teacher = layers[: ctx.student_layers], layers[ctx.student_layers :]
        pairs = grad.nonzero().tolist()
        weights = torch.zeros(len(student), len(pairs), dtype=grad.dtype, device=grad.device)
        for k, (i, j) in enumerate(pairs):
            weights[i, k] = 2 * grad[i, j]
        grads = [torch.zeros_like(layer) for layer in student]
        for block in _blocks(student[0].shape, _BLOCK) if pairs else ():
            minuends = _pieces([student[i] for i, _ in pairs], block, mask, grad.dtype)
            difference = minuends.sub_(_pieces([teacher[j] for _, j in pairs], block, mask, grad.dtype))
            for target, piece in zip(grads, weights @ difference, strict=True):
                target[block] = piece.view_as(target[block])
        return None, None, *grads, *(None for _ in teacher)


def _pieces(
    layers: list[torch.Tensor], block: tuple[slice, ...], mask: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """One block of all layers, (layers, elements), with zeros where the mask is False."""
    pieces = torch.stack([layer[block] for layer in layers]).to(dtype)
    if mask is not None:
        aligned = mask.expand(*[1] * (layers[0].dim() - mask.dim()), *mask.shape)
        within = [part if size > 1 else slice(None) for part, size in zip(block, aligned.shape, strict=False)]
        pieces *= aligned[tuple(within)].to(dtype)
    return pieces.flatten(1)


def _blocks(shape: torch.Size, limit: int) -> Iterator[tuple[slice, ...]]:
    """Indices that cut a tensor of `shape` into pieces of at most about `limit` elements, in storage order."""
    inner = shape[1:].numel()
    if len(shape) == 1 or inner <= limit:
        step = max(1, limit // max(1, inner))
        for start in range(0, shape[0], step):
            yield (slice(start, start + step),)
        return
    for start in range(shape[0]):
        for rest in _blocks(shape[1:], limit):
            yield (slice(start, start + 1), *rest)
