"""The losses: layer by layer under a mapping, embeddings, predictions.

    L = β (θ (L_attention + L_hidden) + L_embedding) + L_prediction

Layer costs, for student layer i and teacher layer j, of pre-softmax attention scores S and T and of hidden states H,
the student's projected to the teacher's width by P; padding takes no part:

    attention  C[i, j] = Σ (S_i - T_j)² / mean_j Σ T_j²              sums over heads, real queries, real keys
    hidden     C[i, j] = Σ (P(H^S_i) - H^T_j)² / mean_j Σ (H^T_j)²   sums over real tokens, width

Each is relative to the teacher's own size, one number per batch and kind, which has no gradient: 1 is what a student
gets that outputs nothing, whatever the teacher, the length and the task, and the flows are those of the plain squared
errors. So one β fits all of them. `PublishedCosts` is the authors' arithmetic, in which β has the teacher's units.
"""

import itertools
import math
from dataclasses import dataclass, field

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
    unit: float = 1.0,
    mean_over_classes: bool = False,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """α L_soft + (1 - α) L_hard, and its two terms by name (a term of weight 0 is not computed).

    Both are the task's kind's: for classes KL divergence and cross-entropy, for scores a mean squared error, here in
    units of `unit`. mean_over_classes: of `TaskKind.soft_loss`. With several processes, the mean of theirs is the loss
    of all their rows.
    """
    terms = {}
    # Losses are computed in float32, also where the models run in a lower precision.
    student_logits = student_logits.float()
    if alpha > 0:
        terms["soft_loss"] = kind.soft_loss(student_logits, teacher_logits.float(), temperature, mean_over_classes)
    if alpha < 1:
        terms["hard_loss"] = kind.hard_loss(student_logits, labels)
    share = share_of_step(student_logits) / unit
    terms = {name: share * term for name, term in terms.items()}
    weights = {"soft_loss": alpha, "hard_loss": 1 - alpha}
    return sum(weights[name] * term for name, term in terms.items()), terms


@dataclass(frozen=True)
class LayerCosts:
    """Cost matrices between layers, as the module's docstring defines them.

    `kernel`: of `pairwise_mse`. `windows`: what `attention_windows` gives for student and teacher. Two layers are
    compared in the scores that both have, and the sum counts as if it were of all scores, so that a narrow layer is not
    nearer to all others for having fewer; the teacher's size likewise.
    """

    kernel: str | None = None
    windows: tuple[list[float], list[float]] | None = None

    def hidden(self, student, teacher, attention_mask: torch.Tensor) -> torch.Tensor:
        """(M, N) costs of M projected student and N teacher hidden states, each (batch, length, width)."""
        real = attention_mask.bool().unsqueeze(-1)
        size = sum((layer.float() * real).square().sum() for layer in teacher)
        return pairwise_mse(list(student), list(teacher), _mean_size(size, teacher), real, self.kernel)

    def attention(self, student, teacher, attention_mask: torch.Tensor) -> torch.Tensor:
        """(M, N) costs of M student and N teacher score maps, whole or as factors (see `LayerOutputs.attention`)."""
        keys = attention_mask.bool()
        if _any_whole(student, teacher):
            student, teacher = _whole(student), _whole(teacher)
            counted = (keys[:, :, None] & keys[:, None]).unsqueeze(1)
            size = self._size(teacher, counted)
            return self._between_scores(student, teacher, counted, _mean_size(size, teacher))
        student, teacher = _without_padding(student, keys, keys), _without_padding(teacher, keys, keys)
        return pairwise_attention_mse(student, teacher, _mean_size(_size_of_scores(teacher), teacher))

    def _size(self, teacher: list[torch.Tensor], counted: torch.Tensor) -> torch.Tensor:
        if self.windows is None:
            return sum((layer.float() * counted).square().sum() for layer in teacher)
        size = 0.0
        for window, layers in _by_window(self.windows[1]).items():
            seen, times = _seen(counted, window)
            size = size + times * sum((teacher[j].float() * seen).square().sum() for j in layers)
        return size

    def _between_scores(
        self, student: list[torch.Tensor], teacher: list[torch.Tensor], counted: torch.Tensor, divisor: torch.Tensor
    ) -> torch.Tensor:
        """Costs of whole scores, of which those count that are `counted` and in both layers' windows."""
        if self.windows is None:
            return pairwise_mse(student, teacher, divisor, counted, self.kernel)
        cost = torch.zeros(len(student), len(teacher), device=counted.device)
        ours, theirs = (_by_window(side).items() for side in self.windows)
        for (own, rows), (other, columns) in itertools.product(ours, theirs):
            seen, times = _seen(counted, min(own, other))
            pair = [student[i] for i in rows], [teacher[j] for j in columns]
            cost[[[i] for i in rows], columns] = pairwise_mse(*pair, divisor / times, seen, self.kernel)
        return cost


def mean_tokens(counted: torch.Tensor) -> torch.Tensor:
    """How many tokens of a (batch, length) mask count, as the mean over all processes: costs divided by it have the
    whole batch's cost as their mean."""
    return mean_over_processes(counted.sum().float()).clamp(min=1)


def _mean_size(size: torch.Tensor, layers) -> torch.Tensor:
    # The mean over all processes too: the mean of their costs is then the whole batch's cost.
    mean = mean_over_processes(size / len(layers))
    # What has no size is no measure: costs stay squared errors.
    return torch.where(mean > 0, mean, 1.0)


def _any_whole(student, teacher) -> bool:
    return student[0].dim() == 4 or teacher[0].dim() == 4


def _whole(layers) -> list[torch.Tensor]:
    """Scores, made where their factors are given."""
    return [layer if layer.dim() == 4 else layer[0].float() @ layer[1].float().mT for layer in layers]


def _by_window(windows: list[float]) -> dict[float, list[int]]:
    """The layers of each window."""
    return {window: [k for k, each in enumerate(windows) if each == window] for window in sorted(set(windows))}


def _seen(counted: torch.Tensor, window: float) -> tuple[torch.Tensor, torch.Tensor | float]:
    """Which of the `counted` scores lie in a window, and how many times as many there are without it."""
    if window == math.inf:
        return counted, 1.0
    places = torch.arange(counted.shape[-1], device=counted.device)
    seen = counted & ((places[:, None] - places).abs() <= window)
    whole, part = mean_over_processes(torch.stack((counted.sum(), seen.sum())).float())
    return seen, whole / part.clamp(min=1)


def _without_padding(layers, queries: torch.Tensor, keys: torch.Tensor) -> list[torch.Tensor]:
    counted = torch.stack((queries, keys))[:, :, None, :, None]
    return [layer * counted for layer in layers]


def _size_of_scores(layers: list[torch.Tensor]) -> torch.Tensor:
    # Σ (Q Kᵀ)² = <Qᵀ Q, Kᵀ K>, without the scores.
    def size(layer):
        queries, keys = (factor.mT @ factor for factor in layer.float())
        return (queries * keys).sum()

    return sum(size(layer) for layer in layers)


@dataclass(frozen=True)
class PublishedCosts(LayerCosts):
    """The authors' arithmetic: mean squared errors, those of attention divided by `max_seq_length` for the keys, to
    which their code always pads.

        attention  C[i, j] = Σ (S_i - T_j)² / (real tokens · heads · max_seq_length)
        hidden     C[i, j] = Σ (P(H^S_i) - H^T_j)² / (real tokens · width)

    count_padding: padded tokens count like others (masked keys as 0), as in their code; right only with batches padded
    to `max_seq_length`. See docs/fidelity.md.
    """

    max_seq_length: int = field(kw_only=True)
    count_padding: bool = False

    def hidden(self, student, teacher, attention_mask: torch.Tensor) -> torch.Tensor:
        counted = torch.ones_like(attention_mask) if self.count_padding else attention_mask
        real, divisor = counted.bool().unsqueeze(-1), mean_tokens(counted) * student[0].shape[-1]
        return pairwise_mse(list(student), list(teacher), divisor, real, self.kernel)

    def attention(self, student, teacher, attention_mask: torch.Tensor) -> torch.Tensor:
        keys = attention_mask.bool()
        queries = torch.ones_like(keys) if self.count_padding else keys
        divisor = mean_tokens(queries) * student[0].shape[-3] * self.max_seq_length
        if _any_whole(student, teacher):
            counted = (queries[:, :, None] & keys[:, None]).unsqueeze(1)
            return self._between_scores(_whole(student), _whole(teacher), counted, divisor)
        return pairwise_attention_mse(
            _without_padding(student, queries, keys), _without_padding(teacher, queries, keys), divisor
        )


@dataclass(frozen=True)
class Objective:
    """The whole loss of a training step, from both models' outputs.

    kind: of the task, None where no predictions count. costs: between layers. beta, theta: β and θ of the formula
    above; alpha, temperature, unit, mean_over_classes: of `prediction_loss`. looks_at: which parts of the models'
    outputs count, of "logits", "embedding", "hidden", "attention". Raises InputError where none is left.
    """

    kind: TaskKind | None
    costs: LayerCosts
    beta: float
    theta: float = 1.0
    alpha: float = 1.0
    temperature: float = 1.0
    looks_at: frozenset[str] = PARTS
    unit: float = 1.0
    mean_over_classes: bool = False

    def __post_init__(self):
        if not self.looks_at:
            raise InputError("no loss is left to train with; leave one of attention, hidden, embedding, prediction in")

    @property
    def weights(self) -> dict[str, float]:
        """What each term counts in the sum."""
        weights = {"attention": self.beta * self.theta, "hidden": self.beta * self.theta, "embedding": self.beta}
        weights |= {"soft": self.alpha, "hard": 1 - self.alpha}
        return {f"{name}_loss": weight for name, weight in weights.items()}

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
        total, terms, matching, weights = 0.0, {}, None, self.weights
        costs = {}
        if "attention" in self.looks_at:
            costs["attention"] = self.costs.attention(student.attention, teacher.attention, attention_mask)
        if "hidden" in self.looks_at:
            costs["hidden"] = self.costs.hidden(student.hidden_states[1:], teacher.hidden_states[1:], attention_mask)
        if costs:
            matching = mapping(**costs)
            for branch in costs:
                name = f"{branch}_loss"
                terms[name] = getattr(matching, name)
                total = total + weights[name] * terms[name]
        if "embedding" in self.looks_at:
            pair = self.costs.hidden(student.hidden_states[:1], teacher.hidden_states[:1], attention_mask)
            terms["embedding_loss"] = pair[0, 0]
            total = total + weights["embedding_loss"] * terms["embedding_loss"]
        if "logits" in self.looks_at:
            theirs = teacher.logits if teacher is not None else None
            how = self.temperature, self.alpha, self.unit, self.mean_over_classes
            prediction, parts = prediction_loss(self.kind, student.logits, theirs, labels, *how)
            terms |= parts
            total = total + prediction
        return total, terms, matching
