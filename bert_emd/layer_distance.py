"""All student layers against all teacher layers in one pass over the data.

`pairwise_mse` compares tensors of one shape (hidden states, attention scores), `pairwise_attention_mse` attention
scores given by their factors, queries and keys: it never holds the scores of more than a few heads at a time.
"""

import functools
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

# Elements of one layer that are compared at a time: on a CPU the pieces of all layers stay in its cache, a GPU is kept
# busy. Scores of factors come in smaller pieces, with all that is made on the way to them.
_BLOCK, _SCORES_BLOCK, _GPU_BLOCK = 1 << 16, 1 << 15, 1 << 20
# Attention distances of factors: from this length on their products are faster than making the scores
# (benchmarks/RESULTS.md, table e).
_FACTORED_FROM = 192
# A distance below this share of the norms it is the difference of would have lost too many digits.
_CANCELLED = 1e-3

Layers = list[torch.Tensor]


@dataclass(frozen=True)
class Kernel:
    """How `pairwise_mse` computes: both functions read every layer once.

    distances(student, teacher, mask): Σ mask (student[i] - teacher[j])², (M, N) float64.
    gradients(student, teacher, mask, weights): Σ_j weights[i, j] mask (student[i] - teacher[j]) for each i.
    """

    distances: Callable[[Layers, Layers, torch.Tensor | None], torch.Tensor]
    gradients: Callable[[Layers, Layers, torch.Tensor | None, torch.Tensor], Layers]


def pairwise_mse(
    student: Layers,
    teacher: Layers,
    divisor: float | torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    kernel: str | None = None,
) -> torch.Tensor:
    """D[i, j] = Σ mask (student[i] - teacher[j])² / divisor over all elements, for all i and j: BERT-EMD's layer costs.

    `student`: M tensors, `teacher`: N tensors, all of one shape and on one device, each side of one dtype. `divisor`:
    the number of elements by default, which makes D the mean squared errors. `mask`: boolean, broadcastable to a layer;
    elements where it is False do not count. Returns D (M, N), float32 (float64 for float64 inputs), differentiable in
    the student.

    `kernel`: "eager", "compiled" (torch.compile; needs a compiler, and half a minute once) or "triton" (CUDA); None is
    triton where that can run, else eager. Differences are taken before squares are summed, so nearly equal layers lose
    no digits; sums run in float64. Every input is read once forward and once backward, in pieces: neither M·N
    differences nor stacked layers are ever held. Raises ValueError for shapes, dtypes or devices that differ, and an
    unknown kernel.
    """
    shapes = {tuple(layer.shape) for layer in (*student, *teacher)}
    if len(shapes) != 1:
        raise ValueError(f"student and teacher layers must have one shape, got {sorted(shapes)}")
    _check_alike(student, teacher)
    if divisor is None:
        divisor = student[0].numel()
    kernel = _kernel(kernel or _best_kernel(student[0].device.type))
    return _PairwiseDistance.apply(kernel, mask, len(student), *student, *teacher) / divisor


def pairwise_attention_mse(
    student: list[torch.Tensor],
    teacher: list[torch.Tensor],
    divisor: float | torch.Tensor | None = None,
    form: str | None = None,
) -> torch.Tensor:
    """D[i, j] = Σ (S_i - T_j)² / divisor over all attention scores S_i = Q_i K_iᵀ, T_j = Q'_j K'_jᵀ, for all i and j.

    `student`: M tensors of factors (2, batch, heads, length, head size), the queries (scaled) and the keys; `teacher`:
    N of them, whose head size may be another. Queries and keys that are not to count are zero. `divisor`: the number of
    scores of a layer by default. Returns D (M, N), float32 (float64 for float64 inputs), differentiable in the student.

    `form`: "direct" makes the scores of a few heads at a time and sums squared differences; its time grows with the
    square of the length. "factored" uses <Q Kᵀ, Q' K'ᵀ> = <Qᵀ Q', Kᵀ K'>, linear in the length; where a distance is so
    much smaller than the scores that it would lose digits, it falls back on the direct form. None chooses by length.
    Raises ValueError where batch, heads or length differ, and for an unknown form.
    """
    shapes = {tuple(layer.shape[:-1]) for layer in (*student, *teacher)}
    if len(shapes) != 1:
        raise ValueError(f"student and teacher factors must agree in all but the head size, got {sorted(shapes)}")
    _check_alike(student, teacher)
    _, batch, heads, length = shapes.pop()
    if divisor is None:
        divisor = batch * heads * length**2
    if form is None:
        form = "factored" if length >= _FACTORED_FROM else "direct"
    if form not in ("direct", "factored"):
        raise ValueError(f"form must be direct or factored, got {form!r}")
    rows = [layer.flatten(1, 2) for layer in (*student, *teacher)]
    with torch.autocast(rows[0].device.type, enabled=False):  # products of factors need all their digits
        return _PairwiseAttentionDistance.apply(form, len(student), *rows) / divisor


def _check_alike(student: Layers, teacher: Layers) -> None:
    """Kernels take a side's layers to be like its first. Raises ValueError where one is not."""
    for side, layers in (("student", student), ("teacher", teacher)):
        if len(found := {str(layer.dtype) for layer in layers}) > 1:
            raise ValueError(f"{side} layers must have one dtype, got {', '.join(sorted(found))}")
    if len(found := {str(layer.device) for layer in (*student, *teacher)}) > 1:
        raise ValueError(f"student and teacher layers must be on one device, got {', '.join(sorted(found))}")


@functools.cache
def _best_kernel(device_type: str) -> str:
    if device_type != "cuda":
        return "eager"
    # Triton compiles its launcher on first use, which needs a C compiler.
    missing = []
    if not importlib.util.find_spec("triton"):
        missing.append("Triton (pip install triton)")
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        missing.append("a C compiler (gcc or clang)")
    if missing:
        print(f"warning: layers are compared by the slow kernel, for want of {' and '.join(missing)}", file=sys.stderr)
    return "eager" if missing else "triton"


@functools.cache
def _kernel(name: str) -> Kernel:
    if name == "compiled":
        # One compilation for all lengths and batch sizes.
        return Kernel(*(torch.compile(part, dynamic=True) for part in (_traced_distances, _traced_gradients)))
    if name == "triton":
        from bert_emd.layer_distance_triton import distances, gradients

        return Kernel(distances, gradients)
    if name == "eager":
        return Kernel(_eager_distances, _eager_gradients)
    raise ValueError(f"kernel must be eager, compiled or triton, got {name!r}")


class _PairwiseDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernel: Kernel, mask: torch.Tensor | None, student_layers: int, *layers: torch.Tensor):
        ctx.save_for_backward(mask, *layers)
        ctx.kernel, ctx.student_layers = kernel, student_layers
        total = kernel.distances(list(layers[:student_layers]), list(layers[student_layers:]), mask)
        return total.to(_accuracy(layers[0]))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple:
        mask, *layers = ctx.saved_tensors
        student, teacher = layers[: ctx.student_layers], layers[ctx.student_layers :]
        # dD[i, j] / d student[i] = 2 (student[i] - teacher[j])
        return None, None, None, *ctx.kernel.gradients(student, teacher, mask, 2 * grad), *(None for _ in teacher)


def _eager_distances(student: Layers, teacher: Layers, mask: torch.Tensor | None) -> torch.Tensor:
    total, mask = _no_distance((*student, *teacher), len(student)), _if_any_masked(mask)
    for block in _blocks(student[0].shape, _block_size(student[0])):
        _add_distances(total, *(_pieces(side, block, mask) for side in (student, teacher)))
    return total


def _eager_gradients(student: Layers, teacher: Layers, mask: torch.Tensor | None, weights: torch.Tensor) -> Layers:
    grads, mask = [torch.zeros_like(layer) for layer in student], _if_any_masked(mask)
    # A flow has at most M + N - 1 pairs; the others cost nothing.
    pairs = [[(j, weight) for j, weight in enumerate(row) if weight] for row in weights.tolist()]
    for block in _blocks(student[0].shape, _block_size(student[0])):
        for layer, grad, partners in zip(student, grads, pairs, strict=True):
            piece = layer[block].to(weights.dtype)
            total = torch.zeros_like(piece)
            for j, weight in partners:
                total.add_(piece - teacher[j][block], alpha=weight)
            grad[block] = total if mask is None else total * _part(mask, block, grad.dim())
    return grads


def _if_any_masked(mask: torch.Tensor | None) -> torch.Tensor | None:
    return None if mask is None or mask.all() else mask


def _traced_distances(student: Layers, teacher: Layers, mask: torch.Tensor | None) -> torch.Tensor:
    """Written for torch.compile, which makes one loop of it; each row is summed in float32, the rows in float64."""
    accuracy = _accuracy(student[0])
    student, teacher = ([layer.to(accuracy) for layer in side] for side in (student, teacher))
    rows = [[(ours - theirs).square() for theirs in teacher] for ours in student]
    if mask is not None:
        rows = [[row * mask for row in side] for side in rows]
    return torch.stack([torch.stack([row.sum(-1).double().sum() for row in side]) for side in rows])


def _traced_gradients(student: Layers, teacher: Layers, mask: torch.Tensor | None, weights: torch.Tensor) -> Layers:
    grads = []
    for layer, row in zip(student, weights, strict=True):
        total = sum(weight * (layer.to(weights.dtype) - theirs) for weight, theirs in zip(row, teacher, strict=True))
        grads.append((total if mask is None else total * mask).to(layer.dtype))
    return grads


class _PairwiseAttentionDistance(torch.autograd.Function):
    """Of factors (2, rows, length, head size), a row for each head of each example."""

    @staticmethod
    def forward(ctx, form: str, student_layers: int, *layers: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*layers)
        ctx.student_layers = student_layers
        student, teacher = layers[:student_layers], layers[student_layers:]
        if form == "factored":
            total, norms = _factored_distances(student, teacher)
            if bool((total < _CANCELLED * norms).any()):
                form = "direct"
        if form == "direct":
            total = _no_distance(layers, student_layers)
            for rows in _row_blocks(layers[0]):
                _add_distances(total, _scores(student, rows).flatten(1), _scores(teacher, rows).flatten(1))
        ctx.form = form
        return total.to(_accuracy(layers[0]))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple:
        layers = ctx.saved_tensors
        student, teacher = layers[: ctx.student_layers], layers[ctx.student_layers :]
        pairs, weights = _pairs(grad)
        grads = [torch.zeros_like(layer) for layer in student]
        backward = _direct_backward if ctx.form == "direct" else _factored_backward
        for rows in _row_blocks(student[0]) if pairs else ():
            backward(grads, student, teacher, pairs, weights, rows)
        return None, None, *grads, *(None for _ in teacher)


def _accuracy(layer: torch.Tensor) -> torch.dtype:
    return torch.promote_types(layer.dtype, torch.float32)


def _block_size(layer: torch.Tensor) -> int:
    return _BLOCK if layer.device.type == "cpu" else _GPU_BLOCK


def _no_distance(layers: tuple[torch.Tensor, ...], student_layers: int) -> torch.Tensor:
    return torch.zeros(student_layers, len(layers) - student_layers, dtype=torch.float64, device=layers[0].device)


def _add_distances(total: torch.Tensor, student: torch.Tensor, teacher: torch.Tensor) -> None:
    """Add Σ (student[i] - teacher[j])² of (M, elements) and (N, elements) to `total` (M, N)."""
    difference = torch.empty_like(teacher)
    for row, piece in zip(total, student, strict=True):
        row += torch.linalg.vector_norm(torch.sub(piece, teacher, out=difference), dim=1).double() ** 2


def _pairs(grad: torch.Tensor) -> tuple[list[tuple[int, int]], torch.Tensor]:
    """The layers (i, j) whose distance counts, and the factors (M, pairs) of their differences in the gradient.

    dD[i, j] / d student[i] = 2 (student[i] - teacher[j]); a flow has few pairs, the others cost nothing.
    """
    pairs = grad.nonzero().tolist()
    weights = torch.zeros(len(grad), len(pairs), dtype=grad.dtype, device=grad.device)
    for k, (i, j) in enumerate(pairs):
        weights[i, k] = 2 * grad[i, j]
    return pairs, weights


def _pieces(layers: Layers, block: tuple[slice, ...], mask: torch.Tensor | None) -> torch.Tensor:
    """One block of all layers, (layers, elements), with zeros where the mask is False."""
    pieces = torch.stack([layer[block] for layer in layers]).to(_accuracy(layers[0]))
    if mask is not None:
        pieces *= _part(mask, block, layers[0].dim())
    return pieces.flatten(1)


def _part(mask: torch.Tensor, block: tuple[slice, ...], dims: int) -> torch.Tensor:
    """The block of a mask that is broadcast to `dims` dimensions."""
    aligned = mask.expand(*[1] * (dims - mask.dim()), *mask.shape)
    return aligned[tuple(part if size > 1 else slice(None) for part, size in zip(block, aligned.shape, strict=False))]


def _blocks(shape: torch.Size, limit: int) -> Iterator[tuple[slice, ...]]:
    """Indices that cut a tensor of `shape` into pieces of at most about `limit` elements, in storage order."""
    inner = shape[1:].numel()
    if len(shape) == 1 or inner <= limit:
        pieces = max(1, -(-shape.numel() // limit))
        step = max(1, -(-shape[0] // pieces))
        for start in range(0, shape[0], step):
            yield (slice(start, start + step),)
        return
    for start in range(shape[0]):
        for rest in _blocks(shape[1:], limit):
            yield (slice(start, start + 1), *rest)


def _row_blocks(layer: torch.Tensor) -> Iterator[slice]:
    """The rows of factors whose scores are made at a time."""
    _, rows, length, _ = layer.shape
    block = _SCORES_BLOCK if layer.device.type == "cpu" else _GPU_BLOCK
    step = max(1, block // length**2)
    return (slice(start, start + step) for start in range(0, rows, step))


def _stacked(layers: list[torch.Tensor], rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys of some rows of all layers, each (layers, rows, length, head size)."""
    return torch.stack([layer[:, rows] for layer in layers], dim=1).to(_accuracy(layers[0])).unbind()


def _scores(layers: list[torch.Tensor], rows: slice) -> torch.Tensor:
    """The attention scores of some rows, (layers, rows, length, length)."""
    queries, keys = _stacked(layers, rows)
    return queries @ keys.mT


def _direct_backward(grads, student, teacher, pairs, weights, rows: slice) -> None:
    # With E = Σ_j weight (S - T_j), the gradient of the scores: d/dQ = E K and d/dK = Eᵀ Q.
    queries, keys = _stacked(student, rows)
    scores = queries @ keys.mT
    teachers = sorted({j for _, j in pairs})
    others = _scores([teacher[j] for j in teachers], rows)
    difference = scores[[i for i, _ in pairs]].sub_(others[[teachers.index(j) for _, j in pairs]])
    difference = (weights @ difference.flatten(1)).view_as(scores)
    for k, parts in enumerate((difference @ keys, difference.mT @ queries)):
        for grad, part in zip(grads, parts, strict=True):
            grad[k, rows] = part


def _factored_distances(student, teacher) -> tuple[torch.Tensor, torch.Tensor]:
    """‖S_i‖² + ‖T_j‖² - 2 <S_i, T_j>, and ‖S_i‖² + ‖T_j‖² for comparison; (M, N) in float64."""
    products = _no_distance((*student, *teacher), len(student))
    norms = torch.zeros_like(products)
    for rows in _row_blocks(student[0]):
        ours, theirs = _stacked(student, rows), _stacked(teacher, rows)
        own, their = (_inner([(x.mT @ x) for x in pair], (2, 3)).sum(1) for pair in (ours, theirs))
        norms += own[:, None] + their
        # All M·N products of a row in one: (rows, M, head size, N, head size).
        left = [x.permute(1, 0, 3, 2).flatten(1, 2) for x in ours]
        right = [x.permute(1, 2, 0, 3).flatten(2, 3) for x in theirs]
        shape = (-1, len(student), student[0].shape[-1], len(teacher), teacher[0].shape[-1])
        products += _inner([(x @ y).view(shape) for x, y in zip(left, right, strict=True)], (2, 4)).sum(0)
    return norms - 2 * products, norms


def _inner(factors: list[torch.Tensor], dims: tuple[int, ...]) -> torch.Tensor:
    return (factors[0] * factors[1]).sum(dims).double()


def _factored_backward(grads, student, teacher, pairs, weights, rows: slice) -> None:
    # d/dQ = Σ_j weight (Q Kᵀ - Q'_j K'_jᵀ) K, with the small products first; d/dK is the same with Q and K exchanged.
    ours = _stacked([student[i] for i, _ in pairs], rows)
    theirs = _stacked([teacher[j] for _, j in pairs], rows)
    for k in (0, 1):
        mine, other = ours[k], ours[1 - k]
        difference = mine @ (other.mT @ other) - theirs[k] @ (theirs[1 - k].mT @ other)
        for grad, part in zip(grads, weights @ difference.flatten(1), strict=True):
            grad[k, rows] = part.view_as(grad[k, rows])
