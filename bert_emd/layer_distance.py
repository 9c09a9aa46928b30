"""All student layers against all teacher layers in one pass over the data."""

import torch
from torch.autograd.function import once_differentiable

# Elements of one layer that are compared at a time: M + N such pieces stay in a core's cache.
_CHUNK = 1 << 15


def pairwise_mse(
    student: list[torch.Tensor], teacher: list[torch.Tensor], divisor: float | torch.Tensor | None = None
) -> torch.Tensor:
    """D[i, j] = Σ (student[i] - teacher[j])² / divisor over all elements, for all i and j: the layer costs of BERT-EMD.

    `student`: M tensors, `teacher`: N tensors, all of one shape. `divisor`: the number of elements by default, which
    makes D the mean squared errors. Returns D (M, N), float32 (float64 for float64 inputs), differentiable in the
    student. Differences are taken before squares are summed, so nearly equal layers lose no digits; sums run in
    float64. Every input is read once, in pieces; neither M·N differences nor stacked layers are ever held.
    Raises ValueError for shapes that differ.
    """
    shapes = {tuple(layer.shape) for layer in (*student, *teacher)}
    if len(shapes) != 1:
        raise ValueError(f"student and teacher layers must have one shape, got {sorted(shapes)}")
    if divisor is None:
        divisor = student[0].numel()
    return _PairwiseSquaredDistance.apply(len(student), *student, *teacher) / divisor


class _PairwiseSquaredDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student_layers: int, *layers: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*layers)
        ctx.student_layers = student_layers
        dtype = torch.promote_types(layers[0].dtype, torch.float32)
        flat = [layer.detach().reshape(-1) for layer in layers]
        total = torch.zeros(student_layers, len(layers) - student_layers, dtype=torch.float64, device=layers[0].device)
        for start in range(0, flat[0].numel(), _CHUNK):
            pieces = torch.stack([layer[start : start + _CHUNK] for layer in flat]).to(dtype)
            distance = torch.cdist(
                pieces[:student_layers], pieces[student_layers:], compute_mode="donot_use_mm_for_euclid_dist"
            )
            total += distance.double().square_()
        return total.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple:
        # dD[i, j]/d student[i] = 2 (student[i] - teacher[j]); a flow has few pairs, the others cost nothing.
        student, teacher = ctx.saved_tensors[: ctx.student_layers], ctx.saved_tensors[ctx.student_layers :]
        grads = []
        for layer, row in zip(student, (2 * grad).tolist(), strict=True):
            total = torch.zeros_like(layer)
            for other, weight in zip(teacher, row, strict=True):
                if weight:
                    total.add_(layer - other, alpha=weight)
            grads.append(total)
        return None, *grads, *(None for _ in teacher)
