"""The earth mover's distance between layers, and the cost attention that weighs them: the heart of BERT-EMD.

For M student and N teacher layers with a cost matrix C (how far student layer i is from teacher layer j), the flow

    F = argmin Σ_ij F_ij C_ij   with   Σ_j F_ij = w^S_i,   Σ_i F_ij = w^T_j,   F ≥ 0

moves the student layers' weights w^S onto the teacher layers' weights w^T at the least cost, and Σ F C is the loss.
After each step the *cost attention* gives layers that were cheap to match more weight. Source: the BERT-EMD paper
(EMNLP 2020); docs/fidelity.md has the variants that its code went through.
"""

import numpy as np
import ot
import pyemd
import torch

from bert_emd.choices import SOLVERS, WEIGHT_UPDATES
from bert_emd.layer_mapping import BRANCHES, LayerMapping, Matching, flow_cost
from bert_finetune.processes import mean_over_processes

# A layer always keeps this much weight. It stands for the limit of a vanishing weight: the unit cost of a layer
# without mass would be 0/0; with this mass it is that limit, and the flow's marginals move by less than 1e-11.
MIN_WEIGHT = 1e-12


def _solve_pyemd(student_weights: np.ndarray, teacher_weights: np.ndarray, cost: np.ndarray) -> np.ndarray:
    # pyemd wants histograms over all M + N layers: the student's mass on the first M, the teacher's on the rest.
    m, n = cost.shape
    square = np.zeros((m + n, m + n))
    square[:m, m:], square[m:, :m] = cost, cost.T
    supply = np.concatenate([student_weights, np.zeros(n)])
    demand = np.concatenate([np.zeros(m), teacher_weights])
    _, flow = pyemd.emd_with_flow(supply, demand, square)
    return np.asarray(flow)[:m, m:]


def _solve_pot(student_weights: np.ndarray, teacher_weights: np.ndarray, cost: np.ndarray) -> np.ndarray:
    # Neither dual potentials nor a second look at the sums is needed here.
    return ot.emd(student_weights, teacher_weights, cost, center_dual=False, check_marginals=False)


_SOLVE = dict(zip(SOLVERS, (_solve_pyemd, _solve_pot), strict=True))


def solve_transport(
    student_weights: np.ndarray, teacher_weights: np.ndarray, cost: np.ndarray, solver: str = "pyemd"
) -> np.ndarray:
    """The optimal flow F (M, N) for row sums `student_weights` (M,), column sums `teacher_weights` (N,), `cost` (M, N).

    Both weight vectors sum to 1; costs are finite and not negative. Exact: a vertex of the transport polytope, with at
    most M + N - 1 non-zeros. `solver`: "pyemd" or "pot", both network simplex in float64.
    Raises FloatingPointError for a cost that is not finite.
    """
    if not np.isfinite(cost).all():
        raise FloatingPointError("the cost matrix holds NaN or infinity")
    # Solvers stop at an absolute tolerance, so costs are brought to the order of 1 first; the flow does not change.
    scale = cost.max()
    return _SOLVE[solver](student_weights, teacher_weights, cost / scale if scale > 0 else cost)


def unit_costs(flow: np.ndarray, cost: np.ndarray, weights: tuple[np.ndarray, np.ndarray]) -> tuple:
    """What a unit of each layer's weight cost to move: Σ_j F_ij C_ij / w^S_i (M,) and Σ_i F_ij C_ij / w^T_j (N,)."""
    moved = flow * cost
    return moved.sum(axis=1) / weights[0], moved.sum(axis=0) / weights[1]


def attend_to_costs(costs: np.ndarray, kind: str, temperature: float) -> np.ndarray:
    """Layer weights from unit costs c (K,): cheap layers get more. The weights sum to 1.

    With u_k = Σc / c_k, `kind` "normalize" is u / Σu and "softmax" (or the first softmax of "softmax2") is
    softmax(u / temperature). Where a cost is 0 the formulas' limit counts: the layers that cost nothing share all the
    weight equally. (The authors' code gives such a layer no weight, and NaN from the next step on.)
    """
    free = costs == 0
    if free.any():
        return free / free.sum()
    # u is used up to a factor by "normalize": the smallest cost over each cost cannot overflow.
    relative = costs.min() / costs
    if kind == "normalize":
        return relative / relative.sum()
    return _softmax(relative * (costs.sum() / costs.min()) / temperature)


def _softmax(values: np.ndarray) -> np.ndarray:
    exponentials = np.exp(values - values.max())
    return exponentials / exponentials.sum()


class LayerTransport(LayerMapping):
    """The EMD losses of a step and, in training mode, the layer weights for the next.

    weight_update: how the cost attention turns unit costs c, u_k = Σc / c_k, into weights:
        "normalize"  w = u / Σu (the authors' code since August 2021; `temperature` has no effect)
        "softmax"    w = softmax(u / temperature)
        "softmax2"   softmax(u / temperature), then the merge, then a second softmax (their code of 2020)
        "none"       weights stay uniform
    temperature: T_emd.
    merge_weights: attention and hidden states share one pair of weight vectors, the mean of both; with only one of
        them in use, its own weights.
    solver: "pyemd" or "pot".
    momentum: m, how much of the old weights stays: w ← m w + (1 - m) f(w), where f(w) is what one step's cost attention
        makes of the costs that were moved under w. 0 is the paper, w ← f(w). Both rest at the same weights, w = f(w);
        but a layer that is given more weight has to take dearer pairs, so f falls as w rises, and where its slope f' is
        near -1 the paper's weights swing between two values for ever, while with momentum they approach the fixed
        point by the factor m + (1 - m) f' a step, which is 0 for m = 1/2 and f' = -1.

    The weights are buffers: they follow the module's state_dict, and nothing else is kept between steps. With several
    processes the costs are averaged over all of them first, so that every process has the same flow and weights.
    """

    described = "Distilled with BERT-EMD from {teacher}."
    pictures = (*LayerMapping.pictures, "layer_weights")

    def __init__(
        self,
        student_layers: int,
        teacher_layers: int,
        weight_update: str = "normalize",
        temperature: float = 1.0,
        merge_weights: bool = True,
        solver: str = "pyemd",
        momentum: float = 0.0,
    ):
        super().__init__()
        if student_layers < 1 or teacher_layers < 1:
            raise ValueError(
                f"student_layers and teacher_layers must be positive, got {student_layers}, {teacher_layers}"
            )
        if weight_update not in WEIGHT_UPDATES:
            raise ValueError(f"weight_update must be one of {WEIGHT_UPDATES}, got {weight_update!r}")
        if solver not in SOLVERS:
            raise ValueError(f"solver must be one of {SOLVERS}, got {solver!r}")
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be from 0 to below 1, got {momentum}")
        self.weight_update, self.temperature = weight_update, temperature
        self.merge_weights, self.solver, self.momentum = merge_weights, solver, momentum
        for branch in BRANCHES:
            for side, layers in (("student", student_layers), ("teacher", teacher_layers)):
                uniform = torch.full((layers,), 1 / layers, dtype=torch.float64)
                self.register_buffer(f"{branch}_{side}_weights", uniform)

    @property
    def attention_weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The weights for attention scores: (student (M,), teacher (N,)), float64."""
        return self.attention_student_weights, self.attention_teacher_weights

    @property
    def hidden_weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The weights for hidden states: (student (M,), teacher (N,)), float64."""
        return self.hidden_student_weights, self.hidden_teacher_weights

    def forward(self, attention: torch.Tensor | None = None, hidden: torch.Tensor | None = None) -> Matching:
        """Solve both transport problems; `attention`, `hidden`: cost matrices (M, N) with gradient, or None."""
        costs = {name: cost for name, cost in (("attention", attention), ("hidden", hidden)) if cost is not None}
        if not costs:
            return Matching(None, None, None, None)
        # One copy to the host for both.
        on_host = mean_over_processes(torch.stack(list(costs.values())).detach().double()).cpu().numpy()
        losses, flows, updates = {}, {}, {}
        for (name, cost), matrix in zip(costs.items(), on_host, strict=True):
            weights = tuple(vector.cpu().numpy() for vector in getattr(self, f"{name}_weights"))
            flows[name] = solve_transport(*weights, matrix, self.solver)
            losses[name] = flow_cost(flows[name], cost)
            if self.training and self.weight_update != "none":
                updates[name] = [
                    attend_to_costs(costs, self.weight_update, self.temperature)
                    for costs in unit_costs(flows[name], matrix, weights)
                ]
        self._set_weights(updates)
        return Matching(*(part.get(branch) for part in (losses, flows) for branch in BRANCHES))

    def recorded(self) -> dict[str, np.ndarray]:
        """The layer weights that the next step starts with, `{branch}_{side}_weights`."""
        return {
            f"{branch}_{side}_weights": getattr(self, f"{branch}_{side}_weights").cpu().numpy().copy()
            for branch in BRANCHES
            for side in ("student", "teacher")
        }

    def _set_weights(self, updates: dict[str, list[np.ndarray]]) -> None:
        if updates and self.merge_weights:
            merged = [np.mean(vectors, axis=0) for vectors in zip(*updates.values(), strict=True)]
            updates = dict.fromkeys(BRANCHES, merged)
        for name, vectors in updates.items():
            for buffer, vector in zip(getattr(self, f"{name}_weights"), vectors, strict=True):
                vector = _softmax(vector) if self.weight_update == "softmax2" else vector
                vector = np.maximum(vector, MIN_WEIGHT)
                if self.momentum:
                    vector = self.momentum * buffer.cpu().numpy() + (1 - self.momentum) * vector / vector.sum()
                buffer.copy_(torch.from_numpy(vector / vector.sum()))
