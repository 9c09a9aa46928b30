"""The losses: layer by layer under a mapping, embeddings, predictions.

    L = β (θ (L_attention + L_hidden) + L_embedding) + L_prediction

Layer costs, for student layer i and teacher layer j:

    attention  C[i, j] = Σ_heads,queries,keys (S_i - T_j)² / divisor    over pre-softmax scores; a masked key counts 0
    hidden     C[i, j] = Σ_tokens,width (P(H^S_i) - H^T_j)² / divisor   over hidden states, projected to teacher width

Padding takes no part: the hidden divisor is real tokens x width, the attention divisor real queries x heads x
`max_seq_length`, to which the authors' code always pads: see docs/fidelity.md for what that means for β, and for what
else their code adds to the BERT-EMD paper.
"""

from dataclasses import dataclass

import torch

from bert_emd.layer_distance import pairwise_attention_mse, pairwise_mse
from bert_emd.layer_mapping import LayerMapping, Matching
from bert_emd.layer_outputs import LayerOutputs
from bert_finetune.errors import InputError
from bert_finetune.processes import mean_over_processes, share_of_step
from bert_finetune.task_kinds import TaskKind

# Of a model's output, what a loss can look at.
PARTS = frozenset({"logits", "embedding", "hidden", "attention"})


def prediction_loss(
    kind: TaskKind,
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor | None,
    labels: torch.Tensor | None,
    temperature: float = 1.0,
    alpha: float = 1.0,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """α L_soft + (1 - α) L_hard, and its two terms by name (a term of weight 0 is not computed).

    Both are the task's kind's: for classes a cross-entropy each, for scores a mean squared error. With several
    processes, the mean of theirs is the loss of all their rows.
    """
    terms = {}
    # Losses are computed in float32, also where the models run in a lower precision.
    student_logits = student_logits.float()
    if alpha > 0:
        terms["soft_loss"] = kind.soft_loss(student_logits, teacher_logits.float(), temperature)
    if alpha < 1:
        terms["hard_loss"] = kind.hard_loss(student_logits, labels)
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


@dataclass(frozen=True)
class Objective:
    """The whole loss of a training step, from both models' outputs.

    kind: of the task. costs: between layers. beta, theta: β and θ of the formula above; alpha, temperature: of
    `prediction_loss`. looks_at: which parts of the models' outputs count, of "logits", "embedding", "hidden",
    "attention". Raises InputError where none is left.
    """

    kind: TaskKind
    costs: LayerCosts
    beta: float
    theta: float = 1.0
    alpha: float = 1.0
    temperature: float = 1.0
    looks_at: frozenset[str] = PARTS

    def __post_init__(self):
        if not self.looks_at:
            raise InputError("no loss is left to train with; leave one of attention, hidden, embedding, prediction in")

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher is looked at: not when only the labels teach."""
        return self.looks_at != {"logits"} or self.alpha > 0

    def __call__(
        self,
        mapping: LayerMapping | None,
        student: LayerOutputs,
        teacher: LayerOutputs | None,
        attention_mask: torch.Tensor,
        labels: torch.Tensor | None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], Matching | None]:
        """The loss, its terms by name (unweighted), and what the `mapping` matched (None without layer losses)."""
        total, terms, matching = 0.0, {}, None
        costs = {}
        if "attention" in self.looks_at:
            costs["attention"] = self.costs.attention(student.attention, teacher.attention, attention_mask)
        if "hidden" in self.looks_at:
            costs["hidden"] = self.costs.hidden(student.hidden_states[1:], teacher.hidden_states[1:], attention_mask)
        if costs:
            matching = mapping(**costs)
            for branch in costs:
                terms[f"{branch}_loss"] = getattr(matching, f"{branch}_loss")
                total = total + self.beta * self.theta * terms[f"{branch}_loss"]
        if "embedding" in self.looks_at:
            pair = self.costs.hidden(student.hidden_states[:1], teacher.hidden_states[:1], attention_mask)
            terms["embedding_loss"] = pair[0, 0]
            total = total + self.beta * terms["embedding_loss"]
        if "logits" in self.looks_at:
            theirs = teacher.logits if teacher is not None else None
            prediction, parts = prediction_loss(self.kind, student.logits, theirs, labels, self.temperature, self.alpha)
            terms |= parts
            total = total + prediction
        return total, terms, matching
