"""Pre-softmax attention scores, or the queries and keys whose products they are, out of a transformers model.

Two registered attention functions serve every architecture that uses transformers' attention interface. Scores are what
the layer losses compare most cheaply for short inputs, and the model makes them anyway. For long ones their size grows
with the square of the length: there the models run fused attention and hand out queries and keys.
"""

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from bert_finetune.errors import InputError

# Inputs that may be longer than this are compared by their factors: from there on the layer losses take about as long
# with them and a fraction of the memory (benchmarks/RESULTS.md, table e).
LONGEST_SCORES = 256


def attention_with_scores(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    output_attentions: bool = False,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention whose second result is its scores before mask and softmax, (batch, heads, length, length).

    Shapes: `query`, `key`, `value` (batch, heads, length, head size); `attention_mask` additive and broadcastable to
    the scores; the first result is (batch, length, heads, head size). `scaling` is 1/√(head size) by default. Without
    `output_attentions` the attention is fused, and there are no scores.
    """
    if not output_attentions:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    scores = _scaled(query, scaling) @ key.mT
    masked = scores if attention_mask is None else scores + attention_mask
    probabilities = functional.dropout(functional.softmax(masked, dim=-1), dropout, module.training)
    return (probabilities.to(value.dtype) @ value).transpose(1, 2).contiguous(), scores


def attention_with_factors(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    output_attentions: bool = False,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Fused attention whose second result is the factors of its scores, (2, batch, heads, length, head size).

    The factors are `scaling * query` and `key`: the scores are factors[0] @ factors[1]ᵀ. Else as
    `attention_with_scores`.
    """
    factors = torch.stack((_scaled(query, scaling), key)) if output_attentions else None
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    return output, factors


def _scaled(query: torch.Tensor, scaling: float | None) -> torch.Tensor:
    return query * (query.shape[-1] ** -0.5 if scaling is None else scaling)


for _name, _function in (("scores", attention_with_scores), ("factors", attention_with_factors)):
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, eager_mask)


def expose_attention(model: PreTrainedModel, option: str, max_seq_length: int) -> None:
    """Make `model(..., output_attentions=True).attentions` its layers' pre-softmax scores, or their factors.

    `max_seq_length`: of the inputs; it decides between the two. Raises InputError, naming `option`, for an architecture
    that does not use transformers' attention interface.
    """
    if not type(model)._supports_attention_backend:
        raise InputError(
            f"{option}: {type(model).__name__} does not hand out its attention scores through transformers' attention "
            "interface; use a BERT, RoBERTa, ELECTRA or DistilBERT model"
        )
    model.set_attn_implementation("scores" if max_seq_length <= LONGEST_SCORES else "factors")
