"""What a layer mapping is, and those that are fixed before training. `bert_emd/mappings.py` is the table of all."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from bert_finetune.processes import mean_over_processes

# What is matched, each with a cost matrix and a flow of its own.
BRANCHES = ("attention", "hidden")


@dataclass(frozen=True)
class Matching:
    """One step's result: losses are scalars with gradient, flows (M, N) float64; None for a branch that was off."""

    attention_loss: torch.Tensor | None
    hidden_loss: torch.Tensor | None
    attention_flow: np.ndarray | None
    hidden_flow: np.ndarray | None


class LayerMapping(nn.Module):
    """How M student layers learn from N teacher layers: Σ_ij F_ij C_ij under a flow F, for each branch.

    A mapping of one's own says what its `flow` is. Parameters are trained with the student, and they and buffers are
    saved with each checkpoint. It also says how it is called, what it wants recorded over training and drawn at the
    end.
    """

    # A sentence for the model card.
    described: ClassVar[str] = "Distilled from {teacher}, layer by layer under a mapping of its own."
    # Names of `bert_emd.pictures.PICTURES`.
    pictures: ClassVar[tuple[str, ...]] = ("flow", "flow_over_training")

    def flow(self, branch: str, cost: torch.Tensor) -> torch.Tensor | np.ndarray:
        """F (M, N) for "attention" or "hidden", whose `cost` (M, N) has a gradient; a tensor where F has one too."""
        raise NotImplementedError

    def forward(self, attention: torch.Tensor | None = None, hidden: torch.Tensor | None = None) -> Matching:
        """The step's losses and flows; `attention`, `hidden`: cost matrices (M, N) with gradient, or None."""
        losses, flows = {}, {}
        for branch, cost in zip(BRANCHES, (attention, hidden), strict=True):
            if cost is not None:
                flow = self.flow(branch, cost)
                losses[branch] = flow_cost(flow, cost)
                flows[branch] = flow.detach().double().cpu().numpy() if isinstance(flow, torch.Tensor) else flow
        return Matching(*(part.get(branch) for part in (losses, flows) for branch in BRANCHES))

    def recorded(self) -> dict[str, np.ndarray]:
        """What is to be recorded beside the flows, by name; a name that ends in `_weights` gets columns in
        layer_weights.csv."""
        return {}


def flow_cost(flow: torch.Tensor | np.ndarray, cost: torch.Tensor) -> torch.Tensor:
    """Σ_ij F_ij C_ij, a scalar."""
    return (torch.as_tensor(flow, dtype=cost.dtype, device=cost.device) * cost).sum()


class FixedMapping(LayerMapping):
    """A mapping that never changes: each of its (student layer, teacher layer) pairs, counted from 1, carries the same
    share of a mass of 1."""

    described = "Distilled from {teacher}, layer by layer under a fixed mapping."

    def __init__(self, pairs: list[tuple[int, int]], student_layers: int, teacher_layers: int):
        super().__init__()
        self._flow = np.zeros((student_layers, teacher_layers))
        for i, j in pairs:
            self._flow[i - 1, j - 1] = 1 / len(pairs)

    def flow(self, branch: str, cost: torch.Tensor) -> np.ndarray:
        return self._flow


class NearestMapping(LayerMapping):
    """Each student layer learns from the teacher layer that is nearest to it in this batch: the transport problem with
    the student's weights alone as a constraint,

        F = argmin Σ_ij F_ij C_ij   with   Σ_j F_ij = 1/M,   F ≥ 0,

    whose solution has 1/M at each row's least cost. Teacher layers that nobody needs stay unused.
    """

    described = "Distilled from {teacher}, each layer from the teacher's nearest."

    def flow(self, branch: str, cost: torch.Tensor) -> np.ndarray:
        costs = mean_over_processes(cost.detach()).cpu().numpy()
        flow = np.zeros(costs.shape)
        flow[np.arange(len(costs)), costs.argmin(axis=1)] = 1 / len(costs)
        return flow
