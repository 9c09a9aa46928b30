"""What the losses see of a model: its logits, hidden states and attention scores."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel


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
    outputs = model(
        **inputs,
        output_hidden_states=not parts.isdisjoint({"embedding", "hidden"}),
        output_attentions="attention" in parts,
    )
    states = outputs.hidden_states
    if states is not None:
        states = tuple(state if ("hidden" if k else "embedding") in parts else None for k, state in enumerate(states))
    return LayerOutputs(outputs.logits if "logits" in parts else None, states, outputs.attentions)
