"""What the losses see of a model: its logits, hidden states and attention scores."""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from bert_emd.attention_scores import FROM_SOFTMAX, SoftmaxInputs


@dataclass(frozen=True)
class LayerOutputs:
    """What the losses look at: `logits` (batch, classes), `hidden_states` (layers + 1 of (batch, length, width), the
    embedding output first), `attention` (layers of pre-softmax scores (batch, heads, length, length), or of their
    factors (2, batch, heads, length, head size): the scaled queries and the keys, whose products they are). None for
    what was not asked for."""

    logits: torch.Tensor | None
    hidden_states: tuple[torch.Tensor | None, ...] | None = None
    attention: tuple[torch.Tensor, ...] | None = None


def layer_outputs(model: PreTrainedModel, parts: frozenset[str], **inputs) -> LayerOutputs:
    """A forward pass of a model prepared with `expose_attention`, with the parts (of "logits", "embedding",
    "hidden", "attention") that are asked for; hidden states that are not asked for are None in their tuple."""
    attention = "attention" in parts
    reads_softmax = attention and model.config.model_type in FROM_SOFTMAX
    with SoftmaxInputs() if reads_softmax else nullcontext() as softmax:
        outputs = model(
            **inputs,
            output_hidden_states=not parts.isdisjoint({"embedding", "hidden"}),
            output_attentions=attention and not reads_softmax,
        )
    states = outputs.hidden_states
    if states is not None:
        states = tuple(state if ("hidden" if k else "embedding") in parts else None for k, state in enumerate(states))
    scores = tuple(softmax.scores) if reads_softmax else outputs.attentions
    return LayerOutputs(outputs.logits if "logits" in parts else None, states, scores)
