"""The losses: layer by layer under a mapping (EMD or a fixed rival), embeddings, predictions.

    L = β (θ (L_attention + L_hidden) + L_embedding) + L_prediction

Layer costs, for student layer i and teacher layer j:

    attention  C[i, j] = Σ_heads,queries,keys (S_i - T_j)² / divisor    over pre-softmax scores; a masked key counts 0
    hidden     C[i, j] = Σ_tokens,width (P(H^S_i) - H^T_j)² / divisor   over hidden states, projected to teacher width

Padding takes no part: the hidden divisor is real tokens x width, the attention divisor real queries x heads x
`max_seq_length`, to which the authors' code always pads: see docs/fidelity.md for what that means for β, and for what
else their code adds to the BERT-EMD paper.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from bert_emd.layer_distance import pairwise_attention_mse, pairwise_mse
from bert_emd.layer_transport import LayerTransport, Transport
from bert_finetune.errors import InputError
from bert_finetune.processes import mean_over_processes, share_of_step


@dataclass(frozen=True)
class LayerOutputs:
    """What the losses look at: `logits` (batch, classes), `hidden_states` (layers + 1 of (batch, length, width), the
    embedding output first), `attention` (layers of pre-softmax scores (batch, heads, length, length), or of their
    factors (2, batch, heads, length, head size): the scaled queries and the keys, whose products they are). None for
    what was not asked for."""

    logits: torch.Tensor | None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attention: tuple[torch.Tensor, ...] | None = None


def evenly_spaced_layers(student_layers: int, teacher_layers: int) -> list[int]:
    """Teacher layer i·N/M for student layer i (1-based, rounded up where it does not divide): 2, 4, 6 for 3 of 6."""
    return [-(-i * teacher_layers // student_layers) for i in range(1, student_layers + 1)]


def fixed_mapping(kind: str, student_layers: int, teacher_layers: int) -> list[tuple[int, int]]:
    """The (student layer, teacher layer) pairs, 1-based, of a rival that fixes them before training.

    "uniform": student layer i and teacher layer i·N/M, the last to the last (TinyBERT).
    "skip": the same without the last pair, whose layer the prediction loss teaches (Patient KD, skip).
    "last": student layer i and teacher layer N - M + i, or 1 where that is below 1, without the last pair (Patient KD,
    last).
    Raises InputError where no pair is left.
    """
    if kind in ("uniform", "skip"):
        pairs = list(enumerate(evenly_spaced_layers(student_layers, teacher_layers), start=1))
    else:
        pairs = [(i, max(1, teacher_layers - student_layers + i)) for i in range(1, student_layers + 1)]
    if kind in ("skip", "last"):
        pairs.pop()
    if not pairs:
        raise InputError(
            f"--layer_mapping {kind}: leaves a student's last layer to the predictions, and this one has no other; use "
            "emd, uniform or none"
        )
    return pairs


class FixedMapping(nn.Module):
    """A mapping that never changes, called like `LayerTransport`: every pair carries the same share of a mass of 1."""

    def __init__(self, pairs: list[tuple[int, int]], student_layers: int, teacher_layers: int):
        super().__init__()
        self.flow = np.zeros((student_layers, teacher_layers))
        for i, j in pairs:
            self.flow[i - 1, j - 1] = 1 / len(pairs)

    def forward(self, attention: torch.Tensor | None = None, hidden: torch.Tensor | None = None) -> Transport:
        losses = [
            None if cost is None else (torch.as_tensor(self.flow, dtype=cost.dtype, device=cost.device) * cost).sum()
            for cost in (attention, hidden)
        ]
        flows = [None if cost is None else self.flow for cost in (attention, hidden)]
        return Transport(*losses, *flows)


def prediction_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor | None,
    labels: torch.Tensor | None,
    temperature: float = 1.0,
    alpha: float = 1.0,
    regression: bool = False,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """α L_soft + (1 - α) L_hard, and its two terms by name (a term of weight 0 is not computed).

    Classification: L_soft = T² · mean over batch and classes of -softmax(z^T / T) · log_softmax(z^S / T), which is the
    cross-entropy divided by the number of classes (the authors' convention); L_hard = cross-entropy with the labels.
    Regression (logits (batch, 1)): the mean squared errors to the teacher's and to the true values. With several
    processes, the mean of theirs is the loss of all their rows.
    """
    terms = {}
    # Losses are computed in float32, also where the models run in a lower precision.
    student_logits = student_logits.float()
    if alpha > 0:
        teacher_logits = teacher_logits.float()
        if regression:
            terms["soft_loss"] = functional.mse_loss(student_logits.view(-1), teacher_logits.view(-1))
        else:
            targets = functional.softmax(teacher_logits / temperature, dim=-1)
            log_probabilities = functional.log_softmax(student_logits / temperature, dim=-1)
            terms["soft_loss"] = -(targets * log_probabilities).mean() * temperature**2
    if alpha < 1:
        if regression:
            terms["hard_loss"] = functional.mse_loss(student_logits.view(-1), labels.view(-1).float())
        else:
            terms["hard_loss"] = functional.cross_entropy(student_logits, labels.view(-1))
    share = share_of_step(student_logits)
    terms = {name: share * term for name, term in terms.items()}
    weights = {"soft_loss": alpha, "hard_loss": 1 - alpha}
    return sum(weights[name] * term for name, term in terms.items()), terms


@dataclass(frozen=True)
class LayerCosts:
    """Cost matrices between layers, as the module's docstring defines them.

    `count_padding`: the authors' arithmetic, in which padded tokens count like others (masked keys still as 0) and
    the divisor is simply the number of elements; right only with batches padded to `max_seq_length`.
    `kernel`: of `pairwise_mse`.
    """

    max_seq_length: int
    count_padding: bool = False
    kernel: str | None = None

    def hidden(self, student, teacher, attention_mask: torch.Tensor) -> torch.Tensor:
        """(M, N) costs of M projected student and N teacher hidden states, each (batch, length, width)."""
        real = None if self.count_padding else attention_mask.bool().unsqueeze(-1)
        divisor = self._mean_tokens(attention_mask) * student[0].shape[-1]
        return pairwise_mse(list(student), list(teacher), divisor, real, self.kernel)

    def attention(self, student, teacher, attention_mask: torch.Tensor) -> torch.Tensor:
        """(M, N) costs of M student and N teacher score maps, whole or as factors (see `LayerOutputs.attention`)."""
        keys = attention_mask.bool()
        queries = torch.ones_like(keys) if self.count_padding else keys
        divisor = self._mean_tokens(attention_mask) * student[0].shape[-3] * self.max_seq_length
        if student[0].dim() == 4:
            counted = (queries[:, :, None] & keys[:, None]).unsqueeze(1)
            return pairwise_mse(list(student), list(teacher), divisor, counted, self.kernel)
        counted = torch.stack((queries, keys))[:, :, None, :, None]
        return pairwise_attention_mse(
            [layer * counted for layer in student], [layer * counted for layer in teacher], divisor
        )

    def _mean_tokens(self, attention_mask: torch.Tensor) -> torch.Tensor:
        # Tokens that count, as the mean over all processes: the mean of their costs is then the whole batch's cost.
        counted = torch.ones_like(attention_mask) if self.count_padding else attention_mask
        return mean_over_processes(counted.sum().float()).clamp(min=1)


class Objective(nn.Module):
    """The whole loss of a training step, from both models' outputs.

    mapping: `LayerTransport`, `FixedMapping`, or None for no layer losses.
    beta, theta: β and θ of the formula above; alpha, temperature: of `prediction_loss`.
    use_attention, use_hidden, use_embedding, use_prediction: which of the four terms count.
    """

    def __init__(
        self,
        mapping: LayerTransport | FixedMapping | None,
        costs: LayerCosts,
        beta: float,
        theta: float = 1.0,
        alpha: float = 1.0,
        temperature: float = 1.0,
        use_attention: bool = True,
        use_hidden: bool = True,
        use_embedding: bool = True,
        use_prediction: bool = True,
        regression: bool = False,
    ):
        super().__init__()
        self.mapping, self.costs = mapping, costs
        self.beta, self.theta, self.alpha, self.temperature = beta, theta, alpha, temperature
        self.use_attention = use_attention and mapping is not None
        self.use_hidden = use_hidden and mapping is not None
        self.use_embedding = use_embedding and mapping is not None
        self.use_prediction, self.regression = use_prediction, regression
        if not self.looks_at:
            raise InputError("no loss is left to train with; leave one of attention, hidden, embedding, prediction in")

    @property
    def looks_at(self) -> frozenset[str]:
        """The parts of a model's output that count: of "logits", "embedding", "hidden", "attention"."""
        parts = {
            "logits": self.use_prediction,
            "embedding": self.use_embedding,
            "hidden": self.use_hidden,
            "attention": self.use_attention,
        }
        return frozenset(part for part, used in parts.items() if used)

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher is looked at: not when only the labels teach."""
        return bool(self.looks_at - {"logits"}) or (self.use_prediction and self.alpha > 0)

    def forward(
        self,
        student: LayerOutputs,
        teacher: LayerOutputs | None,
        attention_mask: torch.Tensor,
        labels: torch.Tensor | None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], Transport | None]:
        """The loss, its terms by name (unweighted), and the step's flows (None without layer losses)."""
        total, terms, transport = 0.0, {}, None
        if self.use_attention or self.use_hidden:
            attention = hidden = None
            if self.use_attention:
                attention = self.costs.attention(student.attention, teacher.attention, attention_mask)
            if self.use_hidden:
                hidden = self.costs.hidden(student.hidden_states[1:], teacher.hidden_states[1:], attention_mask)
            transport = self.mapping(attention=attention, hidden=hidden)
            for name, loss in (("attention_loss", transport.attention_loss), ("hidden_loss", transport.hidden_loss)):
                if loss is not None:
                    terms[name] = loss
                    total = total + self.beta * self.theta * loss
        if self.use_embedding:
            pair = self.costs.hidden(student.hidden_states[:1], teacher.hidden_states[:1], attention_mask)
            terms["embedding_loss"] = pair[0, 0]
            total = total + self.beta * terms["embedding_loss"]
        if self.use_prediction:
            prediction, parts = prediction_loss(
                student.logits,
                teacher.logits if teacher is not None else None,
                labels,
                self.temperature,
                self.alpha,
                self.regression,
            )
            terms |= parts
            total = total + prediction
        return total, terms, transport
