"""Queries and keys, whose products are the pre-softmax attention scores, out of a transformers model.

One registered attention function serves every architecture that uses transformers' attention interface, and the models
run their fused attention: no score matrix is ever made here.
"""

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from bert_finetune.errors import InputError

_NAME = "factors"


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
    """Scaled-dot-product attention whose second result is the factors of its scores before mask and softmax.

    Shapes: `query`, `key`, `value` (batch, heads, length, head size); `attention_mask` additive and broadcastable to
    (batch, heads, length, length); the first result is (batch, length, heads, head size), the factors (2, batch, heads,
    length, head size): `scaling * query` and `key`, so that the scores are factors[0] @ factors[1]ᵀ. `scaling` is
    1/√(head size) by default. Without `output_attentions` no factors are kept.
    """
    factors = None
    if output_attentions:
        factors = torch.stack((query * (query.shape[-1] ** -0.5 if scaling is None else scaling), key))
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    return output, factors


AttentionInterface.register(_NAME, attention_with_factors)
AttentionMaskInterface.register(_NAME, eager_mask)


def expose_attention_factors(model: PreTrainedModel, option: str) -> None:
    """Make `model(..., output_attentions=True).attentions` the factors of its layers' pre-softmax scores.

    Raises InputError, naming `option`, for an architecture that does not use transformers' attention interface.
    """
    if not type(model)._supports_attention_backend:
        raise InputError(
            f"{option}: {type(model).__name__} does not hand out its attention scores through transformers' attention "
            "interface; use a BERT, RoBERTa, ELECTRA or DistilBERT model"
        )
    model.set_attn_implementation(_NAME)
