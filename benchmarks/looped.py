"""BERT-EMD's step the straightforward way: what the project's own code is measured against.

Every pair of layers has a loss of its own, batches are padded to the maximum, everything runs in float32, the teacher
answers every batch anew, and the transport problem is solved on the square matrix over all M + N layers. Written from
docs/fidelity.md and held to the same golden values as the project's code.
"""

import numpy as np
import pyemd
import torch
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask

MASKED = -10000.0


def attention_with_scores(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Attention step by step, which returns its scores with the mask added, (batch, heads, length, length)."""
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores + attention_mask.clamp(min=MASKED)
    probabilities = functional.dropout(torch.softmax(scores, dim=-1), dropout, module.training)
    return (probabilities @ value).transpose(1, 2).contiguous(), scores


AttentionInterface.register("looped", attention_with_scores)
AttentionMaskInterface.register("looped", eager_mask)


def outputs(model: PreTrainedModel, **inputs):
    """Logits, hidden states and attention scores; the model must run with attention "looped"."""
    return model(**inputs, output_hidden_states=True, output_attentions=True)


class LoopedTransport:
    """Losses and layer weights (`normalize`, merged) with a distance matrix filled pair by pair."""

    def __init__(self, student_layers: int, teacher_layers: int):
        self.weights = {
            branch: (np.full(student_layers, 1 / student_layers), np.full(teacher_layers, 1 / teacher_layers))
            for branch in ("attention", "hidden")
        }

    def __call__(self, student_scores, teacher_scores, student_hidden, teacher_hidden):
        """Attention loss, hidden loss and embedding loss; hidden states start with the embedding output."""
        losses, updates = [], []
        for branch, student, teacher, mask in (
            ("attention", student_scores, teacher_scores, True),
            ("hidden", student_hidden[1:], teacher_hidden[1:], False),
        ):
            m, n = len(student), len(teacher)
            distance = torch.zeros(m + n, m + n, device=student[0].device)
            for i in range(m):
                for j in range(n):
                    ours, theirs = student[i], teacher[j]
                    if mask:
                        ours = torch.where(ours <= -100, torch.zeros_like(ours), ours)
                        theirs = torch.where(theirs <= -100, torch.zeros_like(theirs), theirs)
                    distance[i, m + j] = distance[m + j, i] = functional.mse_loss(ours, theirs)
            ours, theirs = self.weights[branch]
            square = distance.detach().cpu().numpy().astype("float64")
            _, flow = pyemd.emd_with_flow(
                np.concatenate([ours, np.zeros(n)]), np.concatenate([np.zeros(m), theirs]), square
            )
            flow = np.array(flow)
            losses.append((torch.tensor(flow, dtype=distance.dtype, device=distance.device) * distance).sum())
            moved = (flow * square)[:m, m:]
            updates.append([_normalized(moved.sum(1) / ours), _normalized(moved.sum(0) / theirs)])
        merged = tuple(np.mean(pair, axis=0) for pair in zip(*updates, strict=True))
        self.weights = dict.fromkeys(self.weights, merged)
        return *losses, functional.mse_loss(student_hidden[0], teacher_hidden[0])


def _normalized(costs: np.ndarray) -> np.ndarray:
    shares = costs.sum() / costs
    return shares / shares.sum()


def step(student, projection, teacher, transport, optimizer, inputs, beta: float = 0.01) -> float:
    """One training step on a padded batch, α = 1 and T = 1; returns the loss."""
    with torch.no_grad():
        theirs = outputs(teacher, **inputs)
    ours = outputs(student, **inputs)
    attention, hidden, embedding = transport(
        ours.attentions, theirs.attentions, [projection(state) for state in ours.hidden_states], theirs.hidden_states
    )
    targets = functional.softmax(theirs.logits, dim=-1)
    prediction = -(targets * functional.log_softmax(ours.logits, dim=-1)).mean()
    loss = beta * (attention + hidden + embedding) + prediction
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()
